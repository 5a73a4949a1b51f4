"""Root mean square normalization."""

from __future__ import annotations

import keras
import numpy as np

from kerasnorm.method import adoption
from kerasnorm.method.normalization import Normalization
from kerasnorm.method.registry import Case, Fidelity, Reason, Refusal, declare
from kerasnorm.numerics import moments, standardize


@keras.saving.register_keras_serializable("kerasnorm")
class RMSNormalization(Normalization):
    r"""Divides each position by the root mean square over `axis`; nothing is centred.

    Layer normalization without the mean: cheaper, and what large language models use.

        y = gamma * x / sqrt(mean_axis(x**2) + epsilon)          (+ beta)

    The paper has no beta, nor has `keras.layers.RMSNormalization`; `center=True` adds
    one, so that a trained normalization with a beta can become this one.

    Paper: Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467

    Args:
        axis: integer or several, to normalize over. Default -1.
        epsilon: added to the mean square. Default 1e-6.
        center: whether to add `beta`. Default False.
        scale: whether to multiply by `gamma`.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        mask: boolean, the leading axes of the input.

    Raises:
        KerasNormError: an axis is outside the input, the batch, or of unknown size.
    """

    several_axes = True

    def __init__(self, axis=-1, epsilon=1e-6, center=False, scale=True, **kwargs):
        super().__init__(axis, epsilon, center, scale, **kwargs)

    def normalize(self, x, mask, training):
        gamma, beta = self.affine(x.dtype)
        if mask is None or mask.shape[-1] == 1:  # masked whole rows do not mix
            return standardize.rows(x, self.epsilon, gamma, beta, center=False)
        _, square = moments.moments(x, (-1,), mask, center=False)
        inverse = moments.inverse_root(square, self.epsilon)
        return moments.scale_shift(x, None, inverse, gamma, beta)


def oracle(x, weights, config, training, mask):
    axis = config.get("axis", -1)
    axes = sorted(a % x.ndim for a in ([axis] if isinstance(axis, int) else axis))
    shape = [x.shape[a] if a in axes else 1 for a in range(x.ndim)]
    valid = np.ones_like(x)
    if mask is not None and any(a < mask.ndim for a in axes):
        valid = valid * mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    square = np.average(x**2, tuple(axes), valid, keepdims=True)
    y = x / np.sqrt(square + config.get("epsilon", 1e-6))
    if "gamma" in weights:
        y = y * weights["gamma"].reshape(shape)
    return y + weights["beta"].reshape(shape) if "beta" in weights else y


def adopt(source, site, options):
    refusal = adoption.forced_training(source, site)
    if refusal is not None:
        return refusal
    axis = options.arguments.get("axis", adoption.last_axis(source))
    axes = [axis] if isinstance(axis, int) else list(axis)
    if source.method == "rms":
        return adoption.already("RMS normalization")
    found = adoption.shapes(site)
    if any(
        adoption.channel_axis(source, len(s)) not in [a % len(s) for a in axes]
        for s in found
    ):
        return Refusal(Reason.UNDEFINED, f"axis={axis} leaves out the channels")
    refusal = adoption.one_element(
        site, options, lambda s: adoption.size(s[a] for a in axes), "none"
    )
    if refusal is not None:
        return refusal
    beta = source.weights.get("beta")
    center = options.arguments.get("center", beta is not None and bool(np.any(beta)))
    because = None
    if center:
        because = "it has a beta, which keras.layers.RMSNormalization has not"
    elif not source.config.get("scale", True):
        because = "it has no gamma, which keras.layers.RMSNormalization always has"
    elif own := set(options.arguments) - {"axis", "epsilon", "center"}:
        because = f"keras.layers.RMSNormalization does not take {', '.join(own)}"
    elif kept := [
        w for w in ("regularizer", "constraint") if source.config.get(f"gamma_{w}")
    ]:
        because = (
            f"gamma has a {kept[0]}, which keras.layers.RMSNormalization does not take"
        )
    stock = keras.layers.RMSNormalization
    cls = adoption.pick(
        stock, RMSNormalization, site, options, because, mask_matters=len(axes) > 1
    )
    if isinstance(cls, Refusal):
        return cls
    more = {} if cls is stock else {"center": center}
    layer = adoption.make(cls, source, site, options, axis=axis, **more)
    image = any(len(shape) > 3 for shape in found) and len(axes) == 1
    note = "each position is normalized by itself" if image else ""
    exact = (
        source.method in ("pixel", "scale")
        and axes == [source.axis]
        and center == ("beta" in source.weights)
        and "epsilon" not in options.arguments
    )
    fidelity = Fidelity.EXACT if exact else Fidelity.FRESH
    return adoption.adopt(site, layer, fidelity, note)


def read_keras(layer):
    # Its `scale` is the weight itself, not a flag.
    source = adoption.describe(layer, "rms", gamma="scale")
    return source.__class__(
        source.method,
        layer,
        source.axis,
        source.epsilon,
        source.weights,
        {"scale": True, "center": False},
    )


def read_own(layer):
    return adoption.describe(layer, "rms")


declare(
    RMSNormalization,
    name="rms",
    title="RMS normalization",
    family="sample",
    paper="Zhang and Sennrich, 2019, arXiv:1910.07467",
    invariance="layer",
    oracle=oracle,
    reads={
        keras.layers.RMSNormalization: read_keras,
        RMSNormalization: read_own,
    },
    adopt=adopt,
    carry=adoption.carry_affine,
    cases=(
        Case({}, (4, 6)),
        Case({"axis": [1, 2], "center": True}, (3, 7, 4), masked=True),
        Case({"epsilon": 1e-3, "scale": False}, (3, 7, 4)),
        Case({"axis": (1, 2, 3)}, (2, 4, 3, 6)),
        Case({"axis": 1}, (2, 6, 4, 5)),
        Case({"center": True}, (2, 3, 2, 4, 3)),
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
