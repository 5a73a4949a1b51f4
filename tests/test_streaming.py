"""Streaming normalization over many steps, against a simulation in NumPy float64."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from conftest import mostly_ci
from keras import ops

from kerasnorm import recurrent
from kerasnorm.layers.streaming import StreamingNormalization
from kerasnorm.numerics import backend


CHANNELS = 3


class Simulation:
    """Liao et al. 2016 on `(rows, channels)`, calls and updates one after another."""

    def __init__(
        self, a, b, p=2.0, around="stream", k=0.7, k_gradient=0.7, epsilon=1e-3
    ):
        self.a, self.b, self.p, self.around = a, b, p, around
        self.k, self.k_gradient, self.epsilon = k, k_gradient, epsilon
        self.long, self.gradient = {}, {}
        self.seen = {"mean": [], "deviation": []}
        self.sent = {"mean": [], "deviation": []}

    def _use(self, name, now):
        self.seen[name].append(now)
        short = np.mean(self.seen[name], 0)
        long = self.long.get(name, short)
        return self.a[0] * long + self.a[1] * short + self.a[2] * now

    def _send(self, name, g, later):
        self.sent[name].append(g)
        later[name].append(g)
        short = np.mean(later[name], 0)
        long = self.gradient.get(name, short)
        return self.b[0] * long + self.b[1] * short + self.b[2] * g

    def forward(self, x):
        now = x.mean(0)
        m = self._use("mean", now)
        center = m if self.around == "stream" else now
        d = x - center
        s_now = (np.mean(np.abs(d) ** self.p, 0) + self.epsilon) ** (1 / self.p)
        s = self._use("deviation", s_now)
        return (x - m) / s, (x, m, s, d, s_now)

    def backward(self, dy, kept, later=None):
        """`later`: what the calls after this one sent in the same backward pass."""
        later = {"mean": [], "deviation": []} if later is None else later
        x, m, s, d, s_now = kept
        ds = self._send("deviation", -(dy * (x - m)).sum(0) / s**2, later)
        slope = np.abs(d) ** (self.p - 1) * np.sign(d) / s_now ** (self.p - 1)
        dx = dy / s + ds * slope / len(x)
        dcenter = -ds * slope.mean(0)
        dm = -dy.sum(0) / s
        if self.around == "stream":
            dm = self._send("mean", dm + dcenter, later)
        else:
            dm = self._send("mean", dm, later) + dcenter
        return dx + dm / len(x)

    def update(self):
        for past, recent, k in (
            (self.long, self.seen, self.k),
            (self.gradient, self.sent, self.k_gradient),
        ):
            for name in recent:
                new = np.mean(recent[name], 0)
                old = past.get(name, new)
                past[name] = k * old + (1 - k) * new
                recent[name] = []

    def infer(self, x):
        return (x - self.long["mean"]) / self.long["deviation"]


def numpy(v):
    return ops.convert_to_numpy(v)


class Trainer:
    """A layer trained by hand: gradients summed over passes, then applied."""

    def __init__(self, layer, optimizer=None):
        self.layer = layer
        self.optimizer = optimizer or keras.optimizers.SGD(0.0)
        self.optimizer.build(layer.trainable_variables)
        self.total = None

    def run(self, xs, upstreams):
        """One pass that calls the layer on every input; outputs and gradients."""
        layer, n = self.layer, len(xs)
        others = [v.value for v in layer.non_trainable_variables]
        weights = [v.value for v in layer.trainable_variables]

        def f(*values):
            state, outputs = others, []
            for x in values[:n]:
                y, state = layer.stateless_call(values[n:], state, x, training=True)
                outputs.append(y)
            return ops.concatenate(outputs)

        upstream = ops.convert_to_tensor(np.concatenate(upstreams))
        y, gradients = backend.vjp(f, [*xs, *weights], upstream)
        state = others
        for x in xs:
            _, state = layer.stateless_call(weights, state, x, training=True)
        for v, value in zip(layer.non_trainable_variables, state, strict=True):
            v.assign(value)
        self.total = self.total or [0] * len(weights)
        self.total = [t + g for t, g in zip(self.total, gradients[n:], strict=True)]
        return numpy(y), [numpy(g) for g in gradients[:n]]

    def update(self):
        self.optimizer.apply(self.total, self.layer.trainable_variables)
        self.total = None


FEED_FORWARD = {
    "statistics_weights": (0.5, 0.5, 0.0),
    "gradient_weights": (0.5, 0.5, 0.0),
}
RECURRENT = {"statistics_weights": (0.7, 0.3, 0.0), "gradient_weights": (0.7, 0.0, 0.3)}
MIXED = {"statistics_weights": (0.2, 0.3, 0.5), "gradient_weights": (0.6, 0.1, 0.4)}


def pair(config, **more):
    layer = StreamingNormalization(**config, **more, dtype="float64")
    layer.build((None, CHANNELS))
    a, b = config["statistics_weights"], config["gradient_weights"]
    names = {"decay": "k", "gradient_decay": "k_gradient"}
    known = {"p", "around", "epsilon", *names}
    more = {names.get(k, k): v for k, v in more.items() if k in known}
    return layer, Simulation(a, b, **more)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (FEED_FORWARD, {}),
        (RECURRENT, {"p": 1.0}),
        (MIXED, {"p": 3.0, "around": "batch", "decay": 0.9, "gradient_decay": 0.4}),
        (MIXED, {"epsilon": 1e-2}),
    ],
)
@pytest.mark.parametrize("rows", [4, 1])
def test_many_steps_with_streamed_gradients(config, more, rows):
    with backend.double_precision():
        rng = np.random.default_rng(0)
        layer, simulation = pair(config, **more)
        trainer = Trainer(layer)
        for step in range(4):
            passes = 1 + step % 2  # two passes before every other update
            for _ in range(passes):
                x, dy = rng.normal(1.0 + step, 2.0, (2, rows, CHANNELS))
                y, (dx,) = trainer.run([x], [dy])
                expected, kept = simulation.forward(x)
                close(y, expected)
                close(dx, simulation.backward(dy, kept))
            trainer.update()
            simulation.update()
            # Inference knows of the update at once, and changes nothing.
            close(numpy(layer(x, training=False)), simulation.infer(x))


def test_a_layer_called_twice_in_a_pass():
    with backend.double_precision():
        rng = np.random.default_rng(1)
        layer, simulation = pair(RECURRENT)
        trainer = Trainer(layer)
        for _ in range(3):
            xs, dys = rng.normal(2.0, 3.0, (2, 2, 4, CHANNELS))
            y, dxs = trainer.run(list(xs), list(dys))
            (y0, kept0), (y1, kept1) = (simulation.forward(x) for x in xs)
            close(y, np.concatenate([y0, y1]))
            close(dxs[1], simulation.backward(dys[1], kept1))
            close(dxs[0], simulation.backward(dys[0], kept0))
            trainer.update()
            simulation.update()


@pytest.mark.parametrize("unroll", [False, True])
def test_in_a_recurrent_cell_gradients_stream_backward_in_time(unroll):
    """`h = norm(x + h)` over three steps: with identity kernels and no activation."""
    with backend.double_precision():
        rng = np.random.default_rng(2)
        arguments = {**MIXED, "center": False, "scale": False}
        layer = recurrent.SimpleRNN(
            CHANNELS,
            "streaming",
            arguments,
            activation=None,
            use_bias=False,
            kernel_initializer="identity",
            recurrent_initializer="identity",
            unroll=unroll,
            dtype="float64",
        )
        layer.build((None, 3, CHANNELS))
        _, simulation = pair(MIXED)
        trainer = Trainer(layer)
        for _ in range(3):
            x = rng.normal(1.0, 2.0, (4, 3, CHANNELS))
            dy = rng.normal(size=(4, CHANNELS))
            y, (dx,) = trainer.run([x], [dy])
            h, kept = np.zeros((4, CHANNELS)), []
            for t in range(3):
                h, k = simulation.forward(x[:, t] + h)
                kept.append(k)
            close(y, h)
            expected, g = np.empty_like(x), dy
            later = {"mean": [], "deviation": []}
            for t in (2, 1, 0):
                g = simulation.backward(g, kept[t], later)
                expected[:, t] = g
            close(dx, expected)
            trainer.update()
            simulation.update()
            found = numpy(layer.cell.state_norm._settled()["long_mean_gradient"])
            close(found, simulation.gradient["mean"])


def test_current_statistics_have_the_true_gradient():
    with backend.double_precision():
        rng = np.random.default_rng(3)
        config = {"statistics_weights": (0, 0, 1), "gradient_weights": (0, 0, 1)}
        layer = StreamingNormalization(**config, p=3, dtype="float64")
        x, dy, direction = rng.normal(2.0, 3.0, (3, 5, CHANNELS))

        layer.build(x.shape)
        weights, others = layer.trainable_variables, layer.non_trainable_variables
        state = [v.value for v in weights], [v.value for v in others]

        def f(v):
            v = ops.convert_to_tensor(v)
            return layer.stateless_call(*state, v, training=True)[0]

        _, (dx,) = backend.vjp(f, [x], ops.convert_to_tensor(dy))
        ends = [np.vdot(numpy(f(x + e * direction)), dy) for e in (1e-6, -1e-6)]
        slope = np.vdot(numpy(dx), direction)
        assert abs((ends[0] - ends[1]) / 2e-6 - slope) < 1e-6 * (1 + abs(slope))


def network(**config):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(CHANNELS),
            StreamingNormalization(**config),
            keras.layers.Dense(1),
        ]
    )


OPTIMIZERS = {
    "sgd": lambda **k: keras.optimizers.SGD(0.05, **k),
    "adamw": lambda **k: keras.optimizers.AdamW(
        0.01, weight_decay=0.1, global_clipnorm=0.1, **k
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("jit", mostly_ci([False, True], [False]))
def test_fit_streams_as_simulated(optimizer, jit):
    """The statistics that `fit` leaves behind, with weights that move."""
    rng = np.random.default_rng(4)
    x = rng.normal(1.0, 2.0, (12, 4)).astype("float32")
    y = x[:, :1]
    model = network(**FEED_FORWARD)
    model.compile(OPTIMIZERS[optimizer](), "mse", jit_compile=jit)
    simulation = Simulation(*FEED_FORWARD.values())
    for _ in range(3):
        for k in range(0, 12, 4):
            simulation.forward(numpy(model.layers[0](x[k : k + 4])).astype("float64"))
            simulation.sent = {"mean": [0], "deviation": [0]}
            model.fit(x[k : k + 4], y[k : k + 4], batch_size=4, verbose=0)
            simulation.update()
    norm = model.layers[1]
    state = {k: numpy(v) for k, v in norm._settled().items()}
    for name in ("mean", "deviation"):
        expected = simulation.long[name]
        np.testing.assert_allclose(state[f"long_{name}"], expected, rtol=1e-4)
    assert np.abs(state["long_mean_gradient"]).max() > 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accumulated_passes_are_one_update(optimizer):
    """Two passes accumulated by the optimizer are two passes summed by hand."""
    rng = np.random.default_rng(5)
    x = rng.normal(1.0, 2.0, (8, 4)).astype("float32")
    model = network(**RECURRENT, accumulation_steps=2)
    model.compile(
        OPTIMIZERS[optimizer](gradient_accumulation_steps=2), "mse", jit_compile=False
    )
    hidden = [numpy(model.layers[0](x[k : k + 2])) for k in range(0, 8, 2)]
    norm = model.layers[1]
    gradients = []
    for k in (0, 1):
        model.fit(x[2 * k : 2 * k + 2], x[2 * k : 2 * k + 2, :1], verbose=0)
        received = numpy(norm.streamed_gradient)
        gradients.append(received.sum())
    assert gradients[0] == 0 and received[:, -2].tolist() == [1, 1]
    simulation = Simulation(*RECURRENT.values())
    simulation.forward(hidden[0])
    simulation.forward(hidden[1])
    simulation.sent = {"mean": [0], "deviation": [0]}
    simulation.update()
    state = norm._settled()
    for name in ("mean", "deviation"):
        np.testing.assert_allclose(
            numpy(state[f"long_{name}"]), simulation.long[name], rtol=1e-4, atol=1e-6
        )
    clock = numpy(norm.clock)
    assert clock[0] == 2 and numpy(state["clock"])[0] == 0
    model.fit(x[4:6], x[4:6, :1], verbose=0)
    assert numpy(norm.clock)[:3].tolist() == [1, 1, 1]
    # What the update delivered is stale now; nothing is counted twice.
    model.fit(x[6:8], x[6:8, :1], verbose=0)
    assert numpy(norm.clock)[:3].tolist() == [2, 2, 1]
    assert numpy(norm._settled()["clock"])[:3].tolist() == [0, 0, 0]


def test_training_resumes_exactly(tmp_path):
    x = np.random.default_rng(6).normal(1.0, 2.0, (16, 4)).astype("float32")
    model = network()
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", jit_compile=False)
    model.fit(x, x[:, :1], batch_size=4, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for m in (model, again):
        m.fit(x, x[:, :1], batch_size=4, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.ci
def test_batch_size_one_learns_where_batch_normalization_cannot():
    """Online learning: a vector at a time has no statistics of its own."""
    rng = np.random.default_rng(7)
    x = rng.normal(1.0, 2.0, (128, 4)).astype("float32")
    y = (x @ [[1.0], [-1.0], [0.5], [0.0]]).astype("float32")
    steps, losses = 16, {}
    for name, norm in (
        ("batch", keras.layers.BatchNormalization()),
        ("streaming", StreamingNormalization(**RECURRENT, accumulation_steps=steps)),
    ):
        keras.utils.set_random_seed(0)
        layers = [keras.Input((4,)), keras.layers.Dense(8), norm, keras.layers.Dense(1)]
        model = keras.Sequential(layers)
        optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=steps)
        # Two thousand steps, one operation at a time, take minutes on JAX.
        compiled = keras.backend.backend() == "jax"
        model.compile(optimizer, "mse", jit_compile=compiled)
        model.fit(x, y, batch_size=1, epochs=8, verbose=0)
        losses[name] = model.evaluate(x, y, verbose=0)
    assert losses["streaming"] < 0.1 * y.var() < y.var() < losses["batch"], losses


@pytest.mark.parametrize(
    "wrong",
    [
        {"p": 0.5},
        {"statistics_weights": (0.5, 0.4, 0.0)},
        {"gradient_weights": (0.5, 0.5)},
        {"gradient_weights": (0.5, -0.5, 1)},
        {"decay": 1.2},
        {"around": "nothing"},
        {"accumulation_steps": 0},
    ],
)
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match="cannot use this"):
        StreamingNormalization(**wrong)
