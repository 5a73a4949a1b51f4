"""Batch layer normalization."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.method import adoption, moving_statistics
from kerasnorm.method.normalization import BatchStatistics
from kerasnorm.method.registry import Case, Reason, Refusal, declare
from kerasnorm.numerics import moments, replicas, standardize


@keras.saving.register_keras_serializable("kerasnorm")
class BatchLayerNormalization(BatchStatistics):
    r"""A mixture of batch and layer normalization, weighted by the batch size.

    The smaller the batch, the less its statistics are trusted:

        y = gamma * (LN(x) / m + (1 - 1 / m) * BN(x)) + beta

    m is the batch size in training, kept as a weight for inference. BN takes each
    position and channel by itself, over the batch, with moving statistics at
    inference; LN the channels of each position. The authors' code also divides by the
    square root of the channels and moves both weights by 1e-4; that is left out: gamma
    covers the former, which starts the output off tiny.

    Paper: Ziaee and Cano, 2022, https://arxiv.org/abs/2209.08898

    Args:
        axis: integer, axis of the channels. Default -1.
        momentum: weight of the old moving statistics, 0 to 1. Default 0.99.
        epsilon: added to both variances. Default 1e-3.
        center, scale: whether to use `beta` and `gamma`, one value per channel.
        **kwargs: `synchronized`, see `kerasnorm.BatchStatistics`; and those of
            `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more, of known size but for the batch.
        training: batch statistics (True) or moving ones.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: an axis beside the batch is of unknown size.
    """

    def __init__(
        self, axis=-1, momentum=0.99, epsilon=1e-3, center=True, scale=True, **kwargs
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        self.momentum = float(momentum)

    def build(self, input_shape):
        super().build(input_shape)
        positions = adoption.size(
            n
            for a, n in enumerate(input_shape)
            if a not in (0, *self._axes(input_shape))
        )
        if positions is None:
            raise KerasNormError(
                "statistics of each position need a known size",
                got=f"input shape {tuple(input_shape)}",
                fix="Set the sizes in keras.Input, or use BatchChannelNormalization.",
            )
        shape = (positions, input_shape[self.axis])
        frozen = {"trainable": False, "dtype": self.statistics_dtype}
        self.moving_mean = self.channel_weight(
            "moving_mean", shape, initializer="zeros", **frozen
        )
        self.moving_variance = self.channel_weight(
            "moving_variance", shape, initializer="ones", **frozen
        )
        self.batch_size = self.channel_weight(
            "batch_size", (), initializer="ones", **frozen
        )

    def normalize(self, x, mask, training):
        moving = tuple(
            ops.cast(v, x.dtype) for v in (self.moving_mean, self.moving_variance)
        )
        size = ops.cast(self.batch_size, x.dtype)
        mean, variance = moving
        if training and self.trainable:
            mean, variance = moments.moments(x, (0,), mask)
            (size,) = replicas.totals((0,), ops.cast(ops.shape(x)[0], x.dtype))
            rate = 1 - self.momentum
            if mask is not None:
                rate = rate * ops.cast(replicas.any_valid(mask, (0,)), x.dtype)
            self.moving_mean.assign(moving[0] + (mean[0] - moving[0]) * rate)
            self.moving_variance.assign(moving[1] + (variance[0] - moving[1]) * rate)
            self.batch_size.assign(size)
        of_layer = standardize.rows(x, self.epsilon) / size
        inverse = moments.inverse_root(variance, self.epsilon)
        of_batch = moments.scale_shift(x, mean, inverse) * (1 - 1 / size)
        gamma, beta = self.affine(x.dtype)
        y = of_layer + of_batch
        y = y if gamma is None else y * gamma
        y = y if beta is None else y + beta
        return moments.saturate(y, self.compute_dtype)


def oracle(x, weights, config, training, mask):
    axis, epsilon = config.get("axis", -1), config.get("epsilon", 1e-3)
    x = np.moveaxis(x, axis, -1)
    if training:
        keep = np.ones(x.shape, bool)
        if mask is not None:
            keep &= mask[..., None]
        mean, var = np.mean(x, 0, where=keep), np.var(x, 0, where=keep)
        size = len(x)
    else:
        mean = weights["moving_mean"].reshape(x.shape[1:])
        var = weights["moving_variance"].reshape(x.shape[1:])
        size = weights["batch_size"]
    batch = (x - mean) / np.sqrt(var + epsilon)
    rest = x - x.mean(-1, keepdims=True)
    layer = rest / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    y = layer / size + (1 - 1 / size) * batch
    y = y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)
    return np.moveaxis(y, -1, axis)


def adopt(source, site, options):
    for shape in adoption.shapes(site):
        if None in shape[1:]:
            return Refusal(
                Reason.UNDEFINED,
                f"statistics of each position on input shape {shape}",
                "batch_channel",
            )
    return moving_statistics.adopt_running(
        BatchLayerNormalization, source, site, options, exact=False, alone=True
    )


def carry(source, layers):
    adoption.carry_affine(source, layers)
    for _, new in layers.values():
        if moving_statistics.is_running(source):
            mean, variance = moving_statistics.statistics(source, new.epsilon)
            shape = new.moving_mean.shape
            adoption.assign(new.moving_mean, np.broadcast_to(mean, shape))
            adoption.assign(new.moving_variance, np.broadcast_to(variance, shape))


declare(
    BatchLayerNormalization,
    name="batch_layer",
    title="Batch layer normalization",
    aliases=("bln",),
    family="batch",
    paper="Ziaee and Cano, 2022, arXiv:2209.08898",
    invariance="layer",
    oracle=oracle,
    reads={BatchLayerNormalization: adoption.reader("batch_layer", "momentum")},
    adopt=adopt,
    carry=carry,
    cases=(
        Case({}, (16, 6)),
        Case({"momentum": 0.8}, (12, 5, 4), masked=True),
        Case({"center": False, "axis": 1}, (6, 4, 2, 3)),
        Case({"scale": False}, (6, 2, 2, 3, 4)),
    ),
    claims={
        "scale_invariant",
        "shift_invariant",
        "sign_equivariant",
        "zero_output_mean",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
)
