"""Stored arrays to variables: by name where names agree, by order where they do not.

Every array finds a variable of its shape and every variable an array, or the load
fails. Nothing is read before all of them have.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from typing import Any

import keras
import numpy as np

from rewriters.errors import RewriteError
from rewriters.formats import keras1
from rewriters.formats.hdf5 import array as h5_array
from rewriters.formats.hdf5 import child
from rewriters.formats.saved import Array, Saved
from rewriters.formats.spec import Spec, safe_name


Pairs = list[tuple[Any, Array]]


def match(model: Any, spec: Spec, saved: Saved) -> Pairs:
    """Returns (variable, array) for every weight of `model`.

    Raises:
        RewriteError: if an array is missing, left over or of another shape.
    """
    pairs = _match_tree(model, spec, saved) if saved.tree else []
    pairs = pairs or _match_layers(model, spec, saved)
    if saved.generation < 3:
        pairs = _laid_out(model, pairs, saved)
    done = {id(v) for v, _ in pairs}
    missing = [v.path for v in _weights(model) if id(v) not in done]
    if missing:
        raise _mismatch("Weights are missing", f"no array for {missing[:5]}")
    pairs = [(v, _without_leading_ones(v, a)) for v, a in pairs]
    for variable, array in pairs:
        if tuple(variable.shape) != tuple(array.shape):
            raise _mismatch(
                f"The weight {variable.path} has another shape in the file",
                f"{array.shape} for {tuple(variable.shape)}",
            )
    return pairs


def _without_leading_ones(variable: Any, array: Array) -> Array:
    """tensorflow-addons keeps values per channel in the shape `(1, 1, 1, channels)`."""
    wanted, ones = tuple(variable.shape), len(array.shape) - len(variable.shape)
    if ones < 1 or array.shape != (1,) * ones + wanted:
        return array
    return _read_as(array, wanted, lambda x: x.reshape(wanted))


def _weights(layer: Any) -> list[Any]:
    """A layer's weights, trainable ones first, without a stateful layer's states."""
    weights = layer.trainable_weights + layer.non_trainable_weights
    return [v for v in weights if v.name != "rnn_state"]


def values(pairs: Pairs) -> dict[int, np.ndarray]:
    """Reads the arrays, by the id of their variable."""
    return {id(variable): array.read() for variable, array in pairs}


# By the name of the top-level layer: HDF5 files and SavedModels


def _match_layers(model: Any, spec: Spec, saved: Saved) -> Pairs:
    layers = {layer.name: layer for layer in model.layers}
    specs = {s.name: s for s in spec.layers or ()}
    pairs: Pairs = []
    for stored, arrays in saved.layers.items():
        name = safe_name(stored)
        if not arrays:
            continue
        if name == "":
            variables = model._trainable_variables + model._non_trainable_variables
        elif name in layers:
            layer = layers[name]
            variables = _weights(layer)
        elif name in specs:  # no output needs it, as a loss that was added did
            continue
        else:
            raise _mismatch("The file has weights of an unknown layer", repr(name))
        arrays = _renamed(arrays, specs.get(name))
        if saved.generation == 1:
            arrays = _merged_gates(arrays, variables)
        pairs += pair(variables, arrays, f"the layer {name!r}")
    return pairs


def _renamed(arrays: list[Array], spec: Spec | None) -> list[Array]:
    rename = _renames(spec) if spec else {}
    kept = []
    for array in arrays:
        head, _, tail = array.name.removesuffix(":0").rpartition("/")
        tail = rename.get(tail, tail)
        if tail is not None:
            kept.append(Array(f"{head}/{tail}", array.shape, array.read))
    return kept


def _renames(spec: Spec) -> dict[str, str | None]:
    inner = [s for s in spec.config.values() if isinstance(s, Spec)]
    found: dict[str, str | None] = {}
    for s in [*(spec.layers or ()), *inner]:
        found |= _renames(s)
    return found | spec.rename


def pair(variables: list[Any], arrays: list[Array], where: str) -> Pairs:
    """Pairs the variables of one layer with its arrays.

    By owner and name (`conv2d/kernel`) if these tell all of them apart. Else by
    name, each name in its own order, which holds whatever was frozen. Else, where
    a layer uses names of its own, by order.
    """
    if len(variables) != len(arrays):
        raise _mismatch(
            f"{where} has another number of weights in the file",
            f"{len(arrays)} arrays for {len(variables)} variables",
        )
    for key_of_variable, key_of_array in (
        (lambda v: _key(v.path, 2), lambda a: _key(a.name, 2)),
        (lambda v: _key(v.path, 1), lambda a: _key(a.name, 1)),
    ):
        ours, theirs = defaultdict(list), defaultdict(list)
        for variable in variables:
            ours[key_of_variable(variable)].append(variable)
        for array in arrays:
            theirs[key_of_array(array)].append(array)
        if Counter({k: len(v) for k, v in ours.items()}) == Counter(
            {k: len(v) for k, v in theirs.items()}
        ):
            return [(v, theirs[key_of_variable(v)].pop(0)) for v in variables]
    return list(zip(variables, arrays, strict=True))


def _key(path: str, length: int) -> tuple[str, ...]:
    """The last parts of a variable's path, without the numbers TensorFlow adds."""
    parts = [p for p in re.sub(r":\d+$", "", path).split("/") if p]
    if length == 1 and len(parts) == 1:
        parts = [keras1.variable(parts[0])[1]]
    tail = re.sub(r"_\d+$", "", parts[-1]) if parts else ""
    return (*parts[-length:-1], tail)


