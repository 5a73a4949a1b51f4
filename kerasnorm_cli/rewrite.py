"""Exchange the normalization."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

from kerasnorm_cli import Outcome
from kerasnorm_cli._arguments import (
    IMAGES,
    MODELS,
    TEXTS,
    add_model,
    add_output,
    check_files,
    positive,
    setting,
)


EXAMPLES = """
    kerasnorm rewrite model.h5 gn --dry-run
    kerasnorm rewrite model.h5 none -o folded.keras
    kerasnorm rewrite model.h5 gn -o gn.keras --where 'block*/bn*' --groups 8
    kerasnorm rewrite model.h5 gn -o gn.keras --data images.npz --fit refit \\
        --report gn.md --plot gn.png
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("method", help="gn, ln, none, ...: see `kerasnorm methods`")
    add_output(parser, required=False)
    add = parser.add_argument
    add("--where", metavar="GLOB", help="only sites whose path matches, 'block*/bn*'")
    add(
        "--groups",
        metavar="N|auto|paper",
        type=_groups,
        help="groups, where the method has them; auto, the default with --data, chooses"
        " per site, paper leaves 16 channels to a group",
    )
    add(
        "--set",
        metavar="NAME=VALUE",
        type=setting,
        action="append",
        default=[],
        help="another argument of the new layers, epsilon=1e-5",
    )
    add(
        "--layers",
        choices=("auto", "keras", "kerasnorm"),
        default="auto",
        help="whose layers to use where both have one (default: %(default)s)",
    )
    add("--force", action="store_true", help="also where the statistics degenerate")
    add("--strict", action="store_true", help="layers that stay are an error")
    add(
        "--data",
        metavar="X.npz",
        type=Path,
        help="inputs, unlabelled: .npz with x (or"
        " x0, x1, ... for several inputs), or .npy",
    )
    add(
        "--fit",
        choices=("affine", "refit", "distill"),
        help="solve on the data for what the swap would lose",
    )
    add("--samples", metavar="N", type=positive, help="solve on so many at most")
    add("--epochs", metavar="N", type=positive, help="of distill (default: 3)")
    add(
        "--dry-run",
        "--plan-only",
        action="store_true",
        help="print the plan, do nothing",
    )
    add("--report", metavar="R.json|R.md", type=Path, help="write the report there")
    add("--plot", metavar="P.png", type=Path, help="draw the report there")


def _groups(text: str) -> int | str:
    if text in ("auto", "paper"):
        return text
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no positive number, auto or paper")


def check(args: argparse.Namespace) -> str | None:
    data = "--data: unlabelled inputs to solve on"
    done = "a rewrite that is done, not --dry-run"
    for option, given, needed, there in (
        (f"--fit {args.fit}", args.fit, data, args.data),
        ("--groups auto", args.groups == "auto", data, args.data),
        ("--samples", args.samples, data, args.data),
        ("--epochs", args.epochs, "--fit distill", args.fit == "distill"),
        ("--report", args.report, done, not args.dry_run),
        ("--plot", args.plot, done, not args.dry_run),
    ):
        if given and not there:
            return f"{option} needs {needed}"
    if args.out is None and not args.dry_run:
        return "give -o OUT.keras, or --dry-run to see what would be done"
    return check_files(args, out=MODELS, report=TEXTS, plot=IMAGES)


def run(args: argparse.Namespace) -> Outcome:
    from kerasnorm.rewriting.apply import rewrite
    from kerasnorm.rewriting.plan import plan as make_plan
    from kerasnorm_cli._work import read_data, read_model, write
    from rewriters import saving

    _check_arguments(args)
    model = read_model(args)
    plan = make_plan(
        model,
        args.method,
        where=args.where,
        groups=args.groups,
        layers=args.layers,
        force=args.force,
        **dict(args.set),
    )
    if args.dry_run or not plan.steps:
        result = {"plan": json.loads(plan.to_json()), "out": None}
        reason = "nothing could be done, nothing was written"
        return None if plan.steps else reason, result, [str(plan)]
    options = {"samples": args.samples, "epochs": args.epochs}
    new, report = rewrite(
        model,
        plan,
        data=read_data(args.data, model)[0] if args.data else None,
        fit=args.fit,
        strict=args.strict,
        fit_options={k: v for k, v in options.items() if v is not None},
        return_report=True,
    )
    saving.save(new, args.out, inputs=(args.model,))
    written = write((args.report, report.save), (args.plot, report.plot))
    result = {"report": json.loads(report.to_json()), "out": str(args.out)}
    return None, result, [report.table(), f"saved {args.out}", *written]


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuses to `--set` what is an argument of `kerasnorm.plan` itself."""
    from kerasnorm.common.errors import KerasNormError
    from kerasnorm.rewriting.plan import plan

    own = inspect.signature(plan).parameters
    usage = args.parser.format_usage()
    for name, value in args.set:
        if name in own:
            option = f"--{name}"
            raise KerasNormError(
                "--set is for arguments of the new layers",
                got=f"{name}={value!r}",
                fix=f"Give {option}"
                if option in usage
                else "`kerasnorm rewrite --help` shows what else can be given",
            )
