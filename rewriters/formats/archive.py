"""`.keras` archives: a zip of config.json, metadata.json, model.weights.h5, assets."""

from __future__ import annotations

import contextlib
import io
import pathlib
import posixpath
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any

import h5py

from rewriters.errors import RewriteError
from rewriters.formats.hdf5 import array, child, open_file
from rewriters.formats.saved import Array, Saved, check_model_entry, parse_json


MAGIC = b"PK\x03\x04"
WEIGHTS = "model.weights.h5"
VOCABULARY = "vocabulary.txt"

# Keras stores members uncompressed; an archive packed again may be compressed,
# never a thousandfold.
_SMALL = 1 << 24
_MAX_EXPANSION = 100


def read(path: str) -> Saved:
    """Reads the archive at `path`.

    Raises:
        RewriteError: if a member is missing or damaged, lies outside the archive,
            or declares far more than the archive holds.
    """
    with zipfile.ZipFile(path) as archive:
        check_members(archive)
        config = check_model_entry(
            parse_json(_member(archive, "config.json"), "config.json")
        )
        metadata = parse_json(_member(archive, "metadata.json"), "metadata.json")
        weights = _member(archive, WEIGHTS)
        assets = {
            name.removeprefix("assets/").removesuffix(VOCABULARY): _text(archive, name)
            for name in archive.namelist()
            if name.startswith("assets/") and name.endswith(f"/{VOCABULARY}")
        }
    version = metadata.get("keras_version") if isinstance(metadata, dict) else None
    tree = open_file(io.BytesIO(weights))
    return Saved(
        config=config,
        version=str(version or "3"),
        tree=tree,
        training=config.get("compile_config"),
        optimizer=_optimizer(tree),
        assets=assets,
        close=tree.close,
    )


@contextlib.contextmanager
def zipped(path: str) -> Iterator[str]:
    """The path itself, or an archive of the folder that `zipped=False` made."""
    folder = pathlib.Path(path)
    if not all((folder / name).is_file() for name in ("config.json", WEIGHTS)):
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        target = f"{temporary}/model.keras"
        with zipfile.ZipFile(target, "w") as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, file.relative_to(folder))
        yield target


def check_members(archive: zipfile.ZipFile) -> None:
    """Raises if a member would be written elsewhere, or is larger than it can be."""
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")
        inside = posixpath.normpath(posixpath.join("/root", name))
        if name.startswith("/") or ":" in name or not inside.startswith("/root"):
            raise _damaged(f"the member {info.filename!r} outside the archive")
        if ".." in name.split("/"):
            raise _damaged(f"the member {info.filename!r} outside the archive")
        if info.file_size > max(_SMALL, _MAX_EXPANSION * info.compress_size):
            raise _damaged(
                f"{info.filename!r} declares {info.file_size} bytes "
                f"and stores {info.compress_size}"
            )


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    if name not in archive.namelist():
        raise _damaged(f"no member {name!r} among {archive.namelist()[:5]}")
    return archive.read(name)  # checks the member's CRC


def _optimizer(tree: h5py.File) -> list[Array]:
    try:
        stored = child(tree, "optimizer/vars")
        return [array(stored, name) for name in sorted(stored, key=int)]
    except (RewriteError, ValueError):  # none, or none that can be told
        return []


def _text(archive: zipfile.ZipFile, name: str) -> str:
    return archive.read(name).decode("utf-8", errors="replace")


def _damaged(got: Any) -> RewriteError:
    return RewriteError(
        "The archive is not a sound .keras file",
        got=got,
        expected=f"config.json, metadata.json and {WEIGHTS}, each inside the archive",
        fix="Fetch or save it again",
    )
