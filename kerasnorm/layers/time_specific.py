"""Time-specific batch normalization."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError, count
from kerasnorm.method import adoption, moving_statistics, oracles
from kerasnorm.method.normalization import BatchStatistics
from kerasnorm.method.registry import Case, Reason, Refusal, declare
from kerasnorm.numerics import moments, replicas


@keras.saving.register_keras_serializable("kerasnorm")
class TimeSpecificBatchNormalization(BatchStatistics):
    r"""Batch normalization with moving statistics of its own for each time step.

    What a recurrent network computes has other statistics at the start of a sequence
    than later on. `gamma` and `beta` are shared by all time steps.

        training:   y_t = gamma * (x_t - mean(x_t)) / sqrt(var(x_t) + epsilon) + beta
        inference:  the same with moving_mean[t] and moving_variance[t]

    Time is axis 1; the statistics of a time step are over the batch and all further
    positions. Time steps beyond `max_steps` use the last moving statistics there are.
    Inputs of rank 2 are a single time step; within the recurrent layers of
    `kerasnorm.recurrent` they are the step that the sequence is at.

    Paper: Cooijmans et al., 2017, https://arxiv.org/abs/1603.09025, who start gamma at
    0.1; named by Liao, Kawaguchi and Poggio, 2016, https://arxiv.org/abs/1610.06160

    Args:
        axis: integer, axis of the channels, not 1 unless the rank is 2. Default -1.
        momentum: weight of the old moving statistics, 0 to 1. Default 0.99.
        epsilon: added to the variance. Default 1e-3.
        center, scale: whether to use `beta` and `gamma`.
        max_steps: how many time steps have statistics of their own. By default as many
            as the input has when the layer is built.
        **kwargs: `synchronized`, see `kerasnorm.BatchStatistics`; and those of
            `kerasnorm.Normalization`.

    Call arguments:
        inputs: `(batch, time, ..., channels)`, or one time step of rank 2.
        training: batch statistics (True) or moving ones. `trainable = False` means
            inference.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: no `max_steps` where the number of time steps is unknown, or
            time as the axis of the channels.
    """

    def __init__(
        self,
        axis=-1,
        momentum=0.99,
        epsilon=1e-3,
        center=True,
        scale=True,
        *,
        max_steps=None,
        **kwargs,
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        self.momentum = float(momentum)
        self.max_steps = None if max_steps is None else count("max_steps", max_steps)

    def build(self, input_shape):
        super().build(input_shape)
        steps = self.max_steps or (input_shape[1] if len(input_shape) > 2 else None)
        (axis,) = self._axes(input_shape)
        if steps is None or (axis == 1 and len(input_shape) > 2):
            raise KerasNormError(
                f"{type(self).__name__} {self.name!r} needs to know its time steps",
                got=f"input shape {tuple(input_shape)}, axis={self.axis}",
                expected="time as axis 1, of known size or with `max_steps`",
            )
        shape = (steps, input_shape[self.axis])
        frozen = {"trainable": False, "dtype": self.statistics_dtype}
        self.moving_mean = self.channel_weight(
            "moving_mean", shape, initializer="zeros", **frozen
        )
        self.moving_variance = self.channel_weight(
            "moving_variance", shape, initializer="ones", **frozen
        )

    def call(self, inputs, training=None, mask=None):
        # `normalize` sees time and further positions as one axis.
        shape = inputs.shape
        self._time = 1 if len(shape) == 2 else shape[1] or ops.shape(inputs)[1]
        return super().call(inputs, training=training, mask=mask)

    def normalize(self, x, mask, training):
        batch, channels, times = ops.shape(x)[0], x.shape[-1], self._time
        shape = (batch, times, -1, channels)
        if mask is not None:
            mask = ops.reshape(mask, (batch, times, -1, mask.shape[-1]))
        x = ops.reshape(x, shape)
        steps = self.moving_mean.shape[0]
        if training and self.trainable:
            mean, variance = moments.moments(x, (0, 2), mask)  # (1, T, 1, C)
            seen = ops.ones((1, 1), x.dtype)
            if mask is not None:
                seen = replicas.any_valid(mask, (0, 2))  # (T, 1 or C)
                seen = ops.cast(seen, x.dtype)
            own = ops.minimum(ops.arange(steps), times - 1)
            there = ops.cast(ops.arange(steps) < times, x.dtype)[:, None]
            seen = ops.take(
                ops.broadcast_to(seen, (times, seen.shape[-1])), own, axis=0
            )
            self._move(
                ops.take(mean[0, :, 0], own, axis=0),
                ops.take(variance[0, :, 0], own, axis=0),
                seen * there,
            )
        else:
            last = ops.minimum(ops.arange(times), steps - 1)
            mean, variance = (
                ops.take(ops.cast(v, x.dtype), last, axis=0)[None, :, None]
                for v in (self.moving_mean, self.moving_variance)
            )
        y = self._scaled(x, mean, variance)
        return ops.reshape(y, (batch, -1, channels))

    # A recurrent layer carries the statistics of all steps through its loop.

    def begin(self, training):
        """Statistics gathered per time step: mean, variance, whether seen."""
        if not (training and self.trainable):
            return []
        steps, channels = self.moving_mean.shape
        return [ops.zeros((steps, 2 * channels + 1), self.statistics_dtype)]

    def step(self, x, carry, mask, training, time):
        """Normalizes `(batch, 1, channels)` at one time step; output and carry."""
        steps = self.moving_mean.shape[0]
        if not (training and self.trainable):
            last = ops.minimum(time, steps - 1)
            mean = ops.take(ops.cast(self.moving_mean, x.dtype), last, axis=0)
            variance = ops.take(ops.cast(self.moving_variance, x.dtype), last, axis=0)
            return self._scaled(x, mean, variance), carry
        mean, variance = moments.moments(x, (0, 1), mask)
        seen = ops.ones((1,), x.dtype) if mask is None else moments.seen(mask, x.dtype)
        row = ops.concatenate([mean[0, 0], variance[0, 0], ops.max(seen)[None]])
        here = ops.cast(ops.equal(ops.arange(steps), time), x.dtype)[:, None]
        gathered = carry[0] + here * ops.stop_gradient(row)
        return self._scaled(x, mean, variance), [gathered]

    def end(self, carry, training):
        """Moves the statistics after the last step of a sequence."""
        if training and self.trainable:
            channels = self.moving_mean.shape[-1]
            mean, variance, seen = ops.split(carry[0], [channels, 2 * channels], axis=1)
            self._move(mean, variance, seen)

    def _move(self, mean, variance, seen):
        rate = (1.0 - self.momentum) * seen
        for moving, new in ((self.moving_mean, mean), (self.moving_variance, variance)):
            old = ops.cast(moving, new.dtype)
            moving.assign(old + (new - old) * rate)

    def _scaled(self, x, mean, variance):
        gamma, beta = self.affine(x.dtype)
        inverse = moments.inverse_root(variance, self.epsilon)
        return moments.scale_shift(x, mean, inverse, gamma, beta)


def oracle(x, weights, config, training, mask):
    axis = config.get("axis", -1)
    x = np.moveaxis(x, axis, -1)
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        frame = x[:, t]
        last = min(t, len(weights["moving_mean"]) - 1)
        mean, var = weights["moving_mean"][last], weights["moving_variance"][last]
        if training:
            keep = np.ones(frame.shape, bool)
            if mask is not None:
                keep &= mask[:, t].reshape((-1,) + (1,) * (frame.ndim - 1))
            over = tuple(range(frame.ndim - 1))
            mean, var = (f(frame, over, where=keep) for f in (np.mean, np.var))
        y[:, t] = (frame - mean) / np.sqrt(var + config.get("epsilon", 1e-3))
    return np.moveaxis(oracles.affine(y, weights), -1, axis)


def adopt(source, site, options):
    if source.method == "time_specific":
        return adoption.already("time-specific batch normalization")
    shapes = adoption.shapes(site)
    if not options.force and any(len(s) != 3 for s in shapes):
        return Refusal(
            Reason.UNDEFINED, f"no time axis in the input shapes {shapes}", "batch"
        )
    steps = options.arguments.get("max_steps", shapes[0][1] if shapes else None)
    if steps is None:
        return Refusal(
            Reason.UNDEFINED,
            f"the number of time steps is unknown in {shapes or 'its input'}",
            "give max_steps",
        )
    if any(adoption.channel_axis(source, len(s)) == 1 for s in shapes):
        return Refusal(
            Reason.UNDEFINED, "its channels are axis 1, which is time", "batch"
        )
    return moving_statistics.adopt_running(
        TimeSpecificBatchNormalization, source, site, options, max_steps=steps
    )


def carry(source, layers):
    adoption.carry_affine(source, layers)
    for _, new in layers.values():
        if moving_statistics.is_running(source):
            moving = (new.moving_mean, new.moving_variance)
            known = moving_statistics.statistics(source, new.epsilon)
            for v, value in zip(moving, known, strict=True):
                adoption.assign(v, np.broadcast_to(value, v.shape))


def check_later_steps_reuse_the_last_statistics():
    layer = TimeSpecificBatchNormalization(max_steps=2, momentum=0.0)
    x = np.random.default_rng(0).normal(3, 2, (8, 5, 4)).astype("float32")
    layer(x, training=True)
    mean, deviation = x[:, 1].mean(0), np.sqrt(x[:, 1].var(0) + 1e-3)
    y = ops.convert_to_numpy(layer(x))[:, 1:]
    np.testing.assert_allclose(y, (x[:, 1:] - mean) / deviation, rtol=1e-4, atol=1e-5)


def check_unseen_steps_keep_their_statistics():
    layer = TimeSpecificBatchNormalization(max_steps=4, momentum=0.0)
    x = np.random.default_rng(0).normal(3, 2, (8, 3, 4)).astype("float32")
    mask = np.ones((8, 3), bool)
    mask[:, 1] = False
    layer(x, training=True, mask=mask)
    mean = ops.convert_to_numpy(layer.moving_mean)
    np.testing.assert_array_equal(mean[[1, 3]], np.zeros((2, 4)))
    np.testing.assert_allclose(mean[[0, 2]], x[:, [0, 2]].mean(0), rtol=1e-4)


declare(
    TimeSpecificBatchNormalization,
    name="time_specific",
    title="Time-specific batch normalization",
    aliases=("tsbn", "time"),
    family="batch",
    paper="Cooijmans et al., 2017, arXiv:1603.09025",
    invariance="filter",
    oracle=oracle,
    reads={
        TimeSpecificBatchNormalization: adoption.reader("time_specific", "momentum")
    },
    adopt=adopt,
    carry=carry,
    cases=(
        Case({}, (6, 5, 4)),
        Case({"max_steps": 3, "epsilon": 1e-5}, (7, 5, 4), masked=True),
        Case({"max_steps": 7, "center": False}, (4, 3, 5, 8)),
        Case({"scale": False, "axis": 2}, (3, 2, 4, 3, 5)),
    ),
    claims={
        "scale_invariant",
        "channel_scale_invariant",
        "shift_invariant",
        "sign_equivariant",
        "unit_output_scale",
        "zero_output_mean",
        "idempotent",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
    checks=(
        check_later_steps_reuse_the_last_statistics,
        check_unseen_steps_keep_their_statistics,
    ),
)
