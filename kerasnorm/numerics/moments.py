"""What normalization methods share: moments, groups, masks, and the home of epsilon.

Layers hand their input over as `(batch, positions, channels)` in float32 or float64,
so that every function here reads the same for vectors, sequences, images and volumes.
Masks are boolean and broadcast against that shape; True marks what counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from kerasnorm.numerics import backend, reductions, replicas


Tensor = Any

# The share of the elements that a first guess of a mean is made of, one in so many.
STRIDE = 16

# Keeps the root finite where a caller sets epsilon to 0 and the variance is 0; far
# below any epsilon in use, and a normal number in float32.
TINY = 1e-30


def statistics_dtype(dtype: str) -> str:
    """The dtype of statistics: float32, or float64 where that is what comes in."""
    return "float64" if dtype == "float64" else "float32"


def inverse_root(variance: Tensor, epsilon: float | Tensor) -> Tensor:
    """`1 / sqrt(variance + epsilon)`; epsilon is added here and in `root` alone."""
    return ops.rsqrt(ops.maximum(variance + epsilon, TINY))


def root(variance: Tensor, epsilon: float | Tensor) -> Tensor:
    """`sqrt(variance + epsilon)`, without a division: eight bits may divide by 0."""
    level = ops.maximum(variance + epsilon, TINY)
    return level * ops.rsqrt(level)


def moments(
    x: Tensor,
    axes: Sequence[int],
    mask: Tensor | None = None,
    center: bool = True,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over `axes`, which are kept with size 1.

    The gradient is written out, as it needs neither the centred input nor broadcast
    intermediates.

    Args:
        x: floating tensor.
        axes: axes to reduce.
        mask: positions that count; elsewhere the input may hold anything, NaN
            included.
        center: False gives mean 0 and the mean square instead of the variance.

    Returns:
        `(mean, variance)`, both broadcastable to `x`. Where nothing counts both are 0.
    """
    axes = tuple(a % len(x.shape) for a in axes)
    if mask is not None or replicas.across(axes):
        return _counted_moments(x, axes, mask, center)

    n = elements(x, axes)
    if not center:
        square = reductions.mean_square(x, axes, n)
        return ops.zeros_like(square), square

    def kernel(x):
        mean, variance = mean_variance(x, axes, n)

        def backward(dm, dv):
            slope = dv * 2 / n
            return (x * slope + (dm / n - slope * mean),)

        return (mean, variance), backward

    return backend.custom_gradient(kernel)(x)


def mean_variance(
    x: Tensor, axes: Sequence[int], n: Tensor | float
) -> tuple[Tensor, Tensor]:
    """`moments` of all `n` elements along `axes`, without a gradient.

    E[x**2] - E[x]**2 loses all digits once the mean is large beside the standard
    deviation. So the input is read twice, or, where reading is what takes the time,
    once, about the mean c of one element in 16: `var = E[(x - c)**2] - (mean - c)**2`.
    A sixteenth that lies at c, away from the mean of all, makes a variance by itself:
    `(mean - c)**2 <= 15 var`, so the difference costs four bits at most.
    """
    if not axes or len(x.shape) - 1 in axes or not backend.reads_once():
        # Rows stay in registers between two passes, and are best left to XLA.
        mean = reductions.mean(x, axes, n)
        return mean, reductions.mean(reductions.squared_difference(x, mean), axes, n)
    longest = max(axes, key=lambda a: x.shape[a] or math.inf)
    some = x[(slice(None),) * longest + (slice(None, None, STRIDE),)]
    center = ops.mean(some, axes, keepdims=True)
    d = x - center
    off, square = (ops.sum(v, axes, keepdims=True) / n for v in (d, ops.square(d)))
    return center + off, ops.maximum(square - ops.square(off), 0)


