"""Teacher and student walked together, sites solved on the way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from kerasnorm.common import data as reading
from kerasnorm.fitting import linear, solve
from kerasnorm.fitting.beside import sums
from kerasnorm.fitting.execution import Opaque, Side, size_of, twins
from kerasnorm.fitting.observations import (
    Array,
    Parameters,
    Parts,
    Sampler,
    mask_of,
    numpy_of,
)
from kerasnorm.fitting.room import Room
from kerasnorm.fitting.sites import Site, SiteFit, choose, numbers
from rewriters import private
from rewriters.program import Instruction, Program, Value, fixed_batch, is_graph
from rewriters.tracing import watching


# Samples that run through a layer at once, at most.
PART = 256
# What can be chosen is compared on as many samples, at most; on fewer where they are
# large, since each choice is tried on all of their positions.
LOOK, LOOK_LEAST, LOOK_ROWS = 64, 10, 1024
# So many show what a layer does.
FEW = 4
# Samples come back once so many times as many have room; each time costs a pass.
WORTHWHILE = 2


class Walk:
    """Both models, instruction by instruction, solving sites in order.

    Where samples take too much memory some are left out, and run through what has been
    solved once later layers, whose values take less, have room for them. A layer called
    several times is solved at each further call on the rows of all its calls so far;
    outputs computed already are not computed again.

    Args:
        teacher, student: the original model and the rewritten one, fitted in place.
        pairs: `(path, old layer, new layer)` for each swapped layer.
        inputs: the data, see `reading.collect`, in an order of no meaning.
        held: which samples are held out: nothing is solved on them, and what is chosen
            is what is best on them.
        refit: also solve the linear layers.
        choose: see `kerasnorm.fitting.fit.fit`.
        chosen: numbers of groups that were chosen before, by path.
        memory, seed: see `kerasnorm.fitting.fit.fit`.
        rows: observations a site is solved on, about; more with many samples.
        tick: called after every instruction with the share of work done.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        pairs: Sequence[tuple[str, Any, Any]],
        inputs: reading.Inputs,
        held: Array,
        *,
        refit: bool = False,
        choose: Collection[str] = (),
        chosen: Mapping[str, int | None] | None = None,
        memory: float = 2e9,
        seed: int = 0,
        rows: int = 2**13,
        tick: Callable[[float], None] = lambda share: None,
    ):
        self.pairs = {id(new): (path, old, new) for path, old, new in pairs}
        self.refit, self.choices, self.chosen = refit, choose, chosen or {}
        self.memory, self.seed, self.tick = memory, seed, tick
        self.fits: dict[str, SiteFit] = {}
        self.refitted: list[str] = []
        self.unsolved: dict[str, list[str]] = {}
        self.notes: list[str] = []
        self.sites: dict[int, Site] = {}
        self.recorded: dict[int, list[Any]] = {}
        # Student's value -> the linear layer, solved already, that makes it.
        self.makers: dict[Value, Any] = {}

        self.arrays = inputs.arrays
        programs = [
            Program(m) if is_graph(m) else Opaque(m, inputs.structure, self.arrays)
            for m in (teacher, student)
        ]
        self.programs = programs
        self.twins = twins(*programs)
        self.back = {t: s for s, t in self.twins.items()}
        self.order = {t: k for k, t in enumerate(programs[0].instructions)}
        self.sums = sums(programs[0], programs[1], self.twins)
        # Teacher's value -> the last instruction of the student it is compared at.
        self.compared: dict[Value, int] = {}
        for k, s in enumerate(programs[1].instructions):
            if s in self.twins:
                t = self.twins[s]
                beside = [v for v, _ in self.sums.get(s, ())]
                self.compared |= dict.fromkeys((*t.inputs, *t.outputs, *beside), k)
        # A model with a graph casts what it is given to what its inputs are.
        self.dtypes = (
            [t.dtype for t in teacher.inputs]
            if is_graph(teacher)
            else [None] * len(self.arrays)
        )
        self.room: Room | None = None
        if any(self._inside(i) for i in programs[1].instructions):
            # Sites inside a layer's own call are solved while it runs, so all samples
            # have to pass through it at once.
            part = samples = self._at_once(teacher, inputs)
        else:
            fixed = fixed_batch(teacher)
            self.room = Room(
                programs,
                self._tensors(0, fixed or 1),
                lambda s: self.order[self.twins[s]] if s in self.twins else -1,
                lambda v, k: self.compared.get(v, -1) >= k,
                lambda s: 3 if id(s.operation) in self.pairs else 0,
                memory,
            )
            part = fixed or min(self.room.part, PART)
            samples = len(inputs) // part * part if fixed else len(inputs)
        self.samples = samples
        ends = np.linspace(0, samples, -(-samples // part) + 1).astype(int)
        self.spans = list(itertools.pairwise(ends.tolist()))
        self.held = [held[a:b] for a, b in self.spans]
        self.live = self.fewest = len(self.spans)
        self.sampler = Sampler(max(rows, 8 * samples), samples, seed)
        parts = [self._tensors(*span) for span in self.spans[: self._having_room(0)]]
        self.live = len(parts)
        values = [list(v) for v in zip(*parts, strict=True)]
        self.teacher, self.student = (Side(p, values) for p in programs)

    def run(self) -> None:
        """Walks to the end of the student."""
        instructions = self.student.program.instructions
        for k, s in enumerate(instructions):
            self._leave_out(self._having_room(k))
            t = self.twins.get(s)
            if t is not None:
                self._teacher_to(t)
            self.student.finish(s, self._step(s, t))
            self.student.free()
            self.teacher.free(self._compared_later)
            self.recorded.clear()
            self.tick((k + 1) / len(instructions))
            if k + 1 < len(instructions):
                self._catch_up(self._having_room(k + 1, later=True))
        self._settle_all()
        if self.fewest < len(self.spans):
            self.notes.append(
                f"{self.spans[self.fewest - 1][1]} of the samples were used for the "
                f"widest layers, to stay below {self.memory / 1e9:.2g} GB"
            )
        for path, _, _ in self.pairs.values():
            self.fits.setdefault(path, SiteFit(path, note="not reached by the call"))

    # ------------------------------------------------------- samples and memory

    def _tensors(self, start: int, end: int) -> list[Any]:
        """Some samples as tensors, one for each input."""
        return [
            keras.ops.convert_to_tensor(a[start:end], dtype)
            for a, dtype in zip(self.arrays, self.dtypes, strict=True)
        ]

    def _having_room(self, k: int, later: bool = False) -> int:
        """How many parts the memory has room for at the k-th instruction, or there and
        at all that follow."""
        if self.room is None:
            return len(self.spans)
        fits = (self.room.later if later else self.room.fits)[k]
        longest = max(b - a for a, b in self.spans)
        return max(1, min(len(self.spans), int(fits // longest)))

    def _values(self) -> list[Parts]:
        """What is live, each once."""
        sides = self.teacher, self.student
        return list({id(v): v for side in sides for v in side.env.values()}.values())

    def _leave_out(self, parts: int) -> None:
        """Leaves all but so many parts of the samples out, for now."""
        if parts < self.live:
            for v in self._values():
                del v[parts:]
            self.live = parts
            self.fewest = min(self.fewest, parts)

    def _catch_up(self, parts: int) -> None:
        """Brings samples back that had been left out, where many more have room."""
        if parts < min(len(self.spans), WORTHWHILE * self.live) or parts <= self.live:
            return
        sides = self.teacher, self.student
        for k in range(self.live, parts):
            inputs = self._tensors(*self.spans[k])
            seen: set[int] = set()
            for side in sides:
                again = Side(side.program, [[x] for x in inputs])
                while again.at < side.at:
                    i = side.program.instructions[again.at]
                    again.finish(i, [[x] for x in again.call(i, 0)])
                    again.free(lambda v, side=side: v in side.env)
                for v, values in side.env.items():
                    if id(values) not in seen:
                        values.append(again.env[v][0])
                        seen.add(id(values))
        self.live = parts

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
        results = [side.call(i, k) for k in range(self.live)]
        return [list(v) for v in zip(*results, strict=True)]

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
        y = self._wanted(s, self.teacher.env[t.outputs[0]])
        value = s.inputs[0]
        x = self.student.env[value]
        given = s.kwargs.get("mask")
        if isinstance(given, Value):
            masks: list[Any] = [numpy_of(p) > 0 for p in self.student.env[given]]
        else:
            masks = [mask_of(p) for p in x]

        def forward(k: int, given: Any = None) -> Any:
            others = {} if given is None else {value: given}
            return self.student.call(s, k, others)[0]

        def rescale(scale: Array) -> None:
            self.makers[value].scale(scale)
            x[:] = [_scaled(p, scale, layer) for p in x]

        # Its own, and nobody else's, and alike whatever the old layer made of it.
        free = value in self.makers and len(self.student.program.consumers[value]) == 1
        return self._solve(layer, forward, x, y, masks, rescale if free else None)

    def _wanted(self, s: Instruction, y: Parts) -> Parts:
        """The teacher's outputs, and what the student's lack of them beside s."""
        for old, new in self.sums.get(s, ()):
            before, after = self.teacher.env.get(old), self.student.env.get(new)
            if before is None or after is None or before is after:
                continue
            parts = zip(y, before, after, strict=True)
            y = [p + keras.ops.cast(a - b, p.dtype) for p, a, b in parts]
        return y

    def _solve(
        self,
        layer: Any,
        forward: Callable[..., Any],
        x: Parts,
        y: Parts,
        masks: list[Array | None],
        rescale: Callable[[Array], None] | None = None,
    ) -> Parts | None:
        """Solves gamma and beta of one layer at one of its calls.

        `forward(k, given)` runs it on part k of its inputs x, or on what is given in
        their place; y is what the outputs should be. `rescale` makes the inputs come
        multiplied. Returns the layer's new outputs where they follow from what was
        computed already.
        """
        path = self.pairs[id(layer)][0]
        p = Parameters(layer)
        axes = p.axes(len(y[0].shape))
        site = self.sites.get(id(layer))
        if site is None:
            target, _ = self.sampler.rows(0, y[0], axes, masks[0])
            few = x[0][:FEW] if masks[0] is None else None
            if (
                not target.shape[1:]
                or not p.fit(target.shape[1])
                or not p.last(lambda: forward(0, few), axes)
            ):
                note = f"not fitted: gamma and beta, {p.shape}, are not its last step"
                self.fits[path] = SiteFit(path, note=note)
                return None
            self._running_statistics(layer, x, masks)
            site = self.sites[id(layer)] = Site(path, layer, target.shape[1])
            with p.neutral():
                self._choose(site, forward, x, y, masks, axes, rescale)
        values = []
        with p.neutral():
            for k, (part, mask) in enumerate(zip(y, masks, strict=True)):
                values.append(forward(k))
                z, samples = self.sampler.rows(k, values[k], axes, mask)
                target, _ = self.sampler.rows(k, part, axes, mask)
                site.add(z, target, self._held(k, len(part))[samples])
        if not site.grown:
            return None
        self.fits[path] = site.settle()
        plain = masks[0] is None and p.tau is None and values[0].dtype == y[0].dtype
        return [p.apply(v, axes) for v in values] if plain else None

    def _held(self, part: int, batch: int) -> Array:
        """Which of a part's values are held out; there may be several of a sample."""
        held = self.held[part]
        return np.resize(np.repeat(held, max(1, batch // len(held))), batch)

    def _settle_all(self) -> None:
        for site in self.sites.values():
            if site.pending:
                self.fits[site.path] = site.settle()

    def _choose(
        self,
        site: Site,
        forward: Callable[..., Any],
        x: Parts,
        y: Parts,
        masks: list[Array | None],
        axes: tuple[int, ...],
        rescale: Callable[[Array], None] | None,
    ) -> None:
        """Chooses what can be chosen of a layer, on a few samples."""
        groups: Sequence[int | None] = [None]
        if site.path in self.chosen:
            groups = [self.chosen[site.path]]
        elif "groups" in self.choices and len(axes) == 1:
            groups = numbers(site)
        epsilon = "epsilon" in self.choices
        if groups == [None] and not epsilon and rescale is None:
            return
        given, wanted, held = None, y[0], self._held(0, len(y[0]))
        if masks[0] is None:  # which would be lost on the way
            fits = int(self.memory / 32 * len(y[0]) / max(1, size_of(y[0])))
            look = min(LOOK, max(LOOK_LEAST, fits))
            parts = range(min(len(y), -(-look // len(y[0]))))
            given, wanted = (
                keras.ops.concatenate([v[k] for k in parts])[:look] for v in (x, y)
            )
            held = [self._held(k, len(y[k])) for k in parts]
            held = np.concatenate(held)[:look]
        else:
            rescale = None
        sampler = Sampler(LOOK_ROWS, len(held), self.seed)

        def rows(value: Any) -> Array:
            return sampler.rows(0, value, axes, masks[0])[0]

        target = rows(wanted)
        if not len(target):
            return
        scales: list[Array | None] = [None]
        if rescale is not None:
            # As the old layer took them: channels count by what they became.
            gain = np.abs(solve.affine(solve.Sums(rows(given), target))[0])
            if np.all(gain > 0):
                scales.append(gain / np.sqrt(np.mean(gain**2)))

        def outputs(scale: Array | None) -> Array:
            x = given if scale is None else _scaled(given, scale, site.layer)
            return rows(forward(0, x))

        site.chosen = choose(
            site,
            outputs,
            target,
            held[sampler.rows(0, wanted, axes, masks[0])[1]],
            groups=groups,
            epsilon=epsilon,
            scales=scales,
        )
        if site.chosen.scale is not None and rescale is not None:
            rescale(site.chosen.scale)

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
        parts = enumerate(zip(x, masks, strict=True))
        parts = [self.sampler.rows(k, p, axes, m)[0] for k, (p, m) in parts]
        rows = np.concatenate(parts).astype("float64")
        for v, value in ((mean, rows.mean(0)), (variance, rows.var(0))):
            # Of several, one for each step in time for example, all begin alike.
            same = value.size == np.prod(v.shape)
            value = value.reshape(v.shape) if same else np.broadcast_to(value, v.shape)
            v.assign(value.astype("float32"))

    # -------------------------------------------------------------- linear

    def _linear(self, s: Instruction, t: Instruction) -> None:
        calls = sum(i.operation is t.operation for i in self.order)
        x = self.student.env[s.inputs[0]]
        old_x, old_y = self.teacher.env[t.inputs[0]], self.teacher.env[t.outputs[0]]
        missing = None
        if self.sums.get(s) and _plain(t.operation):
            wanted = self._wanted(s, old_y)
            missing = [a - b for a, b in zip(wanted, old_y, strict=True)]
        solved = self._solve_linear(
            s.path, s.operation, calls, t.operation, x, old_x, old_y, missing
        )
        if solved and _plain(s.operation):
            self.makers[s.outputs[0]] = linear.problem(s.operation)

    def _solve_linear(
        self,
        path: str,
        layer: Any,
        calls: int,
        old: Any,
        x: Parts,
        old_x: Parts,
        old_y: Parts,
        missing: Parts | None = None,
    ) -> bool:
        """Solves a linear layer for the old one's outputs, and for what is missing
        beside them; whether it could be."""
        problem = linear.problem(layer)
        if problem is None:
            return False
        if calls > 1:  # one kernel cannot follow several calls one by one
            return self._leave(path, "called several times")
        if isinstance(problem, str):
            return self._leave(path, problem)
        if 40 * problem.groups * problem.columns**2 > self.memory / 2:
            return self._leave(path, f"no memory for {problem.columns} inputs")
        held = [self._held(k, len(y)) for k, y in enumerate(old_y)]
        with np.errstate(over="ignore", invalid="ignore"):
            normal, weights = problem.equations(
                old,
                x,
                old_x,
                old_y,
                missing,
                held,
                self.samples,
                self.seed,
                self.memory,
            )
            if normal.rows is None:
                return False
            if not normal.finite or not np.isfinite(weights).all():
                return self._leave(path, "values too large")
            change = normal.best(weights=weights)
        if change is not None:
            problem.update(*change)
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
                    self.fits[path] = SiteFit(path, note=why)
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
        def forward(part: int, given: Any = None) -> Any:
            other = tree.map_structure(
                lambda v: v if given is None or v is not x else given, (args, kwargs)
            )
            return type(layer).call(layer, *other[0], **other[1])

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


def _scaled(x: Any, scale: Array, layer: Any) -> Any:
    """Inputs of a normalization layer multiplied channel by channel."""
    axes = Parameters(layer).axes(len(x.shape))
    shape = [d if a in axes else 1 for a, d in enumerate(x.shape)]
    return x * keras.ops.convert_to_tensor(scale.reshape(shape), x.dtype)


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


def _plain(layer: Any) -> bool:
    """Whether a linear layer has no activation."""
    return getattr(layer, "activation", None) is keras.activations.linear
