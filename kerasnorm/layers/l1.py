"""L1 batch normalization."""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.layers import lp
from kerasnorm.method import moving_statistics, oracles
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import backend, replicas


CORRECTION = math.sqrt(math.pi / 2)


@keras.saving.register_keras_serializable("kerasnorm")
class L1BatchNormalization(lp.LpBatchNormalization):
    r"""Batch normalization by the mean absolute deviation.

    Needs no square and no root: fit for low precision and small hardware, and as good.

        s = sqrt(pi / 2) * mean(|x - mean(x)|)
        training:   y = gamma * (x - mean(x)) / (s + epsilon) + beta
        inference:  the same with moving_mean and moving_scale

    The factor makes s the standard deviation of Gaussian inputs.

    Papers: Hoffer et al., 2018, https://arxiv.org/abs/1803.01814; Wu et al., 2018,
    https://arxiv.org/abs/1802.09769

    Args:
        axis: integer, axis of the channels. Default -1.
        momentum: weight of the old moving statistics, 0 to 1. Default 0.99.
        epsilon: added to s, and so of its unit. Default 1e-5.
        center, scale: whether to use `beta` and `gamma`.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: batch statistics (True) or moving ones.
        mask: boolean, the leading axes of the input; masked positions do not count.
    """

    def __init__(
        self, axis=-1, momentum=0.99, epsilon=1e-5, center=True, scale=True, **kwargs
    ):
        # The config of the general layer names p and its correction too.
        given = kwargs.pop("p", 1), kwargs.pop("gaussian_correction", True)
        if given != (1, True):
            raise KerasNormError(
                "L1 batch normalization has p = 1 and its correction",
                got=f"p={given[0]!r}, gaussian_correction={given[1]!r}",
                fix="Use LpBatchNormalization.",
            )
        super().__init__(1, True, axis, momentum, epsilon, center, scale, **kwargs)

    def batch_statistics(self, x, mask):
        if mask is not None or replicas.together():
            return super().batch_statistics(x, mask)

        def kernel(x):
            mean = ops.mean(x, (0, 1), keepdims=True)
            centred = x - mean
            s = ops.mean(ops.abs(centred), (0, 1), keepdims=True) * CORRECTION
            n = ops.cast(ops.shape(x)[0] * ops.shape(x)[1], x.dtype)

            def backward(dm, ds):
                sign = ops.sign(centred)
                slope = ds * CORRECTION
                lean = ops.mean(sign, (0, 1), keepdims=True)
                return ((dm + slope * (sign - lean)) / n,)

            return (mean, s), backward

        return backend.custom_gradient(kernel)(x)


@oracles.flat
def oracle(x, keep, weights, config, training):
    mean, s = weights["moving_mean"], weights["moving_scale"]
    if training:
        mean, _ = oracles.moments(x, keep, (0, 1))
        s, _ = oracles.moments(np.abs(x - mean), keep, (0, 1))
        s = s * np.sqrt(np.pi / 2)
    return oracles.affine((x - mean) / (s + config.get("epsilon", 1e-5)), weights)


def adopt(source, site, options):
    return moving_statistics.adopt_running(L1BatchNormalization, source, site, options)


def read_own(layer):
    return lp.describe(layer, "l1")


def check_equals_the_general_layer():
    x = np.random.default_rng(0).normal(2, 3, (6, 5, 4)).astype("float32")
    one = L1BatchNormalization()(x, training=True)
    general = lp.LpBatchNormalization(1)(x, training=True)
    np.testing.assert_allclose(one, general, rtol=1e-5, atol=1e-6)


declare(
    L1BatchNormalization,
    name="l1",
    title="L1 batch normalization",
    family="batch",
    paper="Hoffer et al., 2018, arXiv:1803.01814",
    invariance="filter",
    oracle=oracle,
    reads={L1BatchNormalization: read_own},
    adopt=adopt,
    carry=lp.carry,
    cases=(
        Case({}, (16, 6)),
        Case({"momentum": 0.8}, (5, 7, 4), masked=True),
        Case({"center": False, "axis": 1}, (4, 3, 5, 6)),
        Case({"scale": False, "epsilon": 1e-3}, (3, 2, 4, 3, 5)),
    ),
    claims={
        "scale_invariant",
        "channel_scale_invariant",
        "shift_invariant",
        "sign_equivariant",
        "zero_output_mean",
        "idempotent",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
    checks=(check_equals_the_general_layer,),
)