def _counted_moments(x, axes, mask, center):
    """Moments of what counts, of all replicas where the batch is reduced."""
    zero = ops.zeros((), x.dtype)
    if mask is None:
        n = ops.ones((1,) * len(x.shape), x.dtype) * elements(x, axes)
    else:
        x = ops.where(mask, x, zero)
        # A mask of size 1 along a reduced axis stands for all of it.
        repeats = [a for a in axes if mask.shape[a] == 1]
        n = ops.sum(ops.cast(mask, x.dtype), axes, keepdims=True) * elements(x, repeats)
    n, total = replicas.totals(axes, n, ops.sum(x, axes, keepdims=True))
    n = ops.maximum(n, 1)
    mean = total / n if center else ops.zeros_like(total)
    square = ops.square(x - mean)
    if mask is not None:
        square = ops.where(mask, square, zero)
    (square,) = replicas.totals(axes, ops.sum(square, axes, keepdims=True))
    return mean, square / n


def elements(x: Tensor, axes: Sequence[int]) -> Tensor | float:
    """Number of elements along `axes`, a float where the shape is static."""
    sizes = [x.shape[a] for a in axes]
    if all(isinstance(s, int) for s in sizes):
        return float(math.prod(sizes))
    shape = ops.shape(x)  # in an export of JAX, of symbols
    return ops.cast(ops.convert_to_tensor(math.prod(shape[a] for a in axes)), x.dtype)


def count(mask: Tensor | None, axes: Sequence[int]) -> Tensor | float:
    """Weight of each channel when channels are pooled: 1, or what the mask lets in."""
    if mask is None or mask.shape[-1] == 1:
        return 1.0
    return ops.sum(ops.cast(mask, "float32"), axes, keepdims=True)


def seen(mask: Tensor | None, dtype: str) -> Tensor | float:
    """1 where a channel has any valid position in the batch, 0 where it has none."""
    if mask is None:
        return 1.0
    return ops.cast(replicas.any_valid(mask, (0, 1)), dtype)


