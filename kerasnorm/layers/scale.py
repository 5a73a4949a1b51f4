"""Scale normalization."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.method import adoption
from kerasnorm.method.normalization import Normalization
from kerasnorm.method.registry import Case, Fidelity, declare
from kerasnorm.numerics import standardize
from rewriters import private


@keras.saving.register_keras_serializable("kerasnorm")
class ScaleNormalization(Normalization):
    r"""Brings every vector to one learned length: RMS normalization with one gain.

        y = gamma * x / sqrt(sum_channels(x**2) + channels * epsilon)        (+ beta)

    One number `gamma` for all channels, which starts at sqrt(channels). Epsilon is on
    the scale of a single squared element, as in RMS normalization; the authors' code
    clamps the length at 1e-5 instead, which has no gradient there. The paper has no
    beta; `center=True` adds one, so that a trained normalization can become this one.

    Paper: Nguyen and Salazar, 2019, https://arxiv.org/abs/1910.05895

    Args:
        axis: integer, axis of the channels. Default -1.
        epsilon: added to the mean square. Default 1e-6.
        center: whether to add `beta`. Default False.
        scale: whether to multiply by `gamma`; without it the length is 1.
        gamma_initializer: None (default) starts at sqrt(channels).
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more; each position by itself.

    Raises:
        KerasNormError: the axis is outside the input or of unknown size.
    """

    def __init__(
        self,
        axis=-1,
        epsilon=1e-6,
        center=False,
        scale=True,
        *,
        gamma_initializer: Any = None,
        **kwargs,
    ):
        super().__init__(
            axis, epsilon, center, scale, gamma_initializer=gamma_initializer, **kwargs
        )

    def build(self, input_shape):
        (axis,) = self._axes(input_shape)
        channels = input_shape[axis]
        if self.scale:
            length = keras.initializers.Constant(math.sqrt(channels))
            start = self.gamma_initializer or length
            self.gamma = self.channel_weight("gamma", (1,), initializer=start)
        if self.center:
            self.beta = self.channel_weight("beta", (channels,))
        self.built = True

    def normalize(self, x, mask, training):
        gamma, beta = self.affine(x.dtype)
        channels = x.shape[-1]
        gain = ops.ones((1,), x.dtype) if gamma is None else gamma
        return standardize.rows(
            x,
            self.epsilon,
            beta=beta,
            center=False,
            gain=gain / math.sqrt(channels),
        )


def oracle(x, weights, config, training, mask):
    x = np.moveaxis(x, config.get("axis", -1), -1)
    length = np.sqrt((x**2).sum(-1, keepdims=True))
    floor = x.shape[-1] * config.get("epsilon", 1e-6)
    y = weights.get("gamma", 1.0) * x / np.sqrt(length**2 + floor)
    y = y + weights.get("beta", 0.0)
    return np.moveaxis(y, -1, config.get("axis", -1))


def adopt(source, site, options):
    if source.method == "scale":
        return adoption.already("scale normalization")
    refusal = adoption.one_element(
        site, options, lambda s: s[adoption.channel_axis(source, len(s))], "none"
    )
    if refusal is not None:
        return refusal
    gamma = source.weights.get("gamma", np.ones(1))
    one_gain = np.ptp(gamma) == 0
    exact = (
        source.method in ("rms", "pixel")
        and isinstance(source.axis, int)
        and one_gain
        and not {"axis", "epsilon", "scale"} & set(options.arguments)
    )
    return adoption.adopt_fresh(
        ScaleNormalization,
        source,
        site,
        options,
        fidelity=Fidelity.EXACT if exact else Fidelity.FRESH,
        note="" if one_gain else "the gains of the channels become their mean",
        scale=True,
        gamma_initializer=None,
    )


def carry(source, layers):
    """`gamma = sqrt(channels) * mean(gamma)`; beta as it is."""
    without = {k: v for k, v in source.weights.items() if k != "gamma"}
    adoption.carry_affine(dataclasses.replace(source, weights=without), layers)
    for _, new in layers.values():
        if new is not None and new.gamma is not None:
            channels = private.build_shapes_dict(new)["input_shape"][new.axis]
            gain = np.mean(source.weights.get("gamma", 1.0)) * math.sqrt(channels)
            adoption.assign(new.gamma, np.full((1,), gain))


def read_own(layer):
    """In the words of RMS normalization: one gain per channel, all the same."""
    source = adoption.describe(layer, "scale")
    if not layer.built:
        return source
    channels = private.build_shapes_dict(layer)["input_shape"][layer.axis]
    gain = source.weights.get("gamma", np.ones(1)) / math.sqrt(channels)
    weights = {**source.weights, "gamma": np.repeat(gain, channels)}
    config = {**source.config, "scale": True, "gamma_initializer": "ones"}
    return dataclasses.replace(source, weights=weights, config=config)


def check_starts_at_unit_mean_square():
    x = np.random.default_rng(0).normal(size=(3, 5, 16)).astype("float32")
    y = ops.convert_to_numpy(ScaleNormalization()(x))
    np.testing.assert_allclose((y**2).mean(-1), 1, rtol=1e-4)


declare(
    ScaleNormalization,
    name="scale",
    aliases=("scale_norm",),
    family="sample",
    paper="Nguyen and Salazar, 2019, arXiv:1910.05895",
    invariance="layer",
    oracle=oracle,
    reads={ScaleNormalization: read_own},
    adopt=adopt,
    carry=carry,
    cases=(
        Case({}, (4, 6)),
        Case({"epsilon": 1e-5, "center": True}, (3, 7, 4), masked=True),
        Case({"scale": False}, (2, 4, 3, 6)),
        Case({"axis": 1}, (2, 6, 4, 5)),
        Case({}, (2, 3, 2, 4, 3)),
    ),
    # Outputs are of length 1, not of unit scale.
    claims={
        "batch_independent",
        "scale_invariant",
        "sign_equivariant",
        "train_equals_inference",
        "idempotent",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
    checks=(check_starts_at_unit_mean_square,),
)
