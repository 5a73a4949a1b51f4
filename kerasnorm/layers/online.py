"""Online normalization."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.layers.batch import BatchNormalization
from kerasnorm.method import adoption, moving_statistics, oracles
from kerasnorm.method.registry import Case, Fidelity, Reason, Refusal, declare
from kerasnorm.numerics import backend, moments, replicas


CONTROLS = ("clamp", "layer_scaling", None)


@keras.saving.register_keras_serializable("kerasnorm")
class OnlineNormalization(BatchNormalization):
    r"""Normalizes each sample by the moving statistics of all samples before it.

    Batch size 1 and 128 compute the same: samples are taken one by one, in order.

        y_t = (x_t - mean_{t-1}) / sqrt(var_{t-1} + epsilon)
        var_t = a var_{t-1} + (1 - a) Var(x_t) + a (1 - a) (E x_t - mean_{t-1})^2
        mean_t = a mean_{t-1} + (1 - a) E x_t

    E and Var are over the positions of one sample. The gradient that batch statistics
    would give is approached by a control process, with memories u and v:

        g' = g - (1 - b) v_{t-1} y_t,        v_t = v_{t-1} + E(g' y_t)
        dx = g' / s - (1 - b) u_{t-1},       u_t = u_{t-1} + E(dx)

    where `a = momentum`, `b = backward_momentum`. Then gamma and beta, then `control`
    of what the lag lets through: `"clamp"` to `[-limit, limit]`, `"layer_scaling"`, a
    division by the root mean square of the sample, or None. The recurrences are run as
    scans in log2(batch) steps.

    u and v are weights that the optimizer overwrites with their new values. They are
    in units of the gradient: a change of a dynamic loss scale is felt until they
    follow. Replicas of a strategy follow streams of their own, and average what they
    know after each step; synchronized, they follow one stream, in the order of the
    whole batch. Accumulation of gradients (Keras keeps the
    maximum) and several calls of one layer in a step do not suit them.

    Paper: Chiley et al., 2019, https://arxiv.org/abs/1905.05894

    Args:
        axis: integer, axis of the channels. Default -1.
        momentum: a, 0 to 1. Default 0.999.
        backward_momentum: b, 0 to 1. Default 0.99.
        epsilon: added to the variance. Default 1e-5.
        center, scale: whether to use `beta` and `gamma`.
        control: see above. Default `"clamp"`.
        limit: bound of the clamp. Default 5.
        **kwargs: those of `BatchNormalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: update the statistics (True), or use them as they are.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: unknown control.
    """

    surrogate_gradient = True

    def __init__(
        self,
        axis=-1,
        momentum=0.999,
        epsilon=1e-5,
        center=True,
        scale=True,
        *,
        backward_momentum=0.99,
        control: str | None = "clamp",
        limit=5.0,
        **kwargs,
    ):
        super().__init__(axis, momentum, epsilon, center, scale, **kwargs)
        if control not in CONTROLS:
            raise KerasNormError(
                "unknown control", got=repr(control), expected=f"one of {CONTROLS}"
            )
        self.backward_momentum = float(backward_momentum)
        self.control = control
        self.limit = float(limit)

    def build(self, input_shape):
        super().build(input_shape)
        kept = {
            "shape": (input_shape[self.axis],),
            "initializer": "zeros",
            "dtype": self.statistics_dtype,
            "overwrite_with_gradient": True,
        }
        self.mean_control = self.channel_weight("mean_control", **kept)
        self.scale_control = self.channel_weight("scale_control", **kept)

    def normalize(self, x, mask, training):
        mean, variance = self.moving(x.dtype)
        gamma, beta = self.affine(x.dtype)
        if training and self.trainable:
            inside, y = self._forward(x, mask, mean, variance)
        else:
            inside = mask
            y = (x - mean) * moments.inverse_root(variance, self.epsilon)
        y = y if gamma is None else y * gamma
        y = y if beta is None else y + beta
        if self.control == "clamp":
            y = ops.clip(y, -self.limit, self.limit)
        elif self.control == "layer_scaling":
            _, square = moments.moments(y, (1, 2), inside, center=False)
            y = y * moments.inverse_root(square, self.epsilon)
        return moments.saturate(y, self.compute_dtype)

    def _forward(self, x, mask, mean, variance):
        a = self.momentum
        seen = None
        if mask is not None:
            x = ops.where(mask, x, ops.zeros((), x.dtype))
            seen = ops.cast(ops.any(mask, 1), x.dtype)
        m, v = (s[:, 0] for s in moments.moments(ops.stop_gradient(x), (1,), mask))
        # A sample without a valid position leaves the statistics alone.
        rate = (1 - a) * (ops.ones_like(m) if seen is None else seen)
        own, (m, v, rate) = _in_order(m, v, rate)
        means = moments.recurrence(1 - rate, rate * m, mean)
        before = moments.delayed(means, mean)
        jump = rate * (v + (1 - rate) * ops.square(m - before))
        variances = moments.recurrence(1 - rate, jump, variance)
        inverse = moments.inverse_root(
            moments.delayed(variances, variance), self.epsilon
        )
        self.moving_mean.assign(means[-1])
        self.moving_variance.assign(variances[-1])
        y = backend.custom_gradient(self._controlled(mask))(
            x,
            ops.cast(self.mean_control, x.dtype),
            ops.cast(self.scale_control, x.dtype),
            ops.expand_dims(own(before), 1),
            ops.expand_dims(own(inverse), 1),
        )
        return mask, y

    def _controlled(self, mask):
        c = 1 - self.backward_momentum

        def averages(*values):
            """Of each sample, of all replicas; and the function that cuts."""
            with self.over_replicas():
                return _in_order(
                    *(moments.moments(v, (1,), mask)[0][:, 0] for v in values)
                )

        def kernel(x, u, v, mean, inverse):
            y = (x - mean) * inverse
            if mask is not None:
                y = ops.where(mask, y, ops.zeros((), y.dtype))

            def backward(g):
                # Bounded: outliers beyond 1 / c would turn the control unstable.
                own, (power, error) = averages(ops.square(y), g * y)
                power = ops.minimum(c * power, 1.0)
                errors = moments.recurrence(1 - power, error, v)
                g = g - c * ops.expand_dims(own(moments.delayed(errors, v)), 1) * y
                g = g * inverse
                own, (drift,) = averages(g)
                drifts = moments.recurrence(ops.full_like(drift, 1 - c), drift, u)
                dx = g - c * ops.expand_dims(own(moments.delayed(drifts, u)), 1)
                if mask is not None:
                    dx = ops.where(mask, dx, ops.zeros((), dx.dtype))
                if self.compute_dtype == "float16":
                    dx = ops.clip(dx, -65504.0, 65504.0)
                rest = (ops.zeros_like(mean), ops.zeros_like(inverse))
                return (dx, drifts[-1], errors[-1], *rest)

            return y, backward

        return kernel


def _in_order(*values):
    """One row per sample, of all replicas in their order where synchronized; before
    them the function that cuts out the rows of this one."""
    if not replicas.together():
        return (lambda v: v), values
    pairs = [replicas.gather(v) for v in values]
    return pairs[0][1], [v for v, _ in pairs]


@oracles.flat
def oracle(x, keep, weights, config, training):
    mean, var = weights["moving_mean"], weights["moving_variance"]
    a, epsilon = config.get("momentum", 0.999), config.get("epsilon", 1e-5)
    y = np.empty_like(x)
    for t in range(len(x)):
        y[t] = (x[t] - mean) / np.sqrt(var + epsilon)
        if training and keep[t].any():
            now, own = (s[0] for s in oracles.moments(x[t], keep[t], (0,)))
            var = a * var + (1 - a) * own + a * (1 - a) * (now - mean) ** 2
            mean = mean + (1 - a) * (now - mean)
    if training:  # the layer leaves beta at masked positions
        y = np.where(keep, y, 0.0)
    y = oracles.affine(y, weights)
    if config.get("control", "clamp") == "clamp":
        return np.clip(y, -config.get("limit", 5.0), config.get("limit", 5.0))
    if config["control"] == "layer_scaling":
        square = np.mean(y**2, (1, 2), where=keep, keepdims=True)
        return y / np.sqrt(square + epsilon)
    return y


def read_own(layer):
    if layer.control is not None:
        return adoption.describe(layer, "online")
    names = {"mean": "moving_mean", "variance": "moving_variance"}
    return adoption.describe(layer, "online", **names)


def adopt(source, site, options):
    if site.shared:
        return Refusal(
            Reason.SHARED,
            f"{site.path} is called more than once, and the control of its gradient "
            "follows a single call",
            "streaming",
        )
    # The clamp would change outputs beyond it.
    control = options.arguments.get("control")
    answer = moving_statistics.adopt_running(
        OnlineNormalization,
        source,
        site,
        options,
        exact=control is None,
        alone=True,
        control=control,
        # That of the source is one per batch; this one is per sample.
        momentum=options.arguments.get("momentum", 0.999),
    )
    if not isinstance(answer, Refusal) and answer.fidelity is Fidelity.AT_INFERENCE:
        note = 'control=None keeps the outputs; train with control="clamp"'
        return dataclasses.replace(answer, note=note)
    return answer


def _sequential(x, upstream, u, v, a, b, epsilon):
    """Forward and backward pass of the paper, sample by sample."""
    mean, var = np.zeros(x.shape[-1]), np.ones(x.shape[-1])
    dx = np.empty_like(x)
    for t in range(len(x)):
        s = np.sqrt(var + epsilon)
        y = (x[t] - mean) / s
        now, own = x[t].mean(0), x[t].var(0)
        var = a * var + (1 - a) * own + a * (1 - a) * (now - mean) ** 2
        mean = mean + (1 - a) * (now - mean)
        g = upstream[t] - (1 - b) * v * y
        v = v + (g * y).mean(0)
        dx[t] = g / s - (1 - b) * u
        u = u + dx[t].mean(0)
    return dx, u, v, mean, var


def check_gradient_and_its_memories():
    with backend.double_precision():
        rng = np.random.default_rng(0)
        x, upstream = rng.normal(1.0, 2.0, (2, 7, 5, 3))
        layer = OnlineNormalization(momentum=0.9, control=None, dtype="float64")
        layer.build(x.shape)
        start = rng.normal(size=(2, 3))
        layer.mean_control.assign(start[0])
        layer.scale_control.assign(start[1])
        weights = [v.value for v in layer.trainable_variables]
        others = [v.value for v in layer.non_trainable_variables]
        after = []

        def f(v, *weights):
            y, now = layer.stateless_call(list(weights), others, v, training=True)
            after[:] = now
            return y

        _, found = backend.vjp(f, [x, *weights], ops.convert_to_tensor(upstream))
        names = [v.name for v in layer.trainable_variables]
        found = dict(zip(["x", *names], found, strict=True))
        dx, u, v, _, _ = _sequential(x, upstream, start[0], start[1], 0.9, 0.99, 1e-5)
        for name, expected in (("x", dx), ("mean_control", u), ("scale_control", v)):
            np.testing.assert_allclose(
                ops.convert_to_numpy(found[name]), expected, rtol=1e-9, err_msg=name
            )


def check_batch_size_does_not_matter():
    x = np.random.default_rng(0).normal(1.0, 2.0, (6, 5, 3)).astype("float32")
    whole, single = OnlineNormalization(momentum=0.9), OnlineNormalization(momentum=0.9)
    y = ops.convert_to_numpy(whole(x, training=True))
    parts = [
        ops.convert_to_numpy(single(x[k : k + 1], training=True)) for k in range(6)
    ]
    np.testing.assert_allclose(y, np.concatenate(parts), rtol=1e-4, atol=1e-5)
    for a, b in zip(whole.variables, single.variables, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(a), ops.convert_to_numpy(b), rtol=1e-4, atol=1e-5
        )


def check_memories_train():
    """`fit` moves them, and an optimizer with decay leaves their values alone."""
    rng = np.random.default_rng(0)
    layer = OnlineNormalization(momentum=0.9)
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
    x = rng.normal(3.0, 2.0, (32, 4)).astype("float32")
    y = x.sum(1, keepdims=True)
    model.compile(keras.optimizers.AdamW(1e-2), "mse")
    model.fit(x, y, batch_size=8, epochs=3, verbose=0)
    for memory in (layer.mean_control, layer.scale_control):
        value = ops.convert_to_numpy(memory)
        if not (np.isfinite(value).all() and np.abs(value).min() > 0):
            raise AssertionError(f"{memory.name} is {value}")


declare(
    OnlineNormalization,
    name="online",
    aliases=("on",),
    family="batch",
    paper="Chiley et al., 2019, arXiv:1905.05894",
    invariance="none",
    oracle=oracle,
    reads={OnlineNormalization: read_own},
    adopt=adopt,
    carry=moving_statistics.carry_running,
    cases=(
        Case({}, (16, 6)),
        Case({"momentum": 0.8, "control": "layer_scaling"}, (5, 7, 4), masked=True),
        Case({"control": None, "axis": 1, "momentum": 0.9}, (4, 3, 5, 6)),
        Case({"center": False, "scale": False}, (3, 2, 4, 3, 5)),
    ),
    # It depends on the samples before alone; and its Jacobian is bounded for fixed
    # statistics, not on the way there.
    undecided={"batch_independent", "bounded_jacobian"},
    checks=(
        check_gradient_and_its_memories,
        check_batch_size_does_not_matter,
        check_memories_train,
    ),
)
