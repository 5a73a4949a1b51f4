"""General batch normalization."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.layers import group
from kerasnorm.method import adoption, moving_statistics
from kerasnorm.method.normalization import BatchStatistics
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import moments, replicas


@keras.saving.register_keras_serializable("kerasnorm")
class GeneralBatchNormalization(BatchStatistics):
    r"""Normalizes each unit by a set of reference units in the whole batch.

    The set is all samples, times the axes in `over`, times a group of channels:

        training:   y = gamma * (x - mean(set)) / sqrt(var(set) + epsilon) + beta
        inference:  the same with moving statistics, one pair for each set

    By default all positions and each channel alone: batch normalization. `over=()`
    has statistics for each position, `over=(2,)` for each row, `groups=1` pools the
    channels too.

    Paper: Liao, Kawaguchi and Poggio, 2016, https://arxiv.org/abs/1610.06160

    Args:
        over: axes of the input to pool over, beside the batch and without the
            channels; None for all others. The size of the rest must be known. Default
            None.
        groups: number of groups of channels that are pooled; -1 leaves each channel
            alone. Default -1.
        axis: integer, axis of the channels. Default -1.
        momentum: weight of the old moving statistics, 0 to 1. Default 0.99.
        epsilon: added to the variance. Default 1e-3.
        center, scale: whether to use `beta` and `gamma`, one value per channel.
        **kwargs: `synchronized`, see `kerasnorm.BatchStatistics`; and those of
            `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: batch statistics (True) or moving ones.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: `groups` does not divide the channels, `over` holds the batch or
            the channels, or an axis of unknown size is left out of it.
    """

    def __init__(
        self,
        over: Sequence[int] | None = None,
        groups=-1,
        axis=-1,
        momentum=0.99,
        epsilon=1e-3,
        center=True,
        scale=True,
        **kwargs,
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        self.over = None if over is None else [int(a) for a in over]
        self.groups = groups
        self.momentum = float(momentum)

    def build(self, input_shape):
        super().build(input_shape)
        shape = self._check(input_shape)
        frozen = {"trainable": False, "dtype": self.statistics_dtype}
        self.moving_mean = self.channel_weight(
            "moving_mean", shape, initializer="zeros", **frozen
        )
        self.moving_variance = self.channel_weight(
            "moving_variance", shape, initializer="ones", **frozen
        )

    def _check(self, input_shape):
        """Shape of the statistics of one sample: 1 where pooled, channels last."""
        channels = input_shape[self.axis]
        groups = channels if self.groups == -1 else self.groups
        if groups < 1 or channels % groups:
            nearest = group.nearest(groups, channels)
            raise KerasNormError(
                "the groups do not divide the channels",
                got=f"groups={self.groups} for {channels} channels",
                fix=f"The nearest number that does is {nearest}.",
            )
        rank = len(input_shape)
        (channel,) = self._axes(input_shape)
        over = self._over(rank, channel)
        if channel in over or 0 in over or any(not 0 <= a < rank for a in over):
            raise KerasNormError(
                "axes that cannot be pooled over",
                got=f"over={self.over} on input shape {tuple(input_shape)}",
                expected=f"axes other than the batch and the channels (axis {channel})",
            )
        kept = [
            1 if a in over else input_shape[a] for a in range(1, rank) if a != channel
        ]
        if None in kept:
            raise KerasNormError(
                "statistics of their own need a known size",
                got=f"over={self.over} on input shape {tuple(input_shape)}",
                fix="Pool over the axes of unknown size too.",
            )
        return (*kept, channels)

    def _over(self, rank, channel):
        if self.over is None:
            return [a for a in range(1, rank) if a != channel]
        return [a % rank if -rank <= a < rank else a for a in self.over]

    def call(self, inputs, training=None, mask=None):
        axis, rank = self._axes(inputs.shape)[0], len(inputs.shape)
        x = ops.cast(inputs, self.statistics_dtype)
        if mask is not None:
            mask = moments.align_mask(mask, rank, (axis,))
            mask = ops.moveaxis(ops.broadcast_to(mask, ops.shape(x)), axis, -1)
        x = ops.moveaxis(x, axis, -1)
        # Axes behind the channels move up by one.
        over = [a - (a > axis) for a in self._over(rank, axis)]
        mean, variance = self.references(x, mask, over, bool(training))
        gamma, beta = self.affine(x.dtype)
        inverse = moments.inverse_root(variance, self.epsilon)
        y = moments.scale_shift(x, mean, inverse, gamma, beta)
        return ops.cast(ops.moveaxis(y, -1, axis), self.compute_dtype)

    def references(self, x, mask, over, training):
        """Mean and variance of the reference set of each unit, channels last."""
        moving = tuple(
            ops.cast(v, x.dtype)[None] for v in (self.moving_mean, self.moving_variance)
        )
        if not (training and self.trainable):
            return moving
        found = self.pooled(x, mask, (0, *over))
        rate = 1 - self.momentum
        if mask is not None:
            there = replicas.any_valid(mask, (0, *over), keepdims=True)
            rate = rate * ops.cast(there, x.dtype)
        for variable, old, new in zip(
            (self.moving_mean, self.moving_variance), moving, found, strict=True
        ):
            variable.assign((old + (new - old) * rate)[0])
        return found

    def pooled(self, x, mask, axes):
        """Moments over `axes` and the groups of channels."""
        mean, variance = moments.moments(x, axes, mask)
        groups = x.shape[-1] if self.groups == -1 else self.groups
        weight = 1.0
        if mask is not None:
            weight = ops.sum(ops.cast(mask, x.dtype), axes, keepdims=True)
            (weight,) = replicas.totals(axes, weight)
        return moments.pool_groups(mean, variance, groups, weight)


def pool_oracle(x, weights, config, mask, first):
    """The oracle by counting: every unit's reference set, gathered and averaged."""
    axis = config.get("axis", -1) % x.ndim
    over = config.get("over")
    over = range(1, x.ndim) if over is None else [a % x.ndim for a in over]
    keep = np.ones(x.shape, bool)
    if mask is not None:
        keep &= mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    pooled = {*first, *over} - {axis}
    size = config.get("groups", -1)
    size = 1 if size == -1 else x.shape[axis] // size
    sets = {}
    for index in np.ndindex(x.shape):
        key = tuple(
            0 if a in pooled else i // size if a == axis else i
            for a, i in enumerate(index)
        )
        sets.setdefault(key, []).append(index)
    y = np.zeros_like(x)
    for members in sets.values():
        where = tuple(np.array(members).T)
        valid = x[where][keep[where]]
        mean, var = (valid.mean(), valid.var()) if len(valid) else (0.0, 0.0)
        y[where] = (x[where] - mean) / np.sqrt(var + config.get("epsilon", 1e-3))
    y = np.moveaxis(y, axis, -1)
    y = y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)
    return np.moveaxis(y, -1, axis)


def oracle(x, weights, config, training, mask):
    if training:
        return pool_oracle(x, weights, config, mask, (0,))
    axis = config.get("axis", -1)
    y = np.moveaxis(x, axis, -1) - weights["moving_mean"]
    y = y / np.sqrt(weights["moving_variance"] + config.get("epsilon", 1e-3))
    y = y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)
    return np.moveaxis(y, -1, axis)


def read_own(layer):
    if layer.over is None and layer.groups == -1:
        source = adoption.describe(
            layer,
            "general_batch",
            "momentum",
            mean="moving_mean",
            variance="moving_variance",
        )
        flat = {name: value.reshape(-1) for name, value in source.weights.items()}
        return dataclasses.replace(source, weights=flat)
    return adoption.describe(layer, "general_batch", "momentum")


def adopt(source, site, options):
    return moving_statistics.adopt_running(
        GeneralBatchNormalization, source, site, options
    )


def carry(source, layers):
    """Spreads the statistics of each channel over the sets that it is in."""
    adoption.carry_affine(source, layers)
    for _, new in layers.values():
        if moving_statistics.is_running(source):
            mean, variance = moving_statistics.statistics(source, new.epsilon)
            shape = new.moving_mean.shape
            adoption.assign(new.moving_mean, np.broadcast_to(mean, shape))
            adoption.assign(new.moving_variance, np.broadcast_to(variance, shape))


def check_default_is_batch_normalization():
    x = np.random.default_rng(0).normal(2, 3, (6, 5, 4)).astype("float32")
    stock, ours = keras.layers.BatchNormalization(), GeneralBatchNormalization()
    for training in (True, False):
        expected = stock(x, training=training)
        np.testing.assert_allclose(ours(x, training=training), expected, atol=1e-4)


declare(
    GeneralBatchNormalization,
    name="general_batch",
    title="General batch normalization",
    family="batch",
    paper="Liao, Kawaguchi and Poggio, 2016, arXiv:1610.06160",
    invariance="layer",
    oracle=oracle,
    reads={GeneralBatchNormalization: read_own},
    adopt=adopt,
    carry=carry,
    cases=(
        Case({}, (16, 6)),
        Case({"over": [], "epsilon": 1e-3}, (6, 5, 4)),
        Case({"groups": 2, "momentum": 0.8}, (5, 7, 4), masked=True),
        Case({"over": [3], "axis": 1, "center": False}, (4, 3, 5, 6)),
        Case({"groups": 1, "over": [1, 2], "scale": False}, (3, 2, 4, 3, 4)),
    ),
    claims={
        "scale_invariant",
        "shift_invariant",
        "sign_equivariant",
        "unit_output_scale",
        "zero_output_mean",
        "idempotent",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
    checks=(check_default_is_batch_normalization,),
)
