"""Spectral normalization."""

from __future__ import annotations

import math
from typing import ClassVar

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError, count
from kerasnorm.kernels.kernel import CONVOLUTIONS, DEPTHWISE, convolve
from kerasnorm.kernels.reparametrized import (
    CASES,
    CLAIMS,
    UNDECIDED,
    Reparametrized,
    oracle_of,
)
from kerasnorm.kernels.wrapping import rules
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import backend, moments


# Power iterations that start the state of a trained kernel; each costs two products.
SETTLE = 30


@keras.saving.register_keras_serializable("kerasnorm")
class SpectralNormalization(Reparametrized):
    r"""Divides each kernel by its largest singular value: a Lipschitz constant of 1.

        w = v / sigma(v),    sigma = ||v u||,    u <- v^T v u / ||v^T v u||

    One power iteration in each training step follows `u` (a state, saved); inference
    uses it as it is. The kernel itself is never overwritten, and gradients go through
    `sigma`, with `u` a constant, as in the paper. `v` is seen as `(fan_in, filters)`,
    which for a convolution bounds, but is not, the norm of the operator;
    `norm="convolution"` takes that of the convolution itself, on the size of input it
    was built with.

    Keras's layer of this name writes `v / sigma` into the kernel in each step, has no
    gradient through `sigma`, and does nothing at inference.

    Paper: Miyato et al., 2018, https://arxiv.org/abs/1802.05957; of the convolution:
    Sedghi, Gupta and Long, 2019, https://arxiv.org/abs/1805.10408

    Args:
        layer: the layer to wrap, built or not.
        power_iterations: in each training step. Defaults to 1.
        norm: `"matrix"`, or `"convolution"` for a convolution or depthwise one whose
            input has static sizes.
        scale: whether to learn one factor `g` per kernel, the singular value of `w`; it
            starts at 1, and at `sigma` of a trained kernel.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        Those of the wrapped layer.

    Raises:
        KerasNormError: the layer has no kernel, or no such norm.
    """

    preserving: ClassVar = {"scale": True}
    # In training `u` follows from `v`, and counts as a constant.
    surrogate_gradient = True

    def __init__(
        self,
        layer,
        power_iterations: int = 1,
        norm: str = "matrix",
        scale: bool = False,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        if norm not in ("matrix", "convolution"):
            raise KerasNormError(
                "spectral normalization knows no such norm",
                got=f"norm={norm!r}",
                expected="'matrix' or 'convolution'",
            )
        kinds = (*CONVOLUTIONS, *DEPTHWISE)
        if norm == "convolution" and not isinstance(layer, kinds):
            raise KerasNormError(
                "only a convolution has the norm of one",
                got=f"{type(layer).__name__} {layer.name!r}",
                expected="Conv1D to Conv3D, or a depthwise convolution",
                fix="Leave `norm` at 'matrix', or leave this layer out with `where`.",
            )
        self.power_iterations = count("power_iterations", power_iterations)
        self.norm = norm
        self.scale = scale

    def kernel(self, v, u, g=1.0):
        return v * self.factor(v, u, g)

    def factor(self, v, u, g=1.0):
        """What the kernel is multiplied by, one number."""
        if self.norm == "matrix":
            return g * backend.custom_gradient(_inverse_norm)(v, u)
        square = ops.sum(ops.square(self.apply(v, u)))
        return g * moments.inverse_root(square, 0.0)

    def call(self, *args, training=None, **kwargs):
        if not self._fewer_inputs(args):
            return super().call(*args, training=training, **kwargs)
        # One number can as well multiply the inputs, where they are fewer.
        v, values = self.values(self.kernels[0], bool(training))
        x = ops.cast(args[0], v.dtype) * self.factor(v, **values)
        x = ops.cast(x, self.layer.compute_dtype)
        return self.run({}, (x,), kwargs, training)

    def _fewer_inputs(self, args) -> bool:
        """Whether the layer is linear in inputs of known size, less than its kernel."""
        kinds = (keras.layers.Dense, *CONVOLUTIONS, *DEPTHWISE)
        if not isinstance(self.layer, kinds) or len(args) != 1:
            return False
        shape = args[0].shape
        return None not in shape and math.prod(shape) < math.prod(self.v.shape)

    def initial(self, v):
        return {"g": ops.ones((), v.dtype)} if self.scale else {}

    def state(self, v):
        shape = (v.shape[1], 1)
        if self.norm == "convolution":
            shape = (1, *self._input_shape()[1:])
        u = np.random.default_rng(0).normal(size=shape)
        return {"u": ops.convert_to_tensor(u / np.linalg.norm(u), v.dtype)}

    def update(self, v, u, **_):
        for _ in range(self.power_iterations):
            u = self.apply(v, self.apply(v, u), u)
            u = u * moments.inverse_root(ops.sum(ops.square(u)), 0.0)
        return {"u": u}

    def apply(self, v, u, like=None):
        """The operator on `u`; where `like` is given, its transpose, which gives
        something of that shape."""
        if self.norm == "matrix":
            if like is None:
                return ops.matmul(v, u)
            # XLA would write the transposed kernel out.
            return ops.transpose(ops.matmul(ops.transpose(u), v))
        if like is None:
            return self._convolve(v, u)
        return backend.vjp(lambda x: self._convolve(v, x), [like], u)[1][0]

    def _convolve(self, v, x):
        return convolve(self.layer, x, self.kernels[0].from_columns(v))

    def _input_shape(self):
        shape = tuple(self.layer.get_build_config()["input_shape"])
        if None in shape[1:]:
            raise KerasNormError(
                "the norm of a convolution depends on the size of its input",
                got=f"input shape {shape}",
                expected="static sizes",
                fix="Leave `norm` at 'matrix'.",
            )
        return shape

    def absorb(self, v, w):
        u = self.state(w)["u"]
        for _ in range(SETTLE):
            u = self.update(w, u)["u"]
        sigma = ops.sqrt(ops.sum(ops.square(self.apply(w, u))))
        return {"v": w, "u": u, **({"g": sigma} if self.scale else {})}


def _inverse_norm(v, u):
    """`1 / ||v u||`, and its gradients, `u` being a constant."""
    left = ops.matmul(v, u)
    inverse = moments.inverse_root(ops.sum(ops.square(left)), 0.0)

    def backward(d):
        # As a product of matrices it takes half as long again.
        left_slope = left * (-d * inverse * inverse * inverse)
        return left_slope * ops.transpose(u), ops.zeros_like(u)

    return inverse, backward


def kernel_of_paper(v, weights, config, training):
    u = weights["u"]
    if training:
        for _ in range(config.get("power_iterations", 1)):
            left = v @ u / np.linalg.norm(v @ u)
            u = v.T @ left / np.linalg.norm(v.T @ left)
    return weights.get("g", 1.0) * v / np.linalg.norm(v @ u)


def check_converges_to_the_largest_singular_value():
    layer = SpectralNormalization(keras.layers.Dense(4), power_iterations=3)
    layer.build((None, 6))
    before = ops.convert_to_numpy(layer.v).copy()
    for _ in range(50):
        layer(np.ones((1, 6), "float32"), training=True)
    w = ops.convert_to_numpy(layer.weight())
    np.testing.assert_allclose(np.linalg.norm(w, 2), 1, rtol=1e-4)
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.v), before)


