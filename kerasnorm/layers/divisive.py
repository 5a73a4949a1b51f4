"""Divisive normalization."""

from __future__ import annotations

import dataclasses
import math

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.layers.local_response import odd
from kerasnorm.method import adoption
from kerasnorm.method.normalization import Normalization
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import moments


class Smoothed(Normalization):
    """What divisive normalization and its batch and layer variants add to the root.

    Args:
        sigma: where the learned `sigma` starts; its square is added to the variance.
        learn_sigma: whether it is learned.
        l1: weight of the penalty `mean |x - mean(x)|`, added to the losses in training.
    """

    def __init__(self, sigma=0.5, learn_sigma=True, l1=0.0, **kwargs):
        super().__init__(**kwargs)
        if not (sigma >= 0 and l1 >= 0):
            raise KerasNormError(
                "sigma and l1 are sizes",
                got=f"sigma={sigma!r}, l1={l1!r}",
                expected="numbers that are not negative",
            )
        self.sigma = float(sigma)
        self.learn_sigma = learn_sigma
        self.l1 = float(l1)

    def build(self, input_shape):
        super().build(input_shape)
        start = keras.initializers.Constant(self.sigma)
        self.smoothing = self.channel_weight(
            "sigma", (), initializer=start, trainable=self.learn_sigma
        )

    def inverse(self, variance):
        """`1 / sqrt(variance + sigma**2 + epsilon)`."""
        square = ops.square(ops.cast(self.smoothing, variance.dtype))
        return moments.inverse_root(variance, square + self.epsilon)

    def penalize(self, centred, mask, training):
        """Adds the penalty on the centred activations to the layer's losses."""
        if not (training and self.l1):
            return
        size = ops.abs(centred)
        if mask is None:
            self.add_loss(self.l1 * ops.mean(size))
        else:
            counts = ops.broadcast_to(ops.cast(mask, size.dtype), ops.shape(size))
            total = ops.sum(ops.where(mask, size, ops.zeros_like(size)))
            self.add_loss(self.l1 * total / ops.maximum(ops.sum(counts), 1))


def read_smoothed(method, layer, **names):
    """A `Source` whose epsilon holds the square of sigma."""
    source = adoption.describe(layer, method, "momentum", **names)
    if not layer.built:
        return source
    sigma = float(ops.convert_to_numpy(layer.smoothing))
    return dataclasses.replace(source, epsilon=layer.epsilon + sigma**2)


@keras.saving.register_keras_serializable("kerasnorm")
class DivisiveNormalization(Smoothed):
    r"""Centres and divides by statistics of a window around each element.

        v = x - mean_window(x)
        y = gamma * v / sqrt(sigma**2 + mean_window(v**2)) + beta

    A sizeable sigma helps every normalizer, and is learned. On images and volumes a
    window spans `window` positions along each axis and all channels; on vectors and
    sequences it spans `window` neighbouring units. At the borders a mean is over what
    there is; the authors' code counts zeros there, and divides both means by the size
    of the first window.

    Paper: Ren, Liao, Urtasun, Sinz and Zemel, 2017, https://arxiv.org/abs/1611.04520

    Args:
        window: odd size of the window. Default 5, for images; the paper's recurrent
            networks take 121 units.
        spatial: whether the window spans positions; None (default) does on images and
            volumes.
        sigma: where `sigma` starts. Default 0.5.
        learn_sigma: whether it is learned. Default True.
        l1: weight of the penalty `mean |v|` in training; 0.001 to 0.01 in the paper.
            Default 0.
        axis: integer, axis of the channels. Default -1.
        epsilon: added to `sigma**2`. Default 1e-6.
        center, scale: whether to use `beta` and `gamma`, one value per channel.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: `window` is even or not positive, `sigma` or `l1` negative.
    """

    def __init__(self, window=5, spatial=None, epsilon=1e-6, **kwargs):
        super().__init__(epsilon=epsilon, **kwargs)
        self.window = odd(window)
        self.spatial = spatial

    def call(self, inputs, training=None, mask=None):
        x, mask, back = moments.channels_last(
            ops.cast(inputs, self.statistics_dtype), self._axes(inputs.shape)[0], mask
        )
        rank = len(x.shape)
        spatial = rank > 3 if self.spatial is None else self.spatial
        valid = 1.0
        if mask is not None:
            x = ops.where(mask, x, ops.zeros_like(x))
            valid = ops.cast(mask, x.dtype)
        v, variance = (self._of_positions if spatial else self._of_units)(x, valid)
        self.penalize(v, mask, training)
        inverse = self.inverse(variance)
        y = moments.scale_shift(v, None, inverse, *self.affine(x.dtype))
        return ops.cast(back(y), self.compute_dtype)

    def _of_positions(self, x, valid):
        """Centred input, and variance of the window around each position."""
        # All follows from the moments of each position, one number for its channels.
        mask = None if isinstance(valid, float) else valid > 0
        mean, variance = moments.moments(x, (-1,), mask)
        axes = range(1, len(x.shape) - 1)
        centre = ops.stop_gradient(ops.mean(mean, axes, keepdims=True))
        mean = mean - centre
        share = ops.mean(valid * ops.ones_like(x[:1]), -1, keepdims=True)
        average = self._average(share, axes)
        around = average(mean)
        v = (x - centre - around) * valid
        return v, average(variance + ops.square(mean - around))

    def _of_units(self, x, valid):
        """The same along the channels."""
        average = self._average(valid * ops.ones_like(x[:1]), (-1,))
        centre = ops.mean(x, axis=range(1, len(x.shape)), keepdims=True)
        v = (x - ops.stop_gradient(centre)) * valid
        v = (v - average(v)) * valid
        return v, average(ops.square(v))

    def _average(self, weight, axes):
        """Function that averages over the window along axes, weighted."""

        def total(v):
            for axis in axes:
                v = moments.window_sum(v, self.window, axis)
            return v

        count = ops.maximum(total(weight), moments.TINY)
        return lambda v: total(v * weight) / count


