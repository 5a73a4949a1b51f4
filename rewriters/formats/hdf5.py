"""HDF5 files of Keras 1, 2 and 3 (`.h5`, `.hdf5`): config and weights in one file."""

from __future__ import annotations

import math
from typing import Any

import h5py
import numpy as np

from rewriters.errors import RewriteError
from rewriters.formats.probe import check_structure
from rewriters.formats.saved import Array, Saved, check_model_entry, parse_json


MAGIC = b"\x89HDF\r\n\x1a\n"

# A dataset may be compressed, though Keras never does it. Past this size its
# declared bytes must be in proportion to the bytes that the file really holds.
_SMALL = 1 << 20
_MAX_EXPANSION = 100


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
    """Opens the path or stream `source` for reading, its structure tried out before."""
    check_structure(lambda: h5py.File(source, "r"))
    return h5py.File(source, "r")


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
    if data.external or data.is_virtual:
        raise _outside(path)
    if data.shape is None or data.dtype.hasobject or data.dtype.kind not in "fiubV":
        raise _damaged(f"{path!r} holds {data.dtype}, shape {data.shape}")
    declared = math.prod(data.shape) * data.dtype.itemsize
    stored = data.id.get_storage_size()
    packed = data.chunks is not None
    if declared > (max(_SMALL, stored * _MAX_EXPANSION) if packed else stored):
        raise _damaged(f"{path!r} declares {declared} bytes and stores {stored}")
    return Array(path, tuple(data.shape), lambda: _values(data))


def _values(data: h5py.Dataset) -> np.ndarray:
    values = np.asarray(data[()])
    if values.dtype.kind == "V" and values.dtype.itemsize == 2:  # bfloat16
        import ml_dtypes

        values = values.view(ml_dtypes.bfloat16)
    return values


def _follow(group: h5py.Group, path: str) -> Any:
    for part in [p for p in path.split("/") if p]:
        if not isinstance(group, h5py.Group) or part not in group:
            raise _damaged(f"{path!r} is named, but not there")
        link = group.get(part, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise _outside(path)
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
