"""Ghost batch normalization."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import count
from kerasnorm.layers.batch import BatchNormalization
from kerasnorm.method import adoption, moving_statistics, oracles
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import moments, replicas


@keras.saving.register_keras_serializable("kerasnorm")
class GhostBatchNormalization(BatchNormalization):
    r"""Batch normalization of parts of the batch, each by itself.

    Keeps the noise of small batches, which regularizes, in large ones.

        training:   y = gamma * (x - mean(part)) / sqrt(var(part) + epsilon) + beta
        inference:  batch normalization

    Parts are `ghost_batch_size` consecutive samples; the last one may be smaller. The
    moving statistics take the parts in one by one, in order. Each replica of a strategy
    cuts its own batch; synchronized, the moving statistics take in the parts of all.

    Paper: Hoffer, Hubara and Soudry, 2017, https://arxiv.org/abs/1705.08741

    Args:
        ghost_batch_size: samples that are normalized together. Default 32.
        **kwargs: those of `BatchNormalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: statistics of the parts (True) or moving ones.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: `ghost_batch_size` is not a positive integer.
    """

    def __init__(
        self,
        ghost_batch_size=32,
        axis=-1,
        momentum=0.99,
        epsilon=1e-3,
        center=True,
        scale=True,
        **kwargs,
    ):
        super().__init__(axis, momentum, epsilon, center, scale, **kwargs)
        self.ghost_batch_size = count("ghost_batch_size", ghost_batch_size)

    def normalize(self, x, mask, training):
        training = training and self.trainable
        size, batch = self.ghost_batch_size, x.shape[0]
        alone = batch is not None and batch <= size and not replicas.together()
        if not training or alone:
            return super().normalize(x, mask, training)
        count, positions = ops.shape(x)[0], ops.shape(x)[1]
        whole = batch is not None and batch % size == 0
        if not whole and mask is None:
            mask = ops.ones_like(x[:, :, :1], "bool")

        def parts(v):
            if not whole:
                v = ops.pad(v, [[0, -count % size], [0, 0], [0, 0]])
            return ops.reshape(v, (-1, size * positions, v.shape[-1]))

        x, mask = parts(x), None if mask is None else parts(mask)
        mean, variance = moments.moments(x, (1,), mask)
        there = None if mask is None else ops.any(mask, axis=1)
        self._update_in_order(mean[:, 0], variance[:, 0], there)
        gamma, beta = self.affine(x.dtype)
        inverse = moments.inverse_root(variance, self.epsilon)
        y = moments.scale_shift(x, mean, inverse, gamma, beta)
        y = ops.reshape(y, (-1, positions, y.shape[-1]))
        return y if whole else y[:count]

    def _update_in_order(self, mean, variance, there):
        # moving <- moving * m + part * (1 - m), part by part: a part that the mask
        # leaves nothing of does not count.
        keep = ops.ones_like(mean) * self.momentum
        if there is not None:
            keep = ops.where(there, keep, ops.ones((), keep.dtype))
        if replicas.together():
            mean, variance, keep = (
                replicas.gather(v)[0] for v in (mean, variance, keep)
            )
        after = ops.flip(ops.cumprod(ops.flip(keep, 0), 0), 0)  # of this part and later
        weight = ops.concatenate([after[1:], ops.ones_like(keep[:1])]) * (1 - keep)
        for moving, new in ((self.moving_mean, mean), (self.moving_variance, variance)):
            old = ops.cast(moving, new.dtype)
            moving.assign(old * after[0] + ops.sum(weight * new, axis=0))


@oracles.flat
def oracle(x, keep, weights, config, training):
    epsilon, size = config.get("epsilon", 1e-3), config.get("ghost_batch_size", 32)
    if not training:
        y = (x - weights["moving_mean"]) / np.sqrt(weights["moving_variance"] + epsilon)
        return oracles.affine(y, weights)
    y = np.empty_like(x)
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        mean, var = oracles.moments(x[part], keep[part], (0, 1))
        y[part] = (x[part] - mean) / np.sqrt(var + epsilon)
    return oracles.affine(y, weights)


def adopt(source, site, options):
    return moving_statistics.adopt_running(
        GhostBatchNormalization, source, site, options
    )


def check_moving_statistics_take_parts_in_order():
    x = np.random.default_rng(0).normal(2, 3, (7, 4)).astype("float32")
    layer = GhostBatchNormalization(ghost_batch_size=3, momentum=0.8)
    layer(x, training=True)
    mean, variance = np.zeros(4), np.ones(4)
    for part in (x[:3], x[3:6], x[6:]):
        mean = 0.8 * mean + 0.2 * part.mean(0)
        variance = 0.8 * variance + 0.2 * part.var(0)
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-5)


declare(
    GhostBatchNormalization,
    name="ghost",
    title="Ghost batch normalization",
    aliases=("gbn",),
    family="batch",
    paper="Hoffer, Hubara and Soudry, 2017, arXiv:1705.08741",
    invariance="filter",
    oracle=oracle,
    reads={
        GhostBatchNormalization: adoption.reader(
            "ghost", "momentum", mean="moving_mean", variance="moving_variance"
        )
    },
    adopt=adopt,
    carry=moving_statistics.carry_running,
    cases=(
        Case({"ghost_batch_size": 4}, (16, 6)),
        Case({"ghost_batch_size": 3, "epsilon": 1e-5}, (7, 5, 4), masked=True),
        Case({"ghost_batch_size": 2, "center": False}, (5, 4, 3, 6)),
        Case({"ghost_batch_size": 2, "axis": 1}, (4, 3, 4, 5)),
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
    checks=(check_moving_statistics_take_parts_in_order,),
)
