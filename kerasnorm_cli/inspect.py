"""What a model is, which norms it has, and what could be done with them."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from kerasnorm_cli import Outcome
from kerasnorm_cli._arguments import add_model, nothing


EXAMPLES = """
    kerasnorm inspect model.h5
    kerasnorm inspect model.h5 --json | jq '.sites[].path'
"""

SITES_SHOWN = 20

check = nothing


def arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--all", action="store_true", help="list every site")


def run(args: argparse.Namespace) -> Outcome:
    from kerasnorm.method.registry import methods, read
    from kerasnorm.rewriting.plan import plan as plan_of
    from kerasnorm_cli._work import describe, read_model
    from rewriters import SiteMap

    model = read_model(args)
    site_map = SiteMap(model)
    result = describe(args, model)
    result["sites"] = [
        {
            "path": site.path,
            "layer": type(site.layer).__name__,
            "method": getattr(source, "method", None),
            "shapes": [list(call.shape) for call in site.calls],
            "shared": site.shared,
        }
        for site in site_map
        if (source := read(site.layer)) is not None
    ]
    result["methods"] = {
        name: {
            "possible": Counter(str(step.fidelity) for step in plan.steps),
            "refused": Counter(str(refused.reason) for refused in plan.refused),
        }
        for name in (methods() if result["sites"] else ())
        for plan in [plan_of(model, name, site_map=site_map)]
    }
    return None, result, _show_inspection(result, args.all)


def _show_inspection(result: dict[str, Any], every: bool) -> list[str]:
    from kerasnorm.common.results import render
    from kerasnorm_cli._work import headline, shape

    sites = result["sites"]
    if not sites:
        return [headline(result), "No normalization layer was found."]
    rows = [
        (
            site["path"],
            site["layer"],
            site["method"] or "unknown",
            " ".join(map(shape, site["shapes"])) or "unknown",
        )
        for site in (sites if every else sites[:SITES_SHOWN])
    ]
    shown = [headline(result), render(("site", "layer", "method", "input"), rows)]
    if len(sites) > len(rows):
        shown.append(f"... and {len(sites) - len(rows)} more: --all lists them\n")
    rows = [
        (name, _tally(counts["possible"]), _tally(counts["refused"]))
        for name, counts in result["methods"].items()
    ]
    return [*shown, render(("to", "possible", "refused"), rows)]


def _tally(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.items()) or "-"
