"""`.keras` archives of Keras 3: Keras reads them itself, once they are known sound."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from typing import IO, Any

import h5py
import keras

from rewriters import private
from rewriters.errors import RewriteError, reason
from rewriters.formats import archive, budget, hdf5, trust
from rewriters.formats.build import (
    check_size,
    deferred,
    discard,
    makes_variables_of_values,
)
from rewriters.formats.earlier import by_keras, entries, translate
from rewriters.formats.modernize import check_names, problems
from rewriters.formats.saved import Saved


def load(
    source: str | io.BytesIO,
    saved: Saved,
    custom_objects: dict[str, Any],
    lambdas: dict[str, Callable[..., Any]],
    safe_mode: bool,
    compile: bool,
) -> keras.Model:
    """Returns the model in the Keras 3 archive `source`, a path or a stream.

    Classes and Lambdas are resolved over the whole config first, so that one error
    names all that is missing; then the model is built without memory, and its size
    compared with what the archive holds.
    """
    given = dict(custom_objects)
    error = _missing(saved.config, given, lambdas, safe_mode)
    trust.check(saved.config, given, safe_mode)
    if error:  # what no file may name comes before what the caller could give
        raise error
    changed = translate(saved.config, saved.version) or bool(lambdas)
    budget.current().building()
    _check_size(saved, given, safe_mode)
    saved.close()  # its weights are in memory, as Keras's reading them is next
    arguments = {"custom_objects": given, "safe_mode": safe_mode}
    with archive.for_keras(source, saved.config if changed else None) as stream:
        if compile and saved.training:
            try:
                trust.check_training(_compiled(saved.config), given)
                return private.load_archive(stream, compile=True, **arguments)
            except Exception as e:
                stream.seek(0)
                model = _without_training(stream, arguments)
                warnings.warn(
                    f"The model is not compiled: {reason(e)}",
                    stacklevel=3,
                )
                return model
        return _without_training(stream, arguments)


def _without_training(stream: IO[bytes], arguments: dict[str, Any]) -> keras.Model:
    try:
        return private.load_archive(stream, compile=False, **arguments)
    except ValueError as e:
        said = [line.strip() for line in str(e).splitlines() if line.strip()]
        if not said or "could not be loaded" not in said[0]:
            raise
        raise RewriteError(
            "The weights in the file do not fit the model",
            got=" ".join(said[1:2] or said)[:300],
            expected="one array of the right shape for every weight of the model",
            fix="The file is damaged: fetch or save it again",
        ) from e


def _missing(
    config: dict[str, Any],
    custom_objects: dict[str, Any],
    lambdas: dict[str, Callable[..., Any]],
    safe_mode: bool,
) -> RewriteError | None:
    """Puts given functions in place of Lambdas; returns the error that says what is
    missing."""
    missing: dict[str, str] = {}
    refused: list[str] = []
    found: list[str] = []
    for entry in entries({k: v for k, v in config.items() if k != "compile_config"}):
        kind, inner = entry["class_name"], entry["config"]
        if kind == "Lambda" and isinstance(inner, dict) and "function" in inner:
            name = str(inner.get("name"))
            found.append(name)
            if name in lambdas:
                inner["function"] = _reference(name)
                custom_objects[_reference(name)["config"]] = lambdas[name]
            elif safe_mode and "__lambda__" in json.dumps(inner["function"]):
                refused.append(name)
            continue
        if kind in trust.PLAIN or kind == "__lambda__":
            continue
        if kind == "function":
            names = [inner, entry.get("registered_name")]
            label = str(inner)
        else:
            names = [entry.get("registered_name"), kind]
            label = str(entry.get("registered_name") or kind)
        known = any(n in custom_objects for n in names) or any(
            keras.saving.get_registered_object(n) for n in names if n
        )
        if known or (by_keras(entry) and not trust.is_unknown_function(entry)):
            continue
        missing[label] = kind if kind != "function" else str(inner)
    check_names(lambdas, found)
    return problems(missing=missing, refused=refused)


def _reference(name: str) -> dict[str, Any]:
    key = f"given>{name}"
    return {
        "module": "rewriters",
        "class_name": "function",
        "config": key,
        "registered_name": key,
    }


def _check_size(saved: Saved, custom_objects: dict[str, Any], safe_mode: bool) -> None:
    """Raises if the model is larger than all arrays of the archive together."""
    stored = 0

    def count(name: str, item: Any) -> None:
        nonlocal stored
        if isinstance(item, h5py.Dataset):
            hdf5.array(saved.tree, name)
            stored += item.id.get_storage_size()

    saved.tree.visititems(count)
    config = trust.untrained(saved.config)
    stateful = False
    for entry in entries(config):  # a state is made at once, and sized below
        inner = entry["config"]
        if isinstance(inner, dict) and inner.get("stateful"):
            inner["stateful"], stateful = False, True
    try:
        with deferred():
            model = keras.saving.deserialize_keras_object(
                config, custom_objects=custom_objects, safe_mode=safe_mode
            )
            if not isinstance(model, keras.Model):
                raise RewriteError("The archive holds no model", got=type(model))
            check_size(model, stored, stateful)
    except Exception as e:
        own = any(trust.is_known(x, custom_objects) for x in entries(saved.config))
        if not makes_variables_of_values(e) or not own:
            raise
        return  # a class of the caller's: Keras will check
    finally:
        discard()


def _compiled(config: Any) -> list[Any]:
    return [entry.get("compile_config") for entry in entries(config)]
