"""Sums, means and multiply-adds, each by what is the fastest on the backend at hand.

What they compute is the same everywhere; the choices were measured, see
`tests/benchmarks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from kerasnorm.numerics import backend


Tensor = Any

# Sums over fewer elements than this are no work for a matrix product; over more than
# the other it is neither faster nor as exact as a reduction.
SHORT, LONG = 32, 2**17


def row_mean(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over the last axis, of `x * weights` where given: `(columns,)`, or one of
    several rows, `(groups, columns)`.

    On a CPU a matrix product is the fastest where there are weights, which it takes
    along, and under TensorFlow. Elsewhere it may run in reduced precision (TF32,
    bfloat16), so it is not used there.
    """
    columns = x.shape[-1]
    if weights is not None and len(weights.shape) > 1:
        x, weights = x * weights, None
    product = weights is not None or keras.backend.backend() == "tensorflow"
    product = product and backend.on_cpu() and not backend.translated()
    if product and SHORT <= columns < LONG:
        if weights is None:
            weights = ops.ones((columns,), x.dtype)
        return ops.matmul(x, ops.reshape(weights / columns, (columns, 1)))
    return ops.mean(x if weights is None else x * weights, axis=-1, keepdims=True)


def row_mean_square(x: Tensor) -> Tensor:
    """Mean over the last axis of `x**2`."""
    if backend.on_cpu() and backend.under_tensorflow_xla():
        return row_mean(ops.square(x))
    return mean_square(x, (-1,), float(x.shape[-1]))


def mean(x: Tensor, axes: Sequence[int], n: Tensor | float) -> Tensor:
    """`sum(x) / n` over `axes`, kept with size 1.

    Over many positions of `(batch, positions, channels)` TensorFlow's own reduction
    takes up to 1.7 times as long on a CPU as a matrix product; over few it is faster.
    Over the batch alone JAX's takes ten times as long.
    """
    axes = tuple(axes)
    if axes == (0,) and backend.on_jax_cpu():
        total = column_sum(ops.reshape(x, (x.shape[0], -1)))
        return ops.reshape(total, (1, *x.shape[1:])) / n
    if len(x.shape) != 3 or axes not in ((1,), (0, 1)) or not backend.plain_cpu():
        return ops.sum(x, axes, keepdims=True) / n
    if axes == (1,) and (x.shape[1] or SHORT) < SHORT:
        return ops.sum(x, axes, keepdims=True) / n
    if axes == (0, 1) and x.shape[0] != 1:
        x = ops.reshape(x, (1, -1, x.shape[-1]))
    weight = ops.ones((1, 1, ops.shape(x)[1]), x.dtype) / n
    return ops.matmul(weight, x)


def column_sum(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over the first axis, weighted by `(rows, 1)`, or `(rows, groups, 1)`.

    On a CPU a matrix product is the fastest of `(rows, columns)`, but for XLA as
    TensorFlow calls it, which reduces together with what comes before.
    """
    if len(x.shape) > 2 or not backend.on_cpu() or backend.under_tensorflow_xla():
        return ops.sum(x if weights is None else x * weights, axis=0)
    if weights is None:
        weights = ops.ones((ops.shape(x)[0], 1), x.dtype)
    return ops.reshape(ops.matmul(ops.transpose(weights), x), (x.shape[-1],))


def multiply_add(x: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """`x * slope + offset` of `(batch, positions, channels)` and two `(channels,)`, in
    one pass where there is a kernel for it: in TensorFlow's plain graph on a CPU."""
    # On few vectors, or an unknown number, most of the time is that of calling it.
    few = x.shape[1] == 1 and (x.shape[0] or 0) * x.shape[2] < 2**18
    if few or not backend.plain_cpu() or x.dtype != "float32":
        return x * slope + offset
    import tensorflow as tf

    def kernel(x, slope, offset):
        # Inference of a batch normalization whose statistics are 0 and 1.
        channels = x.shape[-1]
        y, *_ = tf.raw_ops.FusedBatchNormV3(
            x=ops.expand_dims(x, 2),
            scale=slope,
            offset=offset,
            mean=tf.zeros((channels,)),
            variance=tf.ones((channels,)),
            epsilon=0.0,
            is_training=False,
        )

        # Its own gradient computes all three, needed or not.
        def backward(dy):
            return (
                dy * slope,
                column_sum(ops.reshape(dy * x, (-1, channels))),
                column_sum(ops.reshape(dy, (-1, channels))),
            )

        return tf.squeeze(y, 2), backward

    return backend.custom_gradient(kernel)(x, slope, offset)


def fused_batch_normalization(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Training-mode batch normalization of `(rows, positions, channels)`, one kernel.

    Args:
        x: float32 tensor.
        gamma, beta: `(channels,)`.
        epsilon: added to the variance.

    Returns:
        The output, the mean and the biased variance; None where there is no such
        kernel. TensorFlow alone has one, in float32. Under XLA it is not used: there
        it is lowered to E[x**2] - E[x]**2, which loses all digits once the mean is
        large beside the standard deviation (measured: NaN at 1000 to 1).
    """
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    # cuDNN asks for an epsilon of at least 1e-5.
    if (
        x.dtype != tf.float32
        or backend.under_xla()
        or (not backend.on_cpu() and epsilon < 1.001e-5)
    ):
        return None
    y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=ops.expand_dims(x, 2),
        scale=gamma,
        offset=beta,
        mean=tf.zeros((0,)),
        variance=tf.zeros((0,)),
        epsilon=epsilon,
        is_training=True,
    )
    # The kernel reports the unbiased variance; Keras's moving one is biased.
    shape: Any = tf.shape(x)
    n = tf.cast(shape[0] * shape[1], tf.float32)
    variance = variance * (tf.maximum(n - 1.0, 1.0) / n)
    return tf.squeeze(y, 2), mean, variance


def squared_difference(x: Tensor, y: Tensor) -> Tensor:
    """`(x - y)**2` in one pass over `x`."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.math.squared_difference(x, y)
    return ops.square(x - y)


def mean_square(x: Tensor, axes: Sequence[int], n: Tensor | float) -> Tensor:
    """`sum(x**2) / n` over `axes`, kept with size 1, without a tensor of squares."""

    def kernel(x):
        if keras.backend.backend() == "tensorflow" and not (
            backend.under_xla() or backend.translated()
        ):
            import tensorflow as tf

            # Its own gradient is NaN where everything is 0.
            result = tf.square(tf.math.reduce_euclidean_norm(x, axes, keepdims=True))
        else:
            result = ops.sum(ops.square(x), axes, keepdims=True)
        return result / n, lambda upstream: (x * (upstream * 2 / n),)

    return backend.custom_gradient(kernel)(x)
