"""Runs an attack on many points through a batch that stays full.

Points wait in a queue. Each slot of the batch holds one; when it falls, or its steps
are used up, the slot takes the next, so that the work follows what still stands and
the batch keeps its shape. Where a program serves every batch size (TensorFlow without
XLA), the batch shrinks once the queue is empty.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from keras import ops, tree

from kerasnorm.adversarial.attack import Attack, Problem, Stream
from kerasnorm.adversarial.ball import Ball, Bounds, flat, per_row, rounding
from kerasnorm.adversarial.victim import Victim
from kerasnorm.runtime.programs import Compiled


@dataclass
class Points:
    """The points of an evaluation, as arrays; what an attack is run on.

    Args:
        x: the attacked inputs, `(n, ...)` float32.
        y: classes, `(n,)` int32.
        others: the model's further inputs.
        ranks: classes other than `y`, the likeliest first, `(n, classes - 1)`.
    """

    x: np.ndarray
    y: np.ndarray
    others: Sequence[np.ndarray]
    ranks: np.ndarray


@dataclass
class Found:
    """What an attack found, by row of the points it was run on.

    Attributes:
        x: the nearest adversarial examples, the clean points where there is none.
        distance: theirs, inf where there is none.
        steps: judgements spent on each point.
        flat: whether a gradient was exactly 0 at the first judgement of a point.
        calls: batches run.
    """

    x: np.ndarray
    distance: np.ndarray
    steps: np.ndarray
    flat: np.ndarray
    calls: int = 0


@dataclass
class Runner:
    """An attack on a model by one norm, compiled once.

    Args:
        victim: the model, opened.
        attack: what is run.
        norm: of the ball.
        bounds: of the inputs.
        batch_size: slots.
        jit: through XLA; None where `kerasnorm.jit` says so.
    """

    victim: Victim
    attack: Attack
    norm: str
    bounds: Bounds
    batch_size: int = 128
    jit: bool | None = None
    _begin: Compiled = field(init=False, repr=False)
    _step: Compiled = field(init=False, repr=False)

    def __post_init__(self) -> None:
        variables = self.victim.variables()
        known = {id(v) for v, _ in variables}
        models = [self.victim.model, *self.attack.models()]
        for model in models[1:]:
            variables += [(v, v) for v in model.variables if id(v) not in known]
        self._begin = Compiled(self._on_new, variables, models, self.jit)
        self._step = Compiled(self._on_slots, variables, models, self.jit)

    @property
    def traces(self) -> int:
        """How often the step was traced."""
        return self._step.traces

    def run(
        self,
        points: Points,
        eps: float,
        seed: int = 0,
        progress: Callable[[float], None] | None = None,
    ) -> Found:
        """Attacks every point.

        Args:
            points: at least one.
            eps: the radius; inf looks for the nearest adversarial examples, with
                attacks that can.
            seed: of all random numbers.
            progress: told the share of the points that are done.
        """
        n = len(points.x)
        found = Found(
            x=points.x.copy(),
            distance=np.full(n, np.inf, "float32"),
            steps=np.zeros(n, "int64"),
            flat=np.zeros(n, bool),
        )
        runs = self.attack.runs(self.victim.classes)
        aims = max(self.attack.targets(self.victim.classes), 1)
        queue = deque((i, 0) for i in range(n))
        size = self.batch_size if self._step.fixed else min(self.batch_size, n)
        slots = _Slots.empty(size, points, eps)
        state: Any = None
        closed = 0
        while True:
            fresh = np.zeros(len(slots.point), bool)
            for slot in np.flatnonzero(slots.point < 0):
                if not queue:
                    break
                i, run = queue.popleft()
                slots.fill(slot, points, i, run, points.ranks[i, run % aims])
                fresh[slot] = True
            if not (slots.point >= 0).any():
                return found
            if not self._step.fixed and not queue:
                keep = np.flatnonzero(slots.point >= 0)
                # A smaller batch costs a copy: worth it when a quarter is empty.
                if len(keep) <= 0.75 * len(slots.point):
                    slots, fresh = slots.take(keep), fresh[keep]
                    if state is not None:
                        state = {k: ops.take(v, keep, axis=0) for k, v in state.items()}
            key = np.int32(seed)
            if fresh.any():
                begun = self._begin(
                    slots.arrays(),
                    key,
                    np.int32(-1 - found.calls),
                    fresh,
                    state if state is not None else {},
                )
                state = begun
            state, seen = self._step(slots.arrays(), key, np.int32(found.calls), state)
            found.calls += 1
            closed += self._note(slots, seen, found, queue, runs, eps)
            if progress:
                progress(closed / n)

    def _note(
        self,
        slots: _Slots,
        seen: Any,
        found: Found,
        queue: deque,
        runs: int,
        eps: float,
    ) -> int:
        """Writes down what the step found out; empties slots. Returns how many points
        are done with."""
        seen = {k: v if k == "x" else ops.convert_to_numpy(v) for k, v in seen.items()}
        live = slots.point >= 0
        slots.count[live] += 1
        found.steps[slots.point[live]] += 1
        first = live & (slots.count == 1) & (slots.run == 0)
        found.flat[slots.point[first]] = seen["flat"][first]
        distance = seen["distance"]
        # Only minimal attacks leave the ball; what they find outside counts as a
        # distance, not as a fall.
        hit = live & seen["wrong"]
        nearer = np.flatnonzero(hit)
        nearer = nearer[distance[nearer] < found.distance[slots.point[nearer]]]
        if len(nearer):
            which = slots.point[nearer]
            found.distance[which] = distance[nearer]
            found.x[which] = ops.convert_to_numpy(seen["x"])[nearer]
        fallen = hit & seen["inside"]
        if math.isinf(eps):
            fallen &= not self.attack.minimal
        spent = live & (seen["over"] | (slots.count >= self.attack.judgements))
        done = fallen | spent
        closed = 0
        for slot in np.flatnonzero(done):
            i, run = int(slots.point[slot]), int(slots.run[slot])
            if not fallen[slot] and run + 1 < runs:
                queue.append((i, run + 1))
            else:
                closed += 1
            slots.point[slot] = -1
        return closed

    # ------------------------------------------------------------- compiled

    def _problem(self, slots: dict[str, Any], key: Any, step: Any) -> Problem:
        return Problem(
            ball=Ball(self.norm, slots["eps"]),
            bounds=tuple(ops.convert_to_tensor(b, "float32") for b in self.bounds),
            x=slots["x"],
            y=slots["y"],
            target=slots["target"],
            run=slots["run"],
            count=slots["count"],
            seed=Stream(key, step),
            others=slots["others"],
            victim=self.victim,
        )

    def _on_new(self, slots: Any, key: Any, step: Any, fresh: Any, state: Any) -> Any:
        begun = self.attack.begin(self._problem(slots, key, step))
        if not state:
            return begun
        return {k: ops.where(per_row(fresh, v), v, state[k]) for k, v in begun.items()}

    def _on_slots(self, slots: Any, key: Any, step: Any, state: Any) -> Any:
        p = self._problem(slots, key, step)
        taken = self.attack.step(p, state)
        nothing = ops.zeros_like(p.y, dtype="bool")
        distance = p.ball.distance(p.x, taken.candidate)
        wrong = p.wrong(taken.logits)
        if taken.counts is not None:
            wrong = ops.logical_and(wrong, taken.counts)
        # Attacks in the ball are there up to rounding, which is checked apart.
        largest = ops.maximum(ops.max(flat(ops.abs(p.x)), axis=1), 1.0)
        room = rounding(self.norm, largest, math.prod(p.x.shape[1:]))
        seen = {
            "x": taken.candidate,
            "wrong": wrong,
            "distance": distance,
            "inside": distance <= p.eps * (1 + 1e-5) + 1e-6 + room
            if not self.attack.minimal
            else distance <= p.eps,
            "over": nothing if taken.over is None else taken.over,
            "flat": nothing if taken.flat is None else taken.flat,
        }
        return taken.state, seen


@dataclass
class _Slots:
    """What each slot of the batch works on; `point` is -1 where it is empty."""

    point: np.ndarray
    run: np.ndarray
    count: np.ndarray
    target: np.ndarray
    x: np.ndarray
    y: np.ndarray
    eps: np.ndarray
    others: list[np.ndarray]

    @classmethod
    def empty(cls, size: int, points: Points, eps: float) -> _Slots:
        zeros = np.zeros(size, "int32")

        def room(a: np.ndarray) -> np.ndarray:
            # Empty slots hold copies of a point: whatever runs there is harmless.
            return np.repeat(a[:1], size, axis=0)

        return cls(
            point=zeros - 1,
            run=zeros.copy(),
            count=zeros.copy(),
            target=zeros.copy(),
            x=room(points.x),
            y=room(points.y),
            eps=np.full(size, eps, "float32"),
            others=[room(a) for a in points.others],
        )

    def fill(self, slot: Any, points: Points, i: int, run: int, target: int) -> None:
        self.point[slot], self.run[slot], self.count[slot] = i, run, 0
        self.target[slot] = target
        self.x[slot], self.y[slot] = points.x[i], points.y[i]
        for mine, theirs in zip(self.others, points.others, strict=True):
            mine[slot] = theirs[i]

    def take(self, rows: np.ndarray) -> _Slots:
        return _Slots(
            **{
                name: tree.map_structure(lambda a: a[rows], value)
                for name, value in vars(self).items()
            }
        )

    def arrays(self) -> dict[str, Any]:
        names = ("run", "count", "target", "x", "y", "eps", "others")
        return {name: getattr(self, name) for name in names}
