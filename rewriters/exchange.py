"""Layers that take the place of others inside an owner, and how a saved file tells.

A custom layer or subclassed model holds inner layers by attributes. `put` exchanges
one there; where the owner's own config would not know of it, `remember` makes it.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import keras

from rewriters import private
from rewriters.holders import Slot, children


def construct(cls: type, config: dict[str, Any]) -> Any:
    """A fresh object from its config, as far as the constructor takes it."""
    try:
        return cls.from_config(dict(config))
    except TypeError:
        # Keras's default config holds more than a plain constructor takes.
        taken = inspect.signature(cls.__init__).parameters
        known = {k: v for k, v in config.items() if k in taken}
        if len(known) == len(config):
            raise
        return cls(**known)


def deserialize(config: Any, source: Any) -> Any:
    """An object from its config, which stays as it is. Functions without a name, which
    Keras does not read back, are those that `source`, a layer it was made of, has as
    the same argument."""
    functions: dict[str, Any] = {}

    def named(value: Any, argument: str = "") -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(named, value))
        if not isinstance(value, dict):
            return value
        held = getattr(source, argument, None)
        if getattr(held, "__name__", "") != "<lambda>":
            return {k: named(v, str(k)) for k, v in value.items()}
        functions[name := f"<{argument}>"] = held
        known = {"module": "builtins", "registered_name": name}
        return {**known, "class_name": "function", "config": name}

    # Given so they add to the scope of the caller; one of our own would replace it.
    return keras.saving.deserialize_keras_object(named(config), functions)


def own_functions(layer: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that are functions not of Keras: a config has their names, if they
    have any, which Keras may use too."""
    found = {k: getattr(layer, k, None) for k in config}
    return {
        k: f
        for k, f in found.items()
        if isinstance(f, types.FunctionType) and not f.__module__.startswith("keras.")
    }


@dataclass(frozen=True, eq=False)
class Exchange:
    """A layer that took a place in its owner: an attribute (with indices or keys
    into it), or a name in the owner's graph; `layer` is None where it was removed."""

    attribute: str
    keys: tuple[Any, ...]
    layer: Any
    graph: bool = False


def put_when_there(owner: Any, exchanges: Iterable[Exchange]) -> None:
    """Puts layers into the attributes of a fresh copy, now or once `build` has made
    the attributes."""
    waiting = []
    for exchange in exchanges:
        try:
            put(owner, exchange)
        except (AttributeError, IndexError, KeyError):
            waiting.append(exchange)
    if not waiting:
        return
    build = owner.build

    @functools.wraps(build)
    def build_then_put(*args: Any, **kwargs: Any) -> None:
        build(*args, **kwargs)
        owner.build = build
        for exchange in waiting:
            put(owner, exchange)

    owner.build = build_then_put


def put(owner: Any, exchange: Exchange) -> None:
    """Exchanges the layer at a slot; its place in the order of weights stays."""
    slot, new = Slot(owner, exchange.attribute, exchange.keys), exchange.layer
    old = slot.get()
    if old is new:
        return
    build_like(old, new)
    layers, tracker = private.held_layers(owner), private.tracker(owner)
    place = next((k for k, x in enumerate(layers) if x is old), len(layers))
    locked = tracker.locked
    tracker.unlock()
    tracker.untrack(old)
    value, keys = new, slot.keys
    while keys:
        holder: Any = Slot(owner, slot.attribute, keys[:-1]).get()
        if not isinstance(holder, tuple):
            holder[keys[-1]] = value
            tracker.track(new)
            break
        # A tuple is made anew, and put where it was.
        parts = [value if k == keys[-1] else x for k, x in enumerate(holder)]
        made = getattr(type(holder), "_make", type(holder))
        value, keys = made(parts), keys[:-1]
    else:
        setattr(owner, slot.attribute, value)
    if any(x is new for x in layers):
        layers[:] = [x for x in layers if x is not new]
        layers.insert(place, new)
    if locked:
        tracker.lock()


def build_like(old: Any, new: Any) -> None:
    """Creates the variables of a copy where no graph has built it."""
    if getattr(old, "built", False) and not getattr(new, "built", True):
        config = old.get_build_config()
        if config:
            new.build_from_config(config)
            new.built = True  # as Keras does when it loads


@keras.saving.register_keras_serializable("rewriters", "Edited")
class Remembering:
    """Mixed into a custom class whose own config does not know of its edits.

    The config of such an object is that of the original class plus the layers that
    were exchanged; loading builds the original and exchanges them again.
    """

    _original: type
    _edits: dict[str, Any]

    def get_config(self) -> dict[str, Any]:
        edited = type(self)
        self.__class__ = edited._original
        try:
            base = keras.saving.serialize_keras_object(self)
        finally:
            self.__class__ = edited
        keep = ("module", "class_name", "config", "registered_name")
        edits = [
            {
                "attribute": e.attribute,
                "keys": list(e.keys),
                "graph": e.graph,
                "layer": e.layer and _unbuilt(e.layer),
            }
            for e in self._edits.values()
        ]
        return {"base": {k: base[k] for k in keep}, "edits": edits}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        def revive(config: Any) -> Any:
            # Adds to the scope of the caller; a scope of our own would replace it.
            return keras.saving.deserialize_keras_object(config, custom_objects)

        kind = config["base"]
        base = keras.saving.get_registered_object(
            kind["registered_name"], custom_objects
        )
        base = construct(base, kind["config"]) if base else revive(kind)
        exchanges = [
            Exchange(
                e["attribute"],
                tuple(e["keys"]),
                e["layer"] and revive(e["layer"]),
                e["graph"],
            )
            for e in config["edits"]
        ]
        if any(e.graph for e in exchanges):
            from rewriters.edit import edit  # which imports this module

            return edit(base, {e.attribute: e.layer for e in exchanges}).model
        put_when_there(base, exchanges)
        steps = {"/".join(map(str, (e.attribute, *e.keys))): e for e in exchanges}
        return remember(base, steps)


def _unbuilt(layer: Any) -> dict[str, Any]:
    """Serialized without the shape it was built with: its owner builds it."""
    config = keras.saving.serialize_keras_object(layer)
    config.pop("build_config", None)
    return config


def remember(layer: Any, edits: Mapping[str, Exchange]) -> Any:
    """Makes the layer's config tell of the exchanged layers, unless it tells already
    (a wrapper serializes what it wraps)."""
    if not edits or _tells(layer, edits):
        return layer
    cls = type(layer)
    if not issubclass(cls, Remembering):
        original = cls
        cls = type(original.__name__, (Remembering, original), {"_original": original})
        cls.__module__, cls.__qualname__ = original.__module__, original.__qualname__
        keras.saving.register_keras_serializable("rewriters", "Edited")(cls)
        layer.__class__ = cls
    vars(layer)["_edits"] = {**vars(layer).get("_edits", {}), **edits}
    return layer


def _tells(layer: Any, edits: Mapping[str, Exchange]) -> bool:
    known = {type(e.layer).__name__: type(e.layer) for e in edits.values()}
    try:
        with keras.saving.custom_object_scope(known):
            again = type(layer).from_config(layer.get_config())
    except Exception:
        return False  # and so cannot tell
    found = {step: child for step, child, _ in children(again)}
    return all(
        type(found.get(step)) is type(e.layer)
        and found[step].get_config() == e.layer.get_config()
        for step, e in edits.items()
    )
