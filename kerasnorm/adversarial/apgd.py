"""Auto-PGD: gradient steps whose length is halved when they stop paying.

Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of
diverse parameter-free attacks", https://arxiv.org/abs/2003.01690.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from keras import ops

from kerasnorm.adversarial.attack import (
    Attack,
    Loss,
    Problem,
    State,
    Step,
    cross_entropy,
    difference_of_logits_ratio,
    flat_rows,
    named,
    targeted_ratio,
)
from kerasnorm.adversarial.ball import per_row
from kerasnorm.common.errors import KerasNormError, taking
from rewriters.arguments import Count


@dataclass(frozen=True)
class AutoPGD(Attack):
    """Auto-PGD on one of three losses.

    Args:
        loss: `"ce"`, `"dlr"`, or `"dlr-t"`, which aims at one class after the other.
        aims: how many classes `"dlr-t"` aims at.
        rho: share of the steps between two checks that must increase the loss, or else
            the length is halved.
    """

    loss: str = "ce"
    aims: int = 9
    rho: float = 0.75

    losses: ClassVar[dict[str, Loss]] = {
        "ce": cross_entropy,
        "dlr": difference_of_logits_ratio,
        "dlr-t": targeted_ratio,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in self.losses:
            raise KerasNormError(
                "no such loss", got=repr(self.loss), expected=" or ".join(self.losses)
            )

    def targets(self, classes: int) -> int:
        return min(self.aims, classes - 1) if self.loss == "dlr-t" else 0

    @property
    def _intervals(self) -> tuple[int, int, int]:
        """Steps to the first check, by how many fewer to each next, the fewest."""
        first, fewer, fewest = (max(int(s * self.steps), 1) for s in (0.22, 0.03, 0.06))
        return first, fewer, fewest

    def begin(self, p: Problem) -> State:
        x = p.start()
        rows = ops.zeros_like(p.eps)
        first = self._intervals[0]
        return {
            "x": x,
            "previous": x,
            "best": x,
            "best_g": ops.zeros_like(x),
            "best_loss": rows - 1e30,
            "loss": rows + 1e30,
            "length": 2.0 * p.eps,
            "interval": ops.zeros_like(p.run) + first,
            "since": ops.zeros_like(p.run),
            "rises": ops.zeros_like(p.run),
            "checked_loss": rows - 1e30,
            "halved": ops.ones_like(rows, dtype="bool"),
        }

    def step(self, p: Problem, s: State) -> Step:
        x = s["x"]
        logits, loss, g = p.gradient(x, self.losses[self.loss])
        still = flat_rows(g)
        first = p.count == 0

        better = loss > s["best_loss"]
        best_loss = ops.where(better, loss, s["best_loss"])
        best = ops.where(per_row(better, x), x, s["best"])
        best_g = ops.where(per_row(better, x), g, s["best_g"])
        checked = ops.where(first, loss, s["checked_loss"])

        # Every interval the length is halved, and the search taken back to the best
        # point, if too few steps went up, or none got further since the last check
        # and the length was not halved there.
        taken = ops.cast(ops.logical_not(first), "int32")
        since = s["since"] + taken
        rises = s["rises"] + ops.cast(loss > s["loss"], "int32") * taken
        due = since == s["interval"]
        few = ops.cast(rises, "float32") <= self.rho * ops.cast(since, "float32")
        stuck = ops.logical_and(ops.logical_not(s["halved"]), checked >= best_loss)
        halve = ops.logical_and(due, ops.logical_or(few, stuck))
        length = ops.where(halve, s["length"] / 2, s["length"])
        back = per_row(halve, x)
        base, g = ops.where(back, best, x), ops.where(back, best_g, g)

        z = p.project(base + p.steepest(base, g, length))
        # The first step has no direction to keep.
        a = per_row(ops.where(first, 1.0, 0.75), x)
        moved = p.project(base + a * (z - base) + (1 - a) * (base - s["previous"]))
        _, fewer, fewest = self._intervals
        zero = ops.zeros_like(since)
        state = {
            "x": moved,
            "previous": base,
            "best": best,
            "best_g": best_g,
            "best_loss": best_loss,
            "loss": loss,
            "length": length,
            "interval": ops.where(
                due, ops.maximum(s["interval"] - fewer, fewest), s["interval"]
            ),
            "since": ops.where(due, zero, since),
            "rises": ops.where(due, zero, rises),
            "checked_loss": ops.where(due, best_loss, checked),
            "halved": ops.where(due, halve, s["halved"]),
        }
        return Step(state, x, logits, flat=still)


@taking()
def apgd(
    loss: Literal["ce", "dlr", "dlr-t"] = "ce",
    steps: Count = 100,
    *,
    name: str | None = None,
    restarts: Count = 1,
    aims: Count = 9,
    rho: float = 0.75,
) -> Attack:
    """Auto-PGD (Croce and Hein 2020, https://arxiv.org/abs/2003.01690).

    Args:
        loss: `"ce"`, cross-entropy; `"dlr"`, the difference of logits ratio, which
            does not change with the scale of the logits; `"dlr-t"`, its targeted form.
        steps: per run.
        name: of the attack in results; by the loss where it is None.
        restarts: runs per point.
        aims: classes that `"dlr-t"` aims at.
        rho: share of the steps that must go up for the length to stay.
    """
    name = name or {"dlr-t": "apgd-t"}.get(loss, f"apgd-{loss}")
    return AutoPGD(name, steps, restarts, loss, aims, rho)


named("apgd", "apgd-ce")(lambda: apgd("ce"))
named("apgd-dlr")(lambda: apgd("dlr"))
named("apgd-t", "apgd-dlr-t")(lambda: apgd("dlr-t"))