def oracle(x, weights, config, training, mask):
    x = np.moveaxis(x, config.get("axis", -1), -1)
    half = config.get("window", 5) // 2
    spatial = config.get("spatial")
    spatial = x.ndim > 3 if spatial is None else spatial
    ones = np.ones_like(x)
    valid = ones if mask is None else ones * mask.reshape(*mask.shape, 1)
    sizes = x.shape[1:-1] if spatial else x.shape[-1:]

    def local(v):
        out = np.zeros_like(v)
        for index in np.ndindex(sizes):
            near = tuple(slice(max(0, i - half), i + half + 1) for i in index)
            whole = (slice(None), *near) if spatial else (..., *near)
            here = (slice(None), *index) if spatial else (..., *index)
            axes = tuple(range(1, v.ndim)) if spatial else -1
            n = valid[whole].sum(axes)
            mean = (v[whole] * valid[whole]).sum(axes) / np.maximum(n, 1)
            out[here] = mean[:, None] if spatial else mean
        return out

    v = (x - local(x)) * valid
    power = weights["sigma"] ** 2 + config.get("epsilon", 1e-6) + local(v**2)
    y = v / np.sqrt(power)
    y = y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)
    return np.moveaxis(y, -1, config.get("axis", -1))


def adopt(source, site, options):
    if source.method == "divisive":
        return adoption.already("divisive normalization")
    refusal = adoption.one_element(
        site, options, lambda s: adoption.size(s[1:]), "none"
    )
    if refusal is not None:
        return refusal
    images = adoption.on_images(site)
    return adoption.adopt_fresh(
        DivisiveNormalization,
        source,
        site,
        options,
        window=5 if images else 121,
        epsilon=1e-6,
    )


def read_own(layer):
    return read_smoothed("divisive", layer)


def check_wide_window_is_layer_normalization():
    x = np.random.default_rng(0).normal(2, 3, (3, 5, 4, 6)).astype("float32")
    y = DivisiveNormalization(window=11, sigma=0.0, epsilon=1e-3)(x)
    flat = x.reshape(3, -1)
    std = np.sqrt(flat.var(-1, keepdims=True) + 1e-3)
    expected = ((flat - flat.mean(-1, keepdims=True)) / std).reshape(x.shape)
    np.testing.assert_allclose(ops.convert_to_numpy(y), expected, rtol=1e-4, atol=1e-4)


def check_penalty():
    x = np.random.default_rng(0).normal(2, 3, (3, 5)).astype("float32")
    layer = DivisiveNormalization(window=9, l1=0.01)
    layer(x, training=False)
    if layer.losses:
        raise AssertionError("a penalty at inference")
    layer(x, training=True)
    expected = 0.01 * np.abs(x - x.mean(-1, keepdims=True)).mean()
    if not math.isclose(float(layer.losses[0]), expected, rel_tol=1e-5):
        raise AssertionError(f"penalty {layer.losses}, expected {expected}")


declare(
    DivisiveNormalization,
    name="divisive",
    aliases=("dn",),
    family="sample",
    paper="Ren, Liao, Urtasun, Sinz and Zemel, 2017, arXiv:1611.04520",
    invariance="none",
    oracle=oracle,
    reads={DivisiveNormalization: read_own},
    adopt=adopt,
    carry=adoption.carry_affine,
    cases=(
        Case({"l1": 0.01}, (4, 9)),
        Case({"window": 3, "spatial": True}, (3, 7, 4), masked=True),
        Case({"center": False}, (3, 7, 4), masked=True),
        Case({"window": 3, "scale": False}, (2, 6, 5, 4)),
        Case({"axis": 1, "l1": 0.1}, (2, 3, 7, 6)),
        Case({"window": 3, "learn_sigma": False}, (2, 3, 2, 4, 3)),
    ),
    # Not scale invariant: sigma.
    claims={
        "batch_independent",
        "shift_invariant",
        "sign_equivariant",
        "train_equals_inference",
    },
    checks=(check_wide_window_is_layer_normalization, check_penalty),
)
