"""A swapped layer as a problem of its own: what to choose, and gamma and beta."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kerasnorm.fitting import solve
from kerasnorm.fitting.observations import Array, Parameters


# Shares of the mean variance that "auto" tries as epsilon. Where variances are alike, a
# third of what a sample is divided by, in squares, is its own with the last: a layer of
# which less were would normalize too little to be called by its name.
SHARES = (0.5, 1.0, 2.0)
# A number of groups is the last tried after so many that were no better.
PATIENCE = 2
# A layer that keeps so much is left as it is.
ENOUGH = 0.9999


@dataclass(frozen=True)
class SiteFit:
    """How one swapped layer was fitted.

    Args:
        path: where it is.
        before: share of the old layer's variance kept with gamma and beta copied, on
            rows held out.
        after: the same after the fit (rho squared of the new output).
        rows: observations it was solved on.
        groups: number of groups where it was chosen, else None.
        epsilon: epsilon where it was chosen, else None.
        normalizes: with that epsilon, the mean share of a sample's own variance in what
            it is divided by; 1 for an epsilon of 0.
        note: why it was not fitted, else empty.
    """

    path: str
    before: float = 0.0
    after: float = 0.0
    rows: int = 0
    groups: int | None = None
    epsilon: float | None = None
    normalizes: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Choice:
    """What can be chosen of a layer before gamma and beta are solved.

    Args:
        groups: number of groups; None where the layer has none, or it is given.
        scale: what its inputs are multiplied with, channel by channel, by the linear
            layer that makes them; None for nothing.
        epsilon: None where it stays.
        normalizes: see `SiteFit`.
    """

    groups: int | None = None
    scale: Array | None = None
    epsilon: float | None = None
    normalizes: float | None = None


class Site:
    """Rows of all calls of one swapped layer, as sums.

    Args:
        path: where it is.
        layer: the new layer.
        columns: number of channels.
    """

    def __init__(self, path: str, layer: Any, columns: int):
        self.path, self.layer, self.columns = path, layer, columns
        self.parameters = Parameters(layer)
        self.start = self.parameters.values(columns)
        self.chosen = Choice()
        self.rows, self.held = solve.Sums(), solve.Sums()
        self.solved = 0

    def add(self, z: Array, y: Array, held: Array) -> None:
        """Adds rows of normalized values and of what they should become; `held` says
        which are held out."""
        self.rows.add(z[~held], y[~held])
        self.held.add(z[held], y[held])

    @property
    def pending(self) -> bool:
        """Whether there are rows that no solution has seen."""
        return self.rows.n > self.solved

    @property
    def grown(self) -> bool:
        """Whether it is worth solving: at every step of a long sequence it is not."""
        return self.pending and self.rows.n >= 1.25 * self.solved

    def settle(self) -> SiteFit:
        """Sets gamma and beta to the solution on all rows there are, as far as it holds
        on those held out."""
        gamma, beta = found = solution(self.rows, self.parameters, self.start)
        judge = self.held if self.held.n else self.rows
        if self.held.n:
            old = self.start
            tried = [
                tuple(o + t * (n - o) for o, n in zip(old, found, strict=True))
                for t in (1.0, 0.5, 0.0)
            ]
            gamma, beta = min(tried, key=lambda v: judge.error(*v))
        self.parameters.assign(gamma, beta)
        self.solved = self.rows.n
        gamma, beta = self.parameters.values(self.columns)
        return SiteFit(
            self.path,
            judge.kept(*self.start),
            judge.kept(gamma, beta),
            self.rows.n,
            self.chosen.groups,
            self.chosen.epsilon,
            self.chosen.normalizes,
        )


def solution(
    sums: solve.Sums, p: Parameters, start: tuple[Array, Array]
) -> tuple[Array, Array]:
    """gamma and beta of a layer, as far as it has them."""
    return solve.affine(
        sums,
        scale=p.gamma is not None,
        center=p.beta is not None,
        tied=p.tied,
        default=start,
    )


def choose(
    site: Site,
    forward: Callable[[Array | None], Array],
    target: Array,
    held: Array,
    *,
    groups: Sequence[int | None],
    epsilon: bool,
    scales: Sequence[Array | None],
) -> Choice:
    """The choice that keeps most variance on rows held out, set on the layer but for
    the scale.

    Args:
        site: the layer, with neutral gamma and beta.
        forward: its outputs as rows, for inputs multiplied with a scale.
        target: rows of what they should become.
        held: which rows are held out.
        groups: numbers of groups to try, up to where they are no better.
        epsilon: whether it may be chosen.
        scales: what the inputs may be multiplied with.
    """
    layer, best, least = site.layer, Choice(), np.inf
    p = site.parameters
    was = {
        name: getattr(layer, name)
        for name in ("groups", "epsilon")
        if type(getattr(layer, name, None)) in (int, float)
    }

    def left(z: Array) -> float:
        rows = solve.Sums(z[~held], target[~held])
        judge = solve.Sums(z[held], target[held]) if held.any() else rows
        return 1 - judge.kept(*solution(rows, p, site.start))

    first = forward(None)
    plain = 1 - solve.Sums(first, target).kept(*site.start)
    if plain < 1 - ENOUGH:
        return best

    def take(choice: Choice) -> None:
        for name, old in was.items():
            value = getattr(choice, name)
            setattr(layer, name, old if value is None else value)

    worse = 0
    for number in groups:
        found = np.inf
        for scale in scales:
            choice = Choice(number, scale)
            take(choice)
            z = forward(scale)
            tried = [(left(z), choice)]
            if epsilon:
                tried += [
                    (left(z * factor), replace(choice, epsilon=e, normalizes=share))
                    for e, share, factor in _epsilons(layer, forward, scale, z)
                ]
            error, choice = min(tried, key=lambda pair: pair[0])
            found = min(found, error)
            if error < least:
                least, best = error, choice
        worse = 0 if found <= least else worse + 1
        if worse == PATIENCE:
            break
    take(best)
    if best.epsilon is not None and left(forward(best.scale)) > 1.05 * least:
        # Not what epsilon does to this layer.
        best = replace(best, epsilon=None, normalizes=None)
        take(best)
    return best


def numbers(site: Site) -> list[int | None]:
    """Numbers of groups to try.

    Groups of fewer than four channels are none: they are nearly instance normalization,
    which loses too much where a pooling follows.
    """
    own = getattr(site.layer, "groups", None)
    # What else it holds may be of one number of groups.
    free = type(own) is int and len(site.layer.variables) <= len(site.parameters.learnt)
    few = range(1, max(site.columns // 4, 1) + 1)
    return [g for g in few if site.columns % g == 0] if free else [None]


def _epsilons(
    layer: Any,
    forward: Callable[[Array | None], Array],
    scale: Array | None,
    z: Array,
) -> Iterator[tuple[float, float, Array]]:
    """Values of epsilon to try, with `normalizes` and what they multiply z with.

    The variance is told by what another epsilon does to the outputs: they are of the
    form d / sqrt(variance + epsilon), which is checked with what is chosen.
    """
    own: Any = getattr(layer, "epsilon", None)
    if type(own) not in (int, float):
        return
    used = np.abs(z) > 1e-3 * np.sqrt(np.mean(np.square(z)) + 1e-30)
    size, variance = 1.0, None
    for _ in range(8):  # until it is about the variance
        layer.epsilon = size
        other = forward(scale)
        # sqrt((variance + size) / (variance + own))
        ratio = np.divide(z, other, out=np.ones_like(z), where=used & (other != 0))
        ratio = np.square(ratio.astype("float64"))
        told = used & (ratio > 1 + 1e-5)
        if not told.any():
            size *= 1e4
            continue
        variance = np.where(
            told, (size - ratio * own) / np.maximum(ratio - 1, 1e-5), np.nan
        )
        middle = float(np.nanmedian(variance))
        if 1e-2 < middle / size < 1e2:
            break
        size = max(middle, 1e-12)
    layer.epsilon = own
    if variance is None or not np.isfinite(np.nanmean(variance)):
        return
    variance = np.maximum(variance, 0)
    mean = float(np.nanmean(variance))
    variance = np.where(np.isnan(variance), mean, variance)
    if np.mean(np.std(variance, 0)) < 1e-2 * mean:
        return  # it is that of all samples, and known by heart
    for share in SHARES:
        value = float(np.float32(own + share * mean))
        factor = np.sqrt((variance + own) / (variance + value))
        yield (
            value,
            float(np.mean(variance / (variance + value))),
            factor.astype(z.dtype),
        )
