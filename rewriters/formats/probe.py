"""Whether a native library survives a damaged file, tried where a crash costs nothing.

libhdf5 trusts what a file says of itself: of some thousands of files with a few bytes
changed, one ends the process with a segmentation fault. The structure of a file is
therefore walked once in a forked child, which ends when it is done. The fork takes
milliseconds; where there is none (Windows), the file is read without the trial.
"""

from __future__ import annotations

import os
import select
import signal
import warnings
from collections.abc import Callable

import h5py

from rewriters.errors import RewriteError


_SECONDS = 6.0


def check_structure(open_file: Callable[[], h5py.File]) -> None:
    """Raises a `RewriteError` if walking through the file crashes or does not end."""
    if hasattr(os, "fork") and not _survives(lambda: _walk(open_file)):
        raise RewriteError(
            "The HDF5 file is damaged",
            got="a structure that cannot be followed",
            expected="the groups and arrays that Keras wrote",
            fix="Fetch or save it again",
        )


def _walk(open_file: Callable[[], h5py.File]) -> None:
    """Touches all that a reader may: every group, link, attribute and packed array."""
    with open_file() as file:
        todo: list[h5py.Group] = [file]
        seen = set()
        while todo:
            item = todo.pop()
            if item.id.__hash__() in seen:
                continue
            seen.add(item.id.__hash__())
            for key in item.attrs:
                item.attrs[key]
            if isinstance(item, h5py.Dataset):
                _ = item.shape, item.dtype, item.external, item.is_virtual
                if item.chunks is not None and item.nbytes < 1 << 24:
                    item[()]
                continue
            for name in item:
                if isinstance(item.get(name, getlink=True), h5py.HardLink):
                    todo.append(item[name])


def _survives(action: Callable[[], None]) -> bool:
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # The child runs nothing but this walk, none of what they warn of.
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        _child(action)
    os.close(writing)
    try:
        ended, _, _ = select.select([reading], [], [], _SECONDS)
        if not ended:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(reading)
    return bool(ended) and os.WIFEXITED(status)


def _child(action: Callable[[], None]) -> None:
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)  # the crash is the answer, its trace is noise
        action()
    except BaseException:  # an error is not a crash: the reader will meet it again
        pass
    finally:
        os._exit(0)
