"""Saving a model so that the file is either the old one or the new one, whole."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from rewriters.errors import RewriteError, reason


SUFFIXES = (".keras", ".h5", ".hdf5")


def save(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    inputs: Iterable[Any] = (),
    overwrite: bool = True,
) -> pathlib.Path:
    """Saves `model` at `path`, and returns the path.

    The model is written to a new file in the same folder, which takes the name
    `path` only when it is complete and on the disk. A process that is killed leaves
    the old file as it was.

    Args:
        model: the model.
        path: where to; ends in `.keras`, or in `.h5` or `.hdf5` for Keras's older
            format.
        inputs: files that the model was made from; `path` may not be one of them,
            by whatever name. What is not a path is passed over.
        overwrite: whether `path` may exist. Defaults to True.

    Raises:
        RewriteError: before anything is written, if `path` cannot be the target;
            after it, with nothing left behind, if the model cannot be saved.
    """
    check_target(path, inputs=inputs, overwrite=overwrite)
    try:
        with replacing(path) as partial:
            keras.saving.save_model(model, partial)
    except Exception as e:
        raise RewriteError(
            f"The model {model.name!r} could not be saved at {str(path)!r}",
            got=f"{type(e).__name__}: {reason(e)}",
            fix="Nothing was changed",
        ) from e
    return pathlib.Path(path)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A file to write in place of `path`, which takes that name when it is complete
    and on the disk; where writing it fails, `path` stays as it was.

    Raises:
        RewriteError: there is no such folder, or `path` is one.
    """
    _check_place(path)
    target = pathlib.Path(path).resolve()  # a link stays, what it points to is replaced
    folder = tempfile.TemporaryDirectory(
        prefix=".saving_", dir=target.parent, ignore_cleanup_errors=True
    )
    with folder as near:
        partial = pathlib.Path(near, target.name)
        yield partial
        if target.exists():
            shutil.copymode(target, partial)
        _to_disk(partial)
        partial.replace(target)
        _to_disk(target.parent)


def check_target(
    path: str | os.PathLike[str],
    *,
    inputs: Iterable[Any] = (),
    overwrite: bool = True,
) -> None:
    """Refuses what `save` would refuse of these arguments before it writes.

    Raises:
        RewriteError: `path` cannot be the target.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise RewriteError(
            "The target is no path", got=repr(path), expected="a str or a pathlib.Path"
        )
    target = pathlib.Path(path)
    if target.suffix not in SUFFIXES:
        raise RewriteError(
            "The file's name does not tell its format",
            got=repr(str(target)),
            expected=f"a name that ends in {', '.join(SUFFIXES)}",
        )
    _check_place(target)
    for source in inputs:
        if isinstance(source, (str, os.PathLike)) and _same(target, source):
            raise RewriteError(
                "The target is the file that was read",
                got=repr(str(target)),
                expected="another file",
                fix="Give another name, and replace the old file yourself",
            )
    if target.exists() and not overwrite:
        raise RewriteError(
            "The target exists",
            got=repr(str(target)),
            fix="Give another name, or pass overwrite=True",
        )


def _check_place(path: str | os.PathLike[str]) -> None:
    target = pathlib.Path(path)
    if not target.resolve().parent.is_dir():
        raise RewriteError(
            "There is no such folder",
            got=repr(str(target.parent)),
            fix="Make it first",
        )
    if target.is_dir():
        raise RewriteError("The target is a folder", got=repr(str(target)))


def _same(target: pathlib.Path, source: str | os.PathLike[str]) -> bool:
    other = pathlib.Path(source)
    if target.exists() and other.exists():
        return target.samefile(other)
    return target.resolve() == other.resolve()


def _to_disk(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some file systems do not sync folders
        if path.is_file():
            raise
    finally:
        os.close(handle)
