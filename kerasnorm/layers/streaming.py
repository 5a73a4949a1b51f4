"""Streaming normalization."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.method import adoption, moving_statistics, oracles
from kerasnorm.method.normalization import BatchStatistics
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import backend, moments, replicas


# What `clock` counts: calls that saw something and passes, both since the last weight
# update; the parity of that update; whether long-term statistics, and gradients, exist.
CALLS, PASSES, PARITY, STATISTICS, GRADIENTS = range(5)


@keras.saving.register_keras_serializable("kerasnorm")
class StreamingNormalization(BatchStatistics):
    r"""Normalizes each channel by statistics streamed over past samples.

    Made for small batches, single samples, and layers called at every time step. The
    statistics are a mean and an Lp deviation,

        m = mean(x),    s = (mean(|x - m|**p) + epsilon)**(1 / p)

    each kept as a short-term value, the exact average over all calls since the last
    weight update, and a long-term one. At a weight update
    `long = decay * long + (1 - decay) * short`, and the short-term one starts anew (the
    first time, `long = short`). In use is a mixture:

        training:   y = gamma * (x - m') / s' + beta,   m' = a1 long + a2 short + a3 now
        inference:  the same with m' = long

    Gradients with respect to the statistics are streamed likewise: what flows back into
    the statistics of the batch is `b1 long + b2 short + b3 now`, and at a weight update
    `long = gradient_decay * long + (1 - gradient_decay) * short`.

    The layer learns of a weight update by itself: gradients leave the backward pass
    through a variable that the optimizer overwrites (`overwrite_with_gradient`) when it
    updates the weights. So several passes may go before an update (decoupled
    accumulation and update), either with gradients summed by hand, or with
    `gradient_accumulation_steps` of the optimizer, which `accumulation_steps` must then
    equal. All state is weights: it is saved, and training resumes exactly.

    With `statistics_weights=(0, 1, 0)`, `gradient_weights=(0, 0, 1)` and one call per
    update it is batch normalization in training ("General BN"). The short-term gradient
    in use knows the calls of its own backward pass; those of earlier passes before
    the same update enter the long-term one only.

    With a loss scale that changes, streamed gradients are off by its change for the few
    updates that the long-term value remembers.

    Paper: Liao, Kawaguchi and Poggio, 2016, https://arxiv.org/abs/1610.06160. The
    defaults are those of its feed-forward networks; for recurrent ones and online
    learning it takes `statistics_weights=(0.7, 0.3, 0)` and
    `gradient_weights=(0.7, 0, 0.3)`. The authors' code measures deviations `around` the
    mean of the batch; then a single vector has none, and its deviation is 0.

    Args:
        axis: integer, axis of the channels. Default -1.
        epsilon: added to the mean of `|x - m|**p`, once. Default 1e-3.
        center, scale: whether to use `beta` and `gamma`.
        p: the deviation's exponent, at least 1. Default 2.
        statistics_weights: a1, a2, a3: long-term, short-term, current; at least 0, sum
            1. Default (0.5, 0.5, 0).
        gradient_weights: b1, b2, b3, at least 0. Default (0.5, 0.5, 0).
        decay: weight of the old long-term statistics at an update, 0 to 1. Default 0.7.
        gradient_decay: the same for gradients. Default 0.7.
        around: `"stream"` measures deviations from m', `"batch"` from the mean of the
            batch. Default `"stream"`.
        accumulation_steps: calls of the layer per weight update that the optimizer
            accumulates. Default 1.
        **kwargs: `synchronized`, see `kerasnorm.BatchStatistics`; and those of
            `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: as above. `trainable = False` means inference.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: an argument out of its range.
    """

    surrogate_gradient = True

    def __init__(
        self,
        axis=-1,
        epsilon=1e-3,
        center=True,
        scale=True,
        *,
        p=2.0,
        statistics_weights=(0.5, 0.5, 0.0),
        gradient_weights=(0.5, 0.5, 0.0),
        decay=0.7,
        gradient_decay=0.7,
        around="stream",
        accumulation_steps=1,
        **kwargs,
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        self.p = float(p)
        self.statistics_weights = [float(a) for a in statistics_weights]
        self.gradient_weights = [float(b) for b in gradient_weights]
        self.decay = float(decay)
        self.gradient_decay = float(gradient_decay)
        self.around = around
        self.accumulation_steps = int(accumulation_steps)
        self._check()

    def _check(self):
        a, b = self.statistics_weights, self.gradient_weights
        three = len(a) == len(b) == 3 and min(a + b) >= 0
        sound = {
            "p": (self.p >= 1, "at least 1"),
            "statistics_weights": (
                three and abs(sum(a) - 1) < 1e-6,
                "three numbers of at least 0 with sum 1",
            ),
            "gradient_weights": (three, "three numbers of at least 0"),
            "decay": (0 <= self.decay <= 1, "0 to 1"),
            "gradient_decay": (0 <= self.gradient_decay <= 1, "0 to 1"),
            "around": (self.around in ("stream", "batch"), "'stream' or 'batch'"),
            "accumulation_steps": (self.accumulation_steps >= 1, "at least 1"),
        }
        for name, (good, expected) in sound.items():
            if not good:
                raise KerasNormError(
                    f"{type(self).__name__} cannot use this {name}",
                    got=getattr(self, name),
                    expected=expected,
                )

    def build(self, input_shape):
        super().build(input_shape)
        channels = input_shape[self.axis]

        def state(name, shape=(channels,), initializer="zeros", **more):
            more = {"trainable": False, "dtype": self.statistics_dtype, **more}
            return self.channel_weight(name, shape, initializer=initializer, **more)

        self.long_mean = state("long_mean")
        self.long_deviation = state("long_deviation", initializer="ones")
        self.short_mean = state("short_mean")
        self.short_deviation = state("short_deviation")
        self.long_mean_gradient = state("long_mean_gradient")
        self.long_deviation_gradient = state("long_deviation_gradient")
        self.clock = state("clock", (5,))
        # One row per accumulated pass: Keras merges passes by elementwise maximum, so
        # each fills a row of its own, with positive and negative parts apart.
        # Columns: gradients of mean and deviation, positive parts then negative ones;
        # the number of calls; parity + 1, once per call.
        self.streamed_gradient = state(
            "streamed_gradient",
            (self.accumulation_steps, 4 * channels + 2),
            trainable=True,
            overwrite_with_gradient=True,
        )

    def normalize(self, x, mask, training):
        carry = self.begin(training)
        y, carry = self.step(x, carry, mask, training)
        self.end(carry, training)
        return y

    # A recurrent layer carries the streams through its loop, as tensors.

    def begin(self, training):
        """The short-term statistics as tensors: two of shape `(channels + 1,)`, the
        average and how many calls it is of. Their gradients are sums over calls."""
        if not (training and self.trainable):
            return []
        state = self._settled()
        for name, value in state.items():
            getattr(self, name).assign(value)
        clock = state["clock"]
        streams = [
            ops.concatenate([state[name], clock[CALLS : CALLS + 1]])
            for name in ("short_mean", "short_deviation")
        ]
        row = ops.minimum(ops.floor(clock[PASSES]), self.accumulation_steps - 1)
        rows = ops.arange(self.accumulation_steps, dtype=clock.dtype)
        row = ops.cast(ops.equal(rows, row), clock.dtype)[:, None]
        stamp = clock[PARITY : PARITY + 1] + 1
        inbox = _read(self.streamed_gradient)
        return list(backend.custom_gradient(_collect)(inbox, *streams, row, stamp))

    def step(self, x, carry, mask, training, time=None):
        """Normalizes one call; returns the output and the streams after it."""
        gamma, beta = self.affine(x.dtype)
        if not (training and self.trainable):
            state = self._settled()
            mean, deviation = state["long_mean"], state["long_deviation"]
            return moments.scale_shift(x, mean, 1 / deviation, gamma, beta), carry
        batch = _average(x, mask)
        mean, means = self._stream("mean", batch, carry[0], mask)
        distance = ops.abs(x - (mean if self.around == "stream" else batch))
        if mask is not None:  # what is masked may be NaN, and so would be its power
            distance = ops.where(mask, distance, ops.zeros((), x.dtype))
        power = {1.0: lambda v: v, 2.0: ops.square}.get(
            self.p, lambda v: ops.power(v, self.p)
        )
        deviation = _average(power(distance), mask) + self.epsilon
        deviation = _root(ops.maximum(deviation, moments.TINY), self.p)
        deviation, deviations = self._stream("deviation", deviation, carry[1], mask)
        y = moments.scale_shift(x, mean, 1 / deviation, gamma, beta)
        return y, [means, deviations]

    def end(self, carry, training):
        """Keeps the streams after the last call of a pass."""
        if not (training and self.trainable):
            return
        self.short_mean.assign(carry[0][:-1])
        self.short_deviation.assign(carry[1][:-1])
        clock = _read(self.clock)
        passed = [carry[0][-1:], clock[PASSES : PASSES + 1] + 1, clock[PARITY:]]
        self.clock.assign(ops.concatenate(passed))

    def _stream(self, name, now, stream, mask):
        """The mixture in use, and the stream after this call."""
        mix = _mixture(self.statistics_weights, self.gradient_weights)
        seen = moments.seen(mask, now.dtype) + ops.zeros_like(now)
        return backend.custom_gradient(mix)(
            now,
            stream,
            _read(getattr(self, f"long_{name}")),
            _read(getattr(self, f"long_{name}_gradient")),
            _read(self.clock),
            seen,
        )

    def _settled(self):
        """The state after the weight update that may have been since the last call.

        The optimizer does not tell of an update. But what it then delivers carries the
        parity of the update before, and is stale once that has been reckoned with.
        """
        clock = _read(self.clock)
        received = ops.sum(ops.stop_gradient(_read(self.streamed_gradient)), axis=0)
        *parts, count = ops.split(
            received, [k * self.long_mean.shape[0] for k in (1, 2, 3, 4)]
        )
        calls, stamps = count[0], count[1]
        stamp = stamps / ops.maximum(calls, moments.TINY)
        fresh = ops.abs(stamp - 1 - clock[PARITY]) < 0.25
        fresh = ops.logical_and(fresh, calls > 0)

        def decayed(old, new, decay, exists):
            mixed = ops.where(clock[exists] > 0.5, decay * old + (1 - decay) * new, new)
            return ops.where(fresh, mixed, old)

        state = {}
        for k, name in enumerate(("mean", "deviation")):
            old = _read(getattr(self, f"long_{name}"))
            short = _read(getattr(self, f"short_{name}"))
            new = ops.where(clock[CALLS] > 0, short, old)
            state[f"long_{name}"] = decayed(old, new, self.decay, STATISTICS)
            state[f"short_{name}"] = ops.where(fresh, ops.zeros_like(short), short)
            old = _read(getattr(self, f"long_{name}_gradient"))
            new = (parts[k] - parts[k + 2]) / ops.maximum(calls, moments.TINY)
            state[f"long_{name}_gradient"] = decayed(
                old, new, self.gradient_decay, GRADIENTS
            )
        one = ops.ones_like(calls)
        turned = ops.stack([0 * one, 0 * one, 1 - clock[PARITY], one, one])
        state["clock"] = ops.where(fresh, turned, clock)
        return state


def _read(variable):
    """The value now; `ops.convert_to_tensor` gives TensorFlow the variable itself."""
    return variable + 0


def _average(v, mask):
    """Mean over batch and positions, of what the mask lets in; `(channels,)`."""
    if mask is None and not replicas.together():
        return ops.mean(v, axis=(0, 1))
    mask = ops.broadcast_to(True if mask is None else mask, ops.shape(v))
    v = ops.where(mask, v, ops.zeros((), v.dtype))
    sums = (ops.sum(part, axis=(0, 1)) for part in (v, ops.cast(mask, v.dtype)))
    total, count = replicas.totals((0, 1), *sums)
    return total / ops.maximum(count, 1)


def _root(v, p):
    return v if p == 1 else ops.sqrt(v) if p == 2 else ops.power(v, 1 / p)


def _collect(inbox, means, deviations, row, stamp):
    """Passes the streams on; their gradients become the value of `inbox`."""

    def backward(dm, ds):
        parts = [dm[:-1], ds[:-1], -dm[:-1], -ds[:-1]]
        count = dm[-1:]
        parts = [ops.maximum(v, 0) for v in parts]
        value = row * ops.concatenate([*parts, count, count * stamp])[None]
        others = (means, deviations, row, stamp)
        return (value, *(ops.zeros_like(v) for v in others))

    return (means, deviations), backward


def _mixture(a, b):
    """`f(now, stream, long, long gradient, clock, seen) -> (in use, stream)`, where the
    gradients of the stream count calls and sum their gradients."""

    def kernel(now, stream, long, long_gradient, clock, seen):
        average, calls = stream[:-1], stream[-1]
        copies = replicas.count() if replicas.together() else 1
        now = ops.where(seen > 0, now, ops.where(calls > 0, average, long))
        any_seen = ops.max(seen)
        after = calls + any_seen
        average = average + (now - average) * any_seen / ops.maximum(after, 1)
        short = ops.where(after > 0, average, long)
        old = ops.where(clock[STATISTICS] > 0.5, long, short)
        used = a[0] * old + a[1] * short + a[2] * now

        def backward(g, later):
            if copies > 1:  # what flows back on all replicas is one gradient
                (g,) = replicas.sum_all(g)
            total, n = later[:-1] + g * any_seen, later[-1] + any_seen
            mean = total / ops.maximum(n, 1)
            past = ops.where(clock[GRADIENTS] > 0.5, long_gradient, mean)
            # Each passes on its share: the sum over replicas has a sum as gradient.
            dnow = (b[0] * past + b[1] * mean + b[2] * g) * seen / copies
            dstream = ops.concatenate([total, ops.reshape(n, (1,))])
            rest = (long, long_gradient, clock, seen)
            return (dnow, dstream, *(ops.zeros_like(v) for v in rest))

        return (used, ops.concatenate([average, ops.reshape(after, (1,))])), backward

    return kernel


@oracles.flat
def oracle(x, keep, weights, config, training):
    calls, _, parity, started, _ = weights["clock"]
    n, stamps = weights["streamed_gradient"].sum(0)[-2:]
    a = config.get("statistics_weights", (0.5, 0.5, 0.0))
    p, k = config.get("p", 2), config.get("decay", 0.7)
    updated = abs(stamps / n - (1 + parity)) < 0.25 if n > 0 else False
    used = {}
    for name in ("mean", "deviation"):
        long, short = weights[f"long_{name}"], weights[f"short_{name}"]
        count = calls
        if updated:
            long = k * long + (1 - k) * short if started > 0.5 else short
            short, count = 0 * short, 0.0
        if not training:
            used[name] = long
            continue
        if name == "mean":
            now = center = np.mean(x, (0, 1), where=keep)
        else:
            if config.get("around", "stream") == "stream":
                center = used["mean"]
            now = np.mean(np.abs(x - center) ** p, (0, 1), where=keep)
            now = (now + config.get("epsilon", 1e-3)) ** (1 / p)
        short = (count * short + now) / (count + 1)
        old = long if started > 0.5 or updated else short
        used[name] = a[0] * old + a[1] * short + a[2] * now
    return oracles.affine((x - used["mean"]) / used["deviation"], weights)


def read_own(layer):
    source = adoption.describe(layer, "streaming")
    if not layer.built:
        return source
    state = {k: ops.convert_to_numpy(v) for k, v in layer._settled().items()}
    deviation = state["long_deviation"].astype("float64")
    mean, variance = state["long_mean"], deviation**2 - layer.epsilon
    weights = {**source.weights, "mean": mean, "variance": variance}
    return dataclasses.replace(source, weights=weights)


def adopt(source, site, options):
    return moving_statistics.adopt_running(
        StreamingNormalization, source, site, options, alone=True
    )


def carry(source, layers):
    adoption.carry_affine(source, layers)
    for _, new in layers.values():
        if moving_statistics.is_running(source):
            mean, variance = moving_statistics.statistics(source, 0.0)
            adoption.assign(new.long_mean, mean)
            adoption.assign(new.long_deviation, np.sqrt(variance))
            adoption.assign(new.clock, np.eye(5)[STATISTICS])


def check_reduces_to_batch_normalization():
    """With the short-term statistics and the current gradient alone."""
    with backend.double_precision():
        rng = np.random.default_rng(0)
        x, upstream = rng.normal(2.0, 3.0, (2, 6, 3, 5))
        stock = keras.layers.BatchNormalization(dtype="float64")
        found = []
        ours = StreamingNormalization(
            statistics_weights=(0, 1, 0), gradient_weights=(0, 0, 1), dtype="float64"
        )
        for layer in (stock, ours):
            layer.build(x.shape)
            y, (dx,) = backend.vjp(
                lambda v, layer=layer: layer(v, training=True),
                [x],
                ops.convert_to_tensor(upstream),
            )
            found.append(ops.convert_to_numpy(ops.stack([y, dx])))
        np.testing.assert_allclose(*found, rtol=1e-9, atol=1e-9)


STILL = {"statistics_weights": (0, 0, 1), "gradient_weights": (0, 0, 1)}

declare(
    StreamingNormalization,
    name="streaming",
    aliases=("stream",),
    family="batch",
    paper="Liao, Kawaguchi and Poggio, 2016, arXiv:1610.06160",
    invariance="none",
    oracle=oracle,
    reads={StreamingNormalization: read_own},
    adopt=adopt,
    carry=carry,
    cases=(
        Case({}, (16, 6)),
        Case(
            {
                "around": "batch",
                "accumulation_steps": 3,
                "statistics_weights": (0.1, 0.1, 0.8),
                "epsilon": 0.1,  # a jump of 6e4 from the past must fit into float16
            },
            (5, 7, 4),
            masked=True,
        ),
        Case({"statistics_weights": (0.7, 0.2, 0.1), "p": 1, "axis": 1}, (4, 3, 5, 6)),
        Case({**STILL, "epsilon": 1e-2}, (4, 6, 5, 8), claims=False),
        Case({**STILL, "p": 3, "center": False}, (3, 2, 4, 3, 5), claims=False),
    ),
    undecided={"bounded_jacobian"},
    checks=(check_reduces_to_batch_normalization,),
)
