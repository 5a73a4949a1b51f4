"""Weights on the hypersphere, as in the normalized transformer."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.kernels.reparametrized import (
    CASES,
    CLAIMS,
    UNDECIDED,
    Reparametrized,
    oracle_of,
)
from kerasnorm.kernels.wrapping import rules
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import moments
from rewriters import private


__all__ = ["normalize_weights"]


@keras.saving.register_keras_serializable("kerasnorm")
class HypersphereNormalization(Reparametrized):
    r"""Keeps the vectors of a kernel on the unit sphere, with a learned scale each.

        w = s * v / ||v||,      s = g * initial_scale / stored_scale

    along the axis that lies in the embedding space: the inputs of each filter for
    matrices that read it, the outputs for embeddings and matrices that write into it.
    `g` starts at `stored_scale`, which sets how fast `s` learns. `normalize_weights`
    after each step brings `v` itself to length 1; the forward pass does not need it,
    but learning rates then mean angles.

    Paper: Loshchilov et al., 2024, https://arxiv.org/abs/2410.01131 (nGPT)

    Args:
        layer: the layer to wrap, built or not.
        along: `"inputs"`, `"outputs"`, or None for the outputs of an embedding and the
            inputs of any other layer.
        scale: whether to learn `g`; without it `s` is `initial_scale`.
        initial_scale: value of `s` at the start. Defaults to 1.
        stored_scale: value of `g` at the start; the paper has 1 / sqrt(width).
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        Those of the wrapped layer.

    Raises:
        KerasNormError: the layer has no kernel, or another `along`.
    """

    def __init__(
        self,
        layer,
        along: str | None = None,
        scale: bool = True,
        initial_scale: float = 1.0,
        stored_scale: float = 1.0,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        if along not in (None, "inputs", "outputs"):
            raise KerasNormError(
                "a kernel has no such axis",
                got=f"along={along!r}",
                expected="'inputs', 'outputs' or None",
            )
        self.along = along
        self.scale = scale
        self.initial_scale = float(initial_scale)
        self.stored_scale = float(stored_scale)

    @property
    def _axis(self):
        embedding = isinstance(self.layer, keras.layers.Embedding)
        along = self.along or ("outputs" if embedding else "inputs")
        return 0 if along == "inputs" else 1

    def kernel(self, v, g=None):
        s = self.initial_scale
        if g is not None:
            s = s / self.stored_scale * g
        return self.normalized(v) * s

    def normalized(self, v):
        """`v` with vectors of length 1."""
        square = ops.sum(ops.square(v), self._axis, keepdims=True)
        return v * moments.inverse_root(square, 0.0)

    def initial(self, v):
        return {"g": ops.full_like(v[0], self.stored_scale)} if self.scale else {}

    def absorb(self, v, w):
        if not self.scale or self._axis:
            return super().absorb(v, w)
        length = ops.sqrt(ops.sum(ops.square(w), 0))
        return {"v": w, "g": length * self.stored_scale / self.initial_scale}


def normalize_weights(model: Any) -> int:
    """Brings the parameters of all wrapped kernels to the sphere; call it after a step.

    Outputs do not change. Returns the number of kernels.
    """
    count = 0
    for layer in private.flatten_layers(model):
        if isinstance(layer, HypersphereNormalization):
            for kernel in layer.kernels:
                v = kernel.columns(ops.convert_to_tensor(kernel.variable))
                v = layer.normalized(ops.cast(v, moments.statistics_dtype(v.dtype)))
                kernel.variable.assign(kernel.from_columns(v))
                count += 1
    return count


@keras.saving.register_keras_serializable("kerasnorm")
class HypersphereResidual(keras.layers.Layer):
    """A step on the sphere in place of a residual sum.

        h <- norm(h + |a| (norm(f) - h)),    a = weight * initial_rate / stored_rate

    with `norm(x) = x / ||x||` along the last axis, called as `layer([h, f])`.

    Paper: Loshchilov et al., 2024, https://arxiv.org/abs/2410.01131 (nGPT)

    Args:
        initial_rate: the step at the start. Defaults to 0.05.
        stored_rate: value of the weight at the start; the paper has 1 / sqrt(width).
        **kwargs: `name`, `dtype`, `trainable`.
    """

    def __init__(self, initial_rate: float = 0.05, stored_rate: float = 1.0, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.initial_rate = float(initial_rate)
        self.stored_rate = float(stored_rate)

    def build(self, input_shape):
        self.rate = self.add_weight(
            name="rate",
            shape=(input_shape[0][-1],),
            initializer=keras.initializers.Constant(self.stored_rate),
            autocast=False,
        )
        self.built = True

    def call(self, inputs):
        dtype = moments.statistics_dtype(self.compute_dtype)
        h, f = (ops.cast(x, dtype) for x in inputs)
        rate = ops.cast(self.rate, dtype) * (self.initial_rate / self.stored_rate)
        y = _unit(h + ops.abs(rate) * (_unit(f) - h))
        return ops.cast(y, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape[0])

    def get_config(self):
        own = {"initial_rate": self.initial_rate, "stored_rate": self.stored_rate}
        return {**super().get_config(), **own}


def _unit(x):
    square = ops.sum(ops.square(x), -1, keepdims=True)
    return x * moments.inverse_root(square, 0.0)


def kernel_of_paper(v, weights, config, training):
    axis = 1 if config.get("along") == "outputs" else 0
    s = (
        config.get("initial_scale", 1.0)
        * weights["g"]
        / config.get("stored_scale", 1.0)
    )
    return s * v / np.linalg.norm(v, axis=axis, keepdims=True)


def check_normalize_weights_keeps_outputs():
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            HypersphereNormalization(keras.layers.Embedding(7, 6)),
            HypersphereNormalization(keras.layers.Dense(4, use_bias=False)),
        ]
    )
    x = np.array([[0, 1, 2, 3, 6]])
    y = ops.convert_to_numpy(model(x))
    np.testing.assert_equal(normalize_weights(model), 2)
    np.testing.assert_allclose(ops.convert_to_numpy(model(x)), y, atol=1e-6)
    rows = ops.convert_to_numpy(model.layers[0].v)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)


def check_residual():
    rng = np.random.default_rng(0)
    h, f = rng.normal(size=(2, 3, 4)).astype("float32")
    layer = HypersphereResidual(0.1, 0.5)
    y = ops.convert_to_numpy(layer([h, f]))
    f = f / np.linalg.norm(f, axis=-1, keepdims=True)
    expected = h + 0.1 * (f - h)
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


declare(
    HypersphereNormalization,
    name="hypersphere",
    aliases=("ngpt",),
    title="Hypersphere normalization of weights",
    family="weight",
    paper="Loshchilov et al., 2024, arXiv:2410.01131",
    invariance="filter",
    oracle=oracle_of(kernel_of_paper),
    **rules(HypersphereNormalization),
    cases=(
        *CASES,
        Case(
            {
                "layer": keras.layers.Dense(3),
                "along": "outputs",
                "initial_scale": 0.05,
                "stored_scale": 0.5,
            },
            (4, 5),
        ),
    ),
    claims=CLAIMS,
    undecided=UNDECIDED,
    checks=(check_normalize_weights_keeps_outputs, check_residual),
)
