"""Batch renormalization."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
from keras import ops

from kerasnorm.method import adoption, moving_statistics, oracles
from kerasnorm.method.normalization import BatchStatistics
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import moments


@keras.saving.register_keras_serializable("kerasnorm")
class BatchRenormalization(BatchStatistics):
    r"""Batch normalization corrected toward its own moving statistics.

    For small or dependent batches: each sample is normalized nearly as at inference,
    while the gradient still passes through the statistics of the batch.

        s = sqrt(var(x) + epsilon)
        r = clip(s / moving_s, 1 / rmax, rmax)                   no gradient
        d = clip((mean(x) - moving_mean) / moving_s, -dmax, dmax)     no gradient
        training:   y = gamma * ((x - mean(x)) / s * r + d) + beta
        inference:  y = gamma * (x - moving_mean) / moving_s + beta

    The schedule of the paper: `rmax = 1` and `dmax = 0` (batch normalization) for
    `warmup_steps` training steps, then linearly up to `rmax` at step `rmax_steps` and
    to `dmax` at step `dmax_steps`. The step is a weight of the layer, and is saved.

    Paper: Ioffe, 2017, https://arxiv.org/abs/1702.03275

    Args:
        axis: integer, axis of the channels. Default -1.
        momentum: weight of the old moving statistics, 0 to 1. Default 0.99.
        epsilon: added to the variance of the batch. Default 1e-3.
        center, scale: whether to use `beta` and `gamma`.
        rmax: largest correction of the scale, at least 1. Default 3.
        dmax: largest correction of the mean, in standard deviations. Default 5.
        warmup_steps, rmax_steps, dmax_steps: the schedule, in training steps. Defaults
            5000, 40000 and 25000.
        **kwargs: `synchronized`, see `kerasnorm.BatchStatistics`; and those of
            `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: batch statistics (True) or moving ones.
        mask: boolean, the leading axes of the input; masked positions do not count.
    """

    surrogate_gradient = True

    def __init__(
        self,
        axis=-1,
        momentum=0.99,
        epsilon=1e-3,
        center=True,
        scale=True,
        *,
        rmax=3.0,
        dmax=5.0,
        warmup_steps=5000,
        rmax_steps=40000,
        dmax_steps=25000,
        **kwargs,
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        self.momentum = float(momentum)
        self.rmax = float(rmax)
        self.dmax = float(dmax)
        self.warmup_steps = warmup_steps
        self.rmax_steps = rmax_steps
        self.dmax_steps = dmax_steps

    def build(self, input_shape):
        super().build(input_shape)
        shape = (input_shape[self.axis],)
        frozen = {"trainable": False, "dtype": self.statistics_dtype}
        self.moving_mean = self.channel_weight(
            "moving_mean", shape, initializer="zeros", **frozen
        )
        # With epsilon inside, as in the paper.
        self.moving_stddev = self.channel_weight(
            "moving_stddev", shape, initializer="ones", **frozen
        )
        self.steps = self.channel_weight("steps", (), initializer="zeros", **frozen)

    def normalize(self, x, mask, training):
        gamma, beta = self.affine(x.dtype)
        moving_mean = ops.cast(self.moving_mean, x.dtype)
        moving_stddev = ops.cast(self.moving_stddev, x.dtype)
        if not (training and self.trainable):
            return moments.scale_shift(x, moving_mean, 1 / moving_stddev, gamma, beta)
        mean, variance = moments.moments(x, (0, 1), mask)
        inverse = moments.inverse_root(variance, self.epsilon)
        stddev = ops.stop_gradient(1 / inverse)
        rmax = 1 + (self.rmax - 1) * self._progress(self.rmax_steps)
        dmax = self.dmax * self._progress(self.dmax_steps)
        r = ops.clip(stddev / moving_stddev, 1 / rmax, rmax)
        d = (ops.stop_gradient(mean) - moving_mean) / moving_stddev
        d = ops.clip(d, -dmax, dmax)
        rate = (1 - self.momentum) * moments.seen(mask, x.dtype)
        self.moving_mean.assign(moving_mean + (mean[0, 0] - moving_mean) * rate)
        self.moving_stddev.assign(moving_stddev + (stddev[0, 0] - moving_stddev) * rate)
        last = max(self.warmup_steps, self.rmax_steps, self.dmax_steps)
        self.steps.assign(ops.minimum(self.steps + 1, last))
        # The correction is one of the mean: x - mean + d * s / r.
        return moments.scale_shift(
            x, mean - d / (inverse * r), inverse * r, gamma, beta
        )

    def _progress(self, until):
        """From 0 at `warmup_steps` to 1 at `until`."""
        done = (self.steps - self.warmup_steps) / max(until - self.warmup_steps, 1)
        return ops.cast(ops.clip(done, 0.0, 1.0), self.statistics_dtype)


@oracles.flat
def oracle(x, keep, weights, config, training):
    mean, stddev = weights["moving_mean"], weights["moving_stddev"]
    if not training:
        return oracles.affine((x - mean) / stddev, weights)
    mu, var = oracles.moments(x, keep, (0, 1))
    s = np.sqrt(var + config.get("epsilon", 1e-3))
    limits = []
    for name, most, start in (("rmax", 3.0, 1.0), ("dmax", 5.0, 0.0)):
        begin = config.get("warmup_steps", 5000)
        end = config.get(f"{name}_steps", {"rmax": 40000, "dmax": 25000}[name])
        points = [begin, max(end, begin + 1)]
        limits.append(
            np.interp(weights["steps"], points, [start, config.get(name, most)])
        )
    r = np.clip(s / stddev, 1 / limits[0], limits[0])
    d = np.clip((mu - mean) / stddev, -limits[1], limits[1])
    return oracles.affine((x - mu) / s * r + d, weights)


def read_own(layer):
    source = adoption.describe(layer, "renorm", "momentum", mean="moving_mean")
    if "mean" not in source.weights:
        return source
    stddev = ops.convert_to_numpy(layer.moving_stddev).astype("float64")
    weights = {**source.weights, "variance": stddev**2 - layer.epsilon}
    return dataclasses.replace(source, weights=weights)


def adopt(source, site, options):
    return moving_statistics.adopt_running(BatchRenormalization, source, site, options)


def carry(source, layers):
    adoption.carry_affine(source, layers)
    for _, new in layers.values():
        if moving_statistics.is_running(source):
            mean, variance = moving_statistics.statistics(source, 0.0)
            adoption.assign(new.moving_mean, mean)
            adoption.assign(new.moving_stddev, np.sqrt(variance))


def check_gradient_holds_the_correction_fixed():
    """The paper's gradient: that of batch normalization, times r."""
    from kerasnorm.numerics import backend

    with backend.double_precision():
        rng = np.random.default_rng(0)
        x, upstream = rng.normal(2.0, 3.0, (2, 6, 5))
        layer = BatchRenormalization(
            warmup_steps=0, rmax_steps=1, dmax_steps=1, epsilon=1e-5, dtype="float64"
        )
        layer.build(x.shape)
        layer.steps.assign(1)
        layer.moving_stddev.assign(np.full(5, 2.0))
        _, (dx,) = backend.vjp(
            lambda v: layer(v, training=True), [x], ops.convert_to_tensor(upstream)
        )
        s = np.sqrt(x.var(0) + 1e-5)
        h = (x - x.mean(0)) / s
        batch = (upstream - upstream.mean(0) - h * (upstream * h).mean(0)) / s
        expected = batch * np.clip(s / 2.0, 1 / 3, 3)
        np.testing.assert_allclose(ops.convert_to_numpy(dx), expected, rtol=1e-9)


def check_warm_up_is_batch_normalization():
    x = np.random.default_rng(0).normal(2.0, 3.0, (6, 5)).astype("float32")
    y = BatchRenormalization()(x, training=True)
    stock = keras.layers.BatchNormalization()(x, training=True)
    np.testing.assert_allclose(y, stock, rtol=1e-4, atol=1e-5)


declare(
    BatchRenormalization,
    name="renorm",
    title="Batch renormalization",
    aliases=("brn", "batch_renorm"),
    family="batch",
    paper="Ioffe, 2017, arXiv:1702.03275",
    invariance="filter",
    oracle=oracle,
    reads={BatchRenormalization: read_own},
    adopt=adopt,
    carry=carry,
    cases=(
        Case({}, (16, 6)),
        Case(
            {"warmup_steps": 0, "rmax_steps": 3, "dmax_steps": 2, "axis": 1},
            (5, 4, 6, 3),
        ),
        Case(
            {"warmup_steps": 0, "rmax_steps": 1, "dmax_steps": 1, "epsilon": 1e-5},
            (5, 7, 4),
            masked=True,
        ),
        Case({"center": False, "scale": False}, (3, 2, 4, 3, 5)),
    ),
    claims={"gradient_orthogonal_to_input"},
    checks=(
        check_gradient_holds_the_correction_fixed,
        check_warm_up_is_batch_normalization,
    ),
)
