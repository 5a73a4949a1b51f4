"""Stochastic whitening batch normalization."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.layers.batch import BatchNormalization
from kerasnorm.layers.decorrelated import largest_divisor
from kerasnorm.method import adoption, moving_statistics, oracles
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import moments


@keras.saving.register_keras_serializable("kerasnorm")
class StochasticWhiteningBatchNormalization(BatchNormalization):
    r"""Batch normalization, then a whitening matrix that is learned on the way forward.

    No eigenvectors and no matrix roots: the matrix takes one small step per batch
    toward whitening it, and is a constant to the gradient.

        h = (x - mean) / sqrt(var + epsilon),     S = mean(h h^T)
        E = W S W^T - I
        W <- symmetric(W - rate * D),  D = E W              criterion="kl"
                                       D = E W S / |E|_F    criterion="frobenius"
        y = gamma * W h + beta

    At inference with moving mean and variance, and W as it is.

    Paper: Zhang et al., 2021, https://arxiv.org/abs/2106.04413

    Args:
        criterion: `"frobenius"` (the more stable one) or `"kl"`. Default `"frobenius"`.
        rate: size of the step of W. Default 1e-5.
        group_size: channels that are whitened together, or the largest divisor of the
            channels below it; all of them where None. Default None.
        axis: integer, axis of the channels. Default -1.
        momentum: weight of the old moving statistics, 0 to 1. Default 0.95.
        epsilon: added to the variance. Default 1e-5.
        center, scale: whether to use `beta` and `gamma`.
        **kwargs: those of `BatchNormalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: batch statistics (True) or moving ones.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: unknown criterion.
    """

    surrogate_gradient = True

    def __init__(
        self,
        criterion="frobenius",
        rate=1e-5,
        group_size=None,
        axis=-1,
        momentum=0.95,
        epsilon=1e-5,
        center=True,
        scale=True,
        **kwargs,
    ):
        super().__init__(axis, momentum, epsilon, center, scale, **kwargs)
        if criterion not in ("frobenius", "kl"):
            raise KerasNormError(
                "unknown criterion", got=repr(criterion), expected="'frobenius' or 'kl'"
            )
        self.criterion = criterion
        self.rate = float(rate)
        self.group_size = group_size

    def build(self, input_shape):
        super().build(input_shape)
        channels = input_shape[self.axis]
        size = largest_divisor(channels, self.group_size or channels)
        groups = channels // size

        def identity(shape, dtype):
            return ops.tile(ops.eye(size, dtype=dtype)[None], (groups, 1, 1))

        self.whitening = self.channel_weight(
            "whitening",
            (groups, size, size),
            initializer=identity,
            trainable=False,
            dtype=self.statistics_dtype,
        )

    def normalize(self, x, mask, training):
        mean, variance = self.moving(x.dtype)
        matrix = ops.cast(self.whitening, x.dtype)
        learns = training and self.trainable
        if learns:
            old = mean, variance
            mean, variance = moments.moments(x, (0, 1), mask)
            seen = moments.seen(mask, x.dtype)
            self._update(old, mean[0, 0], variance[0, 0], seen)
        h = (x - mean) * moments.inverse_root(variance, self.epsilon)
        if mask is not None:
            h = ops.where(mask, h, ops.zeros((), x.dtype))
        if learns:
            matrix = self._step(ops.stop_gradient(h), matrix, mask)
            self.whitening.assign(matrix)
        y = moments.rotate(h, matrix)
        gamma, beta = self.affine(x.dtype)
        y = y if gamma is None else y * gamma
        y = y if beta is None else y + beta
        return moments.saturate(y, self.compute_dtype)

    def _step(self, h, w, mask):
        # h has mean 0 already, and its covariance is S.
        _, _, s = moments.covariance(h, w.shape[-1], mask)
        turned = ops.transpose(w, (0, 2, 1))
        error = ops.matmul(ops.matmul(w, s), turned) - ops.eye(
            w.shape[-1], dtype=w.dtype
        )
        step = ops.matmul(error, w)
        if self.criterion == "frobenius":
            norm = ops.sqrt(ops.sum(ops.square(error), (-1, -2), keepdims=True))
            step = ops.matmul(step, s) / ops.maximum(norm, moments.TINY)
        if mask is not None:
            step = step * ops.max(moments.seen(mask, w.dtype))
        w = w - self.rate * step
        return (w + ops.transpose(w, (0, 2, 1))) / 2


@oracles.flat
def oracle(x, keep, weights, config, training):
    mean, var = weights["moving_mean"], weights["moving_variance"]
    if training:
        mean, var = oracles.moments(x, keep, (0, 1))
    h = np.where(keep, (x - mean) / np.sqrt(var + config.get("epsilon", 1e-5)), 0.0)
    channels = x.shape[-1]
    size = largest_divisor(channels, config.get("group_size") or channels)
    y = np.empty_like(x)
    for g, w in enumerate(weights["whitening"]):
        part = slice(g * size, (g + 1) * size)
        rows = h[..., part][keep[..., part].all(-1)]
        if training:
            s = rows.T @ rows / len(rows)
            error = w @ s @ w.T - np.eye(size)
            if config.get("criterion", "frobenius") == "kl":
                step = error @ w
            else:
                step = error @ w @ s / np.linalg.norm(error)
            w = w - config.get("rate", 1e-5) * step
            w = (w + w.T) / 2
        y[..., part] = h[..., part] @ w.T
    return oracles.affine(y, weights)


def adopt(source, site, options):
    return moving_statistics.adopt_running(
        StochasticWhiteningBatchNormalization, source, site, options
    )


def check_converges_to_whitening():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(400, 4)) @ (np.eye(4) + 0.3)).astype("float32")
    for criterion, rate in (("kl", 0.1), ("frobenius", 0.03)):
        layer = StochasticWhiteningBatchNormalization(criterion, rate)
        before = np.corrcoef(x.T) - np.eye(4)
        for _ in range(150):
            y = layer(x, training=True)
        after = np.cov(ops.convert_to_numpy(y).T, bias=True) - np.eye(4)
        if not np.abs(after).max() < 0.5 * np.abs(before).max():
            raise AssertionError(f"{criterion}: {after}")


def check_gradient_takes_the_matrix_as_constant():
    from kerasnorm.numerics import backend

    x, upstream = np.random.default_rng(0).normal(2, 3, (2, 8, 3)).astype("float32")
    layer = StochasticWhiteningBatchNormalization(epsilon=1e-3)
    layer.build(x.shape)
    results = [
        backend.vjp(lambda v, f=f: f(v, training=True), [x], upstream)[1][0]
        for f in (layer, keras.layers.BatchNormalization())
    ]
    # W is 1e-5 away from I after a step.
    np.testing.assert_allclose(*map(ops.convert_to_numpy, results), atol=1e-3)


declare(
    StochasticWhiteningBatchNormalization,
    name="stochastic_whitening",
    title="Stochastic whitening batch normalization",
    aliases=("swbn",),
    family="batch",
    paper="Zhang et al., 2021, arXiv:2106.04413",
    invariance="filter",
    oracle=oracle,
    reads={
        StochasticWhiteningBatchNormalization: adoption.reader(
            "stochastic_whitening", "momentum"
        )
    },
    adopt=adopt,
    carry=moving_statistics.carry_running,
    cases=(
        Case({"rate": 0.01}, (16, 4)),
        Case(
            {"criterion": "kl", "group_size": 2, "rate": 0.01}, (5, 7, 4), masked=True
        ),
        Case({"center": False, "axis": 1}, (4, 3, 5, 6)),
        Case({"group_size": 3, "scale": False}, (3, 2, 4, 3, 6)),
    ),
    claims={"zero_output_mean", "gradient_orthogonal_to_input"},
    # The whitening matrix moves between two calls.
    undecided={
        "scale_invariant",
        "channel_scale_invariant",
        "shift_invariant",
        "sign_equivariant",
        "weight_scale_invariant",
    },
    checks=(
        check_converges_to_whitening,
        check_gradient_takes_the_matrix_as_constant,
    ),
)