# Layouts of other generations and backends


def _laid_out(model: Any, pairs: Pairs, saved: Saved) -> Pairs:
    """Gives each array the layout that Keras 3 has, where it once was another."""
    pairs = _from_cudnn(pairs)
    owners = {
        id(v): layer
        for layer in model._flatten_layers()
        for v in layer._trainable_variables + layer._non_trainable_variables
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


# By place in the tree: `.keras` archives of Keras 2


def _match_tree(model: Any, spec: Spec, saved: Saved) -> Pairs:
    pairs: Pairs = []
    _walk_tree(model, spec, saved.tree, pairs, twice=saved.counts_twice)
    return pairs


def _walk_tree(layer: Any, spec: Spec, group: Any, pairs: Pairs, twice: bool) -> None:
    if spec.layers is not None:
        _walk_model(layer, spec, group, pairs, twice)
        return
    if spec.rename:
        _walk_renamed(layer, spec, group, pairs)
        return
    own = layer._trainable_variables + layer._non_trainable_variables
    own = [v for v in own if any(v is w for w in _weights(layer))]
    stored = child(group, "vars") if "vars" in group else None
    indexes = sorted(stored or (), key=int)
    if len(indexes) != len(own):
        raise _mismatch(
            f"The layer {layer.name!r} has another number of weights in the file",
            f"{len(indexes)} arrays for {len(own)} variables",
        )
    pairs += [(v, h5_array(stored, i)) for v, i in zip(own, indexes, strict=True)]
    for key in group:
        inner = getattr(layer, key, None)
        if key == "vars" or inner is None:
            continue
        if isinstance(inner, (list, tuple)):
            specs = [_inner_spec(spec, key, layer, i) for i, layer in enumerate(inner)]
            for layer, inside, name in zip(inner, specs, places(specs), strict=True):
                _walk_tree(layer, inside, child(group, f"{key}/{name}"), pairs, twice)
        elif isinstance(inner, keras.layers.Layer):
            inside = _inner_spec(spec, key, inner)
            _walk_tree(inner, inside, child(group, key), pairs, twice)


def _inner_spec(spec: Spec, key: str, layer: Any, index: int = 0) -> Spec:
    value = spec.config.get(key, spec.config.get("layer"))
    if isinstance(value, list):
        value = value[index]
    if isinstance(value, Spec):
        return value
    return Spec(layer.name, type(layer).__name__, type(layer))


def places(specs: list[Spec], twice: Collection[str] = ()) -> list[str]:
    """Names of layers in a list: their class, numbered where it comes again, which
    counts those of the names in `twice` as two."""
    counts: Counter[str] = Counter()
    places = []
    for spec in specs:
        name = _snake(spec.kind)
        places.append(f"{name}_{counts[name]}" if counts[name] else name)
        counts[name] += 2 if spec.name in twice else 1
    return places


def held(
    model: Any, spec: Spec, twice: bool
) -> Iterator[tuple[Any, Spec, tuple[str, str]]]:
    """The layers of a model, with the places where an archive may keep them.

    Args:
        twice: whether those with weights count twice, see `Saved.counts_twice`.
    """
    layers = {layer.name: layer for layer in model.layers}
    heavy = [  # a vocabulary was a weight
        name
        for name, layer in layers.items()
        if _weights(layer) or hasattr(layer, "get_vocabulary")
    ]
    specs = spec.layers or []
    names = places(specs, heavy if twice else ())
    for s, name in zip(specs, names, strict=True):
        if s.name in layers:
            found = f"layers/{name}", f"_layer_checkpoint_dependencies/{name}"
            yield layers[s.name], s, found


def _walk_model(model: Any, spec: Spec, group: Any, pairs: Pairs, twice: bool) -> None:
    for layer, s, names in held(model, spec, twice):
        if not _weights(layer):
            continue
        place = next((name for name in names if name in group), None)
        if place is not None:
            _walk_tree(layer, s, child(group, place), pairs, twice)
        else:  # shared with another model, and stored there
            pairs += _stored_before(layer, pairs)


def _stored_before(layer: Any, pairs: Pairs) -> Pairs:
    """The arrays that the first variables of the same paths were given."""
    arrays = {v.path: a for v, a in reversed(pairs)}
    missing = [v.path for v in layer.weights if v.path not in arrays]
    if missing:
        raise _mismatch("Weights are missing", f"no group for the layer {layer.name!r}")
    return [(v, arrays[v.path]) for v in layer.weights]


def _walk_renamed(layer: Any, spec: Spec, group: Any, pairs: Pairs) -> None:
    places: list[str] = []
    group.visititems(
        lambda name, item: places.append(name) if hasattr(item, "shape") else None
    )
    arrays = []
    for place in places:
        name = spec.rename.get(place, place)
        if name is not None:
            found = h5_array(group, place)
            arrays.append(Array(name, found.shape, found.read))
    pairs += pair(_weights(layer), arrays, f"the layer {layer.name!r}")


def _snake(name: str) -> str:
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _mismatch(what: str, got: str) -> RewriteError:
    return RewriteError(
        what,
        got=got,
        expected="one array of the right shape for every weight of the model",
        fix="The file is damaged, or of another model: fetch or save it again",
    )
