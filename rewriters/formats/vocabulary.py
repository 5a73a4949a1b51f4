"""Vocabularies of lookup layers, which a `.keras` archive keeps in text files."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from rewriters import private
from rewriters.formats.hdf5 import array, child
from rewriters.formats.saved import Saved
from rewriters.formats.spec import Spec
from rewriters.formats.tree import held


LAYERS = (
    keras.layers.TextVectorization,
    keras.layers.StringLookup,
    keras.layers.IntegerLookup,
)


def restore(model: Any, spec: Spec, saved: Saved) -> None:
    """Gives each lookup layer of `model` its stored vocabulary, and warns of none."""
    _walk(model, spec, saved, "")
    found = [x for x in private.flatten_layers(model) if isinstance(x, LAYERS)]
    inner = {id(private.lookup_layer(x, None)) for x in found}
    empty = [
        x.name
        for x in found
        if id(x) not in inner and not x.get_vocabulary(include_special_tokens=False)
    ]
    if empty:
        warnings.warn(
            f"The file holds no vocabulary of {', '.join(empty)}: call its "
            "set_vocabulary before the model.",
            stacklevel=4,
        )


def _walk(layer: Any, spec: Spec, saved: Saved, place: str) -> None:
    if isinstance(layer, LAYERS) and place in saved.assets:
        _set(layer, saved, place)
    if spec.layers:
        for inner, s, names in held(layer, spec, saved.counts_twice):
            for name in names:
                _walk(inner, s, saved, f"{place}{name}/")


def _set(layer: Any, saved: Saved, place: str) -> None:
    lookup = private.lookup_layer(layer, layer)
    words: list[Any] = saved.assets[place].rstrip("\n").split("\n")
    if lookup.vocabulary_dtype != "string":
        words = [int(word) for word in words if word]
    weights = None
    if lookup.output_mode == "tf_idf":  # they may be padded
        stored = array(child(saved.tree, f"{place}vars"), "idf_weights")
        weights = stored.read()[: len(words)]
    if any(words):
        layer.set_vocabulary(words, weights)
