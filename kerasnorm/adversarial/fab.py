"""FAB: the nearest adversarial example, by steps onto linearized decision boundaries.

Croce and Hein 2020, "Minimally distorted adversarial examples with a fast adaptive
boundary attack", https://arxiv.org/abs/1907.02044; the targeted form.
"""

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
    named,
    pick,
)
from kerasnorm.adversarial.ball import flat, per_row
from kerasnorm.common.errors import taking
from rewriters.arguments import Count


@dataclass(frozen=True)
class FAB(Attack):
    """Targeted FAB.

    Args:
        aims: classes aimed at, one run each, the likeliest first.
        alpha: largest weight of the step that starts from the clean point.
        eta: how far beyond the boundary steps go.
        beta: share of the way from the clean point that is kept after a success.
    """

    aims: int = 9
    alpha: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    minimal: ClassVar[bool] = True

    @property
    def judgements(self) -> int:
        return self.steps

    def targets(self, classes: int) -> int:
        return min(self.aims, classes - 1)

    def begin(self, p: Problem) -> State:
        # Restarts begin half way to a random point of the ball.
        later = per_row(p.run >= self.targets(p.victim.classes), p.x)
        return {"x": ops.where(later, (p.x + p.start()) / 2, p.x)}

    def step(self, p: Problem, s: State) -> Step:
        x = s["x"]
        _, gap, w = p.gradient(x, lambda z, p: pick(z, p.target) - pick(z, p.y))
        b = ops.sum(flat(w * x), axis=1) - gap
        d, from_clean = (p.ball.to_plane(at, w, b, p.bounds) for at in (x, p.x))
        here, there = (p.ball.distance(0.0 * v, v) for v in (d, from_clean))
        a = ops.minimum(here / ops.maximum(here + there, 1e-8), self.alpha)
        a = per_row(a, x)
        moved = (x + self.eta * d) * (1 - a) + (p.x + self.eta * from_clean) * a
        moved = ops.clip(moved, *p.bounds)
        logits = p.logits(moved)
        back = p.x + self.beta * (moved - p.x)
        after = ops.where(per_row(p.wrong(logits), x), back, moved)
        return Step({"x": after}, moved, logits, flat=flat_rows(w))


@named("fab-t", "fab")
@taking()
def fab(
    steps: Count = 100,
    *,
    name: str = "fab-t",
    restarts: Count = 1,
    aims: Count = 9,
    alpha: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> Attack:
    """The fast adaptive boundary attack, targeted (Croce and Hein 2020,
    https://arxiv.org/abs/1907.02044).

    Args:
        steps: per class aimed at.
        name: of the attack in results.
        restarts: runs per target.
        aims: classes aimed at.
        alpha, eta, beta: as in the paper.
    """
    return FAB(name, steps, restarts, aims, alpha, eta, beta)
