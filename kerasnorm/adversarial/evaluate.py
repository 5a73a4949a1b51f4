"""Robust accuracy: attacks one after the other on what still stands, every adversarial
example checked afterwards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops

from kerasnorm.adversarial import checks
from kerasnorm.adversarial.apgd import apgd
from kerasnorm.adversarial.attack import Attack, Stream, named, setting_of
from kerasnorm.adversarial.ball import check_distance, slack
from kerasnorm.adversarial.driver import Points, Runner
from kerasnorm.adversarial.evaluation import AttackResult, Evaluation, within
from kerasnorm.adversarial.fab import fab
from kerasnorm.adversarial.reading import (
    check_source,
    pieces,
    read_bounds,
    read_labels,
    read_seed,
    read_settings,
)
from kerasnorm.adversarial.square import square
from kerasnorm.adversarial.victim import Outputs, Victim, random_states
from kerasnorm.common.errors import KerasNormError, taking
from kerasnorm.common.progress import Progress
from kerasnorm.runtime.programs import Compiled
from rewriters.arguments import Count


@named("standard", "autoattack")
def standard() -> list[Attack]:
    """AutoAttack's ensemble with its settings: Auto-PGD on cross-entropy, targeted
    Auto-PGD and targeted FAB with nine classes each, 100 steps, and 5000 queries of
    Square (Croce and Hein 2020, https://arxiv.org/abs/2003.01690)."""
    return [apgd("ce"), apgd("dlr-t"), fab(), square()]


@taking(hint=setting_of)
def evaluate(
    model: Any,
    x: Any,
    y: Any = None,
    attacks: Any = "standard",
    norm: Any = "linf",
    eps: Any = 8 / 255,
    *,
    bounds: Any = (0.0, 1.0),
    outputs: Outputs = "auto",
    preprocessing: Callable[..., Any] | None = None,
    attacked: int | str | None = None,
    batch_size: Count = 128,
    seed: int = 0,
    alone: bool = False,
    keep: bool = False,
    jit: bool | None = None,
    replaced: Sequence[tuple[Any, Any]] = (),
    verbose: bool | int = True,
) -> Evaluation:
    """Accuracy of a classifier on inputs that an adversary may move.

    Args:
        model: a built Keras model, `(rows, ...) -> (rows, classes)`, or the path of a
            saved one.
        x: inputs as its `predict` takes them: an array, or a list or dict of arrays. Or
            a `tf.data.Dataset`, a `PyDataset` or an iterable of batches `(inputs,
            classes)`, of which never more than a few batches are held.
        y: their classes, integers `(n,)` or one-hot `(n, classes)`; None where `x` has
            them.
        attacks: names, attacks, or a list of these; `"standard"` is AutoAttack's
            ensemble.
        norm: `"linf"`, `"l2"` or `"l1"`.
        eps: radius of the ball, in the units of `x`, or several, which give a curve:
            what falls at one radius is not attacked at a larger one. inf finds the
            distance of every point, with attacks that look for it (`fab-t`,
            `deepfool`, `cw-l2`).
        bounds, outputs, preprocessing, attacked, batch_size, seed, alone, keep, jit,
            replaced, verbose: as for `Evaluator`.

    Returns:
        The `Evaluation`.

    Raises:
        KerasNormError: a negative or NaN radius, inputs out of bounds, labels of
            another shape, outputs that are not classes, no data: before any work;
            outputs that are all NaN.

    ```python
    result = evaluate(model, x, y, attacks=["pgd", "apgd-ce"], norm="linf", eps=8 / 255)
    print(result.table())
    ```
    """
    evaluator = Evaluator(
        model,
        attacks,
        norm,
        eps,
        bounds=bounds,
        outputs=outputs,
        preprocessing=preprocessing,
        attacked=attacked,
        batch_size=batch_size,
        seed=seed,
        alone=alone,
        keep=keep,
        jit=jit,
        replaced=replaced,
        verbose=verbose,
    )
    return evaluator(x, y)


class Evaluator:
    """Attacks compiled once, for a model that is evaluated again and again.

    Args:
        model, attacks, norm, eps: as for `evaluate`.
        bounds: lowest and highest value of an input, numbers or arrays that broadcast
            against one; None takes those of the data.
        outputs: `"logits"`, `"probabilities"`, or `"auto"`, found from the model's last
            activation.
        preprocessing: differentiable function between `x` and the model, such as a
            standardization; radius and bounds are meant in front of it.
        attacked: the input that is moved, by place, name or key, where there are
            several.
        batch_size: points attacked at a time; 128 by default, and what the model takes
            where it takes batches of one size.
        seed: of all random numbers, 32 bits; the same seed gives the same result.
        alone: each attack is tried on every point that is classified correctly, rather
            than on those that still stand; slower, and comparable between attacks.
        keep: keep the adversarial examples in the result.
        jit: compile through XLA; None as `kerasnorm.jit` says: on a GPU or TPU.
        replaced: pairs `(variable, read instead)`, to attack averaged weights.
        verbose: show a progress bar once it takes more than two seconds.
    """

    @taking(hint=setting_of)
    def __init__(
        self,
        model: Any,
        attacks: Any = "standard",
        norm: Any = "linf",
        eps: Any = 8 / 255,
        *,
        bounds: Any = (0.0, 1.0),
        outputs: Outputs = "auto",
        preprocessing: Callable[..., Any] | None = None,
        attacked: int | str | None = None,
        batch_size: Count = 128,
        seed: int = 0,
        alone: bool = False,
        keep: bool = False,
        jit: bool | None = None,
        replaced: Sequence[tuple[Any, Any]] = (),
        verbose: bool | int = True,
    ):
        self.attacks, self.norm, self.radii = read_settings(attacks, norm, eps)
        self.batch_size = batch_size
        self.bounds, self.seed = bounds, read_seed(seed)
        self.alone, self.keep, self.verbose = alone, keep, verbose
        self.jit = jit
        self.victim = Victim(
            model,
            outputs=outputs,
            preprocessing=preprocessing,
            attacked=attacked,
            replaced=replaced,
        )
        self.batch_size = self.victim.fixed_batch or self.batch_size
        self._runners: dict[Any, Runner] = {}
        self._forward: Any = None
        self._streams = False

    @property
    def traces(self) -> dict[str, int]:
        """How often the step of each attack was compiled."""
        return {r.attack.name: r.traces for r in self._runners.values()}

    def __call__(self, x: Any, y: Any = None) -> Evaluation:
        """Evaluates; see `evaluate`."""
        check_source(x, y)
        if y is None:
            self._streams = True
            if self.bounds is None:
                raise KerasNormError(
                    "the bounds of a source of batches are not known: got bounds=None",
                    expected="numbers or arrays",
                )
            parts = [
                self(*piece) for piece in pieces(x, 4 * self.batch_size, whole=True)
            ]
            return Evaluation.joined(parts)
        started = time.perf_counter()
        prepared = self.prepare(x, y)
        with Progress(self.verbose) as bar:
            return self._run(*prepared, bar=bar, started=started)

    def prepare(self, x: Any, y: Any) -> tuple[Any, ...]:
        """Checks the data: attacked inputs, classes, other inputs, bounds.

        Raises:
            KerasNormError: as `evaluate`.
        """
        attacked, others = self.victim.open(x)
        bounds = read_bounds(self.bounds, attacked)
        labels = read_labels(y, len(attacked), self.victim.classes)
        for attack in self.attacks:
            attack.open(x, self.victim.classes)
        return attacked, labels, others, bounds

    def _run(
        self,
        x: np.ndarray,
        y: np.ndarray,
        others: list[np.ndarray],
        bounds: tuple[Any, Any],
        bar: Progress,
        started: float,
    ) -> Evaluation:
        n, victim = len(x), self.victim
        outputs = self.predict(x, others)
        clean = victim.decide(outputs) == y
        broken = ~np.isfinite(outputs).all(-1)
        if broken.all():
            raise checks.NotFinite(
                "all outputs of the model are NaN or infinite",
                got=f"{n} inputs",
                fix="Look for weights that are not finite; rewrite and load keep them.",
            )
        ranks = self._ranks(x, y, others, outputs)
        points = Points(x, y, others, ranks)
        distance = np.where(clean, np.inf, 0.0)
        best = x.copy()
        evidence = checks.Evidence(
            x=x,
            bounds=bounds,
            radii=self.radii,
            norm=self.norm,
            hidden=victim.hidden,
            random=self._is_random(x, others, outputs),
        )
        evidence.broken["the clean inputs"] = int(broken.sum())
        results: list[AttackResult] = []
        standing = clean.copy()
        share = 1.0 / (len(self.radii) * len(self.attacks))
        for level, eps in enumerate(self.radii):
            # What attacks of the levels before found beyond their balls.
            standing &= ~within(distance, eps)
            for number, attack in enumerate(self.attacks):
                done = (level * len(self.attacks) + number) * share
                label = f"{attack.name}, eps {eps:.4g}"
                begun = time.perf_counter()
                # Distances get smaller with every attack; what fell is tried again.
                every = self.alone or math.isinf(eps)
                rows = np.flatnonzero(clean if every else standing)
                fallen = np.zeros(n, bool)
                steps = 0
                if eps > 0 and len(rows):
                    found = self._runner(attack, bounds, n).run(
                        _subset(points, rows),
                        eps,
                        self.seed,
                        lambda s, a=label, d=done: bar.update(a, d + share * s),
                    )
                    steps = int(found.steps.sum())
                    ok, apart, lost = self._confirm(points, rows, found, bounds)
                    fell = ok & self._within(attack, x[rows], found.distance, eps)
                    # What left the ball by rounding alone is at its edge.
                    found.distance[fell] = np.minimum(found.distance[fell], eps)
                    near = ok & (found.distance < distance[rows])
                    distance[rows[near]] = found.distance[near]
                    best[rows[near]] = found.x[near]
                    fallen[rows[fell]] = True
                    evidence.broken[f"{attack.name}, eps {eps:.4g}"] = lost
                    evidence.saw(attack, eps, found, rows, fell, apart)
                standing &= ~fallen
                left = (clean & ~fallen) if self.alone else standing
                results.append(
                    AttackResult(
                        name=attack.name,
                        eps=eps,
                        tried=len(rows),
                        fallen=int(fallen.sum()),
                        accuracy=float(left.mean()),
                        steps=steps,
                        seconds=time.perf_counter() - begun,
                        white_box=attack.white_box,
                    )
                )
            evidence.curve.append(float(standing.mean()))
            if level + 1 < len(self.radii):
                self._retry(points, distance, level, evidence, bounds)
        # What was found beyond the largest ball is a distance, not an example.
        beyond = ~within(distance, self.radii[-1])
        best[beyond] = x[beyond]
        return Evaluation(
            norm=self.norm,
            eps=self.radii,
            clean_accuracy=float(clean.mean()),
            robust=tuple(evidence.curve),
            attacks=tuple(results),
            y=y,
            predicted=victim.decide(outputs),
            distance=distance,
            warnings=tuple(checks.warnings(evidence, results, clean)),
            seconds=time.perf_counter() - started,
            seed=self.seed,
            x=x if self.keep else None,
            adversarial=best if self.keep else None,
            adversarial_predicted=(
                victim.decide(self.predict(best, others)) if self.keep else None
            ),
        )

    def _retry(
        self,
        points: Points,
        distance: np.ndarray,
        level: int,
        evidence: Any,
        bounds: Any,
    ) -> None:
        """A larger ball holds all of a smaller one: what fell must fall again."""
        eps = self.radii[level + 1]
        fell = np.flatnonzero(
            (distance > 0) & (distance <= self.radii[level] * 1.00001)
        )
        attack = next((a for a in self.attacks if a.white_box and not a.minimal), None)
        if attack is None or math.isinf(eps) or self.radii[level] == 0:
            return
        rows = fell[: self.batch_size]
        if len(rows):
            found = self._runner(attack, bounds, len(points.x)).run(
                _subset(points, rows), eps, self.seed
            )
            again = self._within(attack, points.x[rows], found.distance, eps)
            evidence.again.append((eps, len(rows), int(again.sum())))

    def _within(
        self, attack: Attack, x: np.ndarray, distance: np.ndarray, eps: float
    ) -> np.ndarray:
        """Which distances from `x` are in the ball. An attack that never leaves it is
        outside by rounding alone, which is coarser the larger the inputs."""
        room = 0.0 if attack.minimal else slack(self.norm, x, 0.0)
        return within(distance, eps, room)

    def _runner(self, attack: Attack, bounds: tuple[Any, Any], n: int) -> Runner:
        # What is left at the end of a source goes through the same program.
        whole = self._streams or self.victim.fixed_batch
        size = self.batch_size if whole else min(self.batch_size, n)
        key = (attack, size, *(np.asarray(b).tobytes() for b in bounds))
        if key not in self._runners:
            self._runners[key] = Runner(
                self.victim, attack, self.norm, bounds, size, self.jit
            )
        return self._runners[key]

    def predict(
        self, x: np.ndarray, others: Sequence[np.ndarray], draw: int = 0
    ) -> np.ndarray:
        """The model's own outputs in float32, no gradient and no trick anywhere.

        Args:
            draw: gives another draw of the model's random layers, where it has some.
        """
        return self._batches("plain", x, others, draw)

    def _batches(
        self, what: str, x: np.ndarray, others: Sequence[np.ndarray], draw: int
    ) -> np.ndarray:
        if self._forward is None:
            victim = self.victim

            def forward(x, others, key, draw):
                stream = Stream(key, draw)
                with victim.redrawn(stream):
                    return {"plain": ops.cast(victim.plain(x, others), "float32")}

            def logits(x, others, key, draw):
                return {"logits": victim.logits(x, others, Stream(key, draw))}

            self._forward = {
                name: Compiled(f, victim.variables(), [victim.model], self.jit)
                for name, f in (("plain", forward), ("logits", logits))
            }
        program = self._forward[what]
        size = self.batch_size if program.fixed else 4 * self.batch_size
        parts = []
        for at in range(0, len(x), size):
            rows = np.arange(at, min(at + size, len(x)))
            if program.fixed and len(rows) < size:
                rows = np.concatenate([rows, np.full(size - len(rows), rows[-1])])
            given = [a[rows] for a in others]
            key = np.int32(self.seed)
            y = program(x[rows], given, key, np.int32(draw * 100003 + at))[what]
            parts.append(np.asarray(ops.convert_to_numpy(y))[: len(x) - at])
        return np.concatenate(parts)

    def _ranks(
        self, x: np.ndarray, y: np.ndarray, others: Any, outputs: np.ndarray
    ) -> np.ndarray:
        classes = self.victim.classes
        if not any(a.targets(classes) for a in self.attacks):
            return np.zeros((len(x), 1), "int32")
        z = self._batches("logits", x, others, 0)
        z[np.arange(len(y)), y] = -np.inf
        return np.argsort(-z, axis=1, kind="stable")[:, :-1].astype("int32")

    def _confirm(
        self, points: Points, rows: np.ndarray, found: Any, bounds: tuple[Any, Any]
    ) -> tuple[np.ndarray, int, int]:
        """Which of the found examples are what they claim to be, how many are not, and
        of how many the outputs are not finite."""
        hit = np.flatnonzero(np.isfinite(found.distance))
        ok = np.zeros(len(rows), bool)
        if not len(hit):
            return ok, 0, 0
        which, x = rows[hit], found.x[hit]
        decided = self.victim.decide(self.predict(x, [a[which] for a in points.others]))
        low, high = (np.asarray(b, "float32") for b in bounds)
        within = ((x >= low) & (x <= high)).reshape(len(x), -1).all(1)
        distance = check_distance(self.norm, points.x[which], x)
        near = np.abs(distance - found.distance[hit]) <= slack(self.norm, x, distance)
        found.distance[hit] = distance
        ok[hit] = (decided != points.y[which]) & within & near
        return ok, int((~ok[hit]).sum()), int((decided < 0).sum())

    def _is_random(
        self, x: np.ndarray, others: Sequence[np.ndarray], outputs: np.ndarray
    ) -> bool:
        rows = slice(0, 64 if not random_states(self.victim.model) else 256)
        again = self.predict(x[rows], [a[rows] for a in others], draw=1)
        scale = np.abs(outputs[rows]).max() + 1e-6
        return bool(np.abs(again - outputs[rows]).max() > 1e-3 * scale)


def _subset(points: Points, rows: np.ndarray) -> Points:
    return Points(
        points.x[rows],
        points.y[rows],
        [a[rows] for a in points.others],
        points.ranks[rows],
    )
