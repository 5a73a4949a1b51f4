"""HDF5 files of Keras 1, 2 and 3 (`.h5`, `.hdf5`): config and weights in one file."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from rewriters.errors import RewriteError
from rewriters.formats import budget
from rewriters.formats.probe import alive, survives
from rewriters.formats.saved import Array, Saved, check_model_entry, parse_json


MAGIC = b"\x89HDF\r\n\x1a\n"

# What libhdf5 packs by itself; for another filter it would load a plugin from a folder.
_FILTERS = {
    h5py.h5z.FILTER_DEFLATE,
    h5py.h5z.FILTER_SHUFFLE,
    h5py.h5z.FILTER_FLETCHER32,
    h5py.h5z.FILTER_SZIP,
    h5py.h5z.FILTER_NBIT,
    h5py.h5z.FILTER_SCALEOFFSET,
    h5py.h5z.FILTER_LZF,
}
# Groups in groups; a path is followed from the top for each array.
_DEPTH = 300
# Attributes of one object. Keras writes some ten, and a long list of names as one for
# every 64 KB; libhdf5 finds the next of n in n steps.
_ATTRIBUTES = 2000
# Packed arrays up to this size are tried out before they are read.
_TRIED = 1 << 24


def read(path: str) -> Saved:
    """Reads the whole-model HDF5 file at `path`; arrays stay on disk until asked for.

    Raises:
        RewriteError: if it holds weights without a model, or is damaged.
    """
    file = open_file(path)
    try:
        return _read(file)
    except BaseException:
        file.close()
        raise


def open_file(source: Any) -> h5py.File:
    """Opens the path or stream `source` for reading, its structure tried out before.

    Raises:
        RewriteError: if the structure cannot be followed, is larger than the file can
            hold, or leads out of the file.
    """

    def walk() -> None:
        with h5py.File(source, "r") as file:
            _walk(file)

    survives(walk)
    return h5py.File(source, "r")


def _walk(file: h5py.File) -> None:
    """Touches all that a reader may: every group, link, attribute and packed array."""
    todo: list[tuple[str, h5py.Group]] = [("", file)]
    seen = set()
    while todo:
        place, item = todo.pop()
        with _left_to_the_reader():
            if hash(item.id) in seen:
                continue
            seen.add(hash(item.id))
            alive()
            budget.spend("members", what=repr(place[:80]))
            if place.count("/") > _DEPTH:
                raise _damaged(f"groups nested {_DEPTH} deep and more")
            _walk_attributes(place, item)
            if isinstance(item, h5py.Dataset):
                _check_layout(item, place)
                _ = item.shape, item.dtype
                if item.chunks is not None and item.nbytes < _TRIED:
                    budget.spend("bytes", item.nbytes, what=f"the array {place[:80]!r}")
                    item[()]
            if isinstance(item, h5py.Group):
                for name in item:
                    budget.spend("names", what=f"the links of {place[:80]!r}")
                    check_link(item, name, f"{place}/{name}")
                    with _left_to_the_reader():
                        todo.append((f"{place}/{name}", item[name]))


@contextlib.contextmanager
def _left_to_the_reader() -> Iterator[None]:
    """Errors of a part that the reader may never need, except of memory."""
    try:
        yield
    except RewriteError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as e:
        if "alloc" in str(e):
            raise MemoryError(str(e)) from e


def _walk_attributes(place: str, item: Any) -> None:
    count = h5py.h5a.get_num_attrs(item.id)
    if count > _ATTRIBUTES:
        raise _damaged(f"{count} attributes of {place[:80]!r}")
    budget.spend("names", count, what=f"the attributes of {place[:80]!r}")
    for key in item.attrs:
        alive()
        with _left_to_the_reader():
            declared = item.attrs.get_id(key)
            size = math.prod(declared.shape or ())
            what = f"the attribute {key[:80]!r}"
            budget.spend("names", size, what=what)
            budget.spend("bytes", size * declared.dtype.itemsize, what=what)
            item.attrs[key]


def check_link(group: h5py.Group, name: str, path: str) -> None:
    """Raises unless `name` is in `group` itself.

    h5py's own question whether a name is there opens the file that it leads to.
    """
    key = name.encode("utf-8", errors="surrogateescape")
    if not group.id.links.exists(key):
        raise _damaged(f"{path!r} is named, but not there")
    if group.id.links.get_info(key).type != h5py.h5l.TYPE_HARD:
        raise _outside(path)


def _check_layout(data: h5py.Dataset, path: str) -> None:
    plan = data.id.get_create_plist()
    if plan.get_layout() == h5py.h5d.VIRTUAL or plan.get_external_count():
        raise _outside(path)
    filters = {plan.get_filter(i)[0] for i in range(plan.get_nfilters())}
    if filters - _FILTERS:
        raise _damaged(f"{path!r} packed by the filters {sorted(filters)}")


def _read(file: h5py.File) -> Saved:
    config = _text(file, "model_config")
    if config is None:
        raise _not_a_model(file)
    weights = child(file, "model_weights") if "model_weights" in file else file
    version = _text(weights, "keras_version") or _text(file, "keras_version") or "1"
    training = _text(file, "training_config")
    layers = {}
    for name in _names(weights, "layer_names"):
        layers[name] = _arrays(child(weights, name))
    if "top_level_model_weights" in weights and "top_level_model_weights" not in layers:
        layers[""] = _arrays(child(weights, "top_level_model_weights"))
    optimizer = []
    if "optimizer_weights" in file:
        try:
            optimizer = _arrays(child(file, "optimizer_weights"))
        except RewriteError:  # training state never stands in the model's way
            optimizer = []
    return Saved(
        config=check_model_entry(parse_json(config, "The model's config")),
        version=version,
        layers=layers,
        training=None if training is None else _lenient_json(training),
        optimizer=optimizer,
        backend=_text(weights, "backend") or _text(file, "backend") or "tensorflow",
        close=file.close,
    )


def child(group: h5py.Group, path: str) -> h5py.Group:
    """Returns the group at `path` below `group`, followed through hard links only."""
    found = _follow(group, path)
    if not isinstance(found, h5py.Group):
        raise _damaged(f"{path!r} is not a group")
    return found


def array(group: h5py.Group, path: str) -> Array:
    """Returns the dataset at `path` below `group`, its size checked, not yet read."""
    data = _follow(group, path)
    if not isinstance(data, h5py.Dataset):
        raise _damaged(f"{path!r} is not a dataset")
    _check_layout(data, path)
    if data.shape is None or data.dtype.hasobject or data.dtype.kind not in "fiubV":
        raise _damaged(f"{path!r} holds {data.dtype}, shape {data.shape}")
    declared = math.prod(data.shape) * data.dtype.itemsize
    stored = data.id.get_storage_size()
    if data.chunks is None and declared > stored:
        raise _damaged(f"{path!r} declares {declared} bytes and stores {stored}")
    budget.spend("bytes", declared, what=f"the array {path[-80:]!r}")
    return Array(path, tuple(data.shape), lambda: _values(data))


def _values(data: h5py.Dataset) -> np.ndarray:
    values = np.asarray(data[()])
    if values.dtype.kind == "V" and values.dtype.itemsize == 2:  # bfloat16
        import ml_dtypes

        values = values.view(ml_dtypes.bfloat16)
    return values


def _follow(group: h5py.Group, path: str) -> Any:
    for part in [p for p in path.split("/") if p]:
        if not isinstance(group, h5py.Group):
            raise _damaged(f"{path!r} is named, but not there")
        check_link(group, part, path)
        group = group[part]
    return group


def _arrays(group: h5py.Group) -> list[Array]:
    return [array(group, name) for name in _names(group, "weight_names")]


def _names(group: h5py.Group, key: str) -> list[str]:
    """A list of names; a long one is cut over the attributes key0, key1, ..."""
    keys = [key] if key in group.attrs else []
    while not (keys and keys[0] == key) and f"{key}{len(keys)}" in group.attrs:
        keys.append(f"{key}{len(keys)}")
    values = [v for k in keys for v in np.ravel(group.attrs[k])]
    budget.spend("names", len(values), what=repr(key))
    return [v.decode("utf-8") if isinstance(v, bytes) else str(v) for v in values]


def _text(group: h5py.Group, key: str) -> str | None:
    value = group.attrs.get(key)
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return None if value is None else str(value)


def _lenient_json(text: str) -> dict[str, Any] | None:
    try:
        value = parse_json(text, "The training config")
    except RewriteError:
        return {}
    return value if isinstance(value, dict) else {}


def _not_a_model(file: h5py.File) -> RewriteError:
    weights = "layer_names" in file.attrs or {"layers", "vars"} & set(file)
    weights = weights or any(k.startswith("_layer_checkpoint") for k in file)
    return RewriteError(
        "The file holds weights without a model" if weights else "No Keras model",
        got=f"the groups {sorted(file)[:5]}",
        expected="a whole model, with its config",
        fix="Build the model in code and call model.load_weights on it"
        if weights
        else "Give a file written by model.save",
    )


def _outside(path: str) -> RewriteError:
    return RewriteError(
        f"{path!r} lies outside the file",
        got="an external, virtual or symbolic link",
        expected="every array in the file itself",
        fix="Save the model again with model.save",
    )


def _damaged(got: str) -> RewriteError:
    return RewriteError(
        "The HDF5 file is damaged",
        got=got,
        expected="the groups and arrays that the file names",
        fix="Fetch or save it again",
    )
