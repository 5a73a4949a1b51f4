"""Cosine normalization."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm.kernels.kernel import CONVOLUTIONS, DEPTHWISE, convolve
from kerasnorm.kernels.reparametrized import (
    CASES,
    CLAIMS,
    UNDECIDED,
    Reparametrized,
    linear,
)
from kerasnorm.kernels.wrapping import rules
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import moments


LINEAR = (keras.layers.Dense, *CONVOLUTIONS, *DEPTHWISE)


@keras.saving.register_keras_serializable("kerasnorm")
class CosineNormalization(Reparametrized):
    r"""Outputs the cosine of each filter and what it sees, instead of the product.

        y = g * <v, x> / (||v|| sqrt(||x||^2 + epsilon)) + bias

    Scaling the filter or the inputs changes nothing; without `g` and the bias, outputs
    lie between -1 and 1. In a convolution `x` is the patch under the filter, what lies
    beyond the border being zero. `epsilon` is relative to the largest square of the
    sample's inputs.

    Paper: Luo et al., 2017, https://arxiv.org/abs/1702.05870; `g` (a temperature) is
    later use.

    Args:
        layer: a dense layer, convolution or depthwise convolution without an
            activation of its own, built or not.
        scale: whether to learn `g` per filter, which starts at 1.
        epsilon: keeps empty patches finite. Defaults to 1e-6.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        Those of the wrapped layer.

    Raises:
        KerasNormError: another kind of layer, or one with an activation.
    """

    foldable = False  # it divides by the inputs as well

    def __init__(self, layer, scale: bool = True, epsilon: float = 1e-6, **kwargs):
        super().__init__(layer, **kwargs)
        self.scale = scale
        self.epsilon = float(epsilon)

    @classmethod
    def unfit(cls, layer):
        if not isinstance(layer, LINEAR):
            return "the inputs of a filter are known for dense layers and convolutions"
        if layer.activation not in (None, keras.activations.linear):
            return "its activation has to be a layer of its own"
        return None

    def kernel(self, v, g=1.0):
        square = ops.sum(ops.square(v), 0, keepdims=True)
        return v * (g * moments.inverse_root(square, 0.0))

    def initial(self, v):
        return {"g": ops.ones_like(v[0])} if self.scale else {}

    def error(self, v, w):
        return 1.0  # the length of the inputs is not known

    def call(self, inputs, training=None):
        layer, (kernel,) = self.layer, self.kernels
        # Any factor on a sample cancels: this one keeps squares within float16.
        x = ops.cast(inputs, moments.statistics_dtype(layer.compute_dtype))
        axes = tuple(range(1, len(x.shape)))
        largest = ops.max(ops.abs(x), axes, keepdims=True)
        x = x / ops.maximum(ops.stop_gradient(largest), 1e-30)
        exchanged = {id(kernel.variable): self.weight(kernel)}
        if layer.use_bias:
            exchanged[id(layer.bias)] = ops.zeros(layer.bias.shape)
        y = ops.cast(self.run(exchanged, (x,), {}, training), x.dtype)
        square = self._squares(x, kernel.axis)
        y = y * moments.inverse_root(ops.maximum(square, 0.0), self.epsilon)
        if layer.use_bias:
            shape = [1] * len(y.shape)
            shape[kernel.axis] = -1
            y = y + ops.reshape(ops.cast(layer.bias, y.dtype), shape)
        return ops.cast(y, layer.compute_dtype)

    def _squares(self, x, axis):
        """Squared lengths of what the filters see: once, where all see the same."""
        layer, x = self.layer, ops.square(x)
        if isinstance(layer, keras.layers.Dense):
            return ops.sum(x, axis, keepdims=True)
        axis %= len(x.shape)
        if isinstance(layer, DEPTHWISE):
            see, alike = (x.shape[axis], 1), layer.depth_multiplier
        else:
            groups, shape = layer.groups, ops.shape(x)
            parts = (*shape[:axis], groups, -1, *shape[axis + 1 :])
            x = ops.sum(ops.reshape(x, parts), axis + 1)
            # A single group's lengths are broadcast.
            see, alike = (1, groups), layer.filters // groups if groups > 1 else 1
        y = convolve(layer, x, ops.ones((*layer.kernel_size, *see), x.dtype))
        return y if alike == 1 else ops.repeat(y, alike, axis)


def oracle(x, weights, config, training, mask):
    v = weights["kernel"]
    lengths = np.linalg.norm(v.reshape(-1, v.shape[-1]), axis=0)
    patch = np.sqrt(linear(x**2, np.ones_like(v)))
    return weights["g"] * linear(x, v) / (lengths * patch) + weights["bias"]


def check_bounded():
    layer = CosineNormalization(keras.layers.Conv2D(4, 3, padding="same"), scale=False)
    x = np.random.default_rng(0).normal(2, 1, (2, 5, 6, 3)).astype("float32")
    y = ops.convert_to_numpy(layer(x))
    if not np.abs(y).max() <= 1 + 1e-5:
        raise AssertionError(f"a cosine of {np.abs(y).max()}")
    large = ops.convert_to_numpy(layer(1e30 * x))
    np.testing.assert_allclose(large, y, atol=1e-5)


def check_what_filters_see():
    layers, rng = keras.layers, np.random.default_rng(0)
    for layer, shape in (
        (layers.Conv1D(4, 3, padding="causal", dilation_rate=2), (2, 9, 3)),
        (layers.Conv2D(6, 3, strides=2, padding="same", groups=2), (2, 9, 8, 4)),
        (layers.DepthwiseConv2D(3, depth_multiplier=2), (2, 9, 8, 3)),
        (layers.Conv3D(2, 2, data_format="channels_last"), (2, 4, 5, 3, 3)),
    ):
        wrapped = CosineNormalization(layer, epsilon=1e-14)
        x = rng.normal(size=shape).astype("float32")
        got = ops.convert_to_numpy(wrapped(x))
        (kernel,), v = wrapped.kernels, ops.convert_to_numpy(wrapped.v)
        length = np.sqrt(np.sum(v**2, kernel.fan_in)).reshape(-1)
        product = ops.convert_to_numpy(layer(x))
        wrapped.v.assign(np.ones_like(v))
        square = ops.convert_to_numpy(layer(x**2))
        expected = product / length / np.sqrt(square)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


declare(
    CosineNormalization,
    name="cosine",
    family="weight",
    paper="Luo et al., 2017, arXiv:1702.05870",
    invariance="filter",  # and of the inputs
    oracle=oracle,
    **rules(CosineNormalization),
    cases=tuple(Case({**c.config, "epsilon": 1e-14}, c.shape) for c in CASES),
    claims=(CLAIMS | {"scale_invariant", "gradient_orthogonal_to_input"})
    - {"bounded_jacobian"},
    undecided=UNDECIDED,
    checks=(check_bounded, check_what_filters_see),
)
