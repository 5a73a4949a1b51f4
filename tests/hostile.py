"""Loads files made to hurt in a process of its own, and says what each did there.

    with Process(folder) as process:
        answer = process.load(path)        # "refused", "sound" or "raw", problems

The process watches itself: what is opened, connected, run, imported and executed, by
Python's audit events; whether anything in the folder of secrets is opened, by the
system's own word; the settings of Keras and Python; CPU seconds and memory; temporary
files; whether the next sound file still loads to the same numbers. It takes one file
after the other, and a file that ends it or never returns is told from the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import threading


ROOT = pathlib.Path(__file__).resolve().parents[1]
STDLIB = pathlib.Path(os.__file__).parent
SECONDS = 10  # of CPU for each file
BYTES = 2 << 30  # above what the process took before it
# A wall clock only ends what hangs: a busy machine is not a fault of the file.
PATIENCE = 120
MESSAGE = 6000


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of one file.

    Attributes:
        kind: "refused", "sound", "raw" for another exception, "dead" if the process
            ended and "late" if it never answered.
        problems: promises that the file broke; empty for a file that was handled well.
        text: the message, or the exception's traceback.
        warnings: what it warned of.
        seconds: of CPU.
        grown: bytes that the process took at most above what it held before.
    """

    kind: str
    problems: tuple[str, ...]
    text: str = ""
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    grown: int = 0

    def against(self, expected: str) -> list[str]:
        """The problems, and the kind where it is not the one expected: "refused",
        "sound", or "either"."""
        right = ("refused", "sound") if expected == "either" else (expected,)
        wrong = [] if self.kind in right else [f"{self.kind}, expected {expected}"]
        return [*wrong, *self.problems]


class Process:
    """A process that loads files, started again after one that ended it.

    Args:
        folder: an empty folder, where its secrets and temporary files lie.
        loader: "kerasnorm", or "keras" for `keras.saving.load_model`.
        every: after how many files the sound one is loaded.
        patience: seconds of waiting for an answer.

    Attributes:
        fresh: whether the next file will be the first of a new process.
    """

    def __init__(self, folder, loader="kerasnorm", every=1, patience=PATIENCE):
        self.folder, self.patience = pathlib.Path(folder), patience
        self.loader, self.every, self.count = loader, every, 0
        self.secrets = self.folder / "secrets"
        for name in ("secrets", "temporary", "away"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.sound = write_sound(self.folder / "sound.keras")
        self._run = self._lines = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _start(self):
        self._errors = (self.folder / "stderr").open("w+b")
        self._run = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", __file__, self.folder, self.loader],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=self.folder / "away",
            text=True,
            env={
                **os.environ,
                "TMPDIR": str(self.folder / "temporary"),
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
        )
        lines = self._lines = queue.SimpleQueue()
        out = self._run.stdout

        def read():
            for line in out:
                lines.put(line)
            lines.put("")

        threading.Thread(target=read, daemon=True).start()

    def load(self, path, **options) -> Answer:
        """Loads a file in the process; options as those of `kerasnorm.load`."""
        if self._run is None:
            self._start()
        self.count += 1
        sound = self.count % self.every == 0
        self._run.stdin.write(json.dumps([str(path), options, sound]) + "\n")
        self._run.stdin.flush()
        try:
            line = self._lines.get(timeout=self.patience)
        except queue.Empty:
            self._run.kill()
            self.close()
            return Answer("late", (f"no answer in {self.patience} s",))
        if not line:
            code = self._run.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace")[-2000:]
            self.close()
            return Answer("dead", (f"ended the process with {code}",), said)
        found = json.loads(line)
        problems = found.pop("problems")
        if found["seconds"] > SECONDS:
            problems.append(f"took {found['seconds']:.1f} s")
        if found["grown"] > BYTES:
            problems.append(f"took {found['grown'] / 1e9:.2f} GB")
        if any(p.startswith(("changed", "the next")) for p in problems):
            self.close()  # not to pin it on the files after this one
        return Answer(problems=tuple(problems), **found)

    @property
    def fresh(self):
        return self._run is None

    def close(self):
        if self._run is None:
            return
        with contextlib.suppress(OSError):
            self._run.stdin.close()
        try:
            self._run.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._run.kill()
            self._run.wait()
        self._run.stdout.close()
        self._errors.close()
        self._run = None


def write_sound(path):
    import keras

    if not path.exists():
        layers = [keras.layers.Dense(3), keras.layers.BatchNormalization()]
        keras.Sequential([keras.Input((4,)), *layers], name="sound").save(path)
    return path


# In the process.


class Watch:
    """Whether anyone opens a file in a folder, by the system's own word (Linux)."""

    def __init__(self, folder):
        import ctypes

        self.folder, self.fd = folder, None
        if sys.platform == "linux":
            self.libc = ctypes.CDLL(None, use_errno=True)
            self.fd = self.libc.inotify_init1(os.O_NONBLOCK)

    def start(self):
        opened, made, deleted = 0x20, 0x100, 0x200
        if self.fd is not None:
            for place in (self.folder, *self.folder.rglob("*")):
                events = opened | made | deleted
                self.libc.inotify_add_watch(self.fd, str(place).encode(), events)
        self.opened()

    def opened(self):
        try:
            return self.fd is not None and bool(os.read(self.fd, 1 << 16))
        except BlockingIOError:
            return False


# Events that no load has a use for, wherever they lead.
_NEVER = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.kill",
    "os.chdir",
    "os.chmod",
    "os.chown",
    "os.putenv",
    "os.unsetenv",
    "os.link",
    "os.symlink",
    "os.setxattr",
    "pickle.find_class",
    "sys.addaudithook",
    "sys.settrace",
    "sys.setprofile",
    "signal.",
    "urllib.",
    "http.",
    "ftplib.",
    "smtplib.",
    "webbrowser.",
    "cpython.run_",
    "gc.",
)
# Events whose first arguments are paths.
_PATHS = (
    "open",
    "os.listdir",
    "os.scandir",
    "os.walk",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "os.utime",
    "shutil.",
    "tempfile.",
    "glob.",
    "pathlib.",
    "ctypes.dlopen",
)


