"""Regular files inside the target only: no links out of it, no pipes, no devices.

The path that the user gives may be a link. What lies inside a folder comes from whoever
wrote the folder: a link there would read another file of this machine into the model,
and a pipe or a device would never end.
"""

from __future__ import annotations

import os
import pathlib
import stat
from collections.abc import Callable, Iterator

from rewriters.errors import RewriteError
from rewriters.formats import budget


def check_target(path: pathlib.Path) -> None:
    """Raises unless `path` is a regular file or a folder, or a link to one."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise RewriteError("There is no such file", fix="Check the path") from None
    except OSError as e:  # a link to itself, a name too long
        raise RewriteError(
            "The path cannot be followed", got=e.strerror, fix="Check the path"
        ) from e
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise _refused(path.name, mode)


def inside(folder: pathlib.Path, place: str) -> pathlib.Path:
    """Returns the regular file at `place`, a path relative to `folder`.

    Raises:
        RewriteError: if it is missing, or if it or a folder on the way is a link, or
            it is a pipe, a device or a socket.
    """
    *above, _ = pathlib.PurePosixPath(place).parents
    for parent in reversed(above):
        _check(folder, str(parent), stat.S_ISDIR)
    _check(folder, place, stat.S_ISREG)
    return folder / place


def walk(folder: pathlib.Path, inner: str) -> Iterator[str]:
    """Yields the place in `folder` of every file below its folder `inner`.

    Raises:
        RewriteError: if one of them, or a folder, is a link, a pipe or a device.
    """
    _check(folder, inner, stat.S_ISDIR)
    todo = [f"{inner}/"]
    while todo:
        here = todo.pop()
        with os.scandir(folder / here) as entries:
            for entry in entries:
                place = f"{here}{entry.name}"
                budget.spend("members", what=repr(place))
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    todo.append(f"{place}/")
                elif stat.S_ISREG(mode):
                    yield place
                else:
                    raise _refused(place, mode)


def stored(path: pathlib.Path) -> int:
    """Bytes that a file has on disk: of a sparse one, without its holes."""
    size = path.stat().st_size
    if not hasattr(os, "SEEK_DATA"):
        return size
    # Not `st_blocks`, which some file systems only know seconds after a write.
    found = end = 0
    with path.open("rb") as file:
        for _ in range(_EXTENTS):
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            except OSError:  # no data after this
                return min(found, size)
            found += end - start
            if end >= size:
                return min(found, size)
    return min(found, size)


_EXTENTS = 10_000


def _check(folder: pathlib.Path, place: str, wanted: Callable[[int], bool]) -> None:
    try:
        mode = (folder / place).lstat().st_mode
    except FileNotFoundError:
        raise RewriteError(
            f"{place!r} is missing",
            expected="the whole folder that Keras wrote",
            fix="Fetch or save it again",
        ) from None
    if not wanted(mode):
        raise _refused(place, mode)


def _refused(place: str, mode: int) -> RewriteError:
    kinds = {
        stat.S_ISLNK: "a symbolic link",
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISDIR: "a folder",
    }
    kind = next((k for test, k in kinds.items() if test(mode)), "a device or other")
    return RewriteError(
        f"{place!r} is not a regular file",
        got=kind,
        expected="the model's files themselves",
        fix="Copy the files that the links name, as `cp -rL` does"
        if stat.S_ISLNK(mode)
        else "Give what model.save wrote",
    )
