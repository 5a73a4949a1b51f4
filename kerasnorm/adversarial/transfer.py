"""Adversarial examples of one model, tried on another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from kerasnorm.adversarial.attack import (
    Attack,
    Problem,
    State,
    Step,
    read,
    setting_of,
)
from kerasnorm.adversarial.victim import Outputs, Victim
from kerasnorm.common.errors import KerasNormError, taking


@dataclass(frozen=True)
class Transfer(Attack):
    """An attack that follows another model's gradients and is judged by this one."""

    attack: Attack = dataclasses.field(default_factory=Attack)
    source: Victim = None  # type: ignore[assignment]

    white_box: ClassVar[bool] = False

    @property
    def judgements(self) -> int:
        return self.attack.judgements

    @property
    def norms(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.attack.norms

    @property
    def minimal(self) -> bool:  # type: ignore[override]
        return self.attack.minimal

    def targets(self, classes: int) -> int:
        return self.attack.targets(classes)

    def runs(self, classes: int) -> int:
        return self.attack.runs(classes)

    def open(self, x: Any, classes: int) -> None:
        self.source.open(x)
        if self.source.classes != classes:
            raise KerasNormError(
                "the model to transfer from has other classes",
                got=self.source.classes,
                expected=f"{classes}",
            )
        self.attack.open(x, classes)

    def begin(self, p: Problem) -> State:
        return self.attack.begin(dataclasses.replace(p, victim=self.source))

    def step(self, p: Problem, s: State) -> Step:
        taken = self.attack.step(dataclasses.replace(p, victim=self.source), s)
        return taken._replace(logits=p.logits(taken.candidate), flat=None)

    def models(self) -> tuple[Any, ...]:
        return (self.source.model,)


@taking(hint=setting_of)
def transfer(
    model: Any,
    attack: Any = "mi-fgsm",
    *,
    name: str = "transfer",
    outputs: Outputs = "auto",
    preprocessing: Callable[..., Any] | None = None,
) -> Attack:
    """Adversarial examples made on another model, every step of them tried on this.

    Args:
        model: a Keras model of the same inputs and classes.
        attack: how they are made.
        name: of the attack.
        outputs, preprocessing: of that model, as in `evaluate`.
    """
    inner = read(attack)
    if len(inner) != 1:
        raise KerasNormError("transfer takes one attack", got=repr(attack))
    return Transfer(
        name=name,
        steps=inner[0].steps,
        attack=inner[0],
        source=Victim(model, outputs=outputs, preprocessing=preprocessing),
    )
