"""What is differentiated: the model's loss, one that suits it, or random directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from kerasnorm.common.data import keys_of
from kerasnorm.common.errors import KerasNormError
from rewriters import private
from rewriters.program import maker_of


Tensor = Any


def in_order(model: Any, values: Any) -> list[Any]:
    """Labels, losses or loss weights, flat, in the order of the model's outputs.

    As Keras reads them: a dict goes by the names of the outputs. What a dict leaves out
    is None.

    Raises:
        KerasNormError: a name that no output has.
    """
    outputs = private.outputs_struct(model, None)  # None where there is no graph
    if outputs is None or not isinstance(values, Mapping):
        return tree.flatten(values)
    names = keys_of(outputs) or model.output_names
    if not set(values) <= set(names):
        raise KerasNormError(
            "unknown outputs",
            got=", ".join(map(repr, values)),
            expected=f"some of {', '.join(map(repr, names))}",
        )
    return tree.flatten([values.get(name) for name in names])


def objective(
    model: Any, labels: Sequence[np.ndarray], loss: Any = None, loss_weights: Any = None
) -> tuple[list[Any], list[Any]]:
    """The loss of each output, None where it has none, and its weight.

    Args:
        model: the model.
        labels: an array for each output, an empty one where there are none.
        loss, loss_weights: as for `summed_loss`.

    Raises:
        KerasNormError: an unknown loss; not one for each output.
    """
    if loss is None:
        loss = getattr(model, "loss", None)
        if loss_weights is None:
            loss_weights = private.loss_weights(model)
    given = suitable(model, labels) if loss is None else in_order(model, loss)
    if len(given) == len(labels):  # what has no labels has no loss
        given = [f if y.size else None for f, y in zip(given, labels, strict=True)]
    try:
        losses = [keras.losses.get(part) for part in given]
    except (ValueError, TypeError) as error:
        raise KerasNormError("unknown loss", got=f"{loss!r}: {error}") from error
    weights = [1.0] if loss_weights is None else in_order(model, loss_weights)
    count = len(labels)
    if any(len(part) not in (1, count) for part in (losses, weights)) or not any(
        losses
    ):
        raise KerasNormError(
            "losses and labels do not match",
            got=f"loss={loss!r}, loss_weights={loss_weights!r}",
            expected=f"one for each of the {count} outputs",
        )
    return [(part * count)[:count] for part in (losses, weights)]  # type: ignore


def summed_loss(
    model: Any, labels: Sequence[np.ndarray], loss: Any, loss_weights: Any, seed: int
) -> Callable[[Any, Sequence[Any]], Tensor]:
    """`f(outputs, y) -> scalar`, the sum over samples of their losses.

    Args:
        model: the model whose outputs come in.
        labels: the labels, flat; empty where there are none.
        loss: a loss as `compile` takes it; None for the model's own, or, where it is
            not compiled, one that is `suitable`. Without labels, the gradient starts in
            a random direction of the outputs, standard normal, for each sample.
        loss_weights: as `compile` takes them; None for the model's own beside its own
            loss.
        seed: of these directions.

    Raises:
        KerasNormError: as `objective`; labels that do not fit the loss.
    """
    if not labels:
        return lambda outputs, y: _random_directions(outputs, seed)
    losses, weights = objective(model, labels, loss, loss_weights)

    def total(outputs: Any, y: Sequence[Any]) -> Tensor:
        flat = tree.flatten(outputs)
        if len(y) != len(flat):
            raise KerasNormError(
                "labels and outputs do not match",
                got=f"{len(y)} label arrays",
                expected=f"one for each of the {len(flat)} outputs",
            )
        rows = zip(losses, weights, y, flat, strict=True)
        try:
            values = [
                _sum(f, t, ops.cast(p, "float32"), flat[0].shape[0])
                * (1.0 if weight is None else weight)
                for f, weight, t, p in rows
                if f is not None
            ]
        except Exception as error:  # each backend has its own
            raise KerasNormError(
                "the loss does not fit labels and outputs",
                got=f"labels of shape {[tuple(t.shape) for t in y]}: {error}",
                fix="Pass another `loss`.",
            ) from error
        return sum(values[1:], values[0])

    return total


def _sum(loss: Any, y: Tensor, outputs: Tensor, samples: int) -> Tensor:
    """The sum over samples, whatever the loss makes of a batch."""
    values = ops.cast(loss(y, outputs), "float32")
    if getattr(loss, "reduction", "mean") in ("sum", "none", None):
        return ops.sum(values)
    return ops.mean(values) * samples


def _random_directions(outputs: Any, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    total = 0.0
    for y in tree.flatten(outputs):
        if "float" in keras.backend.standardize_dtype(y.dtype):
            direction = rng.standard_normal(tuple(y.shape)).astype("float32")
            total = total + ops.sum(ops.cast(y, "float32") * direction)
    return total


def suitable(model: Any, labels: Sequence[np.ndarray]) -> list[Any]:
    """A loss for each output: cross entropy for integer labels, which are classes or
    one-hot, of logits or of probabilities by the last activation; squared error for
    others."""
    return [_suitable(model, k, np.asarray(y)) for k, y in enumerate(labels)]


def _suitable(model: Any, k: int, y: np.ndarray) -> Any:
    if y.dtype.kind not in "iub":
        return keras.losses.MeanSquaredError()
    shapes = [tuple(t.shape) for t in getattr(model, "outputs", None) or ()]
    shape: tuple[Any, ...] = shapes[k] if k < len(shapes) else ()
    ending = _ending(model, k)
    logits = ending not in ("softmax", "sigmoid")
    alike = len(shape) == y.ndim and shape[-1] == y.shape[-1]
    if shape[-1:] == (1,) or (alike and ending == "sigmoid"):
        return keras.losses.BinaryCrossentropy(from_logits=logits)
    if alike:
        return keras.losses.CategoricalCrossentropy(from_logits=logits)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=logits)


def _ending(model: Any, k: int) -> str:
    """Name of the activation that makes an output, as far as layers tell."""
    last = maker_of(model, k)
    if isinstance(last, keras.layers.Layer):
        leaves = [x for x in private.flatten_layers(last) if not private.held_layers(x)]
        last = leaves[-1] if leaves else last
    name = getattr(getattr(last, "activation", None), "__name__", type(last).__name__)
    return name.lower()
