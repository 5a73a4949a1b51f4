"""Files made to hurt, below the config: one error each, quickly, and nothing touched.

Each group of cases is loaded in one process of its own. A folder of secrets, into which
links, external datasets and names of members lead, is watched by the system: neither
the process nor its children may open anything there.
"""

import ctypes
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import traceback
import warnings

import hostile_hdf5  # noqa: F401
import pytest
from hostile_folders import CASES, SOUND


SECONDS = 10
BYTES = 2 << 30
TESTS = pathlib.Path(__file__).parent

# The process that loads them.


def write_sound(folder):
    import keras

    def net(k):
        inputs = k.Input((8,), name="x")
        x = k.layers.Dense(8, name="first")(inputs)
        x = k.layers.BatchNormalization(name="bn")(x)
        model = k.Model(inputs, k.layers.Dense(3, name="last")(x), name="net")
        model.compile("adam", "mse")
        return model

    model = net(keras)
    model.save(folder / "k3.h5")
    model.save(folder / "k3.keras")
    model.save(folder / "folder", zipped=False)
    (folder / "folder" / "assets").mkdir(exist_ok=True)
    try:
        import tf_keras
    except ImportError:
        return
    model = net(tf_keras)
    model.save(str(folder / "k2.h5"))
    model.save(str(folder / "saved"), save_format="tf")


class Watch:
    """Whether anyone opens a file in a folder, by the system's own word (Linux)."""

    def __init__(self, folder):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self.libc.inotify_init1(os.O_NONBLOCK)
        self.folder = folder
        self.start()

    def start(self):
        opened = 0x20
        for place in (self.folder, *self.folder.rglob("*")):
            self.libc.inotify_add_watch(self.fd, str(place).encode(), opened)
        self.opened()

    def opened(self):
        try:
            return bool(os.read(self.fd, 1 << 16))
        except BlockingIOError:
            return False


def child(group, folder):
    """Loads every case of the group and prints one line of JSON for each."""
    import logging

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.path.insert(0, str(TESTS.parent))
    import keras

    from rewriters.errors import RewriteError
    from rewriters.formats import load

    folder = pathlib.Path(folder)
    sound, secrets, temporary = (folder / x for x in ("sound", "secrets", "temporary"))
    for place in (sound, secrets, temporary):
        place.mkdir()
    write_sound(sound)
    tempfile.tempdir = str(temporary)
    watch = Watch(secrets)
    for i, make in enumerate(CASES[group]):
        name = make.__name__
        own = folder / str(i)
        own.mkdir()
        try:
            path = make(own, sound, secrets)
        except FileNotFoundError:  # tf_keras is not installed
            continue
        watch.start()
        print(json.dumps({"case": name}), flush=True)
        state = [os.environ.copy(), keras.config.floatx(), descriptors()]
        start, error = cpu(), ""
        try:
            load(path)
            error = "" if name in SOUND else "loaded"
        except RewriteError as e:
            error = f"refused: {e}" if name in SOUND else ""
            if str(path) not in str(e):
                error = f"does not name the file: {e}"
            if "custom_objects" in str(e) or len(str(e)) > 2000:
                error = f"an odd error: {str(e)[:500]}"
            said = str(e)
        except BaseException:
            error = traceback.format_exc()
        else:
            said = "loaded"
        seconds = cpu() - start
        if seconds > SECONDS:
            error += f" took {seconds:.1f} s"
        if watch.opened():
            error += " opened a secret"
        if list(temporary.iterdir()):
            error += " left temporary files"
        after = [os.environ.copy(), keras.config.floatx(), descriptors()]
        if state != after:
            error += " changed the process"
        print(json.dumps({"error": error, "said": said, "cpu": seconds}), flush=True)
    load(sound / "k3.keras")
    load(sound / "k3.h5")
    print(json.dumps({"peak": peak(), "children": peak_of_children()}), flush=True)


def descriptors():
    return len(list(pathlib.Path("/proc/self/fd").iterdir()))


def cpu():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak():
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = (x for x in status if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def peak_of_children():
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


@pytest.mark.ci
@pytest.mark.skipif(sys.platform != "linux", reason="watched by Linux's inotify")
@pytest.mark.parametrize("group", CASES)
def test_each_is_one_error_and_touches_nothing(tmp_path, group):
    run = subprocess.run(
        [sys.executable, __file__, group, tmp_path],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        check=False,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines() if line[:1] == "{"]
    names = [x["case"] for x in lines if "case" in x]
    ended = [x for x in lines if "error" in x]
    assert run.returncode == 0, f"{names[-1:]} ended it: {run.stderr[-2000:]}"
    bad = {n: e for n, e in zip(names, ended, strict=True) if e["error"]}
    assert not bad, bad
    assert lines[-1]["peak"] < BYTES
    assert lines[-1]["children"] < BYTES


if __name__ == "__main__":
    child(*sys.argv[1:])
