"""Weight standardization."""

from __future__ import annotations

from typing import ClassVar

import keras
from keras import ops

from kerasnorm.kernels.reparametrized import (
    CASES,
    CLAIMS,
    UNDECIDED,
    Reparametrized,
    centred,
    oracle_of,
)
from kerasnorm.kernels.wrapping import rules
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import moments


@keras.saving.register_keras_serializable("kerasnorm")
class WeightStandardization(Reparametrized):
    r"""Gives the weights of each filter mean zero and variance one.

        w = (v - mean(v)) / sqrt(var(v) + epsilon)           per filter

    `sqrt(fan_in)` times centred weight normalization: outputs grow with the fan-in, so
    that a normalization has to follow; group normalization is what the paper uses. The
    variance is the biased one; the authors' own code has the unbiased one.

    Paper: Qiao et al., 2019, https://arxiv.org/abs/1903.10520

    Args:
        layer: the layer to wrap, built or not.
        epsilon: added to the variance. Defaults to 1e-5.
        scale: whether to learn a factor `gamma` per filter, which starts at 1. The
            paper has none; a trained kernel needs it to keep its size.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        Those of the wrapped layer.

    Raises:
        KerasNormError: the layer has no kernel to standardize.
    """

    preserving: ClassVar = {"scale": True}

    def __init__(self, layer, epsilon: float = 1e-5, scale: bool = False, **kwargs):
        super().__init__(layer, **kwargs)
        self.epsilon = float(epsilon)
        self.scale = scale

    def kernel(self, v, gamma=1.0):
        d = centred(v)
        variance = ops.mean(ops.square(d), 0, keepdims=True)
        return d * (gamma * self.inverse(variance, v.shape[0]))

    def inverse(self, variance, fan_in):
        """What the centred filters are multiplied by."""
        return moments.inverse_root(variance, self.epsilon)

    def initial(self, v):
        return {"gamma": ops.ones_like(v[0])} if self.scale else {}

    def absorb(self, v, w):
        if not self.scale:
            return {"v": w}
        variance = ops.var(w, 0)
        return {"v": w, "gamma": 1.0 / self.inverse(variance, w.shape[0])}


def kernel_of_paper(v, weights, config, training):
    root = (v.var(0) + config.get("epsilon", 1e-5)) ** 0.5
    return weights.get("gamma", 1.0) * (v - v.mean(0)) / root


declare(
    WeightStandardization,
    name="weight_standardization",
    aliases=("ws",),
    title="Weight standardization",
    family="weight",
    paper="Qiao et al., 2019, arXiv:1903.10520",
    invariance="filter",
    oracle=oracle_of(kernel_of_paper),
    **rules(WeightStandardization),
    cases=(
        *CASES,
        Case({"layer": keras.layers.Dense(3), "scale": True}, (4, 5)),
    ),
    claims=CLAIMS | {"shift_invariant"},
    undecided=UNDECIDED,
)
