"""Dynamic tanh."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.method import adoption, moving_statistics
from kerasnorm.method.normalization import Normalization
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import backend, standardize


@keras.saving.register_keras_serializable("kerasnorm")
class DynamicTanh(Normalization):
    r"""A squashing function in the place of layer normalization; no statistics at all.

        y = gamma * tanh(alpha * x) + beta

    One `alpha` for the whole layer. Not a normalizer: nothing is invariant.

    Paper: Zhu, Chen, He, LeCun and Liu, 2025, https://arxiv.org/abs/2503.10622

    Args:
        alpha: where the learned `alpha` starts. Default 0.5, the paper's for all but
            language models, which want other values in front of the attention.
        axis: integer, axis of `gamma` and `beta`. Default -1.
        epsilon: not used; there so that the layer can be exchanged for others.
        center, scale: whether to use `beta` and `gamma`.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more; each element by itself.

    Raises:
        KerasNormError: the axis is outside the input or of unknown size.
    """

    def __init__(
        self, alpha=0.5, axis=-1, epsilon=1e-3, center=True, scale=True, **kwargs
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        self.alpha = float(alpha)

    def build(self, input_shape):
        super().build(input_shape)
        start = keras.initializers.Constant(self.alpha)
        self.slope = self.channel_weight("alpha", (), initializer=start)

    def normalize(self, x, mask, training):
        def kernel(x, alpha, gamma=None, beta=None):
            y = ops.tanh(x * alpha)
            y = y if gamma is None else y * gamma
            y = y if beta is None else y + beta

            def backward(dy):
                # Computed again for either rather than written out for both.
                (own,), (summed,) = backend.apart(alpha), backend.apart(alpha)
                slope = dy if gamma is None else dy * gamma
                slope = slope * (1 - ops.square(ops.tanh(x * own)))
                again = ops.tanh(x * summed)
                along = dy * (1 - ops.square(again)) * x
                along = ops.sum(along, (0, 1))
                along = along if gamma is None else along * gamma
                gradients = [slope * alpha, ops.sum(along)]
                if gamma is not None:
                    gradients.append(ops.sum(dy * again, (0, 1)))
                if beta is not None:
                    gradients.append(ops.sum(dy, (0, 1)))
                return tuple(gradients)

            return y, backward

        gamma, beta = self.affine(x.dtype)
        alpha = ops.cast(self.slope, x.dtype)
        return standardize.with_gradient(kernel, x, alpha=alpha, gamma=gamma, beta=beta)


def oracle(x, weights, config, training, mask):
    x = np.moveaxis(x, config.get("axis", -1), -1)
    e = np.exp(-2 * np.abs(weights["alpha"] * x))
    y = np.sign(x) * np.sign(weights["alpha"]) * (1 - e) / (1 + e)
    y = y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)
    return np.moveaxis(y, -1, config.get("axis", -1))


def adopt(source, site, options):
    if source.method == "dynamic_tanh":
        return adoption.already("dynamic tanh")
    running = moving_statistics.is_running(source)
    note = "close to the old line for small inputs" if running else ""
    more: dict[str, Any] = {"scale": True, "center": True} if running else {}
    return adoption.adopt_fresh(DynamicTanh, source, site, options, note=note, **more)


def carry(source, layers):
    """Gamma and beta. From moving statistics: alpha for inputs of their mean square,
    and the line that they make as the tangent at 0."""
    for _, new in layers.values():
        if new is None:
            continue
        moved = source
        if moving_statistics.is_running(source) and new.gamma is not None:
            mean, variance = moving_statistics.statistics(source, 0.0)
            alpha = new.alpha / np.sqrt(np.mean(mean**2 + variance))
            adoption.assign(new.slope, alpha)
            line = moving_statistics.line(source)
            weights = {**line, "gamma": line["gamma"] / alpha}
            moved = dataclasses.replace(source, weights=weights)
        adoption.carry_affine(moved, {"": (None, new)})


def read_own(layer):
    return adoption.describe(layer, "dynamic_tanh")


declare(
    DynamicTanh,
    name="dynamic_tanh",
    title="Dynamic tanh",
    aliases=("dyt",),
    family="sample",
    paper="Zhu, Chen, He, LeCun and Liu, 2025, arXiv:2503.10622",
    invariance="none",
    oracle=oracle,
    reads={DynamicTanh: read_own},
    adopt=adopt,
    carry=carry,
    cases=(
        Case({}, (4, 6)),
        Case({"alpha": 0.8, "center": False}, (3, 7, 4), masked=True),
        Case({"scale": False}, (2, 6, 5, 8)),
        Case({"axis": 1}, (2, 6, 4, 5)),
        Case({}, (2, 3, 2, 4, 3)),
    ),
    # The Jacobian is bounded by alpha * gamma, but largest for inputs that do not
    # saturate it.
    claims={"batch_independent", "sign_equivariant", "train_equals_inference"},
)
