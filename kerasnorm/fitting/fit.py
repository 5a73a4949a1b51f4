"""Keeps what a model knew through a swap: fits the new layers to the old model.

Teacher (the original) and student (the rewritten copy) are walked together, one
instruction at a time over all samples, so a whole fit costs a few forward passes of
each. At every swapped site the student's layer is solved in closed form on the
student's own inputs, so that it also makes up for what earlier sites lost.

A fifth of the samples is held out. Whatever is chosen is what is best on them, each
step of the fit stands only if it brings their outputs nearer to the original's, and
they tell how often the new model answers as the original does.
"""

from __future__ import annotations

import inspect
import math
import numbers
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kerasnorm.common import data as reading
from kerasnorm.common.errors import KerasNormError, count
from kerasnorm.common.progress import Progress
from kerasnorm.fitting.distill import checked_views, distill
from kerasnorm.fitting.judge import Agreement, Judge
from kerasnorm.fitting.sites import SiteFit
from kerasnorm.fitting.walk import Walk
from rewriters.compare import outputs
from rewriters.program import fixed_batch


# Samples that the closed-form part of each fit uses, at most.
SAMPLES = {"affine": 1024, "refit": 2048, "distill": 2048}
# One of so many samples is held out, and at most so many.
HELD, MOST_HELD = 5, 1000
# The affine fit that a refit has to be better than sees so many.
FIRST = 256
# With fewer there is nothing to hold out.
LEAST = 10
# Gaps to the original so little apart are rounding.
ALIKE = 1e-6
# So many paths are named in one note, at most.
FEW = 3


