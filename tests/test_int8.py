"""TensorFlow Lite in eight bits: every activation method beside Keras's own layer."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
from conftest import MAIN_METHODS

from kerasnorm.method.registry import get, methods


pytestmark = [
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's"),
    pytest.mark.filterwarnings("ignore"),  # of the converter and its interpreter
]

SHAPE = (8, 8, 16)
MAIN = {get(name).name for name in MAIN_METHODS}


def activations():
    for method in methods().values():
        if method.layer is not None and method.family in ("batch", "sample"):
            marks = () if method.name in MAIN else pytest.mark.ci
            yield pytest.param(method, id=method.name, marks=marks)


@functools.cache
def data():
    """Channels of different size and offset."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(40, *SHAPE)) * rng.uniform(0.5, 2, SHAPE[-1])
    return (x + rng.normal(size=SHAPE[-1])).astype("float32")


def error(layer):
    """Of the layer in eight bits, relative to the root mean square of its output."""
    import tensorflow as tf

    model = keras.Sequential([keras.Input(SHAPE), layer])
    rng = np.random.default_rng(1)
    for variable in layer.variables:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([x[None]] for x in data())
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    program = tf.lite.Interpreter(model_content=converter.convert())
    program.allocate_tensors()
    (given,), (found,) = program.get_input_details(), program.get_output_details()
    got = []
    for x in data():
        program.set_tensor(given["index"], x[None])
        program.invoke()
        got.append(program.get_tensor(found["index"])[0])
    expected = model.predict(data(), verbose=0)
    return np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))


@functools.cache
def reference():
    return error(keras.layers.GroupNormalization(4))


def config(method):
    """Arguments of the method's own case for images, fitted to the channels."""
    cases = [c.config for c in method.cases if len(c.shape) == 4]
    found = next((c for c in cases if c.get("axis", -1) == -1), {})
    return {**found, **{k: 4 for k in ("groups", "group_size") if k in found}}


@pytest.mark.parametrize("method", list(activations()))
def test_eight_bits(method):
    found = error(method.layer(**config(method)))
    assert found <= 2 * reference(), (found, reference())
