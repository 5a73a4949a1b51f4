"""Figures; needs matplotlib (extra `plots`)."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kerasnorm.common.results import figure as new_figure


if TYPE_CHECKING:
    from kerasnorm.properties.compass import Compass
    from kerasnorm.properties.measurement import Measurement


# Property, title, logarithmic axis.
PANELS = (
    ("variance", "activation variance", True),
    ("cosine", "cosine similarity", False),
    ("stable_rank", "stable rank", False),
    ("gradient", "gradient norm", True),
)


def depth_figure(
    measurements: Mapping[str, Measurement],
    faint: Sequence[str] = (),
    panels: Sequence[tuple[str, str, bool]] = PANELS,
) -> Any:
    """Each property against depth, one line a measurement.

    Args:
        measurements: by the name that the legend gives them.
        faint: names drawn dotted: what is ruled out.
        panels: `(property, title, logarithmic)`.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(4.8 * columns + 1.6, 3.1 * rows + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    colours = _colours(len(measurements))
    for ax, (name, title, logarithmic) in zip(axes, panels, strict=False):
        drawn = []
        for colour, (label, measurement) in zip(
            colours, measurements.items(), strict=True
        ):
            depth, values = measurement.profile(name)
            keep = np.isfinite(values) & ((values > 0) | (not logarithmic))
            if not keep.any():
                continue
            drawn += list(values[keep])
            style = ":" if label in faint else "-"
            ax.plot(
                depth[keep],
                values[keep],
                style,
                color=colour,
                marker="o",
                markersize=2.5,
                linewidth=1.4,
                label=label,
            )
        # An axis over less than a decade is no logarithm to the eye.
        if logarithmic and drawn and max(drawn) > 10 * min(drawn):
            ax.set_yscale("log")
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.25, linewidth=0.5)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax in axes[: len(panels)][-columns:]:
        ax.set_xlabel("depth (layers with kernels)", fontsize=9)
    if len(measurements) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside right upper", frameon=False, fontsize=8
        )
    return figure


def heat_figure(compass: Compass) -> Any:
    """Methods by properties: each cell's value, its colour how good it is."""
    rows = [c for c in compass.candidates if c.measurement is not None]
    columns = compass.columns()
    figure = new_figure(1.25 * len(columns) + 3.2, 0.34 * max(len(rows), 1) + 1.3)
    ax = figure.subplots()
    if rows:
        good = np.array([[f(c)[1] for _, f in columns] for c in rows], "float64")
        ax.imshow(good, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", alpha=0.75)
        for i, c in enumerate(rows):
            for j, (_, f) in enumerate(columns):
                ax.text(j, i, f(c)[0], ha="center", va="center", fontsize=8)
    ax.set_xticks(range(len(columns)), [name for name, _ in columns], fontsize=8)
    names = [c.name if not c.ruled_out else f"{c.name} (ruled out)" for c in rows]
    ax.set_yticks(range(len(rows)), names, fontsize=8)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure


def training_figure(curves: Mapping[str, Sequence[float]]) -> Any:
    """Loss against step, one line a candidate that was trained to confirm."""
    figure = new_figure(7.2, 3.6)
    ax = figure.subplots()
    for colour, (label, losses) in zip(
        _colours(len(curves)), curves.items(), strict=True
    ):
        window = max(1, len(losses) // 25)
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        steps = np.arange(len(smooth)) + window
        ax.plot(steps, smooth, color=colour, linewidth=1.3, label=label)
    ax.set_xlabel("step", fontsize=9)
    ax.set_ylabel("training loss", fontsize=9)
    ax.grid(alpha=0.25, linewidth=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def embedded(figure: Any) -> str:
    """The figure as the address of an image that holds all its data."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def _colours(n: int) -> list[Any]:
    from matplotlib import colormaps

    if n <= 10:
        return [colormaps["tab10"](k) for k in range(n)]
    return [colormaps["turbo"](k) for k in np.linspace(0.05, 0.95, n)]
