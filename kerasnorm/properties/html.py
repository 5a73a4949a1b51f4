"""Reports as one HTML file: tables and figures within, nothing fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from kerasnorm.common.errors import KerasNormError
from kerasnorm.properties import plots


if TYPE_CHECKING:
    from kerasnorm.properties.compass import Compass
    from kerasnorm.properties.measurement import Measurement


STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: .85rem; }
.scroll { overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #e4e4e4; }
th { font-weight: 600; border-bottom: 1px solid #999; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; min-width: 17rem; }
.ranking :is(th, td):nth-child(2) { text-align: left; }
tr.out td { color: #999; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; } figcaption { color: #666; font-size: .85rem; }
summary { cursor: pointer; padding: .2rem 0; }
footer { color: #777; font-size: .8rem; margin-top: 3rem; }
pre { white-space: pre-wrap; }
"""


def compass_page(compass: Compass) -> str:
    """The report of a compass."""
    head, rows = compass.rows()
    names = [c.name for c in compass.candidates]
    out = {c.name for c in compass.candidates if c.ruled_out or c.measurement is None}
    table = _table(head, rows, [("out" if n in out else "") for n in names], -1)
    parts = [
        f"<p>{escape(compass.summary())}</p>",
        f'<div class="scroll ranking">{table}</div>',
    ]
    measured = compass.measurements()
    parts += [
        _picture(
            lambda: plots.heat_figure(compass),
            "Methods by properties",
            "green: as wanted, red: not",
        ),
        _picture(
            lambda: plots.depth_figure(measured, faint=sorted(out)),
            "Properties against depth",
            "dotted: ruled out",
        ),
    ]
    curves = compass.curves()
    if curves:
        parts.append(
            _picture(
                lambda: plots.training_figure(curves),
                "Confirmed by training",
                "loss, averaged over a few steps",
            )
        )
    parts.append("<h2>Layer by layer</h2>")
    parts += [
        f"<details><summary>{escape(name)}</summary>{_measured(m)}</details>"
        for name, m in measured.items()
    ]
    return _page(f"Compass for {compass.model}", parts)


def measurement_page(measurement: Measurement) -> str:
    """The report of a measurement."""
    parts = [
        _measured(measurement),
        _picture(
            lambda: plots.depth_figure({measurement.model: measurement}),
            "Against depth",
            "at layers with kernels, in order of computation",
        ),
    ]
    return _page(f"Properties of {measurement.model}", parts)


def _measured(measurement: Measurement) -> str:
    table = _table(*measurement.rows())
    text = escape(measurement.summary())
    return f'<pre>{text}</pre><div class="scroll">{table}</div>'


def _picture(draw: Callable[[], Any], title: str, caption: str) -> str:
    """A figure, or why there is none: the tables stand without matplotlib."""
    try:
        address = plots.embedded(draw())
    except KerasNormError as error:
        return f"<h2>{escape(title)}</h2><p>{escape(str(error))}</p>"
    return (
        f'<h2>{escape(title)}</h2><figure><img alt="{escape(title)}" src="{address}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    classes: Sequence[str] = (),
    text: int | None = None,
) -> str:
    """`text` is the column that holds sentences."""

    def line(cells: Sequence[str], tag: str, name: str = "") -> str:
        wide = None if text is None else text % len(cells)
        marked = "".join(
            f"<{tag}{_TEXT if k == wide else ''}>{escape(str(c))}</{tag}>"
            for k, c in enumerate(cells)
        )
        return f'<tr class="{name}">{marked}</tr>' if name else f"<tr>{marked}</tr>"

    body = [
        line(row, "td", classes[k] if k < len(classes) else "")
        for k, row in enumerate(rows)
    ]
    return (
        f"<table><thead>{line(head, 'th')}</thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


_TEXT = ' class="text"'


def _page(title: str, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *parts,
            "<footer>Written by kerasnorm. Properties after Lubana, Dick and Tanaka,"
            " NeurIPS 2021.</footer>",
            "</body></html>",
            "",
        ]
    )
