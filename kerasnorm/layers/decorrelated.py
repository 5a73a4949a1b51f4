"""Decorrelated batch normalization."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import count
from kerasnorm.method import adoption, moving_statistics, oracles
from kerasnorm.method.normalization import BatchStatistics
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import moments


@keras.saving.register_keras_serializable("kerasnorm")
class DecorrelatedBatchNormalization(BatchStatistics):
    r"""Whitens groups of channels: unit variance and no correlation.

        S = mean((x - mean) (x - mean)^T) + epsilon * I       over batch and positions
        training:   y = gamma * S^(-1/2) (x - mean) + beta
        inference:  the same with moving_mean and moving_whitening

    The root is the symmetric one (ZCA), which turns the channels least. The moving
    average is that of the covariance, which a degenerate batch does not spoil;
    `moving_whitening` follows from it at every step. Each group wants many more
    samples times positions than it has channels.

    Papers: Huang et al., 2018, https://arxiv.org/abs/1804.08450; moving covariance:
    Huang et al., 2020, https://arxiv.org/abs/2003.12327

    Args:
        group_size: channels that are whitened together; the largest divisor of the
            channels up to it is used. Default 32.
        axis: integer, axis of the channels. Default -1.
        momentum: weight of the old moving statistics, 0 to 1. Default 0.9.
        epsilon: added to the eigenvalues of the covariance. Default 1e-5.
        center, scale: whether to use `beta` and `gamma`.
        **kwargs: `synchronized`, see `kerasnorm.BatchStatistics`; and those of
            `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: batch statistics (True) or moving ones.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: `group_size` is not a positive integer.
    """

    def __init__(
        self,
        group_size=32,
        axis=-1,
        momentum=0.9,
        epsilon=1e-5,
        center=True,
        scale=True,
        **kwargs,
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        self.group_size = count("group_size", group_size)
        self.momentum = float(momentum)

    def build(self, input_shape):
        super().build(input_shape)
        channels = input_shape[self.axis]
        size = largest_divisor(channels, self.group_size)
        groups = channels // size

        def identity(shape, dtype):
            return ops.tile(ops.eye(size, dtype=dtype)[None], (groups, 1, 1))

        frozen = {"trainable": False, "dtype": self.statistics_dtype}
        self.moving_mean = self.channel_weight(
            "moving_mean", (channels,), initializer="zeros", **frozen
        )
        frozen |= {"shape": (groups, size, size), "initializer": identity}
        self.moving_covariance = self.channel_weight("moving_covariance", **frozen)
        self.moving_whitening = self.channel_weight("moving_whitening", **frozen)

    def normalize(self, x, mask, training):
        if training and self.trainable:
            size = self.moving_whitening.shape[-1]
            mean, centred, sigma = moments.covariance(x, size, mask)
            rate = (1 - self.momentum) * moments.seen(mask, x.dtype)
            old = ops.cast(self.moving_mean, x.dtype)
            self.moving_mean.assign(old + (mean[0, 0] - old) * rate)
            rate = rate if mask is None else ops.max(rate)
            old = ops.cast(self.moving_covariance, x.dtype)
            moving = ops.stop_gradient(old + (sigma - old) * rate)
            self.moving_covariance.assign(moving)
            groups = sigma.shape[0]
            both = self.whitening(ops.concatenate([sigma, moving]))
            matrix = both[:groups]
            self.moving_whitening.assign(ops.stop_gradient(both[groups:]))
        else:
            centred = x - ops.cast(self.moving_mean, x.dtype)
            matrix = ops.cast(self.moving_whitening, x.dtype)
            if mask is not None:
                centred = ops.where(mask, centred, ops.zeros((), x.dtype))
        y = moments.rotate(centred, matrix)
        gamma, beta = self.affine(x.dtype)
        y = y if gamma is None else y * gamma
        y = y if beta is None else y + beta
        return moments.saturate(y, self.compute_dtype)

    def whitening(self, sigma):
        """Whitening matrices of covariances, `(groups, size, size)`."""
        diagonal = self.epsilon * ops.eye(sigma.shape[-1], dtype=sigma.dtype)
        return moments.inverse_root_matrix(sigma + diagonal, self.epsilon)


def largest_divisor(channels: int, most: int) -> int:
    """The largest divisor of `channels` up to `most`."""
    return max(d for d in range(1, min(channels, most) + 1) if channels % d == 0)


def whiten(x, keep, weights, config, training, most, whitening):
    """The oracle of whitening in groups, with `whitening` of one covariance."""
    size = largest_divisor(x.shape[-1], config.get("group_size", most))
    y = np.empty_like(x)
    for g in range(x.shape[-1] // size):
        part = slice(g * size, (g + 1) * size)
        mean, matrix = weights["moving_mean"][part], weights["moving_whitening"][g]
        if training:
            rows = x[..., part][keep[..., part].all(-1)]
            mean = rows.mean(0)
            matrix = whitening(np.cov(rows.T, bias=True).reshape(size, size))
        y[..., part] = (x[..., part] - mean) @ matrix.T
    # The layer leaves beta at masked positions; what stands there is not read.
    return oracles.affine(np.where(keep, y, 0.0), weights)


@oracles.flat
def oracle(x, keep, weights, config, training):
    def whitening(sigma):
        values, vectors = np.linalg.eigh(sigma)
        values = values + config.get("epsilon", 1e-5)
        return vectors @ np.diag(values**-0.5) @ vectors.T

    return whiten(x, keep, weights, config, training, 32, whitening)


def adopt(source, site, options):
    note = "channels are decorrelated once training begins"
    note = note if moving_statistics.is_running(source) else ""
    return moving_statistics.adopt_running(
        DecorrelatedBatchNormalization, source, site, options, note=note
    )


def carry(source, layers):
    """Whitening matrices that divide by the standard deviations."""
    adoption.carry_affine(source, layers)
    for _, new in layers.values():
        if not moving_statistics.is_running(source):
            continue
        mean, variance = moving_statistics.statistics(source, 0.0)
        adoption.assign(new.moving_mean, mean)
        shape = new.moving_whitening.shape[:2]
        variance = variance.reshape(shape)[..., None] * np.eye(shape[1])
        unit = np.eye(shape[1])
        adoption.assign(new.moving_covariance, variance - new.epsilon * unit)
        root = np.sqrt(variance + (1 - unit)) * unit
        adoption.assign(
            new.moving_whitening, np.divide(unit, root, where=root > 0, out=root)
        )


def check_output_is_white():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + 3
    layer = DecorrelatedBatchNormalization(group_size=3, epsilon=1e-8)
    y = ops.convert_to_numpy(layer(x.astype("float32"), training=True))
    for part in (y[:, :3], y[:, 3:]):
        np.testing.assert_allclose(np.cov(part.T, bias=True), np.eye(3), atol=1e-3)


def check_gradient_where_eigenvalues_meet():
    from kerasnorm.numerics import backend

    x = np.vstack([np.eye(4), -np.eye(4)]).astype("float32")
    layer = DecorrelatedBatchNormalization()
    layer.build(x.shape)
    upstream = ops.convert_to_tensor(np.arange(32.0).reshape(8, 4).astype("float32"))
    _, (dx,) = backend.vjp(lambda v: layer(v, training=True), [x], upstream)
    if not np.isfinite(ops.convert_to_numpy(dx)).all():
        raise AssertionError("the gradient is not finite")


CLAIMS = {
    "scale_invariant",
    "shift_invariant",
    "sign_equivariant",
    "unit_output_scale",
    "zero_output_mean",
    "idempotent",
    "weight_scale_invariant",
    "gradient_orthogonal_to_input",
}

declare(
    DecorrelatedBatchNormalization,
    name="decorrelated",
    title="Decorrelated batch normalization",
    aliases=("dbn", "zca"),
    family="batch",
    paper="Huang et al., 2018, arXiv:1804.08450",
    invariance="group",
    oracle=oracle,
    reads={DecorrelatedBatchNormalization: adoption.reader("decorrelated", "momentum")},
    adopt=adopt,
    carry=carry,
    cases=(
        Case({"epsilon": 1e-3}, (32, 4)),
        Case({"group_size": 2}, (6, 7, 4), masked=True),
        Case({"center": False, "axis": 1}, (4, 3, 5, 6)),
        Case({"group_size": 3, "scale": False}, (3, 2, 4, 3, 6)),
    ),
    claims=CLAIMS,
    checks=(check_output_is_white, check_gradient_where_eigenvalues_meet),
)
