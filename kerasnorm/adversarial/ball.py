"""Balls around inputs, cut off by the bounds of the data: all that depends on a norm.

Every function works on a batch `(rows, ...)` whose rows have radii of their own,
`(rows,)`. `bounds` is a pair of numbers, or of arrays that broadcast against one row.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from keras import ops, random

from kerasnorm.common.errors import KerasNormError


Tensor = Any
Bounds = tuple[Any, Any]

TINY = 1e-12
# Halvings of an interval: float32 has no more to give.
HALVINGS = 30


def per_row(values: Tensor, x: Tensor) -> Tensor:
    """`(rows,)` shaped so that it broadcasts against `x`."""
    return ops.reshape(values, (-1,) + (1,) * (len(x.shape) - 1))


def features(x: Tensor) -> Any:
    """How many values a row has; a tensor where the shape does not say."""
    return math.prod(ops.shape(x)[1:])


def flat(x: Tensor) -> Tensor:
    """`(rows, features)`."""
    return ops.reshape(x, (-1, features(x)))


def like(values: Tensor, x: Tensor) -> Tensor:
    """`(rows, features)` in the shape of `x`."""
    return ops.reshape(values, ops.shape(x))


def spread(bounds: Bounds, x: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bound of every value of `x`."""
    zeros = ops.zeros_like(x)
    return bounds[0] + zeros, bounds[1] + zeros


