"""What the commands share once the arguments are known to be right."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from rewriters import RewriteError, private
from rewriters.formats import load


def read_model(args: argparse.Namespace) -> keras.Model:
    own = {reference.partition("=") for reference in args.custom}
    return load(
        args.model,
        custom_objects={
            name or target.rpartition(":")[2]: imported(target)
            for target, _, name in own
        },
        lambdas={
            name: imported(target)
            for name, _, target in (given.partition("=") for given in args.replace)
        },
        safe_mode=not args.unsafe,
    )


def imported(reference: str) -> Any:
    """What `module:attribute` names, in an installed module or one that lies here."""
    module, _, attribute = reference.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module is the user's: it may raise anything
        raise RewriteError(
            "nothing of this name can be imported",
            got=f"{reference!r} ({type(error).__name__}: {error})",
            fix="Check the spelling, and that the module is installed or lies here",
        ) from error


def read_data(path: Path, model: keras.Model) -> tuple[list[Any], Any]:
    """The inputs and the labels that a file holds.

    Inputs are the array of an .npy file; of an .npz file, the one array, `x`, the
    arrays named as the model's inputs, or `x0, x1, ...`. Labels are the array `y` of
    an .npz file, None where there is none.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = dict(loaded) if hasattr(loaded, "files") else {"x": loaded}
        other = [k for k, a in arrays.items() if not isinstance(a, np.ndarray)]
        if other:
            raise TypeError(f"no array: {', '.join(other[:3])}")
    except Exception as error:  # NumPy, zip and zlib each raise their own
        raise RewriteError(
            "the data cannot be read",
            got=f"{path} ({error})",
            expected="an .npy or .npz file of plain arrays",
        ) from error
    scalars = [name for name, a in arrays.items() if not a.ndim]
    if scalars:
        raise RewriteError(
            "the data holds single numbers",
            got=f"{path} with {', '.join(scalars)} of shape ()",
            expected="arrays whose first axis counts the samples",
        )
    names = [tensor.name for tensor in getattr(model, "inputs", None) or ()]
    numbered = [f"x{i}" for i in range(max(len(names), 1))]
    choices = [names, numbered]
    if len(numbered) == 1:
        choices += [["x"], list(arrays)] if len(arrays) == 1 else [["x"]]
    for wanted in choices:
        if wanted and set(wanted) <= set(arrays):
            return [arrays[name] for name in wanted], arrays.get("y")
    raise RewriteError(
        "the data file does not say which array is which input",
        got=f"{path} with {', '.join(arrays) or 'no array'}",
        expected=", ".join(numbered) if len(names) > 1 else "one array, or one named x",
    )


def write(*outputs: tuple[Path | None, Callable[[Path], Any]]) -> list[str]:
    """Writes what has a path; the lines that say so."""
    asked = [(path, save) for path, save in outputs if path]
    for path, save in asked:
        save(path)
    return [f"saved {path}" for path, _ in asked]


def describe(args: argparse.Namespace, model: keras.Model) -> dict[str, Any]:
    def shapes(tensors: Any) -> list[list[int | None]] | None:
        return None if tensors is None else [list(t.shape) for t in tensors]

    return {
        "file": str(args.model),
        "class": type(model).__name__,
        "name": model.name,
        "inputs": shapes(getattr(model, "inputs", None)),
        "outputs": shapes(getattr(model, "outputs", None)),
        "layers": sum(1 for _ in private.flatten_layers(model, include_self=False)),
        "parameters": int(model.count_params()) if model.built else None,
        "compiled": bool(model.compiled),
    }


def headline(d: dict[str, Any]) -> str:
    ends = [
        " ".join(map(shape, d[k] or ())) or "unknown" for k in ("inputs", "outputs")
    ]
    size = "not built" if d["parameters"] is None else f"{d['parameters']:,} parameters"
    return (
        f"{d['file']}: {d['class']} {d['name']!r}, {d['layers']} layers, {size},"
        f" {ends[0]} -> {ends[1]}"
    )


def shape(shape: Sequence[int | None]) -> str:
    return f"({', '.join('*' if n is None else str(n) for n in shape)})"
