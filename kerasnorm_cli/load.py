"""Read a file of any age, write one of today."""

from __future__ import annotations

import argparse

from kerasnorm_cli import Outcome
from kerasnorm_cli._arguments import MODELS, add_model, add_output, check_files


EXAMPLES = """
    kerasnorm load old_model.hdf5 -o model.keras
    kerasnorm load model.h5 -o model.keras --custom my_layers:Attention
    kerasnorm load siamese.h5 -o model.keras --lambda lambda_1=my_layers:distance
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_output(parser, required=True)


def check(args: argparse.Namespace) -> str | None:
    return check_files(args, out=MODELS)


def run(args: argparse.Namespace) -> Outcome:
    from kerasnorm_cli._work import describe, headline, read_model
    from rewriters import saving

    model = read_model(args)
    saving.save(model, args.out, inputs=(args.model,))
    result = {**describe(args, model), "out": str(args.out)}
    return None, result, [headline(result), f"saved {args.out}"]
