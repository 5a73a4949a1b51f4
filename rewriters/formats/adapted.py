"""Input shapes that only the weights tell: a `Normalization` of inputs of any length.

`Normalization` as the first layer of a model knows the length of its axes once it was
adapted. Keras 2 stored the inputs' shape without it, and Keras 3 needs it to build.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rewriters.formats.hdf5 import array, child
from rewriters.formats.saved import Saved
from rewriters.formats.spec import Spec, refs
from rewriters.formats.tree import places


def complete(spec: Spec, saved: Saved) -> None:
    """Gives the inputs of adapted layers the lengths that these were adapted to."""
    if spec.layers is not None:
        _complete(spec, saved, "", None)


def _complete(model: Spec, saved: Saved, place: str, owner: str | None) -> None:
    specs = model.layers or []
    names = {s.name: s for s in specs}
    for i, (layer, name) in enumerate(zip(specs, places(specs), strict=True)):
        inner = f"{place}layers/{name}/"
        if layer.layers is not None:
            _complete(layer, saved, inner, owner or layer.name)
        if layer.kind != "Normalization":
            continue
        if model.outputs is None:
            before = specs[i - 1 : i] if i else []
        else:
            read = refs([c.args for c in layer.calls])
            before = [names[r.layer] for r in read if r.layer in names]
        shape = _mean_shape(layer, saved, inner, owner)
        for source in before:
            if source.kind == "InputLayer" and shape is not None:
                known = list(source.config["batch_shape"])
                _fill(known, layer.config.get("axis"), shape)
                source.config["batch_shape"] = known


def _fill(known: list[Any], axes: Any, shape: tuple[int, ...]) -> None:
    axes = [axes] if isinstance(axes, int) else list(axes or ())
    for axis, length in zip(axes, shape, strict=False):
        if known and -len(known) <= axis < len(known) and known[axis] is None:
            known[axis] = length


def _mean_shape(layer: Spec, saved: Saved, place: str, owner: str | None) -> Any:
    for found in _stored(layer, saved, place, owner):
        return found
    return None


def _stored(
    layer: Spec, saved: Saved, place: str, owner: str | None
) -> Iterator[tuple[int, ...]]:
    if saved.tree is not None:
        for path in (
            place,
            place.replace("layers/", "_layer_checkpoint_dependencies/"),
        ):
            if f"{path}vars/0" in saved.tree:
                yield array(child(saved.tree, f"{path}vars"), "0").shape
        return
    for stored in saved.layers.get(owner or layer.name, ()):
        head, _, tail = stored.name.partition(":")[0].rpartition("/")
        # HDF5 files may name it without its layer.
        if tail == "mean" and (not head or layer.name in head.split("/")):
            yield stored.shape