def check_gradient_of_the_paper():
    with backend.double_precision():
        dense = keras.layers.Dense(4, use_bias=False, dtype="float64")
        layer = SpectralNormalization(dense, dtype="float64")
        layer.build((None, 6))
        rng = np.random.default_rng(0)
        x, dy = rng.normal(size=(5, 6)), rng.normal(size=(5, 4))
        v, u = (ops.convert_to_numpy(a) for a in (layer.v, layer.u))
        others = [a.value for a in layer.non_trainable_variables]

        def call(v):
            return layer.stateless_call([v], others, x, training=True)[0]

        _, (dv,) = backend.vjp(call, [v], ops.convert_to_tensor(dy))
        u = v.T @ v @ u
        u /= np.linalg.norm(u)
        sigma = np.linalg.norm(v @ u)
        dw = x.T @ dy
        expected = (dw - np.sum(dw * v / sigma) * (v @ u / sigma) @ u.T) / sigma
        np.testing.assert_allclose(ops.convert_to_numpy(dv), expected, rtol=1e-9)


def check_norm_of_a_convolution():
    for conv in (
        keras.layers.Conv2D(2, 3, padding="same", use_bias=False),
        keras.layers.Conv1D(2, 3, padding="causal", use_bias=False),
        keras.layers.DepthwiseConv2D(3, strides=2, use_bias=False),
    ):
        shape = (5, 3) if isinstance(conv, keras.layers.Conv1D) else (5, 5, 3)
        layer = SpectralNormalization(conv, norm="convolution", power_iterations=20)
        layer.build((None, *shape))
        for _ in range(10):
            layer(np.ones((1, *shape), "float32"), training=True)
        # The whole operator as a matrix: its outputs on every unit input.
        unit = np.eye(int(np.prod(shape)), dtype="float32").reshape(-1, *shape)
        matrix = ops.convert_to_numpy(layer(unit, training=False)).reshape(
            len(unit), -1
        )
        np.testing.assert_allclose(np.linalg.norm(matrix, 2), 1, rtol=1e-3)


declare(
    SpectralNormalization,
    name="spectral",
    aliases=("sn",),
    family="weight",
    paper="Miyato et al., 2018, arXiv:1802.05957",
    invariance="layer",
    oracle=oracle_of(kernel_of_paper),
    **rules(SpectralNormalization),
    cases=(
        *CASES,
        Case({"layer": keras.layers.Dense(3), "power_iterations": 2}, (4, 5)),
        Case({"layer": keras.layers.Dense(3), "scale": True}, (4, 5)),
    ),
    claims=CLAIMS - {"train_equals_inference"},  # until u has settled
    undecided=UNDECIDED,
    checks=(
        check_converges_to_the_largest_singular_value,
        check_gradient_of_the_paper,
        check_norm_of_a_convolution,
    ),
)
