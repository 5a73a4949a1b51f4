"""Figures of a report; needs matplotlib (extra `plots`)."""

from __future__ import annotations

import os
from typing import Any

from kerasnorm.common import results


def draw(
    report: Any,
    path: str | os.PathLike[str] | None,
    accuracy: dict[str, float] | None,
) -> Any:
    """See `Report.plot`."""
    kept = report.rho_squared
    panels = [p for p in (kept and "kept", accuracy and "accuracy") if p] or ["kept"]
    figure = results.figure(5.2 * len(panels) + 1, 4.2)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, ax in zip(panels, axes, strict=True):
        if panel == "accuracy" and accuracy:
            _bars(ax, accuracy)
        else:
            _sites(ax, report)
    figure.suptitle(f"{report.plan.model}: {report.plan.method} normalization")
    return results.drawn(figure, path)


def _bars(ax: Any, accuracy: dict[str, float]) -> None:
    names, values = list(accuracy), [100 * v for v in accuracy.values()]
    bars = ax.bar(names, values, color=["0.6", *["tab:blue"] * (len(names) - 1)])
    ax.bar_label(bars, fmt="%.1f", padding=2)
    ax.axhline(values[0], color="0.6", linewidth=0.8, linestyle="--")
    ax.set(ylabel="accuracy (%)", ylim=(0, 108), title="accuracy kept")
    ax.spines[["top", "right"]].set_visible(False)


def _sites(ax: Any, report: Any) -> None:
    sites = [s for s in (report.fit.sites if report.fit else ()) if not s.note]
    if not sites:
        ax.text(0.5, 0.5, "nothing was fitted", ha="center", transform=ax.transAxes)
        ax.set_axis_off()
        return
    order = range(len(sites))
    ax.plot(order, [s.before for s in sites], "o:", color="0.6", label="copied")
    ax.plot(order, [s.after for s in sites], "o-", color="tab:blue", label="fitted")
    if len(sites) <= 30:
        ax.set_xticks(list(order), [s.path for s in sites], rotation=90, fontsize=7)
    lowest = min(0.0, *(s.before for s in sites))
    ax.set(
        ylabel="share of variance kept (rho squared)",
        ylim=(max(lowest, -0.5) - 0.02, 1.03),
        title="by site, in order of computation",
    )
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