# The one place that forks, to try a library where a crash costs nothing.
_PROBE = str(ROOT / "rewriters" / "formats" / "probe.py")


class Audit:
    """What Python code does while `on`, as far as no load has a reason to do it."""

    def __init__(self, temporary, told):
        self.on, self.target, self.told = False, "", told
        packages = {pathlib.Path(p).resolve() for p in sys.path if p}
        self.read = tuple(
            str(real(p)) for p in (sys.prefix, sys.base_prefix, ROOT, *packages)
        )
        self.written = (str(real(temporary)),)
        sys.addaudithook(self)

    def say(self, what):
        """Into a file: a forked child has no other way to its parent's list."""
        os.write(self.told.fileno(), what[:300].encode(errors="replace") + b"\n")

    def found(self):
        """What was said since the last time, each once."""
        self.told.seek(0)
        lines = dict.fromkeys(self.told.read().decode(errors="replace").splitlines())
        self.told.seek(0)
        self.told.truncate()
        return list(lines)

    def __call__(self, event, arguments):
        if not self.on:
            return
        self.on = False  # what follows is the watch's own
        try:
            self._judge(event, arguments)
        finally:
            self.on = True

    def _judge(self, event, arguments):
        if event == "os.fork" and sys._getframe(2).f_code.co_filename == _PROBE:
            return
        if event.startswith(_NEVER):
            self.say(f"{event} {arguments!r}")
        elif event.startswith(_PATHS):
            # Its own steps name files relative to an open folder; the event of the
            # whole (`shutil.rmtree`) came before and was judged.
            if sys._getframe(2).f_code.co_filename == shutil.__file__:
                if not event.startswith("shutil."):
                    return
            reading = event in ("open", "os.listdir", "os.scandir", "ctypes.dlopen")
            if event == "open" and len(arguments) > 2:
                reading = not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            for path in arguments[: 1 if event == "open" else 2]:
                if isinstance(path, (str, bytes, os.PathLike)):
                    self._judge_path(event, os.fsdecode(path), reading)
        elif event in ("exec", "marshal.loads", "code.__new__"):
            self._judge_code(event, arguments)

    def _judge_path(self, event, path, reading):
        path = str(real(path))
        if path == os.devnull or path.endswith("/statm"):  # how much memory it holds
            return
        allowed = self.written
        if reading:
            allowed = (*self.written, *self.read, self.target)
        if not any(path == p or path.startswith(p + os.sep) for p in allowed):
            self.say(f"{event} {path}{'' if reading else ' to write'}")

    def _judge_code(self, event, arguments):
        """Code of installed packages and of Python's own makers of classes only."""
        frame = sys._getframe(3)
        caller = frame.f_code.co_filename
        if caller.startswith("<frozen importlib"):
            return
        if event == "exec":
            file = getattr(arguments[0], "co_filename", "")
            if file.startswith((*self.read, "<frozen")):
                return
        makers = (str(STDLIB / "dataclasses"), str(STDLIB / "collections"))
        if event != "marshal.loads" and caller.startswith(makers):
            return
        self.say(f"{event} by {caller}")


def real(path):
    """A path without links; of one that cannot be followed, the path."""
    try:
        return pathlib.Path(path).resolve()
    except (OSError, RuntimeError, ValueError):
        return pathlib.Path(path)


