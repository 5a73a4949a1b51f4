"""TensorFlow's file formats, read without TensorFlow.

A SavedModel is a protocol buffer beside a "tensor bundle": an index, which is a
sorted string table of protocol buffers, and data files of raw little-endian arrays.
Reading them takes a page of code, works beside JAX alone, and cannot crash a
process on a damaged file as native code can.
"""

from __future__ import annotations

import math
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from rewriters.errors import RewriteError
from rewriters.formats import budget
from rewriters.formats.checksum import masked_crc32c
from rewriters.formats.files import inside
from rewriters.formats.saved import Array


_TABLE_MAGIC = 0xDB4775248B80FB57
_DTYPES = {
    1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 5: "<i2", 6: "i1", 9: "<i8", 10: "?",
    14: "bfloat16", 17: "<u2", 19: "<f2", 22: "<u4", 23: "<u8",
}  # fmt: skip
# Strings are stored in a way of their own; handles and variants have no plain bytes.
_STRING = 7
_UNCHECKED = (20, 21)
_COUNTED = 1024  # fields of a message that are spent at once
_READ = 1 << 22


def fields(message: bytes | memoryview) -> Iterator[tuple[int, Any]]:
    """Yields (field number, value) of a protocol buffer, its parts left as bytes."""
    i, count, message = 0, 0, memoryview(message)
    while i < len(message):
        count += 1
        if count == _COUNTED:
            budget.spend("values", count, what="the fields of a message")
            count = 0
        tag, i = _varint(message, i)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, i = _varint(message, i)
        elif kind in (1, 2, 5):
            size, i = _varint(message, i) if kind == 2 else (8 if kind == 1 else 4, i)
            value, i = message[i : i + size], i + size
            if i > len(message):
                raise damaged("a message cut short")
        else:
            raise damaged(f"wire type {kind}")
        yield number, value
    budget.spend("values", count, what="the fields of a message")


def text(value: Any) -> str:
    """Decodes a string field."""
    return bytes(value).decode("utf-8", errors="replace")


def read_bundle(folder: pathlib.Path, name: str) -> dict[str, Array | bytes]:
    """Returns the arrays of the bundle `name` in `folder` by key; strings are bytes.

    Sizes are checked against the data files before anything is allocated, and every
    array against its checksum in the index.
    """
    table = dict(_table(inside(folder, f"{name}.index").read_bytes()))
    header = dict(fields(table.pop(b"", b"")))
    shards = header.get(1, 1)
    if not 0 < shards < 10_000:
        raise damaged(f"an index of {shards} data files")
    files = [
        inside(folder, f"{name}.data-{i:05d}-of-{shards:05d}") for i in range(shards)
    ]
    sizes = [file.stat().st_size for file in files]
    return {
        text(key): _entry(text(key), value, files, sizes)
        for key, value in table.items()
    }


def _entry(key: str, value: Any, files: list[pathlib.Path], sizes: list[int]) -> Any:
    entry = dict(fields(value))
    shard, offset, size = entry.get(3, 0), entry.get(4, 0), entry.get(5, 0)
    if shard >= len(files) or offset + size > sizes[shard]:
        raise damaged(f"{key!r} at byte {offset} of {size} bytes, past the data's end")
    budget.spend("bytes", size, what=f"the array {key[:80]!r}")
    parts = _parts(files[shard], offset, size)
    if entry.get(1) == _STRING:  # the object graph is the one that is needed
        stored = b"".join(parts)
        parts = _checked_strings(stored, _shape(entry))
    if entry.get(1) not in _UNCHECKED and masked_crc32c(parts) != int.from_bytes(
        entry.get(6, b""), "little"
    ):
        raise damaged(f"{key!r}, whose checksum does not match")
    if entry.get(1) == _STRING:
        return stored
    shape = _shape(entry)
    name = _DTYPES.get(entry.get(1, 0))
    if name is None:
        return b""
    dtype = _dtype(name)
    if np.prod(shape, dtype=object) * dtype.itemsize != size:
        raise damaged(f"{key!r} of shape {shape} in {size} bytes")

    def read() -> np.ndarray:
        with files[shard].open("rb") as f:
            f.seek(offset)
            return np.frombuffer(f.read(size), dtype).reshape(shape)

    return Array(key, shape, read)


