"""Cases of `test_hostile_files`: HDF5 files made to hurt, alone and in archives."""

import io
import struct
import zipfile

import h5py
import numpy as np
from hostile_folders import case, copied, packed, unpacked


# HDF5: both alone and inside an archive.


def _h5(group="hdf5", name=None):
    def add(change):
        for kind in ("k3.h5", "k2.h5", "k3.keras"):

            def damage(folder, sound, secrets, kind=kind):
                path = copied(sound / kind, folder / f"model{kind[2:]}")
                if kind.endswith(".h5"):
                    with h5py.File(path, "r+") as f:
                        change(f, secrets)
                    return path
                members = unpacked(path)
                stream = io.BytesIO(members["model.weights.h5"])
                with h5py.File(stream, "r+") as f:
                    change(f, secrets)
                members["model.weights.h5"] = stream.getvalue()
                return packed(path, members, zipfile.ZIP_DEFLATED)

            damage.__name__ = f"{name or change.__name__}, {kind}"
            case(group)(damage)
        return change

    return add


def _first(f):
    """The path of the first kernel."""
    found = []
    f.visititems(
        lambda n, x: (
            found.append(n) if isinstance(x, h5py.Dataset) and x.ndim == 2 else None
        )
    )
    return next(n for n in found if not n.startswith("optimizer"))


def _elsewhere(secrets):
    path = secrets / "other.h5"
    if not path.exists():
        with h5py.File(path, "w") as f:
            f["x"] = np.ones((8, 8), "f4")
    return path


@_h5()
def external_dataset(f, secrets):
    name = _first(f)
    del f[name]
    f[name] = h5py.ExternalLink(_elsewhere(secrets), "/x")


@_h5()
def external_group(f, secrets):
    name = _first(f).rpartition("/")[0]
    del f[name]
    f[name] = h5py.ExternalLink(_elsewhere(secrets), "/")


@_h5()
def external_top(f, secrets):
    for name in ("model_weights", "optimizer_weights", "layers"):
        if name in f:
            del f[name]
            f[name] = h5py.ExternalLink(_elsewhere(secrets), "/")


@_h5()
def soft(f, secrets):
    name = _first(f)
    f.move(name, "hidden")
    f[name] = h5py.SoftLink("/hidden")


@_h5()
def virtual(f, secrets):
    name = _first(f)
    layout = h5py.VirtualLayout((8, 8), "f4", maxshape=(None, 8))
    source = h5py.VirtualSource(_elsewhere(secrets), "x", (8, 8), maxshape=(None, 8))
    layout[: h5py.h5s.UNLIMITED, :] = source[: h5py.h5s.UNLIMITED, :]
    del f[name]
    f.create_virtual_dataset(name, layout)


@_h5()
def external_storage(f, secrets):
    name = _first(f)
    del f[name]
    f.create_dataset(name, (8, 8), "f4", external=[(_elsewhere(secrets), 0, 256)])


@_h5()
def plugin(f, secrets):
    """A filter that libhdf5 would look for in its folder of plugins."""
    name = _first(f)
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk((8, 8))
    plan.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, (1, 2))
    del f[name]
    space, kind = h5py.h5s.create_simple((8, 8)), h5py.h5t.IEEE_F32LE
    data = h5py.h5d.create(f.id, name.encode(), kind, space, plan)
    data.write_direct_chunk((0, 0), bytes(256))


@_h5()
def one_array_many_times(f, secrets):
    """200 names of one packed array."""
    name = _first(f)
    group, _, _ = name.rpartition("/")
    del f[name]
    f.create_dataset(name, data=np.zeros((1 << 11, 1 << 11), "f4"), compression="gzip")
    for i in range(200):
        f[f"{group}/more{i}"] = f[name]
    layers = f[group]
    while layers.name != "/":
        if "weight_names" in layers.attrs:
            names = [f"{name[len(layers.name) :]}"] + [
                f"{group[len(layers.name) :]}/more{i}" for i in range(200)
            ]
            layers.attrs["weight_names"] = [n.encode() for n in names]
        layers = layers.parent


@_h5()
def many_packed_arrays(f, secrets):
    zeros = np.zeros(1 << 21, "f4")
    for i in range(200):
        f.create_dataset(f"a{i}", data=zeros, compression="gzip")


@_h5()
def sparse(f, secrets):
    """A terabyte that the file has set aside and never written."""
    name = _first(f)
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    del f[name]
    size = (1 << 18, 1 << 20) if f.driver == "sec2" else (1 << 10, 1 << 14)
    space = h5py.h5s.create_simple(size)
    h5py.h5d.create(f.id, name.encode(), h5py.h5t.IEEE_F32LE, space, plan)


def _same_string(data):
    """An attribute of 3000 texts, each the same megabyte of the file."""
    stream = io.BytesIO(data)
    with h5py.File(stream, "r+") as f:
        texts = ["y" * (1 << 20)] + ["y"] * 3000
        f.create_group("busy").attrs.create("a", texts, dtype=h5py.string_dtype())
    data = bytearray(stream.getvalue())
    short = struct.pack("<L", 1)
    at = data.find(struct.pack("<L", 1 << 20))
    while data[at + 16 : at + 20] != short or data[at + 32 : at + 36] != short:
        at = data.index(struct.pack("<L", 1 << 20), at + 1)
    data[at : at + 16 * 3001] = data[at : at + 16] * 3001
    return bytes(data)


@case("hdf5")
def one_string_many_times(folder, sound, secrets):
    path = folder / "model.h5"
    path.write_bytes(_same_string((sound / "k3.h5").read_bytes()))
    return path


@case("hdf5")
def one_string_many_times_zipped(folder, sound, secrets):
    members = unpacked(sound / "k3.keras")
    members["model.weights.h5"] = _same_string(members["model.weights.h5"])
    return packed(folder / "model.keras", members)


@_h5()
def deep(f, secrets):
    group = f
    for _ in range(6000):
        group = group.create_group("g")


@_h5()
def many_attributes(f, secrets):
    group = f.create_group("busy", track_order=False)
    for i in range(3000):
        group.attrs[str(i)] = 0


@_h5()
def many_names(f, secrets):
    names = np.zeros(1 << 22, "S1")
    for i in range(64):
        f.attrs.create(f"layer_names{i}", names[: 1 << 15])
    for i in range(64):
        f.create_group(f"g{i}").attrs.create("weight_names", names[: 1 << 15])


@_h5()
def references(f, secrets):
    name = _first(f)
    del f[name]
    f.create_dataset(name, (8, 8), h5py.ref_dtype)


@_h5()
def committed_type(f, secrets):
    name = _first(f)
    del f[name]
    f[name] = np.dtype("f4")
