"""Arguments that several commands take, and what may be wrong with them."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


MODELS = (".keras", ".h5", ".hdf5")
TEXTS = (".json", ".md")
IMAGES = (".png", ".svg", ".pdf")


def nothing(args: argparse.Namespace) -> str | None:
    """The check of a command whose arguments cannot be wrong together."""
    return None


def check_files(args: argparse.Namespace, **endings: Sequence[str]) -> str | None:
    """What is wrong with the files to write, before any work is done.

    Args:
        endings: how the path may end that the argument of this name gives.
    """
    inputs = [p for p in (args.model, getattr(args, "data", None)) if p and p.exists()]
    for name, allowed in endings.items():
        path: Path | None = getattr(args, name)
        if path is None:
            continue
        given, folder = f"--{name} {path}", Path(os.path.realpath(path)).parent
        if path.suffix not in allowed:
            return f"{given}: the name must end in {' or '.join(allowed)}"
        if not folder.is_dir():
            return f"{given}: the folder {folder} does not exist"
        if path.is_dir():
            return f"{given} is a folder"
        if path.exists() and any(map(path.samefile, inputs)):
            return f"{given} is an input: give another name, an input is never written"
        if path.suffix in IMAGES and importlib.util.find_spec("matplotlib") is None:
            return f"{given}: a figure needs matplotlib: pip install kerasnorm[plots]"
    return None


def setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def reference(text: str) -> str:
    module, colon, attribute = text.partition("=")[0].partition(":")
    if not (module and colon and attribute):
        raise argparse.ArgumentTypeError(f"{text!r} is not MODULE:CLASS")
    return text


def replacement(text: str) -> str:
    layer, equals, target = text.partition("=")
    if not (layer and equals and ":" in target.strip(":")):
        raise argparse.ArgumentTypeError(f"{text!r} is not LAYER=MODULE:FUNCTION")
    return text


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=Path,
        help=".h5, .hdf5, .keras, or a SavedModel folder; Keras 1, 2, 3",
    )
    parser.add_argument(
        "--custom",
        metavar="MODULE:CLASS[=NAME]",
        type=reference,
        action="append",
        default=[],
        help="a class or function of your own that the file refers to, under"
        " NAME if it has another there; repeat for more",
    )
    parser.add_argument(
        "--lambda",
        dest="replace",
        metavar="LAYER=MODULE:FUNCTION",
        type=replacement,
        action="append",
        default=[],
        help="a function to run in place of the code of a Lambda layer",
    )
    parser.add_argument(
        "--unsafe",
        action="store_true",
        help="run code held in the file: only for files you trust",
    )


def add_output(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "-o",
        "--out",
        metavar="OUT.keras",
        type=Path,
        required=required,
        help="where to write; never the input",
    )
