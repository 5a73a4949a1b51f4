"""Any saved Keras model, of any generation, as a Keras 3 model.

saved = read(path)                 which format, by content; config and arrays
spec = modernize(saved)            the config in Keras 3's terms
model = build(spec)                layers and graph, no memory for weights yet
initialize(match(model, saved))    every array to its variable, shapes checked
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras

from rewriters import private
from rewriters.arguments import Path, taking
from rewriters.errors import RewriteError, reason
from rewriters.formats import (
    adapted,
    archive,
    budget,
    files,
    hdf5,
    keras3,
    savedmodel,
    training,
    trust,
    vocabulary,
    weights,
)
from rewriters.formats.build import (
    CannotCallError,
    build,
    check_size,
    deferred,
    discard,
    initialize,
    makes_variables_of_values,
    set_trainable,
)
from rewriters.formats.foreign import Conversion as Conversion
from rewriters.formats.foreign import alias as alias
from rewriters.formats.modernize import modernize
from rewriters.formats.saved import Saved
from rewriters.formats.spec import Spec, has_own_classes, has_states, without_states
from rewriters.transfer import finalize


_POINTER = b"version https://git-lfs"


@taking()
def load(
    path: Path,
    *,
    custom_objects: Mapping[str, Any] | None = None,
    lambdas: Mapping[str, Callable[..., Any]] | None = None,
    safe_mode: bool = True,
    compile: bool = True,
) -> keras.Model:
    """Returns the model saved at `path`, as a Keras 3 model of stock layers.

    Reads `.h5` and `.hdf5` files of Keras 1, 2 and 3, `.keras` archives of Keras 2
    and 3, zipped or not, and SavedModel directories of Keras 2; told apart by
    content, not by name. Layers of tensorflow-addons and keras-contrib become
    Keras's own where these compute the same. Names, trainable flags, dtype policies,
    vocabularies and sharing are kept.

    Args:
        path: file or directory.
        custom_objects: classes and functions by the name that the file uses.
        lambdas: functions by the name of the `Lambda` or TensorFlow operation layer
            that they replace; a name that no such layer has is an error.
        safe_mode: if True, the default, no code from the file is run, and a
            `Lambda` without a function in `lambdas` is an error.
        compile: whether to restore optimizer, loss and metrics. What cannot be
            restored is left out with one warning.

    Raises:
        RewriteError: naming the file, if it is not a saved model, is damaged, or
            holds what has no counterpart here.
    """
    path = os.fspath(path)
    custom_objects = dict(custom_objects or {})
    lambdas = dict(lambdas or {})
    drawn = random.getstate()
    try:
        with _opened(path) as source, contextlib.closing(read(source)) as saved:
            trust.check_extent(saved.config)
            if saved.generation == 3 and saved.tree is not None:
                return keras3.load(
                    source, saved, custom_objects, lambdas, safe_mode, compile
                )
            trust.check(saved.config, custom_objects, safe_mode)
            spec = modernize(saved, custom_objects, lambdas, safe_mode)
            adapted.complete(spec, saved)
            budget.current().building()
            with private.safe_mode_scope(safe_mode):
                model = _assemble(spec, saved, custom_objects)
            if compile:
                training.restore(model, saved, custom_objects)
            return model
    except Exception as e:
        random.setstate(drawn)  # layers made on the way drew seeds
        raise _refused(path, e) from e


def _refused(path: str, e: Exception) -> RewriteError:
    if isinstance(e, RewriteError):
        what = f"Cannot load {path!r}: {e.what}"
        return RewriteError(what, got=e.got, expected=e.expected, fix=e.fix)
    return RewriteError(
        f"Cannot load {path!r}",
        got=f"{type(e).__name__}: {reason(e)}",
        expected="a file that model.save wrote, whole",
        fix="Fetch or save it again. If it is sound, load it with the Keras that "
        "wrote it, and save it from there",
    )


def read(source: str | io.BytesIO) -> Saved:
    """Reads the config and finds the arrays of the saved model in `source`: a path, or
    an archive in memory."""
    try:
        return _reader(source).read(source)
    except RewriteError:
        raise
    except Exception as e:
        raise RewriteError(
            "The file is damaged",
            got=f"{type(e).__name__}: {reason(e)}",
            expected="what model.save wrote, whole",
            fix="Fetch or save it again",
        ) from e


def _reader(source: str | io.BytesIO) -> Any:
    if isinstance(source, io.BytesIO):
        return archive
    place = pathlib.Path(source)
    if place.is_dir():
        return savedmodel
    head = _head(place)
    for module in (hdf5, archive):
        if head.startswith(module.MAGIC):
            return module
    raise _unknown("an empty file" if not head else f"a file that starts with {head!r}")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[str | io.BytesIO]:
    """The path, or an archive of the folder that `zipped=False` made, and the budget of
    its files, each found to be a regular one inside the folder."""
    place = pathlib.Path(path)
    files.check_target(place)
    if not place.is_dir():
        with budget.opened(files.stored(place)):
            yield path
        return
    kind = next((x for x in (archive, savedmodel) if x.is_folder(place)), None)
    if kind is None:
        raise _unknown("a directory without saved_model.pb or model.weights.h5")
    names = list(kind.members(place))
    found = [files.inside(place, name) for name in names]
    for file in found:
        _head(file)
    with budget.opened(sum(map(files.stored, found))):
        yield archive.zipped(place, names) if kind is archive else path


def _assemble(spec, saved: Saved, custom_objects: dict[str, Any]) -> keras.Model:
    with keras.saving.custom_object_scope(custom_objects):
        try:
            if has_states(spec):  # these are made, of values, with the layer
                raise CannotCallError("The model keeps states between batches")
            with deferred():
                model = build(spec)
                set_trainable(model, spec)
                pairs = weights.match(model, spec, saved)
            initialize(weights.values(pairs))
        except ValueError as e:
            if not makes_variables_of_values(e):
                raise
            # Stateful recurrent layers, and custom ones that make variables of
            # values, are built at once, when their sizes are known.
            _check_stateful(spec, saved)
            model = build(spec)
            set_trainable(model, spec)
            for variable, array in weights.match(model, spec, saved):
                variable.assign(array.read())
        finally:
            discard()
    for layer in private.flatten_layers(model):
        finalize(layer)
    vocabulary.restore(model, spec, saved)
    return model


def _check_stateful(spec: Spec, saved: Saved) -> None:
    plain = without_states(spec)
    try:
        with deferred():
            check_size(build(plain), saved.stored_bytes(), stateful=True)
    except Exception as e:
        # A class of the caller's is built as it is; of stock layers nothing is left
        # that makes variables of values.
        if not makes_variables_of_values(e) or not has_own_classes(plain):
            raise
    finally:
        discard()


def _head(file: pathlib.Path) -> bytes:
    """The first bytes of a file, unless they are those of what Git LFS leaves in place
    of one that it has not fetched."""
    with file.open("rb") as f:
        head = f.read(len(_POINTER))
    if head == _POINTER:
        raise RewriteError(
            "The model was not fetched with its repository",
            got=f"a Git LFS pointer in {file.name}",
            expected="the file that it points to",
            fix="Run `git lfs pull` there",
        )
    return head[:8]


def _unknown(got: str) -> RewriteError:
    return RewriteError(
        "It is not a saved Keras model",
        got=got,
        expected="an .h5 or .keras file, or a SavedModel directory",
        fix="Give what model.save wrote",
    )
