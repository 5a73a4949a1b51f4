"""Normalized recurrent cells: equations, and everything a Keras layer does."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from conftest import mostly_ci, require_shared
from keras import ops

import kerasnorm
import rewriters
from kerasnorm import recurrent
from kerasnorm.method.registry import Reason
from kerasnorm.numerics import backend
from kerasnorm.recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, SimpleRNN


LAYERS = {"lstm": LSTM, "gru": GRU, "simple": SimpleRNN}
SEQUENCE = {
    "streaming": {"norm": "streaming"},
    "time": {"norm": "time_specific", "norm_arguments": {"max_steps": 3}},
}
X = np.random.default_rng(0).normal(size=(4, 5, 3)).astype("float32")
MASK = np.array([list(row) for row in ("11111", "11100", "10000", "01101")]) == "1"
# Tracing the loops of recurrent layers takes longer than anything else here.
EAGERLY = pytest.mark.parametrize(
    "eagerly", [True, pytest.param(False, marks=pytest.mark.slow)]
)


def randomize(layer, seed=1):
    rng = np.random.default_rng(seed)
    for v in layer.trainable_variables:
        if not v.overwrite_with_gradient:
            v.assign(rng.normal(0.3, 0.7, v.shape))
    return layer


def made(kind, *args, **kwargs):
    layer = LAYERS[kind](4, *args, **kwargs)
    layer.build((None, 5, 3))
    return randomize(layer)


def numpy(v):
    return ops.convert_to_numpy(v)


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def ln(v, norm):
    v = v - v.mean(-1, keepdims=True)
    v = v / np.sqrt((v**2).mean(-1, keepdims=True) + norm.epsilon)
    return v * numpy(norm.gamma) + numpy(norm.beta)


def reference(layer, x, mask=None):
    """The equations of Ba et al. in float64; final output."""
    cell = layer.cell
    w, u, b = (numpy(v).astype("float64") for v in cell.get_weights()[:3])
    n, x = cell.units, x.astype("float64")
    h = c = np.zeros((len(x), n))
    for t in range(x.shape[1]):
        if isinstance(cell, LSTMCell):
            z = ln(x[:, t] @ w, cell.kernel_norm) + ln(h @ u, cell.recurrent_norm) + b
            i, f, g, o = np.split(z, 4, -1)
            new_c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            shown = new_c
            if cell.cell_state is not None:
                shown = ln(new_c, cell.state_norm)
            if cell.cell_state == "carry":
                new_c = shown
            new_h = sigmoid(o) * np.tanh(shown)
        elif isinstance(cell, GRUCell):
            bx, bh = b if cell.reset_after else (b, 0 * b)
            z = ln(x[:, t] @ w[:, : 2 * n], cell.kernel_norm)
            z = z + ln(h @ u[:, : 2 * n], cell.recurrent_norm) + (bx + bh)[: 2 * n]
            z, r = np.split(sigmoid(z), 2, -1)
            g = ln(x[:, t] @ w[:, 2 * n :], cell.candidate_kernel_norm) + bx[2 * n :]
            inner = (h if cell.reset_after else r * h) @ u[:, 2 * n :]
            inner = ln(inner, cell.candidate_recurrent_norm)
            g = np.tanh(g + (r * (inner + bh[2 * n :]) if cell.reset_after else inner))
            new_h, new_c = z * h + (1 - z) * g, c
        else:
            new_h, new_c = np.tanh(ln(x[:, t] @ w + h @ u, cell.state_norm) + b), c
        keep = np.ones((len(x), 1), bool) if mask is None else mask[:, t, None]
        h, c = np.where(keep, new_h, h), np.where(keep, new_c, c)
    return h


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("lstm", {}),
        ("lstm", {"cell_state": "carry", "norm_arguments": {"epsilon": 1e-5}}),
        ("lstm", {"cell_state": None}),
        ("gru", {}),
        ("gru", {"reset_after": False}),
        ("simple", {}),
    ],
)
@pytest.mark.parametrize("mask", [None, MASK], ids=["", "mask"])
def test_equations(kind, arguments, mask, tolerance):
    layer = made(kind, "ln", **arguments)
    y = numpy(layer(X, mask=mask))
    np.testing.assert_allclose(y, reference(layer, X, mask), **tolerance())


@pytest.mark.parametrize("norm", ["rms", "group"])
def test_per_sample_methods(norm):
    arguments = {"groups": 2} if norm == "group" else {}
    layer = made("lstm", norm, norm_arguments=arguments)
    y = numpy(layer(X, training=True))
    alone = np.concatenate([numpy(layer(X[k : k + 1])) for k in range(4)])
    np.testing.assert_allclose(y, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "weight", "none", "nothing"])
def test_other_methods_are_refused(norm):
    with pytest.raises(kerasnorm.KerasNormError):
        LSTMCell(4, norm)


def test_arguments_that_no_norm_takes_are_refused():
    for arguments in ({"epsilonn": 1}, {"name": "norm"}):
        with pytest.raises(kerasnorm.KerasNormError, match="refuses its arguments"):
            LSTM(4, norm_arguments=arguments)


@pytest.mark.parametrize("kind", LAYERS)
def test_zero_dropout_rates_and_masks(kind):
    """Dropout drops in training alone, one mask for all steps of a sequence."""
    plain = made(kind, "ln")
    layer = made(kind, "ln", dropout=0.5, recurrent_dropout=0.5, seed=3)
    np.testing.assert_allclose(numpy(layer(X)), numpy(plain(X)), rtol=1e-5, atol=1e-6)
    dropped = numpy(layer(X, training=True))
    assert np.abs(dropped - numpy(plain(X))).max() > 1e-2
    assert np.isfinite(dropped).all()
    inputs = made(kind, "ln", dropout=0.5, seed=3)
    assert np.abs(numpy(inputs(X, training=True)) - numpy(plain(X))).max() > 1e-2


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("sequence", mostly_ci([None, *SEQUENCE], [None]))
def test_loops_agree(kind, sequence):
    """Unrolled or not, whole sequence or last output, plain graph and XLA."""
    arguments = SEQUENCE.get(sequence, {})
    mask = MASK
    layer = made(kind, **arguments)
    values = layer.get_weights()

    def run(**more):
        other = made(kind, **arguments, **more)
        other.set_weights(values)
        outputs = []
        for training in (True, False):  # the second sees the statistics of the first
            y = other(X, mask=mask, training=training)
            outputs.append([numpy(v) for v in keras.tree.flatten(y)])
        return outputs, other.get_weights()

    (first, second), state = run()
    (unrolled, later), unrolled_state = run(unroll=True)
    np.testing.assert_allclose(unrolled[0], first[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(later[0], second[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(state, unrolled_state, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    (whole, _), _ = run(return_sequences=True, return_state=True)
    np.testing.assert_allclose(whole[0][:, -1], first[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole[1], first[0], rtol=1e-4, atol=1e-5)
    assert len(whole) == (3 if kind == "lstm" else 2)
    # Where a step is masked the last output stays.
    np.testing.assert_array_equal(whole[0][1, 3:], whole[0][1, [2, 2]])

    other = made(kind, **arguments)
    other.set_weights(values)
    others = [v.value for v in other.non_trainable_variables]

    def f(x):
        weights = [v.value for v in other.trainable_variables]
        return other.stateless_call(weights, others, x, mask=mask, training=True)[0]

    for jit in (False, True):
        y = backend.compiled(f, jit)(ops.convert_to_tensor(X))
        np.testing.assert_allclose(numpy(y), first[0], rtol=1e-4, atol=1e-5)


@EAGERLY
@pytest.mark.parametrize("sequence", mostly_ci([None, *SEQUENCE], [None]))
def test_backwards_bidirectional_stateful_and_saving(sequence, eagerly, tmp_path):
    arguments = SEQUENCE.get(sequence, {})
    layer = made("lstm", **arguments, go_backwards=True)
    forward = made("lstm", **arguments)
    np.testing.assert_allclose(
        numpy(layer(X)), numpy(forward(X[:, ::-1])), rtol=1e-5, atol=1e-6
    )
    stateful = LSTM(4, **arguments, stateful=True)
    half = keras.Sequential([keras.Input(batch_shape=(4, 5, 3)), stateful])
    for v, w in zip(stateful.cell.variables, forward.cell.variables, strict=True):
        v.assign(w)
    if sequence != "time":  # whose time starts anew with each call
        half(X)
        twice = numpy(half(X))
        both = np.concatenate([X, X], 1)
        np.testing.assert_allclose(twice, numpy(forward(both)), rtol=1e-4, atol=1e-5)

    model = keras.Sequential(
        [
            keras.Input((5, 3)),
            keras.layers.Masking(),
            keras.layers.Bidirectional(LSTM(4, **arguments, return_sequences=True)),
            GRU(3, **arguments, reset_after=False),
            keras.layers.Dense(2),
        ]
    )
    model.compile("adam", "mse", run_eagerly=eagerly, jit_compile=False)
    x = np.where(MASK[..., None], X, 0)
    model.fit(x, np.ones((4, 2)), epochs=2, verbose=0)
    y = numpy(model(x))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(again(x)), y)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
@pytest.mark.parametrize("sequence", [None, *SEQUENCE])
def test_dtype_policies(policy, sequence):
    arguments = SEQUENCE.get(sequence, {})
    exact = made("gru", **arguments)
    with backend.double_precision():
        layer = made("gru", **arguments, dtype=policy)
        y = layer(X, training=True)
        assert policy.endswith(keras.backend.standardize_dtype(y.dtype))
        y = numpy(ops.cast(y, "float32"))
    tolerance = {"mixed_float16": 1e-2, "mixed_bfloat16": 1e-1, "float64": 1e-4}[policy]
    np.testing.assert_allclose(y, numpy(exact(X, training=True)), atol=tolerance)


def test_a_sequence_norm_needs_its_layer():
    x = ops.convert_to_tensor(X)
    layer = keras.layers.RNN(GRUCell(4, "streaming"))
    with pytest.raises(kerasnorm.KerasNormError, match=r"kerasnorm\.recurrent"):
        layer(x, training=True)
    stock = keras.layers.RNN(GRUCell(4))
    own = RNN(GRUCell(4))
    for made_layer in (stock, own):
        made_layer.build(X.shape)
        randomize(made_layer)
    np.testing.assert_array_equal(numpy(stock(x)), numpy(own(x)))


@pytest.mark.parametrize("sequence", SEQUENCE)
@pytest.mark.parametrize("unroll", [False, True])
def test_before_the_first_step_that_counts_outputs_are_zero(sequence, unroll):
    layer = made("lstm", **SEQUENCE[sequence], return_sequences=True, unroll=unroll)
    start = [np.full((4, 4), 0.5, "float32")] * 2
    mask = MASK.copy()
    mask[2] = False
    y = numpy(layer(X, mask=mask, initial_state=start))
    np.testing.assert_array_equal(y[2], 0)
    np.testing.assert_array_equal(y[3, 0], 0)
    np.testing.assert_array_equal(y[3, 3], y[3, 2])
    assert (y[3, 1] != 0).all()


def test_time_specific_statistics_are_those_of_each_step():
    """Cooijmans et al.: the input projection's statistics of step t land in row t."""
    arguments = {"max_steps": 3, "momentum": 0.0, "epsilon": 1e-5}
    layer = made("lstm", "time_specific", norm_arguments=arguments)
    layer(X, training=True, mask=MASK)
    projected = X @ numpy(layer.cell.kernel)
    norm = layer.cell.kernel_norm
    for t in range(3):
        seen = projected[MASK[:, t], t]
        np.testing.assert_allclose(
            numpy(norm.moving_mean)[t], seen.mean(0), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            numpy(norm.moving_variance)[t], seen.var(0), rtol=1e-4, atol=1e-5
        )


