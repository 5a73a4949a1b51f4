"""Lp batch normalization."""

from __future__ import annotations

import dataclasses
import math

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.method import adoption, moving_statistics, oracles
from kerasnorm.method.normalization import BatchStatistics
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import backend, moments, replicas


@keras.saving.register_keras_serializable("kerasnorm")
class LpBatchNormalization(BatchStatistics):
    r"""Batch normalization with another norm in the place of the standard deviation.

        s = (mean(|x - mean(x)|**p) / c)**(1 / p)
        training:   y = gamma * (x - mean(x)) / (s + epsilon) + beta
        inference:  the same with moving_mean and moving_scale

    With `gaussian_correction`, `c = E|z|**p` of a standard normal z, so that s is the
    standard deviation of Gaussian inputs for every p; otherwise `c = 1`. At `p = 1`
    nothing is squared, which suits low precision (see `L1BatchNormalization`); large p
    follow the largest activation.

    Papers: Hoffer et al., 2018, https://arxiv.org/abs/1803.01814; Liao, Kawaguchi and
    Poggio, 2016, https://arxiv.org/abs/1610.06160

    Args:
        p: the norm, a finite number, at least 1. Default 2.
        gaussian_correction: see above. Default True.
        axis: integer, axis of the channels. Default -1.
        momentum: weight of the old moving statistics, 0 to 1. Default 0.99.
        epsilon: added to s, and so of its unit. Default 1e-5.
        center, scale: whether to use `beta` and `gamma`.
        **kwargs: `synchronized`, see `kerasnorm.BatchStatistics`; and those of
            `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: batch statistics (True) or moving ones.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: p is below 1 or not finite.
    """

    def __init__(
        self,
        p=2.0,
        gaussian_correction=True,
        axis=-1,
        momentum=0.99,
        epsilon=1e-5,
        center=True,
        scale=True,
        **kwargs,
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        if not 1 <= p < math.inf:
            raise KerasNormError(
                "not the p of a norm", got=f"p={p!r}", expected="a number, at least 1"
            )
        self.p = float(p)
        self.gaussian_correction = gaussian_correction
        self.momentum = float(momentum)

    def build(self, input_shape):
        super().build(input_shape)
        shape = (input_shape[self.axis],)
        frozen = {"trainable": False, "dtype": self.statistics_dtype}
        self.moving_mean = self.channel_weight(
            "moving_mean", shape, initializer="zeros", **frozen
        )
        self.moving_scale = self.channel_weight(
            "moving_scale", shape, initializer="ones", **frozen
        )

    def statistics(self, x, mask, training):
        mean = ops.cast(self.moving_mean, x.dtype)
        scale = ops.cast(self.moving_scale, x.dtype)
        if training and self.trainable:
            old = mean, scale
            mean, scale = self.batch_statistics(x, mask)
            rate = (1 - self.momentum) * moments.seen(mask, x.dtype)
            self.moving_mean.assign(old[0] + (mean[0, 0] - old[0]) * rate)
            self.moving_scale.assign(old[1] + (scale[0, 0] - old[1]) * rate)
        return mean, 1 / ops.maximum(scale + self.epsilon, moments.TINY)

    def batch_statistics(self, x, mask):
        """Mean and s of the batch, `(1, 1, channels)`."""
        mean, variance = moments.moments(x, (0, 1), mask)
        deviation = ops.abs(x - mean)
        if mask is not None:
            deviation = ops.where(mask, deviation, ops.zeros((), x.dtype))
        # In a unit whose p-th power is finite; s does not depend on it.
        unit = ops.stop_gradient(self._unit(deviation, variance))
        flat = unit == 0
        unit = ops.where(flat, ops.ones_like(unit), unit)
        deviation = deviation / unit
        power = ops.power(deviation, self.p) if self.p != 1 else deviation
        average, _ = moments.moments(power, (0, 1), mask)
        # Where all are equal, s = 0 with gradient 0.
        average = ops.where(flat, ops.ones_like(average), average)
        s = unit * ops.power(average / self.correction, 1 / self.p)
        return mean, ops.where(flat, ops.zeros_like(s), s)

    def _unit(self, deviation, variance):
        """The largest. Where it would take a reading of its own the standard deviation,
        unless p is large: of n elements none lies further away than sqrt(n) of it."""
        if self.p <= 8 and backend.reads_once():
            return ops.sqrt(variance)
        largest = ops.max(deviation, (0, 1), keepdims=True)
        if replicas.together():
            everywhere, _ = replicas.gather(largest)
            largest = ops.max(everywhere, 0, keepdims=True)
        return largest

    @property
    def correction(self) -> float:
        """E|z|**p of a standard normal z, or 1."""
        if not self.gaussian_correction:
            return 1.0
        return 2 ** (self.p / 2) * math.gamma((self.p + 1) / 2) / math.sqrt(math.pi)


@oracles.flat
def oracle(x, keep, weights, config, training):
    p = config.get("p", 2)
    mean, scale = weights["moving_mean"], weights["moving_scale"]
    if training:
        mean, _ = oracles.moments(x, keep, (0, 1))
        scale, _ = oracles.moments(np.abs(x - mean) ** p, keep, (0, 1))
        if config.get("gaussian_correction", True):
            # E|z|**p of a standard normal z, by quadrature in t with z = t**4.
            t, weight = np.polynomial.legendre.leggauss(200)
            t = 1.3 * (t + 1)
            density = np.exp(-(t**8) / 2) / np.sqrt(2 * np.pi) * 4 * t**3 * 1.3
            scale = scale / (2 * np.sum(weight * t ** (4 * p) * density))
        scale = scale ** (1 / p)
    return oracles.affine((x - mean) / (scale + config.get("epsilon", 1e-5)), weights)


def describe(layer, method):
    """The layer as a batch normalization, whose variance is `(s + epsilon)**2`."""
    source = adoption.describe(layer, method, "momentum", mean="moving_mean")
    if "mean" not in source.weights:
        return source
    s = ops.convert_to_numpy(layer.moving_scale).astype("float64") + layer.epsilon
    weights = {**source.weights, "variance": s**2 - layer.epsilon}
    return dataclasses.replace(source, weights=weights)


def read_own(layer):
    return describe(layer, "lp")


def adopt(source, site, options):
    return moving_statistics.adopt_running(LpBatchNormalization, source, site, options)


def carry(source, layers):
    """Moving statistics for a layer that adds epsilon to s."""
    adoption.carry_affine(source, layers)
    for _, new in layers.values():
        if moving_statistics.is_running(source):
            mean, variance = moving_statistics.statistics(source, 0.0)
            adoption.assign(new.moving_mean, mean)
            adoption.assign(new.moving_scale, np.sqrt(variance) - new.epsilon)


def check_any_p_is_the_deviation_of_gaussians():
    x = np.random.default_rng(0).normal(3.0, 2.0, (200000, 1)).astype("float32")
    for p in (1.0, 1.5, 2.0, 4.0, 8.0):
        y = LpBatchNormalization(p)(x, training=True)
        # The estimate of the eighth moment from 2e5 samples is good to 2 %.
        np.testing.assert_allclose(np.std(ops.convert_to_numpy(y)), 1.0, rtol=0.02)


def check_a_large_p_does_not_overflow():
    x = np.array([[-6e4], [6e4], [1.0]], "float32")
    y = ops.convert_to_numpy(LpBatchNormalization(50.0, False)(x, training=True))
    np.testing.assert_allclose(y[:2, 0], [-1.0, 1.0], rtol=0.03)


declare(
    LpBatchNormalization,
    name="lp",
    title="Lp batch normalization",
    family="batch",
    paper="Hoffer et al., 2018, arXiv:1803.01814",
    invariance="filter",
    oracle=oracle,
    reads={LpBatchNormalization: read_own},
    adopt=adopt,
    carry=carry,
    cases=(
        Case({"p": 3}, (16, 6)),
        Case({"p": 1.5, "momentum": 0.8}, (5, 7, 4), masked=True),
        Case({"gaussian_correction": False, "axis": 1}, (4, 3, 5, 6)),
        Case({"p": 8, "center": False}, (3, 2, 4, 3, 5)),
        Case({"p": 1, "scale": False}, (4, 6, 5)),
    ),
    claims={
        "scale_invariant",
        "channel_scale_invariant",
        "shift_invariant",
        "sign_equivariant",
        "zero_output_mean",
        "idempotent",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
    checks=(
        check_any_p_is_the_deviation_of_gaussians,
        check_a_large_p_does_not_overflow,
    ),
)
