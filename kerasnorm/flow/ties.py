"""Factors of filters, and which of them must be equal: what `flow` computes with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kerasnorm.kernels.kernel import Kernel


Owners = np.ndarray


class Stop(Exception):
    """A factor is tied to 1: `reason`, and whether that is a proof (`decided`)."""

    def __init__(self, reason: str, decided: bool):
        super().__init__(reason)
        self.reason, self.decided = reason, decided


@dataclass(frozen=True)
class Scaled:
    """What is known of a value: `s[owner] ** degree * z + c`.

    Args:
        owners: filter of each element, broadcastable to the value, of its rank.
        degree: the power of s.
        shift: axes along which c varies; None where c is 0.
    """

    owners: Owners
    degree: float = 1.0
    shift: frozenset[int] | None = None

    @property
    def rank(self) -> int:
        return self.owners.ndim


@dataclass(frozen=True)
class Absorber:
    """A normalization that a kernel's scale does not pass.

    Args:
        path: of its call.
        layer: the normalization layer.
        owners: unit of the kernel whose factor each channel carries, -1 for none; None
            where one channel carries several.
        degree: the power of that factor.
        shifted: whether a constant is added on the way, such as a bias.
    """

    path: str
    layer: Any
    owners: tuple[int, ...] | None
    degree: float
    shifted: bool


class Ties:
    """The factors of one kernel's filters, and which of them must be equal."""

    def __init__(self, kernel: Kernel, joint: bool):
        self.kernel, self.joint = kernel, joint
        self.count = kernel.view_shape()[1]
        self.parent = np.arange(self.count + 1)  # the last one is fixed at 1

    @property
    def fixed(self) -> int:
        """The owner of elements that carry no factor."""
        return self.count

    def find(self, owner: int) -> int:
        while self.parent[owner] != owner:
            owner = self.parent[owner]
        return int(owner)

    def tie(self, owners: Any, where: str) -> None:
        """Makes the factors of all these filters one."""
        owners = np.unique(owners)
        roots = {self.find(o) for o in owners.tolist()}
        if len(roots) > 1 and self.find(self.fixed) in roots:
            raise Stop(f"{where} mixes it with channels that do not scale", True)
        first = min(roots)
        for root in roots:
            self.parent[root] = first

    def merge(self, owners: Owners, axes: Sequence[int], where: str) -> Owners:
        """Ties what lies along `axes`, which then have size 1."""
        axes = tuple(a % owners.ndim for a in axes)
        if all(owners.shape[a] == 1 for a in axes):
            return owners
        rest = [a for a in range(owners.ndim) if a not in axes]
        rows = owners.transpose(rest + list(axes))
        rows = rows.reshape(-1, int(np.prod([owners.shape[a] for a in axes])))
        for row in np.unique(rows, axis=0):
            self.tie(row, where)
        index = tuple(
            slice(0, 1) if a in axes else slice(None) for a in range(owners.ndim)
        )
        return owners[index]

    def same(self, owners: Sequence[Owners], where: str) -> Owners:
        """Ties what meets element by element."""
        rank = max(o.ndim for o in owners)
        full = [o.reshape((1,) * (rank - o.ndim) + o.shape) for o in owners]
        first, *others = np.broadcast_arrays(*full)
        for other in others:
            pairs = np.stack([first.ravel(), other.ravel()], 1)
            for pair in np.unique(pairs, axis=0):
                self.tie(pair, where)
        return compress(first)

    def units(self) -> tuple[int, ...]:
        """Number of the class of tied filters that each filter is in."""
        roots = [self.find(o) for o in range(self.count)]
        number = {root: n for n, root in enumerate(dict.fromkeys(roots))}
        return tuple(number[root] for root in roots)


def compress(owners: Owners) -> Owners:
    """Size 1 along every axis that nothing varies along."""
    for axis in range(owners.ndim):
        if owners.shape[axis] > 1:
            first = np.take(owners, [0], axis)
            if (owners == first).all():
                owners = first
    return np.ascontiguousarray(owners)


def runs(units: Sequence[int]) -> int | None:
    """Number of equal runs of filters that the units of a kernel are, None where each
    filter is one; 1, which is always right, where they are neither."""
    count = max(units, default=0) + 1
    if not units or len(units) % count:
        return 1
    if len(units) == count > 1:
        return None
    even = np.repeat(np.arange(count), len(units) // count)
    return count if (even == units).all() else 1
