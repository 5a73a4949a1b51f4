"""Measure the properties that predict how a model trains."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kerasnorm_cli import Outcome
from kerasnorm_cli._arguments import IMAGES, TEXTS, add_model, check_files, positive


EXAMPLES = """
    kerasnorm measure model.keras --data images.npz
    kerasnorm measure model.keras --data images.npz --report properties.html
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_measured(parser)
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=positive,
        default=64,
        help="samples that pass together (default: %(default)s)",
    )


def add_measured(parser: argparse.ArgumentParser) -> None:
    """What every command that measures takes."""
    add = parser.add_argument
    add(
        "--data",
        metavar="X.npz",
        type=Path,
        required=True,
        help="inputs: .npz with x (or x0, x1, ... for several inputs), or .npy;"
        " labels, if there are any, as y in it",
    )
    add("--samples", metavar="N", type=positive, default=256, help="so many at most")
    add(
        "--report",
        metavar="R.html",
        type=Path,
        help="write a report: .html in one file with its figures, .json, .md,"
        " .png, .svg or .pdf",
    )


def check(args: argparse.Namespace) -> str | None:
    return check_files(args, report=(".html", *TEXTS, *IMAGES))


def run(args: argparse.Namespace) -> Outcome:
    from kerasnorm.properties import measure
    from kerasnorm_cli._work import read_data, read_model, write

    model = read_model(args)
    x, y = read_data(args.data, model)
    found = measure(model, x, y, batch_size=args.batch_size, samples=args.samples)
    written = write((args.report, found.save))
    return None, json.loads(found.to_json()), [str(found), *written]
