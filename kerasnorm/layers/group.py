"""Group normalization."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from kerasnorm.common.errors import KerasNormError
from kerasnorm.method import adoption
from kerasnorm.method.normalization import Normalization
from kerasnorm.method.registry import Case, Fidelity, Reason, Refusal, declare
from kerasnorm.numerics import moments, standardize


@keras.saving.register_keras_serializable("kerasnorm")
class GroupNormalization(Normalization):
    r"""Normalizes groups of channels, each sample by itself, over all positions.

    For small or uneven batches, where batch statistics are poor.

        y = gamma * (x - mean_group(x)) / sqrt(var_group(x) + epsilon) + beta

    On a sequence the statistics run over time: a later step changes an earlier one.
    Unlike `keras.layers.GroupNormalization` it reads masks, and `groups` stays what it
    was given as.

    Paper: Wu and He, 2018, https://arxiv.org/abs/1803.08494

    Args:
        groups: number of groups, which divides the channels; 1 normalizes over all
            channels, -1 makes one group of each (instance normalization). Default 32.
        axis: integer, axis of the channels. Default -1.
        epsilon: added to the variance. Default 1e-3.
        center, scale: whether to use `beta` and `gamma`, one value per channel.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: `groups` does not divide the channels.
    """

    def __init__(
        self, groups=32, axis=-1, epsilon=1e-3, center=True, scale=True, **kwargs
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        if not isinstance(groups, int) or (groups < 1 and groups != -1):
            raise KerasNormError(
                "a number of groups that cannot be",
                got=f"groups={groups!r}",
                expected="a positive integer, or -1 for one group per channel",
            )
        self.groups = groups

    def build(self, input_shape):
        super().build(input_shape)
        channels = input_shape[self.axis]
        if self.groups != -1 and channels % self.groups:
            raise KerasNormError(
                "the groups do not divide the channels",
                got=f"groups={self.groups} for {channels} channels",
                fix=f"The nearest that does is {nearest(self.groups, channels)}.",
            )

    def normalize(self, x, mask, training):
        if mask is not None:
            return super().normalize(x, mask, training)
        gamma, beta = self.affine(x.dtype)
        # One position: the groups are parts of a row, and nothing needs pooling.
        of = standardize.rows if x.shape[1] == 1 else standardize.groups
        groups = self._groups(x)
        return of(x, epsilon=self.epsilon, gamma=gamma, beta=beta, groups=groups)

    def _groups(self, x):
        return x.shape[-1] if self.groups == -1 else self.groups

    def statistics(self, x, mask, training):
        groups = self._groups(x)
        mean, variance = moments.moments(x, (1,), mask)
        weight = moments.count(mask, (1,))
        mean, variance = moments.pool_groups(mean, variance, groups, weight)
        return mean, moments.inverse_root(variance, self.epsilon)


def nearest(groups: int, channels: int) -> int:
    """The divisor of `channels` nearest to `groups`, the smaller of two."""
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    return min(divisors, key=lambda d: (abs(d - groups), d))


def default_groups(channels: int) -> int:
    """The number of groups a swap chooses: the paper's 32 on wide layers.

    On narrower ones the largest divisor that leaves 16 channels to a group, the best
    of the paper's table 3, but two groups where each has 4. Smaller groups are nearly
    instance normalization, which forgets how channels relate, and keep less of a
    trained model.
    """
    most = 2 if 8 <= channels < 32 else max(1, min(32, channels // 16))
    return max(d for d in range(1, most + 1) if channels % d == 0)


def oracle(x, weights, config, training, mask):
    x = np.moveaxis(x, config.get("axis", -1), -1)
    groups = config.get("groups", 32)
    groups = x.shape[-1] if groups == -1 else groups
    y = np.empty_like(x)
    for sample in range(len(x)):
        valid = np.ones(x.shape[1:-1], bool) if mask is None else mask[sample]
        for part in np.split(np.arange(x.shape[-1]), groups):
            v = x[sample][..., part]
            mean, var = v[valid].mean(), v[valid].var()
            y[sample][..., part] = (v - mean) / np.sqrt(
                var + config.get("epsilon", 1e-3)
            )
    y = y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)
    return np.moveaxis(y, -1, config.get("axis", -1))


def groups_of(source, shape):
    """Groups that the source's statistics amount to on this shape; None if none."""
    axis = adoption.channel_axis(source, len(shape))
    if source.method == "group":
        groups = source.config["groups"]
        return shape[axis] if groups == -1 else groups
    if source.method == "instance":
        return shape[axis]
    if source.method == "layer":
        axes = [source.axis] if isinstance(source.axis, int) else source.axis
        return 1 if len({a % len(shape) for a in axes}) == len(shape) - 1 else None
    return None


