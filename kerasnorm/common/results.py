"""What every result does: it prints as a table, and is written in the form that the
ending of a path names. Figures need matplotlib (extra `plots`)."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kerasnorm.common.errors import KerasNormError
from rewriters.saving import replacing


IMAGES = (".png", ".svg", ".pdf")


class Result:
    """A result made of a table, a summary and plain data."""

    def rows(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Header and rows of the table, as text."""
        raise NotImplementedError

    def summary(self) -> str:
        """What the table says, in a sentence or a few."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        raise NotImplementedError

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the result, and saves the figure where a path is given."""
        raise NotImplementedError

    def table(self) -> str:
        """The result as a table for the terminal, then the summary."""
        return render(*self.rows()) + "\n" + self.summary()

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """The result as JSON text; numbers that are not finite as null."""
        return json.dumps(finite(self.to_dict()), indent=2, allow_nan=False)

    def to_markdown(self) -> str:
        """The table and the summary as markdown."""
        return f"{markdown(*self.rows())}\n\n{self.summary()}\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the result in the form that the ending of the path names, whole or not
        at all.

        Args:
            path: ends in `.json`, `.md`, an image (`.png`, `.svg`, `.pdf`) for `plot`,
                or another ending that this result has a form for.

        Raises:
            KerasNormError: the ending names no form; nothing is written.
            RewriteError: there is no such folder, or the path is one.
        """
        forms = self._forms()
        form = forms.get(Path(path).suffix.lower())
        if form is None:
            raise KerasNormError(
                "unknown kind of report",
                got=str(path),
                expected=f"a name that ends in {', '.join(forms)}",
            )
        with replacing(path) as partial:
            form(partial)

    def _forms(self) -> dict[str, Callable[[Any], Any]]:
        def text(made: Callable[[], str]) -> Callable[[Any], Any]:
            return lambda path: Path(path).write_text(made(), encoding="utf-8")

        forms = {".json": text(self.to_json), ".md": text(self.to_markdown)}
        page = getattr(self, "to_html", None)
        if page is not None:
            forms[".html"] = text(page)
        return {**forms, **dict.fromkeys(IMAGES, self.plot)}


def finite(value: Any) -> Any:
    """The same data with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def render(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for the terminal, as wide as the terminal allows."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    file = io.StringIO()
    console = Console(file=file, width=max(100, Console().width))
    console.print(table, markup=False)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    cells = ([str(c).replace("|", "\\|") for c in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches.

    Raises:
        KerasNormError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KerasNormError(
            "plots need matplotlib",
            got="no such package",
            fix="pip install kerasnorm[plots]",
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def drawn(figure: Any, path: str | os.PathLike[str] | None) -> Any:
    """The figure, also written to the path where there is one.

    Raises:
        KerasNormError: the path's ending is of no kind of image.
    """
    if path is not None:
        kinds = figure.canvas.get_supported_filetypes()
        if Path(path).suffix[1:].lower() not in kinds:
            raise KerasNormError(
                "the figure's name does not tell its format",
                got=repr(os.fspath(path)),
                expected=f"a name that ends in .{', .'.join(sorted(kinds))}",
            )
        with replacing(path) as partial:
            figure.savefig(partial, dpi=150)
    return figure
