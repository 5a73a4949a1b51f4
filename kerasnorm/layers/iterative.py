"""Iterative batch whitening."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import count
from kerasnorm.layers import decorrelated
from kerasnorm.layers.decorrelated import DecorrelatedBatchNormalization
from kerasnorm.method import adoption, moving_statistics
from kerasnorm.method.registry import Case, declare


@keras.saving.register_keras_serializable("kerasnorm")
class IterativeNormalization(DecorrelatedBatchNormalization):
    r"""Whitens groups of channels by a few Newton iterations.

    No eigenvectors: products of matrices alone, fast on any device. Stopped early, it
    whitens the directions of large variance and leaves the small ones small, which
    keeps their noise from being blown up.

        S = covariance + epsilon * I,      P = I
        iterations times:  P = 1.5 P - 0.5 P^3 S / trace(S)
        y = gamma * P / sqrt(trace(S)) (x - mean) + beta

    Moving statistics as in `DecorrelatedBatchNormalization`.

    Paper: Huang et al., 2019, https://arxiv.org/abs/1904.03441

    Args:
        iterations: number of Newton iterations. Default 5.
        group_size: channels that are whitened together; the largest divisor of the
            channels up to it is used. Default 64.
        **kwargs: those of `DecorrelatedBatchNormalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: batch statistics (True) or moving ones.
        mask: boolean, the leading axes of the input; masked positions do not count.
    """

    def __init__(
        self,
        iterations=5,
        group_size=64,
        axis=-1,
        momentum=0.9,
        epsilon=1e-5,
        center=True,
        scale=True,
        **kwargs,
    ):
        super().__init__(group_size, axis, momentum, epsilon, center, scale, **kwargs)
        self.iterations = count("iterations", iterations)

    def whitening(self, sigma):
        unit = ops.eye(sigma.shape[-1], dtype=sigma.dtype)
        sigma = sigma + self.epsilon * unit
        trace = ops.sum(sigma * unit, (-1, -2), keepdims=True)
        sigma, p = sigma / trace, ops.broadcast_to(unit, ops.shape(sigma))
        for _ in range(self.iterations):
            cube = ops.matmul(ops.matmul(p, p), p)
            p = 1.5 * p - 0.5 * ops.matmul(cube, sigma)
        return p * ops.rsqrt(trace)


def oracle(x, weights, config, training, mask):
    def whitening(sigma):
        # P is a polynomial in S, so it shares its eigenvectors.
        values, vectors = np.linalg.eigh(sigma)
        values = values + config.get("epsilon", 1e-5)
        p, share = np.ones_like(values), values / values.sum()
        for _ in range(config.get("iterations", 5)):
            p = (3 * p - p**3 * share) / 2
        return (vectors * p) @ vectors.T / np.sqrt(values.sum())

    @decorrelated.oracles.flat
    def inner(x, keep, weights, config, training):
        return decorrelated.whiten(x, keep, weights, config, training, 64, whitening)

    return inner(x, weights, config, training, mask)


def adopt(source, site, options):
    note = "channels are decorrelated once training begins"
    note = note if moving_statistics.is_running(source) else ""
    return moving_statistics.adopt_running(
        IterativeNormalization, source, site, options, note=note
    )


def check_many_iterations_whiten():
    rng = np.random.default_rng(0)
    # Variances 1 to 9; far too many iterations would let rounding grow.
    x = (rng.normal(size=(500, 4)) * [1, 2, 2, 3] + 3).astype("float32")
    layer = IterativeNormalization(iterations=9, epsilon=1e-8)
    y = ops.convert_to_numpy(layer(x, training=True))
    np.testing.assert_allclose(np.cov(y.T, bias=True), np.eye(4), atol=1e-3)


declare(
    IterativeNormalization,
    name="iterative",
    aliases=("itern", "iternorm"),
    family="batch",
    paper="Huang et al., 2019, arXiv:1904.03441",
    invariance="group",
    oracle=oracle,
    reads={IterativeNormalization: adoption.reader("iterative", "momentum")},
    adopt=adopt,
    carry=decorrelated.carry,
    cases=(
        Case({"epsilon": 1e-3}, (32, 4)),
        Case({"group_size": 2}, (6, 7, 4), masked=True),
        Case({"center": False, "axis": 1, "iterations": 3}, (4, 3, 5, 6)),
        Case({"group_size": 3, "scale": False}, (3, 2, 4, 3, 6)),
    ),
    claims=decorrelated.CLAIMS - {"unit_output_scale", "idempotent"},
    checks=(check_many_iterations_whiten,),
)
