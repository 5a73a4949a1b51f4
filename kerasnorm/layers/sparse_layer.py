"""Sparse layer normalization."""

from __future__ import annotations

import math

import keras
import numpy as np

from kerasnorm.layers import group
from kerasnorm.layers.divisive import Smoothed, read_smoothed
from kerasnorm.method import adoption
from kerasnorm.method.registry import Case, Fidelity, declare
from kerasnorm.numerics import moments


@keras.saving.register_keras_serializable("kerasnorm")
class SparseLayerNormalization(Smoothed):
    r"""Layer normalization with a learned addition to the variance, and sparse.

        y = gamma * (x - mean_sample(x)) / sqrt(sigma**2 + var_sample(x)) + beta

    The paper's LN-s, and with the penalty on `|x - mean(x)|` its LN*. As there,
    statistics are over a whole image or volume, and over the units alone on vectors
    and sequences; gamma and beta have one value per channel.

    Paper: Ren, Liao, Urtasun, Sinz and Zemel, 2017, https://arxiv.org/abs/1611.04520

    Args:
        spatial: whether statistics run over positions; None (default) does on images
            and volumes.
        sigma: where `sigma` starts. Default 0.5.
        learn_sigma: whether it is learned. Default True.
        l1: weight of the penalty `mean |x - mean(x)|` in training; 0.001 to 0.01 in
            the paper. Default 0.
        axis: integer, axis of the channels. Default -1.
        epsilon: added to `sigma**2`. Default 1e-6.
        center, scale: whether to use `beta` and `gamma`.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: `sigma` or `l1` is negative.
    """

    def __init__(self, spatial=None, epsilon=1e-6, **kwargs):
        super().__init__(epsilon=epsilon, **kwargs)
        self.spatial = spatial

    def build(self, input_shape):
        super().build(input_shape)
        images = len(input_shape) > 3
        self._axes_of_mean = (
            (1, 2) if (self.spatial or (self.spatial is None and images)) else (2,)
        )

    def normalize(self, x, mask, training):
        axes = self._axes_of_mean
        # Masked whole rows do not mix where each row is by itself.
        mixing = mask is not None and (len(axes) > 1 or mask.shape[-1] != 1)
        mean, variance = moments.moments(x, axes, mask if mixing else None)
        self.penalize(x - mean, mask, training)
        inverse = self.inverse(variance)
        return moments.scale_shift(x, mean, inverse, *self.affine(x.dtype))


def oracle(x, weights, config, training, mask):
    x = np.moveaxis(x, config.get("axis", -1), -1)
    spatial = config.get("spatial")
    power = weights["sigma"] ** 2 + config.get("epsilon", 1e-6)
    y = np.empty_like(x)
    for sample in range(len(x)):
        v, axes = x[sample], -1
        if x.ndim > 3 if spatial is None else spatial:
            v, axes = (v if mask is None else v[mask[sample]]), None
        mean, var = v.mean(axes, keepdims=True), v.var(axes, keepdims=True)
        if axes is None:
            mean, var = mean.item(), var.item()
        y[sample] = (x[sample] - mean) / np.sqrt(power + var)
    y = y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)
    return np.moveaxis(y, -1, config.get("axis", -1))


def adopt(source, site, options):
    if source.method == "sparse_layer":
        return adoption.already("sparse layer normalization")
    images = adoption.on_images(site)

    def elements(shape):
        channel = shape[adoption.channel_axis(source, len(shape))]
        return adoption.size(shape[1:]) if images else channel

    refusal = adoption.one_element(site, options, elements, "none")
    if refusal is not None:
        return refusal
    by_position = source.method in ("layer", "positional") and isinstance(
        source.axis, int
    )
    whole = group.same_groups(source, site, 1, options) and not by_position
    if not (by_position or whole) or options.arguments:
        return adoption.adopt_fresh(
            SparseLayerNormalization, source, site, options, epsilon=1e-6
        )
    # The same function now; sigma, which starts small, is learned from there.
    return adoption.adopt_fresh(
        SparseLayerNormalization,
        source,
        site,
        options,
        fidelity=Fidelity.EXACT,
        spatial=whole,
        sigma=math.sqrt(source.epsilon),
        epsilon=0.0,
    )


def read_own(layer):
    return read_smoothed("sparse_layer", layer)


declare(
    SparseLayerNormalization,
    name="sparse_layer",
    aliases=("ln_s", "ln_star"),
    family="sample",
    paper="Ren, Liao, Urtasun, Sinz and Zemel, 2017, arXiv:1611.04520",
    invariance="none",
    oracle=oracle,
    reads={SparseLayerNormalization: read_own},
    adopt=adopt,
    carry=adoption.carry_affine,
    cases=(
        Case({}, (4, 6)),
        Case({"l1": 0.01}, (3, 7, 4), masked=True),
        Case({"spatial": True, "l1": 0.1}, (3, 7, 4), masked=True),
        Case({"center": False, "sigma": 1.0}, (2, 4, 3, 6)),
        Case({"spatial": False, "axis": 1}, (2, 6, 4, 5)),
        Case({"learn_sigma": False}, (2, 3, 2, 4, 3)),
    ),
    # Not scale invariant: sigma.
    claims={
        "batch_independent",
        "shift_invariant",
        "sign_equivariant",
        "zero_output_mean",
        "train_equals_inference",
    },
)