def test_streaming_statistics_average_all_steps():
    layer = made("simple", "streaming", norm_arguments={"around": "batch"})
    layer(X, training=True, mask=MASK)
    norm = layer.cell.state_norm
    assert numpy(norm.clock)[:2].tolist() == [5, 1]
    first = made("lstm", "streaming", norm_arguments={"around": "batch"})
    first(X, training=True, mask=MASK)
    projected = X @ numpy(first.cell.kernel)
    means = [projected[MASK[:, t], t].mean(0) for t in range(5)]
    found = numpy(first.cell.kernel_norm.short_mean)
    np.testing.assert_allclose(found, np.mean(means, 0), rtol=1e-4, atol=1e-5)


def test_addons_cells_are_these():
    folder = require_shared("models/generated/tfa_layer_norm_lstm")
    golden = np.load(folder / "golden.npz")
    for file in ("model.h5", "model.keras", "model_savedmodel"):
        model = kerasnorm.load(folder / file)
        y = numpy(model(golden["x0"]))
        expected = golden["y0"]
        assert np.abs(y - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
        cells = {type(s.layer) for s in rewriters.sites(model)}
        assert {LSTMCell, recurrent.SimpleRNNCell} <= cells


@pytest.mark.ci
@EAGERLY
@pytest.mark.parametrize("norm", ["ln", "streaming"])
def test_cells_of_a_trained_model_are_normalized(norm, eagerly, tmp_path):
    inputs = keras.Input((5, 3))
    x = keras.layers.Bidirectional(
        keras.layers.LSTM(4, return_sequences=True, name="l"), name="both"
    )(inputs)
    x = keras.layers.GRU(3, name="gru", return_sequences=True)(x)
    x = keras.layers.SimpleRNN(3, name="simple")(x)
    model = keras.Model(inputs, keras.layers.Dense(1, name="out")(x))
    model.compile("adam", "mse", run_eagerly=eagerly, jit_compile=False)
    model.fit(X, X[:, 0, :1], verbose=0)
    before = model.get_weights()
    new = kerasnorm.rewrite(model, norm, cells=True)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    both, gru = new.get_layer("both"), new.get_layer("gru")
    assert type(both.forward_layer) is LSTM and type(both.backward_layer) is LSTM
    assert type(gru) is GRU and type(new.get_layer("simple")) is SimpleRNN
    old = model.get_layer("both")
    for ours, theirs in (
        (both.forward_layer, old.forward_layer),
        (both.backward_layer, old.backward_layer),
        (gru, model.get_layer("gru")),
    ):
        for name in ("kernel", "recurrent_kernel", "bias"):
            np.testing.assert_array_equal(
                numpy(getattr(ours.cell, name)), numpy(getattr(theirs.cell, name))
            )
    new.fit(X, X[:, 0, :1], verbose=0)
    new.save(tmp_path / "new.keras")
    again = keras.models.load_model(tmp_path / "new.keras")
    np.testing.assert_array_equal(numpy(again(X)), numpy(new(X)))
    only = kerasnorm.rewrite(model, norm, where="gru", cells=True)
    assert type(only.get_layer("simple")) is keras.layers.SimpleRNN
    with pytest.raises(kerasnorm.KerasNormError, match="no layer that could be"):
        kerasnorm.plan(model, norm, where="gru")
    plan = kerasnorm.plan(model, norm, cells={"cell_state": "carry"})
    assert len(plan.steps) == 4 and kerasnorm.Plan.from_json(plan.to_json()) == plan
    carried = kerasnorm.rewrite(model, plan)
    assert carried.get_layer("both").forward_layer.cell.cell_state == "carry"
    with pytest.raises(kerasnorm.KerasNormError, match="cell takes"):
        kerasnorm.plan(model, norm, cells={"cellstate": "carry"})
    refused = kerasnorm.plan(model, "batch", cells=True).refused
    assert len(refused) == 4
    if norm == "ln" or not eagerly:
        fitted = kerasnorm.rewrite(model, norm, cells=True, data=X, fit="distill")
        assert np.isfinite(numpy(fitted(X))).all()


@keras.saving.register_keras_serializable("test_recurrent")
class Leak(keras.layers.Layer):
    """A cell of one's own, which has no normalized twin."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = self.output_size = units
        self.dense = keras.layers.Dense(units)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs, states):
        h = 0.5 * states[0] + self.dense(inputs)
        return h, [h]

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def test_rewrite_of_layers_around_cells(tmp_path):
    layers = keras.layers
    inputs = keras.Input((5, 3))
    stack = [layers.LSTMCell(4), Leak(3), layers.GRUCell(4, reset_after=False)]
    x = layers.RNN(stack, return_sequences=True, name="stack")(inputs)
    both = layers.Bidirectional(layers.RNN(layers.LSTMCell(2), return_sequences=True))
    x = layers.RNN(layers.SimpleRNNCell(4), name="alone")(both(x))
    model = keras.Model(inputs, x)
    before = [numpy(w) for w in model.weights]
    new = kerasnorm.rewrite(model, "ln", cells={"cell_state": "carry"})
    old_cells, cells = (m.get_layer("stack").cell.cells for m in (model, new))
    kinds = [type(c) for c in cells]
    assert kinds == [kerasnorm.recurrent.LSTMCell, Leak, kerasnorm.recurrent.GRUCell]
    assert cells[0].cell_state == "carry"
    for old, cell in zip(old_cells, cells, strict=True):
        found = {v.name: numpy(v) for v in cell.weights}
        for v in old.weights:
            np.testing.assert_array_equal(found[v.name], numpy(v))
    np.testing.assert_array_equal(
        numpy(new.get_layer("alone").cell.kernel),
        numpy(model.get_layer("alone").cell.kernel),
    )
    for ours, theirs in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(ours, numpy(theirs))
    new.compile("adam", "mse", jit_compile=False)
    new.fit(X, X[:, 0, :1] + np.zeros((1, 4), "float32"), verbose=0)
    new.save(tmp_path / "new.keras")
    again = keras.models.load_model(tmp_path / "new.keras")
    np.testing.assert_array_equal(numpy(again(X)), numpy(new(X)))
    followed = kerasnorm.plan(model, "streaming", cells=True)
    assert [r.path for r in followed.refused] == ["stack"]
    assert len(followed.steps) == 3
    kerasnorm.rewrite(model, followed)(X)
    movie = keras.Sequential([keras.Input((5, 4, 4, 1)), layers.ConvLSTM2D(2, 3)])
    for other in (movie, keras.Sequential([inputs, layers.RNN(Leak(2))])):
        plan = kerasnorm.plan(other, "ln", cells=True)
        assert not plan.steps and "no normalized" in plan.refused[0].detail


@pytest.mark.parametrize("kind", SEQUENCE)
def test_masked_sequences_of_any_length(kind):
    inputs = keras.Input((None, 3))
    layer = LSTM(4, **SEQUENCE[kind], return_sequences=True)
    model = keras.Model(inputs, layer(keras.layers.Masking()(inputs)))
    whole = np.where(MASK[..., None], X, 0).astype("float32")
    alone = model(whole[:2, :3])
    # Lengths that differ make the time axis unknown to the compiled function.
    for length in (5, 3, 4):
        found = model.predict(whole[:2, :length], verbose=0)
        assert found.shape == (2, length, 4)
    np.testing.assert_allclose(
        model.predict(whole[:2, :3], verbose=0), alone, rtol=1e-5, atol=1e-6
    )


def rnn(cells, name):
    return keras.layers.RNN(cells, return_sequences=True, name=name)


def test_a_plan_for_cells_can_be_carried_out_again():
    inputs = keras.Input((5, 3))
    model = keras.Sequential([inputs, rnn([keras.layers.LSTMCell(4)] * 1, "a")])
    for method in ("ln", "wn"):
        plan = kerasnorm.plan(model, method, cells=method == "ln")
        text = plan.to_json()
        kerasnorm.rewrite(model, plan)
        kerasnorm.rewrite(model, plan)
        assert plan.to_json() == text


def test_cells_that_stay():
    layers, inputs = keras.layers, keras.Input((5, 4))
    cell = layers.LSTMCell(4)
    shared = keras.Sequential([inputs, rnn(cell, "a"), rnn(cell, "b")])
    plan = kerasnorm.plan(shared, "ln", cells=True)
    assert {r.reason for r in plan.refused} == {Reason.SHARED} and not plan.steps
    for units, method, reason in (
        (1, "ln", Reason.DEGENERATE),
        (4, "in", Reason.NO_RULE),
        (4, "time_specific", Reason.NO_RULE),
    ):
        for layer in (layers.GRU(units), layers.RNN(layers.GRUCell(units))):
            plan = kerasnorm.plan(keras.Sequential([inputs, layer]), method, cells=True)
            assert [r.reason for r in plan.refused] == [reason]
            assert not plan.steps
    own = keras.Sequential([inputs, layers.LSTM(4, activation=lambda x: x)])
    with pytest.warns(UserWarning, match="lambda"):  # Keras's
        assert not kerasnorm.plan(own, "ln", cells=True).steps
    groups = kerasnorm.rewrite(
        keras.Sequential([inputs, layers.LSTM(12)]), "gn", cells=True
    )
    assert groups.layers[0].cell.norm_arguments == {"groups": 2}


@pytest.mark.parametrize("what", ["layer", "cell", "stacked"])
def test_what_is_frozen_stays_frozen(what):
    layers, inputs = keras.layers, keras.Input((5, 3))
    layer = layers.LSTM(4) if what != "stacked" else rnn([layers.LSTMCell(4)] * 1, "a")
    model = keras.Sequential([inputs, layer, layers.Dense(1)])
    (layer.cell if what == "cell" else layer).trainable = False
    new = kerasnorm.rewrite(model, "ln", cells=True)
    assert len(new.trainable_variables) == len(model.trainable_variables) == 2
