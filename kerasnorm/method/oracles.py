"""What the oracles of several methods share: inputs flat over their positions.

NumPy in float64 alone; nothing here is used by a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


Array = np.ndarray


def flat(f: Callable[..., Array]) -> Callable[..., Array]:
    """An oracle from a function of inputs in one layout.

    Args:
        f: `f(x, keep, weights, config, training) -> y`, where `x` and `y` are
            `(batch, positions, channels)`, and `keep` is boolean of the same shape,
            True where the mask lets in.
    """

    @functools.wraps(f)
    def oracle(x, weights, config, training, mask):
        axis = config.get("axis", -1)
        moved = np.moveaxis(x, axis, -1)
        keep = np.ones(moved.shape, bool)
        if mask is not None:
            keep &= mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
        columns = (len(x), -1, moved.shape[-1])
        y = f(moved.reshape(columns), keep.reshape(columns), weights, config, training)
        return np.moveaxis(y.reshape(moved.shape), -1, axis)

    return oracle


def affine(y: Array, weights: Mapping[str, Any]) -> Array:
    """`gamma` and `beta` where there are any."""
    return y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)


def moments(x: Array, keep: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Mean and biased variance over `axes`, which stay with size 1."""
    mean = np.mean(x, axes, where=keep, keepdims=True)
    return mean, np.var(x, axes, where=keep, keepdims=True)
