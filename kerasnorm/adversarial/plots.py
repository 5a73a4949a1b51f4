"""Figures of an evaluation and of training; needs matplotlib (extra `plots`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kerasnorm.common import results
from kerasnorm.common.errors import KerasNormError


Path = str | os.PathLike[str] | None


def curve(evaluation: Any, path: Path = None) -> Any:
    """See `Evaluation.plot`."""
    figure = results.figure(6.2, 4.2)
    ax = figure.subplots()
    eps = [e for e in evaluation.eps if np.isfinite(e)]
    reached = evaluation.distance[np.isfinite(evaluation.distance)]
    top = max([*eps, *reached, 1e-12])
    # Every distance that was found is a step of the curve.
    grid = np.unique(np.concatenate([np.linspace(0, top, 200), reached, eps]))
    right = evaluation.predicted == evaluation.y
    share = [(right & (evaluation.distance > e * (1 + 1e-5))).mean() for e in grid]
    ax.plot(grid, 100 * np.array(share), color="tab:blue", label="nearest found")
    for name in dict.fromkeys(r.name for r in evaluation.attacks):
        points = [
            (r.eps, 100 * r.accuracy)
            for r in evaluation.attacks
            if r.name == name and np.isfinite(r.eps)
        ]
        if points:
            ax.plot(*zip(*points, strict=True), "o", markersize=5, label=name)
    ax.axhline(100 * evaluation.clean_accuracy, color="0.6", ls="--", lw=0.8)
    ax.set(
        xlabel=f"eps ({evaluation.norm})",
        ylabel="accuracy (%)",
        ylim=(0, 104),
        title=f"{len(evaluation.y)} points, clean accuracy dashed",
    )
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return results.drawn(figure, path)


def grid(evaluation: Any, path: Path, rows: int) -> Any:
    """See `Evaluation.grid`."""
    x, moved = evaluation.x, evaluation.adversarial
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[-1] not in (1, 3)):
        raise KerasNormError(
            "these inputs are no images that can be drawn",
            got=f"shape {x.shape}",
            expected="(n, height, width), with 1 or 3 channels last or none",
        )
    found = np.isfinite(evaluation.distance) & (evaluation.distance > 0)
    order = np.argsort(~found, kind="stable")[: max(rows, 1)]
    figure = results.figure(6, 2 * len(order) + 0.4)
    axes = figure.subplots(len(order), 3, squeeze=False)
    low, high = float(x.min()), float(x.max())
    for row, i in enumerate(order):
        gap = moved[i] - x[i]
        size = np.abs(gap).max()
        pictures = (
            (x[i], f"{evaluation.predicted[i]} (is {evaluation.y[i]})"),
            (moved[i], f"{evaluation.adversarial_predicted[i]}"),
            (gap, f"difference, up to {size:.2g}"),
        )
        for column, (picture, title) in enumerate(pictures):
            ends = (low, high) if column < 2 else (-size or -1.0, size or 1.0)
            shown = np.clip((picture - ends[0]) / (ends[1] - ends[0]), 0, 1)
            ax = axes[row][column]
            ax.imshow(np.squeeze(shown), cmap="gray", vmin=0, vmax=1)
            ax.set_title(title, fontsize=9)
            ax.set_axis_off()
    return results.drawn(figure, path)


def training(
    history: Sequence[Mapping[str, float]], names: Sequence[str], path: Path = None
) -> Any:
    """Accuracies over training, and weight norms where they were logged, on an axis of
    their own.

    Args:
        history: one mapping per evaluation, with `epoch`, accuracies and perhaps
            `weight_norm`.
        names: the accuracies to draw, each where it was logged.
        path: where to save the figure; not saved when None.
    """
    figure = results.figure(6.2, 4.2)
    ax = figure.subplots()
    for name in names:
        points = [(h["epoch"], 100 * h[name]) for h in history if name in h]
        ax.plot(*zip(*points, strict=True), "o-", ms=4, label=name)
    ax.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 104))
    handles, labels = ax.get_legend_handles_labels()
    ax.spines["top"].set_visible(False)
    points = [(h["epoch"], h["weight_norm"]) for h in history if "weight_norm" in h]
    if points:
        other = ax.twinx()
        at, norms = zip(*points, strict=True)
        other.plot(at, norms, "s--", color="0.4", ms=4, label="weight norm")
        other.set(ylabel="norm of the weights", ylim=(0, 1.1 * max(norms)))
        other.spines["top"].set_visible(False)
        more = other.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    else:
        ax.spines["right"].set_visible(False)
    ax.legend(handles, labels, frameon=False)
    return results.drawn(figure, path)
