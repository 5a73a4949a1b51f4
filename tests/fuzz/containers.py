"""Mutations of bytes, HDF5 files, zip archives and SavedModels."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile

import configs
import h5py
import numpy as np
from configs import pick


# Bytes.


def bytewise(data, rng):
    kind, data = rng.integers(5), bytearray(data)
    if not data:
        return bytes(data)
    at = int(rng.integers(len(data)))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif kind == 2:  # the head, which says how to read the rest
        for _ in range(rng.integers(1, 8)):
            data[rng.integers(min(len(data), 3000))] = rng.integers(256)
    elif kind == 3:  # a number of 1, 2, 4 or 8 bytes
        width = int(pick(rng, (1, 2, 4, 8)))
        odd = pick(rng, (0, 1, (1 << (8 * width)) - 1, 1 << (8 * width - 1)))
        data[at : at + width] = odd.to_bytes(width, "little")
    else:
        data[at : at + 1] = rng.bytes(rng.integers(1, 400))
    return bytes(data)


def in_json(data, rng):
    """The name of the mutation, and the text."""
    try:
        config = json.loads(data)
    except ValueError:
        return "bytes", bytewise(data, rng)
    if not isinstance(config, (dict, list)) or not config:
        return "bytes", bytewise(data, rng)
    done = []
    for _ in range(pick(rng, (1, 1, 1, 2, 4))):
        mutation = pick(rng, configs.MUTATIONS)
        done.append(mutation.__name__)
        if configs.places(config):
            mutation(config, rng)
    return done[-1], json.dumps(config).encode()


# HDF5.


def items(f, kind):
    found = [f] if kind is h5py.Group else []
    f.visititems(lambda _, x: found.append(x) if isinstance(x, kind) else None)
    return found


def drop(f, rng):
    found = [x.name for x in items(f, (h5py.Dataset, h5py.Group)) if x.name != "/"]
    if found:
        del f[pick(rng, found)]


def replace(make):
    """A dataset is another one, made of its name and shape."""

    def change(f, rng):
        found = items(f, h5py.Dataset)
        if found:
            old = pick(rng, found)
            name, shape = old.name, old.shape
            del f[name]
            make(f, name, shape, rng)

    change.__name__ = make.__name__
    return change


@replace
def reshaped(f, name, shape, rng):
    new = [(7,), (), (0,), (*shape, 1), (1,) * 32, shape[::-1]]
    f[name] = np.ones(pick(rng, new), "f4")


@replace
def of_another_type(f, name, shape, rng):
    kinds = (
        "f8", "f2", ">f4", "i8", "u1", "?", "S5", "c8", h5py.string_dtype(),
        h5py.vlen_dtype("f4"), h5py.enum_dtype({"a": 1}), h5py.ref_dtype, [("a", "f4")],
        np.dtype(("f4", (3,))), h5py.opaque_dtype(np.dtype("V4")),
    )  # fmt: skip
    f.create_dataset(name, shape, pick(rng, kinds))


@replace
def bomb(f, name, shape, rng):
    size = pick(rng, ((1 << 20, 1 << 12), (1 << 34,), (1 << 10, 1 << 14)))
    chunks = tuple(min(n, 1 << 9) for n in size)
    pack = pick(rng, (None, "gzip", "lzf"))
    f.create_dataset(name, size, "f4", chunks=chunks, compression=pack)


@replace
def packed(f, name, shape, rng):
    rows = pick(rng, (1 << 8, 1 << 11))
    f.create_dataset(name, data=np.zeros((rows, 1 << 12), "f4"), compression="gzip")


@replace
def link(f, name, shape, rng):
    links = (
        h5py.SoftLink("/"), h5py.SoftLink(name), h5py.SoftLink("/nowhere"),
        h5py.ExternalLink("/etc/hostname", "/x"), h5py.ExternalLink("model.h5", "/"),
    )  # fmt: skip
    f[name] = pick(rng, links)


@replace
def group(f, name, shape, rng):
    f.create_group(name)


@replace
def elsewhere(f, name, shape, rng):
    size = max(4 * int(np.prod(shape)), 4)
    f.create_dataset(name, shape, "f4", external=[("/etc/hostname", 0, size)])


@replace
def virtual(f, name, shape, rng):
    if not shape or 0 in shape:
        return
    layout = h5py.VirtualLayout(shape, "f4")
    layout[...] = h5py.VirtualSource("/etc/hostname", "x", shape)
    f.create_virtual_dataset(name, layout)


def hard_link(f, rng):
    """A name more of a group, its own parent among them, or of an array."""
    target, place = (
        pick(rng, items(f, (h5py.Group, h5py.Dataset))),
        pick(rng, items(f, h5py.Group)),
    )
    for i in range(pick(rng, (1, 1, 300))):
        place[f"more{i}"] = target


def nested(f, rng):
    inner = pick(rng, items(f, h5py.Group))
    for _ in range(pick(rng, (5, 200, 3000))):
        inner = inner.create_group("g")


def crowd(f, rng):
    inner = pick(rng, items(f, h5py.Group))
    for i in range(pick(rng, (10, 5000))):
        inner.create_group(f"crowd{i}")


def moved(f, rng):
    found = [x.name for x in items(f, (h5py.Dataset, h5py.Group)) if x.name != "/"]
    if found:
        name = pick(rng, found)
        new = pick(
            rng, ("x", "/model_weights/x", "ü", name + "x", "\x1b[2J", "a" * 3000)
        )
        if new not in f:
            f.move(name, new)


def attribute(f, rng):
    """An attribute is another one, or gone."""
    holders = [x for x in items(f, (h5py.Group, h5py.Dataset)) if len(x.attrs)]
    holder = pick(rng, holders)
    if holder is None:
        return
    key = pick(rng, sorted(holder.attrs))
    old = holder.attrs[key]
    del holder.attrs[key]
    kind = rng.integers(7)
    if kind == 0:
        return
    values = {
        1: lambda: np.array([b"\xff\xfe", b"x"]),
        2: lambda: np.arange(5.0),
        3: lambda: np.array(["x" * 50] * pick(rng, (1, 1000)), "S50"),
        4: lambda: pick(rng, ("9.9", "1.2", "2.15.0", "", "x" * 60_000)),
        5: lambda: (
            np.concatenate([old, old[:1]]) if np.ndim(old) and len(old) else b"x"
        ),
        6: lambda: old[::-1] if np.ndim(old) else h5py.Empty("f4"),
    }
    holder.attrs[key] = values[int(kind)]()


TREE = (
    drop, reshaped, of_another_type, bomb, packed, link, group, elsewhere, virtual,
    hard_link, nested, crowd, moved, attribute, attribute, attribute,
)  # fmt: skip


def in_hdf5(data, rng):
    if rng.random() < 0.25:
        return "hdf5 bytes", bytewise(data, rng)
    stream = io.BytesIO(data)
    try:
        with h5py.File(stream, "r+") as f:
            stored = [k for k in ("model_config", "training_config") if k in f.attrs]
            if stored and rng.random() < 0.6:
                key = pick(rng, (stored[0], *stored))
                name, text = in_json(str(f.attrs[key]).encode(), rng)
                del f.attrs[key]
                if len(text) > 60_000:
                    kind = h5py.string_dtype()
                    f.attrs.create(key, text.decode(errors="replace"), dtype=kind)
                else:
                    f.attrs[key] = np.bytes_(text) if text else ""
                return f"json {name}", finished(f, stream)
            mutation = pick(rng, TREE)
            mutation(f, rng)
            return f"hdf5 {mutation.__name__}", finished(f, stream)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError):
        return "hdf5 bytes", bytewise(data, rng)  # what HDF5 itself does not write


def finished(f, stream):
    f.close()
    return stream.getvalue()


# Zip.


def rename_member(members, rng):
    name = pick(rng, sorted(members))
    new = ("../x", "/x", "assets/../../x", "a\\..\\b", "C:/x", "x", "./config.json", "",
           "config.json/", "model.weights.h5", "\x1b[2J", "é", "a" * 5000)  # fmt: skip
    members[pick(rng, new)] = members.pop(name)


def drop_member(members, rng):
    del members[pick(rng, sorted(members))]


def swap_members(members, rng):
    a, b = pick(rng, sorted(members)), pick(rng, sorted(members))
    members[a], members[b] = members[b], members[a]


def add_member(members, rng):
    names = ("assets/x", "assets/lookup/vocabulary.txt", "model.weights.json", "x.py",
             "model_00000.weights.h5", "_self.json", "README.md")  # fmt: skip
    sizes = (0, 10, 1 << 20, 40 << 20)
    members[pick(rng, names)] = bytes(pick(rng, sizes))


def many_members(members, rng):
    for i in range(pick(rng, (100, 7000))):
        members[f"assets/{i}"] = b""


def archive_inside(members, rng):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", bytes(30 << 20))
    members[pick(rng, sorted(members))] = inner.getvalue()


ZIP = (
    rename_member,
    drop_member,
    swap_members,
    add_member,
    many_members,
    archive_inside,
)
_FIELDS = (4, 6, 8, 10, 12, 16, 20, 24, 28, 30, 32, 34, 36, 38, 42)


def directory(data, rng):
    """A number in an entry of the directory, or in its end, is another one."""
    data = bytearray(data)
    marks = [i for i in range(len(data)) if data[i : i + 4] == b"PK\1\2"]
    end = data.rfind(b"PK\5\6")
    if marks and rng.random() < 0.8:
        at = pick(rng, marks) + pick(rng, _FIELDS)
    else:
        at = end + pick(rng, (4, 6, 8, 10, 12, 16, 20))
    width = pick(rng, (1, 2, 4))
    odd = pick(rng, (0, 1, 8, 9, 12, 14, 0x7FFFFFFF, 0xFFFFFFFF))
    data[at : at + width] = (odd & ((1 << (8 * width)) - 1)).to_bytes(width, "little")
    return bytes(data)


def in_zip(data, rng):
    kind = rng.random()
    if kind < 0.08:
        return "zip bytes", bytewise(data, rng)
    if kind < 0.18:
        return "zip directory", directory(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist()}
    if kind < 0.32:
        mutation = pick(rng, ZIP)
        mutation(members, rng)
        name = f"zip {mutation.__name__}"
    else:
        name = in_folder(members, rng)
    return name, zipped(members, pick(rng, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))


def zipped(members, how):
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(stream, "w", how) as archive:
            for name, content in members.items():
                archive.writestr(zipfile.ZipInfo(name), content, how)
    return stream.getvalue()


def in_folder(members, rng):
    """A member changes by what it is."""
    kinds = {
        "config.json": lambda d: ("json", in_json(d, rng)),
        "metadata.json": lambda d: ("json", in_json(d, rng)),
        "model.weights.h5": lambda d: ("", in_hdf5(d, rng)),
        "saved_model.pb": lambda d: ("proto", in_proto(d, rng)),
        "keras_metadata.pb": lambda d: ("metadata", in_proto(d, rng)),
        "variables/variables.index": lambda d: ("index", in_index(d, rng)),
    }
    order = ("config.json", "config.json", "keras_metadata.pb", "keras_metadata.pb",
             *sorted(members))  # fmt: skip
    place = pick(rng, [name for name in order if name in members])
    if place not in kinds:
        members[place] = bytewise(members[place], rng)
        return "member bytes"
    what, (name, members[place]) = kinds[place](members[place])
    return f"{what} {name}".strip()


# Protocol buffers.


def varint(n):
    out = b""
    n &= (1 << 64) - 1
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def parse(data):
    """[number, kind, value] of each field, or None if it is no message."""
    i, found = 0, []

    def number(i):
        value = shift = 0
        while i < len(data) and shift < 64:
            value |= (data[i] & 127) << shift
            if data[i] < 128:
                return value, i + 1
            i, shift = i + 1, shift + 7
        raise ValueError

    try:
        while i < len(data):
            tag, i = number(i)
            kind = tag & 7
            if kind == 0:
                value, i = number(i)
            elif kind in (1, 2, 5):
                size, i = number(i) if kind == 2 else (8 if kind == 1 else 4, i)
                if i + size > len(data):
                    return None
                value, i = data[i : i + size], i + size
            else:
                return None
            if not tag >> 3:
                return None
            found.append([tag >> 3, kind, value])
    except ValueError:
        return None
    return found


def build(fields):
    out = []
    for number, kind, value in fields:
        out.append(varint(number << 3 | kind))
        if kind == 0:
            out.append(varint(value))
        else:
            out.append((varint(len(value)) if kind == 2 else b"") + value)
    return b"".join(out)


def in_proto(data, rng, depth=0):
    """A field somewhere, found by walking down at random, is another one."""
    fields = parse(data)
    if not fields or (depth == 0 and rng.random() < 0.05):
        return "bytes", bytewise(data, rng)
    field = pick(rng, fields)
    inner = field[2] if field[1] == 2 else b""
    if inner[:1] == b"{" and inner[-1:] == b"}":
        name, field[2] = in_json(inner, rng)
        return f"json {name}", build(fields)
    if depth < 12 and parse(inner) and rng.random() < 0.9:
        name, field[2] = in_proto(inner, rng, depth + 1)
        return name, build(fields)
    kind = rng.integers(6)
    if kind == 0:
        fields.remove(field)
    elif kind == 1:
        fields += [list(field)] * pick(rng, (1, 1, 1000))
    elif kind == 2:
        field[0] = int(rng.integers(1, 20))
    elif kind == 3:
        other = pick(rng, fields)
        field[1:], other[1:] = other[1:], field[1:]
    elif kind == 4:
        for _ in range(pick(rng, (1, 500))):
            inner = varint(field[0] << 3 | 2) + varint(len(inner)) + inner
        field[1:] = [2, inner]
    elif field[1] == 0:
        field[2] = pick(rng, (0, 1, 2, 99, 1 << 31, (1 << 63), (1 << 64) - 1))
    else:
        field[2] = pick(rng, (b"", b"x" * 3, bytewise(inner, rng)))
        field[1] = 2
    return "field", build(fields)


# The index of a checkpoint: a sorted table of keys and messages.


def read_table(data):
    """The entries, of one block, as TensorFlow writes small ones."""
    from rewriters.formats.tensor_bundle import _table

    return [(bytes(key), bytes(value)) for key, value in _table(data)]


def write_block(entries):
    from rewriters.formats.checksum import masked_crc32c

    out = b"".join(
        varint(0) + varint(len(key)) + varint(len(value)) + key + value
        for key, value in entries
    )
    block = out + struct.pack("<II", 0, 1) + b"\0"
    return block + struct.pack("<I", masked_crc32c([block])), len(block) - 1


def write_table(entries):
    first, size = write_block(entries)
    meta, meta_size = write_block([])
    last = max((key for key, _ in entries), default=b"")
    top, top_size = write_block([(last, varint(0) + varint(size))])
    at = len(first)
    foot = varint(at) + varint(meta_size) + varint(at + len(meta)) + varint(top_size)
    magic = struct.pack("<Q", 0xDB4775248B80FB57)
    return first + meta + top + foot.ljust(40, b"\0") + magic


def in_index(data, rng):
    if rng.random() < 0.3:
        return "bytes", bytewise(data, rng)
    entries = read_table(data)
    i = int(rng.integers(len(entries)))
    key, value = entries[i]
    kind = rng.integers(5)
    if kind == 0:
        del entries[i]
    elif kind == 1:
        entries[i] = (pick(rng, (b"", b"x", key + b"x", b"\xff" * 9)), value)
    elif kind == 2:
        entries[i] = (key, pick(rng, entries)[1])
    elif kind == 3:
        entries += [(key + b"%d" % n, value) for n in range(pick(rng, (1, 30_000)))]
    else:
        entries[i] = (key, in_proto(value, rng)[1])
    return "table", write_table(entries)


def mutate(name, files, rng):
    """The name of what was done, and the new files."""
    files = dict(files)
    if list(files) == [""]:
        change = in_hdf5 if name.endswith(".h5") else in_zip
        done, files[""] = change(files[""], rng)
        return done, files
    if rng.random() < 0.1:
        mutation = pick(rng, (rename_file, drop_member, swap_members))
        mutation(files, rng)
        return f"folder {mutation.__name__}", files
    return in_folder(files, rng), files


def rename_file(files, rng):
    place = pick(rng, sorted(files))
    files[pick(rng, ("x", "variables/x", place + "x", "assets/x"))] = files.pop(place)
