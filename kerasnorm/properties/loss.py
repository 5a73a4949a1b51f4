"""What is differentiated: the model's loss, one that suits it, or random directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from kerasnorm.errors import KerasNormError


Tensor = Any


def summed_loss(
    model: Any, labels: Sequence[np.ndarray], loss: Any, seed: int
) -> Callable[[Any, Sequence[Any]], Tensor]:
    """`f(outputs, y) -> scalar`, the sum over samples of their losses.

    Args:
        model: the model whose outputs come in.
        labels: the labels, flat; empty where there are none.
        loss: a loss as `compile` takes it; None for the model's own, or, where it is
            not compiled, cross entropy for integer labels and squared error for
            others. Without labels, the gradient starts in a random direction of the
            outputs, standard normal, for each sample.
        seed: of these directions.

    Raises:
        KerasNormError: labels that no loss is known for.
    """
    if not labels:
        return lambda outputs, y: _random_directions(outputs, seed)
    loss = loss if loss is not None else getattr(model, "loss", None)
    if loss is None:
        loss = suitable(model, labels)
    try:
        losses = [_one(part) for part in tree.flatten(loss)]
    except (ValueError, TypeError) as error:
        raise KerasNormError("unknown loss", got=f"{loss!r}: {error}") from error

    def total(outputs: Any, y: Sequence[Any]) -> Tensor:
        flat = tree.flatten(outputs)
        if len(y) != len(flat) or len(losses) not in (1, len(flat)):
            raise KerasNormError(
                "labels, losses and outputs do not match",
                got=f"{len(y)} label arrays, {len(losses)} losses",
                expected=f"one for each of the {len(flat)} outputs",
            )
        functions = losses * len(flat) if len(losses) == 1 else losses
        values = [
            ops.cast(f(t, ops.cast(p, "float32")), "float32")
            for f, t, p in zip(functions, y, flat, strict=True)
        ]
        return sum(values[1:], values[0]) * flat[0].shape[0]

    return total


def _one(loss: Any) -> Any:
    found = keras.losses.get(loss)
    if isinstance(found, keras.losses.Loss):
        return found
    return lambda y, p: ops.mean(found(y, p))  # type: ignore[operator]


def _random_directions(outputs: Any, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    total = 0.0
    for y in tree.flatten(outputs):
        if "float" in keras.backend.standardize_dtype(y.dtype):
            direction = rng.standard_normal(tuple(y.shape)).astype("float32")
            total = total + ops.sum(ops.cast(y, "float32") * direction)
    return total


def suitable(model: Any, labels: Sequence[np.ndarray]) -> Any:
    """Cross entropy for integer labels, of logits or of probabilities by the last
    activation; squared error for others."""
    whole = [np.asarray(y).dtype.kind in "iub" for y in labels]
    if not all(whole):
        return keras.losses.MeanSquaredError()
    units = _units(model)
    squashed = _last_activation(model) in ("softmax", "sigmoid")
    if units == 1:
        return keras.losses.BinaryCrossentropy(from_logits=not squashed)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=not squashed)


def _units(model: Any) -> int | None:
    outputs = getattr(model, "outputs", None)
    return outputs[0].shape[-1] if outputs else None


def _last_activation(model: Any) -> str:
    """Name of the activation that makes the outputs, as far as layers tell."""
    layers = [x for x in model._flatten_layers(include_self=False) if not x._layers]
    last = layers[-1] if layers else None
    if isinstance(last, keras.layers.Softmax):
        return "softmax"
    return getattr(getattr(last, "activation", None), "__name__", "")
