"""Attacks that look for the nearest adversarial example: DeepFool, Carlini-Wagner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from keras import ops

from kerasnorm.adversarial.attack import (
    Attack,
    Problem,
    State,
    Step,
    flat_rows,
    margin,
    named,
    pick,
)
from kerasnorm.adversarial.ball import TINY, per_row, spread
from kerasnorm.common.errors import taking
from rewriters.arguments import Count, Positive


@dataclass(frozen=True)
class DeepFool(Attack):
    """Steps onto the nearest linearized boundary.

    Args:
        candidates: how many of the likeliest classes are considered.
        overshoot: how far the sum of the steps is stretched beyond the boundary.
    """

    candidates: int = 10
    overshoot: float = 0.02

    minimal: ClassVar[bool] = True

    def begin(self, p: Problem) -> State:
        return {"moved": ops.zeros_like(p.x)}

    def step(self, p: Problem, s: State) -> Step:
        x = ops.clip(p.x + (1 + self.overshoot) * s["moved"], *p.bounds)
        k = min(self.candidates, p.victim.classes)

        def columns(z):
            gaps = ops.top_k(z, k)[0] - pick(z, p.y)[:, None]
            # The logits go along: a column without a boundary costs no gradient.
            return gaps

        logits = p.logits(x)
        gaps, gradients = p.gradients(x, columns)
        own = ops.top_k(logits, k)[1] == p.y[:, None]
        nearest = ops.full_like(gaps[:, 0], 1e30)
        d = ops.zeros_like(x)
        for column, g in enumerate(gradients):
            size = p.ball.dual(g)
            away = ops.abs(gaps[:, column]) / ops.maximum(size, TINY)
            usable = ops.logical_and(size > 0, ops.logical_not(own[:, column]))
            away = ops.where(usable, away, 1e30)
            closer = away < nearest
            nearest = ops.where(closer, away, nearest)
            length = ops.where(closer, away + 1e-4 * away, 0.0)
            d = ops.where(per_row(closer, x), p.steepest(x, g, length), d)
        wrong = p.wrong(logits)
        lost = nearest >= 1e30
        moved = s["moved"] + ops.where(per_row(lost, x), 0.0, d)
        return Step({"moved": moved}, x, logits, over=wrong, flat=lost)


@named("deepfool")
@taking()
def deepfool(
    steps: Count = 50,
    *,
    name: str = "deepfool",
    restarts: Count = 1,
    candidates: Count = 10,
    overshoot: float = 0.02,
) -> Attack:
    """DeepFool (Moosavi-Dezfooli et al. 2016, https://arxiv.org/abs/1511.04599), by any
    of the norms.

    Args:
        steps: at most.
        name: of the attack in results.
        restarts: runs per point.
        candidates: likeliest classes considered.
        overshoot: share by which a step goes past the boundary.
    """
    return DeepFool(name, steps, restarts, candidates, overshoot)


@dataclass(frozen=True)
class CarliniWagner(Attack):
    """Adam on the squared distance plus `c` times the hinge of the margin, in a space
    where every point is within the bounds, for a `c` found by bisection.

    Args:
        steps: for each `c`.
        searches: values of `c` tried.
        c: the first.
        confidence: the margin that is asked for: examples with less do not count.
        rate: learning rate of Adam.
    """

    searches: int = 9
    c: float = 0.01
    confidence: float = 0.0
    rate: float = 0.01

    minimal: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("l2",)

    @property
    def judgements(self) -> int:
        return self.steps * self.searches

    def begin(self, p: Problem) -> State:
        rows = ops.zeros_like(p.eps)
        return {
            "w": self._inward(p),
            "m": ops.zeros_like(p.x),
            "v": ops.zeros_like(p.x),
            "c": rows + self.c,
            "low": rows,
            "high": rows + 1e10,
            "hit": ops.zeros_like(rows, dtype="bool"),
        }

    def _inward(self, p: Problem) -> State:
        low, high = spread(p.bounds, p.x)
        share = (p.x - low) / ops.maximum(high - low, TINY)
        return ops.arctanh((2 * share - 1) * 0.999999)

    def step(self, p: Problem, s: State) -> Step:
        low, high = spread(p.bounds, p.x)
        t = ops.tanh(s["w"])
        x = ops.clip(low + (high - low) * (t + 1) / 2, low, high)

        def hinge(z, p):
            return ops.maximum(self.confidence - margin(z, p), 0.0)

        logits, _, g = p.gradient(x, hinge)
        still = ops.logical_and(flat_rows(g), ops.logical_not(p.wrong(logits)))
        g = per_row(s["c"], x) * g + 2 * (x - p.x)
        g = g * (high - low) / 2 * (1 - ops.square(t))

        # Adam, from its own first step at each new c.
        within = p.count % self.steps
        n = per_row(ops.cast(within + 1, "float32"), x)
        m = 0.9 * s["m"] + 0.1 * g
        v = 0.999 * s["v"] + 0.001 * ops.square(g)
        ratio = ops.sqrt(1 - ops.power(0.999, n)) / (1 - ops.power(0.9, n))
        w = s["w"] - self.rate * ratio * m / (ops.sqrt(v) + 1e-8)

        counts = margin(logits, p) >= self.confidence if self.confidence else None
        wrong = p.wrong(logits)
        found = wrong if counts is None else ops.logical_and(wrong, counts)
        hit = ops.logical_or(s["hit"], found)
        end = within == self.steps - 1
        below = ops.where(hit, s["low"], ops.maximum(s["low"], s["c"]))
        above = ops.where(hit, ops.minimum(s["high"], s["c"]), s["high"])
        c = ops.where(above < 1e9, (below + above) / 2, s["c"] * 10)
        again = per_row(end, x)
        state = {
            "w": ops.where(again, self._inward(p), w),
            "m": ops.where(again, 0.0, m),
            "v": ops.where(again, 0.0, v),
            "c": ops.where(end, c, s["c"]),
            "low": ops.where(end, below, s["low"]),
            "high": ops.where(end, above, s["high"]),
            "hit": ops.logical_and(hit, ops.logical_not(end)),
        }
        return Step(state, x, logits, flat=still, counts=counts)


@named("cw-l2", "cw")
@taking()
def carlini_wagner(
    steps: Count = 100,
    *,
    name: str = "cw-l2",
    restarts: Count = 1,
    searches: Count = 9,
    c: Positive = 0.01,
    confidence: float = 0.0,
    rate: Positive = 0.01,
) -> Attack:
    """The attack of Carlini and Wagner 2017 (https://arxiv.org/abs/1608.04644), by l2.

    Args:
        steps: for each weight `c` of the misclassification.
        name: of the attack in results.
        restarts: runs per point.
        searches: weights tried.
        c: the first of them.
        confidence: the least margin of an example.
        rate: learning rate of Adam.
    """
    return CarliniWagner(name, steps, restarts, searches, c, confidence, rate)
