"""Layer normalization."""

from __future__ import annotations

import keras
import numpy as np

from kerasnorm.layers import group
from kerasnorm.method import adoption
from kerasnorm.method.normalization import Normalization
from kerasnorm.method.registry import Case, Fidelity, Reason, Refusal, declare
from kerasnorm.numerics import moments, standardize


@keras.saving.register_keras_serializable("kerasnorm")
class LayerNormalization(Normalization):
    r"""Normalizes each sample over `axis`: each position, or all of an image.

    The method of transformers and recurrent networks.

        y = gamma * (x - mean_axis(x)) / sqrt(var_axis(x) + epsilon) + beta

    Takes the place of `keras.layers.LayerNormalization`: same arguments, weights and
    files; it reads masks where `axis` runs over masked positions, and is faster.

    On an image `axis=-1` normalizes the channels at each position (ConvNeXt);
    `axis=(1, 2, 3)` normalizes the whole image, as the first convolutional layer
    normalization did. A swap of an image model takes the latter, as
    `GroupNormalization(groups=1)`: it keeps the contrast between positions, as batch
    normalization did, which each position's own statistics erase; and gamma and beta
    stay one per channel, so that any image size will do.

    Paper: Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450

    Args:
        axis: integer or several, to normalize over; `gamma` and `beta` have their
            shape. Default -1.
        epsilon: added to the variance. Default 1e-3.
        center, scale: whether to use `beta` and `gamma`.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        mask: boolean, the leading axes of the input.

    Raises:
        KerasNormError: an axis is outside the input, the batch, or of unknown size.
    """

    several_axes = True

    def normalize(self, x, mask, training):
        gamma, beta = self.affine(x.dtype)
        if mask is None or mask.shape[-1] == 1:  # masked whole rows do not mix
            return standardize.rows(x, self.epsilon, gamma, beta)
        mean, variance = moments.moments(x, (-1,), mask)
        inverse = moments.inverse_root(variance, self.epsilon)
        return moments.scale_shift(x, mean, inverse, gamma, beta)


def oracle(x, weights, config, training, mask):
    axis = config.get("axis", -1)
    axes = sorted(a % x.ndim for a in ([axis] if isinstance(axis, int) else axis))
    shape = [x.shape[a] if a in axes else 1 for a in range(x.ndim)]
    valid = np.ones_like(x)
    if mask is not None and any(a < mask.ndim for a in axes):
        valid = valid * mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    n = valid.sum(tuple(axes), keepdims=True)
    mean = (x * valid).sum(tuple(axes), keepdims=True) / n
    var = ((x - mean) ** 2 * valid).sum(tuple(axes), keepdims=True) / n
    y = (x - mean) / np.sqrt(var + config.get("epsilon", 1e-3))
    if "gamma" in weights:
        y = y * weights["gamma"].reshape(shape)
    return y + weights["beta"].reshape(shape) if "beta" in weights else y


def adopt(source, site, options):
    refusal = adoption.forced_training(source, site)
    if refusal is not None:
        return refusal
    found = adoption.shapes(site)
    if not found:
        return Refusal(Reason.NO_GRAPH, "the input's rank is not known", "axis=-1")
    rank = len(found[0])
    axis = options.arguments.get("axis")
    positional = source.method == "positional"
    if axis is None and rank > 3 and not positional:
        return group.adopt_groups(source, site, options, 1)
    channel = adoption.channel_axis(source, rank)
    axis = channel if axis is None else axis
    axes = sorted(a % rank for a in ([axis] if isinstance(axis, int) else axis))
    if channel not in axes:
        return Refusal(
            Reason.UNDEFINED,
            f"axis={axis} leaves out the channels (axis {channel})",
            f"axis={channel - rank}",
        )
    old = [source.axis] if isinstance(source.axis, int) else source.axis
    same = sorted(a % rank for a in old) == axes
    if source.method == "layer" and same:
        return adoption.already("layer normalization")
    refusal = adoption.one_element(
        site, options, lambda s: adoption.size(s[a] for a in axes), "none"
    )
    if refusal is not None:
        return refusal
    stock = keras.layers.LayerNormalization
    mixes = len(axes) > 1
    cls = adoption.pick(stock, LayerNormalization, site, options, mask_matters=mixes)
    if isinstance(cls, Refusal):
        return cls
    last = len(axes) == 1 and axes[0] == rank - 1
    layer = adoption.make(cls, source, site, options, axis=-1 if last else _axis(axes))
    # On vectors one group of all channels is the same thing.
    exact = rank == 2 and group.same_groups(source, site, 1, options)
    exact |= positional and same and "epsilon" not in options.arguments
    return adoption.adopt(site, layer, Fidelity.EXACT if exact else Fidelity.FRESH)


def _axis(axes):
    return axes[0] if len(axes) == 1 else axes


def read_keras(layer):
    if getattr(layer, "rms_scaling", False):
        return Refusal(
            Reason.NO_RULE,
            f"{layer.name} has rms_scaling=True, which divides by the standard "
            "deviation without centring: neither layer nor RMS normalization",
        )
    return adoption.describe(layer, "layer")


def check_loads_keras_weights():
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, size=(5, 3, 4, 6)).astype("float32")
    for axis in (-1, (1, 2, 3), 2):
        stock = keras.layers.LayerNormalization(axis=axis)
        ours = LayerNormalization(axis=axis)
        for layer in (stock, ours):
            layer.build(x.shape)
        values = [rng.normal(size=v.shape) for v in stock.get_weights()]
        stock.set_weights(values)
        ours.set_weights(values)
        np.testing.assert_allclose(stock(x), ours(x), rtol=1e-4, atol=1e-4)


declare(
    LayerNormalization,
    name="layer",
    aliases=("ln",),
    family="sample",
    paper="Ba, Kiros and Hinton, 2016, arXiv:1607.06450",
    invariance="layer",
    oracle=oracle,
    reads={
        keras.layers.LayerNormalization: read_keras,
        LayerNormalization: read_keras,
    },
    adopt=adopt,
    carry=adoption.carry_affine,
    cases=(
        Case({}, (4, 6)),
        Case({"axis": [1, 2]}, (3, 7, 4), masked=True),
        Case({"epsilon": 1e-5, "center": False}, (3, 7, 4)),
        Case({"axis": (1, 2, 3), "scale": False}, (2, 4, 3, 6)),
        Case({"axis": 1}, (2, 6, 4, 5)),
        Case({"axis": [2, -1]}, (2, 3, 2, 4, 3)),
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
    checks=(check_loads_keras_weights,),
)
