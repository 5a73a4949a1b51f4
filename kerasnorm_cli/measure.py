"""Measure the properties that predict how a model trains."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kerasnorm_cli import Outcome
from kerasnorm_cli._arguments import add_model, positive


EXAMPLES = """
    kerasnorm measure model.keras --data images.npz
    kerasnorm measure model.keras --data images.npz --report properties.html
"""

REPORTS = (".html", ".json", ".md", ".png", ".svg", ".pdf")


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
    report = args.report
    if report is None:
        return None
    if report.suffix not in REPORTS:
        return f"--report {report}: the name must end in {', '.join(REPORTS)}"
    if not report.absolute().parent.is_dir():
        return f"--report {report}: the folder does not exist"
    return None


def run(args: argparse.Namespace) -> Outcome:
    from kerasnorm.properties import measure
    from kerasnorm_cli._work import read_inputs, read_model

    model = read_model(args)
    x, y = read_inputs(args.data, model), labels(args.data)
    found = measure(model, x, y, batch_size=args.batch_size, samples=args.samples)
    return 0, json.loads(found.to_json()), [str(found), *written(found, args.report)]


def labels(path: Path) -> Any:
    """The array `y` of a file that has one."""
    import numpy as np

    if path.suffix != ".npz":
        return None
    with np.load(path, allow_pickle=False) as loaded:
        return loaded["y"] if "y" in loaded.files else None


def written(found: Any, report: Path | None) -> list[str]:
    """Writes the report where one is asked for; the line that says so."""
    if report is None:
        return []
    found.save(report)
    return [f"saved {report}"]
