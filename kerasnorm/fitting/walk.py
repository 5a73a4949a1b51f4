"""Teacher and student walked together, sites solved on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import tree

from kerasnorm.common import data as reading
from kerasnorm.fitting import linear, solve
from kerasnorm.fitting.execution import Opaque, Side, largest, size_of, twins
from kerasnorm.fitting.observations import (
    Array,
    Parameters,
    Parts,
    Pool,
    Sampler,
    mask_of,
    numpy_of,
)
from rewriters import private
from rewriters.program import Instruction, Program, Value, fixed_batch, is_graph
from rewriters.tracing import watching


# Samples that run through a layer at once, at most.
PART = 256
# Numbers of groups are compared on as many samples, at most.
GROUP_SAMPLES = 32
# So many show what a layer does.
FEW = 4


@dataclass(frozen=True)
class SiteFit:
    """How one swapped layer was fitted.

    Args:
        path: where it is.
        before: share of the old layer's variance kept with gamma and beta copied.
        after: the same after the fit (rho squared of the new output).
        rows: observations it was solved on.
        groups: number of groups where it was chosen, else None.
        note: why it was not fitted, else empty.
    """

    path: str
    before: float = 0.0
    after: float = 0.0
    rows: int = 0
    groups: int | None = None
    note: str = ""


class Walk:
    """Both models, instruction by instruction, solving sites in order.

    A layer called several times is solved at each further call on the rows of all its
    calls so far; outputs computed already are not computed again.

    Args:
        teacher, student: the original model and the rewritten one, fitted in place.
        pairs: `(path, old layer, new layer)` for each swapped layer.
        inputs: the data, see `reading.collect`.
        refit: also solve the linear layers.
        groups: `"auto"` to choose numbers of groups.
        memory, seed: see `kerasnorm.fitting.fit.fit`.
        rows: observations a site is solved on, about; more with many samples.
        pull: strength that draws refitted kernels to their old values.
        tick: called after every instruction with the share of work done.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        pairs: Sequence[tuple[str, Any, Any]],
        inputs: reading.Inputs,
        *,
        refit: bool = False,
        groups: str | None = None,
        memory: float = 2e9,
        seed: int = 0,
        rows: int = 2**13,
        pull: float = 1e-3,
        tick: Callable[[float], None] = lambda share: None,
    ):
        self.pairs = {id(new): (path, old, new) for path, old, new in pairs}
        self.refit, self.groups, self.pull = refit, groups, pull
        self.memory, self.seed, self.tick = memory, seed, tick
        self.sites: dict[str, SiteFit] = {}
        self.refitted: list[str] = []
        self.unsolved: dict[str, list[str]] = {}
        self.notes: list[str] = []
        self.pools: dict[int, Pool] = {}
        self.recorded: dict[int, list[Any]] = {}

        arrays = inputs.arrays
        programs = [
            Program(m) if is_graph(m) else Opaque(m, inputs.structure, arrays)
            for m in (teacher, student)
        ]
        self.twins = twins(*programs)
        part = int(memory // (6 * largest(programs[0])))
        if any(self._inside(i) for i in programs[1].instructions):
            # Sites inside a layer's own call are solved while it runs, so all samples
            # have to pass through it at once.
            part = self._at_once(teacher, inputs)
            arrays = inputs.spread(part).arrays
        else:
            if part < len(inputs) or groups == "auto":
                # Some may be left out, or looked at first, of what may be sorted.
                order = np.random.default_rng(seed).permutation(len(inputs))
                arrays = [a[order] for a in arrays]
            part = min(max(1, part), PART)
            fixed = fixed_batch(teacher)
            if fixed is not None:
                part = fixed
                arrays = [a[: len(a) // fixed * fixed] for a in arrays]
        self.samples = len(arrays[0])
        self.sampler = Sampler(max(rows, 8 * self.samples), self.samples, seed)
        parts = reading.split(arrays, part)
        # A model with a graph casts what it is given to what its inputs are.
        dtypes = (
            [t.dtype for t in teacher.inputs]
            if is_graph(teacher)
            else [None] * len(arrays)
        )
        values = [
            [keras.ops.convert_to_tensor(p[k], dtype) for p in parts]
            for k, dtype in enumerate(dtypes)
        ]
        self.teacher, self.student = (Side(p, values) for p in programs)
        self.back = {t: s for s, t in self.twins.items()}
        self.order = {t: k for k, t in enumerate(programs[0].instructions)}
        # Teacher's value -> the last instruction of the student it is compared at.
        self.compared: dict[Value, int] = {}
        for k, s in enumerate(programs[1].instructions):
            if s in self.twins:
                t = self.twins[s]
                self.compared |= dict.fromkeys((*t.inputs, *t.outputs), k)

    def run(self) -> None:
        """Walks to the end of the student."""
        instructions = self.student.program.instructions
        for k, s in enumerate(instructions):
            t = self.twins.get(s)
            if t is not None:
                self._teacher_to(t)
            self.student.finish(s, self._step(s, t))
            self.student.free()
            self.teacher.free(self._compared_later)
            self.recorded.clear()
            self.tick((k + 1) / len(instructions))
        self._settle_all()
        for path, _, _ in self.pairs.values():
            self.sites.setdefault(path, SiteFit(path, note="not reached by the call"))

    # ------------------------------------------------------------ one step

    def _teacher_to(self, t: Instruction) -> None:
        side = self.teacher
        while side.at <= self.order[t]:
            i = side.program.instructions[side.at]
            s = self.back.get(i)
            inside = [old for _, old in self._inside(s)] if s else []
            with watching(inside, self._record, result=True):
                outputs = self._execute(side, i)
            side.finish(i, outputs)
            side.free(self._compared_later)

    def _record(self, layer: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        values = _first((args, kwargs)), _first(outputs)
        self.recorded.setdefault(id(layer), []).append(values)

    def _compared_later(self, v: Value) -> bool:
        return self.compared.get(v, -1) >= self.student.at

    def _step(self, s: Instruction, t: Instruction | None) -> list[Parts]:
        if t is not None:
            if id(s.operation) in self.pairs:
                outputs = self._site(s, t)
                if outputs is not None:
                    return [outputs]
            elif inside := self._inside(s):
                return self._opaque(s, t, inside)
            elif self._unchanged(s, t):
                return [self.teacher.env[v] for v in t.outputs]
            elif self.refit:
                self._linear(s, t)
        return self._execute(self.student, s)

    def _execute(self, side: Side, i: Instruction) -> list[Parts]:
        results: list[list[Any]] = []
        while len(results) < len(side.env[i.inputs[0]]):
            results.append(side.call(i, len(results)))
            if len(results) == 1:
                self._make_room(results[0], len(side.env[i.inputs[0]]))
        return [list(v) for v in zip(*results, strict=True)]

    def _make_room(self, outputs: list[Any], parts: int) -> None:
        """Leaves samples out where the live values would not fit into memory."""
        sides = self.teacher, self.student
        values = {id(v): v for side in sides for v in side.env.values()}
        size = sum(size_of(v[0]) for v in values.values()) + sum(map(size_of, outputs))
        fits = max(1, int(self.memory // max(1, size)))
        if fits >= parts:
            return
        for v in values.values():
            del v[fits:]
        self.samples = sum(len(p) for p in next(iter(values.values())))
        note = f"samples were left out to stay below {self.memory / 1e9:.2g} GB"
        if note not in self.notes:
            self.notes.append(note)

    def _unchanged(self, s: Instruction, t: Instruction) -> bool:
        """Same inputs and weights, so same outputs: the teacher's are taken."""
        same = len(s.inputs) == len(t.inputs) and all(
            self.student.env[a] is self.teacher.env.get(b)
            for a, b in zip(s.inputs, t.inputs, strict=True)
        )
        return same and _weights_equal(s.operation, t.operation)

    # --------------------------------------------------------------- sites

    def _site(self, s: Instruction, t: Instruction) -> Parts | None:
        layer = self.pairs[id(s.operation)][2]
        y = self.teacher.env[t.outputs[0]]
        x = self.student.env[s.inputs[0]]
        given = s.kwargs.get("mask")
        if isinstance(given, Value):
            masks: list[Any] = [numpy_of(p) > 0 for p in self.student.env[given]]
        else:
            masks = [mask_of(p) for p in x]
        return self._solve(
            layer, lambda k, first: self.student.call(s, k, first)[0], x, y, masks
        )

    def _solve(
        self,
        layer: Any,
        forward: Callable[[int, int | None], Any],
        x: Parts,
        y: Parts,
        masks: list[Array | None],
    ) -> Parts | None:
        """Solves gamma and beta of one layer at one of its calls.

        `forward(k, n)` runs it on part k of its inputs x, the first n of it where n is
        given; y are the old layer's outputs. Returns the layer's new outputs where
        they follow from what was computed already.
        """
        path = self.pairs[id(layer)][0]
        p = Parameters(layer)
        axes = p.axes(len(y[0].shape))
        target = self.sampler.rows(y, axes, masks)
        if not len(target):
            return None
        pool = self.pools.get(id(layer))
        if pool is None:
            few = FEW if masks[0] is None else None
            if not p.fit(target.shape[1]) or not p.last(lambda: forward(0, few), axes):
                note = f"not fitted: gamma and beta, {p.shape}, are not its last step"
                self.sites[path] = SiteFit(path, note=note)
                return None
            pool = self.pools[id(layer)] = Pool(layer, p.values(target.shape[1]))
            self._running_statistics(layer, x, masks)
        with p.neutral():
            if self.groups == "auto" and not pool.rows:
                pool.groups = self._choose_groups(layer, forward, y, masks, axes)
            values = [forward(k, None) for k in range(len(y))]
            z = self.sampler.rows(values, axes, masks)
        pool.add(z, target)
        if not pool.grown:
            return None
        self._settle(pool)
        plain = masks[0] is None and p.tau is None and values[0].dtype == y[0].dtype
        return [p.apply(v, axes) for v in values] if plain else None

    def _settle(self, pool: Pool) -> None:
        """Sets gamma and beta to the solution on all rows there are."""
        path, p = self.pairs[id(pool.layer)][0], Parameters(pool.layer)
        z, target = pool.all()
        p.assign(
            *solve.affine(
                z,
                target,
                scale=p.gamma is not None,
                center=p.beta is not None,
                tied=p.tied,
                default=pool.start,
            )
        )
        gamma, beta = p.values(target.shape[1])
        self.sites[path] = SiteFit(
            path,
            solve.kept(z * pool.start[0] + pool.start[1], target),
            solve.kept(z * gamma + beta, target),
            len(z),
            pool.groups,
        )

    def _settle_all(self) -> None:
        for pool in self.pools.values():
            if pool.pending:
                self._settle(pool)

    def _choose_groups(
        self,
        layer: Any,
        forward: Callable[[int, int | None], Any],
        y: Parts,
        masks: list[Array | None],
        axes: tuple[int, ...],
    ) -> int | None:
        """The number of groups that keeps most variance; sets it on the layer.

        Tried on a few samples. Groups of fewer than four channels are no candidates:
        they are nearly instance normalization, which loses too much where a pooling
        follows.
        """
        own = Parameters(layer)
        if (
            not isinstance(getattr(layer, "groups", None), int)
            or len(axes) != 1
            or len(layer.variables) > len(own.learnt)
        ):
            return None  # what else it holds may be of one number of groups
        # A mask would be lost by slicing.
        first = GROUP_SAMPLES if masks[0] is None else None
        target = self.sampler.rows([y[0][:first]], axes, masks[:1])
        channels = target.shape[1]
        shares = {}
        for g in (g for g in range(1, max(channels // 4, 1) + 1) if channels % g == 0):
            layer.groups = g
            z = self.sampler.rows([forward(0, first)], axes, masks[:1])
            gamma, beta = solve.affine(z, target)
            shares[g] = solve.kept(z * gamma + beta, target)
        layer.groups = max(shares, key=lambda g: shares[g], default=1)
        return layer.groups

    def _running_statistics(
        self, layer: Any, x: Parts, masks: list[Array | None]
    ) -> None:
        """Gives a layer that has fresh running statistics those of its inputs."""
        mean: Any
        variance: Any
        mean, variance = (
            getattr(layer, n, None) for n in ("moving_mean", "moving_variance")
        )
        if not all(isinstance(v, keras.Variable) for v in (mean, variance)):
            return
        held = [keras.ops.convert_to_numpy(v) for v in (mean, variance)]
        if np.any(held[0] != 0) or np.any(held[1] != 1):
            return
        axes = Parameters(layer).axes(len(x[0].shape))
        rows = self.sampler.rows(x, axes, masks).astype("float64")
        for v, value in ((mean, rows.mean(0)), (variance, rows.var(0))):
            # Of several, one for each step in time for example, all begin alike.
            same = value.size == np.prod(v.shape)
            value = value.reshape(v.shape) if same else np.broadcast_to(value, v.shape)
            v.assign(value.astype("float32"))

    # -------------------------------------------------------------- linear

    def _linear(self, s: Instruction, t: Instruction) -> None:
        calls = sum(i.operation is t.operation for i in self.order)
        x = self.student.env[s.inputs[0]]
        old = self.teacher.env[t.inputs[0]], self.teacher.env[t.outputs[0]]
        self._solve_linear(s.path, s.operation, calls, t.operation, x, *old)

    def _solve_linear(
        self,
        path: str,
        layer: Any,
        calls: int,
        old: Any,
        x: Parts,
        old_x: Parts,
        old_y: Parts,
    ) -> bool:
        problem = linear.problem(layer)
        if problem is None:
            return False
        if calls > 1:  # one kernel cannot follow several calls one by one
            return self._leave(path, "called several times")
        if isinstance(problem, str):
            return self._leave(path, problem)
        limit = min(2**15, max(2**12, 8 * problem.columns))
        sampler = Sampler(limit, self.samples, self.seed)
        rows, targets = [], []
        for k in range(len(x)):
            wanted = problem.channels_last(old_y[k])
            picked = sampler.all_positions(k, wanted.shape)
            keep = slice(None)
            mask = mask_of(x[k])
            if mask is not None and mask.shape == wanted.shape[:-1]:
                mask = mask.reshape(len(mask), -1)
                keep = np.take_along_axis(mask, picked, 1).reshape(-1)
            rows.append(problem.rows(x[k], wanted.shape, picked)[keep])
            targets.append(problem.targets(old, old_x[k], wanted, picked)[keep])
        with np.errstate(over="ignore", invalid="ignore"):
            solved = problem.update(
                np.concatenate(rows), np.concatenate(targets), self.pull
            )
        if not solved:
            return self._leave(path, "values too large")
        self.refitted.append(path)
        return True

    def _leave(self, path: str, why: str) -> bool:
        paths = self.unsolved.setdefault(why, [])
        if path not in paths:
            paths.append(path)
        return False

    # ------------------------------------------------- inside a custom layer

    def _inside(self, s: Instruction) -> list[tuple[Any, Any]]:
        """The layers to solve that a layer's own call runs: `(new, old)`."""
        if id(s.operation) in self.pairs or not isinstance(
            s.operation, keras.layers.Layer
        ):
            return []
        layers = private.flatten_layers(s.operation, include_self=False)
        swapped = [(n, self.pairs[id(n)][1]) for n in layers if id(n) in self.pairs]
        return swapped + (self._linear_inside(s) if swapped and self.refit else [])

    def _linear_inside(self, s: Instruction) -> list[tuple[Any, Any]]:
        t = self.twins.get(s)
        if t is None:
            return []
        new, old = (
            list(private.flatten_layers(i.operation, include_self=False))
            for i in (s, t)
        )
        if len(new) != len(old):
            return []
        found = zip(new, old, strict=True)
        return [(n, o) for n, o in found if type(n) is type(o) and linear.problem(n)]

    def _opaque(
        self, s: Instruction, t: Instruction, inside: list[tuple[Any, Any]]
    ) -> list[Parts]:
        """Runs a layer's own call, solving each layer within as it is reached."""
        calls = {id(n): self.recorded.get(id(o), []) for n, o in inside}
        olds = {id(n): o for n, o in inside}
        counts = dict.fromkeys(calls, 0)

        def note(layer: Any, args: tuple, kwargs: dict, outputs: Any) -> Any:
            k = counts[id(layer)]
            counts[id(layer)] += 1
            if k >= len(calls[id(layer)]):
                return None
            x, (old_x, y) = _first((args, kwargs)), calls[id(layer)][k]
            if not all(map(_readable, (x, y))):
                if id(layer) in self.pairs:
                    path = self.pairs[id(layer)][0]
                    why = "called inside a compiled loop, where values cannot be read"
                    self.sites[path] = SiteFit(path, note=why)
                return None
            if id(layer) in self.pairs:
                self._solve_call(layer, args, kwargs, x, y)
            elif not self._solve_linear(
                layer.path,
                layer,
                len(calls[id(layer)]),
                olds[id(layer)],
                [x],
                [old_x],
                [y],
            ):
                return None
            return type(layer).call(layer, *args, **kwargs)

        with watching([n for n, _ in inside], note, result=True):
            outputs = self._execute(self.student, s)
        if any(len(c) > 1 for c in calls.values()):
            self._settle_all()
            outputs = self._execute(self.student, s)  # now with all calls pooled
        return outputs

    def _solve_call(
        self, layer: Any, args: tuple, kwargs: dict, x: Any, y: Any
    ) -> None:
        def forward(part: int, first: int | None) -> Any:
            given = args, kwargs
            if first is not None:
                given = tree.map_structure(
                    lambda v: v[:first] if getattr(v, "shape", ()) else v, given
                )
            return type(layer).call(layer, *given[0], **given[1])

        mask = kwargs.get("mask")
        masks: list[Any] = [mask_of(x) if mask is None else numpy_of(mask) > 0]
        self._solve(layer, forward, [x], [y], masks)

    def _at_once(self, teacher: Any, inputs: reading.Inputs) -> int:
        """How many samples fit into memory when they pass through a model together."""
        sizes = [1]

        def note(layer: Any, args: Any, kwargs: Any, outputs: Any) -> None:
            leaves = (*tree.flatten(outputs), *tree.flatten(args))
            sizes.append(sum(size_of(v) for v in leaves if hasattr(v, "shape")))

        leaves = [
            layer
            for layer in private.flatten_layers(teacher, include_self=False)
            if not private.held_layers(layer)
        ]
        with watching(leaves, note, result=True):
            teacher(inputs.pack([a[:1] for a in inputs.arrays]), training=False)
        # Residual branches keep several values of that size alive.
        fits = max(1, int(self.memory // (4 * max(sizes))))
        if fits < len(inputs.arrays[0]):
            self.notes.append(
                f"{fits} samples were used to stay below {self.memory / 1e9:.2g} GB"
            )
        return min(fits, len(inputs.arrays[0]))


def _weights_equal(a: Any, b: Any) -> bool:
    one, other = (
        x.get_weights() if isinstance(x, keras.layers.Layer) else [] for x in (a, b)
    )
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def _first(values: Any) -> Any:
    return next(v for v in tree.flatten(values) if hasattr(v, "shape"))


def _readable(x: Any) -> bool:
    """Whether a tensor has values now, rather than when a compiled function runs."""
    try:
        numpy_of(x)
    except Exception:  # each backend raises its own
        return False
    return True