def _shape(entry: dict[int, Any]) -> tuple[int, ...]:
    return tuple(
        dict(fields(dim)).get(1, 0)
        for number, dim in fields(entry.get(2, b""))
        if number == 2
    )


def _parts(file: pathlib.Path, offset: int, size: int) -> Iterator[bytes]:
    with file.open("rb") as f:
        f.seek(offset)
        for start in range(0, size, _READ):
            yield f.read(min(_READ, size - start))


def _checked_strings(stored: bytes, shape: tuple[int, ...]) -> list[bytes]:
    """What the checksum of stored strings is of: their lengths as numbers of 32 bits,
    or of 64 where one needs it, the lengths' own checksum, and their bytes."""
    view, i, lengths = memoryview(stored), 0, []
    count = math.prod(shape)
    budget.spend("names", count, what="stored strings")
    for _ in range(count):
        length, i = _varint(view, i)
        lengths.append(length.to_bytes(4 if length < 1 << 32 else 8, "little"))
    if masked_crc32c(lengths) != int.from_bytes(view[i : i + 4], "little"):
        raise damaged("lengths of strings whose checksum does not match")
    return [*lengths, stored[i:]]


def string_elements(value: bytes) -> bytes:
    """The one element of a stored scalar string: a length, a checksum, the bytes."""
    length, start = _varint(memoryview(value), 0)
    return value[start + 4 : start + 4 + length]


def _table(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """The entries of a sorted string table, in the order of their keys."""
    if len(data) < 48 or struct.unpack("<Q", data[-8:])[0] != _TABLE_MAGIC:
        raise damaged("an index without its end mark")
    footer = memoryview(data)[-48:-8]
    _, i = _varint(footer, 0)
    _, start = _varint(footer, i)  # past the handle of the meta index
    for _ in _block(data, footer):
        pass
    _, i = _varint(footer, start)
    _, i = _varint(footer, i)
    if any(footer[i:]):
        raise damaged("an index with more in its end mark than belongs there")
    for _, handle in _block(data, footer[start:]):
        yield from _block(data, handle)


def _block(data: bytes, handle: Any) -> Iterator[tuple[bytes, memoryview]]:
    offset, i = _varint(handle, 0)
    size, _ = _varint(handle, i)
    if offset + size + 5 > len(data):
        raise damaged("a block past the end of the index")
    if data[offset + size] != 0:
        raise damaged("a compressed index")
    stored = int.from_bytes(data[offset + size + 1 : offset + size + 5], "little")
    if masked_crc32c([data[offset : offset + size + 1]]) != stored:
        raise damaged("an index whose checksum does not match")
    block = memoryview(data)[offset : offset + size]
    restarts = struct.unpack("<I", block[-4:])[0]
    end, i, key = len(block) - 4 * (restarts + 1), 0, b""
    while i < end:
        shared, i = _varint(block, i)
        unshared, i = _varint(block, i)
        length, i = _varint(block, i)
        key = key[:shared] + bytes(block[i : i + unshared])
        i += unshared
        budget.spend("names", what="the keys of the index")
        budget.spend("bytes", len(key), what="the keys of the index")
        yield key, block[i : i + length]
        i += length


def _varint(data: memoryview, i: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if i >= len(data) or shift > 63:
            raise damaged("a number cut short")
        byte = data[i]
        result |= (byte & 0x7F) << shift
        i, shift = i + 1, shift + 7
        if byte < 0x80:
            return result, i


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def damaged(got: str) -> RewriteError:
    """The error for a SavedModel that cannot be read."""
    return RewriteError(
        "The SavedModel is damaged",
        got=got,
        expected="saved_model.pb and a variables checkpoint that agree",
        fix="Fetch or save it again",
    )
