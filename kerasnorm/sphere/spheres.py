"""How one variable splits into spheres, as data that a saved optimizer can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.flow.analysis import Flow
from kerasnorm.flow.ties import runs
from kerasnorm.sphere import geometry


Tensor = Any

# A weight whose length differs by more from its radius was set from outside. Half types
# round a length by more: two units in the last place.
MOVED = {"float16": 2**-9, "bfloat16": 2**-6}

# What Keras's optimizers call the slots that hold directions, not sizes.
DIRECTIONS = ("momentum",)


@dataclass(frozen=True)
class Spheres:
    """The spheres of one variable.

    Args:
        path: of the variable.
        index: its place among the variables that the optimizer is built with.
        shape: its shape.
        filters: axes that tell one filter from another.
        groups: None for a sphere of each filter; else so many runs of filters of equal
            size, 1 for the whole variable.
        spectral: the radius is the largest singular value of the `(fan_in, filters)`
            matrix; the whole variable is one point.
    """

    path: str
    index: int
    shape: tuple[int, ...]
    filters: tuple[int, ...]
    groups: int | None = None
    spectral: bool = False

    @classmethod
    def of(cls, flow: Flow, index: int, kind: str) -> Spheres:
        """The spheres on which a weight may be held.

        Args:
            flow: what is known of it; one sphere where it is not invariant.
            index: see the class.
            kind: `"unit"` for the finest spheres that were proved, `"layer"`,
                `"joint"` or `"spectral"` for one of the whole variable.
        """
        kernel = flow.kernel
        groups = runs(flow.units) if kind == "unit" else 1
        shape = tuple(kernel.variable.shape)
        filters = tuple(a % len(shape) for a in kernel.filters)
        if groups not in (None, 1) and np.ptp(filters) >= len(filters):
            groups = 1  # filters whose axes are not side by side
        path = kernel.variable.path
        return cls(path, index, shape, filters, groups, kind == "spectral")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Spheres:
        """The inverse of `get_config`."""
        lists = {k: tuple(config[k]) for k in ("shape", "filters")}
        return cls(**{**config, **lists})

    def get_config(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def axes(self) -> tuple[int, ...] | None:
        """What lies on one sphere, in the view of `split`."""
        if self.groups == 1:
            return None
        if self.groups is None:
            return tuple(a for a in range(len(self.shape)) if a not in self.filters)
        rank = len(self._grouped())
        return tuple(a for a in range(rank) if a != min(self.filters))

    def split(self, x: Tensor) -> Tensor:
        """A tensor of the variable's shape, with groups on an axis of their own."""
        if self.groups in (None, 1):
            return x
        return ops.reshape(x, self._grouped())

    def _grouped(self) -> tuple[int | None, ...]:
        first, last = min(self.filters), max(self.filters)
        return (*self.shape[:first], self.groups, -1, *self.shape[last + 1 :])

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        return x if self.groups in (None, 1) else ops.reshape(x, self.shape)

    def radius(self, x: Tensor) -> Tensor:
        """Length of each point of a split tensor, with size 1 along `axes`."""
        if self.spectral:
            return ops.reshape(self._largest_singular_value(x), (1,) * len(self.shape))
        return geometry.norm(x, self.axes)

    def _largest_singular_value(self, x: Tensor) -> Tensor:
        order = [a for a in range(len(self.shape)) if a not in self.filters]
        columns = math.prod(self.shape[a] for a in self.filters)
        w = ops.reshape(ops.transpose(x, order + list(self.filters)), (-1, columns))
        if w.shape[0] > w.shape[1]:
            w = ops.transpose(w)
        _, vectors = ops.eigh(ops.matmul(w, ops.transpose(w)))
        # By way of the vector: its error enters squared.
        return geometry.norm(ops.matmul(ops.transpose(vectors[:, -1:]), w))


def bind(
    spheres: Sequence[Spheres], variables: Sequence[Any], known: Mapping[int, Spheres]
) -> dict[int, Spheres]:
    """Which of an optimizer's variables lie on spheres.

    Args:
        spheres: those wanted, from a model or from a saved optimizer.
        variables: what the optimizer is built with.
        known: `id(variable)` -> spheres, where the variables themselves are known.

    Returns:
        Index of the variable -> spheres. Variables that are not trained are left out.

    Raises:
        KerasNormError: a saved optimizer does not fit these variables.
    """
    if known:
        return {i: known[id(v)] for i, v in enumerate(variables) if id(v) in known}
    paths = [getattr(v, "path", v.name) for v in variables]
    found = {}
    for s in spheres:
        places = [s.index] if s.index < len(variables) else []
        if not places or paths[s.index] != s.path:
            places = [i for i, p in enumerate(paths) if p == s.path] or places
        places = [i for i in places if tuple(variables[i].shape) == s.shape]
        if len(places) != 1:
            raise KerasNormError(
                "the optimizer was made for another model",
                got=f"no variable like {s.path!r} of shape {s.shape}",
                expected="the variables it was saved with",
                fix="Pass the model: OnSphere(optimizer, model).",
            )
        found[places[0]] = s
    return found


def first_radius(variable: Any, spheres: Spheres) -> np.ndarray:
    """The radii of a variable's value, computed in float64 where NumPy can."""
    value = keras.ops.convert_to_numpy(variable).astype("float64")
    if spheres.spectral:
        order = [a for a in range(value.ndim) if a not in spheres.filters]
        columns = math.prod(spheres.shape[a] for a in spheres.filters)
        w = value.transpose(order + list(spheres.filters)).reshape(-1, columns)
        return np.reshape(np.linalg.norm(w, 2), (1,) * value.ndim)
    if spheres.groups not in (None, 1):
        value = value.reshape(spheres._grouped())
    return np.sqrt(np.sum(value**2, axis=spheres.axes, keepdims=True))


def directions(inner: Any, i: int, count: int) -> list[Any]:
    """The wrapped optimizer's slots for a variable that are directions."""
    rows = [
        v
        for v in vars(inner).values()
        if isinstance(v, (list, tuple)) and len(v) == count
    ]
    slots = [row[i] for row in rows if isinstance(row[i], keras.Variable)]
    return [s for s in slots if s.name.endswith(DIRECTIONS)]


def inverse(x: Tensor) -> Tensor:
    """`1 / x`, 0 where `x` is 0."""
    zero = ops.equal(x, 0)
    return ops.where(zero, 0.0, 1.0 / ops.where(zero, 1.0, x))


def unless_moved(radius: Tensor, actual: Tensor, dtype: Any) -> Tensor:
    """The radius that is kept, against rounding; where the weight, of this type, was
    set since to another length, that."""
    moved = MOVED.get(keras.backend.standardize_dtype(dtype), 1e-3)
    same = ops.abs(actual - radius) <= moved * radius
    return ops.where(same, radius, actual)
