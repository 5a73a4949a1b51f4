"""Batch normalization followed by group normalization."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.layers import group
from kerasnorm.layers.batch import BatchNormalization
from kerasnorm.layers.switchable import parts
from kerasnorm.method import adoption, moving_statistics, oracles
from kerasnorm.method.registry import Case, Reason, Refusal, declare
from kerasnorm.numerics import moments


@keras.saving.register_keras_serializable("kerasnorm")
class BatchThenGroupNormalization(BatchNormalization):
    r"""Batch normalization, then group normalization of its output.

    The batch statistics keep channels from dying, which group normalization alone lets
    happen; meant to stand behind convolutions with weight standardization. Known as
    batch-channel normalization, which also names `BatchChannelNormalization`.

        z = gamma * (x - mean) / sqrt(var + epsilon) + beta
        h = (z - mean_group(z)) / sqrt(var_group(z) + epsilon)
        y = group_gamma * h + group_beta

    For batches of a few samples, `estimate=True`: z takes the moving statistics in
    training too, just updated from the batch, and no gradient passes through them.

    Paper: Qiao et al., 2019, https://arxiv.org/abs/1911.09738

    Args:
        groups: number of groups, which divides the channels. Default 32.
        estimate: see above. Default False.
        axis: integer, axis of the channels. Default -1.
        momentum: weight of the old moving statistics, 0 to 1. Default 0.9.
        epsilon: added to both variances. Default 1e-5.
        center, scale: whether to use `beta` and `gamma`, one value per channel;
            `group_gamma` and `group_beta`, one per group, are always there.
        **kwargs: those of `BatchNormalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: batch statistics (True) or moving ones.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: `groups` does not divide the channels.
    """

    def __init__(
        self,
        groups=32,
        estimate=False,
        axis=-1,
        momentum=0.9,
        epsilon=1e-5,
        center=True,
        scale=True,
        **kwargs,
    ):
        super().__init__(axis, momentum, epsilon, center, scale, **kwargs)
        self.groups = groups
        self.estimate = estimate

    def build(self, input_shape):
        channels = input_shape[self.axis]
        if self.groups < 1 or channels % self.groups:
            raise KerasNormError(
                "the groups do not divide the channels",
                got=f"groups={self.groups} for {channels} channels",
                fix=f"The nearest number that does is "
                f"{group.nearest(self.groups, channels)}.",
            )
        super().build(input_shape)
        shape = (self.groups,)
        self.group_gamma = self.channel_weight("group_gamma", shape, initializer="ones")
        self.group_beta = self.channel_weight("group_beta", shape, initializer="zeros")

    @property
    def surrogate_gradient(self) -> bool:  # pyright: ignore
        """Whether no gradient passes through the statistics."""
        return self.estimate

    def normalize(self, x, mask, training):
        # All follows from the moments of each channel of each sample: those of the
        # batch, and those of z, which is x scaled and shifted by channel.
        instance, _, count = parts(x, mask)
        mean, variance = self._of_batch(x, instance, count, mask, training)
        slope, beta = self.affine(x.dtype)
        inverse = moments.inverse_root(variance, self.epsilon)
        slope = inverse if slope is None else slope * inverse
        beta = 0.0 if beta is None else beta
        level, spread = moments.pool_groups(
            (instance[0] - mean) * slope + beta,
            instance[1] * ops.square(slope),
            self.groups,
            moments.count(mask, (1,)),
        )
        size = x.shape[-1] // self.groups
        gamma, shift = (
            ops.repeat(ops.cast(v, x.dtype), size)
            for v in (self.group_gamma, self.group_beta)
        )
        factor = gamma * moments.inverse_root(spread, self.epsilon)
        shift = shift + (beta - level) * factor
        return moments.scale_shift(x, mean, slope * factor, beta=shift)

    def _of_batch(self, x, instance, count, mask, training):
        """Moments for the batch normalization; moves the moving ones in training."""
        if not (self.estimate and training and self.trainable):
            return self.pooled(instance, count, mask, training)
        moving = self.moving(x.dtype)
        mean, variance = map(ops.stop_gradient, instance)
        mean, variance = moments.pool(mean, variance, (0,), count)
        # About the old moving mean, as it is the estimate that will be used.
        variance = variance[0, 0] + ops.square(mean[0, 0] - moving[0])
        self._update(moving, mean[0, 0], variance, moments.seen(mask, x.dtype))
        return self.moving(x.dtype)


@oracles.flat
def oracle(x, keep, weights, config, training):
    epsilon, groups = config.get("epsilon", 1e-5), config.get("groups", 32)
    mean, var = weights["moving_mean"], weights["moving_variance"]
    if training and config.get("estimate"):
        old, m = mean, config.get("momentum", 0.9)
        mean = m * old + (1 - m) * oracles.moments(x, keep, (0, 1))[0]
        square = np.mean((x - old) ** 2, (0, 1), where=keep)
        var = m * var + (1 - m) * square
    elif training:
        mean, var = oracles.moments(x, keep, (0, 1))
    z = oracles.affine((x - mean) / np.sqrt(var + epsilon), weights)
    y = np.empty_like(z)
    for g, part in enumerate(np.split(np.arange(x.shape[-1]), groups)):
        mean, var = oracles.moments(z[..., part], keep[..., part], (1, 2))
        h = (z[..., part] - mean) / np.sqrt(var + epsilon)
        y[..., part] = h * weights["group_gamma"][g] + weights["group_beta"][g]
    return y


def adopt(source, site, options):
    channels = adoption.channels(source, site)
    if channels is None:
        return Refusal(Reason.NO_GRAPH, "the number of channels is not known")
    groups = options.arguments.get("groups") or group.default_groups(channels)
    if groups < 1 or channels % groups:
        return Refusal(
            Reason.GROUPS,
            f"{groups} groups for {channels} channels",
            f"groups={group.nearest(groups, channels)}",
        )
    size = channels // groups

    def elements(shape):
        positions = adoption.positions(source, shape)
        return None if positions is None else positions * size

    refusal = adoption.one_element(site, options, elements, "batch")
    if refusal is not None:
        return refusal
    return moving_statistics.adopt_running(
        BatchThenGroupNormalization, source, site, options, exact=False, groups=groups
    )


declare(
    BatchThenGroupNormalization,
    name="batch_then_group",
    title="Batch-channel normalization of Qiao et al.",
    aliases=("bcn_qiao",),
    family="batch",
    paper="Qiao et al., 2019, arXiv:1911.09738",
    invariance="filter",
    oracle=oracle,
    reads={
        BatchThenGroupNormalization: adoption.reader("batch_then_group", "momentum")
    },
    adopt=adopt,
    carry=moving_statistics.carry_running,
    cases=(
        Case({"groups": 2}, (16, 12)),
        Case({"groups": 2, "momentum": 0.8}, (5, 7, 4), masked=True),
        Case({"groups": 1, "center": False, "axis": 1}, (4, 3, 5, 6)),
        Case({"groups": 2, "estimate": True}, (4, 5, 3, 6), claims=False),
        Case({"groups": 5, "scale": False}, (3, 2, 4, 3, 5)),
    ),
    claims={
        "scale_invariant",
        "channel_scale_invariant",
        "shift_invariant",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
)
