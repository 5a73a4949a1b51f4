"""The optimizer of distillation, against NumPy and against Keras's Adam."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

from kerasnorm.fitting.muon import Muon, orthogonal


RATE = 0.01


@pytest.fixture
def model():
    """Every kind of kernel once, and what is none."""
    words = keras.Input((6,), dtype="int32")
    x = layers.Embedding(9, 8, name="embedding")(words)
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = layers.LSTM(5, name="lstm")(x)
    image = keras.Input((8, 8, 3))
    y = layers.Conv2D(4, 3, name="conv")(image)
    y = layers.BatchNormalization(name="norm")(y)
    y = layers.DepthwiseConv2D(3, name="depthwise")(y)
    y = layers.SeparableConv2D(4, 2, name="separable")(y)
    y = layers.Conv2DTranspose(2, 2, name="transposed")(y)
    out = layers.Dense(3, name="dense")(layers.Concatenate()([x, layers.Flatten()(y)]))
    keras.utils.set_random_seed(0)
    return keras.Model([words, image], out)


def stepped(model, optimizer, gradients):
    """Values before and after the steps, by path."""
    before = {v.path: ops.convert_to_numpy(v) for v in model.trainable_variables}
    for step in gradients:
        optimizer.apply([ops.convert_to_tensor(g) for g in step])
    after = {v.path: ops.convert_to_numpy(v) for v in model.trainable_variables}
    return before, after


def gradients_for(model, rng, steps=3):
    return [
        [rng.normal(0, 1, v.shape).astype("float32") for v in model.trainable_variables]
        for _ in range(steps)
    ]


def is_matrix(path):
    return "kernel" in path and "depthwise" not in path


def test_orthogonal_keeps_directions_and_evens_their_lengths(rng):
    for shape in ((7, 40), (40, 7), (16, 16), (1, 5)):
        m = rng.normal(size=shape)
        u, s, v = np.linalg.svd(m, full_matrices=False)
        s = np.geomspace(1, 0.01, len(s))
        given = orthogonal(ops.convert_to_tensor((u * s) @ v, dtype="float32"))
        inside = u.T @ ops.convert_to_numpy(given) @ v.T
        got = np.diag(inside)
        assert got.min() > 0.6 and got.max() < 1.25, shape
        np.testing.assert_allclose(inside - np.diag(got), 0, atol=1e-4)
        np.testing.assert_allclose(u @ inside @ v, given, atol=1e-4)


def test_a_step_of_a_kernel_is_as_long_as_the_rate_times_the_kernel(model, rng):
    optimizer = Muon(model, RATE)
    optimizer.build(model.trainable_variables)
    before, after = stepped(model, optimizer, gradients_for(model, rng, 1))
    moved = {
        path: np.linalg.norm(after[path] - w) / np.linalg.norm(w)
        for path, w in before.items()
        if is_matrix(path)
    }
    # Attention has four, the cell two, the separable convolution its pointwise one.
    assert len(moved) == 4 + 2 + 1 + 3
    np.testing.assert_allclose(list(moved.values()), RATE, rtol=1e-3)


def test_the_direction_is_that_of_nesterov_momentum(rng):
    """In NumPy with singular vectors; the singular values are within 0.6 and 1.25."""
    model = keras.Sequential([keras.Input((12,)), layers.Dense(6, use_bias=False)])
    optimizer = Muon(model, RATE)
    optimizer.build(model.trainable_variables)
    steps = gradients_for(model, rng, 3)
    w = [ops.convert_to_numpy(model.trainable_variables[0]).astype("float64")]
    for step in steps:
        w.append(next(iter(stepped(model, optimizer, [step])[1].values())))
    m = 0.0
    for (g,), old, new in zip(steps, w[:-1], w[1:], strict=True):
        m = 0.95 * m + g.astype("float64")
        u, _, v = np.linalg.svd(g + 0.95 * m, full_matrices=False)
        inside = u.T @ (old - new) @ v.T
        even = RATE * np.linalg.norm(old) / 6**0.5
        assert (np.abs(np.diag(inside) / even - 1) < 0.35).all()
        assert np.abs(inside - np.diag(np.diag(inside))).max() < 0.01 * even


def test_what_is_no_matrix_is_trained_as_by_adam(model, rng):
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    steps = gradients_for(model, rng)
    found = []
    for m, optimizer in (
        (model, Muon(model, RATE)),
        (twin, keras.optimizers.Adam(RATE, beta_2=0.95)),
    ):
        optimizer.build(m.trainable_variables)
        found.append(stepped(m, optimizer, steps)[1])
    others = [path for path in found[0] if not is_matrix(path)]
    assert any("gamma" in p for p in others) and any("embed" in p for p in others)
    for path in others:
        np.testing.assert_allclose(found[0][path], found[1][path], atol=2e-6)


def test_the_scale_of_a_kernel_and_of_its_gradient_do_not_matter(rng):
    """What a normalization makes of the kernel's outputs is the same."""
    steps = [[rng.normal(size=(5, 4)).astype("float32")] for _ in range(4)]
    found = []
    for scale in (1.0, 64.0):
        model = keras.Sequential([keras.Input((5,)), layers.Dense(4, use_bias=False)])
        w = np.linspace(-1, 1, 20).reshape(5, 4) ** 3
        model.set_weights([scale * w])
        optimizer = Muon(model, RATE)
        optimizer.build(model.trainable_variables)
        theirs = [[g / scale for g in step] for step in steps]
        (after,) = stepped(model, optimizer, theirs)[1].values()
        found.append(after / scale)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_a_kernel_of_zeros_moves(rng):
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(4, kernel_initializer="zeros")]
    )
    optimizer = Muon(model, RATE)
    optimizer.build(model.trainable_variables)
    _, after = stepped(model, optimizer, gradients_for(model, rng, 1))
    for value in after.values():
        assert np.isfinite(value).all() and np.abs(value).max() > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_variables_of_other_precision_keep_it(dtype):
    if dtype == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has no float64 unless it is switched on for all")
    dense = layers.Dense(4, dtype=keras.DTypePolicy(dtype))
    model = keras.Sequential([keras.Input((5,)), dense])
    optimizer = Muon(model, RATE)
    optimizer.build(model.trainable_variables)
    before = dense.get_weights()
    optimizer.apply([ops.ones(v.shape, dtype) for v in model.trainable_variables])
    for v, w in zip(model.trainable_variables, before, strict=True):
        assert keras.backend.standardize_dtype(v.dtype) == dtype
        change = ops.convert_to_numpy(v).astype("float64") - w.astype("float64")
        assert np.isfinite(change).all() and (change < 0).any()
