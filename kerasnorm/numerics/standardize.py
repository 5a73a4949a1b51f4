"""Whole normalizations with their gradients written out.

For the methods whose statistics are those of rows or of columns; the others put theirs
together from the moments in `numerics`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from keras import ops

from kerasnorm.numerics.moments import (
    backend,
    elements,
    group_mean,
    inverse_root,
    mean_variance,
    moments,
    pool_groups,
    reductions,
    scale_shift,
)


Tensor = Any


def rows(
    x: Tensor,
    epsilon: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    center: bool = True,
    gain: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """Normalizes each row of `(..., columns)`, or each group of neighbours in it, by
    its own moments.

    The gradient is written out: with h the normalized row and P its mean,
    `dx = (w - P(w) - h P(w h)) / sigma`, `w = dy * gamma * gain`.

    Args:
        x: floating tensor; the last axis has a static size.
        epsilon: added to the variance.
        gamma, beta: `(columns,)`.
        center: False divides by the root mean square.
        gain: `(1,)`, multiplies all; cheaper than a gamma of equal numbers. Not with
            groups.
        groups: number of groups; divides the columns.
    """
    width = x.shape[-1] // groups
    parts = (width,) if groups == 1 else (groups, width)

    def kernel(x, gamma=None, beta=None, gain=None):
        mean = reductions.row_mean(x) if center else None
        d = x if mean is None else x - mean
        inverse = inverse_root(reductions.row_mean_square(d), epsilon)
        if mean is not None:
            mean, inverse = backend.settled(x, mean, inverse)
            d = x - mean
        slope = inverse if gain is None else inverse * gain
        if backend.reads_once() and gain is not None:
            y = d * inverse * gain  # XLA's kernel for rows is slower with the product
        else:
            y = d * slope
        y = y if gamma is None else y * gamma
        y = y if beta is None else y + beta

        def backward(dy):
            # The normalized row is not kept: its factor is one number a row.
            along = dy * d
            inner = reductions.row_mean(along, gamma)
            dx = dy if gamma is None else dy * gamma
            if center:
                dx = dx - reductions.row_mean(dy, gamma)
            gradients = [(dx - d * (inner * ops.square(inverse))) * slope]
            if gamma is not None:
                if mean is not None and backend.reads_once():
                    # For the sums alone, or all that they share is written out.
                    own_mean, own_slope = backend.apart(mean, slope)
                    gradients.append(
                        reductions.column_sum(dy * (x - own_mean), own_slope)
                    )
                else:
                    gradients.append(reductions.column_sum(along, slope))
            if beta is not None:
                gradients.append(reductions.column_sum(dy))
            if gain is not None:
                gradients.append(ops.sum(inner * inverse, 0) * width)
            return tuple(gradients)

        return y, backward

    gamma, beta = (v if v is None else ops.reshape(v, parts) for v in (gamma, beta))
    flat = ops.reshape(x, (-1, *parts))
    if backend.on_jax_cpu() and groups == 1 and len(x.shape) == 3 and x.shape[1] != 1:
        flat = x
        kernel = functools.partial(_rows_in_place, epsilon=epsilon, center=center)
    y = with_gradient(kernel, flat, gamma=gamma, beta=beta, gain=gain)
    return ops.reshape(y, ops.shape(x))


def _rows_in_place(x, gamma=None, beta=None, gain=None, *, epsilon, center):
    """`rows` of `(batch, positions, columns)` for JAX on a CPU, which has fast sums of
    products of two tensors, but none of tensors with other axes than the input's."""
    mean = ops.mean(x, -1, keepdims=True) if center else 0.0
    inverse = inverse_root(ops.mean(ops.square(x - mean), -1, keepdims=True), epsilon)
    mean, inverse = backend.settled(x, mean, inverse) if center else (mean, inverse)
    slope = inverse if gain is None else inverse * gain
    y = (x - mean) * slope
    y = y if gamma is None else y * gamma
    y = y if beta is None else y + beta

    def backward(dy):
        unit = (x - mean) * inverse
        w = dy if gamma is None else dy * gamma
        inner = ops.mean(w * unit, -1, keepdims=True)
        level = ops.mean(w, -1, keepdims=True) if center else ops.zeros_like(inner)
        level, factor = backend.barrier(level * slope, inner * slope)
        gradients = [w * slope - level - unit * factor]
        if gamma is not None:
            gradients.append(
                ops.sum(dy * unit if gain is None else dy * unit * gain, (0, 1))
            )
        if beta is not None:
            gradients.append(ops.sum(dy, (0, 1)))
        if gain is not None:
            gradients.append(ops.sum(inner, (0, 1)) * x.shape[-1])
        return tuple(gradients)

    return y, backward


def samples(
    x: Tensor,
    epsilon: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    center: bool = True,
) -> Tensor:
    """Normalizes each channel of each sample of `(batch, positions, channels)` by its
    own moments.

    The gradient is that of `rows`, with means over the positions.

    Args:
        x: floating tensor.
        epsilon: added to the variance.
        gamma, beta: `(channels,)`.
        center: False divides by the root mean square.
    """

    def kernel(x, gamma=None, beta=None):
        n = elements(x, (1,))
        if center and backend.reads_once():
            mean, variance = mean_variance(x, (1,), n)
            d = x - mean
        else:
            d = x - reductions.mean(x, (1,), n) if center else x
            variance = reductions.mean_square(d, (1,), n)
        inverse = inverse_root(variance, epsilon)
        slope = inverse if gamma is None else inverse * gamma
        y = d * slope
        y = y if beta is None else y + beta

        def backward(dy):
            unit = d * inverse
            along = reductions.mean(dy * unit, (1,), n)
            level = reductions.mean(dy, (1,), n)
            dx = dy - unit * along
            dx = (dx - level if center else dx) * slope
            return dx, *_of_channels(along, level, n, gamma, beta)

        return y, backward

    return with_gradient(kernel, x, gamma=gamma, beta=beta)


