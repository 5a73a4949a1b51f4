"""Pixel normalization."""

from __future__ import annotations

import keras
import numpy as np

from kerasnorm.layers.rms import RMSNormalization
from kerasnorm.method import adoption
from kerasnorm.method.registry import Case, Fidelity, declare


@keras.saving.register_keras_serializable("kerasnorm")
class PixelNormalization(RMSNormalization):
    r"""Divides each position by its root mean square over channels, nothing learned.

    The method of progressively grown generators: it keeps magnitudes from escalating.

        y = x / sqrt(mean_channels(x**2) + epsilon)

    RMS normalization with another epsilon; `scale=True` and `center=True` add the
    `gamma` and `beta` that the paper does without.

    Paper: Karras, Aila, Laine and Lehtinen, 2018, https://arxiv.org/abs/1710.10196

    Args:
        axis: integer, axis of the channels. Default -1.
        epsilon: added to the mean square. Default 1e-8.
        center, scale: whether to use `beta` and `gamma`. Default False.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more; each position by itself.

    Raises:
        KerasNormError: the axis is outside the input or of unknown size.
    """

    several_axes = False

    def __init__(self, axis=-1, epsilon=1e-8, center=False, scale=False, **kwargs):
        super().__init__(axis, epsilon, center, scale, **kwargs)


def oracle(x, weights, config, training, mask):
    x = np.moveaxis(x, config.get("axis", -1), -1)
    y = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        square = np.dot(x[index], x[index]) / x.shape[-1]
        y[index] = x[index] * (square + config.get("epsilon", 1e-8)) ** -0.5
    y = y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)
    return np.moveaxis(y, -1, config.get("axis", -1))


def adopt(source, site, options):
    if source.method == "pixel":
        return adoption.already("pixel normalization")
    refusal = adoption.one_element(
        site, options, lambda s: s[adoption.channel_axis(source, len(s))], "none"
    )
    if refusal is not None:
        return refusal
    exact = (
        source.method in ("rms", "scale")
        and isinstance(source.axis, int)
        and not options.arguments
    )
    return adoption.adopt_fresh(
        PixelNormalization,
        source,
        site,
        options,
        fidelity=Fidelity.EXACT if exact else Fidelity.FRESH,
        note="each position is normalized by itself"
        if adoption.on_images(site)
        else "",
    )


def read_own(layer):
    return adoption.describe(layer, "pixel")


declare(
    PixelNormalization,
    name="pixel",
    aliases=("pixel_norm",),
    family="sample",
    paper="Karras, Aila, Laine and Lehtinen, 2018, arXiv:1710.10196",
    invariance="layer",
    oracle=oracle,
    reads={PixelNormalization: read_own},
    adopt=adopt,
    carry=adoption.carry_affine,
    cases=(
        Case({}, (4, 6)),
        Case({"center": True}, (3, 7, 4), masked=True),
        Case({"epsilon": 1e-5, "scale": True}, (2, 4, 3, 6)),
        Case({"axis": 1}, (2, 6, 4, 5)),
        Case({}, (2, 3, 2, 4, 3)),
    ),
    claims={
        "batch_independent",
        "scale_invariant",
        "sign_equivariant",
        "unit_output_scale",
        "train_equals_inference",
        "idempotent",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
)
