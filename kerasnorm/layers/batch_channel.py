"""Batch-channel normalization."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm.layers.batch import BatchNormalization
from kerasnorm.layers.switchable import parts
from kerasnorm.method import adoption, moving_statistics, oracles
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import moments


@keras.saving.register_keras_serializable("kerasnorm")
class BatchChannelNormalization(BatchNormalization):
    r"""A learned mixture of batch and layer normalization, one for each channel.

        y = gamma * (a * BN(x) + (1 - a) * LN(x)) + beta

    BN is over batch and positions, with moving statistics at inference; LN over all of
    each sample; both without gamma and beta. `a` starts at 1, batch normalization
    alone, and is not bounded. Another method of this name is
    `BatchThenGroupNormalization`.

    Paper: Khaled et al., 2023, https://arxiv.org/abs/2312.00596

    Args:
        axis: integer, axis of the channels. Default -1.
        momentum: weight of the old moving statistics, 0 to 1. Default 0.9.
        epsilon: added to both variances. Default 1e-5.
        center, scale: whether to use `beta` and `gamma`.
        mixture_initializer: of `a`. Default `"ones"`.
        **kwargs: those of `BatchNormalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: batch statistics (True) or moving ones.
        mask: boolean, the leading axes of the input; masked positions do not count.
    """

    def __init__(
        self,
        axis=-1,
        momentum=0.9,
        epsilon=1e-5,
        center=True,
        scale=True,
        *,
        mixture_initializer="ones",
        **kwargs,
    ):
        super().__init__(axis, momentum, epsilon, center, scale, **kwargs)
        self.mixture_initializer = keras.initializers.get(mixture_initializer)

    def build(self, input_shape):
        super().build(input_shape)
        self.mixture = self.channel_weight("mixture", (input_shape[self.axis],))

    def normalize(self, x, mask, training):
        instance, layer, count = parts(x, mask)
        batch = self.pooled(instance, count, mask, training)
        a = ops.cast(self.mixture, x.dtype)
        gamma, beta = self.affine(x.dtype)
        of_batch = a * moments.inverse_root(batch[1], self.epsilon)
        of_layer = (1 - a) * moments.inverse_root(layer[1], self.epsilon)
        # Two standardizations of one input are one scale and one shift of it.
        slope = of_batch + of_layer
        shift = (batch[0] - layer[0]) * of_layer
        shift = shift if gamma is None else shift * gamma
        shift = shift if beta is None else shift + beta
        return moments.scale_shift(x, batch[0], slope, gamma, shift)


@oracles.flat
def oracle(x, keep, weights, config, training):
    epsilon, a = config.get("epsilon", 1e-5), weights["mixture"]
    mean, var = weights["moving_mean"], weights["moving_variance"]
    if training:
        mean, var = oracles.moments(x, keep, (0, 1))
    batch = (x - mean) / np.sqrt(var + epsilon)
    mean, var = oracles.moments(x, keep, (1, 2))
    layer = (x - mean) / np.sqrt(var + epsilon)
    return oracles.affine(a * batch + (1 - a) * layer, weights)


def adopt(source, site, options):
    exact = "mixture_initializer" not in options.arguments
    return moving_statistics.adopt_running(
        BatchChannelNormalization, source, site, options, exact=exact
    )


declare(
    BatchChannelNormalization,
    name="batch_channel",
    title="Batch-channel normalization",
    aliases=("bcn",),
    family="batch",
    paper="Khaled et al., 2023, arXiv:2312.00596",
    invariance="layer",
    oracle=oracle,
    reads={BatchChannelNormalization: adoption.reader("batch_channel", "momentum")},
    adopt=adopt,
    carry=moving_statistics.carry_running,
    cases=(
        Case({}, (16, 6)),
        Case({"momentum": 0.8}, (5, 7, 4), masked=True),
        Case({"center": False, "axis": 1}, (4, 3, 5, 6)),
        Case({"epsilon": 1e-3, "scale": False}, (3, 2, 4, 3, 5)),
    ),
    claims={
        "scale_invariant",
        "shift_invariant",
        "sign_equivariant",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
)
