"""The gradient of each example by itself, as differentially private training takes it:
all of a batch at once (`jacobian`, `vmap`, `vectorized_map`) as one after the other."""

from __future__ import annotations

from functools import partial

import keras
import numpy as np
import pytest
from conftest import MAIN_METHODS
from keras import ops

from kerasnorm.method.registry import get, methods
from kerasnorm.method.testing import Subject
from kerasnorm.numerics import backend
from kerasnorm.recurrent import LSTMCell


MAIN = {get(name).name for name in MAIN_METHODS}
EXAMPLES = 3


def of_samples():
    """Cases of the methods in which no sample depends on another."""
    for method in methods().values():
        if method.layer is None or method.claims.get("batch_independent") is not True:
            continue
        for case in method.cases[: 2 if method.name in MAIN else 1]:
            marks = () if method.name in MAIN else pytest.mark.ci
            shape = "x".join(map(str, case.shape))
            yield pytest.param(method, case, id=f"{method.name}-{shape}", marks=marks)


def at_once(loss, weights, x):
    """Gradients of every example's loss, `(examples, ...)` for each weight."""
    if keras.backend.backend() == "jax":
        import jax

        def of_one(weights, x):
            return loss(x[None], *weights)[0]

        return jax.vmap(jax.grad(of_one), (None, 0))(weights, x)
    import tensorflow as tf

    @tf.function
    def run(x):
        with tf.GradientTape() as tape:
            losses = loss(x, *weights)
        return tape.jacobian(losses, weights, unconnected_gradients="zero")

    return run(x)


def one_by_one(loss, weights, x):
    found = [
        backend.vjp(partial(loss, x[k : k + 1]), weights, ops.ones((1,)))[1]
        for k in range(EXAMPLES)
    ]
    return [ops.stack(parts) for parts in zip(*found, strict=True)]


def mapped(loss, weights, x):
    """The same of `tf.vectorized_map`, which must not run the examples in a loop."""
    import tensorflow as tf

    def of_one(x):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            value = loss(x[None], *weights)
        zero = tf.UnconnectedGradients.ZERO
        return tape.gradient(value, weights, unconnected_gradients=zero)

    return tf.vectorized_map(of_one, x, fallback_to_while_loop=False)


@pytest.mark.parametrize(("method", "case"), list(of_samples()))
def test_all_at_once(method, case):
    subject = Subject(method, case)
    layer = subject.layer()
    weights = [v.value for v in layer.trainable_variables]
    if not weights:
        pytest.skip("no weights to take a gradient of")
    shape = (EXAMPLES, *case.shape[1:])
    x = np.random.default_rng(0).normal(0.7, 2.0, shape).astype("float32")
    x = ops.convert_to_tensor(x)
    direction = np.random.default_rng(1).normal(size=layer(x).shape)
    direction = ops.convert_to_tensor(direction.astype("float32"))[:1]

    run = subject.call(layer, training=True, mask=False)

    def loss(x, *weights):
        y = run(x, *weights)
        axes = tuple(range(1, len(y.shape)))
        return ops.sum(ops.sin(y) * direction, axes)

    wanted = one_by_one(loss, weights, x)
    ways = [at_once]
    if keras.backend.backend() == "tensorflow":
        ways.append(mapped)
    for way in ways:
        for got, expected in zip(way(loss, weights, x), wanted, strict=True):
            expected = ops.convert_to_numpy(expected)
            scale = np.abs(expected).max() + 1e-6
            np.testing.assert_allclose(
                ops.convert_to_numpy(got), expected, rtol=0, atol=1e-5 * scale
            )


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's")
def test_recurrent_cells_are_mapped_without_a_loop():
    import tensorflow as tf

    cell = LSTMCell(4)
    layer = keras.layers.RNN(cell, unroll=True)
    x = np.random.default_rng(0).normal(size=(3, 2, 5)).astype("float32")
    expected = layer(x)
    got = tf.vectorized_map(
        lambda v: layer(v[None])[0], tf.constant(x), fallback_to_while_loop=False
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
