"""Stored arrays to variables: by name where names agree, by order where they do not.

Every array finds a variable of its shape and every variable an array, or the load
fails. Nothing is read before all of them have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from rewriters import private
from rewriters.formats import keras1, tree
from rewriters.formats.pairing import Pairs, below, mismatch, pair, weights
from rewriters.formats.saved import Array, Saved
from rewriters.formats.spec import Spec, safe_name
from rewriters.holders import layers_in


def match(model: Any, spec: Spec, saved: Saved) -> Pairs:
    """Returns (variable, array) for every weight of `model`.

    Raises:
        RewriteError: if an array is missing, left over or of another shape.
    """
    pairs = tree.match(model, spec, saved) if saved.tree else []
    pairs = pairs or _match_layers(model, spec, saved)
    if saved.generation < 3:
        pairs = _laid_out(model, pairs, saved)
    done = {id(v) for v, _ in pairs}
    missing = [v.path for v in weights(model) if id(v) not in done]
    if missing:
        raise mismatch("Weights are missing", f"no array for {missing[:5]}")
    pairs = [(v, _without_ones(v, a)) for v, a in pairs]
    for variable, array in pairs:
        if tuple(variable.shape) != tuple(array.shape):
            raise mismatch(
                f"The weight {variable.path} has another shape in the file",
                f"{array.shape} for {tuple(variable.shape)}",
            )
    return pairs


def _without_ones(variable: Any, array: Array) -> Array:
    """tensorflow-addons, and Keras with virtual batches, keep values per channel in the
    shape `(1, 1, 1, channels)`."""
    wanted, ones = tuple(variable.shape), len(array.shape) - len(variable.shape)
    per_channel = len(wanted) == 1 and max(array.shape, default=0) == wanted[0]
    if ones < 1 or (array.shape != (1,) * ones + wanted and not per_channel):
        return array
    if math.prod(array.shape) != math.prod(wanted):
        return array
    return _read_as(array, wanted, lambda x: x.reshape(wanted))


def values(pairs: Pairs) -> dict[int, np.ndarray]:
    """Reads the arrays, by the id of their variable."""
    return {id(variable): array.read() for variable, array in pairs}


# By the name of the top-level layer: HDF5 files and SavedModels


def _match_layers(model: Any, spec: Spec, saved: Saved) -> Pairs:
    layers = _by_name(model, spec, saved)
    specs = {s.name: s for s in spec.layers or ()}
    pairs: Pairs = []
    for stored, arrays in saved.layers.items():
        name = safe_name(stored)
        if not arrays:
            continue
        if name == "":
            variables = private.own_variables(model)
        elif name in layers:
            variables = weights(layers[name])
        elif name in specs:  # no output needs it, as a loss that was added did
            continue
        else:
            raise mismatch("The file has weights of an unknown layer", repr(name))
        arrays = _renamed(arrays, specs.get(name))
        if saved.generation == 1:
            arrays = _merged_gates(arrays, variables)
        pairs += pair(variables, arrays, f"the layer {name!r}")
    return pairs


def _by_name(model: Any, spec: Spec, saved: Saved) -> dict[str, Any]:
    """The layers of `model` by the names that the file has for them.

    A subclassed model's may be the paths of its attributes. Layers whose config has no
    name, as that of a class of one's own may, are those of the names that no other
    has, in order, if there are as many.
    """
    layers = {layer.name: layer for layer in model.layers}
    if spec.layers is None:
        return layers | {
            safe_name("/".join([name, *map(str, keys)])): child
            for name, value in vars(model).items()
            for keys, child in layers_in(value)
        }
    nameless = [
        s.name
        for s in spec.layers
        if s.layers is None and s.name in layers and "name" not in s.config
    ]
    named = {name: x for name, x in layers.items() if name not in nameless}
    stored = [
        safe_name(name) for name, arrays in saved.layers.items() if name and arrays
    ]
    unknown = [name for name in stored if name not in named]
    heavy = [layers[name] for name in nameless if weights(layers[name])]
    if len(unknown) != len(heavy):
        return layers
    return named | dict(zip(unknown, heavy, strict=True))


def _renamed(arrays: list[Array], spec: Spec | None) -> list[Array]:
    rename = _renames(spec) if spec else {}
    kept = []
    for array in arrays:
        head, _, tail = array.name.removesuffix(":0").rpartition("/")
        tail = None if below(rename, head) else rename.get(tail, tail)
        if tail is not None:
            kept.append(Array(f"{head}/{tail}", array.shape, array.read))
    for name, fold in _folds(spec) if spec else ():
        kept = fold(kept, name)
    return kept


def _folds(spec: Spec) -> list[tuple[str, Callable[..., Any]]]:
    inner = [s for s in spec.config.values() if isinstance(s, Spec)]
    found = [f for s in [*(spec.layers or ()), *inner] for f in _folds(s)]
    return [*found, (spec.name, spec.fold)] if spec.fold else found


def _renames(spec: Spec) -> dict[str, str | None]:
    inner = [s for s in spec.config.values() if isinstance(s, Spec)]
    found: dict[str, str | None] = {}
    for s in [*(spec.layers or ()), *inner]:
        found |= _renames(s)
    return found | spec.rename


# Layouts of other generations and backends


def _laid_out(model: Any, pairs: Pairs, saved: Saved) -> Pairs:
    """Gives each array the layout that Keras 3 has, where it once was another."""
    pairs = _from_cudnn(pairs)
    owners = {
        id(v): layer
        for layer in private.flatten_layers(model)
        for v in private.own_variables(layer)
    }
    if saved.generation == 1:
        pairs = [(v, _from_keras1(owners[id(v)], a)) for v, a in pairs]
    if saved.backend == "theano":
        pairs = [(v, _from_theano(owners[id(v)], a)) for v, a in pairs]
    return pairs


_CONVOLUTIONS = ("Conv1D", "Conv2D", "Conv3D", "Conv2DTranspose", "ConvLSTMCell")


def _from_theano(layer: Any, array: Array) -> Array:
    """Theano convolved where others correlate: its kernels are turned half around."""
    if type(layer).__name__ not in _CONVOLUTIONS or len(array.shape) < 3:
        return array
    axes = tuple(range(len(array.shape) - 2))
    return _read_as(array, array.shape, lambda x: np.flip(x, axis=axes))


def _from_cudnn(pairs: Pairs) -> Pairs:
    """The weights of CuDNNLSTM and CuDNNGRU, told by their two biases, for LSTM, GRU.

    cuDNN keeps each gate's kernels transposed, and the input kernel's memory in
    the other order.
    """
    tails = [v.path.rsplit("/", 1)[-1] for v, _ in pairs]
    new = list(pairs)
    for i in range(len(pairs) - 2):
        if tails[i : i + 3] != ["kernel", "recurrent_kernel", "bias"]:
            continue
        (kernel, k), (recurrent, r), (bias, b) = pairs[i : i + 3]
        units = recurrent.shape[0]
        gates = bias.shape[-1] // units
        if tuple(bias.shape) == b.shape or b.shape != (2 * gates * units,):
            continue
        single = len(bias.shape) == 1
        both = (lambda x: x.reshape(2, -1).sum(axis=0)) if single else _two_rows

        def per_gate(function: Any, gates: int = gates) -> Any:
            return lambda x: np.hstack([function(g) for g in np.hsplit(x, gates)])

        new[i] = kernel, _read_as(k, k.shape, per_gate(_other_order))
        new[i + 1] = recurrent, _read_as(r, r.shape, per_gate(np.transpose))
        new[i + 2] = bias, _read_as(b, tuple(bias.shape), both)
    return new


def _two_rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(2, -1)


def _other_order(x: np.ndarray) -> np.ndarray:
    return x.T.reshape(x.shape, order="F")


def _read_as(array: Array, shape: tuple[int, ...], function: Any) -> Array:
    return Array(array.name, shape, lambda: function(array.read()))


# Axes of a stored Keras 1 kernel in the order of Keras 3's, by class and layout.
_KERAS_1 = {
    ("Conv2D", "channels_first"): (2, 3, 1, 0),
    ("Conv3D", "channels_first"): (2, 3, 4, 1, 0),
    ("Conv2DTranspose", "channels_last"): (0, 1, 3, 2),
    ("Conv2DTranspose", "channels_first"): (2, 3, 0, 1),
}


def _from_keras1(layer: Any, array: Array) -> Array:
    kind, shape = type(layer).__name__, array.shape
    if kind == "Conv1D" and len(shape) == 4:  # an axis of 1 for the missing one
        length = (layer.kernel_size[0], 1)
        order = (0, 1, 2, 3) if shape[:2] == length else (2, 3, 1, 0)
        moved = tuple(shape[i] for i in order)
        wanted = (moved[0], *moved[2:])
        return _read_as(array, wanted, lambda x: x.transpose(order).reshape(wanted))
    order = _KERAS_1.get((kind, getattr(layer, "data_format", "")))
    if order is None or len(shape) != len(order):
        return array
    moved = tuple(shape[i] for i in order)
    return _read_as(array, moved, lambda x: x.transpose(order))


_GATES = {"LSTM": ("i", "f", "c", "o"), "GRU": ("z", "r", "h")}


def _merged_gates(arrays: list[Array], variables: list[Any]) -> list[Array]:
    """Keras 1 kept one kernel per gate; later ones lie side by side."""
    owners: dict[str, dict[str, Array]] = {}
    for i, array in enumerate(arrays):
        owner, tail = keras1.variable(array.name)
        key = tail if tail not in owners.get(owner, {}) else f"{tail}#{i}"
        owners.setdefault(owner, {})[key] = array
    merged = []
    for owner, named in owners.items():
        gates = next((g for g in _GATES.values() if f"W_{g[-1]}" in named), None)
        if gates is None:
            for tail, a in named.items():
                name = f"{owner}/{tail.split('#')[0]}" if owner else a.name
                merged.append(Array(name, a.shape, a.read))
            continue
        for letter, tail in (("W", "kernel"), ("U", "recurrent_kernel"), ("b", "bias")):
            parts = [named[f"{letter}_{g}"] for g in gates]
            shape = (*parts[0].shape[:-1], sum(p.shape[-1] for p in parts))
            merged.append(Array(f"{owner}/{tail}", shape, _Concatenated(parts)))
    return merged


class _Concatenated:
    def __init__(self, parts: list[Array]):
        self.parts = parts

    def __call__(self) -> np.ndarray:
        return np.concatenate([p.read() for p in self.parts], axis=-1)
