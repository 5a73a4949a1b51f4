"""Trains a rewritten model on what the original computes, without labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from kerasnorm.common import data as reading
from kerasnorm.common.errors import KerasNormError
from kerasnorm.fitting.muon import Muon
from kerasnorm.numerics import moments, replicas
from kerasnorm.runtime import compilation
from kerasnorm.runtime.programs import Compiled
from rewriters.program import fixed_batch, maker_of
from rewriters.tracing import watching


# Softened probabilities tell more about the wrong classes than hard ones.
TEMPERATURE = 2.0
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
    *,
    epochs: int = 3,
    batch_size: int = 32,
    learning_rate: float = 7e-3,
    augment: Callable[..., Any] | None = None,
    views: Sequence[Callable[..., Any]] = (),
    seed: int = 0,
    memory: float = 1e8,
    tick: Callable[[float], None] = lambda share: None,
) -> tuple[list[float], bool]:
    """Trains all trainable weights of the student.

    Returns the loss of each epoch, and whether the outputs came nearer to those of the
    teacher; if not, the student is as it was.

    Muon, at a rate that rises over the first tenth of the steps and falls to zero along
    a cosine. The loss of an output follows from the teacher's values (see `kind`),
    unless the layer that makes it has no activation: probabilities are compared by
    cross-entropy, softened where they sum to one;
    anything else by squares, in units of the output's variance. The outputs of each
    pair of layers count as much as an output of the model at first (a network is easier
    to train from within than from its end alone) and for nothing at the end. Inputs
    that are a stream are shuffled in blocks of `memory` bytes.
    """
    look = inputs.spread(LOOK)
    losses = [
        _loss("linear" if is_linear(teacher, k) else kind(y), y)
        for k, y in enumerate(_outputs(teacher, look))
    ]
    failures: list[KerasNormError] = []
    if inputs.stream is None:
        batches: Any = _Batches(inputs, batch_size, seed)
        per_epoch, more = len(batches), {}
    else:
        per_epoch = -(-len(inputs.stream) // batch_size)
        more = {"steps_per_epoch": per_epoch}
        batches = _streamed(inputs, inputs.stream, batch_size, seed, memory, failures)
    steps = epochs * per_epoch
    settings: Any = (losses, augment, views, steps, inputs.pack)
    pupil = Pupil(teacher, student, pairs, *settings)
    if not _traces(pupil, look.arrays):
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
    progress = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: tick(next(done) / steps)
    )
    how = {"shuffle": False, "verbose": 0, "callbacks": [progress], **more}
    try:
        with compilation.tracing([pupil] if jit else []):
            # One loss for each sample: Keras does not share a scalar out over replicas.
            pupil.compile(optimizer, loss=lambda _, p: p, jit_compile=jit)
            # By the outputs alone.
            judge = Pupil(teacher, student, (), losses, views=views, pack=inputs.pack)
            judge.compile(loss=lambda _, p: p, jit_compile=jit)
            sample, before = _Batches(look, batch_size, seed), student.get_weights()
            start = judge.evaluate(sample, verbose=0)
            history = pupil.fit(batches, epochs=epochs, **how)
            helped = judge.evaluate(sample, verbose=0) < start
    except Exception:
        if failures:
            raise failures[0] from None
        raise
    if not helped:  # too few steps, or too large ones, for a student that was near
        student.set_weights(before)
    return [float(v) for v in history.history["loss"]], helped


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
        lambda a: ops.convert_to_tensor(_fed(a)), two.pack(two.arrays)
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
    rank = max(len(y.shape) for y in _outputs(model, two))
    if rank > 2:
        raise KerasNormError(
            "the outputs are averaged over views, and those of this model have "
            "positions, which may move with the inputs",
            got=f"outputs of rank {rank}",
            expected="one vector for each sample",
            fix="Use `augment`, which shows both models the same inputs.",
        )
    return views


def _outputs(model: Any, inputs: reading.Inputs) -> list[np.ndarray]:
    """Flat outputs of a model, in some order, some of them twice."""
    run = Compiled(
        lambda x: tree.flatten(model(inputs.pack(x), training=False)),
        [(v, v) for v in model.variables],
        [model],
    )
    batches = _Batches(inputs, fixed_batch(model) or 64, 0)
    parts = [run(batches[k][0]) for k in range(len(batches))]
    flat = zip(*parts, strict=True)
    return [np.concatenate([ops.convert_to_numpy(v) for v in part]) for part in flat]


def _traces(pupil: Pupil, inputs: Any) -> bool:
    """Whether what the layers compute can be seen from outside.

    Not within the loop of a recurrent layer or of `TimeDistributed`.
    """
    size = fixed_batch(pupil.teacher)
    specs = tuple(
        keras.KerasTensor((size, *a.shape[1:]), _fed(a[:1]).dtype) for a in inputs
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
            yield tuple(map(_fed, flat)), target
    except KerasNormError as error:
        failures.append(error)
        raise


def _fed(a: np.ndarray) -> Any:
    """An array as Keras's trainers take it: strings, of which NumPy has many kinds, as
    tensors."""
    return ops.convert_to_tensor(a, "string") if a.dtype.kind in "OSU" else a


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
        x = tuple(_fed(a[rows]) for a in self.inputs.arrays)
        return x, np.zeros(len(rows), "float32")  # Keras wants a target

    def on_epoch_end(self) -> None:
        self.order = self.rng.permutation(len(self.order))


def kind(outputs: np.ndarray) -> str:
    """What outputs are, told by their values: `softmax`, `sigmoid` or `linear`."""
    if outputs.min() < 0 or outputs.max() > 1 + 1e-3:
        return "linear"
    if outputs.shape[-1] > 1 and np.allclose(outputs.sum(-1), 1, atol=1e-2):
        return "softmax"
    return "sigmoid"


def is_linear(model: Any, k: int) -> bool:
    """Whether the layer that makes an output says that it has no activation: its values
    are no probabilities, even where all of them could be."""
    maker = maker_of(model, k)
    return getattr(maker, "activation", None) is keras.activations.linear


def _loss(which: str, outputs: np.ndarray) -> Callable[[Any, Any], Any]:
    """`(teacher's, student's) -> loss of each sample` for outputs like these."""
    if which == "softmax":
        return _softened
    if which == "sigmoid":
        return _entropy
    power = float(np.mean(np.var(outputs.astype("float64"), 0))) + 1e-12
    return lambda y, p: _per_sample(ops.square(ops.cast(y - p, "float32"))) / power


def _entropy(y: Any, p: Any) -> Any:
    """Binary cross-entropy of each sample."""
    y, p = (ops.reshape(ops.cast(v, "float32"), (ops.shape(v)[0], -1)) for v in (y, p))
    return keras.losses.binary_crossentropy(y, p)


def _relative(y: Any, p: Any) -> Any:
    """Square difference of each sample in units of the batch's variance, which is
    that of the batches of all replicas."""
    y, p = ops.cast(y, "float32"), ops.cast(p, "float32")
    with replicas.synchronized():
        _, variance = moments.moments(y, range(len(y.shape)))
    return _per_sample(ops.square(y - p)) / (ops.max(variance) + 1e-12)


def _per_sample(v: Any) -> Any:
    return ops.mean(ops.reshape(v, (ops.shape(v)[0], -1)), -1)


def _softened(y: Any, p: Any) -> Any:
    def log_of(v: Any) -> Any:
        v = ops.log(ops.clip(ops.cast(v, "float32"), 1e-7, 1.0))
        return ops.log_softmax(v / TEMPERATURE)

    log_y, log_p = log_of(y), log_of(p)
    gap = ops.sum(ops.exp(log_y) * (log_y - log_p), -1, keepdims=True)
    return TEMPERATURE**2 * _per_sample(gap)
