"""Cosine normalization."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm import numerics
from kerasnorm.kernels import CONVOLUTIONS, DEPTHWISE
from kerasnorm.method import Case, declare
from kerasnorm.reparametrized import CASES, CLAIMS, UNDECIDED, Reparametrized, linear
from kerasnorm.wrapping import rules


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
        return v * (g * numerics.inverse_root(square, 0.0))

    def initial(self, v):
        return {"g": ops.ones_like(v[0])} if self.scale else {}

    def error(self, v, w):
        return 1.0  # the length of the inputs is not known

    def call(self, inputs, training=None):
        layer, (kernel,) = self.layer, self.kernels
        # Any factor on a sample cancels: this one keeps squares within float16.
        x = ops.cast(inputs, numerics.statistics_dtype(layer.compute_dtype))
        axes = tuple(range(1, len(x.shape)))
        largest = ops.max(ops.abs(x), axes, keepdims=True)
        x = x / ops.maximum(ops.stop_gradient(largest), 1e-30)
        exchanged = {id(kernel.variable): self.weight(kernel)}
        if layer.use_bias:
            exchanged[id(layer.bias)] = ops.zeros(layer.bias.shape)
        y = self.run(exchanged, (x,), {}, training)
        exchanged[id(kernel.variable)] = ops.ones(kernel.variable.shape)
        square = self.run(exchanged, (ops.square(x),), {}, training)
        y, square = (ops.cast(t, x.dtype) for t in (y, square))
        y = y * numerics.inverse_root(ops.maximum(square, 0.0), self.epsilon)
        if layer.use_bias:
            shape = [1] * len(y.shape)
            shape[kernel.axis] = -1
            y = y + ops.reshape(ops.cast(layer.bias, y.dtype), shape)
        return ops.cast(y, layer.compute_dtype)


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
    checks=(check_bounded,),
)
