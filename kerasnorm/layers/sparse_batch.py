"""Sparse batch normalization."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm.layers.batch import BatchNormalization
from kerasnorm.layers.divisive import Smoothed, read_smoothed
from kerasnorm.method import adoption, moving_statistics
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import moments


@keras.saving.register_keras_serializable("kerasnorm")
class SparseBatchNormalization(Smoothed, BatchNormalization):
    r"""Batch normalization with a learned addition to the variance, and sparse.

        training:   y = gamma * (x - mean(x)) / sqrt(sigma**2 + var(x)) + beta
        inference:  the same with moving_mean and moving_variance

    The paper's BN-s, and with the penalty on `|x - mean(x)|` its BN*.

    Paper: Ren, Liao, Urtasun, Sinz and Zemel, 2017, https://arxiv.org/abs/1611.04520

    Args:
        sigma: where `sigma` starts. Default 0.5.
        learn_sigma: whether it is learned. Default True.
        l1: weight of the penalty `mean |x - mean(x)|` in training; 0.001 to 0.01 in
            the paper. Default 0.
        axis: integer, axis of the channels. Default -1.
        momentum: weight of the old moving statistics, 0 to 1. Default 0.99.
        epsilon: added to `sigma**2`. Default 1e-6.
        center, scale: whether to use `beta` and `gamma`.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: batch statistics (True) or moving ones.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: `sigma` or `l1` is negative.
    """

    def __init__(self, sigma=0.5, learn_sigma=True, l1=0.0, epsilon=1e-6, **kwargs):
        super().__init__(sigma, learn_sigma, l1, epsilon=epsilon, **kwargs)

    def normalize(self, x, mask, training):
        mean, variance = self.moving(x.dtype)
        if training and self.trainable:
            moving, seen = (mean, variance), 1.0
            if mask is not None:
                seen = ops.cast(ops.any(mask, axis=(0, 1)), x.dtype)
            mean, variance = moments.moments(x, (0, 1), mask)
            self._update(moving, mean[0, 0], variance[0, 0], seen)
            self.penalize(x - mean, mask, training)
        inverse = self.inverse(variance)
        return moments.scale_shift(x, mean, inverse, *self.affine(x.dtype))


def oracle(x, weights, config, training, mask):
    x = np.moveaxis(x, config.get("axis", -1), -1)
    rows = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
    mean, variance = weights["moving_mean"], weights["moving_variance"]
    if training:
        mean, variance = rows.mean(0), rows.var(0)
    power = weights["sigma"] ** 2 + variance + config.get("epsilon", 1e-6)
    y = (x - mean) / np.sqrt(power)
    y = y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)
    return np.moveaxis(y, -1, config.get("axis", -1))


def adopt(source, site, options):
    if source.method == "sparse_batch":
        return adoption.already("sparse batch normalization")
    return moving_statistics.adopt_running(
        SparseBatchNormalization,
        source,
        site,
        options,
        scale=True,  # carries the difference that sigma makes
        epsilon=float(options.arguments.get("epsilon", 1e-6)),
    )


def carry(source, layers):
    """The moving statistics as they are; gamma makes up for sigma."""
    adoption.carry_affine(source, layers)
    for _, new in layers.values():
        if new is not None and moving_statistics.is_running(source):
            mean, variance = moving_statistics.statistics(source, 0.0)
            square = float(ops.convert_to_numpy(new.smoothing)) ** 2 + new.epsilon
            plain = variance - source.epsilon
            gain = np.sqrt((plain + square) / variance)
            adoption.assign(new.moving_mean, mean)
            adoption.assign(new.moving_variance, plain)
            adoption.assign(new.gamma, source.weights.get("gamma", 1.0) * gain)


def read_own(layer):
    names = {"mean": "moving_mean", "variance": "moving_variance"}
    return read_smoothed("sparse_batch", layer, **names)


def check_penalty_counts_what_the_mask_lets_in():
    x = np.random.default_rng(0).normal(2, 3, (4, 6, 3)).astype("float32")
    mask = np.arange(6) < np.array([[2], [6], [1], [4]])
    layer = SparseBatchNormalization(l1=0.5)
    layer(x, training=True, mask=mask)
    expected = 0.5 * np.abs(x[mask] - x[mask].mean(0)).mean()
    np.testing.assert_allclose(float(layer.losses[0]), expected, rtol=1e-5)


declare(
    SparseBatchNormalization,
    name="sparse_batch",
    aliases=("bn_s", "bn_star"),
    family="batch",
    paper="Ren, Liao, Urtasun, Sinz and Zemel, 2017, arXiv:1611.04520",
    invariance="none",
    oracle=oracle,
    reads={SparseBatchNormalization: read_own},
    adopt=adopt,
    carry=carry,
    cases=(
        Case({}, (16, 6)),
        Case({"momentum": 0.8, "l1": 0.01}, (5, 7, 4), masked=True),
        Case({"center": False, "sigma": 1.0}, (4, 6, 5, 8)),
        Case({"scale": False, "axis": 1, "l1": 0.1}, (4, 3, 5, 6)),
        Case({"learn_sigma": False}, (3, 2, 4, 3, 5)),
    ),
    # Not scale invariant: sigma.
    claims={"shift_invariant", "sign_equivariant", "zero_output_mean"},
    checks=(check_penalty_counts_what_the_mask_lets_in,),
)
