"""Instance normalization."""

from __future__ import annotations

import keras
import numpy as np

from kerasnorm.common.errors import KerasNormError
from kerasnorm.layers import group
from kerasnorm.method import adoption
from kerasnorm.method.normalization import Normalization
from kerasnorm.method.registry import Case, Fidelity, Reason, Refusal, declare
from kerasnorm.numerics import moments, standardize


@keras.saving.register_keras_serializable("kerasnorm")
class InstanceNormalization(Normalization):
    r"""Normalizes each channel of each sample over all positions.

    The method of style transfer and image generation. It forgets the mean and the
    contrast of every channel, so that it must not stand before a global pooling, nor
    on a single position.

        y = gamma * (x - mean_space(x)) / sqrt(var_space(x) + epsilon) + beta

    Paper: Ulyanov, Vedaldi and Lempitsky, 2016, https://arxiv.org/abs/1607.08022

    Args:
        axis: integer, axis of the channels. Default -1.
        epsilon: added to the variance. Default 1e-3.
        center, scale: whether to use `beta` and `gamma`, one value per channel.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 3 or more.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: the input has no positions to normalize over.
    """

    def build(self, input_shape):
        if len(input_shape) == 2:
            raise KerasNormError(
                "instance normalization needs positions to normalize over",
                got=f"input shape {tuple(input_shape)}",
                expected="a sequence, image or volume",
                fix="Use LayerNormalization on vectors.",
            )
        super().build(input_shape)

    def normalize(self, x, mask, training):
        if mask is not None:
            return super().normalize(x, mask, training)
        return standardize.samples(x, self.epsilon, *self.affine(x.dtype))

    def statistics(self, x, mask, training):
        mean, variance = moments.moments(x, (1,), mask)
        return mean, moments.inverse_root(variance, self.epsilon)


def oracle(x, weights, config, training, mask):
    x = np.moveaxis(x, config.get("axis", -1), -1)
    y = np.empty_like(x)
    for sample in range(len(x)):
        valid = np.ones(x.shape[1:-1], bool) if mask is None else mask[sample]
        v = x[sample]
        y[sample] = (v - v[valid].mean(0)) / np.sqrt(
            v[valid].var(0) + config.get("epsilon", 1e-3)
        )
    y = y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)
    return np.moveaxis(y, -1, config.get("axis", -1))


def adopt(source, site, options):
    refusal = adoption.forced_training(source, site)
    if refusal is not None:
        return refusal
    channels = adoption.channels(source, site)
    if channels is None:
        return Refusal(Reason.NO_GRAPH, "the number of channels is not known")
    same = group.same_groups(source, site, channels, options)
    if same:
        return adoption.already("instance normalization")
    for shape in adoption.shapes(site):
        if len(shape) == 2:
            return Refusal(
                Reason.UNDEFINED, f"no positions in input shape {shape}", "layer"
            )
    refusal = adoption.one_element(
        site, options, lambda s: adoption.positions(source, s), "layer"
    )
    if refusal is None and not options.force and _pooled(site):
        refusal = Refusal(
            Reason.DEGENERATE,
            "global average pooling follows: the mean of each normalized channel is "
            "beta whatever the input",
            "group",
        )
    if refusal is not None:
        return refusal
    axis = adoption.last_axis(source)
    stock = keras.layers.GroupNormalization
    cls = adoption.pick(stock, InstanceNormalization, site, options)
    if isinstance(cls, Refusal):
        return cls
    more = {"groups": -1} if cls is stock else {}
    layer = adoption.make(cls, source, site, options, axis=axis, **more)
    return adoption.adopt(site, layer, Fidelity.FRESH)


def _pooled(site):
    """Whether a global average pooling reads the site, through nothing that matters."""
    layer = (site := site.after()) and site.layer
    while isinstance(layer, (keras.layers.Dropout, keras.layers.Identity)):
        layer = (site := site.after()) and site.layer
    return type(layer).__name__.startswith("GlobalAveragePooling")


def read_own(layer):
    return adoption.describe(layer, "instance")


declare(
    InstanceNormalization,
    name="instance",
    aliases=("in",),
    family="sample",
    paper="Ulyanov, Vedaldi and Lempitsky, 2016, arXiv:1607.08022",
    invariance="filter",
    oracle=oracle,
    reads={InstanceNormalization: read_own},
    adopt=adopt,
    carry=adoption.carry_affine,
    cases=(
        Case({"epsilon": 1e-5}, (3, 7, 4), masked=True),
        Case({"center": False}, (2, 6, 5, 4)),
        Case({"scale": False, "axis": 1}, (2, 3, 4, 5)),
        Case({}, (2, 3, 2, 4, 3)),
    ),
    claims={
        "batch_independent",
        "scale_invariant",
        "channel_scale_invariant",
        "shift_invariant",
        "sign_equivariant",
        "unit_output_scale",
        "zero_output_mean",
        "train_equals_inference",
        "idempotent",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
)
