"""Damaged files: one RewriteError each that names the file, quickly, in little memory.

The variants are loaded in a process of their own, so that a crash of a library is a
failed test and not a lost run.
"""

import io
import json
import pathlib
import warnings
import zipfile

import h5py
import hostile
import numpy as np
import pytest


COUNT = 500


# Making the variants: bytes in, bytes out, and whether the result may still be valid.


def truncated(data, rng):
    return data[: rng.integers(0, len(data) - 1)], False


def flipped(data, rng):
    new = bytearray(data)
    for _ in range(rng.integers(1, 20)):
        new[rng.integers(len(new))] ^= 1 << rng.integers(8)
    return bytes(new), True


def flipped_head(data, rng):
    new = bytearray(data)
    for _ in range(rng.integers(1, 8)):
        new[rng.integers(min(len(new), 3000))] = rng.integers(256)
    return bytes(new), True


def overwritten(data, rng):
    start = rng.integers(len(data))
    noise = rng.bytes(rng.integers(1, 400))
    return data[:start] + noise + data[start + len(noise) :], True


def cut_json(text, rng):
    return text[: rng.integers(0, len(text) - 1)], False


def deep_json(text, rng):
    return "[" * 200_000, False


def changed_json(text, rng):
    """One value anywhere in the config becomes another."""
    config = json.loads(text)
    places = []

    def walk(value):
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], (dict, list)):
                walk(value[key])

    walk(config)
    container, key = places[rng.integers(len(places))]
    odd = [None, -1, 10**9, 2**70, "x" * 50, [], {}, [[1]], 1e308, True, float("nan")]
    container[key] = odd[rng.integers(len(odd))]
    return json.dumps(config), True


def huge_layer(text, rng):
    config = json.loads(text)
    for layer in config["config"]["layers"]:
        if "units" in layer["config"]:
            layer["config"]["units"] = 10**9
        if "filters" in layer["config"]:
            layer["config"]["filters"] = 10**8
    return json.dumps(config), False


def unknown_class(text, rng):
    return text.replace('"Dense"', '"Dens"').replace("keras.layers", "nowhere"), False


def in_h5(change):
    def damage(data, rng):
        stream = io.BytesIO(data)
        with h5py.File(stream, "r+") as f:
            valid = change(f, rng)
        return stream.getvalue(), bool(valid)

    damage.__name__ = change.__name__
    return damage


def h5_json(change):
    def damage(f, rng):
        text, valid = change(str(f.attrs["model_config"]), rng)
        f.attrs.modify("model_config", np.bytes_(text.encode()[:60000]))
        return valid

    damage.__name__ = change.__name__
    return in_h5(damage)


def datasets(f):
    found = []
    f.visititems(
        lambda name, x: found.append(name) if isinstance(x, h5py.Dataset) else None
    )
    return [n for n in found if not n.startswith(("optimizer", "metrics"))]


def missing(f, rng):
    names = datasets(f)
    del f[names[rng.integers(len(names))]]


def reshaped(f, rng):
    names = datasets(f)
    name = names[rng.integers(len(names))]
    shape = f[name].shape
    del f[name]
    f[name] = np.zeros((*shape, 2) if rng.integers(2) else (7,), "float32")


def bomb(f, rng):
    names = datasets(f)
    name = names[rng.integers(len(names))]
    del f[name]
    f.create_dataset(name, (1 << 20, 1 << 12), "f4", compression="gzip")


def external_link(f, rng):
    names = datasets(f)
    name = names[rng.integers(len(names))]
    del f[name]
    f[name] = h5py.ExternalLink("/etc/passwd", "/x")


def soft_link(f, rng):
    names = datasets(f)
    name = names[rng.integers(len(names))]
    del f[name]
    f[name] = h5py.SoftLink("/")


def virtual(f, rng):
    names = datasets(f)
    name = names[rng.integers(len(names))]
    layout = h5py.VirtualLayout(f[name].shape, "f4")
    layout[...] = h5py.VirtualSource("/nowhere.h5", "x", f[name].shape)
    del f[name]
    f.create_virtual_dataset(name, layout)


def wrong_dtype(f, rng):
    names = datasets(f)
    name = names[rng.integers(len(names))]
    shape = f[name].shape
    del f[name]
    f.create_dataset(name, shape, h5py.string_dtype())


