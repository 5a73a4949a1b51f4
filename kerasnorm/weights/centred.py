"""Centred weight normalization."""

from __future__ import annotations

from typing import ClassVar

import keras
import numpy as np
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
class CentredWeightNormalization(Reparametrized):
    r"""Gives each filter mean zero and unit length: w on a sphere, orthogonal to 1.

        w = g * (v - mean(v)) / ||v - mean(v)||              per filter

    A constant added to all inputs of a filter changes nothing, and neither does the
    scale of `v`. Where the inputs have one mean and one variance and are uncorrelated,
    outputs have mean zero and that variance.

    A trained kernel whose filters have another mean than zero is not a `w` of this
    form: wrapping changes the function then.

    Paper: Huang et al., 2017, https://arxiv.org/abs/1710.02338 (Centered Weight
    Normalization in Accelerating Training of Deep Neural Networks, ICCV 2017)

    Args:
        layer: the layer to wrap, built or not.
        scale: whether to learn `g`, which starts at 1; without it, it is 1.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        Those of the wrapped layer.

    Raises:
        KerasNormError: the layer has no kernel to normalize.
    """

    preserving: ClassVar = {"scale": True}

    def __init__(self, layer, scale: bool = True, **kwargs):
        super().__init__(layer, **kwargs)
        self.scale = scale

    def kernel(self, v, g=1.0):
        d = centred(v)
        square = ops.sum(ops.square(d), 0, keepdims=True)
        return d * (g * moments.inverse_root(square, 0.0))

    def initial(self, v):
        return {"g": ops.ones_like(v[0])} if self.scale else {}

    def absorb(self, v, w):
        if not self.scale:
            return {"v": w}
        return {"v": w, "g": ops.sqrt(ops.sum(ops.square(centred(w)), 0))}


def kernel_of_paper(v, weights, config, training):
    d = v - v.mean(0)
    return weights.get("g", 1.0) * d / np.linalg.norm(d, axis=0)


def check_on_the_sphere():
    layer = CentredWeightNormalization(keras.layers.Conv2D(4, 3), scale=False)
    layer.build((None, 5, 5, 2))
    w = ops.convert_to_numpy(layer.weight()).reshape(-1, 4)
    np.testing.assert_allclose(w.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(w, axis=0), 1, rtol=1e-5)


declare(
    CentredWeightNormalization,
    name="centred_weight",
    aliases=("cwn", "centered_weight"),
    family="weight",
    paper="Huang et al., 2017, ICCV",
    invariance="filter",  # in v, and a shift of v per filter
    oracle=oracle_of(kernel_of_paper),
    **rules(CentredWeightNormalization),
    cases=(
        *CASES,
        Case({"layer": keras.layers.Dense(3), "scale": False}, (4, 5)),
    ),
    claims=CLAIMS | {"shift_invariant"},
    undecided=UNDECIDED,
    checks=(check_on_the_sphere,),
)
