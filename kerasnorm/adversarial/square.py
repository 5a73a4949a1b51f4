"""The Square attack: random squares, kept where they help. It sees outputs alone.

Andriushchenko et al. 2020, "Square Attack: a query-efficient black-box adversarial
attack via random search", https://arxiv.org/abs/1912.00049.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops, random

from kerasnorm.adversarial.attack import Attack, Problem, State, Step, margin, named
from kerasnorm.adversarial.ball import Tensor, per_row
from kerasnorm.common.errors import taking
from rewriters.arguments import Count, Positive


# The share of the image that a square covers is halved at these queries.
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True)
class Square(Attack):
    """Random search with squares.

    Args:
        steps: queries.
        share: of the image that the first squares cover.
    """

    share: float = 0.8

    white_box: ClassVar[bool] = False

    @property
    def judgements(self) -> int:
        return self.steps

    def begin(self, p: Problem) -> State:
        image = _Image(p)
        if p.ball.norm == "linf":
            # Vertical stripes, of one sign per column and channel.
            signs = image.signs(p, (1, image.width, image.channels))
            d = per_row(p.eps, signs) * signs + ops.zeros_like(image.x)
        else:
            d = image.tiles(p)
        x = p.project(image.back(image.x + d))
        return {"x": x, "best": p.x, "margin": ops.zeros_like(p.eps) - 1e30}

    def step(self, p: Problem, s: State) -> Step:
        # What was proposed last time is judged, then the next proposal is made.
        x = s["x"]
        logits = p.logits(x)
        gap = margin(logits, p)
        better = gap > s["margin"]
        best = ops.where(per_row(better, x), x, s["best"])
        image = _Image(p)
        # Halving as the paper, which counts queries from the first square on.
        halvings = sum(ops.cast(p.count > at, "float32") for at in HALVED_AT)
        share = self.share * ops.power(2.0, -halvings)
        propose = image.square if p.ball.norm == "linf" else image.exchange
        proposal = p.project(image.back(propose(p, image.of(best), share)))
        state = {
            "x": proposal,
            "best": best,
            "margin": ops.where(better, gap, s["margin"]),
        }
        return Step(state, x, logits)


class _Image:
    """Inputs seen as `(rows, height, width, channels)`; vectors are one column wide."""

    def __init__(self, p: Problem):
        shape = tuple(p.x.shape[1:])
        self.first = len(shape) == 3 and (
            keras.config.image_data_format() == "channels_first"
        )
        if len(shape) != 3:
            shape = (math.prod(shape), 1, 1)
        elif self.first:
            shape = (*shape[1:], shape[0])
        self.height, self.width, self.channels = shape
        self.original = tuple(p.x.shape[1:])
        self.x = self.of(p.x)

    def of(self, x: Tensor) -> Tensor:
        if self.first:
            return ops.transpose(x, (0, 2, 3, 1))
        return ops.reshape(x, (-1, self.height, self.width, self.channels))

    def back(self, x: Tensor) -> Tensor:
        if self.first:
            return ops.transpose(x, (0, 3, 1, 2))
        return ops.reshape(x, (-1, *self.original))

    def signs(self, p: Problem, shape: tuple[int, ...]) -> Tensor:
        rows = ops.shape(p.x)[0]
        u = random.uniform((rows, *shape), -1.0, 1.0, seed=p.seed)
        return ops.where(u < 0, -1.0, 1.0)

    def sides(self, share: Tensor, least: int) -> tuple[Tensor, Tensor]:
        """Height and width of squares of a share of the image, `(rows,)` int32."""
        area = share * (self.height * self.width)
        side = ops.round(ops.sqrt(area) if self.width > 1 else area)
        side = ops.cast(ops.maximum(side, least), "int32")
        return ops.minimum(side, self.height), ops.minimum(side, self.width)

    def window(self, p: Problem, sides: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
        """Places of windows: offsets of every pixel from the window's first row and
        column, `(rows, height, 1, 1)` and `(rows, 1, width, 1)`, and whether it is in
        the window, `(rows, height, width, 1)`."""
        offsets = []
        for axis, (side, extent) in enumerate(
            zip(sides, (self.height, self.width), strict=True)
        ):
            u = random.uniform((ops.shape(p.x)[0],), seed=p.seed)
            free = ops.cast(extent - side + 1, "float32")
            at = ops.cast(ops.floor(u * free), "int32")
            at = ops.minimum(at, extent - side)
            shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
            place = ops.reshape(ops.arange(extent, dtype="int32"), (1, *shape))
            offsets.append(place - ops.reshape(at, (-1, 1, 1, 1)))
        inside = [
            ops.logical_and(o >= 0, o < ops.reshape(side, (-1, 1, 1, 1)))
            for o, side in zip(offsets, sides, strict=True)
        ]
        return offsets[0], offsets[1], ops.logical_and(*inside)

    def square(self, p: Problem, best: Tensor, share: Tensor) -> Tensor:
        """linf: one square, each channel pushed to one end of the ball."""
        _, _, inside = self.window(p, self.sides(share, 1))
        signs = self.signs(p, (1, 1, self.channels))
        pushed = self.x + per_row(p.eps, signs) * signs
        return ops.where(inside, pushed, best)

    def exchange(self, p: Problem, best: Tensor, share: Tensor) -> Tensor:
        """l2 and l1: the distance spent in one window goes to another, where a bump
        is added."""
        sides = self.sides(share, 3)
        d = best - self.x
        rows, columns, here = self.window(p, sides)
        _, _, there = self.window(p, sides)
        size = _SIZES[p.ball.norm]
        both = ops.where(ops.logical_or(here, there), d, 0.0)
        power = 2.0 if p.ball.norm == "l2" else 1.0
        spare = ops.maximum(
            per_row(p.eps, d) ** power - size(d, (1, 2, 3)) ** power, 0.0
        )
        budget = (spare / self.channels + size(both, (1, 2, 3)) ** power) ** (1 / power)
        old = ops.where(here, d, 0.0)
        old = old / (1e-12 + size(old, (1, 2, 3)))
        bump = self.bump(p, rows, columns, sides, here)
        new = old + bump * self.signs(p, (1, 1, self.channels))
        new = new / (1e-12 + size(new, (1, 2))) * budget
        d = ops.where(there, 0.0, d)
        d = ops.where(here, new, d)
        return self.x + d * per_row(p.eps, d) / (1e-12 + size(d, (1, 2, 3)))

    def bump(
        self, p: Problem, rows: Tensor, columns: Tensor, sides: Any, inside: Tensor
    ) -> Tensor:
        """Two pyramids of opposite signs side by side in each window, norm 1."""
        height, width = (ops.reshape(side, (-1, 1, 1, 1)) for side in sides)
        u = ops.reshape(
            random.uniform((ops.shape(p.x)[0],), seed=p.seed), (-1, 1, 1, 1)
        )
        turned = u < 0.5
        along = ops.where(turned, columns, rows)
        across = ops.where(turned, rows, columns)
        length = ops.where(turned, width, height)
        breadth = ops.where(turned, height, width)
        half = length // 2
        second = along >= half
        extent = ops.where(second, length - half, half)
        a = ops.abs(ops.where(second, along - half, along) - extent // 2)
        b = ops.abs(across - breadth // 2)
        ring = ops.maximum(a, b)
        # Concentric rectangles of heights 1, 1/4, 1/9, ... lie on one another.
        n = max(self.height, self.width) + 1
        steps = np.cumsum(1.0 / np.arange(1, n + 1)[::-1] ** 2)[::-1]
        heights = ops.convert_to_tensor(np.ascontiguousarray(steps).astype("float32"))
        values = ops.take(heights, ops.clip(ring, 0, n - 1))
        values = ops.where(inside, ops.where(second, -values, values), 0.0)
        size = _SIZES[p.ball.norm]
        return values / (1e-12 + size(values, (1, 2, 3)))

    def tiles(self, p: Problem) -> Tensor:
        """l2 and l1: a grid of bumps over the whole image, of norm eps."""
        total = ops.zeros_like(self.x)
        side = max(self.height // 5, 1)
        count = ops.zeros_like(p.run)
        rows = ops.reshape(ops.arange(self.height, dtype="int32"), (1, -1, 1, 1))
        columns = ops.reshape(ops.arange(self.width, dtype="int32"), (1, 1, -1, 1))
        down, right = rows % side, columns % side
        # One random sign per tile and channel.
        tall, wide = -(-self.height // side), -(-self.width // side)
        signs = self.signs(p, (tall, wide, self.channels))
        signs = ops.repeat(ops.repeat(signs, side, axis=1), side, axis=2)
        signs = signs[:, : self.height, : self.width]
        sides = (count + side, count + min(side, self.width))
        everywhere = ops.ones_like(self.x[..., :1], dtype="bool")
        bump = self.bump(
            p, down + 0 * sides[0][:, None, None, None], right, sides, everywhere
        )
        total = total + bump * signs
        size = _SIZES[p.ball.norm](total, (1, 2, 3))
        return total * per_row(p.eps, total) / (1e-12 + size)


def _l2(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return ops.sqrt(ops.sum(ops.square(x), axis=axes, keepdims=True))


def _l1(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return ops.sum(ops.abs(x), axis=axes, keepdims=True)


_SIZES = {"l2": _l2, "l1": _l1}


@named("square")
@taking()
def square(
    queries: Count = 5000,
    *,
    name: str = "square",
    restarts: Count = 1,
    share: Positive = 0.8,
) -> Attack:
    """The Square attack (Andriushchenko et al. 2020, https://arxiv.org/abs/1912.00049).

    Args:
        queries: of the model, per point and restart.
        name: of the attack in results.
        restarts: runs per point.
        share: of the image that the first squares cover.
    """
    return Square(name, queries, restarts, share)
