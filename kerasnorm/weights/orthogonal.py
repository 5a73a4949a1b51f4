"""Orthogonal weight normalization."""

from __future__ import annotations

from typing import ClassVar

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.kernels.reparametrized import (
    CASES,
    CLAIMS,
    UNDECIDED,
    Reparametrized,
    centred,
    oracle_of,
)
from kerasnorm.kernels.wrapping import rules
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import backend


@keras.saving.register_keras_serializable("kerasnorm")
class OrthogonalWeightNormalization(Reparametrized):
    r"""Makes the filters of each group orthonormal: a point on a Stiefel manifold.

        W = gain * (Vc Vc^T)^{-1/2} Vc,     Vc = V - mean of each row

    with a group's filters as the rows of `V`: of all orthonormal matrices, the one
    nearest to `Vc`. Centred filters span no more than `fan_in - 1` dimensions, which
    bounds the group.

    Paper: Huang et al., 2018, https://arxiv.org/abs/1709.06079

    Args:
        layer: the layer to wrap, built or not.
        group_size: filters in a group; divides the filters of each kernel, and is
            below its fan-in. None takes the largest such number.
        gain: factor on all filters, for rectifiers sqrt(2). Defaults to 1.414.
        scale: whether to learn a factor `g` per filter, which starts at 1.
        epsilon: added to the eigenvalues, relative to their mean. Defaults to 1e-7.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        Those of the wrapped layer.

    Raises:
        KerasNormError: the layer has no kernel, or no such groups.
    """

    preserving: ClassVar = {"scale": True}

    def __init__(
        self,
        layer,
        group_size: int | None = None,
        gain: float = 1.414,
        scale: bool = False,
        epsilon: float = 1e-7,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.group_size = group_size
        self.gain = float(gain)
        self.scale = scale
        self.epsilon = float(epsilon)

    def kernel(self, v, g=1.0):
        fan_in, filters = v.shape
        size = self._size(fan_in, filters)
        rows = ops.reshape(ops.transpose(centred(v)), (filters // size, size, fan_in))
        gram = ops.matmul(rows, ops.transpose(rows, (0, 2, 1)))
        trace = ops.sum(ops.square(rows), (1, 2), keepdims=True)
        gram = gram + ops.eye(size, dtype=v.dtype) * (trace * self.epsilon / size)
        w = ops.matmul(inverse_square_root(gram), rows)
        return ops.transpose(ops.reshape(w, (filters, fan_in))) * (g * self.gain)

    def initial(self, v):
        return {"g": ops.ones_like(v[0])} if self.scale else {}

    def absorb(self, v, w):
        if not self.scale:
            return {"v": w}
        return {"v": w, "g": ops.sqrt(ops.sum(ops.square(centred(w)), 0)) / self.gain}

    def build(self, *args, **kwargs):
        super().build(*args, **kwargs)
        for kernel in self.kernels:
            self._size(*kernel.view_shape())

    def _size(self, fan_in, filters):
        if self.group_size is None:
            divisors = [k for k in range(1, filters + 1) if filters % k == 0]
            fitting = [k for k in divisors if k < fan_in]
            if fitting:
                return fitting[-1]
        elif filters % self.group_size == 0 and 0 < self.group_size < fan_in:
            return self.group_size
        raise KerasNormError(
            f"{self.name!r} has no groups of filters to make orthogonal",
            got=f"group_size={self.group_size}, {filters} filters of {fan_in} weights",
            expected="a divisor of the filters that is less than the weights of each",
        )


def inverse_square_root(matrix):
    """`S^{-1/2}` of symmetric positive matrices, with the gradient that stays finite
    where eigenvalues coincide."""

    def forward(s):
        values, q = ops.linalg.eigh(s)
        roots = ops.sqrt(ops.maximum(values, 1e-30))
        transposed = ops.swapaxes(q, -1, -2)

        def backward(dy):
            # (f(a) - f(b)) / (a - b) for f = 1 / sqrt, without the difference.
            a, b = ops.expand_dims(roots, -1), ops.expand_dims(roots, -2)
            slope = -1.0 / (a * b * (a + b))
            inner = ops.matmul(ops.matmul(transposed, dy), q)
            return (ops.matmul(ops.matmul(q, inner * slope), transposed),)

        y = ops.matmul(q / ops.expand_dims(roots, -2), transposed)
        return y, backward

    return backend.custom_gradient(forward)(matrix)


def kernel_of_paper(v, weights, config, training):
    size = config.get("group_size") or v.shape[1]
    groups = []
    for start in range(0, v.shape[1], size):
        rows = v[:, start : start + size].T
        rows = rows - rows.mean(1, keepdims=True)
        # The polar factor, by another way than the paper's eigenvectors.
        left, _, right = np.linalg.svd(rows, full_matrices=False)
        groups.append((left @ right).T)
    return 1.414 * weights.get("g", 1.0) * np.concatenate(groups, 1)


def check_filters_are_orthonormal():
    layer = OrthogonalWeightNormalization(keras.layers.Conv2D(8, 3), 4, gain=1.0)
    layer.build((None, 6, 6, 3))
    w = ops.convert_to_numpy(layer.weight()).reshape(-1, 2, 4)
    for group in (w[:, 0], w[:, 1]):
        np.testing.assert_allclose(group.T @ group, np.eye(4), atol=1e-5)
    with np.testing.assert_raises_regex(KerasNormError, "no groups of filters"):
        OrthogonalWeightNormalization(keras.layers.Dense(4), 4).build((None, 4))


# Without the small ridge, so that the oracle's exact polar factor is the same.
EXACT = {"epsilon": 1e-14}

declare(
    OrthogonalWeightNormalization,
    name="orthogonal_weight",
    aliases=("own",),
    title="Orthogonal weight normalization",
    family="weight",
    paper="Huang et al., 2018, arXiv:1709.06079",
    invariance="group",  # of all filters of a group together
    oracle=oracle_of(kernel_of_paper),
    **rules(OrthogonalWeightNormalization),
    cases=(
        *(
            Case({**case.config, **EXACT}, case.shape)
            for case in CASES
            if case.shape != (2, 7, 3)
        ),
        Case({"layer": keras.layers.Dense(4), "group_size": 2, **EXACT}, (2, 7, 4)),
        Case({"layer": keras.layers.Dense(2), "scale": True, **EXACT}, (2, 7, 5)),
    ),
    claims=CLAIMS | {"shift_invariant"},
    undecided=UNDECIDED,
    checks=(check_filters_are_orthonormal,),
)
