"""Whether a native library survives a damaged file, tried where a crash costs nothing.

libhdf5 trusts what a file says of itself: of some thousands of files with a few bytes
changed, one ends the process with a segmentation fault, and names of changing length
may ask for any memory. A file is therefore walked through once in a forked child, of
bounded memory and CPU time, which ends when it is done. The fork takes milliseconds;
where there is none (Windows), the walk is done in the process itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pathlib
import selectors
import signal
import time
import warnings
from collections.abc import Callable

from rewriters.errors import RewriteError
from rewriters.formats import budget


# A child that gives no sign of life for so long hangs; it gives one every half second
# of work, and a busy machine may leave it a hundredth of a processor.
_SILENCE = 60.0
_BEAT = 0.5

_last_beat = 0.0
_beats: int | None = None


def survives(walk: Callable[[], None]) -> None:
    """Runs `walk` in a child and raises if it crashes, hangs or asks for too much.

    Errors other than a `RewriteError` or one of memory are left to the reader.
    """
    if not hasattr(os, "fork"):
        with contextlib.suppress(OSError):
            walk()
        return
    verdict = _verdict(walk)
    if verdict is None:
        raise _damaged("a structure that cannot be followed")
    if verdict:
        raise RewriteError(verdict["what"], **verdict["rest"])


def alive() -> None:
    """Called between two parts of a walk: tells the parent that it goes on."""
    global _last_beat
    if _beats is not None and time.monotonic() - _last_beat > _BEAT:
        _last_beat = time.monotonic()
        os.write(_beats, b" ")


def _verdict(walk: Callable[[], None]) -> dict | None:
    """What the child said: {} if all is well, None if it did not come to its end."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # The child runs nothing but this walk, none of what they warn of.
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        _child(walk, writing)
    os.close(writing)
    said, ended = b"", False
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(reading, selectors.EVENT_READ)
            while not ended and selector.select(_SILENCE):
                part = os.read(reading, 1 << 16)
                said, ended = said + part.strip(), not part
    finally:
        os.close(reading)
        if not ended:
            os.kill(pid, signal.SIGKILL)
        # Where SIGCHLD is ignored, or handled by someone, there is nothing to wait for:
        # the pipe has the answer.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    return json.loads(said) if ended and said else None


def _child(walk: Callable[[], None], writing: int) -> None:
    global _beats
    try:
        faulthandler.disable()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)  # a crash is the answer, its trace is noise
        _bound()
        _beats = writing
        answer: dict = {}
        try:
            walk()
        except RewriteError as e:
            answer = _parts(e)
        except MemoryError:
            answer = _parts(_damaged("more memory asked for than it can need"))
        except BaseException:  # an error is not a crash: the reader will meet it again
            pass
        os.write(writing, json.dumps(answer).encode())
    finally:
        os._exit(0)


def _parts(error: RewriteError) -> dict:
    rest = {"got": str(error.got), "expected": error.expected, "fix": error.fix}
    return {"what": error.what, "rest": rest}


def _bound() -> None:
    """Limits the child's CPU time and memory by the file's budget."""
    import resource

    def limit(kind: int, value: int) -> None:
        _, hard = resource.getrlimit(kind)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (most, most))

    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_CPU, int(budget.current().seconds) + 1)
    with contextlib.suppress(OSError):  # Linux alone says what it holds already
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        more = budget.current().limits["bytes"] + (256 << 20)
        limit(resource.RLIMIT_AS, pages * resource.getpagesize() + more)


def _damaged(got: str) -> RewriteError:
    return RewriteError(
        "The HDF5 file is damaged",
        got=got,
        expected="the groups and arrays that Keras wrote",
        fix="Fetch or save it again",
    )
