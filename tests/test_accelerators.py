"""What runs on accelerators alone, here on the CPU: the same programs, through XLA."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from kerasnorm.method import testing
from kerasnorm.method.registry import methods
from kerasnorm.numerics import backend, moments


# Each takes another path there: all checks of their first case, of the others' two.
METHODS = ("batch", "dynamic_tanh", "group", "instance", "layer", "scale", "switchable")


@pytest.fixture(autouse=True)
def accelerator(monkeypatch):
    monkeypatch.setattr(backend, "on_cpu", lambda: False)


def compiled_moments(x, axes):
    f = backend.compiled(lambda v: moments.moments(v, axes))
    return [ops.convert_to_numpy(v) for v in f(x)]


def inputs(shape):
    """By name: what the one reading of the input must not lose digits on."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    half = np.where(np.arange(shape[1])[:, None] < shape[1] // 2, 0.0, 1e3)
    # The first guess of the mean comes from every 16th element.
    picked = np.where(np.arange(shape[1])[:, None] % moments.STRIDE, 0.0, 1e3)
    return {
        "standard": x,
        "far from zero": x + 1e3,
        "two levels": x + half,
        "a guess far off": x + picked,
        "constant": np.full(shape, 3.0),
    }


@pytest.mark.parametrize("axes", [(1,), (0, 1)])
@pytest.mark.parametrize("name", list(inputs((1, 16, 1))))
def test_one_reading_is_as_exact_as_two(name, axes):
    x = inputs((3, 320, 4))[name].astype("float32")
    mean, variance = compiled_moments(x, axes)
    exact = x.astype("float64")
    expected = exact.var(axes, keepdims=True)
    # A few roundings of the input's size.
    off = np.abs(mean - exact.mean(axes, keepdims=True)).max()
    assert off <= 2e-7 * np.abs(x).max()
    # The rounding of a sum of a thousand squares, which are 16 times the variance.
    np.testing.assert_allclose(variance, expected, rtol=16 * 6e-7, atol=1e-12)


def test_short_axes_and_single_elements():
    for shape, axes in (((1, 1, 3), (1,)), ((2, 5, 3), (1,)), ((1, 1, 3), (0, 1))):
        x = np.random.default_rng(0).normal(5.0, 1.0, shape).astype("float32")
        mean, variance = compiled_moments(x, axes)
        np.testing.assert_allclose(mean, x.mean(axes, keepdims=True), rtol=1e-6)
        expected = x.astype("float64").var(axes, keepdims=True)
        np.testing.assert_allclose(variance, expected, rtol=1e-5, atol=1e-12)


def generated():
    # TensorFlow's plain graph is the same on all devices.
    for name, method in methods().items() if keras.backend.backend() == "jax" else ():
        for check in testing.checks(method):
            first = check.name in ("case0-oracle_float64", "case0-gradients")
            if first or (name in METHODS and check.name.startswith("case0")):
                yield pytest.param(check.run, id=f"{name}-{check.name}")


@pytest.mark.parametrize("run", list(generated()))
def test_law(run):
    run()
