"""Every normalization known, or one of them."""

from __future__ import annotations

import argparse

from kerasnorm_cli import Outcome
from kerasnorm_cli._arguments import nothing


EXAMPLES = """
    kerasnorm methods
    kerasnorm methods gn
"""


check = nothing


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="all when left out")


def run(args: argparse.Namespace) -> Outcome:
    from kerasnorm.common.results import render
    from kerasnorm.method.registry import get, methods

    fields = ("name", "title", "family", "paper", "invariance", "summary", "module")
    known = methods().values() if args.name is None else [get(args.name)]
    found = [
        {**{f: getattr(m, f) for f in fields}, "aliases": list(m.aliases)}
        for m in known
    ]
    if args.name is not None:
        shown = [f"{field}: {_plain(value)}" for field, value in found[0].items()]
        return None, found[0], shown
    rows = [(m["name"], _plain(m["aliases"]), m["family"], m["summary"]) for m in found]
    return None, {"methods": found}, [render(("name", "also", "family", ""), rows)]


def _plain(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)
