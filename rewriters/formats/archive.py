"""`.keras` archives: a zip of config.json, metadata.json, model.weights.h5, assets."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import posixpath
import struct
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import h5py

from rewriters.errors import RewriteError
from rewriters.formats import budget
from rewriters.formats.files import walk
from rewriters.formats.hdf5 import array, child, open_file
from rewriters.formats.saved import Array, Saved, check_model_entry, parse_json


MAGIC = b"PK\x03\x04"
WEIGHTS = "model.weights.h5"
VOCABULARY = "vocabulary.txt"

_MEMBERS = ("config.json", "metadata.json", WEIGHTS)
# Keras stores members uncompressed; others pack archives again.
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_RECORD = 22  # bytes of the record at a zip file's end, without a comment


def read(source: str | io.BytesIO) -> Saved:
    """Reads the archive at the path, or in the stream, `source`.

    Raises:
        RewriteError: if a member is missing or damaged, lies outside the archive,
            or if all of them declare far more than the archive holds.
    """
    with opened(source) as archive:
        config = check_model_entry(
            parse_json(_member(archive, "config.json"), "config.json")
        )
        metadata = parse_json(_member(archive, "metadata.json"), "metadata.json")
        weights = _member(archive, WEIGHTS)
        assets = {}
        for name in archive.namelist():
            if not name.startswith("assets/"):
                continue
            if name.endswith(f"/{VOCABULARY}"):
                place = name.removeprefix("assets/").removesuffix(VOCABULARY)
                assets[place] = _text(archive, name)
            else:  # Keras takes it out: sound, and by its size
                _check(archive, name)
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


def is_folder(folder: pathlib.Path) -> bool:
    """Whether `zipped=False` made the folder."""
    return all(os.path.lexists(folder / name) for name in ("config.json", WEIGHTS))


def members(folder: pathlib.Path) -> Iterator[str]:
    """The places in the folder of the files that an archive of it would hold."""
    yield from _MEMBERS
    if os.path.lexists(folder / "assets"):
        yield from walk(folder, "assets")


def zipped(folder: pathlib.Path, names: list[str]) -> io.BytesIO:
    """An archive, in memory, of the files `names` in `folder`."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            budget.spend("bytes", (folder / name).stat().st_size, what=repr(name))
            archive.write(folder / name, name)
    stream.seek(0)
    return stream


def for_keras(source: str | io.BytesIO, config: dict[str, Any] | None) -> IO[bytes]:
    """A stream of the archive with `config` instead of its own, where one is given.

    Keras is handed no file that is not a part of a model: it unpacks whatever an
    archive holds besides config, metadata and weights into a temporary folder.
    """
    with opened(source) as old:
        names = [x for x in old.namelist() if _of_a_model(x)]
        if config is None and names == old.namelist():
            same = isinstance(source, io.BytesIO)
            return source if same else pathlib.Path(source).open("rb")
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as new:
            for name in names:
                own = config is not None and name == "config.json"
                new.writestr(name, json.dumps(config) if own else old.read(name))
    stream.seek(0)
    return stream


def _of_a_model(name: str) -> bool:
    asset = name.startswith("assets/") and not name.endswith("/")
    return asset or name in _MEMBERS


@contextlib.contextmanager
def opened(source: str | io.BytesIO) -> Iterator[zipfile.ZipFile]:
    """The archive, once its members are known to be as many and as large as they can.

    Raises:
        RewriteError: if a member would be written elsewhere, is there twice, or is
            packed in a way that Keras never used.
    """
    with contextlib.ExitStack() as stack:
        stream = source
        if isinstance(stream, str):
            stream = stack.enter_context(pathlib.Path(stream).open("rb"))
        # zipfile makes an object of a kilobyte for every entry of some 50 bytes.
        budget.current().check(
            "members", _directory_size(stream) // 46, what="the archive's directory"
        )
        archive = stack.enter_context(zipfile.ZipFile(stream))
        check_members(archive)
        yield archive


def _directory_size(stream: Any) -> int:
    """Bytes of a zip file's directory, as the record at its end says."""
    length = stream.seek(0, 2)
    stream.seek(max(0, length - _RECORD - (1 << 16) - 100))
    tail = stream.read()
    at = len(tail) - _RECORD
    if tail[at : at + 4] != b"PK\5\6" or tail[-2:] != b"\0\0":
        at = tail.rfind(b"PK\5\6")
    if at < 0:
        raise _damaged("no directory at its end")
    (size,) = struct.unpack_from("<L", tail, at + 12)
    if at >= 76 and tail[at - 20 : at - 16] == b"PK\6\7":  # sizes of 64 bits
        (large,) = struct.unpack_from("<Q", tail, at - 76 + 40)
        size = large if size == 0xFFFFFFFF else max(size, large)
    return size


def check_members(archive: zipfile.ZipFile) -> None:
    """Raises if a member would be written elsewhere, is there twice or is locked."""
    seen = set()
    for info in archive.infolist():
        budget.spend("members", what=f"the member {info.filename[:80]!r}")
        name = info.filename.replace("\\", "/")
        inside = posixpath.normpath(posixpath.join("/root", name))
        if name.startswith("/") or ":" in name or not inside.startswith("/root"):
            raise _damaged(f"the member {info.filename!r} outside the archive")
        if ".." in name.split("/"):
            raise _damaged(f"the member {info.filename!r} outside the archive")
        if inside in seen:
            raise _damaged(f"two members {info.filename!r}")
        seen.add(inside)
        if info.flag_bits & 1 or info.compress_type not in _PACKED:
            raise _damaged(f"the member {info.filename!r}, encrypted or packed oddly")


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    if name not in archive.namelist():
        raise _damaged(f"no member {name!r} among {archive.namelist()[:5]}")
    _declare(archive, name)
    return archive.read(name)  # checks the member's CRC


def _check(archive: zipfile.ZipFile, name: str) -> None:
    _declare(archive, name)
    with archive.open(name) as member:
        while member.read(1 << 20):
            pass


def _declare(archive: zipfile.ZipFile, name: str) -> None:
    # zipfile gives no more than a member declares.
    budget.spend("bytes", archive.getinfo(name).file_size, what=repr(name[:80]))


def _optimizer(tree: h5py.File) -> list[Array]:
    try:
        stored = child(tree, "optimizer/vars")
        return [array(stored, name) for name in sorted(stored, key=int)]
    except (RewriteError, ValueError):  # none, or none that can be told
        return []


def _text(archive: zipfile.ZipFile, name: str) -> str:
    return _member(archive, name).decode("utf-8", errors="replace")


def _damaged(got: Any) -> RewriteError:
    return RewriteError(
        "The archive is not a sound .keras file",
        got=got,
        expected=f"config.json, metadata.json and {WEIGHTS}, each inside the archive",
        fix="Fetch or save it again",
    )
