"""Swaps among the per-sample methods: which are exact, and what a swap says."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import kerasnorm
import rewriters
from kerasnorm.layers.adaptive_instance import AdaptiveInstanceNormalization
from kerasnorm.layers.evonorm_s0 import EvoNormS0
from kerasnorm.layers.pixel import PixelNormalization
from kerasnorm.layers.positional import MomentShortcut, PositionalNormalization
from kerasnorm.layers.rms import RMSNormalization
from kerasnorm.layers.scale import ScaleNormalization
from kerasnorm.layers.sparse_batch import SparseBatchNormalization


def around(norm, shape, behind=()):
    """A dense layer, the normalization with weights worth keeping, and more."""
    inputs = keras.Input(shape)
    x = norm(layers.Dense(8, name="in")(inputs))
    for layer in behind:
        x = layer(x)
    model = keras.Model(inputs, layers.Dense(3, name="out")(x))
    rng = np.random.default_rng(0)
    for v in norm.variables:
        one = v.shape == (1,) or "variance" in v.name or v.name in ("gamma", "scale")
        v.assign(rng.uniform(0.5, 1.5, v.shape) - (0 if one else 1))
    return model


EXACT = {
    "pixel to rms": (PixelNormalization, {"scale": True, "center": True}, "rms"),
    "bare pixel to rms": (PixelNormalization, {}, "rms"),
    "scale to rms": (ScaleNormalization, {}, "rms"),
    "scale to pixel": (ScaleNormalization, {"center": True}, "pixel"),
    "rms to pixel": (layers.RMSNormalization, {}, "pixel"),
    "rms without gains to scale": (RMSNormalization, {"scale": False}, "scale"),
    "pixel to scale": (PixelNormalization, {}, "scale"),
    "positional to layer": (PositionalNormalization, {"scale": True}, "layer"),
    "layer to positional": (layers.LayerNormalization, {}, "positional"),
    "layer to sparse": (layers.LayerNormalization, {}, "sparse_layer"),
    "one group to sparse": (layers.GroupNormalization, {"groups": 1}, "sparse_layer"),
    "batch to sparse": (layers.BatchNormalization, {"scale": False}, "sparse_batch"),
    "sparse batch to renorm": (SparseBatchNormalization, {}, "renorm"),
}


@pytest.mark.parametrize("shape", [(8,), (7, 8), (6, 5, 8)])
@pytest.mark.parametrize("name", EXACT)
def test_exact(name, shape):
    cls, config, target = EXACT[name]
    model = around(cls(**config), shape)
    new, report = kerasnorm.rewrite(model, target, return_report=True, verbose=False)
    assert report.plan.steps and report.plan.exact
    x = rewriters.random_inputs(model)
    assert rewriters.compare(model, new, x).relative < 1e-5


def test_unequal_gains_become_one():
    plan = kerasnorm.plan(around(layers.RMSNormalization(), (8,)), "scale")
    assert plan.fidelity == "fresh" and "mean" in plan.steps[0].note


def test_evonorm_takes_the_place_of_the_relu_behind():
    model = around(layers.BatchNormalization(), (6, 5, 8), [layers.ReLU(name="relu")])
    new, report = kerasnorm.rewrite(model, "evos0", return_report=True, verbose=False)
    assert "relu" in report.plan.steps[0].note
    assert not any(isinstance(layer, layers.ReLU) for layer in new.layers)
    (norm,) = (layer for layer in new.layers if isinstance(layer, EvoNormS0))
    np.testing.assert_array_equal(norm.gate, np.ones(8))


def test_evonorm_starts_linear_where_there_was_no_relu():
    model = around(layers.BatchNormalization(name="norm"), (6, 5, 8))
    old = model.get_layer("norm").gamma
    new = kerasnorm.rewrite(model, "evos0", verbose=False).get_layer("norm")
    np.testing.assert_array_equal(new.gate, np.zeros(8))
    np.testing.assert_allclose(new.gamma, 2 * np.array(old))


@pytest.mark.parametrize("target", ["lrn", "dyt"])
def test_methods_that_do_not_standardize_take_the_line(target):
    """They follow the moving statistics where their own curve is straight."""
    model = around(layers.BatchNormalization(name="norm"), (6, 8))
    more = {"alpha": 1e-3} if target == "dyt" else {"alpha": 1e-8}
    new = kerasnorm.rewrite(model, target, verbose=False, **more)
    x = rewriters.random_inputs(model)
    assert rewriters.compare(model, new, x).relative < 1e-3


def test_adaptive_instance_normalization_is_no_target():
    plan = kerasnorm.plan(around(layers.BatchNormalization(), (6, 8)), "adain")
    assert not plan.steps and "style" in plan.refused[0].detail


def test_two_inputs_and_three_outputs_survive_saving(tmp_path):
    content, style = keras.Input((6, 5, 4)), keras.Input((3, 7, 4))
    y, mean, std = PositionalNormalization(return_moments=True)(content)
    y = MomentShortcut()(AdaptiveInstanceNormalization()(y, style), mean, std)
    model = keras.Model([content, style], y)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    x = rewriters.random_inputs(model)
    assert rewriters.compare(model, again, x).max_abs == 0


def test_penalty_is_part_of_the_training_loss():
    x = np.random.default_rng(0).normal(size=(64, 5)).astype("float32")
    histories = []
    for l1 in (0.0, 10.0):
        keras.utils.set_random_seed(0)
        norm = SparseBatchNormalization(l1=l1)
        model = keras.Sequential([keras.Input((5,)), layers.Dense(4), norm])
        model.compile(keras.optimizers.SGD(0.0), "mse")
        histories.append(model.fit(x, x[:, :4], verbose=0).history["loss"][0])
        assert model.evaluate(x, x[:, :4], verbose=0) < 10
    assert histories[1] > histories[0] + 1