@dataclass(frozen=True)
class FitResult:
    """What a fit did.

    Args:
        method: `"affine"`, `"refit"` or `"distill"`.
        sites: one entry for each swapped layer.
        refitted: paths of the linear layers that were solved anew.
        samples: samples used by the closed-form part, those held out included.
        seconds: wall time of the whole fit.
        agreement: how often each output answers as the original does, on samples held
            out; empty where there were too few.
        history: losses by epoch (distill only).
        notes: what the user should know, such as samples left out for memory.
    """

    method: str
    sites: tuple[SiteFit, ...]
    refitted: tuple[str, ...] = ()
    samples: int = 0
    seconds: float = 0.0
    agreement: tuple[Agreement, ...] = ()
    history: dict[str, list[float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def fit(
    teacher: Any,
    student: Any,
    pairs: Sequence[tuple[str, Any, Any]],
    data: Any,
    method: str = "affine",
    *,
    choose: Collection[str] = (),
    samples: int | None = None,
    batch_size: int = 32,
    memory: float = 2e9,
    epochs: int = 3,
    learning_rate: float = 2e-3,
    augment: Callable[..., Any] | None = None,
    views: Callable[..., Any] | Sequence[Callable[..., Any]] = (),
    seed: int = 0,
    verbose: int | bool = True,
) -> FitResult:
    """Fits the new layers of a rewritten model to the original, without labels.

    Args:
        teacher: the original model; left as it is.
        student: the rewritten model, fitted in place.
        pairs: `(path, old layer, new layer)` for each swapped layer.
        data: inputs, see `kerasnorm.common.data.collect`; labels are ignored. Or what
            `prepare` made of them.
        method: `"affine"` solves gamma and beta of the new layers; `"refit"` also the
            linear layers around them, towards the original's pre-activations;
            `"distill"` starts with `"refit"` and then trains the student on the
            original's outputs and on those of its swapped layers, unless that takes
            it further away.
        choose: what is chosen of each new layer that has it, by the share of variance
            kept. `"groups"`: the number of groups. `"epsilon"`: half of the mean
            variance, all of it or twice as much is added to epsilon where the layer
            divides by `sqrt(variance + epsilon)`. That draws each sample's variance
            towards the mean one, as a shrinkage estimate does, and the layer normalizes
            less for it; see `SiteFit.normalizes`.
        samples: samples for the closed-form part, spread evenly over the data; by
            default at most 1024 for `"affine"`, 2048 otherwise.
        batch_size: samples of one training step of `"distill"`; where the model takes
            batches of one size alone, that size.
        memory: bytes that live activations and the data may take. What does not fit
            of arrays is not used by the closed-form part; of a source that comes in
            batches a quarter is held, and `"distill"` reads it anew in each epoch. From
            a generator, which gives its batches once, only that is used, and the
            result says so.
        epochs: passes over the data, of `"distill"`.
        learning_rate: largest learning rate of `"distill"`, which rises to it over a
            tenth of the steps and falls to zero along a cosine. A step of a kernel is
            so many times as long as the kernel (Muon); all else takes steps of Adam.
        augment: of `"distill"`: what to do to the inputs of each step before both
            models see them, such as `keras.layers.RandomFlip("horizontal")`.
        views: of `"distill"`: a function, or several, that turns inputs into others
            which should be answered alike, such as `lambda x: x[:, :, ::-1]` for
            images that may be mirrored. The student learns the original's mean answer
            over the inputs and their views, which is often better than its answer to
            one. A step costs as many times more. For outputs without positions.
        seed: of the sampled positions and of the order of training.
        verbose: False for no progress bar.

    Raises:
        KerasNormError: unknown method; options that cannot be; data that is empty, not
            finite or of the wrong shape; views that are not like the inputs, or outputs
            that have positions. Nothing has been changed then.
    """
    started = time.perf_counter()
    check_options(
        {
            "samples": samples,
            "batch_size": batch_size,
            "memory": memory,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "augment": augment,
            "seed": seed,
        }
    )
    inputs = prepare(teacher, data, method, samples=samples, memory=memory)
    _check_outputs(teacher, inputs)
    if len(inputs) == 1:
        warnings.warn(
            "The fit has one sample. It needs at least a few dozen to be of use.",
            stacklevel=2,
        )
    batch_size = fixed_batch(teacher) or batch_size
    views = checked_views(teacher, inputs, views)
    solved, held = apart(len(inputs), seed, fixed_batch(teacher) or 1)
    judge = None
    if len(held):
        seen = held[reading.spaced(len(held), SAMPLES[method] // HELD)]
        judge = Judge(teacher, inputs.taken(seen), views, memory / 8)
    history, notes = {}, []

    def walk(method: str, samples: int, tick: Callable[[float], None]) -> Walk:
        rows, out = _together(solved, held, samples, seed)
        work = Walk(
            teacher,
            student,
            pairs,
            inputs.taken(rows),
            out,
            refit=method != "affine",
            choose=choose,
            chosen={f.path: f.groups for f in found.fits.values()} if found else None,
            memory=memory,
            seed=seed,
            tick=tick,
        )
        work.run()
        return work

    with Progress(verbose) as progress:
        plain = best = _State(student, pairs, judge)
        found: Walk | None = None
        steps = ["affine"] if method == "affine" else ["affine", "refit"]
        most = samples or SAMPLES[method]
        for step in steps if judge is not None else steps[-1:]:
            plain.restore()
            done = walk(
                step,
                most if step == steps[-1] else min(FIRST, most),
                lambda share: progress.update("fitting", share),
            )
            state = _State(student, pairs, judge)
            if state.gap <= best.gap + ALIKE:
                best, found = state, done
        if best is not state:
            notes.append(
                f"{steps[-1]!r} brought the outputs no nearer to the original's on "
                f"samples held out: the weights are those "
                + ("of 'affine'" if found is not None else "carried over")
            )
            best.restore()
        if method == "distill":
            history["loss"], helped = distill(
                teacher,
                student,
                pairs,
                inputs.without(held),
                judge,
                epochs=epochs,
                batch_size=batch_size,
                learning_rate=learning_rate,
                augment=augment,
                views=views,
                seed=seed,
                memory=memory / 16,
                tick=lambda share: progress.update("distilling", share),
            )
            if not helped:
                notes.append(
                    "training brought the outputs no nearer to the original's: the "
                    "weights are those of 'refit'"
                )
    if inputs.cut and inputs.stream is None:
        notes.append(f"the first {len(inputs)} samples were used, to save memory")
    fits = tuple(done.fits.values())
    if found is None:  # nothing stands of what was solved
        fits = tuple(SiteFit(f.path, f.before, f.before, note=f.note) for f in fits)
    elif found is not done:
        fits, done = tuple(found.fits.values()), found
    if steps[-1] != "affine" and not done.refitted:
        notes.append("no linear layer was solved")
    for why, paths in done.unsolved.items():
        more = f" and {len(paths) - FEW} more" if len(paths) > FEW else ""
        notes.append(f"not solved, {why}: {', '.join(paths[:FEW])}{more}")
    return FitResult(
        method,
        fits,
        tuple(done.refitted) if found is not None else (),
        done.samples,
        time.perf_counter() - started,
        judge.agreement(student) if judge is not None else (),
        history,
        (*notes, *done.notes),
    )


class _State:
    """What a fit may change of a student, and how near its outputs are to the
    original's."""

    def __init__(
        self,
        student: Any,
        pairs: Sequence[tuple[str, Any, Any]],
        judge: Judge | None,
    ):
        self.student, self.weights = student, student.get_weights()
        self.settings = [
            (new, name, getattr(new, name))
            for _, _, new in pairs
            for name in ("groups", "epsilon")
            if type(getattr(new, name, None)) in (int, float)
        ]
        self.gap = math.inf if judge is None else judge.gap(student)

    def restore(self) -> None:
        """Makes the student what it was."""
        self.student.set_weights(self.weights)
        for layer, name, value in self.settings:
            setattr(layer, name, value)


def apart(n: int, seed: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of n samples to fit to, and which to hold out: random ones, whole batches
    of them; none where there are too few."""
    count = min(n // HELD, MOST_HELD) // batch * batch if n >= LEAST else 0
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[count:]), np.sort(order[:count])


def _together(
    solved: np.ndarray, held: np.ndarray, samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """So many samples of both in a random order, and which are held out: every so
    often one, so that the first ones have their share."""
    if not len(held):
        solved = solved[reading.spaced(len(solved), samples)]
        return np.random.default_rng(seed).permutation(solved), np.zeros(
            len(solved), bool
        )
    out = min(len(held), max(1, samples // HELD))
    solved = solved[reading.spaced(len(solved), max(1, samples - out))]
    held = held[reading.spaced(len(held), out)]
    flags = np.zeros(len(solved) + len(held), bool)
    flags[np.linspace(0, len(flags) - 1, len(held)).astype(int)] = True
    rng = np.random.default_rng(seed)
    rows = np.empty(len(flags), int)
    rows[flags], rows[~flags] = rng.permutation(held), rng.permutation(solved)
    return rows, flags


def _check_outputs(teacher: Any, inputs: reading.Inputs) -> None:
    """Refuses to fit to outputs that are not finite: a few samples show.

    Raises:
        KerasNormError: they are not.
    """
    size = fixed_batch(teacher) or min(len(inputs), 32)
    rows = reading.spaced(len(inputs), size)
    x = inputs.pack([a[rows] for a in inputs.arrays])
    found = [y for y in outputs(teacher, x) if y.dtype.kind == "f" and len(y)]
    lost = sum(~np.isfinite(y.reshape(len(y), -1)).all(1) for y in found)
    if np.any(lost):
        raise KerasNormError(
            "the original's outputs are NaN or infinite",
            got=f"{np.count_nonzero(lost)} of {size} samples",
            expected="finite outputs to fit to",
            fix="Leave these samples away, or look for weights that are not finite.",
        )


def check_options(options: Any) -> None:
    """Refuses what `fit` does not take as its further arguments.

    Raises:
        KerasNormError: no dict, unknown names, or bad values.
    """
    known = {
        name: p.default
        for name, p in inspect.signature(fit).parameters.items()
        if p.kind is p.KEYWORD_ONLY and name not in ("choose", "verbose")
    }
    unknown = (
        [k for k in options if k not in known]
        if isinstance(options, Mapping)
        else [options]
    )
    if unknown:
        raise KerasNormError(
            "these are no options of a fit",
            got=", ".join(map(repr, unknown)),
            expected=f"a dict with some of {', '.join(known)}",
        )
    given = {**known, **options}
    for name in ("samples", "batch_size", "epochs"):
        if (name, given[name]) != ("samples", None):
            count(name, given[name])
    for name in ("learning_rate", "memory"):
        value = given[name]
        if not (isinstance(value, numbers.Real) and 0 < float(value) < math.inf):
            raise KerasNormError(
                f"not a {name.replace('_', ' ')}",
                got=f"{name}={value!r}",
                expected="a finite number above 0",
            )
    seed, augment = given["seed"], given["augment"]
    if not (isinstance(seed, numbers.Integral) and int(seed) >= 0):
        raise KerasNormError(
            "not a seed", got=f"seed={seed!r}", expected="an integer of at least 0"
        )
    if not (augment is None or callable(augment)):
        raise KerasNormError(
            "not a function of the inputs",
            got=f"augment={augment!r}",
            expected="a layer or another callable, or None",
        )


def prepare(
    model: Any,
    data: Any,
    method: str = "affine",
    *,
    samples: int | None = None,
    memory: float = 2e9,
) -> reading.Inputs:
    """Reads and checks the data of a fit, before any other work; arguments as `fit`.

    Raises:
        KerasNormError: unknown method; data that is empty, not finite or of the wrong
            shape.
    """
    if method not in SAMPLES:
        raise KerasNormError(
            "unknown fit", got=repr(method), expected=f"one of {', '.join(SAMPLES)}"
        )
    if isinstance(data, reading.Inputs):
        return data
    wanted = SAMPLES[method] if samples is None else count("samples", samples)
    limit = None if method == "distill" else wanted
    # Of arrays nothing is copied that is not used.
    limit = None if reading.batches_of(data) is None else limit
    inputs = reading.collect(model, data, limit, memory / 4)
    reading.whole_batch(model, min(len(inputs), wanted))
    return inputs