def in_zip(change):
    def damage(data, rng):
        members = {}
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                members[info.filename] = archive.read(info)
        valid = change(members, rng)
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return stream.getvalue(), bool(valid)

    damage.__name__ = change.__name__
    return damage


def zip_json(change):
    def damage(members, rng):
        text, valid = change(members["config.json"].decode(), rng)
        members["config.json"] = text.encode()
        return valid

    damage.__name__ = change.__name__
    return in_zip(damage)


def zip_h5(change):
    def damage(members, rng):
        members["model.weights.h5"], valid = in_h5(change)(
            members["model.weights.h5"], rng
        )
        return valid

    damage.__name__ = change.__name__
    return in_zip(damage)


def zip_weights_bytes(change):
    def damage(members, rng):
        members["model.weights.h5"], valid = change(members["model.weights.h5"], rng)
        return valid

    damage.__name__ = f"weights_{change.__name__}"
    return in_zip(damage)


def no_member(members, rng):
    del members[list(members)[rng.integers(len(members))]]


def escaping_member(members, rng):
    names = ["../escaped.txt", "/tmp/escaped.txt", "a/../../escaped.txt", "C:\\e.txt"]
    members[names[rng.integers(len(names))]] = b"x"


def zip_bomb(members, rng):
    members["assets/zeros"] = bytes(128 << 20)


JSON = (cut_json, deep_json, changed_json, changed_json, huge_layer, unknown_class)
TREE = (missing, reshaped, bomb, external_link, soft_link, virtual, wrong_dtype)
BYTEWISE = (truncated, flipped, flipped, flipped_head, flipped_head, overwritten)
DAMAGES = {
    ".h5": (*BYTEWISE, *map(h5_json, JSON), *map(in_h5, TREE)),
    ".keras": (
        *BYTEWISE,
        *map(zip_json, JSON),
        *map(zip_h5, TREE),
        *map(zip_weights_bytes, BYTEWISE),
        *map(in_zip, (no_member, escaping_member, zip_bomb)),
    ),
}


def write_sources(folder):
    """Small models of both generations, in both formats."""
    import keras

    paths = []
    for library in ("keras", "tf_keras"):
        k = keras
        if library == "tf_keras":
            try:
                import tf_keras as k
            except ImportError:
                continue
        inputs = k.Input((8, 8, 3), name="image")
        x = k.layers.Conv2D(6, 3, name="conv")(inputs)
        x = k.layers.BatchNormalization(name="bn")(x)
        x = k.layers.ReLU(name="relu")(x)
        x = k.layers.GlobalAveragePooling2D(name="pool")(x)
        model = k.Model(inputs, k.layers.Dense(3, name="dense")(x), name="net")
        model.compile("adam", "mse")
        for suffix in DAMAGES:
            paths.append(folder / f"{library}{suffix}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Keras's own, of .h5 files
                model.save(str(paths[-1]))
    return paths


def variants(folder, count=COUNT, seed=0):
    """Yields (path, name of the damage, whether the result may be valid)."""
    sources = [(path, path.read_bytes()) for path in write_sources(folder)]
    rng = np.random.default_rng(seed)
    for i in range(count):
        source, data = sources[i % len(sources)]
        damages = DAMAGES[source.suffix]
        damage = damages[i // len(sources) % len(damages)]
        new, valid = damage(data, rng)
        path = folder / f"damaged_{i}_{source.stem}{source.suffix}"
        path.write_bytes(new)
        yield path, damage.__name__, valid
        path.unlink()


@pytest.mark.ci
@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_files_give_one_error(tmp_path, seed):
    bad = []
    made = tmp_path / "made"
    made.mkdir()
    with hostile.Process(tmp_path / "process") as process:
        for path, damage, valid in variants(made, COUNT // 2, seed):
            answer = process.load(path)
            problems = answer.against("either" if valid else "refused")
            if answer.kind == "refused" and str(path) not in answer.text:
                problems.append("does not name the file")
            if problems:
                bad.append((path.name, damage, problems, answer.text))
    assert not bad, bad[:5]
    assert not (tmp_path.parent / "escaped.txt").exists()
    assert not pathlib.Path("/tmp/escaped.txt").exists()
