"""Attacks that follow the gradient of the cross-entropy: FGSM, BIM, PGD, MI-FGSM; and
random noise, the floor that every attack has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from keras import ops

from kerasnorm.adversarial.attack import (
    Attack,
    Problem,
    State,
    Step,
    cross_entropy,
    flat_rows,
    named,
)
from kerasnorm.adversarial.ball import flat, per_row
from kerasnorm.common.errors import taking
from rewriters.arguments import Count, Positive


@dataclass(frozen=True)
class Iterative(Attack):
    """`x <- project(x + length * steepest(gradient))`.

    Args:
        length: of a step, as a share of eps.
        random_start: begin at a random point of the ball. Restarts always do.
        decay: share of the accumulated gradient that is kept, where gradients are
            accumulated (divided by their mean absolute value, as the l1 norm would but
            for a factor); None: they are not.
    """

    length: float = 1.0
    random_start: bool = False
    decay: float | None = None

    def begin(self, p: Problem) -> State:
        x = p.start()
        if not self.random_start:
            x = ops.where(per_row(p.run > 0, x), x, p.x)
        return {"x": x} if self.decay is None else {"x": x, "g": ops.zeros_like(x)}

    def step(self, p: Problem, s: State) -> Step:
        x = s["x"]
        logits, _, g = p.gradient(x, cross_entropy)
        still = flat_rows(g)
        new = {}
        if self.decay is not None:
            size = ops.mean(flat(ops.abs(g)), axis=1)
            size = ops.where(size > 0, size, ops.ones_like(size))
            g = new["g"] = self.decay * s["g"] + g / per_row(size, g)
        moved = x + p.steepest(x, g, self.length * p.eps)
        return Step({**new, "x": p.project(moved)}, x, logits, flat=still)


@named("fgsm")
@taking()
def fgsm(
    random_start: bool = False,
    length: Positive | None = None,
    *,
    name: str = "fgsm",
    restarts: Count = 1,
) -> Attack:
    """The fast gradient sign method: one step of length eps (Goodfellow et al. 2015,
    https://arxiv.org/abs/1412.6572).

    Args:
        random_start: begin at a random point, and step 1.25 eps from there (Wong et
            al. 2020, https://arxiv.org/abs/2001.03994).
        length: of the step, as a share of eps, instead of 1 or 1.25.
        name: of the attack in results.
        restarts: runs per point.
    """
    length = length or (1.25 if random_start else 1.0)
    return Iterative(name, 1, restarts, length, random_start)


@named("bim")
@taking()
def bim(
    steps: Count = 10,
    length: Positive | None = None,
    *,
    name: str = "bim",
    restarts: Count = 1,
    random_start: bool = False,
) -> Attack:
    """The basic iterative method: FGSM in small steps from the clean point (Kurakin et
    al. 2017, https://arxiv.org/abs/1607.02533).

    Args:
        steps: how many.
        length: of each, as a share of eps; `1 / steps` by default.
        name: of the attack in results.
        restarts: runs per point.
        random_start: begin at a random point of the ball.
    """
    return Iterative(name, steps, restarts, length or 1 / steps, random_start)


@named("pgd")
@taking()
def pgd(
    steps: Count = 40,
    length: Positive = 0.25,
    random_start: bool = True,
    *,
    name: str = "pgd",
    restarts: Count = 1,
) -> Attack:
    """Projected gradient descent from a random start (Madry et al. 2018,
    https://arxiv.org/abs/1706.06083).

    Args:
        steps: how many.
        length: of each, as a share of eps: 2/255 at eps 8/255, as in the paper.
        random_start: False begins at the clean point, restarts apart.
        name: of the attack in results.
        restarts: runs per point.
    """
    return Iterative(name, steps, restarts, length, random_start)


@named("mi-fgsm", "mim")
@taking()
def mi_fgsm(
    steps: Count = 10,
    length: Positive | None = None,
    decay: float = 1.0,
    *,
    name: str = "mi-fgsm",
    restarts: Count = 1,
    random_start: bool = False,
) -> Attack:
    """BIM along the accumulated gradient (Dong et al. 2018,
    https://arxiv.org/abs/1710.06081); it transfers well between models.

    Args:
        steps: how many.
        length: of each, as a share of eps; `1 / steps` by default.
        decay: share of the accumulated gradient kept at each step.
        name: of the attack in results.
        restarts: runs per point.
        random_start: begin at a random point of the ball.
    """
    return Iterative(name, steps, restarts, length or 1 / steps, random_start, decay)


@dataclass(frozen=True)
class Noise(Attack):
    """Random points of the ball."""

    white_box: ClassVar[bool] = False

    @property
    def judgements(self) -> int:
        return self.steps

    def begin(self, p: Problem) -> State:
        return {"x": p.start()}

    def step(self, p: Problem, s: State) -> Step:
        return Step({"x": p.start()}, s["x"], p.logits(s["x"]))


@named("noise")
@taking()
def noise(samples: Count = 10, *, name: str = "noise", restarts: Count = 1) -> Attack:
    """Uniformly random points of the ball: what is lost here needs no attack.

    Args:
        samples: points tried.
        name: of the attack in results.
        restarts: runs per point.
    """
    return Noise(name, samples, restarts)
