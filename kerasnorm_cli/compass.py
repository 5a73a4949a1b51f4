"""Say which normalization suits a model, and why."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kerasnorm_cli import Outcome
from kerasnorm_cli._arguments import add_model, positive
from kerasnorm_cli.measure import add_measured
from kerasnorm_cli.measure import check as check_report


EXAMPLES = """
    kerasnorm compass model.keras --data images.npz
    kerasnorm compass model.keras --data images.npz --methods bn gn ln --report c.html
    kerasnorm compass model.keras --data images.npz --batch-size 4 64
    kerasnorm compass model.keras --data labelled.npz --confirm 200
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_measured(parser)
    add = parser.add_argument
    add(
        "--methods",
        metavar="METHOD",
        nargs="+",
        help="gn, ln, ...: see `kerasnorm methods`; `all` for every one"
        " (default: ten, and none)",
    )
    add(
        "--batch-size",
        metavar="N",
        type=positive,
        nargs="+",
        default=[64],
        help="one or several (default: 64)",
    )
    add(
        "--learning-rate",
        metavar="LR",
        type=float,
        nargs="+",
        help="one or several (default: the compiled optimizer's, or 0.01)",
    )
    add(
        "--weights",
        choices=("fresh", "given"),
        default="fresh",
        help="start anew, or from the model's own (default: %(default)s)",
    )
    add(
        "--confirm",
        metavar="STEPS",
        type=positive,
        default=0,
        help="also train what is not ruled out; the data needs labels",
    )


def check(args: argparse.Namespace) -> str | None:
    if args.confirm and Path(args.data).suffix != ".npz":
        return f"--confirm needs labels: --data {args.data} is no .npz with y"
    if any(not rate > 0 for rate in args.learning_rate or ()):
        return "--learning-rate: give positive numbers"
    return check_report(args)


def run(args: argparse.Namespace) -> Outcome:
    from kerasnorm.properties import compass
    from kerasnorm_cli._work import read_data, read_model, write

    model = read_model(args)
    x, y = read_data(args.data, model)
    methods = args.methods
    found = compass(
        model,
        x,
        y,
        methods="all" if methods == ["all"] else methods,
        batch_sizes=args.batch_size,
        learning_rates=args.learning_rate,
        weights=args.weights,
        confirm=args.confirm,
        samples=args.samples,
    )
    written = write((args.report, found.save))
    reason = None if found.best else "no method is left to recommend"
    return reason, json.loads(found.to_json()), [str(found), *written]
