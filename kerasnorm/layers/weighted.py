"""Weighted normalization."""

from __future__ import annotations

import itertools

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.layers.group import nearest
from kerasnorm.method import adoption
from kerasnorm.method.normalization import Normalization
from kerasnorm.method.registry import Case, Reason, Refusal, declare
from kerasnorm.numerics import backend, moments


@keras.saving.register_keras_serializable("kerasnorm")
class WeightedNormalization(Normalization):
    r"""Divides by a learned pool of neighbours: a group of channels, and a surround.

        y_c = gamma_c * x_c / sqrt(pool_c + bias_c + epsilon) + beta_c
        pool_c = sum_{k in group of c} center_kc * x_k**2           at the same position
               + sum_{positions p around} surround_pc * x_c(p)**2      the same channel

    The surround are the neighbours along every axis of positions, diagonal ones too,
    `dilation` apart (8 on images); beyond the borders there are zeros. All weights of
    the pool stay non-negative and start equal and summing to 1: 1/16 on images with
    groups of 8. The authors also keep gamma non-negative, which a trained
    normalization need not be; `gamma_constraint="non_neg"` does so.

    Paper: Pan, Giraldo and Schwartz, 2021, https://doi.org/10.1101/2021.05.20.445029

    Args:
        group_size: channels in a group; divides the channels. Default 8.
        surround: whether the pool has a surround. Default True.
        dilation: distance of the surround in positions. Default 1.
        axis: integer, axis of the channels. Default -1.
        epsilon: added to the pool. Default 1e-6.
        center, scale: whether to use `beta` and `gamma`, one value per channel.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: `group_size` does not divide the channels.
    """

    def __init__(
        self,
        group_size=8,
        surround=True,
        dilation=1,
        axis=-1,
        epsilon=1e-6,
        center=True,
        scale=True,
        **kwargs,
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        self.group_size = group_size
        self.surround = surround
        self.dilation = dilation

    def build(self, input_shape):
        super().build(input_shape)
        channels = input_shape[self.axis]
        size = self.group_size
        if channels % size:
            raise KerasNormError(
                "the group size does not divide the channels",
                got=f"group_size={size} for {channels} channels",
                fix=f"The nearest size that does is {nearest(size, channels)}.",
            )
        around = 3 ** (len(input_shape) - 2) - 1 if self.surround else 0
        pool = {
            "initializer": keras.initializers.Constant(1 / (size + around)),
            "constraint": "non_neg",
        }
        self.center_pool = self.channel_weight("center", (size, channels), **pool)
        self.surround_pool = None
        if around:
            self.surround_pool = self.channel_weight(
                "surround", (around, channels), **pool
            )
        pool["initializer"] = keras.initializers.Constant(1e-6)
        self.bias = self.channel_weight("pool_bias", (channels,), **pool)

    def call(self, inputs, training=None, mask=None):
        x, mask, back = moments.channels_last(
            ops.cast(inputs, self.statistics_dtype), self._axes(inputs.shape)[0], mask
        )
        if mask is not None:
            x = ops.where(mask, x, ops.zeros_like(x))
        size, channels = self.center_pool.shape
        center = ops.cast(self.center_pool, x.dtype)
        # Member k, group g, channel c of the group.
        weights = [ops.reshape(center, (size, channels // size, size))]
        if self.surround_pool is not None:
            weights.append(ops.cast(self.surround_pool, x.dtype))
        pool = backend.custom_gradient(self._pool)(ops.square(x), *weights)
        pool = pool + ops.cast(self.bias, x.dtype)
        inverse = moments.inverse_root(pool, self.epsilon)
        y = moments.scale_shift(x, None, inverse, *self.affine(x.dtype))
        return ops.cast(back(y), self.compute_dtype)

    def _pool(self, square, center, surround=None):
        """What each element is divided by the root of, and its gradients."""
        pool = _within(square, center)
        if surround is not None:
            for k, there in enumerate(self._around(square)):
                pool = pool + surround[k] * there

        def backward(d):
            # A group sees itself, and a neighbour is seen from the other side.
            dsquare = _within(d, ops.transpose(center, (2, 1, 0)))
            rows = (-1, *center.shape[1:])
            dcenter = ops.einsum(
                "ngk,ngc->kgc", ops.reshape(square, rows), ops.reshape(d, rows)
            )
            if surround is None:
                return dsquare, dcenter
            for k, there in enumerate(reversed(self._around(d))):
                dsquare = dsquare + surround[k] * there
            others = range(len(d.shape) - 1)
            dsurround = [ops.sum(d * v, others) for v in self._around(square)]
            return dsquare, dcenter, ops.stack(dsurround)

        return pool, backward

    def _around(self, v):
        """What lies around each position, one tensor for each neighbour."""
        d, axes = self.dilation, len(v.shape) - 2
        padded = ops.pad(v, [(0, 0), *[(d, d)] * axes, (0, 0)])
        cut = {-1: slice(None, -2 * d), 0: slice(d, -d), 1: slice(2 * d, None)}
        return [padded[(slice(None), *(cut[s] for s in step))] for step in _steps(axes)]


def _within(v, weights):
    """Sums over the members of each group, weighted for each channel."""
    size = weights.shape[0]
    groups = ops.reshape(v, (*ops.shape(v)[:-1], -1, size))
    # Products of so small matrices are slower on an accelerator, wrong in eight bits.
    if backend.reads_once() or backend.translated():
        total = sum(groups[..., k : k + 1] * weights[k] for k in range(size))
    else:
        total = ops.einsum("...gk,kgc->...gc", groups, weights)
    return ops.reshape(total, ops.shape(v))


def _steps(axes: int) -> list[tuple[int, ...]]:
    return [s for s in itertools.product((-1, 0, 1), repeat=axes) if any(s)]


def oracle(x, weights, config, training, mask):
    x = np.moveaxis(x, config.get("axis", -1), -1)
    if mask is not None:
        x = x * mask.reshape(*mask.shape, 1)
    size, d = config.get("group_size", 8), config.get("dilation", 1)
    pool = np.zeros_like(x) + weights["pool_bias"] + config.get("epsilon", 1e-6)
    for c in range(x.shape[-1]):
        first = c // size * size
        for k in range(size):
            pool[..., c] += weights["center"][k, c] * x[..., first + k] ** 2
    if "surround" in weights:
        positions = list(np.ndindex(x.shape[1:-1]))
        steps = [np.array(s) - 1 for s in np.ndindex((3,) * (x.ndim - 2))]
        steps = [s for s in steps if s.any()]
        for here in positions:
            for weight, step in zip(weights["surround"], steps, strict=True):
                there = tuple(int(v) for v in np.array(here) + d * step)
                if there in positions:
                    pool[:, *here] += weight * x[:, *there] ** 2
    y = x / np.sqrt(pool)
    y = y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)
    return np.moveaxis(y, -1, config.get("axis", -1))


def adopt(source, site, options):
    if source.method == "weighted":
        return adoption.already("weighted normalization")
    channels = adoption.channels(source, site)
    if channels is None:
        return Refusal(Reason.NO_GRAPH, "the number of channels is not known")
    size = options.arguments.get("group_size")
    if size is None:
        size = max(d for d in range(1, 9) if channels % d == 0)
    elif channels % size:
        return Refusal(
            Reason.GROUPS,
            f"groups of {size} for {channels} channels",
            f"group_size={nearest(size, channels)}",
        )
    vectors = any(len(shape) == 2 for shape in adoption.shapes(site))
    if size == 1 and vectors and not options.force:
        return Refusal(
            Reason.DEGENERATE,
            f"each of {channels} channels would be divided by itself alone",
            "layer",
        )
    return adoption.adopt_fresh(
        WeightedNormalization, source, site, options, group_size=size, epsilon=1e-6
    )


def read_own(layer):
    return adoption.describe(layer, "weighted")


def check_starts_with_equal_weights():
    layer = WeightedNormalization()
    layer.build((None, 6, 6, 16))
    for pool in (layer.center_pool, layer.surround_pool):
        np.testing.assert_array_equal(ops.convert_to_numpy(pool), 1 / 16)
    layer = WeightedNormalization(surround=False)
    layer.build((None, 6, 6, 16))
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.center_pool), 1 / 8)


def check_groups_must_divide():
    with np.testing.assert_raises_regex(KerasNormError, "nearest .* is 6"):
        WeightedNormalization().build((None, 12))


declare(
    WeightedNormalization,
    name="weighted",
    family="sample",
    paper="Pan, Giraldo and Schwartz, 2021, doi:10.1101/2021.05.20.445029",
    invariance="none",
    oracle=oracle,
    reads={WeightedNormalization: read_own},
    adopt=adopt,
    carry=adoption.carry_affine,
    cases=(
        Case({"group_size": 3}, (4, 6)),
        Case({"group_size": 2}, (3, 7, 4), masked=True),
        Case({"center": False}, (2, 5, 4, 8)),
        Case({"group_size": 2, "axis": 1, "dilation": 2}, (2, 4, 5, 4)),
        Case({"group_size": 2, "surround": False, "scale": False}, (2, 3, 3, 4)),
        Case({"group_size": 3}, (2, 3, 2, 4, 3)),
    ),
    # Not scale invariant: the bias of the pool.
    claims={"batch_independent", "sign_equivariant", "train_equals_inference"},
    checks=(check_starts_with_equal_weights, check_groups_must_divide),
)
