"""Variance normalization."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
from keras import ops

from kerasnorm.method import adoption, moving_statistics, oracles
from kerasnorm.method.normalization import BatchStatistics
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import moments


@keras.saving.register_keras_serializable("kerasnorm")
class VarianceNormalization(BatchStatistics):
    r"""Batch normalization that divides, and does not centre.

    Shows how much of batch normalization's effect is that of its scale alone.

        training:   y = gamma * x / sqrt(var(x) + epsilon) + beta
        inference:  the same with moving_variance

    The variance is about the mean, which is then not taken away.

    Papers: Daneshmand et al., 2020, https://arxiv.org/abs/2003.01652; Lubana, Dick and
    Tanaka, 2021, https://arxiv.org/abs/2106.05956

    Args:
        axis: integer, axis of the channels. Default -1.
        momentum: weight of the old moving variance, 0 to 1. Default 0.9.
        epsilon: added to the variance. Default 1e-5.
        center, scale: whether to use `beta` and `gamma`.
        **kwargs: `synchronized`, see `kerasnorm.BatchStatistics`; and those of
            `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: variance of the batch (True) or the moving one.
        mask: boolean, the leading axes of the input; masked positions do not count.
    """

    def __init__(
        self, axis=-1, momentum=0.9, epsilon=1e-5, center=True, scale=True, **kwargs
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        self.momentum = float(momentum)

    def build(self, input_shape):
        super().build(input_shape)
        self.moving_variance = self.channel_weight(
            "moving_variance",
            (input_shape[self.axis],),
            initializer="ones",
            trainable=False,
            dtype=self.statistics_dtype,
        )

    def statistics(self, x, mask, training):
        variance = ops.cast(self.moving_variance, x.dtype)
        if training and self.trainable:
            old = variance
            _, variance = moments.moments(x, (0, 1), mask)
            rate = (1 - self.momentum) * moments.seen(mask, x.dtype)
            self.moving_variance.assign(old + (variance[0, 0] - old) * rate)
        return None, moments.inverse_root(variance, self.epsilon)

    def normalize(self, x, mask, training):
        y = super().normalize(x, mask, training)
        return moments.saturate(y, self.compute_dtype)


@oracles.flat
def oracle(x, keep, weights, config, training):
    var = weights["moving_variance"]
    if training:
        _, var = oracles.moments(x, keep, (0, 1))
    return oracles.affine(x / np.sqrt(var + config.get("epsilon", 1e-5)), weights)


def read_own(layer):
    source = adoption.describe(
        layer, "variance", "momentum", variance="moving_variance"
    )
    if "variance" not in source.weights:
        return source
    mean = np.zeros_like(source.weights["variance"])
    return dataclasses.replace(source, weights={**source.weights, "mean": mean})


def adopt(source, site, options):
    # What the mean took away at inference goes into beta.
    more = {}
    if moving_statistics.is_running(source) and np.any(source.weights["mean"]):
        more["center"] = True
    exact = options.arguments.get("center", True) or not more
    return moving_statistics.adopt_running(
        VarianceNormalization, source, site, options, exact=exact, **more
    )


def carry(source, layers):
    adoption.carry_affine(source, layers)
    for _, new in layers.values():
        if not moving_statistics.is_running(source):
            continue
        mean, variance = moving_statistics.statistics(source, new.epsilon)
        adoption.assign(new.moving_variance, variance)
        if new.beta is not None:
            scale = source.weights.get("gamma", 1.0) / np.sqrt(variance + new.epsilon)
            adoption.assign(new.beta, source.weights.get("beta", 0.0) - mean * scale)


declare(
    VarianceNormalization,
    name="variance",
    aliases=("vn",),
    family="batch",
    paper="Daneshmand et al., 2020, arXiv:2003.01652",
    invariance="filter",
    oracle=oracle,
    reads={VarianceNormalization: read_own},
    adopt=adopt,
    carry=carry,
    cases=(
        Case({}, (16, 6)),
        Case({"momentum": 0.8}, (5, 7, 4), masked=True),
        Case({"center": False, "axis": 1}, (4, 3, 5, 6)),
        Case({"scale": False, "epsilon": 1e-3}, (3, 2, 4, 3, 5)),
    ),
    claims={
        "scale_invariant",
        "channel_scale_invariant",
        "sign_equivariant",
        "idempotent",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
)
