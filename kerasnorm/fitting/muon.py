"""The optimizer of distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from kerasnorm.flow.analysis import own_kernels
from kerasnorm.kernels.kernel import DEPTHWISE, Kernel
from kerasnorm.method.registry import Refusal
from kerasnorm.numerics import backend
from kerasnorm.numerics.backend import tensor
from rewriters import private


# Of the kernels' momentum; of Adam's average of squares, short as the training is.
MOMENTUM, BETA_2 = 0.95, 0.95
# Added to lengths that something is divided by.
EPSILON = 1e-7
# An odd polynomial of the singular values that brings those in (0, 1] near 1 when it is
# applied a few times. Jordan, 2024, chose it for the steepest slope at zero.
QUINTIC, TIMES = (3.4445, -4.7750, 2.0315), 5
# A kernel's length counts as no less than this share of that of orthonormal filters, so
# that one of zeros moves.
LEAST = 1e-2


class Muon(keras.optimizers.Adam):
    """Muon on the kernels of linear layers, in units of their length; Adam elsewhere.

    The momentum of a kernel, as a matrix `(fan_in, filters)`, is brought to the nearest
    orthogonal one, so that a step moves all directions alike, those with small
    gradients too, and each step is `learning_rate` times as long as the kernel. So the
    same rate suits kernels of any scale.

        m <- 0.95 m + g
        u <- orthogonal(g + 0.95 m)
        w <- w - learning_rate |w| u / |u|

    Papers: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon; Bernstein
    et al., 2020, https://arxiv.org/abs/2002.03432 (steps relative to the length).

    Args:
        model: the built model to train.
        learning_rate: a float or a schedule.
    """

    def __init__(self, model: Any, learning_rate: Any):
        super().__init__(learning_rate, beta_2=BETA_2, name="muon")
        self._known = {id(k.variable): k for k in _matrices(model)}

    def build(self, variables: Sequence[Any]) -> None:
        super().build(variables)
        known = self._known
        self._kernels = {
            i: known[id(v)] for i, v in enumerate(variables) if id(v) in known
        }

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        i = private.get_variable_index(self, variable)
        kernel = self._kernels.get(i)
        if kernel is None:
            super().update_step(gradient, variable, learning_rate)
            return
        slot, w = private.momentums(self)[i], tensor(variable)
        g = ops.cast(backend.value(gradient), w.dtype)
        m = MOMENTUM * tensor(slot) + g
        self.assign(slot, ops.cast(m, slot.dtype))
        u = orthogonal(kernel.columns(g + MOMENTUM * m))
        w = kernel.columns(w)
        length = ops.maximum(ops.norm(w), LEAST * w.shape[1] ** 0.5)
        rate = ops.cast(learning_rate, w.dtype) * length / (ops.norm(u) + EPSILON)
        step = kernel.from_columns(rate * u)
        self.assign_sub(variable, ops.cast(step, variable.dtype))


def orthogonal(m: Any) -> Any:
    """The matrix with the singular vectors of `m` and all singular values near 1
    (0.7 to 1.2), but for those below a thousandth of its length."""
    a, b, c = QUINTIC
    tall = m.shape[0] > m.shape[1]
    x = ops.transpose(m) if tall else m
    x = x / (ops.norm(x) + EPSILON)
    for _ in range(TIMES):
        square = ops.matmul(x, ops.transpose(x))
        x = a * x + ops.matmul(b * square + c * ops.matmul(square, square), x)
    return ops.transpose(x) if tall else x


def _matrices(model: Any) -> list[Kernel]:
    """The kernels of the model that multiply their inputs as matrices: not rows that
    are looked up, nor filters of one channel each."""
    return [
        kernel
        for layer in private.flatten_layers(model)
        if not isinstance(layer, (*DEPTHWISE, keras.layers.Embedding))
        and not isinstance(kernels := own_kernels(layer), Refusal)
        for kernel in kernels
        if kernel.name != "depthwise_kernel"
    ]
