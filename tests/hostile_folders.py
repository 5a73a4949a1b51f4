"""Cases of `test_hostile_files`: folders, archives and SavedModels made to hurt."""

import io
import json
import os
import pathlib
import struct
import warnings
import zipfile

import h5py
import numpy as np


# Each case: a function of (folder of its own, sound models, folder of secrets) that
# returns the path to load; by group. Those that are sound load.
CASES: dict[str, list] = {}
SOUND = set()


def case(group, sound=False):
    def add(function):
        CASES.setdefault(group, []).append(function)
        if sound:
            SOUND.add(function.__name__)
        return function

    return add


def copied(source, target):
    import shutil

    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    return target


def unpacked(path):
    with zipfile.ZipFile(path) as archive:
        return {i.filename: archive.read(i) for i in archive.infolist()}


def packed(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


# Folders: links, pipes, devices, holes.


def _in_folder(kind, name, make):
    def damage(folder, sound, secrets):
        path = copied(sound / kind, folder / "model")
        target = path / name
        if target.is_dir():
            target.rename(secrets / f"{kind}_{target.name}_{folder.name}")
        else:
            target.parent.mkdir(exist_ok=True)
            target.unlink(missing_ok=True)
        make(target, secrets)
        return path

    return damage


def _link(target, secrets):
    moved = secrets / f"{target.parent.parent.name}_{target.name}"
    moved.write_bytes(b"secret\nwords\n")
    target.symlink_to(moved)


def _link_to_folder(target, secrets):
    (found,) = (x for x in secrets.iterdir() if x.is_dir() and target.name in x.name)
    target.symlink_to(found)


def _pipe(target, secrets):
    os.mkfifo(target)


def _endless(target, secrets):
    target.symlink_to("/dev/zero")


def _sparse(target, secrets):
    with target.open("wb") as f:
        f.write(b"\x89HDF\r\n\x1a\n")
        f.truncate(1 << 42)


UNZIPPED = ("config.json", "metadata.json", "model.weights.h5", "assets/v.txt")
STORED = (
    "saved_model.pb",
    "keras_metadata.pb",
    "variables/variables.index",
    "variables/variables.data-00000-of-00001",
)
for _kind, _names in (("folder", UNZIPPED), ("saved", STORED)):
    for _name in _names:
        for _make in (_link, _pipe, _endless):
            _case = _in_folder(_kind, _name, _make)
            _case.__name__ = f"{_kind}_{_name}{_make.__name__}"
            case(_kind)(_case)
for _kind, _name in (("folder", "assets"), ("saved", "variables")):
    _case = _in_folder(_kind, _name, _link_to_folder)
    _case.__name__ = f"{_kind}_{_name}_link_to_folder"
    case(_kind)(_case)
for _name in ("model.weights.h5", "assets/large"):
    _case = _in_folder("folder", _name, _sparse)
    _case.__name__ = f"folder_{_name}_sparse"
    case("folder")(_case)


@case("folder")
def many_assets(folder, sound, secrets):
    path = copied(sound / "folder", folder / "model")
    for i in range(6000):
        (path / "assets" / str(i)).touch()
    return path


@case("folder", sound=True)
def linked_folder(folder, sound, secrets):
    (folder / "model").symlink_to(sound / "folder")
    return folder / "model"


@case("folder", sound=True)
def linked_file(folder, sound, secrets):
    (folder / "model").symlink_to(sound / "k3.keras")
    return folder / "model"


@case("folder")
def a_pipe(folder, sound, secrets):
    os.mkfifo(folder / "model.h5")
    return folder / "model.h5"


@case("folder")
def a_device(folder, sound, secrets):
    return pathlib.Path("/dev/zero")


@case("folder")
def a_linked_device(folder, sound, secrets):
    (folder / "model.keras").symlink_to("/dev/zero")
    return folder / "model.keras"


@case("folder")
def links_in_a_circle(folder, sound, secrets):
    (folder / "model.h5").symlink_to(folder / "model.h5")
    return folder / "model.h5"


# Archives.


def _zip(compression=zipfile.ZIP_STORED):
    def add(change):
        def damage(folder, sound, secrets):
            path = folder / "model.keras"
            members = unpacked(sound / "k3.keras")
            change(members, secrets)
            return packed(path, members, compression)

        damage.__name__ = change.__name__
        return case("zip")(damage)

    return add


@_zip(zipfile.ZIP_DEFLATED)
def many_members_below_a_limit(members, secrets):
    for i in range(200):
        members[f"assets/{i}"] = bytes(15 << 20)


@_zip(zipfile.ZIP_DEFLATED)
def packed_twice(members, secrets):
    stream = io.BytesIO(members["model.weights.h5"])
    with h5py.File(stream, "r+") as f:
        zeros = np.zeros(1 << 21, "f4")
        for i in range(100):
            f.create_dataset(f"a{i}", data=zeros, compression="gzip")
    members["model.weights.h5"] = stream.getvalue()


@_zip(zipfile.ZIP_LZMA)
def packed_with_lzma(members, secrets):
    pass


@_zip()
def huge_list(members, secrets):
    members["config.json"] = b"[" + b"[]," * (8 << 20) + b"[]]"


@_zip()
def huge_metadata(members, secrets):
    members["metadata.json"] = b"{" + b'"a":{},' * (4 << 20) + b'"b":1}'


@_zip()
def sharded(members, secrets):
    members["model.weights.json"] = b'{"weight_map": {}}'
    members["model_00000.weights.h5"] = members.pop("model.weights.h5")


@_zip()
def arrays_of_objects(members, secrets):
    """Weights that NumPy would unpickle."""
    stream = io.BytesIO()
    np.savez(stream, a=np.array([{}], dtype=object))
    members["model.weights.npz"] = stream.getvalue()
    del members["model.weights.h5"]


for _name in ("/{}/x", "../{}/x", "assets/../../{}/x", "C:/x", "assets\\..\\..\\x"):

    def _outside(members, secrets, name=_name):
        members[name.format(secrets.name)] = b"x"

    _outside.__name__ = f"member_{_name}"
    _zip()(_outside)


@case("zip")
def two_configs(folder, sound, secrets):
    path = copied(sound / "k3.keras", folder / "model.keras")
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("config.json", "{}")
    return path


@case("zip")
def two_configs_by_another_name(folder, sound, secrets):
    path = copied(sound / "k3.keras", folder / "model.keras")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("./config.json", "{}")
    return path


@case("zip")
def encrypted(folder, sound, secrets):
    path = copied(sound / "k3.keras", folder / "model.keras")
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\1\2")
    data[at + 8] |= 1
    path.write_bytes(data)
    return path


@case("zip")
def overlapping(folder, sound, secrets):
    """Every entry of the directory names the same bytes."""
    path = copied(sound / "k3.keras", folder / "model.keras")
    data = bytearray(path.read_bytes())
    at = -1
    while (at := data.find(b"PK\1\2", at + 1)) >= 0:
        data[at + 42 : at + 46] = bytes(4)
    path.write_bytes(data)
    return path


@case("zip")
def large_directory(folder, sound, secrets):
    """A million entries that zipfile would make objects of."""
    path = copied(sound / "k3.keras", folder / "model.keras")
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", *[0] * 18)
    head = path.read_bytes()[:100]
    size = len(entry) * 1_000_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, size, len(head), 0)
    path.write_bytes(head + entry * 1_000_000 + end)
    return path


