"""A few hundred steps of training, to confirm what the properties say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from kerasnorm.common import data as reading
from kerasnorm.properties.loss import in_order
from kerasnorm.runtime.programs import one_of
from rewriters.edit import edit


@dataclass(frozen=True)
class Training:
    """What training gave.

    Attributes:
        losses: by step; NaN from where it diverged.
        final: mean loss of the last tenth of the steps; infinite if it diverged.
    """

    losses: tuple[float, ...]
    final: float


def train(
    model: Any,
    x: Any,
    y: Any,
    steps: int,
    batch_size: int,
    learning_rate: float,
    loss: Any,
    loss_weights: Any = None,
    like: Any = None,
    seed: int = 0,
) -> Training:
    """Trains a copy of a model, which is left as it is.

    Args:
        model: the model.
        x, y: all data; more of it than is measured makes a better test.
        steps: how many steps; the data is gone through as often as it takes.
        batch_size, learning_rate: of the training.
        loss, loss_weights: as `compile` takes them.
        like: a compiled model whose optimizer is taken, with a constant rate;
            stochastic gradient descent with momentum 0.9 where there is none.
        seed: of the order of the samples.
    """
    model = edit(model, {}).model
    inputs = reading.collect(model, x)
    labels = [keras.ops.convert_to_numpy(v) for v in in_order(model, y)]
    optimizer = getattr(like, "optimizer", None)
    if optimizer is None:
        optimizer = keras.optimizers.SGD(learning_rate, momentum=0.9)
    else:
        optimizer = _fresh(optimizer, learning_rate)
    # Compiled step by step: XLA takes longer to compile than these steps take to run.
    jit = keras.backend.backend() == "jax"
    model.compile(optimizer, loss, loss_weights, jit_compile=jit)
    rng = np.random.default_rng(seed)
    batch_size = min(batch_size, len(inputs))
    per_epoch = len(inputs) // batch_size
    order = np.concatenate(
        [
            rng.permutation(len(inputs))[: per_epoch * batch_size]
            for _ in range(-(-steps // per_epoch))
        ]
    )[: steps * batch_size]
    losses = []
    for k in range(0, len(order), batch_size):
        rows = order[k : k + batch_size]
        targets = [v[rows] for v in labels]
        value = model.train_on_batch(
            inputs.pack([a[rows] for a in inputs.arrays]),
            targets[0] if len(targets) == 1 else targets,
        )
        # `train_on_batch` gives the mean so far.
        losses.append(float(np.ravel(value)[0]))
        model.reset_metrics()
        if not np.isfinite(losses[-1]):
            break
    diverged = len(losses) < steps
    tail = losses[-max(1, steps // 10) :]
    losses += [float("nan")] * (steps - len(losses))
    final = float("inf") if diverged else float(np.mean(tail))
    return Training(tuple(losses), final)


def _fresh(optimizer: Any, learning_rate: float) -> Any:
    """An optimizer like another one for another model. The scaling of the loss stays
    around it; what else wraps it holds weights of the model that it was made for."""
    inner = one_of(optimizer)
    config = {**inner.get_config(), "learning_rate": learning_rate}
    new = type(inner).from_config(config)
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return new
    config = {**optimizer.get_config(), "inner_optimizer": new}
    return keras.optimizers.LossScaleOptimizer(**config)
