"""Weights by their place in the tree of objects: `.keras` archives of Keras 2.

Keras wrote each layer once, under the first attribute that led to it, and the layers
of a list or dict by their class, numbered. What a version counted, and where it began,
is found again by walking the same way.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import keras

from rewriters import private
from rewriters.formats.hdf5 import array, child
from rewriters.formats.pairing import Pairs, below, layers_of, mismatch, pair, weights
from rewriters.formats.saved import Array, Saved
from rewriters.formats.spec import Spec


def match(model: Any, spec: Spec, saved: Saved) -> Pairs:
    """Returns (variable, array) for what the tree has of `model`.

    Raises:
        RewriteError: if a layer has another number of arrays.
    """
    walk = _Walk(saved)
    walk.layer(model, spec, saved.tree)
    return walk.pairs


@dataclasses.dataclass
class _Walk:
    saved: Saved
    pairs: Pairs = dataclasses.field(default_factory=list)
    visited: set[int] = dataclasses.field(default_factory=set)

    def layer(self, layer: Any, spec: Spec, group: Any) -> None:
        self.visited.add(id(layer))
        if spec.layers is None and isinstance(
            layer, (keras.Sequential, private.Functional)
        ):
            spec = _live_spec(layer)
        if spec.layers is not None:
            self._model(layer, spec, group)
        elif spec.rename:
            self.pairs += _renamed(layer, spec, group)
        else:
            self._own(layer, group)
            self._attributes(layer, spec, group)

    def _own(self, layer: Any, group: Any) -> None:
        own = private.own_variables(layer)
        own = [v for v in own if any(v is w for w in weights(layer))]
        stored = child(group, "vars") if "vars" in group else None
        indexes = sorted(stored or (), key=int)
        if len(indexes) != len(own):
            raise mismatch(
                f"The layer {layer.name!r} has another number of weights in the file",
                f"{len(indexes)} arrays for {len(own)} variables",
            )
        self.pairs += [(v, array(stored, i)) for v, i in zip(own, indexes, strict=True)]

    def _attributes(self, layer: Any, spec: Spec, group: Any) -> None:
        for key in sorted(group, reverse=self.saved.walks_back):
            held = _attribute(layer, key)
            if key == "layers" and isinstance(layer, keras.Model):
                held = layers_of(layer)
            if isinstance(held, dict):
                held = list(held.values())
            if isinstance(held, (list, tuple)):
                self._members(layer, held, spec, key, child(group, key))
            elif isinstance(held, keras.layers.Layer):
                if id(held) not in self.visited:
                    self.layer(held, _inner_spec(spec, key, held), child(group, key))
            elif key != "vars":
                _refuse_left_over(layer, key, child(group, key))

    def _members(self, owner: Any, held: Any, spec: Spec, key: str, group: Any) -> None:
        layers = [x for x in held if isinstance(x, keras.layers.Layer)]
        specs = [_inner_spec(spec, key, x, i) for i, x in enumerate(layers)]
        members = list(zip(layers, specs, strict=True))
        if not self.saved.counts_twice:
            members = [(x, s) for x, s in members if id(x) not in self.visited]
        names = places([s for _, s in members])
        for (layer, inside), name in zip(members, names, strict=True):
            if id(layer) not in self.visited and name in group:
                self.layer(layer, inside, child(group, name))
        for name in set(group) - set(names):
            _refuse_left_over(owner, f"{key}/{name}", child(group, name))

    def _model(self, model: Any, spec: Spec, group: Any) -> None:
        for layer, s, names in held(model, spec, self.saved.counts_twice):
            place = next((name for name in names if name in group), None)
            if not weights(layer):
                if place is not None and not hasattr(layer, "get_vocabulary"):
                    _refuse_left_over(layer, place, child(group, place))
                continue
            if place is not None:
                self.layer(layer, s, child(group, place))
            else:  # shared with another model, and stored there
                self.pairs += self._stored_before(layer)

    def _stored_before(self, layer: Any) -> Pairs:
        """The arrays that the first variables of the same paths were given."""
        arrays = {v.path: a for v, a in reversed(self.pairs)}
        missing = [v.path for v in layer.weights if v.path not in arrays]
        if missing:
            raise mismatch(
                "Weights are missing", f"no group for the layer {layer.name!r}"
            )
        return [(v, arrays[v.path]) for v in layer.weights]


def _attribute(layer: Any, key: str) -> Any:
    try:
        return getattr(layer, key, None)
    except Exception:  # what a property of one's own may raise
        return None


def _refuse_left_over(layer: Any, place: str, group: Any) -> None:
    """Raises if the file has weights for what the layer does not hold."""
    if not _is_of_a_layer(group):
        return
    raise mismatch(
        f"{layer.name!r}, of the class {type(layer).__name__}, has no layer for some "
        "weights of the file",
        f"{_arrays(group)[:3]} in {place!r}",
    )


def _is_of_a_layer(group: Any) -> bool:
    """Whether the arrays are weights; not those of optimizers, which begin with the
    number of steps, nor of metrics, which are single numbers."""
    own = group["vars"] if "vars" in group else {}
    first = own["0"] if "0" in own else None
    if first is not None and first.shape == () and first.dtype.kind == "i":
        return False
    if any(getattr(v, "shape", ()) != () for v in own.values()):
        return True
    return any(
        _is_of_a_layer(child(group, key))
        for key in group
        if key not in ("vars", "metrics", "_metrics", "compiled_metrics", "optimizer")
    )


def _arrays(group: Any) -> list[str]:
    names: list[str] = []
    group.visititems(
        lambda name, item: names.append(name) if hasattr(item, "shape") else None
    )
    return names


def _inner_spec(spec: Spec, key: str, layer: Any, index: int = 0) -> Spec:
    value = spec.config.get(key, spec.config.get("layer"))
    if isinstance(value, list):
        value = value[index] if index < len(value) else None
    return value if isinstance(value, Spec) else _live_spec(layer)


def _live_spec(layer: Any) -> Spec:
    """What no config tells: a layer that the code of a class of one's own made."""
    spec = Spec(layer.name, type(layer).__name__, type(layer))
    if isinstance(layer, (keras.Sequential, private.Functional)):
        spec.layers = [_live_spec(inner) for inner in layer.layers]
    return spec


def places(specs: list[Spec], twice: Collection[str] = ()) -> list[str]:
    """Names of layers in a list: their class, numbered where it comes again, which
    counts those of the names in `twice` as two."""
    counts: Counter[str] = Counter()
    places = []
    for spec in specs:
        name = private.to_snake_case(spec.kind)
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
        if weights(layer) or hasattr(layer, "get_vocabulary")
    ]
    specs = spec.layers or []
    names = places(specs, heavy if twice else ())
    for s, name in zip(specs, names, strict=True):
        if s.name in layers:
            found = f"layers/{name}", f"_layer_checkpoint_dependencies/{name}"
            yield layers[s.name], s, found


def _renamed(layer: Any, spec: Spec, group: Any) -> Pairs:
    arrays = []
    for place in _arrays(group):
        name = spec.rename.get(place, place)
        if name is not None and not below(spec.rename, place):
            found = array(group, place)
            arrays.append(Array(name, found.shape, found.read))
    if spec.fold:
        arrays = spec.fold(arrays, spec.name)
    return pair(weights(layer), arrays, f"the layer {layer.name!r}")
