"""Power normalization."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.method import adoption, moving_statistics, oracles
from kerasnorm.method.normalization import BatchStatistics
from kerasnorm.method.registry import Case, Reason, Refusal, declare
from kerasnorm.numerics import backend, moments


@keras.saving.register_keras_serializable("kerasnorm")
class PowerNormalization(BatchStatistics):
    r"""Divides each channel by the moving root mean square, for transformers.

    In language, batch statistics jump from batch to batch, the mean most of all; so
    nothing is centred, and the moving quadratic mean is used in training too.

        z = x / sqrt(phi + epsilon),    y = gamma * z + beta
        phi: mean(x^2) of the batch for `warmup_steps`, then the moving one before it
        g' = g - (1 - b) e z,    dx = g' / sqrt(mean(x^2) + epsilon)
        e <- e + mean(g' z)

    where g is the gradient at z and `b = backward_momentum`; the memory e is a weight
    that the optimizer overwrites with its new value (see `OnlineNormalization` on what
    that asks for). During the warm-up the moving quadratic mean is the plain average.

    Paper: Shen et al., 2020, https://arxiv.org/abs/2003.07845

    Args:
        groups: divide groups of channels at each position by their root mean square
            first; that many groups, or None for no such step. Default None.
        axis: integer, axis of the channels. Default -1.
        momentum: weight of the old quadratic mean, 0 to 1. Default 0.9.
        epsilon: added to the mean squares. Default 1e-5.
        center, scale: whether to use `beta` and `gamma`.
        backward_momentum: b, 0 to 1. Default 0.9.
        warmup_steps: training steps with batch statistics. Default 10000.
        **kwargs: `synchronized`, see `kerasnorm.BatchStatistics`; and those of
            `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: update the statistics (True), or use them as they are.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: `groups` does not divide the channels.
    """

    surrogate_gradient = True

    def __init__(
        self,
        groups=None,
        axis=-1,
        momentum=0.9,
        epsilon=1e-5,
        center=True,
        scale=True,
        *,
        backward_momentum=0.9,
        warmup_steps=10000,
        **kwargs,
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        self.groups = groups
        self.momentum = float(momentum)
        self.backward_momentum = float(backward_momentum)
        self.warmup_steps = warmup_steps

    def build(self, input_shape):
        super().build(input_shape)
        channels = input_shape[self.axis]
        if self.groups is not None and (self.groups < 1 or channels % self.groups):
            raise KerasNormError(
                "the groups do not divide the channels",
                got=f"groups={self.groups} for {channels} channels",
                fix="Choose a divisor, or None for no groups.",
            )
        frozen = {"trainable": False, "dtype": self.statistics_dtype}
        self.moving_square = self.channel_weight(
            "moving_square", (channels,), initializer="ones", **frozen
        )
        self.steps = self.channel_weight("steps", (), initializer="zeros", **frozen)
        self.control = self.channel_weight(
            "control",
            (channels,),
            initializer="zeros",
            dtype=self.statistics_dtype,
            overwrite_with_gradient=True,
        )

    def normalize(self, x, mask, training):
        if self.groups is not None:
            _, square = moments.moments(x[..., None], (-1,), center=False)
            zero = ops.zeros_like(square[..., 0])
            _, square = moments.pool_groups(zero, square[..., 0], self.groups)
            x = x * moments.inverse_root(square, self.epsilon)
        phi = ops.cast(self.moving_square, x.dtype)
        if training and self.trainable:
            z = self._forward(x, phi, mask)
        else:
            z = x * moments.inverse_root(phi, self.epsilon)
        gamma, beta = self.affine(x.dtype)
        z = z if gamma is None else z * gamma
        z = z if beta is None else z + beta
        return moments.saturate(z, self.compute_dtype)

    def _forward(self, x, phi, mask):
        if mask is not None:
            x = ops.where(mask, x, ops.zeros((), x.dtype))
        _, now = moments.moments(ops.stop_gradient(x), (0, 1), mask, center=False)
        warm = self.steps < self.warmup_steps
        used = moments.inverse_root(ops.where(warm, now, phi), self.epsilon)
        rate = 1 - self.momentum
        rate = ops.where(warm, 1 / (self.steps + 1), rate) * moments.seen(mask, x.dtype)
        self.moving_square.assign(phi + (now[0, 0] - phi) * rate)
        self.steps.assign(ops.minimum(self.steps + 1, self.warmup_steps))
        own = moments.inverse_root(now, self.epsilon)
        kernel = self._controlled(mask)
        memory = ops.cast(self.control, x.dtype)
        return backend.custom_gradient(kernel)(x, memory, used, own)

    def _controlled(self, mask):
        c = 1 - self.backward_momentum

        def kernel(x, e, used, own):
            z = x * used

            def backward(g):
                g = g - c * e * z
                with self.over_replicas():
                    new = e + moments.moments(g * z, (0, 1), mask)[0][0, 0]
                dx = g * own
                if self.compute_dtype == "float16":
                    dx = ops.clip(dx, -65504.0, 65504.0)
                rest = (ops.zeros_like(used), ops.zeros_like(own))
                return (dx, new, *rest)

            return z, backward

        return kernel


@oracles.flat
def oracle(x, keep, weights, config, training):
    epsilon, groups = config.get("epsilon", 1e-5), config.get("groups")
    if groups:
        parts = x.reshape(*x.shape[:-1], groups, -1)
        square = np.mean(parts**2, -1, keepdims=True)
        x = (parts / np.sqrt(square + epsilon)).reshape(x.shape)
    phi = weights["moving_square"]
    if training and weights["steps"] < config.get("warmup_steps", 10000):
        phi = np.mean(x**2, (0, 1), where=keep)
    y = x / np.sqrt(phi + epsilon)
    if training:  # the layer leaves beta at masked positions
        y = np.where(keep, y, 0.0)
    return oracles.affine(y, weights)


def read_own(layer):
    source = adoption.describe(layer, "power", "momentum", variance="moving_square")
    if layer.groups is not None or "variance" not in source.weights:
        return source
    mean = np.zeros_like(source.weights["variance"])
    return dataclasses.replace(source, weights={**source.weights, "mean": mean})


def adopt(source, site, options):
    if site.shared:
        return Refusal(
            Reason.SHARED,
            f"{site.path} is called more than once, and the control of its gradient "
            "follows a single call",
            "streaming",
        )
    more = {}
    if moving_statistics.is_running(source) and np.any(source.weights["mean"]):
        more["center"] = True  # what the mean took away goes into beta
    exact = options.arguments.get("groups") is None
    exact = exact and (options.arguments.get("center", True) or not more)
    return moving_statistics.adopt_running(
        PowerNormalization, source, site, options, exact=exact, alone=True, **more
    )


def carry(source, layers):
    adoption.carry_affine(source, layers)
    for _, new in layers.values():
        if not moving_statistics.is_running(source):
            continue
        mean, variance = moving_statistics.statistics(source, new.epsilon)
        adoption.assign(new.moving_square, variance)
        if new.beta is not None:
            scale = source.weights.get("gamma", 1.0) / np.sqrt(variance + new.epsilon)
            adoption.assign(new.beta, source.weights.get("beta", 0.0) - mean * scale)


def check_gradient_and_its_memory():
    with backend.double_precision():
        rng = np.random.default_rng(0)
        x, upstream = rng.normal(1.0, 2.0, (2, 6, 5, 3))
        e = rng.normal(size=3)
        for steps, phi in ((0, np.mean(x**2, (0, 1))), (1, np.full(3, 2.0))):
            layer = PowerNormalization(
                warmup_steps=1, scale=False, center=False, dtype="float64"
            )
            layer.build(x.shape)
            layer.steps.assign(steps)
            layer.moving_square.assign(np.full(3, 2.0))
            others = [v.value for v in layer.non_trainable_variables]

            def f(v, e, layer=layer, others=others):
                return layer.stateless_call([e], others, v, training=True)[0]

            _, (dx, new) = backend.vjp(f, [x, e], ops.convert_to_tensor(upstream))
            z = x / np.sqrt(phi + 1e-5)
            g = upstream - 0.1 * e * z
            expected = g / np.sqrt(np.mean(x**2, (0, 1)) + 1e-5)
            np.testing.assert_allclose(ops.convert_to_numpy(dx), expected, rtol=1e-9)
            expected = e + np.mean(g * z, (0, 1))
            np.testing.assert_allclose(ops.convert_to_numpy(new), expected, rtol=1e-9)


declare(
    PowerNormalization,
    name="power",
    aliases=("pn",),
    family="batch",
    paper="Shen et al., 2020, arXiv:2003.07845",
    invariance="none",
    oracle=oracle,
    reads={PowerNormalization: read_own},
    adopt=adopt,
    carry=carry,
    cases=(
        Case({"warmup_steps": 0}, (16, 6)),
        Case({"warmup_steps": 0, "groups": 2, "epsilon": 1e-3}, (5, 7, 4), masked=True),
        Case({"center": False, "axis": 1}, (4, 3, 5, 6)),
        Case({"scale": False, "warmup_steps": 0}, (3, 2, 4, 3, 5)),
    ),
    claims={"sign_equivariant"},
    checks=(check_gradient_and_its_memory,),
)
