"""The properties, as pure functions of arrays.

All but `moments` and `gram`, which run on tensors where the activations are, take and
give NumPy. What is measured at a layer is what it learns from: the activations it
reads, `(samples, ..., channels)`, and the gradients that reach its outputs.

Which of them predict trainability, and why: Lubana, Dick and Tanaka, "Beyond BatchNorm:
Towards a Unified Understanding of Normalization in Deep Learning", NeurIPS 2021,
https://arxiv.org/abs/2106.05956
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from kerasnorm.numerics import reductions


Array = np.ndarray
Tensor = Any

# Below this share of the largest, an eigenvalue is rounding.
ROUNDING = 1e-6


def moments(h: Tensor, axis: int = -1) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over samples and positions, float32.

    Args:
        h: activations, `(samples, ..., channels)`.
        axis: the channel axis.

    Returns:
        Two tensors `(channels,)`.
    """
    h = ops.cast(h, "float32")
    axis %= len(h.shape)
    if axis != len(h.shape) - 1:
        h = ops.moveaxis(h, axis, -1)
    h = ops.reshape(h, (-1, h.shape[-1]))
    mean = ops.mean(h, axis=0)
    return mean, ops.mean(reductions.squared_difference(h, mean), axis=0)


def gram(h: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Cosines between the flattened activations of any two samples, float32.

        K_ij = <h_i, h_j> / (||h_i|| ||h_j||)

    Args:
        h: activations, `(samples, ...)`; the first axis may also be a multiple of the
            samples, as where a model cuts an image into windows.
        samples: how many samples it holds.

    Returns:
        The cosines, `(samples, samples)`, and the norms `||h_i||`, `(samples,)`. The
        cosine with a sample that is 0 is 0.
    """
    h = ops.reshape(ops.cast(h, "float32"), (samples, -1))
    products = ops.matmul(h, ops.transpose(h))
    squares = ops.diagonal(products)
    # Squares of exploded or vanished activations leave float32's range; only then is
    # it worth a copy of them all.
    fine = ops.all((squares > 1e-30) & (squares < 1e37))
    products, size = ops.cond(
        fine, lambda: (products, ops.ones(())), lambda: _scaled_products(h)
    )
    norms = ops.sqrt(ops.diagonal(products))
    safe = ops.where(norms > 0, norms, 1.0)
    return products / safe / safe[:, None], norms * size


def _scaled_products(h: Tensor) -> tuple[Tensor, Tensor]:
    """Products of the rows over the square of a scale, and that scale: a few entries
    tell it; if all of them are 0, there is nothing to scale."""
    size = ops.max(ops.abs(h[:, :: max(1, h.shape[1] // 64)]))
    size = ops.where(ops.isfinite(size) & (size > 0), size, 1.0)
    h = h / size
    return ops.matmul(h, ops.transpose(h)), size


def activation_variance(variance: Array) -> float:
    """Stable forward: the mean over channels of the variance within each.

        V = mean_c Var_{n,p} h_npc                  n samples, p positions, c channels

    Args:
        variance: `(channels,)`, of `moments`.
    """
    return float(np.mean(variance))


def cosine_similarity(cosines: Array) -> float:
    """Informative forward: the mean cosine between two different samples.

        c = mean_{i != j} K_ij                       in [-1, 1]; 1: all point one way

    Args:
        cosines: `(samples, samples)`, of `gram`; NaN for fewer than two samples.
    """
    n = len(cosines)
    if n < 2:
        return float("nan")
    return float((np.sum(cosines) - np.trace(cosines)) / (n * (n - 1)))


def stable_rank(cosines: Array) -> float:
    """Informative forward: along how many directions the samples are spread.

        r = trace(K) / ||K||_2                       in [1, samples]

    Args:
        cosines: `(samples, samples)`, of `gram`.
    """
    values = _eigenvalues(cosines)
    return float(values.sum() / values.max()) if values.max() > 0 else float("nan")


def effective_rank(cosines: Array) -> float:
    """How many directions the samples use, counted by entropy.

        r = exp(-sum_k p_k log p_k),  p_k = s_k / sum s    s_k singular values of the
                                                           samples, each of norm 1

    Args:
        cosines: `(samples, samples)`, of `gram`; its eigenvalues are `s_k**2`.

    Paper: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    values = _eigenvalues(cosines)
    if not values.max() > 0:
        return float("nan")
    s = np.sqrt(values)
    p = s[s > 0] / s.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def gradient_norm(square: float, samples: int) -> float:
    """Stable backward: the size of the gradient that reaches a layer's outputs.

        g = sqrt(mean_n ||dL/dz_n||^2)          L the sum over samples of their losses

    Root mean square over samples, so that it does not depend on how many there are.

    Args:
        square: the sum over samples and units of the squared gradient.
        samples: how many samples.
    """
    return float(np.sqrt(square / samples))


def dead_share(mean: Array, variance: Array) -> float:
    """Share of the units that are 0 for every sample and position, in [0, 1].

    Args:
        mean, variance: `(channels,)`, of `moments`.
    """
    return float(np.mean((mean == 0) & (variance == 0)))


def effective_learning_rate(learning_rate: float, weight_norm: float) -> float:
    """The learning rate of the weight's direction, `lr / ||w||**2`.

    A weight whose scale does not matter, because a normalization follows, moves on a
    sphere: a step of gradient descent turns it as one with this learning rate would
    turn a weight of norm 1. For other weights the figure has no meaning.

    Paper: van Laarhoven, "L2 regularization versus batch and weight normalization",
    2017, https://arxiv.org/abs/1706.05350
    """
    return learning_rate / weight_norm**2 if weight_norm else float("inf")


def relative_step(learning_rate: float, gradient: float, weight_norm: float) -> float:
    """By what share of itself one step of gradient descent moves a weight.

        s = lr ||dL/dw|| / ||w||                     L the mean loss of the batch

    Paper: You, Gitman and Ginsburg, "Large batch training of convolutional networks",
    2017, https://arxiv.org/abs/1708.03888, whose trust ratio is its inverse.
    """
    return learning_rate * gradient / weight_norm if weight_norm else float("inf")


def statistics_distance(
    mean: Array, variance: Array, running_mean: Array, running_variance: Array
) -> float:
    """How far the statistics of the data are from the running ones of a layer.

        d = sqrt(mean_c [(mu - m)^2 + (s - v)^2] / v^2)     m, v running mean, deviation

    The Wasserstein distance of two Gaussians with these moments, in running standard
    deviations, root mean square over channels. Running at inference what was trained
    at another distance is where batch methods lose accuracy.

    Args:
        mean, variance: `(channels,)` of the data.
        running_mean, running_variance: `(channels,)` of the layer.
    """
    s, v = np.sqrt(variance), np.sqrt(np.maximum(running_variance, 1e-12))
    square = ((mean - running_mean) ** 2 + (s - v) ** 2) / v**2
    return float(np.sqrt(np.mean(square)))


def batch_dependence(first: Array, second: Array) -> float:
    """How much a sample's values depend on the other samples of its batch.

        d = sqrt(sum_n ||a_n - b_n||^2 / sum_n ||a_n - mean a||^2)

    0: not at all. 1: exchanging the others changes a sample's values as much as the
    samples differ among themselves.

    Args:
        first, second: `(samples, units)`: the same samples amid two sets of others.
    """
    spread = np.sum((first - first.mean(0)) ** 2)
    change = np.sum((first - second) ** 2)
    if change <= 1e-10 * np.sum(first**2):  # what float32 does by itself
        change = 0.0
    if not spread:
        return 0.0 if not change else float("inf")
    return float(np.sqrt(change / spread))


@dataclass(frozen=True)
class Growth:
    """How a positive quantity goes with depth.

    Attributes:
        factor: by which it is multiplied from layer to layer, on geometric average.
        kind: `"exponential"` or `"polynomial"`, whichever law fits the logarithms
            better; `"stable"` where it changes by less than a factor of 4 in all.
        exponent: of the depth, where the law is a power: about 1 for linear growth.
        total: last value over first.
    """

    factor: float
    kind: str
    exponent: float
    total: float


STABLE = 4.0


def growth(values: Array) -> Growth:
    """Fits `log v = a + l log(factor)` and `log v = a + exponent log(1 + l)`.

    Exponential growth is what stops training; with a normalization in each branch, a
    residual network's variance grows polynomially (linearly at initialization).

    Args:
        values: `(layers,)`, positive, in order of depth; others are left out.
    """
    values = np.asarray(values, "float64")
    keep = np.isfinite(values) & (values > 0)
    depth, logs = np.arange(len(values))[keep], np.log(values[keep])
    if len(logs) < 2:
        nan = float("nan")
        return Growth(nan, "stable", nan, nan)
    slope, misfit = _line(depth, logs)
    exponent, other = _line(np.log1p(depth), logs)
    total = float(np.exp(logs[-1] - logs[0]))
    kind = "exponential" if misfit <= other else "polynomial"
    if np.ptp(logs) < np.log(STABLE):
        kind = "stable"
    return Growth(float(np.exp(slope)), kind, float(exponent), total)


def _line(x: Array, y: Array) -> tuple[float, float]:
    """Slope and residual sum of squares of a least-squares line."""
    x, y = x - x.mean(), y - y.mean()
    slope = float((x @ y) / (x @ x))
    return slope, float(np.sum((y - slope * x) ** 2))


def _eigenvalues(cosines: Array) -> Array:
    if not np.isfinite(cosines).all():
        return np.array([np.nan])
    values = np.linalg.eigvalsh(np.asarray(cosines, "float64"))
    return np.where(values > ROUNDING * values.max(), values, 0.0)
