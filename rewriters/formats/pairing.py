"""The variables of one layer and its stored arrays, each with its counterpart."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

import keras

from rewriters import private
from rewriters.errors import RewriteError
from rewriters.formats import keras1
from rewriters.formats.saved import Array
from rewriters.holders import layers_in


Pairs = list[tuple[Any, Array]]


def weights(layer: Any) -> list[Any]:
    """A layer's weights in the order of Keras 2, trainable ones first, without a
    stateful layer's states."""
    place = {id(v): i for i, v in enumerate(_in_order(layer))}
    parts = layer.trainable_weights, layer.non_trainable_weights
    found = [
        v
        for part in parts
        for v in sorted(part, key=lambda v: place.get(id(v), len(place)))
    ]
    return [v for v in found if v.name != "rnn_state"]


def _in_order(layer: Any) -> list[Any]:
    own = private.own_variables(layer)
    inner = [v for x in layers_of(layer) for v in _in_order(x)]
    return inner + own if isinstance(layer, keras.Model) else own + inner


# Attributes in which Keras and TensorFlow list what others hold.
_LISTS = ("_layers", "_tracker", "_tracked", "_self_")


def layers_of(layer: Any) -> list[Any]:
    """The layers that a layer holds, in the order of Keras 2.

    Of a class of one's own: that of its attributes as they were first set, a list where
    it was set, whatever was appended when, a dict in the order of its keys.
    """
    if isinstance(layer, (keras.Sequential, private.Functional)):
        return list(layer.layers)
    inner = list(private.flatten_layers(layer, include_self=False, recursive=False))
    if type(layer).__module__.startswith("keras."):
        return inner
    found: dict[int, Any] = {}
    for name, value in vars(layer).items():
        if not name.startswith(_LISTS):
            for _, child in sorted(layers_in(value), key=_place):
                found.setdefault(id(child), child)
    known = {id(x) for x in inner}
    return [
        *(x for x in found.values() if id(x) in known),
        *(x for x in inner if id(x) not in found),
    ]


def _place(held: tuple[tuple, Any]) -> list[tuple]:
    """Indices of lists by value, keys of dicts by name."""
    keys, _ = held
    return [(0, k, "") if isinstance(k, int) else (1, 0, str(k)) for k in keys]


def pair(variables: list[Any], arrays: list[Array], where: str) -> Pairs:
    """Pairs the variables of one layer with its arrays.

    By owner and name (`conv2d/kernel`) if these tell all of them apart. Else by
    name, each name in its own order, which holds whatever was frozen. Else, where
    a layer uses names of its own, by order.
    """
    if len(variables) != len(arrays):
        raise mismatch(
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


def below(rename: dict[str, str | None], path: str) -> bool:
    """Whether `path` leads through a part of the file that is not needed: one that
    `rename` has with a slash, and without the numbers TensorFlow adds."""
    parts = (re.sub(r"_\d+$", "", part) for part in path.split("/"))
    return any(rename.get(f"{part}/", "") is None for part in parts)


def _key(path: str, length: int) -> tuple[str, ...]:
    """The last parts of a variable's path, without the numbers TensorFlow adds."""
    parts = [p for p in re.sub(r":\d+$", "", path).split("/") if p]
    if length == 1 and len(parts) == 1:
        parts = [keras1.variable(parts[0])[1]]
    tail = re.sub(r"_\d+$", "", parts[-1]) if parts else ""
    return (*parts[-length:-1], tail)


def mismatch(what: str, got: str) -> RewriteError:
    """An error of weights that are not those of the model."""
    return RewriteError(
        what,
        got=got,
        expected="one array of the right shape for every weight of the model",
        fix="The file is damaged, or of another model: fetch or save it again, or "
        "give the class that it was saved from",
    )
