"""Arguments that several commands take, and what may be wrong with them."""

from __future__ import annotations

import argparse
import ast
import importlib.util
from pathlib import Path
from typing import Any


OUTPUT_SUFFIXES = (".keras", ".h5", ".hdf5")


def nothing(args: argparse.Namespace) -> str | None:
    """The check of a command whose arguments cannot be wrong together."""
    return None


def check_output(args: argparse.Namespace) -> str | None:
    """What is wrong with where the result should go, before any work is done."""
    out: Path = args.out
    if out.suffix not in OUTPUT_SUFFIXES:
        return f"-o {out}: the name must end in {' or '.join(OUTPUT_SUFFIXES)}"
    if not out.absolute().parent.is_dir():
        return f"-o {out}: the folder {out.absolute().parent} does not exist"
    if out.is_dir():
        return f"-o {out} is a folder"
    if out.exists() and args.model.exists() and out.samefile(args.model):
        return f"-o {out} is the input: give another name, an input is never written"
    return None


def check_plot(path: Path | None) -> str | None:
    """What is wrong with asking for a figure."""
    if path and importlib.util.find_spec("matplotlib") is None:
        return "a figure needs matplotlib: pip install kerasnorm[plots]"
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
