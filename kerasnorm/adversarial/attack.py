"""What an attack is: a step that every point of a batch takes at its own count.

The driver holds a batch of slots. Each slot works on one point, and is given the next
one as soon as its own has fallen or its steps are used up; so in one batch some points
stand at their first step and others at their last. An attack therefore keeps all it
knows in tensors with one row per slot, and never asks for the number of the step but
by row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from keras import ops, random

from kerasnorm.adversarial.ball import Ball, Bounds, per_row
from kerasnorm.adversarial.victim import Victim
from kerasnorm.common.errors import KerasNormError
from kerasnorm.runtime import programs
from rewriters.arguments import Count, check, hints_of, shown


Tensor = Any
State = dict[str, Tensor]
Loss = Callable[[Tensor, "Problem"], Tensor]


class Stream(random.SeedGenerator):
    """Seeds for one step, from two numbers that the driver passes in: nothing of the
    random state of a program is read or changed."""

    def __init__(self, key: Tensor, step: Tensor):
        self.key, self.step, self.draws = key, step, 0

    def next(self, ordered: bool = True) -> Tensor:
        """Another seed at every call."""
        self.draws += 1
        mixed = self.key * 1009 + self.draws
        return ops.cast(ops.stack([mixed, self.step]), "uint32")


@dataclass
class Problem:
    """What the slots work on, during one step.

    Args:
        ball: of `x`, its radii per row.
        bounds: lowest and highest value of an input.
        x: the clean points, `(rows, ...)` float32.
        y: their classes, `(rows,)` int32.
        target: class to reach, `(rows,)`; meaningful in targeted attacks.
        run: which restart (and target) of the point this is, `(rows,)` from 0.
        count: steps taken so far, `(rows,)`.
        seed: where random numbers come from.
        others: the model's further inputs, which are not attacked.
        victim: the model.
    """

    ball: Ball
    bounds: Bounds
    x: Tensor
    y: Tensor
    target: Tensor
    run: Tensor
    count: Tensor
    seed: Any
    others: Sequence[Tensor]
    victim: Victim

    def logits(self, x: Tensor) -> Tensor:
        """`(rows, classes)`, float32."""
        return self.victim.logits(x, self.others, self.seed)

    def gradient(self, x: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, losses `(rows,)`, and the gradient of the losses at `x`."""

        def both(x):
            z = self.logits(x)
            return loss(z, self), z

        losses, z, g = programs.value_and_gradient(both, x)
        return z, losses, g

    def gradients(
        self, x: Tensor, columns: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """`columns(logits)`, `(rows, k)`, and the gradient of each column at `x`."""
        return programs.value_and_gradients(lambda x: columns(self.logits(x)), x)

    def start(self) -> Tensor:
        """A random point of each ball; the centre, where the ball is everything."""
        x = self.ball.start(self.x, self.bounds, self.seed)
        return ops.where(per_row(ops.isfinite(self.eps), x), x, self.x)

    def project(self, x: Tensor) -> Tensor:
        """Back into the ball and the bounds."""
        return self.ball.project(self.x, x, self.bounds)

    def steepest(self, x: Tensor, g: Tensor, length: Tensor) -> Tensor:
        """The best displacement of this length from `x`; see `Ball.steepest`."""
        return self.ball.steepest(x, g, length, self.bounds)

    def wrong(self, logits: Tensor) -> Tensor:
        """Whether the class is not the right one, `(rows,)`."""
        return ops.cast(ops.argmax(logits, axis=-1), "int32") != self.y

    @property
    def eps(self) -> Tensor:
        """The radii, `(rows,)`."""
        return self.ball.eps


class Step(NamedTuple):
    """What a step found out.

    Args:
        state: of the attack, for the next step.
        candidate: the points that were judged, in the bounds.
        logits: the model's, at these points.
        over: rows with nothing left to try; None where the steps alone decide.
        flat: rows whose gradient was exactly 0; None where there is no gradient.
        counts: rows whose candidate is what was asked for, if it is wrong; None: all.
    """

    state: State
    candidate: Tensor
    logits: Tensor
    over: Tensor | None = None
    flat: Tensor | None = None
    counts: Tensor | None = None


@dataclass(frozen=True)
class Attack:
    """An attack and its settings; `evaluate` takes these, or their names.

    Args:
        name: what results and logs call it.
        steps: updates per run; a run makes one more judgement than updates, as the
            last point is judged too.
        restarts: runs per point (per target, where it has targets).
    """

    name: str = ""
    steps: Count = 1
    restarts: Count = 1

    # Whether it sees gradients of the attacked model.
    white_box: ClassVar[bool] = True
    # Whether it looks for the nearest adversarial example, rather than one in a ball.
    minimal: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    def __post_init__(self) -> None:
        hints = {k: v for k, v in hints_of(type(self)).items() if k in vars(self)}
        check(type(self).__name__, hints, None, dict(vars(self)), KerasNormError)

    @property
    def judgements(self) -> int:
        """How many points a run judges."""
        return self.steps + 1

    def runs(self, classes: int) -> int:
        """Runs per point."""
        return self.restarts * max(self.targets(classes), 1)

    def targets(self, classes: int) -> int:
        """Classes aimed at in turn, the likeliest wrong one first; 0: none."""
        return 0

    def open(self, x: Any, classes: int) -> None:
        """Told the inputs and how many classes the model has, before any work."""

    def begin(self, p: Problem) -> State:
        """The state of points that have just come in."""
        raise NotImplementedError

    def step(self, p: Problem, s: State) -> Step:
        """Judges one point per row and moves on."""
        raise NotImplementedError

    def models(self) -> tuple[Any, ...]:
        """Further models whose weights it reads."""
        return ()


# ------------------------------------------------------------------- losses


def cross_entropy(z: Tensor, p: Problem) -> Tensor:
    """The cross-entropy as attacks climb it, see `log_odds`."""
    return log_odds(z, p.y)


def log_odds(z: Tensor, y: Tensor) -> Tensor:
    """`log((1 - q) / q)` of the probability q of each row's class.

    The cross-entropy is the softplus of it: both grow together, and their gradients
    point alike. That of the cross-entropy is 1 - q times as long, which is exactly 0 in
    float32 where a model is sure by logits of a hundred; this one's does not vanish.
    """
    return ops.logsumexp(_others(z, y), axis=-1) - pick(z, y)


def margin(z: Tensor, p: Problem) -> Tensor:
    """`max over others of z - z_y`: positive where the class is wrong."""
    return ops.max(_others(z, p.y), axis=-1) - pick(z, p.y)


def _others(z: Tensor, y: Tensor) -> Tensor:
    """The logits, far below all others at each row's class."""
    return ops.where(one_hot(z, y), -1e30, z)


def difference_of_logits_ratio(z: Tensor, p: Problem) -> Tensor:
    """The margin over the first minus the third largest logit (Croce and Hein 2020):
    unchanged when the logits are shifted or scaled. With two classes there is no third
    and it is the margin."""
    if z.shape[-1] < 3:
        return margin(z, p)
    top = ops.top_k(z, 3)[0]
    return margin(z, p) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_ratio(z: Tensor, p: Problem) -> Tensor:
    """`(z_t - z_y) / (z_1st - (z_3rd + z_4th) / 2)`; without a fourth class the third
    stands alone, without a third the difference is not divided."""
    gap = pick(z, p.target) - pick(z, p.y)
    if z.shape[-1] < 3:
        return gap
    top = ops.top_k(z, min(4, z.shape[-1]))[0]
    return gap / (top[:, 0] - (top[:, 2] + top[:, -1]) / 2 + 1e-12)


def pick(z: Tensor, y: Tensor) -> Tensor:
    """The logit of each row's class."""
    return ops.sum(ops.where(one_hot(z, y), z, 0.0), axis=-1)


def one_hot(z: Tensor, y: Tensor) -> Tensor:
    """`(rows, classes)` bool, True at each row's class."""
    return ops.arange(z.shape[-1], dtype="int32")[None, :] == y[:, None]


def flat_rows(g: Tensor) -> Tensor:
    """Rows in which a gradient is exactly 0 everywhere."""
    return ops.max(ops.reshape(ops.abs(g), (ops.shape(g)[0], -1)), axis=1) == 0


# ----------------------------------------------------------------- registry


_MAKERS: dict[str, Callable[[], Attack | list[Attack]]] = {}


def named(*names: str) -> Callable[[Any], Any]:
    """Decorator: what `evaluate(attacks=name)` makes, with its default settings."""

    def register(make: Any) -> Any:
        for name in names:
            _MAKERS[name] = make
        return make

    return register


def names() -> list[str]:
    """Names that `attacks` understands."""
    return sorted(_MAKERS)


def setting_of(name: str, value: Any) -> str | None:
    """How the setting of an attack is given to what takes attacks; None where no
    attack has one of this name."""
    taking = [m for m in _MAKERS.values() if name in inspect.signature(m).parameters]
    usual = [m for m in taking if m.__name__ == "pgd"]
    if not taking:
        return None
    made = f"{(usual or taking)[0].__name__}({name}={shown(value)})"
    return f"Give it to an attack of kerasnorm.adversarial: attacks=[{made}]"


def read(attacks: Any) -> list[Attack]:
    """Attacks from a name, an `Attack`, or a list of these.

    Raises:
        KerasNormError: a name that none has, nothing at all, or two attacks of one
            name.
    """
    if isinstance(attacks, Mapping):
        calls = []
        for word, settings in attacks.items():
            pairs = settings.items() if isinstance(settings, Mapping) else ()
            inside = ", ".join(f"{n}={shown(v)}" for n, v in pairs)
            calls.append(f"{str(word).replace('-', '_')}({inside})")
        raise KerasNormError(
            "attacks and their settings in a dict are not read",
            got=shown(attacks),
            expected="attacks, or their names",
            fix=f"With kerasnorm.adversarial's own: attacks=[{', '.join(calls)}]",
        )
    several = isinstance(attacks, Iterable) and not isinstance(attacks, str)
    listed: list[Any] = [*attacks] if several else [attacks]
    found: list[Attack] = []
    for one in listed:
        if isinstance(one, str):
            key = one.lower().replace("_", "-")
            if key not in _MAKERS:
                raise KerasNormError(
                    "no such attack", got=repr(one), expected=", ".join(names())
                )
            made = _MAKERS[key]()
            found += made if isinstance(made, list) else [made]
        elif isinstance(one, Attack):
            found.append(one)
        else:
            raise KerasNormError(
                "cannot read an attack from this",
                got=repr(one),
                expected="a name or one of the attacks of kerasnorm.adversarial",
            )
    twice = {a.name for a in found if sum(a.name == b.name for b in found) > 1}
    if twice:
        raise KerasNormError(
            "two attacks have one name",
            got=", ".join(sorted(twice)),
            fix="Give one of them another: pgd(name='pgd-100', steps=100)",
        )
    if not found:
        raise KerasNormError(
            "no attack was given", got=repr(attacks), expected=", ".join(names())
        )
    return found