@case("zip")
def many_disks(folder, sound, secrets):
    path = copied(sound / "k3.keras", folder / "model.keras")
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\5\6")
    data[at + 4 : at + 8] = b"\1\0\1\0"
    data[at + 16 : at + 20] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    return path


@case("zip", sound=True)
def with_a_comment(folder, sound, secrets):
    path = copied(sound / "k3.keras", folder / "model.keras")
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"PK\5" * 20_000
    return path


@case("zip", sound=True)
def streamed(folder, sound, secrets):
    """Written without seeking: sizes follow the data; and of 64 bits."""
    path = folder / "model"

    class Stream(io.RawIOBase):
        def __init__(self):
            self.data = bytearray()

        def writable(self):
            return True

        def write(self, part):
            self.data += part
            return len(part)

    stream = Stream()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in unpacked(sound / "k3.keras").items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(content)
    path.write_bytes(stream.data)
    return path


@case("zip", sound=True)
def with_more_in_it(folder, sound, secrets):
    path = copied(sound / "k3.keras", folder / "model.keras")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("README.md", "x" * 1000)
        archive.mkdir("assets")
    return path


# SavedModels.


def _varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def _field(number, content):
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _graph(folder, sound, content):
    path = copied(sound / "saved", folder / "model")
    (path / "saved_model.pb").write_bytes(content)
    (path / "keras_metadata.pb").unlink()
    return path


@case("saved")
def nested_messages(folder, sound, secrets):
    content = b""
    for _ in range(5000):
        content = _field(2, content)
    return _graph(folder, sound, content)


@case("saved")
def many_fields(folder, sound, secrets):
    return _graph(folder, sound, b"\x08\x01" * (20 << 20))


@case("saved")
def many_objects(folder, sound, secrets):
    nodes = _field(1, b"") * 1_000_000
    return _graph(folder, sound, _field(2, _field(7, nodes)))


@case("saved")
def long_numbers(folder, sound, secrets):
    return _graph(folder, sound, b"\x08" + b"\xff" * (1 << 20))


@case("saved")
def objects_in_a_circle(folder, sound, secrets):
    """A subclassed model whose lists hold each other, twice."""
    meta = {"class_name": "M", "config": {"name": "m"}, "name": "m"}

    def child(name, i):
        return _field(1, _varint(8) + _varint(i) + _field(2, name))

    def user(name, text=b""):
        return _field(4, _field(1, name) + _field(3, text))

    root = child(b"a", 1) + user(b"_tf_keras_model", json.dumps(meta).encode())
    holder = child(b"a", 1) + child(b"b", 1) + user(b"trackable_list_wrapper")
    nodes = _field(1, root) + _field(1, holder)
    return _graph(folder, sound, _field(2, _field(7, nodes)))


@case("saved")
def many_shards(folder, sound, secrets):
    """A key of the index that grows with each of its entries."""
    path = copied(sound / "saved", folder / "model")
    entries = b"".join(
        _varint(i) + _varint(1) + _varint(0) + b"a" for i in range(200_000)
    )
    _write_index(path / "variables" / "variables.index", entries)
    return path


def _write_index(path, entries):
    from rewriters.formats.checksum import masked_crc32c

    def block(content):
        content += struct.pack("<2L", 0, 1)
        return content + b"\0" + struct.pack("<L", masked_crc32c([content + b"\0"]))

    first = block(entries)
    handle = _varint(0) + _varint(len(first) - 5)
    empty = block(b"")
    second = block(_varint(0) + _varint(1) + _varint(len(handle)) + b"z" + handle)
    places = b"".join(
        _varint(x)
        for x in (len(first), len(empty) - 5, len(first + empty), len(second) - 5)
    )
    mark = struct.pack("<Q", 0xDB4775248B80FB57)
    path.write_bytes(first + empty + second + places.ljust(40, b"\0") + mark)