def settings():
    """What a load must leave as it was."""
    import gc
    import locale
    import random
    import signal
    import warnings

    import keras
    import numpy as np
    from keras.src import tree
    from keras.src.backend import config
    from keras.src.backend.common import global_state
    from keras.src.saving import serialization_lib

    numpy_state = np.random.get_state()  # noqa: NPY002 - the one that others draw from
    state = {
        "environment": dict(os.environ),
        "folder": str(pathlib.Path.cwd()),
        "Python's random numbers": hash(random.getstate()),
        "NumPy's random numbers": (numpy_state[0], hash(numpy_state[1].tobytes())),
        "NumPy's errors": np.geterr(),
        "recursion limit": sys.getrecursionlimit(),
        "search path": list(sys.path),
        "warning filters": len(warnings.filters),
        "signals": signal.getsignal(signal.SIGINT),
        "locale": locale.setlocale(locale.LC_ALL),
        "streams": (id(sys.stdout), id(sys.stderr)),
        "threads": threading.active_count(),
        "collector": gc.isenabled(),
        "tree": id(tree.flatten),
        "custom objects": set(keras.saving.get_custom_objects()),
        "unsafe deserialization": serialization_lib.in_safe_mode(),
        "policy": str(keras.config.dtype_policy()),
        "distribution": keras.distribution.distribution(),
        "seed": global_state.get_global_attribute("random_seed"),
        "interactive": keras.config.is_interactive_logging_enabled(),
        "tracebacks": keras.config.is_traceback_filtering_enabled(),
    }
    # Settings of Keras are its module's plain values.
    for name, value in vars(config).items():
        if isinstance(value, (str, int, float, type(None))) and name[:2] != "__":
            state[f"Keras's {name}"] = value
    if sys.platform == "linux":
        state["descriptors"] = len(list(pathlib.Path("/proc/self/fd").iterdir()))
    return state


def peak(start=False):
    """Most memory since `start`, in bytes; at the start, what is held now."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        if start:  # resets the mark
            with contextlib.suppress(OSError):
                pathlib.Path("/proc/self/clear_refs").write_text("5")
        name = "VmRSS:" if start else "VmHWM:"
        (line,) = (x for x in status.read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) * 1024
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def cpu():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def loaders(name):
    """The function that loads, and the exception that refuses."""
    if name == "keras":
        import keras

        return keras.saving.load_model, Exception
    from rewriters.errors import RewriteError
    from rewriters.formats import load

    return load, RewriteError


def unreadable(text):
    """What is wrong with a message."""
    found = []
    if len(text) > MESSAGE:
        found.append(f"a message of {len(text)} characters")
    if any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 for c in text):
        found.append(f"control characters in a message: {text[:200]!r}")
    return found


class Loader:
    """Loads one file after the other and watches."""

    def __init__(self, folder, name):
        import keras

        folder = pathlib.Path(folder)
        self.load, self.refusal = loaders(name)
        self.name, self.sound = name, folder / "sound.keras"
        self.temporary = folder / "temporary"
        # What is imported and made at the first load is no trace of a file.
        self.expected = self.numbers()
        with contextlib.suppress(Exception):
            self.load(ROOT / "nothing.keras")
        self.watch = Watch(folder / "secrets")
        told = (folder / "told").open("w+b", buffering=0)
        self.audit = Audit(self.temporary, told)
        self.keras = keras

    def numbers(self):
        model = self.load(self.sound)
        return [model.to_json(), *(float(abs(w).sum()) for w in model.get_weights())]

    def answer(self, path, options, sound=True):
        import resource
        import traceback
        import warnings

        self.watch.start()
        before, modules = settings(), set(sys.modules)
        held, start = peak(start=True), cpu()
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, (held + 2 * BYTES, -1))
        self.audit.target = str(real(path))
        problems, text = [], ""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            self.audit.on = True
            try:
                self.load(path, **options)
                kind = "sound"
            except self.refusal as e:
                kind, text = "refused", str(e)
            except BaseException:
                kind, text = "raw", traceback.format_exc()[-3000:]
                problems.append("raw exception")
            finally:
                self.audit.on = False
        seconds, grown = cpu() - start, peak() - held
        warned = [str(w.message) for w in told]
        if self.name == "kerasnorm":
            for said in [text if kind == "refused" else "", *warned]:
                problems += unreadable(said)
        problems += self.audit.found()[:5]
        if self.watch.opened():
            problems.append("opened a secret")
        left = [p.name for p in self.temporary.iterdir()]
        if left:
            problems.append(f"left temporary files: {left[:3]}")
            clear(self.temporary)
        after = settings()
        # Seeds of its layers are drawn, as when they are made.
        if kind == "sound" or self.name == "keras":
            before.pop("Python's random numbers")
        for key, value in before.items():
            if after.get(key) != value:
                problems.append(f"changed {key}: {value!r} to {after[key]!r}"[:300])
        problems += self.imported(modules)
        try:
            if sound and self.numbers() != self.expected:
                problems.append("the next sound file differs")
        except BaseException as e:
            problems.append(f"the next sound file fails: {e!r}"[:300])
        return {
            "kind": kind,
            "problems": problems,
            "text": text,
            "warnings": warned,
            "seconds": seconds,
            "grown": grown,
        }

    def imported(self, before):
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and not file.startswith(self.audit.read):
                yield f"imported {name} from {file}"


def clear(folder):
    for place in folder.iterdir():
        shutil.rmtree(place) if place.is_dir() else place.unlink()


def child(folder, name):
    """Answers one line on the real standard output for each line of the input."""
    import logging

    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # what libraries print is no answer
        sys.path.insert(0, str(ROOT))
        loader = Loader(folder, name)
        logging.disable(logging.WARNING)
        for line in sys.stdin:
            answer = loader.answer(*json.loads(line))
            print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    child(*sys.argv[1:])
