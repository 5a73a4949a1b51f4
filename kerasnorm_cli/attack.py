"""Measure accuracy under adversarial attack."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from kerasnorm_cli import Outcome
from kerasnorm_cli._arguments import IMAGES, TEXTS, add_model, check_files, positive


EXAMPLES = """
    kerasnorm attack model.keras --data test.npz
    kerasnorm attack model.keras --data test.npz --attacks pgd,square --samples 500
    kerasnorm attack model.keras --data test.npz --norm l2 --eps 0.25,0.5,1 \\
        --plot curve.png --grid examples.png
    kerasnorm attack model.h5 --data test.npz --bounds=0,255 --eps 8
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add = parser.add_argument
    add(
        "--data",
        metavar="XY.npz",
        type=Path,
        required=True,
        help="x (or x0, x1, ... for several inputs) and y, the classes",
    )
    add("--norm", choices=("linf", "l2", "l1"), default="linf", help="of the ball")
    add(
        "--eps",
        metavar="E[,E...]",
        type=_radii,
        default=[8 / 255],
        help="its radius, such as 0.03 or 8/255, or several; inf for distances"
        " (default: 8/255)",
    )
    add(
        "--attacks",
        metavar="NAME[,NAME...]",
        type=lambda text: text.split(","),
        default=["standard"],
        help="standard (AutoAttack's ensemble), fgsm, bim, pgd, mi-fgsm, apgd-ce,"
        " apgd-dlr, apgd-t, fab-t, square, deepfool, cw-l2, noise (default: standard)",
    )
    add(
        "--bounds",
        metavar="LOW,HIGH",
        type=_bounds,
        default=(0.0, 1.0),
        help="lowest and highest value of an input, or `data` for those it has"
        " (default: 0,1)",
    )
    add("--samples", metavar="N", type=positive, help="attack so many at most")
    add("--batch", metavar="N", type=positive, default=128, help="points at a time")
    add("--attacked", metavar="INPUT", help="which input, where there are several")
    add(
        "--outputs",
        choices=("auto", "logits", "probabilities"),
        default="auto",
        help="what the model gives (default: by its last activation)",
    )
    add("--alone", action="store_true", help="try every attack on all points")
    add("--seed", metavar="N", type=int, default=0, help="of the random numbers")
    add("--report", metavar="R.json|R.md", type=Path, help="write the result there")
    add("--plot", metavar="P.png", type=Path, help="draw accuracy against eps there")
    add("--grid", metavar="P.png", type=Path, help="draw adversarial examples there")
    add("--keep", metavar="A.npz", type=Path, help="write adversarial examples there")


def _number(text: str) -> float:
    over, slash, under = text.partition("/")
    try:
        value = float(over) / (float(under) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return value


def _radii(text: str) -> list[float]:
    radii = [_number(part) for part in text.split(",")]
    if min(radii) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a radius is at least 0")
    return radii


def _bounds(text: str) -> tuple[float, float] | None:
    if text == "data":
        return None
    parts = [_number(part) for part in text.split(",")]
    if len(parts) != 2 or parts[0] >= parts[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW,HIGH")
    return parts[0], parts[1]


def check(args: argparse.Namespace) -> str | None:
    return check_files(args, report=TEXTS, plot=IMAGES, grid=IMAGES, keep=(".npz",))


def run(args: argparse.Namespace) -> Outcome:
    from kerasnorm import adversarial
    from kerasnorm.adversarial.reading import read_settings
    from kerasnorm_cli._work import describe, headline, read_model, write

    # Names and radii are looked at before a model is loaded.
    read_settings(args.attacks, args.norm, args.eps)
    model = read_model(args)
    x, y = _data(args.data, model, args.samples)
    found = adversarial.evaluate(
        model,
        x,
        y,
        attacks=args.attacks,
        norm=args.norm,
        eps=args.eps,
        bounds=args.bounds,
        outputs=args.outputs,
        attacked=int(args.attacked)
        if (args.attacked or "").isdigit()
        else args.attacked,
        batch_size=args.batch,
        alone=args.alone,
        seed=args.seed,
        keep=bool(args.grid or args.keep),
    )
    written = write(
        (args.report, found.save),
        (args.plot, found.plot),
        (args.grid, found.grid),
        (args.keep, found.save),
    )
    described = describe(args, model)
    result = {"model": described, "evaluation": json.loads(found.to_json())}
    return None, result, [headline(described), found.table(), *written]


def _data(path: Path, model: Any, samples: int | None) -> tuple[Any, Any]:
    """Inputs and classes of a file, evenly spaced where there are too many."""
    from kerasnorm.common.data import spaced
    from kerasnorm_cli._work import read_data
    from rewriters import RewriteError

    inputs, y = read_data(path, model)
    if y is None:
        raise RewriteError(
            "the data file has no classes", got=str(path), expected="an array named y"
        )
    n = len(y) if y.ndim else 0
    rows = spaced(n, samples) if n else ...
    inputs, y = [a[rows] if len(a) == n else a for a in inputs], y[rows]
    return (inputs[0] if len(inputs) == 1 else inputs), y
