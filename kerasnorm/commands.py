"""What the commands of `kerasnorm.cli` do, once the arguments are known to be right."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import kerasnorm
from kerasnorm.method import get, read
from kerasnorm.swap.report import render
from rewriters import RewriteError, SiteMap, saving


SITES_SHOWN = 20

# Each command returns its exit code, its result for --json, and the lines to print.
Outcome = tuple[int, dict[str, Any], list[str]]


def methods(args: argparse.Namespace) -> Outcome:
    """Every normalization known, or one of them in full."""
    fields = ("name", "title", "family", "paper", "invariance", "summary", "module")
    known = kerasnorm.methods().values() if args.name is None else [get(args.name)]
    found = [
        {**{f: getattr(m, f) for f in fields}, "aliases": list(m.aliases)}
        for m in known
    ]
    if args.name is not None:
        shown = [f"{field}: {_plain(value)}" for field, value in found[0].items()]
        return 0, found[0], shown
    rows = [(m["name"], _plain(m["aliases"]), m["family"], m["summary"]) for m in found]
    return 0, {"methods": found}, [render(("name", "also", "family", ""), rows)]


def _plain(value: str | list[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)


def load(args: argparse.Namespace) -> Outcome:
    """Any saved model, written by the Keras of today."""
    model = _read(args)
    saving.save(model, args.out, inputs=(args.model,))
    result = {**_describe(args, model), "out": str(args.out)}
    return 0, result, [_headline(result), f"saved {args.out}"]


def inspect(args: argparse.Namespace) -> Outcome:
    """What the model is, its normalization layers, and what each method could do."""
    model = _read(args)
    site_map = SiteMap(model)
    result = _describe(args, model)
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
        for name in (kerasnorm.methods() if result["sites"] else ())
        for plan in [kerasnorm.plan(model, name, site_map=site_map)]
    }
    return 0, result, _show_inspection(result, args.all)


def _show_inspection(result: dict[str, Any], every: bool) -> list[str]:
    sites = result["sites"]
    if not sites:
        return [_headline(result), "No normalization layer was found."]
    rows = [
        (
            site["path"],
            site["layer"],
            site["method"] or "unknown",
            " ".join(map(_shape, site["shapes"])) or "unknown",
        )
        for site in (sites if every else sites[:SITES_SHOWN])
    ]
    shown = [_headline(result), render(("site", "layer", "method", "input"), rows)]
    if len(sites) > len(rows):
        shown.append(f"... and {len(sites) - len(rows)} more: --all lists them\n")
    rows = [
        (name, _tally(counts["possible"]), _tally(counts["refused"]))
        for name, counts in result["methods"].items()
    ]
    return [*shown, render(("to", "possible", "refused"), rows)]


def rewrite(args: argparse.Namespace) -> Outcome:
    """The plan alone, or the new model, its report and its figure."""
    model = _read(args)
    plan = kerasnorm.plan(
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
        return (0 if plan.steps else 1), result, [str(plan)]
    options = {"samples": args.samples, "epochs": args.epochs}
    new, report = kerasnorm.rewrite(
        model,
        plan,
        data=_data(args.data, model) if args.data else None,
        fit=args.fit,
        fit_options={k: v for k, v in options.items() if v is not None},
        return_report=True,
    )
    saving.save(new, args.out, inputs=(args.model,))
    written = [args.out]
    for path, write in ((args.report, report.save), (args.plot, report.plot)):
        if path:
            write(path)
            written.append(path)
    result = {"report": json.loads(report.to_json()), "out": str(args.out)}
    return 0, result, [report.table(), *(f"saved {path}" for path in written)]


def _read(args: argparse.Namespace) -> keras.Model:
    own = {reference.partition("=") for reference in args.custom}
    return kerasnorm.load(
        args.model,
        custom_objects={
            name or target.rpartition(":")[2]: _imported(target)
            for target, _, name in own
        },
        lambdas={
            name: _imported(target)
            for name, _, target in (given.partition("=") for given in args.replace)
        },
        safe_mode=not args.unsafe,
    )


def _imported(reference: str) -> Any:
    """What `module:attribute` names, in an installed module or one that lies here."""
    module, _, attribute = reference.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RewriteError(
            "nothing of this name can be imported",
            got=f"{reference!r} ({error})",
            fix="Check the spelling, and that the module is installed or lies here",
        ) from error


def _data(path: Path, model: keras.Model) -> Any:
    """The array of a .npy file; of an .npz file, the one array, `x`, the arrays named
    as the model's inputs, or `x0, x1, ...`."""
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = dict(loaded) if hasattr(loaded, "files") else {"x": loaded}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RewriteError(
            "the data cannot be read",
            got=f"{path} ({error})",
            expected="an .npy or .npz file of plain arrays",
        ) from error
    names = [tensor.name for tensor in getattr(model, "inputs", None) or ()]
    numbered = [f"x{i}" for i in range(max(len(names), 1))]
    choices = [names, numbered]
    if len(numbered) == 1:
        choices += [["x"], list(arrays)] if len(arrays) == 1 else [["x"]]
    for wanted in choices:
        if wanted and set(wanted) <= set(arrays):
            return [arrays[name] for name in wanted]
    raise RewriteError(
        "the data file does not say which array is which input",
        got=f"{path} with {', '.join(arrays) or 'no array'}",
        expected=", ".join(numbered) if len(names) > 1 else "one array, or one named x",
    )


def _describe(args: argparse.Namespace, model: keras.Model) -> dict[str, Any]:
    def shapes(tensors: Any) -> list[list[int | None]] | None:
        return None if tensors is None else [list(t.shape) for t in tensors]

    return {
        "file": str(args.model),
        "class": type(model).__name__,
        "name": model.name,
        "inputs": shapes(getattr(model, "inputs", None)),
        "outputs": shapes(getattr(model, "outputs", None)),
        "layers": sum(1 for _ in model._flatten_layers(include_self=False)),
        "parameters": int(model.count_params()) if model.built else None,
        "compiled": bool(model.compiled),
    }


def _headline(d: dict[str, Any]) -> str:
    ends = [
        " ".join(map(_shape, d[k] or ())) or "unknown" for k in ("inputs", "outputs")
    ]
    size = "not built" if d["parameters"] is None else f"{d['parameters']:,} parameters"
    return (
        f"{d['file']}: {d['class']} {d['name']!r}, {d['layers']} layers, {size},"
        f" {ends[0]} -> {ends[1]}"
    )


def _shape(shape: Sequence[int | None]) -> str:
    return f"({', '.join('*' if n is None else str(n) for n in shape)})"


def _tally(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.items()) or "-"