def same_groups(source, site, groups, options):
    """Whether the source already has these statistics: then a swap is exact."""
    found = adoption.shapes(site)
    known = bool(found) and all(groups_of(source, s) == groups for s in found)
    flat = all(value.ndim == 1 for value in source.weights.values())
    return known and flat and "epsilon" not in options.arguments


def adopt(source, site, options):
    refusal = adoption.forced_training(source, site)
    if refusal is not None:
        return refusal
    channels = adoption.channels(source, site)
    if channels is None:
        return Refusal(Reason.NO_GRAPH, "the number of channels is not known")
    groups = options.arguments.get("groups")
    if groups is None:
        if source.method == "group":
            return adoption.already("group normalization")
        groups = default_groups(channels)
    return adopt_groups(source, site, options, channels if groups == -1 else groups)


def adopt_groups(source, site, options, groups):
    """Puts group normalization with this number of groups at the site."""
    channels: Any = adoption.channels(source, site)
    if channels % groups:
        return Refusal(
            Reason.GROUPS,
            f"{groups} groups for {channels} channels",
            f"groups={nearest(groups, channels)}",
        )
    same = same_groups(source, site, groups, options)
    if same and source.method == "group":
        return adoption.already(f"group normalization with {groups} groups")

    def elements(shape):
        positions = adoption.positions(source, shape)
        return None if positions is None else positions * channels // groups

    fewer = "layer" if groups > 1 else "none"
    refusal = adoption.one_element(site, options, elements, fewer)
    if refusal is not None:
        return refusal
    stock = keras.layers.GroupNormalization
    cls = adoption.pick(stock, GroupNormalization, site, options)
    if isinstance(cls, Refusal):
        return cls
    layer = adoption.make(
        cls, source, site, options, groups=groups, axis=adoption.last_axis(source)
    )
    over_time = any(len(shape) == 3 for shape in adoption.shapes(site))
    note = "statistics run over all time steps" if over_time else ""
    fidelity = Fidelity.EXACT if same else Fidelity.FRESH
    return adoption.adopt(site, layer, fidelity, note)


def read_keras(layer):
    return adoption.describe(layer, "group", "groups")


def check_default_groups():
    found = [default_groups(c) for c in (1, 2, 3, 8, 12, 16, 24, 64, 128, 256, 37, 40)]
    np.testing.assert_equal(found, [1, 1, 1, 2, 2, 2, 2, 4, 8, 16, 1, 2])


def check_groups_must_divide():
    with np.testing.assert_raises_regex(KerasNormError, "nearest .* is 2"):
        GroupNormalization(groups=3).build((None, 8))


declare(
    GroupNormalization,
    name="group",
    aliases=("gn",),
    family="sample",
    paper="Wu and He, 2018, arXiv:1803.08494",
    invariance="group",
    oracle=oracle,
    reads={
        keras.layers.GroupNormalization: read_keras,
        GroupNormalization: read_keras,
    },
    adopt=adopt,
    carry=adoption.carry_affine,
    cases=(
        Case({"groups": 2}, (4, 6)),
        Case({"groups": 2, "epsilon": 1e-5}, (3, 7, 4), masked=True),
        Case({"groups": 4, "center": False}, (2, 6, 5, 8)),
        Case({"groups": 3, "axis": 1}, (2, 6, 4, 5)),
        Case({"groups": 1}, (2, 3, 2, 4, 3)),
    ),
    claims={
        "batch_independent",
        "scale_invariant",
        "shift_invariant",
        "sign_equivariant",
        "unit_output_scale",
        "zero_output_mean",
        "train_equals_inference",
        "idempotent",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
    checks=(check_default_groups, check_groups_must_divide),
)