class Ball:
    """All points no further than `eps` from a centre, by one norm.

    `Ball("linf", 8 / 255)` gives the subclass for the norm.

    Args:
        norm: `"linf"`, `"l2"` or `"l1"`; also `inf`, 2 and 1.
        eps: the radius, or one per row, `(rows,)`.

    Raises:
        KerasNormError: another norm.
    """

    norm: ClassVar[str]
    kinds: ClassVar[dict[str, type[Ball]]] = {}

    def __init_subclass__(cls, norm: str):
        cls.norm = norm
        Ball.kinds[norm] = cls

    def __new__(cls, norm: Any = None, eps: Any = math.inf):
        kind: Any = Ball.kinds[canonical(norm)]
        return object.__new__(kind)

    def __init__(self, norm: Any, eps: Any = math.inf):
        self.eps = eps

    def __repr__(self) -> str:
        return f"Ball({self.norm!r}, {self.eps!r})"

    def radii(self, x: Tensor) -> Tensor:
        """The radius of every row, broadcastable to `x`."""
        eps = ops.cast(ops.convert_to_tensor(self.eps), x.dtype)
        return per_row(eps, x) if len(eps.shape) else eps

    def start(self, x: Tensor, bounds: Bounds, seed: Any) -> Tensor:
        """A point drawn uniformly from the ball, clipped to the bounds."""
        raise NotImplementedError

    def steepest(self, x: Tensor, g: Tensor, length: Tensor, bounds: Bounds) -> Tensor:
        """The displacement `d` of norm `length` with the largest `<g, d>`.

        Args:
            x: where the step begins; the l1 step needs it, as what counts there is
                how far each value can go before it meets its bound.
            g: gradient of what is to grow. Where it is 0, nothing moves.
            length: `(rows,)`.
        """
        raise NotImplementedError

    def project(self, centre: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        """A near point of the ball around `centre`, within the bounds."""
        raise NotImplementedError

    def distance(self, centre: Tensor, x: Tensor) -> Tensor:
        """The norm of `x - centre`, `(rows,)`."""
        raise NotImplementedError

    def dual(self, g: Tensor) -> Tensor:
        """The largest `<g, d>` over `d` of norm 1, `(rows,)`."""
        raise NotImplementedError

    def to_plane(self, x: Tensor, w: Tensor, b: Tensor, bounds: Bounds) -> Tensor:
        """The smallest `d` with `<w, x + d> = b` and `x + d` within the bounds.

        Where no such point exists, every value goes to the bound that brings it
        nearest. `b` is `(rows,)`.
        """
        gap = ops.cast(b, x.dtype) - ops.sum(flat(w * x), axis=1)
        towards = ops.sign(w) * per_row(ops.sign(gap), x)
        d = self._moves(flat(ops.abs(w)), flat(_room(x, towards, bounds)), ops.abs(gap))
        return towards * like(d, x)

    def _moves(self, weights: Tensor, room: Tensor, wanted: Tensor) -> Tensor:
        """Sizes `0 <= m <= room` of least norm with `<weights, m> = wanted`."""
        raise NotImplementedError


def canonical(norm: Any) -> str:
    """The name of a norm."""
    names = {"inf": "linf", "2": "l2", "1": "l1", "2.0": "l2", "1.0": "l1"}
    text = str(norm).lower()
    text = names.get(text, text)
    if text not in Ball.kinds:
        raise KerasNormError(
            "no such norm", got=repr(norm), expected=" or ".join(map(repr, Ball.kinds))
        )
    return text


def check_distance(norm: str, centre: Any, x: Any) -> np.ndarray:
    """Distances of float32 arrays in float64, apart from the attacks' own tensors."""
    d = np.abs(np.asarray(x, "float64") - np.asarray(centre, "float64"))
    d = d.reshape(len(d), -1)
    if norm == "linf":
        return d.max(axis=1, initial=0.0)
    return d.sum(axis=1) if norm == "l1" else np.sqrt(np.square(d).sum(axis=1))


def rounding(norm: str, largest: Any, values: int) -> Any:
    """What float32 may add to a distance between inputs of so many values, the largest
    of this size: half a unit in the last place per value."""
    power = {"linf": 0.0, "l2": 0.5, "l1": 1.0}[norm]
    return 2e-7 * largest * values**power


class Linf(Ball, norm="linf"):
    """Each value moves by at most `eps`."""

    def start(self, x, bounds, seed):
        d = random.uniform(ops.shape(x), -1.0, 1.0, dtype=x.dtype, seed=seed)
        return ops.clip(x + self.radii(x) * d, *bounds)

    def steepest(self, x, g, length, bounds):
        return ops.sign(g) * per_row(length, x)

    def project(self, centre, x, bounds):
        r = self.radii(x)
        return ops.clip(ops.clip(x, centre - r, centre + r), *bounds)

    def distance(self, centre, x):
        return ops.max(flat(ops.abs(x - centre)), axis=1)

    def dual(self, g):
        return ops.sum(flat(ops.abs(g)), axis=1)

    def _moves(self, weights, room, wanted):
        # All move alike, until they meet their bounds.
        def moved(size):
            return ops.minimum(size[:, None], room)

        top = ops.max(room, axis=1)
        return moved(_solve(lambda s: _dot(weights, moved(s)), wanted, top))


class L2(Ball, norm="l2"):
    """Euclidean distance at most `eps`."""

    def start(self, x, bounds, seed):
        d = random.normal(ops.shape(x), dtype=x.dtype, seed=seed)
        r = random.uniform((ops.shape(x)[0],), dtype=x.dtype, seed=seed)
        r = ops.power(r, 1.0 / ops.cast(features(x), x.dtype))
        r = r / ops.maximum(_l2(d), TINY)
        return ops.clip(x + self.radii(x) * per_row(r, x) * d, *bounds)

    def steepest(self, x, g, length, bounds):
        # By its largest value first: squares of small gradients underflow.
        top = per_row(ops.max(flat(ops.abs(g)), axis=1), x)
        g = g / ops.where(top > 0, top, ops.ones_like(top))
        return g * per_row(length / ops.maximum(_l2(g), TINY), x)

    def project(self, centre, x, bounds):
        d = x - centre
        norm = ops.maximum(per_row(_l2(d), x), TINY)
        # Clipping moves every value towards the centre, so the point stays inside.
        return ops.clip(centre + d * ops.minimum(1.0, self.radii(x) / norm), *bounds)

    def distance(self, centre, x):
        return _l2(x - centre)

    def dual(self, g):
        return _l2(g)

    def _moves(self, weights, room, wanted):
        # Each moves by its weight times one factor, at least that without bounds. The
        # factor can be many orders of magnitude larger, so its logarithm is halved.
        squares = ops.maximum(_dot(weights, weights), 1e-30)
        least = ops.maximum(wanted, 1e-30) / squares

        def moved(exponent):
            return ops.minimum((least * ops.exp(exponent))[:, None] * weights, room)

        top = 16.0 * ops.ones_like(least)
        return moved(_solve(lambda e: _dot(weights, moved(e)), wanted, top))


class L1(Ball, norm="l1"):
    """Absolute differences sum to at most `eps`."""

    def start(self, x, bounds, seed):
        # Exponential lengths, one more than there are values: their shares of the sum
        # are uniform on the simplex.
        u = random.uniform(ops.shape(x), -1.0, 1.0, dtype=x.dtype, seed=seed)
        rest = random.uniform((ops.shape(x)[0],), dtype=x.dtype, seed=seed)
        d = -ops.log(ops.maximum(ops.abs(u), TINY))
        total = ops.sum(flat(d), axis=1) - ops.log(ops.maximum(rest, TINY))
        d = ops.sign(u) * d * per_row(1.0 / total, x)
        return ops.clip(x + self.radii(x) * d, *bounds)

    def steepest(self, x, g, length, bounds):
        # The values of the largest gradients go to their bounds, until the length is
        # used up (Croce and Hein 2021, "Mind the Box").
        room = flat(_room(x, ops.sign(g), bounds))
        m = _greedy(flat(ops.abs(g)), room, length, ops.ones_like(room))
        return ops.sign(g) * like(m, x)

    def project(self, centre, x, bounds):
        d = ops.clip(x, *bounds) - centre
        size, r = flat(ops.abs(d)), ops.reshape(self.radii(x), (-1,))
        raw = flat(ops.abs(x - centre))

        def shrunk(by):
            return ops.minimum(ops.maximum(raw - by[:, None], 0.0), size)

        # A shrinkage of 0 leaves most; the sum falls as it grows.
        top = ops.max(raw, axis=1)
        spare = top - _solve(
            lambda kept: ops.sum(shrunk(top - kept), axis=1), r + 0.0 * top, top
        )
        inside = ops.sum(size, axis=1) <= r
        m = ops.where(inside[:, None], size, shrunk(spare))
        return ops.clip(centre + ops.sign(d) * like(m, x), *bounds)

    def distance(self, centre, x):
        return ops.sum(flat(ops.abs(x - centre)), axis=1)

    def dual(self, g):
        return ops.max(flat(ops.abs(g)), axis=1)

    def _moves(self, weights, room, wanted):
        return _greedy(weights, room, wanted, weights)


def _l2(x: Tensor) -> Tensor:
    return ops.sqrt(ops.sum(ops.square(flat(x)), axis=1))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return ops.sum(a * b, axis=1)


def _room(x: Tensor, towards: Tensor, bounds: Bounds) -> Tensor:
    """How far each value can go in the direction of a sign."""
    low, high = spread(bounds, x)
    room = ops.where(towards > 0, high - x, x - low)
    return ops.where(towards == 0, 0.0, ops.maximum(room, 0.0))


def _solve(f: Any, wanted: Tensor, top: Tensor) -> Tensor:
    """The largest `s` found in `[0, top]` with `f(s) <= wanted`, `f` growing."""

    def halve(_, interval):
        low, high = interval
        middle = (low + high) / 2
        fits = f(middle) <= wanted
        return ops.where(fits, middle, low), ops.where(fits, high, middle)

    low = ops.zeros_like(top)
    low, _ = ops.fori_loop(0, HALVINGS, halve, (low, top))
    return ops.where(f(top) <= wanted, top, low)


def _greedy(order: Tensor, room: Tensor, budget: Tensor, price: Tensor) -> Tensor:
    """Fills up the room of the values with the largest `order` until the budget, at
    `price` per unit, is spent; the last are filled in part."""
    top = ops.max(order, axis=1) + TINY

    def filled(rank):
        return ops.where(order > (top - rank)[:, None], room, 0.0)

    rank = _solve(lambda s: _dot(price, filled(s)), budget, top)
    full = filled(rank)
    # What halving cannot tell apart shares the rest.
    edge = ops.where(full > 0, 0.0, room)
    near = order > (top - rank - 1e-6 * top)[:, None] * (1 - 1e-6)
    edge = ops.where(ops.logical_and(near, order > 0), edge, 0.0)
    rest = ops.maximum(budget - _dot(price, full), 0.0)
    cost = _dot(price, edge)
    share = ops.minimum(rest / ops.maximum(cost, TINY), 1.0)
    return full + edge * share[:, None]


def slack(norm: str, x: np.ndarray, distance: Any) -> Any:
    """How far two ways to compute a distance from `x` in float32 may differ."""
    largest = max(1.0, float(np.abs(x).max(initial=0)))
    return 1e-5 * distance + rounding(norm, largest, math.prod(x.shape[1:]))
