"""Saving: atomic, never over the input, nothing left behind."""

import os
import pathlib
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import mostly_ci

from rewriters import RewriteError
from rewriters.formats import load
from rewriters.saving import save


@pytest.fixture
def model():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name="net")


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_saves_and_loads(model, tmp_path, suffix):
    path = save(model, tmp_path / f"new{suffix}")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    np.testing.assert_array_equal(load(path).get_weights()[0], model.get_weights()[0])


def test_replaces_an_old_file_and_keeps_its_mode(model, tmp_path):
    path = tmp_path / "m.keras"
    path.write_bytes(b"old")
    path.chmod(0o640)
    save(model, path)
    assert path.stat().st_mode & 0o777 == 0o640
    assert load(path).name == "net"


def test_a_link_keeps_pointing(model, tmp_path):
    real, link = tmp_path / "real.keras", tmp_path / "link.keras"
    link.symlink_to(real)
    save(model, link)
    assert link.is_symlink() and load(real).name == "net"


@pytest.mark.parametrize("how", ["same", "relative", "link", "hardlink"])
def test_never_over_the_input(model, tmp_path, how, monkeypatch):
    source = tmp_path / "in.keras"
    source.write_bytes(b"precious")
    target = tmp_path / "out.keras"
    if how == "same":
        target = source
    elif how == "relative":
        monkeypatch.chdir(tmp_path)
        target = pathlib.Path("./in.keras")
    elif how == "link":
        target.symlink_to(source)
    else:
        target.hardlink_to(source)
    with pytest.raises(RewriteError, match="was read"):
        save(model, target, inputs=(source,))
    assert source.read_bytes() == b"precious"


def test_inputs_that_are_not_paths_are_passed_over(model, tmp_path):
    save(model, tmp_path / "m.keras", inputs=(model, None))


@pytest.mark.parametrize(
    ("name", "message"),
    [("m.onnx", "ends in"), ("nowhere/m.keras", "folder"), ("old.keras", "exists")],
)
def test_refused_before_writing(model, tmp_path, name, message):
    (tmp_path / "old.keras").write_bytes(b"old")
    with pytest.raises(RewriteError, match=message):
        save(model, tmp_path / name, overwrite=False)
    assert [p.name for p in tmp_path.iterdir()] == ["old.keras"]


def test_a_failure_leaves_nothing_behind(model, tmp_path, monkeypatch):
    def fails(model, path):
        pathlib.Path(path).write_bytes(b"half")
        raise OSError("disk full")

    path = tmp_path / "m.keras"
    path.write_bytes(b"old")
    monkeypatch.setattr(keras.saving, "save_model", fails)
    with pytest.raises(RewriteError, match="disk full"):
        save(model, path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


KILLED = """
import sys, pathlib, signal, zipfile
import keras
from rewriters.saving import save

def stop(*args, **kwargs):
    print("half written", flush=True)
    signal.pause()

{patch}
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
save(model, sys.argv[1])
"""
PATCHES = {
    "while the archive is written": "zipfile.ZipFile.close = stop",
    "before the new file takes the name": "pathlib.Path.replace = stop",
}


@pytest.mark.parametrize("moment", mostly_ci(PATCHES, ["while the archive is written"]))
def test_a_killed_process_leaves_the_old_file_whole(model, tmp_path, moment):
    path = tmp_path / "m.keras"
    save(model, path)
    old = path.read_bytes()
    program = KILLED.format(patch=PATCHES[moment])
    root = str(pathlib.Path(__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert line.strip() == "half written"
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == old
    assert load(path).name == "net"
