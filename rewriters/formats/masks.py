"""Masks as Keras 2 passed them from layer to layer, where Keras 3 passes others.

A graph of Keras 3 holds the mask that each call was given. So it is enough to give each
symbolic output the mask that it had in Keras 2.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import keras
from keras import ops

from rewriters import private


_MERGES = (
    keras.layers.Add,
    keras.layers.Subtract,
    keras.layers.Multiply,
    keras.layers.Average,
    keras.layers.Maximum,
    keras.layers.Minimum,
)
_RECURRENT = (keras.layers.RNN, keras.layers.Bidirectional, keras.layers.ConvLSTM2D)


def given(layer: Any, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a call, with a mask where Keras 3 finds none among several
    tensors: that of the sequence, beside initial states."""
    if not isinstance(layer, _RECURRENT) or kwargs.get("mask") is not None or not args:
        return kwargs
    mask = private.get_keras_mask(args[0]) if _is_tensor(args[0]) else None
    states = keras.tree.flatten(kwargs.get("initial_state"))
    if mask is None or not any(map(_is_tensor, states)):
        return kwargs
    return {**kwargs, "mask": mask}


def passed_on(layer: Any, args: list[Any], result: Any) -> None:
    """Gives what a layer returned the mask that it had in Keras 2."""
    inputs = args[0] if args else None
    if type(layer) in (*_MERGES, keras.layers.Concatenate):
        if not isinstance(inputs, (list, tuple)) or not all(map(_is_tensor, inputs)):
            return
        masks = [private.get_keras_mask(x) for x in inputs]
        if all(m is None for m in masks):
            return
        if type(layer) is keras.layers.Concatenate:
            mask = _concatenated(layer.axis, list(inputs), masks)
        else:
            mask = functools.reduce(
                ops.logical_and, [m for m in masks if m is not None]
            )
        private.set_keras_mask(result, mask)
    elif type(layer) is keras.layers.TimeDistributed and _is_tensor(inputs):
        inner = layer.layer
        if type(inner) is keras.layers.Embedding and inner.mask_zero:
            private.set_keras_mask(result, ops.not_equal(inputs, 0))


def _concatenated(axis: int, inputs: list[Any], masks: list[Any]) -> Any:
    parts = []
    for x, mask in zip(inputs, masks, strict=True):
        if mask is None:
            mask = ops.ones_like(x, dtype="bool")
        elif len(mask.shape) < len(x.shape):
            mask = ops.expand_dims(mask, -1)
        parts.append(mask)
    return ops.all(ops.concatenate(parts, axis=axis), axis=-1)


def name_apart(ends: Any, own: Collection[Any], names: Collection[str]) -> None:
    """Renames operations that compute masks and have a layer's name by chance.

    Args:
        ends: the model's outputs.
        own: the layers and operations that the file names.
        names: their names.
    """
    known, seen = {id(x) for x in own}, set()
    todo = list(keras.tree.flatten(ends))
    while todo:
        operation = private.keras_history(todo.pop()).operation
        if id(operation) in seen:
            continue
        seen.add(id(operation))
        for node in private.inbound_nodes(operation):
            todo += node.input_tensors
        if id(operation) not in known and operation.name in names:
            rename(operation, f"{operation.name}.mask_{len(seen)}")


def rename(operation: Any, name: str) -> None:
    """Renames an operation, also in the config that Keras noted."""
    operation.name = name
    if (noted := private.auto_config(operation, None)) is not None:
        noted.config["name"] = name


def _is_tensor(x: Any) -> bool:
    return isinstance(x, keras.KerasTensor)
