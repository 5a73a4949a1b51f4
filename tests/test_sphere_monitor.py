"""What `SphereMonitor` logs, against numbers worked out by hand."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import kerasnorm
from kerasnorm.callbacks import SphereMonitor
from kerasnorm.sphere import SphereSGD


def network():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(4, use_bias=False, name="dense"),
            layers.BatchNormalization(epsilon=1e-7, name="bn"),
            layers.Dense(2, name="head"),
        ]
    )


@pytest.mark.parametrize("jit", [False, True])
def test_figures(jit, rng):
    x, y = rng.normal(size=(16, 6)), rng.normal(size=(16, 2))
    model = network()
    model.compile(keras.optimizers.SGD(0.3), "mse", jit_compile=jit)
    model.fit(x, y, batch_size=16, verbose=0)  # compiled once before
    w = ops.convert_to_numpy(model.layers[0].kernel).astype("float64")
    monitor = SphereMonitor(layers=True)
    logs = model.fit(x, y, batch_size=16, verbose=0, callbacks=[monitor]).history
    v = ops.convert_to_numpy(model.layers[0].kernel).astype("float64")
    g = (w - v) / 0.3
    norm = np.linalg.norm(w, axis=0)
    cosine = (w * g).sum(0) / norm / np.linalg.norm(g, axis=0)
    angle = np.arccos((w * v).sum(0) / norm / np.linalg.norm(v, axis=0))
    gamma = np.abs(ops.convert_to_numpy(model.get_layer("bn").gamma)).mean()
    expected = {
        "norm": norm.mean(),
        "effective_rate": (0.3 / norm**2).mean(),
        "angle": angle.mean(),
        "cosine": cosine.mean(),
        "gamma": gamma,
    }
    assert monitor.paths == ["dense/kernel"]
    for name, value in expected.items():
        for key in (f"sphere/{name}", f"sphere/{name}/dense/kernel"):
            np.testing.assert_allclose(logs[key], [value], rtol=1e-3, atol=1e-4)
    assert abs(expected["cosine"]) < 1e-3
    assert "sphere/norm" not in model.fit(x, y, verbose=0).history


def test_it_changes_nothing(rng):
    x, y = rng.normal(size=(16, 6)), rng.normal(size=(16, 2))
    found = []
    for callbacks in ([], [SphereMonitor()]):
        keras.utils.set_random_seed(0)
        model = network()
        model.compile(SphereSGD(model, 0.1, 0.9), "mse")
        model.fit(
            x, y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=callbacks
        )
        found.append(model.get_weights())
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_on_spheres_norms_stay(rng):
    x, y = rng.normal(size=(32, 6)), rng.normal(size=(32, 2))
    model = network()
    optimizer = SphereSGD(model, 10.0, max_angle=0.05)
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer), "mse")
    history = model.fit(
        x, y, batch_size=8, epochs=3, verbose=0, callbacks=[SphereMonitor()]
    ).history
    np.testing.assert_allclose(history["sphere/norm"], history["sphere/norm"][0])
    assert max(history["sphere/angle"]) <= 0.05 * (1 + 1e-4)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_weight_without_a_gradient_and_an_error_in_fit(rng):
    """Neither harms: the first counts as 0, after the second training goes on."""
    inputs = keras.Input((6,))
    heads = [
        layers.BatchNormalization()(layers.Dense(2, name=name)(inputs)) for name in "ab"
    ]
    model = keras.Model(inputs, heads)
    optimizer = keras.optimizers.SGD(0.1)
    model.compile(optimizer, ["mse", None], run_eagerly=True)
    x, y = rng.normal(size=(8, 6)), [rng.normal(size=(8, 2))] * 2

    class Stops(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise RuntimeError

    monitor = SphereMonitor()
    with pytest.raises(RuntimeError):
        model.fit(x, y, verbose=0, callbacks=[monitor, Stops()])
    angle = dict(zip(monitor.paths, monitor.last["angle"], strict=True))
    assert angle["a/kernel"] > 0 == angle["b/kernel"]
    if keras.backend.backend() == "tensorflow":  # JAX steps on all or none
        model.get_layer("a").trainable = False
        model.compile(optimizer, ["mse", None], run_eagerly=True)
        model.fit(x, y, verbose=0)
        model.fit(x, y, verbose=0, callbacks=[monitor])
    assert "apply" not in vars(optimizer) or keras.backend.backend() != "tensorflow"


def test_a_model_without_such_weights():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile("sgd", "mse")
    with pytest.raises(kerasnorm.KerasNormError, match="no trained weight"):
        model.fit(
            np.zeros((2, 3)), np.zeros((2, 2)), verbose=0, callbacks=[SphereMonitor()]
        )


def test_each_weight_has_the_rate_of_its_optimizer(rng):
    """Under a MultiOptimizer, which has none of its own."""
    x, y = rng.normal(size=(16, 6)), rng.normal(size=(16, 2))
    seen = []
    for rates in ((0.2, 0.2), (0.1, 0.2)):
        keras.utils.set_random_seed(0)
        model, monitor = network(), SphereMonitor()
        chosen = keras.optimizers.OptimizerMap(keras.optimizers.SGD(rates[1]))
        chosen[".*dense/.*"] = keras.optimizers.SGD(rates[0])
        multi = keras.optimizers.MultiOptimizer(chosen)
        model.compile(multi, "mse", jit_compile=False)
        model.fit(x, y, verbose=0, callbacks=[monitor], batch_size=16)
        seen.append(monitor.last)
    scale = seen[1]["effective_rate"] / seen[0]["effective_rate"]
    np.testing.assert_allclose(scale, 0.5, rtol=1e-5)
    found = kerasnorm.properties.measure(model, x, y)
    assert found.learning_rate == pytest.approx(0.1)
    at = {s.path: s for s in found.sites}
    for path, rate in (("dense", 0.1), ("head", 0.2)):
        expected = rate / at[path].weight_norm ** 2
        assert at[path].effective_learning_rate == pytest.approx(expected, rel=1e-5)
    best = kerasnorm.compass(
        model, x, y, methods=["bn", "ln"], confirm=2, learning_rates=0.05
    )
    assert len(best.candidates) == 2
