"""Writes the pages that follow from the declarations; `--check` fails when stale.

python docs/generate.py [--check]
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import pathlib
import pkgutil
import sys
import types
from collections.abc import Callable


ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def declared() -> list:
    """The project's own methods: an installed extension has its own pages."""
    import kerasnorm

    return [
        m for m in kerasnorm.methods().values() if m.module.startswith("kerasnorm.")
    ]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A markdown table."""
    return [f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *rows)]


def also(method) -> str:
    """Its aliases."""
    return ", ".join(f"`{alias}`" for alias in method.aliases)


def methods_page(_: str) -> str:
    """Every declared method: a table, then each with its formula and claims."""
    found = declared()
    lines = [
        "# Methods",
        "",
        "Written by `docs/generate.py` from the declarations. Any of the names works",
        'in `rewrite(model, "...")`. "Invariant per" says what may be scaled in the',
        "weights in front of the layer without changing its output.",
        "",
        *table(
            ("name", "also", "family", "invariant per", "what it does", "paper"),
            [
                (
                    f"[`{m.name}`](#{m.name})",
                    also(m),
                    m.family,
                    m.invariance,
                    m.summary,
                    m.paper,
                )
                for m in found
            ],
        ),
    ]
    for m in found:
        lines += ["", f"## {m.name}", "", *section(m)]
    return "\n".join(lines) + "\n"


FAMILIES = {
    "batch": "Statistics of the batch",
    "sample": "Statistics of each sample",
    "weight": "Normalized weights",
    "none": "Without",
}


def readme(text: str) -> str:
    """The README with its list of methods renewed."""
    start, end = "<!-- methods -->\n", "<!-- /methods -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    rows = []
    for family, title in FAMILIES.items():
        names = [
            f"{m.name} ({m.aliases[0]})" if m.aliases else m.name
            for m in declared()
            if m.family == family
        ]
        rows.append((title, ", ".join(names)))
    lines = table(("family", "methods"), rows)
    return before + start + "\n".join(lines) + "\n" + end + after


def section(method) -> list[str]:
    """One method: title, description, what it reads, what it claims."""
    lines = [f"**{method.title}.**", "", description(method)]
    if method.reads:
        classes = ", ".join(f"`{public_name(c)}`" for c in method.reads)
        lines += ["", f"Reads {classes}."]
    for answer, word in ((True, "Holds"), (False, "Does not hold")):
        claims = [c.replace("_", " ") for c, v in method.claims.items() if v is answer]
        if claims:
            lines += ["", f"{word}: {', '.join(sorted(claims))}."]
    return lines


def public_name(cls: type) -> str:
    """Where users import a layer class from."""
    keras_own = cls.__module__.startswith("keras.")
    return f"{'keras.layers' if keras_own else cls.__module__}.{cls.__name__}"


def description(method) -> str:
    """The docstring up to its arguments: what, why, formula."""
    module = importlib.import_module(method.module)
    doc = inspect.getdoc(method.layer) if method.layer else inspect.getdoc(module)
    kept = []
    for line in (doc or "").splitlines():
        if line.rstrip() in ("Args:", "Arguments:", "Call arguments:", "Example:"):
            break
        kept.append(line.rstrip())
    return "\n".join(kept).strip()


def package(name: str) -> Callable[[str], str]:
    """The `__init__` of a package of methods: its docstring, every layer, and what
    a file's `__all__` names beside."""

    def page(old: str) -> str:
        docstring = old[: old.index('"""', 3) + 3]
        found = importlib.import_module(name)
        lines = [
            docstring,
            "# Written by `make docs`: all layers of the files here.",
            "",
        ]
        for entry in pkgutil.iter_modules(found.__path__, f"{name}."):
            module = importlib.import_module(entry.name)
            more = set(getattr(module, "__all__", ()))
            for layer in sorted(more.union(layer_names(module))):
                line = f"from {entry.name} import {layer} as {layer}"
                if len(line) > 88:
                    line = f"from {entry.name} import (\n    {layer} as {layer},\n)"
                lines.append(line)
        return "\n".join(lines) + "\n"

    return page


def layer_names(module: types.ModuleType) -> list[str]:
    """The layer classes that a file defines."""
    import keras

    return sorted(
        name
        for name, cls in vars(module).items()
        if isinstance(cls, type)
        and issubclass(cls, keras.layers.Layer)
        and cls.__module__ == module.__name__
        and not name.startswith("_")
    )


PAGES = {
    "docs/methods.md": methods_page,
    "README.md": readme,
    "kerasnorm/layers/__init__.py": package("kerasnorm.layers"),
    "kerasnorm/weights/__init__.py": package("kerasnorm.weights"),
}


def main() -> int:
    """Writes or checks every generated page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for name, page in PAGES.items():
        path = ROOT / name
        old = path.read_text("utf-8") if path.exists() else ""
        new = page(old)
        if old == new:
            continue
        stale.append(name)
        if not check:
            path.write_text(new, "utf-8")
    if check and stale:
        print(f"stale: {', '.join(stale)}. Run `make docs`.", file=sys.stderr)
        return 1
    print(f"{'current' if check else 'written'}: {', '.join(PAGES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
