"""Trains a rewritten model on what the original computes, without labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from kerasnorm.common import data as reading
from kerasnorm.common.arrays import fed
from kerasnorm.common.errors import KerasNormError
from kerasnorm.fitting.judge import Judge, per_sample
from kerasnorm.fitting.muon import Muon
from kerasnorm.numerics import moments, replicas
from kerasnorm.runtime import compilation
from rewriters.program import fixed_batch
from rewriters.tracing import watching


# So many samples tell what kind of outputs a model has.
LOOK = 256


class Pupil(keras.Model):
    """Student and teacher side by side; the output is the loss of each sample.

    Both run as at inference: no dropout, and normalization that was not swapped keeps
    its running statistics. The outputs are compared, and so is what comes out of each
    swapped layer, in units of its variance: the last layers alone say little about
    what the first ones should do. In training the layers count for less from step to
    step, since in the end it is the outputs that matter.

    Args:
        teacher: the original; its weights are not trained.
        student: the rewritten model.
        pairs: `(path, old layer, new layer)`, whose outputs are compared.
        losses: one for each output.
        augment: applied to the inputs of both, or None.
        views: functions of the inputs. The student learns to answer the inputs, and
            what each of these makes of them, as the teacher does on average over all.
        steps: of the training, at the end of which the layers count for nothing.
        pack: makes what both models take of what comes in: Keras's trainers feed
            tuples, but not lists, on every backend.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        pairs: Sequence[tuple[str, Any, Any]],
        losses: Sequence[Callable[[Any, Any], Any]],
        augment: Callable[..., Any] | None = None,
        views: Sequence[Callable[..., Any]] = (),
        steps: int = 1,
        pack: Callable[[Any], Any] = lambda x: x,
    ):
        super().__init__()
        self.teacher, self.student, self.augment = teacher, student, augment
        self.pairs, self.gaps = tuple(pairs), tuple(losses)
        self.views, self.steps, self.pack = tuple(views), steps, pack
        # It is counted here: what a callback assigns between steps does not reach what
        # JAX trains.
        self.share = self.add_weight(
            shape=(),
            initializer="ones",
            dtype="float32",
            trainable=False,
            autocast=False,
            aggregation="only_first_replica",
            name="share",
        )

    @property
    def trainable_variables(self) -> list[Any]:
        return self.student.trainable_variables

    @property
    def non_trainable_variables(self) -> list[Any]:
        ours = {id(v) for v in self.trainable_variables}
        return [v for v in self.variables if id(v) not in ours]

    @property
    def losses(self) -> list[Any]:
        """None: regularizers are for the user's training, not for a likeness."""
        return []

    # Keras's trainers ask under either name.
    trainable_weights = trainable_variables
    non_trainable_weights = non_trainable_variables

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        inputs = self.pack(inputs)
        if self.augment is not None:
            inputs = self.augment(inputs)
        if self.views:
            seen = [inputs, *(view(inputs) for view in self.views)]
            inputs = tree.map_structure(lambda *v: ops.concatenate(v), *seen)
        _, old, new = zip(*self.pairs, strict=True) if self.pairs else ((), (), ())
        wanted, before = _observed(self.teacher, old, inputs)
        given, after = _observed(self.student, new, inputs)
        terms = [
            loss(ops.stop_gradient(self._agreed(y)), p)
            for loss, y, p in zip(self.gaps, wanted, given, strict=True)
        ]
        sites = [
            _relative(ops.stop_gradient(y), p)
            for a, b in zip(before, after, strict=True)
            if len(a) == len(b)
            for y, p in zip(a, b, strict=True)
            if tuple(y.shape) == tuple(p.shape)
        ]
        share = ops.convert_to_tensor(self.share)
        gaps = sum(terms) + share * sum(sites)
        if training:
            self.share.assign(ops.maximum(share - 1 / self.steps, 0.0))
        # One for each sample, the mean of its views.
        return ops.mean(ops.reshape(gaps, (1 + len(self.views), -1)), 0)

    def _agreed(self, y: Any) -> Any:
        """Each output, which comes once a view, as the mean over the views."""
        if not self.views:
            return y
        count, shape = 1 + len(self.views), ops.shape(y)
        mean = ops.mean(ops.reshape(y, (count, -1, *shape[1:])), 0)
        return ops.tile(mean, (count, *[1] * (len(shape) - 1)))


