"""When a program is compiled through XLA, and how often."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import kerasnorm
from kerasnorm import adversarial
from kerasnorm.callbacks import AdversarialEvaluation, PropertyMonitor
from kerasnorm.common import data
from kerasnorm.common.errors import KerasNormError
from kerasnorm.fitting import distill
from kerasnorm.numerics import moments
from kerasnorm.properties import measure
from kerasnorm.runtime import compilation


layers = keras.layers
ON_JAX = keras.backend.backend() == "jax"
tensorflow_only = pytest.mark.skipif(ON_JAX, reason="JAX compiles everything")


@pytest.fixture(autouse=True)
def _unchosen(monkeypatch):
    """What a test chooses ends with it."""
    monkeypatch.delenv(compilation.VARIABLE, raising=False)
    with kerasnorm.jit("auto"):
        yield


@pytest.fixture
def accelerated(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(compilation, "_accelerated", lambda: True)


def dense(last="linear"):
    inputs = keras.Input((6,))
    x = layers.BatchNormalization()(layers.Dense(8)(inputs))
    return keras.Model(inputs, layers.Dense(3, activation=last)(layers.ReLU()(x)))


def recurrent():
    inputs = keras.Input((5, 4))
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(inputs)
    return keras.Model(inputs, layers.Dense(3)(layers.GRU(4)(x)))


def around_a_recurrent_layer():
    inputs = keras.Input((5, 4))
    x = layers.BatchNormalization()(layers.Dense(4)(inputs))
    return keras.Model(inputs, layers.Dense(3)(layers.LSTM(4)(x)))


class Unknown(layers.Layer):
    """An operation that XLA has no kernel for."""

    def call(self, x):
        import tensorflow as tf

        return x + tf.stop_gradient(0.0 * tf.math.reduce_euclidean_norm(x))

    def compute_output_shape(self, shape):
        return shape


def same(site, other, *names):
    """Whether two measured sites agree; the output has no gradient of its own."""
    for name in names:
        a, b = getattr(site, name), getattr(other, name)
        assert (a is None) == (b is None), name
        assert a is None or a == pytest.approx(b, rel=1e-4, abs=1e-6), name


def test_the_nearest_choice_decides(monkeypatch):
    assert compilation.mode() == "auto"
    with kerasnorm.jit(True):
        assert compilation.compiles()
        assert not compilation.compiles(wanted=False)
        kerasnorm.jit(False)
        assert not compilation.compiles()
        assert compilation.compiles(wanted=True)
    assert compilation.mode() == "auto"
    monkeypatch.setattr(compilation, "_chosen", [])
    for word, expected in (("0", False), ("TRUE", True), ("auto", "auto")):
        monkeypatch.setenv(compilation.VARIABLE, word)
        assert compilation.mode() == expected


def test_unknown_choices_are_errors(monkeypatch):
    with pytest.raises(KerasNormError, match="'always'"):
        kerasnorm.jit("always")
    assert compilation.mode() == "auto"
    monkeypatch.setattr(compilation, "_chosen", [])
    monkeypatch.setenv(compilation.VARIABLE, "maybe")
    with pytest.raises(KerasNormError, match="'maybe'"):
        compilation.compiles()


@tensorflow_only
def test_auto_follows_the_device_and_the_model(monkeypatch, accelerated):
    assert compilation.compiles(dense(), recurrent())
    strings = keras.Sequential([layers.Hashing(3)])
    assert not compilation.compiles(dense(), strings)
    monkeypatch.setattr(compilation, "_accelerated", lambda: False)
    assert not compilation.compiles(dense())


@pytest.mark.ci
@tensorflow_only
def test_recurrent_layers_compile_without_their_kernel(rng, accelerated):
    model = recurrent()
    cells = [x for x in model._flatten_layers() if hasattr(x, "use_cudnn")]
    before = [x.use_cudnn for x in cells]
    seen = []
    for cell in cells:
        inner = cell.inner_loop
        cell.inner_loop = lambda *args, c=cell, f=inner, **kw: (
            seen.append(c.use_cudnn) or f(*args, **kw)
        )
    x = rng.random((20, 5, 4), "float32")
    y = model.predict(x, verbose=0).argmax(1)
    seen.clear()
    attack = adversarial.bim(steps=3)  # draws no numbers, which XLA draws its own way
    run = adversarial.Evaluator(model, attack, eps=0.3)
    found = run(x, y)
    # A look at two rows is taken step by step; then programs are traced.
    assert False in seen and not any(seen[seen.index(False) :])
    assert [x.use_cudnn for x in cells] == before
    assert all(r._step.jit for r in run._runners.values())
    plain = adversarial.evaluate(model, x, y, attack, eps=0.3, jit=False)
    assert found.robust_accuracy == plain.robust_accuracy


@tensorflow_only
def test_what_xla_refuses_goes_on_without(rng, accelerated):
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(3)(Unknown()(inputs)))
    x = rng.random((20, 6), "float32")
    y = model.predict(x, verbose=0).argmax(1)
    pgd = adversarial.pgd(steps=3)
    found = adversarial.evaluate(model, x, y, pgd, eps=0.3)
    plain = adversarial.evaluate(model, x, y, pgd, eps=0.3, jit=False)
    assert found.robust_accuracy == plain.robust_accuracy
    import tensorflow as tf

    with kerasnorm.jit(True), pytest.raises(tf.errors.InvalidArgumentError):
        adversarial.evaluate(model, x, y, pgd, eps=0.3)


@pytest.mark.parametrize("mode", ["auto", True])
def test_three_epochs_of_two_attacks_compile_each_once(rng, mode):
    """With points that fill no batch, and others that fall in each epoch."""
    model = dense()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = rng.random((45, 6), "float32"), rng.integers(0, 3, 45)
    attacks = [adversarial.pgd(steps=3), adversarial.apgd("ce", steps=3)]
    watch = AdversarialEvaluation(x, y, attacks=attacks, eps=0.1, batch_size=32)
    with kerasnorm.jit(mode):
        model.fit(x, y, epochs=3, verbose=0, callbacks=[watch])
    assert len(watch.history) == 3
    assert set(watch._evaluator.traces.values()) == {1}
    assert len(watch._evaluator.traces) == 2
    programs = watch._evaluator._forward["plain"]
    assert programs.traces == 1


def test_a_monitor_compiles_once_and_reads_the_weights_anew(rng):
    model = dense()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = rng.random((40, 6), "float32"), rng.integers(0, 3, 40)
    monitor = PropertyMonitor(x[:24], y[:24], batch_size=8)
    norm = model.layers[2]

    class Disturbed(keras.callbacks.Callback):
        """No kernel, so it is no gradient that is asked for."""

        def on_epoch_begin(self, epoch, logs=None):
            norm.gamma.assign(norm.gamma * 3.0)

    with kerasnorm.jit(True):
        model.fit(x, y, epochs=3, verbose=0, callbacks=[Disturbed(), monitor])
        last = measure(model, x[:24], y[:24], batch_size=8)
    assert monitor._measurer._run.traces == 1
    assert len(monitor.history) == 3
    found = monitor.history[-1][1]
    for mine, anew in zip(found.sites, last.sites, strict=True):
        same(mine, anew, "variance", "gradient", "dependence")
    first = monitor.history[0][1].sites[-1].variance
    assert found.sites[-1].variance > 2 * first


@tensorflow_only
def test_measurements_are_the_same_compiled(rng):
    model = dense("softmax")
    x, y = rng.random((16, 6), "float32"), rng.integers(0, 3, 16)
    found = []
    for mode in (False, True):
        with kerasnorm.jit(mode):
            found.append(measure(model, x, y, batch_size=8))
    for plain, compiled in zip(found[0].sites, found[1].sites, strict=True):
        assert plain.path == compiled.path
        same(plain, compiled, "variance", "cosine", "gradient", "weight_gradient")
        same(plain, compiled, "dependence")


def test_batches_of_a_fit_are_of_one_size(rng):
    x = np.arange(23, dtype="float32")[:, None]
    batches = distill._Batches(data.Inputs([x], 0), 8, seed=0)
    for _ in range(2):
        found = [batches[k][0][0] for k in range(len(batches))]
        assert [len(v) for v in found] == [8, 8, 8]
        assert set(np.concatenate(found)[:, 0]) == set(range(23))
        batches.on_epoch_end()


@pytest.mark.parametrize(
    ("mode", "make"),
    [
        (False, dense),
        pytest.param(True, around_a_recurrent_layer, marks=pytest.mark.ci),
    ],
)
def test_a_fit_compiles_as_chosen(rng, mode, make, monkeypatch):
    seen = []
    fit = distill.Pupil.fit

    def noted(self, *args, **kwargs):
        seen.append(self.jit_compile)
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(distill.Pupil, "fit", noted)
    model = make()
    x = rng.random((8, *model.input_shape[1:]), "float32")
    new = kerasnorm.rewrite(model, "ln")
    with kerasnorm.jit(mode):
        distill.distill(model, new, [], data.Inputs([x], 0), epochs=1, batch_size=8)
    assert seen == [mode]


def test_positions_without_statistics_of_their_own_keep_their_digits(rng):
    """The mean and variance of a matrix product, at 1000 deviations from 0."""
    x = rng.normal(1000, 1, (3, 50, 4)).astype("float32")
    mean, variance = moments.moments(keras.ops.convert_to_tensor(x), (1,))
    exact = x.astype("float64")
    np.testing.assert_allclose(mean, exact.mean(1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(variance, exact.var(1, keepdims=True), rtol=1e-4)


def test_jit_takes_effect_where_it_is_entered():
    with kerasnorm.jit("auto"):
        first, second = kerasnorm.jit(True), kerasnorm.jit(False)
        with first:
            assert compilation.mode() is True
            with second, first:
                assert compilation.mode() is True
            assert compilation.mode() is True
        assert compilation.mode() is False  # the last that was made, for good
