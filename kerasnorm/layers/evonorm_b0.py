"""EvoNorm-B0."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.method import adoption, moving_statistics, oracles
from kerasnorm.method.normalization import BatchStatistics
from kerasnorm.method.registry import Adoption, Case, Reason, Refusal, declare
from kerasnorm.numerics import moments


@keras.saving.register_keras_serializable("kerasnorm")
class EvoNormB0(BatchStatistics):
    r"""Batch normalization and its activation in one, found by evolution.

    Takes the place of a batch normalization and of the ReLU behind it.

        y = gamma * x / max(sqrt(var_batch(x) + epsilon),
                            v * x + sqrt(var_space(x) + epsilon)) + beta

    `var_batch` is that of each channel over the batch and all positions, and the
    moving one at inference; `var_space` that of each channel of each sample.

    Paper: Liu, Brock, Simonyan and Le, 2020, https://arxiv.org/abs/2004.02967

    Args:
        axis: integer, axis of the channels. Default -1.
        momentum: weight of the old moving variance, 0 to 1. Default 0.9.
        epsilon: added to both variances. Default 1e-3.
        center, scale: whether to use `beta` and `gamma`.
        v_initializer: of `v`, one value per channel. Default `"ones"`.
        **kwargs: `synchronized`, see `kerasnorm.BatchStatistics`; and those of
            `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 3 or more.
        training: variance of the batch (True) or the moving one.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: the input has no positions.
    """

    def __init__(
        self,
        axis=-1,
        momentum=0.9,
        epsilon=1e-3,
        center=True,
        scale=True,
        *,
        v_initializer="ones",
        **kwargs,
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        self.momentum = float(momentum)
        self.v_initializer = keras.initializers.get(v_initializer)

    def build(self, input_shape):
        if len(input_shape) == 2:
            raise KerasNormError(
                "EvoNorm-B0 needs positions for the variance of each sample",
                got=f"input shape {tuple(input_shape)}",
                expected="a sequence, image or volume",
                fix="Use BatchNormalization and an activation on vectors.",
            )
        super().build(input_shape)
        shape = (input_shape[self.axis],)
        self.slope = self.channel_weight("v", shape)
        self.moving_variance = self.channel_weight(
            "moving_variance",
            shape,
            initializer="ones",
            trainable=False,
            dtype=self.statistics_dtype,
        )

    def normalize(self, x, mask, training):
        mean, instance = moments.moments(x, (1,), mask)
        variance = ops.cast(self.moving_variance, x.dtype)
        if training and self.trainable:
            old, weight = variance, moments.count(mask, (1,))
            if mask is not None and mask.shape[-1] == 1:
                weight = ops.sum(ops.cast(mask, x.dtype), 1, keepdims=True)
            _, variance = moments.pool(mean, instance, (0,), weight)
            rate = (1 - self.momentum) * moments.seen(mask, x.dtype)
            self.moving_variance.assign(old + (variance[0, 0] - old) * rate)
        batch = moments.root(variance, self.epsilon)
        own = moments.root(instance, self.epsilon)
        divisor = ops.maximum(batch, ops.cast(self.slope, x.dtype) * x + own)
        gamma, beta = self.affine(x.dtype)
        # Not 1 / divisor: in eight bits TensorFlow Lite refuses some divisors.
        inverse = ops.square(ops.rsqrt(divisor))
        y = moments.scale_shift(x, None, inverse, gamma, beta)
        return moments.saturate(y, self.compute_dtype)


@oracles.flat
def oracle(x, keep, weights, config, training):
    epsilon = config.get("epsilon", 1e-3)
    batch = weights["moving_variance"]
    if training:
        _, batch = oracles.moments(x, keep, (0, 1))
    _, own = oracles.moments(x, keep, (1,))
    other = weights["v"] * x + np.sqrt(own + epsilon)
    return oracles.affine(x / np.maximum(np.sqrt(batch + epsilon), other), weights)


def adopt(source, site, options):
    for shape in adoption.shapes(site):
        if len(shape) == 2:
            return Refusal(
                Reason.UNDEFINED, f"no positions in input shape {shape}", "batch"
            )
    answer = moving_statistics.adopt_running(
        EvoNormB0, source, site, options, exact=False
    )
    if isinstance(answer, Refusal):
        return answer
    relu = site.after()
    if relu is None or not isinstance(relu.layer, keras.layers.ReLU) or relu.shared:
        return Adoption(answer.edits, answer.fidelity, "it is an activation too")
    note = f"it takes the place of {relu.path}"
    edits = (*answer.edits, adoption.edit(relu, None))
    return Adoption(edits, answer.fidelity, note)


def carry(source, layers):
    adoption.carry_affine(source, layers)
    for _, new in layers.values():
        if new is not None and moving_statistics.is_running(source):
            _, variance = moving_statistics.statistics(source, new.epsilon)
            adoption.assign(new.moving_variance, variance)


declare(
    EvoNormB0,
    name="evonorm_b0",
    title="EvoNorm-B0",
    aliases=("evob0", "evonorm_b"),
    family="batch",
    paper="Liu, Brock, Simonyan and Le, 2020, arXiv:2004.02967",
    invariance="filter",
    oracle=oracle,
    reads={EvoNormB0: adoption.reader("evonorm_b0", "momentum")},
    adopt=adopt,
    carry=carry,
    cases=(
        Case({}, (5, 7, 4), masked=True),
        Case({"epsilon": 1e-5, "center": False}, (3, 4, 5, 6)),
        Case({"scale": False, "axis": 1}, (4, 3, 5, 6)),
        Case({"momentum": 0.5}, (3, 2, 4, 3, 5)),
    ),
    claims={
        "scale_invariant",
        "channel_scale_invariant",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
)