def groups(
    x: Tensor,
    groups: int,
    epsilon: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """Normalizes groups of neighbouring channels of each sample of `(batch, positions,
    channels)` by their own moments.

    The gradient is written out: with h the normalized group and P its mean,
    `dx = (w - P(w) - h P(w h)) / sigma`, `w = dy * gamma`. All of it follows from two
    sums a channel, of dy and of dy x.

    Args:
        x: floating tensor.
        groups: number of groups; divides the channels.
        epsilon: added to the variance.
        gamma, beta: `(channels,)`.
    """

    def kernel(x, gamma=None, beta=None):
        n = elements(x, (1,))
        mean, variance = pool_groups(*mean_variance(x, (1,), n), groups)
        inverse = inverse_root(variance, epsilon)
        y = scale_shift(x, mean, inverse, gamma, beta)

        def backward(dy):
            level = reductions.mean(dy, (1,), n)
            along = (reductions.mean(dy * x, (1,), n) - mean * level) * inverse
            slope, inner, outer = inverse, along, level
            if gamma is not None:
                slope, inner, outer = (v * gamma for v in (inverse, along, level))
            factor = group_mean(inner, groups) * ops.square(inverse)
            offset = mean * factor - group_mean(outer, groups) * inverse
            slope, factor, offset = backend.apart(slope, factor, offset)
            dx = dy * slope - (x * factor - offset)
            return dx, *_of_channels(along, level, n, gamma, beta)

        return y, backward

    return with_gradient(kernel, x, gamma=gamma, beta=beta)


def _of_channels(along, level, n, gamma, beta):
    """The gradients of those of gamma and beta that there are, from the means over the
    `n` positions of each sample: of dy times the normalized input, and of dy."""
    means = [along] * (gamma is not None) + [level] * (beta is not None)
    return [ops.sum(v, (0, 1)) * n for v in means]


def with_gradient(kernel: Callable, x: Tensor, **parameters: Tensor | None) -> Tensor:
    """`kernel(x, **parameters)` with its gradient, which is of those that are given."""
    given = {name: v for name, v in parameters.items() if v is not None}

    def of_given(x, *values):
        return kernel(x, **dict(zip(given, values, strict=True)))

    return backend.custom_gradient(of_given)(x, *given.values())


def lengths(v: Tensor, g: Tensor) -> Tensor:
    """Gives each column of `(rows, columns)` the length `g`: `v * g / ||v||`.

    The gradient is written out: with u the column of length 1,
    `dv = (dw - u sum(dw u)) * g / ||v||`, `dg = sum(dw u)`.

    Args:
        v: floating tensor; a column of zeros stays one.
        g: `(columns,)`.
    """

    def kernel(v, g):
        inverse = inverse_root(reductions.mean_square(v, (0,), 1.0), 0.0)
        slope = inverse * g

        def backward(dw):
            along = reductions.column_sum(dw * v) * inverse
            return dw * slope - v * (along * inverse * slope), ops.sum(along, 0)

        return v * slope, backward

    return backend.custom_gradient(kernel)(v, g)


def columns(
    x: Tensor,
    epsilon: float,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalizes each channel of `(batch, positions, channels)` by its moments.

    The gradient is written out: `dx = a * dy + b * (x - mean) + c` with three numbers a
    channel. What autodiff makes of it takes XLA up to ten times as long on a CPU.

    Args:
        x: floating tensor; the channels have a static size.
        epsilon: added to the variance.
        gamma, beta: `(channels,)`.

    Returns:
        The output, and the mean and the biased variance, `(channels,)`.
    """
    channels = x.shape[-1]
    if backend.reads_once():
        # What follows needs the rows to be many and flat, which is slower there.
        mean, variance = moments(x, (0, 1))
        y = scale_shift(x, mean, inverse_root(variance, epsilon), gamma, beta)
        return y, mean[0, 0], variance[0, 0]
    gamma = ops.ones((channels,), x.dtype) if gamma is None else gamma
    beta = ops.zeros((channels,), x.dtype) if beta is None else beta
    fused = reductions.fused_batch_normalization(x, gamma, beta, epsilon)
    if fused is not None:
        return fused

    def kernel(x, gamma, beta):
        n = elements(x, (0,))
        mean = ops.sum(x, 0) / n
        variance = ops.sum(reductions.squared_difference(x, mean), 0) / n
        inverse = inverse_root(variance, epsilon)
        slope = inverse * gamma

        def backward(dy, dmean, dvariance):
            centred = x - mean
            dbeta = ops.sum(dy, 0)
            dgamma = ops.sum(dy * centred, 0) * inverse
            along = 2 * dvariance - slope * inverse * dgamma
            dx = dy * slope + (centred * (along / n) + (dmean - slope * dbeta) / n)
            return dx, dgamma, dbeta

        return (x * slope + (beta - mean * slope), mean, variance), backward

    flat = ops.reshape(x, (-1, channels))
    y, mean, variance = backend.custom_gradient(kernel)(flat, gamma, beta)
    return ops.reshape(y, ops.shape(x)), mean, variance