def _observed(model: Any, layers: Sequence[Any], inputs: Any) -> tuple[list, list]:
    """Flat outputs of the model, and those of each call of the layers."""
    seen: dict[int, list[Any]] = {id(layer): [] for layer in layers}

    def note(layer: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        seen[id(layer)].append(outputs)

    with watching(list(layers), note, result=True):
        outputs = tree.flatten(model(inputs, training=False))
    return outputs, [seen[id(layer)] for layer in layers]


def distill(
    teacher: Any,
    student: Any,
    pairs: Sequence[tuple[str, Any, Any]],
    inputs: reading.Inputs,
    judge: Judge | None = None,
    *,
    epochs: int = 3,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    augment: Callable[..., Any] | None = None,
    views: Sequence[Callable[..., Any]] = (),
    seed: int = 0,
    memory: float = 1e8,
    tick: Callable[[float], None] = lambda share: None,
) -> tuple[list[float], bool]:
    """Trains all trainable weights of the student.

    Returns the loss of each epoch, and whether the outputs came nearer to those of the
    teacher. The weights are those, of the ones that it came with and those after each
    epoch, with which they are nearest: by the `judge`, or on the inputs themselves.

    Muon, at a rate that rises over the first tenth of the steps and falls to zero along
    a cosine. The loss of an output follows from the teacher's values (see `kind`),
    unless the layer that makes it has no activation: probabilities are compared by
    cross-entropy, softened where they sum to one;
    anything else by squares, in units of the output's variance. The outputs of each
    pair of layers count as much as an output of the model at first (a network is easier
    to train from within than from its end alone) and for nothing at the end. Inputs
    that are a stream are shuffled in blocks of `memory` bytes.
    """
    judge = judge or Judge(teacher, inputs.spread(LOOK), views, memory)
    failures: list[KerasNormError] = []
    if inputs.stream is None:
        batches: Any = _Batches(inputs, batch_size, seed)
        per_epoch, more = len(batches), {}
    else:
        per_epoch = -(-len(inputs.stream) // batch_size)
        more = {"steps_per_epoch": per_epoch}
        batches = _streamed(inputs, inputs.stream, batch_size, seed, memory, failures)
    steps = epochs * per_epoch
    settings: Any = (judge.losses, augment, views, steps, inputs.pack)
    pupil = Pupil(teacher, student, pairs, *settings)
    if not _traces(pupil, inputs.arrays):
        pupil = Pupil(teacher, student, (), *settings)
    # Steps are as long as the rate whatever the gradient: at the full rate the first
    # would undo the fit that the student comes with.
    warmup = steps // 10
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=learning_rate, warmup_steps=warmup
    )
    # What XLA compiles cannot speak to other replicas.
    jit = replicas.of(pupil) == 1 and compilation.compiles(pupil)
    optimizer = Muon(student, schedule)
    done = itertools.count(1)
    start = least = judge.gap(student)
    best = student.get_weights()

    def note(epoch: int, logs: Any) -> None:
        nonlocal least, best
        gap = judge.gap(student)
        if gap < least:
            least, best = gap, student.get_weights()

    progress = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: tick(next(done) / steps),
        on_epoch_end=note,
    )
    how = {"shuffle": False, "verbose": 0, "callbacks": [progress], **more}
    try:
        with compilation.tracing([pupil] if jit else []):
            # One loss for each sample: Keras does not share a scalar out over replicas.
            pupil.compile(optimizer, loss=lambda _, p: p, jit_compile=jit)
            history = pupil.fit(batches, epochs=epochs, **how)
    except Exception:
        if failures:
            raise failures[0] from None
        raise
    student.set_weights(best)
    return [float(v) for v in history.history["loss"]], least < start


