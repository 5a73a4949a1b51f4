"""Trains a rewritten model on the outputs of the original, without labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from kerasnorm.swap import data as reading


# Softened probabilities tell more about the wrong classes than hard ones.
TEMPERATURE = 2.0


class Pupil(keras.Model):
    """The student with outputs as a flat tuple, compiled on its own.

    It runs as at inference, because that is what the teacher's outputs are: no
    dropout, and normalization that was not swapped keeps its running statistics.
    """

    def __init__(self, student: Any):
        super().__init__()
        self.student = student

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        outputs = tuple(tree.flatten(self.student(inputs, training=False)))
        return outputs[0] if len(outputs) == 1 else outputs


def distill(
    teacher: Any,
    student: Any,
    inputs: reading.Inputs,
    *,
    epochs: int = 3,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    tick: Callable[[float], None] = lambda share: None,
) -> list[float]:
    """Trains all trainable weights of the student; returns the loss of each epoch.

    Adam with a linear decay to zero. The loss of an output follows from the teacher's
    values (see `kind`): probabilities are compared by cross-entropy, softened where
    they sum to one; anything else by squares, in units of the output's variance.
    """
    x = inputs.pack(inputs.arrays)
    targets = tree.flatten(teacher.predict(x, batch_size=128, verbose=0))
    pupil = Pupil(student)
    steps = epochs * -(-len(inputs) // batch_size)
    schedule = keras.optimizers.schedules.PolynomialDecay(learning_rate, steps)
    pupil.compile(
        keras.optimizers.Adam(schedule, clipnorm=1.0),
        loss=[_loss(t) for t in targets] if len(targets) > 1 else _loss(targets[0]),
    )
    batches = _Batches(inputs, targets, batch_size, seed)
    done = itertools.count(1)
    progress = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: tick(next(done) / steps)
    )
    history = pupil.fit(
        batches, epochs=epochs, shuffle=False, verbose=0, callbacks=[progress]
    )
    return [float(v) for v in history.history["loss"]]


class _Batches(keras.utils.PyDataset):
    """Inputs and targets in an order of its own, drawn anew each epoch."""

    def __init__(self, inputs: Any, targets: list[Any], batch_size: int, seed: int):
        super().__init__()
        self.inputs, self.targets, self.size = inputs, tuple(targets), batch_size
        self.rng = np.random.default_rng(seed)
        self.order = self.rng.permutation(len(inputs))

    def __len__(self) -> int:
        return -(-len(self.order) // self.size)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        rows = self.order[index * self.size : (index + 1) * self.size]
        x = self.inputs.pack([a[rows] for a in self.inputs.arrays])
        y = [t[rows] for t in self.targets]
        return x, tuple(y) if len(y) > 1 else y[0]

    def on_epoch_end(self) -> None:
        self.order = self.rng.permutation(len(self.order))


def kind(outputs: np.ndarray) -> str:
    """What outputs are, told by their values: `softmax`, `sigmoid` or `linear`."""
    if outputs.min() < 0 or outputs.max() > 1 + 1e-3:
        return "linear"
    if outputs.shape[-1] > 1 and np.allclose(outputs.sum(-1), 1, atol=1e-2):
        return "softmax"
    return "sigmoid"


def _loss(outputs: np.ndarray) -> Any:
    which = kind(outputs)
    if which == "softmax":
        return _softened
    if which == "sigmoid":
        return keras.losses.BinaryCrossentropy()
    power = float(np.mean(np.var(outputs.astype("float64"), 0))) + 1e-12
    return lambda y, p: ops.mean(ops.square(ops.cast(y - p, "float32"))) / power


def _softened(y: Any, p: Any) -> Any:
    def log_of(v: Any) -> Any:
        v = ops.log(ops.clip(ops.cast(v, "float32"), 1e-7, 1.0))
        return ops.log_softmax(v / TEMPERATURE)

    log_y, log_p = log_of(y), log_of(p)
    return TEMPERATURE**2 * ops.mean(ops.sum(ops.exp(log_y) * (log_y - log_p), -1))
