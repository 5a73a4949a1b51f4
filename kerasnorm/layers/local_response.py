"""Local response normalization."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.method import adoption, moving_statistics
from kerasnorm.method.normalization import Normalization
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import backend, moments


@keras.saving.register_keras_serializable("kerasnorm")
class LocalResponseNormalization(Normalization):
    r"""Divides each element by what a window of neighbouring channels sums up to.

    The method of AlexNet, placed behind the ReLU. It dampens strong responses and does
    not standardize: scale passes through.

        y = x / (epsilon + alpha * sum_window(x**2))**power

    `epsilon` is the paper's k, `power` its beta. The sum is a sum: frameworks that
    divide alpha by the window (PyTorch, Caffe) want `alpha=1e-4 / window` here.

    Paper: Krizhevsky, Sutskever and Hinton, ImageNet Classification with Deep
    Convolutional Neural Networks, NeurIPS 2012

    Args:
        window: odd number of neighbouring channels. Default 5.
        alpha: factor of the sum. Default 1e-4.
        power: exponent. Default 0.75.
        axis: integer, axis of the channels. Default -1.
        epsilon: added to the sum, positive. Default 2.
        center, scale: whether to use `beta` and `gamma`. Default False.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more; each position by itself.

    Raises:
        KerasNormError: `window` is even or not positive.
    """

    def __init__(
        self,
        window=5,
        alpha=1e-4,
        power=0.75,
        axis=-1,
        epsilon=2.0,
        center=False,
        scale=False,
        **kwargs,
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        self.window = odd(window)
        self.alpha = float(alpha)
        self.power = float(power)

    def normalize(self, x, mask, training):
        def kernel(x):
            total = moments.window_sum(ops.square(x), self.window, -1)
            base = ops.maximum(self.epsilon + self.alpha * total, moments.TINY)
            inverse = self._inverse(base)

            def backward(dy):
                # A window sees what sees it.
                seen = moments.window_sum(dy * x * inverse / base, self.window, -1)
                return (dy * inverse - x * seen * (2 * self.alpha * self.power),)

            return x * inverse, backward

        y = backend.custom_gradient(kernel)(x)
        gamma, beta = self.affine(x.dtype)
        y = y if gamma is None else y * gamma
        return y if beta is None else y + beta

    def _inverse(self, base):
        if self.power == 0.75:
            # A general power takes ten times as long.
            root = ops.rsqrt(base)
            return root * ops.sqrt(root)
        return ops.power(base, -self.power)


def odd(window: int) -> int:
    """The window, checked: it has one element in its middle."""
    if not isinstance(window, int) or window < 1 or window % 2 == 0:
        raise KerasNormError(
            "a window without an element in its middle",
            got=f"window={window!r}",
            expected="a positive odd integer",
        )
    return window


def oracle(x, weights, config, training, mask):
    x = np.moveaxis(x, config.get("axis", -1), -1)
    half = config.get("window", 5) // 2
    y = np.empty_like(x)
    for c in range(x.shape[-1]):
        near = x[..., max(0, c - half) : c + half + 1]
        total = config.get("alpha", 1e-4) * (near**2).sum(-1)
        y[..., c] = x[..., c] / (config.get("epsilon", 2.0) + total) ** config.get(
            "power", 0.75
        )
    y = y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)
    return np.moveaxis(y, -1, config.get("axis", -1))


def adopt(source, site, options):
    if source.method == "local_response":
        return adoption.already("local response normalization")
    return adoption.adopt_fresh(
        LocalResponseNormalization,
        source,
        site,
        options,
        epsilon=2.0,
        scale=True,
        center=True,
        note="it does not standardize; the paper has it behind the ReLU",
    )


def carry(source, layers):
    """Gamma and beta; those of moving statistics as the straight line they make, since
    nothing is subtracted here nor divided by a deviation."""
    weights = moving_statistics.line(source)
    for _, new in layers.values():
        if new is not None:
            gain = new.epsilon**new.power  # of channels that are all small
            gamma = gain * weights.get("gamma", np.ones(new.gamma.shape))
            moved = dataclasses.replace(source, weights={**weights, "gamma": gamma})
            adoption.carry_affine(moved, {"": (None, new)})


def read_own(layer):
    return adoption.describe(layer, "local_response")


def check_matches_tensorflow():
    """Keras has no such layer; TensorFlow has the operation."""
    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    x = np.random.default_rng(0).normal(size=(2, 3, 4, 7)).astype("float32")
    expected = tf.nn.local_response_normalization(
        x, depth_radius=2, bias=2.0, alpha=0.1, beta=0.75
    )
    y = LocalResponseNormalization(alpha=0.1)(x)
    np.testing.assert_allclose(y.numpy(), expected.numpy(), rtol=1e-5)


def check_window_is_odd():
    windows: list[Any] = [0, 4, -3, 2.5]
    for window in windows:
        with np.testing.assert_raises_regex(KerasNormError, "middle"):
            LocalResponseNormalization(window)


declare(
    LocalResponseNormalization,
    name="local_response",
    aliases=("lrn",),
    family="sample",
    paper="Krizhevsky, Sutskever and Hinton, NeurIPS 2012",
    invariance="none",
    oracle=oracle,
    reads={LocalResponseNormalization: read_own},
    adopt=adopt,
    carry=carry,
    cases=(
        Case({"alpha": 0.1}, (4, 6)),
        Case({"window": 3, "alpha": 0.5, "center": True}, (3, 7, 4), masked=True),
        Case({"scale": True, "power": 0.5, "alpha": 1.0}, (2, 4, 3, 9)),
        Case({"axis": 1, "epsilon": 1.0}, (2, 6, 4, 5)),
        Case({"window": 11}, (2, 3, 2, 4, 3)),
    ),
    claims={"batch_independent", "sign_equivariant", "train_equals_inference"},
    checks=(check_matches_tensorflow, check_window_is_odd),
)