def checked_views(
    model: Any, inputs: reading.Inputs, views: Any
) -> tuple[Callable[..., Any], ...]:
    """The `views` of a fit, one or several, tried on two samples.

    Raises:
        KerasNormError: not a function, or one that changes the shape of the inputs; a
            model whose outputs have positions, which may move with the inputs.
    """
    several = isinstance(views, Iterable) and not callable(views)
    views = tuple(views) if several else () if views is None else (views,)
    if not views:
        return ()
    two = inputs.spread(fixed_batch(model) or 2)
    x = tree.map_structure(
        lambda a: ops.convert_to_tensor(fed(a)), two.pack(two.arrays)
    )
    for view in views:
        given = view(x) if callable(view) else None
        shapes = [
            [tuple(v.shape) if hasattr(v, "shape") else v for v in tree.flatten(t)]
            for t in (x, given)
        ]
        if shapes[0] != shapes[1]:
            raise KerasNormError(
                "a view is a function that gives inputs like those it gets",
                got=f"{view!r}, which gives {shapes[1]} for {shapes[0]}",
                fix="Flip images with `lambda x: x[:, :, ::-1]`, for example.",
            )
    rank = max(len(y.shape) for y in tree.flatten(model(x, training=False)))
    if rank > 2:
        raise KerasNormError(
            "the outputs are averaged over views, and those of this model have "
            "positions, which may move with the inputs",
            got=f"outputs of rank {rank}",
            expected="one vector for each sample",
            fix="Use `augment`, which shows both models the same inputs.",
        )
    return views


def _traces(pupil: Pupil, inputs: Any) -> bool:
    """Whether what the layers compute can be seen from outside.

    Not within the loop of a recurrent layer or of `TimeDistributed`.
    """
    size = fixed_batch(pupil.teacher)
    specs = tuple(
        keras.KerasTensor((size, *a.shape[1:]), fed(a[:1]).dtype) for a in inputs
    )
    try:
        keras.Operation.compute_output_spec(pupil, specs)
    except Exception:
        return False
    return True


def _streamed(
    inputs: reading.Inputs,
    stream: reading.Stream,
    size: int,
    seed: int,
    memory: float,
    failures: list[KerasNormError],
) -> Iterator[tuple[Any, Any]]:
    """Batches of a stream without end. What is wrong with its data is kept in
    `failures`: TensorFlow reads it in a graph, and raises an error of its own."""
    try:
        for flat in stream.shuffled(size, seed, memory):
            target = np.zeros(size, "float32")  # Keras wants one
            yield tuple(map(fed, flat)), target
    except KerasNormError as error:
        failures.append(error)
        raise


class _Batches(keras.utils.PyDataset):
    """Inputs in an order of its own, drawn anew each epoch.

    The last batch is filled up from the front of the order: all are of one size, which
    a compiled program asks for.
    """

    def __init__(self, inputs: Any, size: int, seed: int):
        super().__init__()
        self.inputs, self.size = inputs, min(size, len(inputs))
        self.rng = np.random.default_rng(seed)
        self.order = self.rng.permutation(len(inputs))

    def __len__(self) -> int:
        return -(-len(self.order) // self.size)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        rows = np.arange(index * self.size, (index + 1) * self.size)
        rows = np.take(self.order, rows, mode="wrap")
        x = tuple(fed(a[rows]) for a in self.inputs.arrays)
        return x, np.zeros(len(rows), "float32")  # Keras wants a target

    def on_epoch_end(self) -> None:
        self.order = self.rng.permutation(len(self.order))


def _relative(y: Any, p: Any) -> Any:
    """Square difference of each sample in units of the batch's variance, which is
    that of the batches of all replicas."""
    y, p = ops.cast(y, "float32"), ops.cast(p, "float32")
    with replicas.synchronized():
        _, variance = moments.moments(y, range(len(y.shape)))
    return per_sample(ops.square(y - p)) / (ops.max(variance) + 1e-12)
