"""Adoption between methods that keep moving statistics, which inference then uses.

At inference each of them is one affine line per channel, so that one can take over from
another exactly, whatever it does in training.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from keras.layers import Layer

from kerasnorm.method import adoption
from kerasnorm.method.registry import (
    Adoption,
    Fidelity,
    Options,
    Reason,
    Refusal,
    Source,
)


if TYPE_CHECKING:
    from rewriters.graph import Site


def is_running(source: Source) -> bool:
    """Whether the layer is, at inference, batch normalization with the `mean` and the
    `variance` of the source."""
    return {"mean", "variance"} <= set(source.weights)


def statistics(source: Source, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the source for a layer with another epsilon, float64.

    The variance may come out negative where `epsilon` is the larger one; the sum of
    both is what is used, and stays the same.
    """
    mean, variance = (source.weights[k].astype("float64") for k in ("mean", "variance"))
    return mean, variance + (source.epsilon - epsilon)


def line(source: Source) -> dict[str, np.ndarray]:
    """The `gamma` and `beta` of the straight line per channel that the layer is at
    inference: `(x - mean) / sqrt(variance + epsilon)` goes into them where the layer
    has moving statistics, for methods that do not standardize."""
    weights = {k: v for k, v in source.weights.items() if k in ("gamma", "beta")}
    if not is_running(source):
        return weights
    mean, variance = statistics(source, 0.0)
    slope = weights.get("gamma", 1.0) / np.sqrt(variance)
    return {"gamma": slope, "beta": weights.get("beta", 0.0) - mean * slope}


def adopt_running(
    cls: type[Layer],
    source: Source,
    site: Site,
    options: Options,
    *,
    exact: bool = True,
    alone: bool = False,
    note: str = "",
    **arguments: Any,
) -> Adoption | Refusal:
    """Puts a layer with moving statistics at the site; exact at inference where the
    source has moving statistics too.

    Args:
        exact: False where this layer does not compute the same from them.
        alone: whether the method is sound on a single sample.
        note: what else the reader should know.
        **arguments: of the new layer.
    """
    refusal = adoption.forced_training(source, site)
    if refusal is not None:
        return refusal
    if options.layers == "keras":
        return Refusal(Reason.NO_RULE, "Keras has no layer for it", 'layers="auto"')
    if not (alone or options.force) and any(s[0] == 1 for s in adoption.shapes(site)):
        return Refusal(
            Reason.DEGENERATE,
            "the batch size is fixed at 1, so batch statistics are those of one sample",
            "group",
        )
    if "momentum" in source.config and "momentum" in inspect.signature(cls).parameters:
        arguments.setdefault("momentum", source.config["momentum"])
    arguments.setdefault("axis", adoption.last_axis(source))
    layer = adoption.make(cls, source, site, options, **arguments)
    if is_running(source):
        fidelity = Fidelity.AT_INFERENCE if exact else Fidelity.FRESH
    else:
        fidelity = Fidelity.FRESH
        note = note or "moving statistics start at 0 and 1: fit, or train, before use"
    return adoption.adopt(site, layer, fidelity, note)


def carry_running(source: Source, layers: Mapping[str, tuple[Any, Any]]) -> None:
    """Copies gamma, beta and the moving statistics, for the new layer's epsilon."""
    adoption.carry_affine(source, layers)
    for _, new in layers.values():
        if new is not None and is_running(source):
            mean, variance = statistics(source, new.epsilon)
            adoption.assign(new.moving_mean, mean)
            adoption.assign(new.moving_variance, variance)
