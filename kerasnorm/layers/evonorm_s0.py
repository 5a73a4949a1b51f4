"""EvoNorm-S0."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.layers.group import GroupNormalization, default_groups, nearest
from kerasnorm.method import adoption
from kerasnorm.method.registry import Adoption, Case, Fidelity, Reason, Refusal, declare
from kerasnorm.numerics import moments


@keras.saving.register_keras_serializable("kerasnorm")
class EvoNormS0(GroupNormalization):
    r"""Activation and normalization in one, found by search: swish over deviation.

        y = gamma * x * sigmoid(v * x) / sqrt(var_group(x) + epsilon) + beta

    Put no ReLU behind. At `v = 0` the sigmoid is one half, and the layer is linear but
    for the deviation. The input is not centred, and not scale invariant for `v != 0`.

    Paper: Liu, Brock, Simonyan and Le, 2020, https://arxiv.org/abs/2004.02967

    Args:
        groups: number of groups, which divides the channels; -1 makes one of each.
            Default 32.
        axis: integer, axis of the channels. Default -1.
        epsilon: added to the biased variance over positions and the group's channels.
            Default 1e-5.
        center, scale: whether to use `beta` and `gamma`, one value per channel.
        v_initializer: default `"ones"`; one value per channel.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: `groups` does not divide the channels.
    """

    def __init__(
        self,
        groups=32,
        axis=-1,
        epsilon=1e-5,
        center=True,
        scale=True,
        *,
        v_initializer="ones",
        **kwargs,
    ):
        super().__init__(groups, axis, epsilon, center, scale, **kwargs)
        self.v_initializer = keras.initializers.get(v_initializer)

    def build(self, input_shape):
        super().build(input_shape)
        # Not `v`: that is the direction of a reparametrized weight.
        self.gate = self.add_weight(
            name="v",
            shape=(input_shape[self.axis],),
            initializer=self.v_initializer,
            autocast=False,
        )

    def normalize(self, x, mask, training):
        _, inverse = self.statistics(x, mask, training)
        x = x * ops.sigmoid(x * ops.cast(self.gate, x.dtype))
        y = moments.scale_shift(x, None, inverse, *self.affine(x.dtype))
        # A constant input is divided by sqrt(epsilon), which float16 may not hold.
        return moments.saturate(y, self.compute_dtype)


def oracle(x, weights, config, training, mask):
    x = np.moveaxis(x, config.get("axis", -1), -1)
    groups = config.get("groups", 32)
    groups = x.shape[-1] if groups == -1 else groups
    y = np.empty_like(x)
    for sample in range(len(x)):
        valid = np.ones(x.shape[1:-1], bool) if mask is None else mask[sample]
        for part in np.split(np.arange(x.shape[-1]), groups):
            v = x[sample][..., part]
            std = np.sqrt(v[valid].var() + config.get("epsilon", 1e-5))
            y[sample][..., part] = v / (1 + np.exp(-weights["v"][part] * v)) / std
    y = y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)
    return np.moveaxis(y, -1, config.get("axis", -1))


def adopt(source, site, options):
    channels = adoption.channels(source, site)
    if channels is None:
        return Refusal(Reason.NO_GRAPH, "the number of channels is not known")
    groups = options.arguments.get("groups")
    groups = default_groups(channels) if groups is None else groups
    size = 1 if groups == -1 else channels // groups
    if groups != -1 and channels % groups:
        return Refusal(
            Reason.GROUPS,
            f"{groups} groups for {channels} channels",
            f"groups={nearest(groups, channels)}",
        )

    def elements(shape):
        positions = adoption.positions(source, shape)
        return None if positions is None else positions * size

    refusal = adoption.one_element(site, options, elements, "dynamic_tanh")
    if refusal is not None:
        return refusal
    relu = site.after()
    if relu is not None and (not adoption.is_relu(relu.layer) or relu.shared):
        relu = None
    # Where no ReLU follows there was no non-linearity, so there is none at first.
    more: dict[str, Any] = {} if relu is not None else {"v_initializer": "zeros"}
    found = adoption.adopt_fresh(
        EvoNormS0,
        source,
        site,
        options,
        groups=groups,
        note="no ReLU follows: it starts linear, at v = 0",
        **more,
    )
    if isinstance(found, Refusal) or relu is None:
        return found
    note = f"its own non-linearity takes the place of {relu.path}"
    edits = (*found.edits, adoption.edit(relu, None))
    return Adoption(edits, Fidelity.FRESH, note)


def carry(source, layers):
    """Gamma doubles where the sigmoid is one half."""
    adoption.carry_affine(source, layers)
    for _, new in layers.values():
        if isinstance(new, EvoNormS0) and new.gamma is not None:
            half = ops.convert_to_numpy(new.gate) == 0
            gamma = ops.convert_to_numpy(new.gamma)
            adoption.assign(new.gamma, np.where(half, 2 * gamma, gamma))


def read_own(layer):
    return Refusal(
        Reason.NO_RULE,
        f"{layer.name} has a non-linearity, which others have not",
    )


def check_linear_at_zero_v():
    x = np.random.default_rng(0).normal(0, 3, (3, 4, 5, 6)).astype("float32")
    y = EvoNormS0(2, v_initializer="zeros")(x)
    std = x.reshape(3, 20, 2, 3).std((1, 3)).repeat(3, 1)[:, None, None]
    np.testing.assert_allclose(ops.convert_to_numpy(y), x / 2 / std, rtol=1e-4)


declare(
    EvoNormS0,
    name="evonorm_s0",
    title="EvoNorm-S0",
    aliases=("evos0",),
    family="sample",
    paper="Liu, Brock, Simonyan and Le, 2020, arXiv:2004.02967",
    invariance="none",
    oracle=oracle,
    reads={EvoNormS0: read_own},
    adopt=adopt,
    carry=carry,
    cases=(
        Case({"groups": 2}, (4, 6)),
        Case({"groups": 2, "center": False}, (3, 7, 4), masked=True),
        Case({"groups": 4, "scale": False}, (2, 6, 5, 8)),
        Case({"groups": 3, "axis": 1}, (2, 6, 4, 5)),
        Case({"groups": 1}, (2, 3, 2, 4, 3)),
    ),
    claims={"batch_independent", "train_equals_inference"},
    checks=(check_linear_at_zero_v,),
)
