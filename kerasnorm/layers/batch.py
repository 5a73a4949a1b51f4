"""Batch normalization."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm.method import adoption, moving_statistics
from kerasnorm.method.normalization import BatchStatistics
from kerasnorm.method.registry import Case, Fidelity, Reason, Refusal, declare
from kerasnorm.numerics import moments, replicas, standardize


@keras.saving.register_keras_serializable("kerasnorm")
class BatchNormalization(BatchStatistics):
    r"""Normalizes each channel over the batch and all positions.

    Takes the place of `keras.layers.BatchNormalization`: same arguments, weights and
    files. It reads masks of any rank, stays finite in float16, and is faster.

        training:   y = gamma * (x - mean(x)) / sqrt(var(x) + epsilon) + beta
        inference:  the same with moving_mean and moving_variance

    `moving = moving * momentum + batch * (1 - momentum)`; the variance is the biased
    one. As in Keras, `trainable = False` means inference mode.

    Paper: Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167

    Args:
        axis: integer, axis of the channels. Default -1.
        momentum: weight of the old moving statistics, 0 to 1. Default 0.99.
        epsilon: added to the variance. Default 1e-3.
        center, scale: whether to use `beta` and `gamma`.
        moving_mean_initializer, moving_variance_initializer: `"zeros"`, `"ones"`.
        **kwargs: `synchronized`, see `kerasnorm.BatchStatistics`; and those of
            `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: batch statistics (True) or moving ones.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: `axis` is outside the input or of unknown size.
    """

    def __init__(
        self,
        axis=-1,
        momentum=0.99,
        epsilon=1e-3,
        center=True,
        scale=True,
        *,
        moving_mean_initializer="zeros",
        moving_variance_initializer="ones",
        **kwargs,
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        self.momentum = float(momentum)
        self.moving_mean_initializer = keras.initializers.get(moving_mean_initializer)
        self.moving_variance_initializer = keras.initializers.get(
            moving_variance_initializer
        )

    def build(self, input_shape):
        super().build(input_shape)
        shape = (input_shape[self.axis],)
        # float16 cannot hold the variance of large activations.
        frozen = {"trainable": False, "dtype": self.statistics_dtype}
        self.moving_mean = self.channel_weight("moving_mean", shape, **frozen)
        self.moving_variance = self.channel_weight("moving_variance", shape, **frozen)

    def normalize(self, x, mask, training):
        training = training and self.trainable
        gamma, beta = self.affine(x.dtype)
        moving = self.moving(x.dtype)
        if not training:
            inverse = moments.inverse_root(moving[1], self.epsilon)
            return moments.scale_shift(x, moving[0], inverse, gamma, beta)
        if mask is None and not replicas.together():
            y, mean, variance = standardize.columns(x, self.epsilon, gamma, beta)
            self._update(moving, mean, variance, 1.0)
            return y
        # One long column per channel: reductions over one axis are the fastest.
        x = ops.reshape(x, (1, -1, x.shape[-1]))
        seen = 1.0
        if mask is not None:
            mask = ops.reshape(mask, (1, -1, mask.shape[-1]))
            seen = moments.seen(mask, x.dtype)
        mean, variance = moments.moments(x, (0, 1), mask)
        self._update(moving, mean[0, 0], variance[0, 0], seen)
        inverse = moments.inverse_root(variance, self.epsilon)
        return moments.scale_shift(x, mean, inverse, gamma, beta)

    def moving(self, dtype):
        """The moving mean and variance, in `dtype`."""
        return ops.cast(self.moving_mean, dtype), ops.cast(self.moving_variance, dtype)

    def pooled(self, parts, count, mask, training):
        """Moments of each channel from those of each sample, of shape `(batch, 1,
        channels)`, which move the moving ones; the moving ones at inference."""
        moving = self.moving(parts[0].dtype)
        if not (training and self.trainable):
            return moving
        mean, variance = parts
        mean, variance = moments.pool(mean, variance, (0,), count)
        seen = moments.seen(mask, mean.dtype)
        self._update(moving, mean[0, 0], variance[0, 0], seen)
        return mean, variance

    def _update(self, moving, mean, variance, seen):
        # A batch that is masked throughout leaves the moving statistics alone.
        rate = (1.0 - self.momentum) * seen
        old_mean, old_variance = moving
        self.moving_mean.assign(old_mean + (mean - old_mean) * rate)
        self.moving_variance.assign(old_variance + (variance - old_variance) * rate)


def oracle(x, weights, config, training, mask):
    axis = config.get("axis", -1) % x.ndim
    others = tuple(a for a in range(x.ndim) if a != axis)
    shape = [x.shape[axis] if a == axis else 1 for a in range(x.ndim)]
    mean, variance = weights["moving_mean"], weights["moving_variance"]
    if training:
        count = np.ones_like(x)
        if mask is not None:
            count = count * np.reshape(mask, mask.shape + (1,) * (x.ndim - mask.ndim))
        mean = np.average(x, others, count)
        centred = x - mean.reshape(shape)
        variance = np.average(centred**2, others, count)
    y = (x - mean.reshape(shape)) / np.sqrt(
        variance.reshape(shape) + config.get("epsilon", 1e-3)
    )
    y = y * weights.get("gamma", np.ones(1)).reshape(shape if "gamma" in weights else 1)
    return y + weights.get("beta", np.zeros(1)).reshape(
        shape if "beta" in weights else 1
    )


def read_keras(layer):
    return adoption.describe(
        layer, "batch", "momentum", mean="moving_mean", variance="moving_variance"
    )


def adopt(source, site, options):
    if source.method == "batch":
        return adoption.already("batch normalization")
    if not options.force and any(shape[0] == 1 for shape in adoption.shapes(site)):
        return Refusal(
            Reason.DEGENERATE,
            "the batch size is fixed at 1, so batch statistics are those of one sample",
            "group",
        )
    cls = adoption.pick(
        keras.layers.BatchNormalization, BatchNormalization, site, options
    )
    if isinstance(cls, Refusal):
        return cls
    axis = adoption.last_axis(source)
    layer = adoption.make(cls, source, site, options, axis=axis)
    if moving_statistics.is_running(source):
        return adoption.adopt(site, layer, Fidelity.AT_INFERENCE)
    note = "moving statistics start at 0 and 1: fit, or train, before use"
    return adoption.adopt(site, layer, Fidelity.FRESH, note)


def check_loads_keras_weights():
    """Same weights in the same order as Keras's layer, and the same outputs."""
    rng = np.random.default_rng(0)
    stock, ours = keras.layers.BatchNormalization(), BatchNormalization()
    for layer in (stock, ours):
        layer.build((None, 3, 4))
    values = [np.abs(rng.normal(size=v.shape)) for v in stock.get_weights()]
    stock.set_weights(values)
    ours.set_weights(values)
    x = rng.normal(size=(5, 3, 4)).astype("float32")
    for training in (False, True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(stock(x, training=training)),
            ops.convert_to_numpy(ours(x, training=training)),
            rtol=1e-5,
            atol=1e-5,
        )
    for theirs, mine in zip(stock.get_weights(), ours.get_weights(), strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=1e-5, atol=1e-6)


def check_frozen_means_inference():
    layer = BatchNormalization(trainable=False)
    x = np.random.default_rng(0).normal(3, 2, (6, 4)).astype("float32")
    expected = x / np.sqrt(1 + 1e-3)
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(x, training=True)), expected, rtol=1e-5
    )


def check_all_masked_keeps_statistics():
    layer = BatchNormalization()
    x = np.ones((2, 3, 4), "float32")
    layer(x, training=True, mask=np.zeros((2, 3), bool))
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.moving_mean), np.zeros(4))


declare(
    BatchNormalization,
    name="batch",
    aliases=("bn",),
    family="batch",
    paper="Ioffe and Szegedy, 2015, arXiv:1502.03167",
    invariance="filter",
    oracle=oracle,
    reads={
        keras.layers.BatchNormalization: read_keras,
        BatchNormalization: read_keras,
    },
    adopt=adopt,
    carry=moving_statistics.carry_running,
    cases=(
        Case({}, (16, 6)),
        Case({"momentum": 0.8, "epsilon": 1e-5}, (5, 7, 4), masked=True),
        Case({"center": False}, (4, 6, 5, 8)),
        Case({"scale": False, "axis": 1}, (4, 3, 5, 6)),
        Case({}, (3, 2, 4, 3, 5)),
    ),
    claims={
        "scale_invariant",
        "channel_scale_invariant",
        "shift_invariant",
        "sign_equivariant",
        "unit_output_scale",
        "zero_output_mean",
        "idempotent",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
    checks=(
        check_loads_keras_weights,
        check_frozen_means_inference,
        check_all_masked_keeps_statistics,
    ),
)
