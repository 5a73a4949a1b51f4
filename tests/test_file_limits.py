"""The budget of a file, its checksums, and sound files under odd circumstances."""

import contextlib
import os
import resource
import select
import signal

import h5py
import keras
import numpy as np
import pytest

from rewriters.errors import RewriteError
from rewriters.formats import budget, files, load
from rewriters.formats.checksum import masked_crc32c


@pytest.fixture
def model():
    return keras.Sequential([keras.layers.Input((8,)), keras.layers.Dense(8)])


def test_a_budget_is_over_everything_and_names_what_was_too_much():
    with budget.opened(1000):
        budget.spend("layers", 9_999, what="the model")
        budget.spend("layers", what="the layer 'a'")
        with pytest.raises(RewriteError, match=r"10001 layers up to the layer 'b'"):
            budget.spend("layers", what="the layer 'b'")
        budget.spend("names", what="names are another kind")
    with budget.opened(1000):
        budget.spend("layers", what="a new file, a new budget")


def test_limits_grow_with_the_file_and_small_files_stay_cheap():
    limit = [budget.Budget(size).limits["bytes"] for size in (4096, 10**8, 10**10)]
    assert limit[0] < 70 << 20
    assert limit[1] < 1.2 * 2**30
    assert limit[2] >= 8 * 10**10
    for kind in ("members", "names", "layers", "values"):
        assert budget.Budget(10**10).limits[kind] <= 5_000_000


def test_time_is_a_part_of_the_budget(monkeypatch):
    with budget.opened(0):
        monkeypatch.setattr(budget.time, "thread_time", lambda: 1e9)
        with pytest.raises(RewriteError, match="takes too long"):
            budget.spend("names", what="a name")


def test_holes_are_not_stored(tmp_path):
    with (tmp_path / "sparse").open("wb") as f:
        f.write(b"x" * 4096)
        f.truncate(1 << 40)
    assert files.stored(tmp_path / "sparse") < 1 << 20
    (tmp_path / "dense").write_bytes(b"x" * 100_000)
    assert files.stored(tmp_path / "dense") == 100_000


def plain_crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_checksums_are_those_of_the_definition(rng):
    # The value that the standard (RFC 3720) gives, masked.
    assert masked_crc32c([b"123456789"]) == plain_crc32c(b"123456789")
    check = 0xE3069283
    masked = ((check >> 15 | check << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert masked_crc32c([b"123456789"]) == masked
    for size in (0, 1, 3, 4, 5, 7, 8, 9, 5684, 5685, 5686, 9999, 45_481, 60_003):
        data, cut = rng.bytes(size), size // 3
        assert masked_crc32c([data]) == plain_crc32c(data)
        assert masked_crc32c([data[:cut], b"", data[cut:]]) == plain_crc32c(data)


@contextlib.contextmanager
def many_descriptors(count):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count + 200:
        pytest.skip("the system allows too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + 200, hard))
    taken = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while taken[-1] < count:
            taken.append(os.dup(taken[0]))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_with_many_open_files_loads(model, tmp_path):
    model.save(tmp_path / "m.h5")
    model.save(tmp_path / "m.keras")
    with many_descriptors(1100):
        with pytest.raises(ValueError, match="out of range"):
            select.select([1099], [], [], 0)
        load(tmp_path / "m.h5")
        load(tmp_path / "m.keras")


def test_a_process_that_ignores_its_children_loads(model, tmp_path):
    model.save(tmp_path / "m.h5")
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        load(tmp_path / "m.h5")
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_packed_file_loads(model, tmp_path):
    model.save(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "r+") as f:
        found = []
        f.visititems(
            lambda n, x: found.append(n) if isinstance(x, h5py.Dataset) else None
        )
        for name in found:
            values = f[name][()]
            del f[name]
            f.create_dataset(name, data=values, chunks=True, compression="gzip")
    x = np.ones((2, 8), "float32")
    np.testing.assert_allclose(load(tmp_path / "m.h5")(x), model(x))


def test_a_name_of_any_ending_needs_no_copy(model, tmp_path, monkeypatch):
    """Neither a folder nor an archive of another name is copied to a temporary one."""
    model.save(tmp_path / "m.keras")
    (tmp_path / "m.keras").rename(tmp_path / "m.zip")
    model.save(tmp_path / "folder", zipped=False)
    monkeypatch.setattr("tempfile.mkdtemp", lambda *a, **k: pytest.fail("a copy"))
    x = np.ones((2, 8), "float32")
    for name in ("m.zip", "folder"):
        np.testing.assert_allclose(load(tmp_path / name)(x), model(x))


@pytest.fixture
def saved_model(tmp_path):
    tf_keras = pytest.importorskip("tf_keras")
    layers = [tf_keras.layers.InputLayer((8,)), tf_keras.layers.Dense(40, name="d")]
    model = tf_keras.Sequential([*layers, tf_keras.layers.BatchNormalization()])
    model.compile("adam", "mse")
    model.save(str(tmp_path / "saved"), save_format="tf")
    load(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.ci
@pytest.mark.parametrize("name", ["variables.data-00000-of-00001", "variables.index"])
def test_every_flipped_bit_of_a_saved_model_is_refused(saved_model, name, rng):
    from rewriters.formats.tensor_bundle import read_bundle

    file = saved_model / "variables" / name
    data = file.read_bytes()
    for bit in rng.choice(8 * len(data), 300, replace=False).tolist():
        new = bytearray(data)
        new[bit // 8] ^= 1 << bit % 8
        file.write_bytes(new)
        with budget.opened(len(data)), pytest.raises((RewriteError, ValueError)):
            read_bundle(saved_model, "variables/variables")
    with pytest.raises(RewriteError, match="is damaged"):
        load(saved_model)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_the_time_to_build_is_not_counted(suffix, tmp_path, monkeypatch):
    """A sound model of many layers takes Keras longer than a file may take to read."""
    path = tmp_path / f"m{suffix}"
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(path)
    if suffix == ".h5":
        with h5py.File(path, "r+") as file:
            file.attrs["keras_version"] = "2.15.0"
    clock = [0.0]
    monkeypatch.setattr(budget.time, "thread_time", lambda: clock[0])
    call = keras.layers.Dense.build

    def slow(self, shape):
        clock[0] += 100
        call(self, shape)

    monkeypatch.setattr(keras.layers.Dense, "build", slow)
    load(path)
    assert clock[0] >= 100