def pool(
    mean: Tensor, variance: Tensor, axes: Sequence[int], weight: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Moments of a union from the moments of its parts, by the law of total variance.

    Args:
        mean, variance: of the parts.
        axes: axes along which the parts lie; kept with size 1.
        weight: number of elements of each part, broadcastable to `mean`; 1.0 where all
            are of one size.
    """
    if isinstance(weight, float) and not replicas.across(axes):
        pooled = ops.mean(mean, axes, keepdims=True)
        spread = variance + ops.square(mean - pooled)
        return pooled, ops.mean(spread, axes, keepdims=True)
    weight = ops.broadcast_to(ops.cast(weight, mean.dtype), ops.shape(mean))
    sums = (ops.sum(v, axes, keepdims=True) for v in (weight, mean * weight))
    total, pooled = replicas.totals(axes, *sums)
    total = ops.maximum(total, 1)
    pooled = pooled / total
    spread = (variance + ops.square(mean - pooled)) * weight
    (spread,) = replicas.totals(axes, ops.sum(spread, axes, keepdims=True))
    return pooled, spread / total


def pool_groups(
    mean: Tensor,
    variance: Tensor,
    groups: int,
    weight: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Moments of groups of neighbouring channels from moments of single channels.

    The law of total variance, so there is no cancellation: the variance of a group is
    the mean of its channels' variances plus the variance of their means. The input
    itself is never reshaped into groups, which costs several passes over it.

    Args:
        mean, variance: `(..., channels)`.
        groups: number of groups; divides the channels.
        weight: number of elements behind each channel, broadcastable to `mean`.

    Returns:
        `(mean, variance)` of the group that each channel is in, `(..., channels)`.
    """
    if groups == mean.shape[-1]:
        return mean, variance
    if not isinstance(weight, float):
        weight = ops.broadcast_to(ops.cast(weight, mean.dtype), ops.shape(mean))
    pooled = group_mean(mean, groups, weight)
    return pooled, group_mean(variance + ops.square(mean - pooled), groups, weight)


def group_mean(v: Tensor, groups: int, weight: Tensor | float = 1.0) -> Tensor:
    """Mean over the group that each channel of `(..., channels)` is in, a value for
    each channel, with weights of the same shape."""
    shape, channels = ops.shape(v), v.shape[-1]
    if groups == channels:
        return v

    def split(v):
        return ops.reshape(v, (*shape[:-1], groups, channels // groups))

    if isinstance(weight, float):
        pooled = ops.mean(split(v), axis=-1, keepdims=True)
    else:
        weight = split(weight)
        total = ops.sum(split(v) * weight, axis=-1, keepdims=True)
        pooled = total / ops.maximum(ops.sum(weight, axis=-1, keepdims=True), 1)
    pooled = ops.broadcast_to(pooled, (*shape[:-1], groups, channels // groups))
    return ops.reshape(pooled, shape)


def scale_shift(
    x: Tensor,
    mean: Tensor | None,
    inverse: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """`(x - mean) * inverse * gamma + beta` as one multiplication and one addition."""
    slope = inverse if gamma is None else inverse * gamma
    offset = beta
    if mean is not None and backend.translated():
        x = x - mean  # in eight bits the two products would not cancel
    elif mean is not None:
        offset = -mean * slope if beta is None else beta - mean * slope
    if offset is not None and slope.shape == offset.shape == x.shape[-1:]:
        return reductions.multiply_add(x, slope, offset)
    small = slope.shape[1:2] != x.shape[1:2] and slope.shape[-1] != 1
    if small and offset is not None:
        slope, offset = backend.apart(slope, offset)
    y = x * slope
    return y if offset is None else y + offset


def align_mask(mask: Tensor, rank: int, axes: Sequence[int]) -> Tensor:
    """A boolean mask with as many axes as the input.

    A mask covers the leading axes of the input, the normalized `axes` (the channels)
    left out: `(B, T)` against `(B, T, F)`, `(B, T, H, W, C)`, or `(B, C, T)` with
    axis 1. One that has all axes already is used as it is.
    """
    mask = ops.cast(mask, "bool")
    given = len(mask.shape)
    if given == rank:
        return mask
    kept = [a for a in range(rank) if a not in axes][:given]
    if len(kept) < given:  # the axes to normalize are masked themselves
        kept = list(range(given))
    missing = [a for a in range(rank) if a not in kept]
    for a in missing:
        mask = ops.expand_dims(mask, a)
    return mask


def window_sum(x: Tensor, size: int, axis: int) -> Tensor:
    """Sums over a window of `size` around each element along `axis`.

    Beyond the ends there are zeros. Sums of 1, 2, 4, ... neighbours are combined: about
    log2(size) additions, without the cancellation that differences of a running sum
    suffer.

    Args:
        x: any tensor.
        size: odd, at least 1.
        axis: axis to slide along; its size may be dynamic.

    Returns:
        A tensor shaped as `x`.
    """
    axis %= len(x.shape)

    def cut(v, start, end):
        return v[(slice(None),) * axis + (slice(start, end or None),)]

    half = size // 2
    ends = [(half if a == axis else 0,) * 2 for a in range(len(x.shape))]
    block = ops.pad(x, ends)
    total, done, width = None, 0, 1
    while True:  # block[i] is the sum of `width` neighbours from i on
        if size & width:
            piece = cut(block, done, done + width - size)
            total = piece if total is None else total + piece
            done += width
        if 2 * width > size:
            return total
        block = cut(block, 0, -width) + cut(block, width, None)
        width *= 2


def saturate(x: Tensor, dtype: str) -> Tensor:
    """Casts, with values beyond the largest float16 held there instead of infinite."""
    if dtype == "float16":
        x = ops.clip(x, -65504.0, 65504.0)
    return ops.cast(x, dtype)


def channels_last(
    x: Tensor, axis: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """For methods that need the positions as they are, not flattened.

    Args:
        x: `(batch, ...)`.
        axis: the channels.
        mask: as layers get it, covering leading axes of `x`.

    Returns:
        `(x, mask, back)`: the channels last in both, the mask with as many axes as
        `x`, and a function that puts the channels of a result where they were.
    """
    rank = len(x.shape)
    if mask is not None:
        mask = align_mask(mask, rank, (axis,))
    if axis == rank - 1:
        return x, mask, lambda y: y
    mask = None if mask is None else ops.moveaxis(mask, axis, -1)
    return ops.moveaxis(x, axis, -1), mask, lambda y: ops.moveaxis(y, -1, axis)


# ------------------------------------------------------------------ whitening


def covariance(
    x: Tensor, size: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, centred input and biased covariance of groups of neighbouring channels.

    Args:
        x: `(batch, positions, channels)`.
        size: channels of a group; divides the channels.
        mask: positions that count; the centred input is 0 elsewhere.

    Returns:
        `(1, 1, channels)`, as `x`, and `(groups, size, size)`.
    """
    mean, _ = moments(x, (0, 1), mask)
    centred = x - mean
    if mask is not None:
        centred = ops.where(mask, centred, ops.zeros((), x.dtype))
        n = ops.max(ops.sum(ops.cast(mask, x.dtype), (0, 1)))
    else:
        n = ops.cast(elements(x, (0, 1)), x.dtype)
    columns = ops.reshape(centred, (-1, x.shape[-1] // size, size))
    columns = ops.transpose(columns, (1, 2, 0))
    products = backend.exact_matmul(columns, ops.transpose(columns, (0, 2, 1)))
    n, products = replicas.totals((0, 1), n, products)
    return mean, centred, products / ops.maximum(n, 1)


def rotate(x: Tensor, matrices: Tensor) -> Tensor:
    """Multiplies each group of channels of `x` by its `(groups, size, size)` matrix."""
    groups, size, _ = matrices.shape
    if backend.translated():  # eight bits have one large product, and no small ones
        one = ops.eye(groups, dtype=x.dtype)[:, None, :, None]
        blocks = one * ops.transpose(matrices, (0, 2, 1))[:, :, None, :]
        return ops.matmul(x, ops.reshape(blocks, (groups * size, groups * size)))
    parts = ops.reshape(x, (*ops.shape(x)[:-1], groups, size))
    turned = ops.einsum("bpgi,gji->bpgj", parts, matrices)
    return ops.reshape(turned, ops.shape(x))


def inverse_root_matrix(matrices: Tensor, least: float) -> Tensor:
    """Inverse square roots of symmetric positive definite matrices, `(..., n, n)`.

    The gradient is in closed form: with eigenvalues l, its factors
    `-1 / (sqrt(l_i l_j) (sqrt(l_i) + sqrt(l_j)))` stay bounded where eigenvalues meet,
    at which the gradient of the eigenvectors alone is infinite.

    Args:
        least: smallest eigenvalue there can be; rounding leaves smaller ones.
    """

    def kernel(matrices):
        values, vectors = ops.linalg.eigh(matrices)
        root = ops.sqrt(ops.maximum(values, max(least, TINY)))
        turned = ops.swapaxes(vectors, -1, -2)
        result = ops.matmul(vectors / ops.expand_dims(root, -2), turned)

        def backward(d):
            d = (d + ops.swapaxes(d, -1, -2)) / 2
            a, b = ops.expand_dims(root, -1), ops.expand_dims(root, -2)
            inner = ops.matmul(ops.matmul(turned, d), vectors)
            inner = -inner / (a * b * (a + b))
            return (ops.matmul(ops.matmul(vectors, inner), turned),)

        return result, backward

    return backend.custom_gradient(kernel)(matrices)


# ----------------------------------------------------------------- recurrences


def recurrence(decay: Tensor, value: Tensor, start: Tensor) -> Tensor:
    """`s[t] = decay[t] * s[t - 1] + value[t]` along the first axis, in log2 steps.

    Args:
        decay, value: of one shape.
        start: `s[-1]`.

    Returns:
        All `s[t]`, of the shape of `value`.
    """
    value = ops.concatenate([value[:1] + decay[:1] * start, value[1:]])
    length = value.shape[0]
    index = ops.arange(ops.shape(value)[0])
    index = ops.reshape(index, (-1,) + (1,) * (len(value.shape) - 1))
    # A dynamic length costs as many steps as the longest takes.
    for k in range(24 if length is None else math.ceil(math.log2(max(length, 1)))):
        before = ops.maximum(index - 2**k, 0)
        there = index >= 2**k
        past = ops.take(value, ops.reshape(before, (-1,)), axis=0)
        older = ops.take(decay, ops.reshape(before, (-1,)), axis=0)
        value = value + ops.where(there, decay * past, ops.zeros_like(value))
        decay = ops.where(there, decay * older, decay)
    return value


def delayed(states: Tensor, start: Tensor) -> Tensor:
    """The states one step earlier, beginning with `start`."""
    start = ops.broadcast_to(start, ops.shape(states[:1]))
    return ops.concatenate([start, states[:-1]])
