"""Folding and weight normalization in place of a batch normalization, on every kind of
linear layer, before and behind it; and what must be refused."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from kerasnorm.kernels.kernel import kernel_of
from kerasnorm.method.registry import Fidelity, Reason
from kerasnorm.rewriting.apply import rewrite
from kerasnorm.rewriting.plan import plan
from kerasnorm.weights.weight import WeightNormalization


LINEAR = {
    "dense": ((6,), lambda: layers.Dense(5, use_bias=False)),
    "dense on sequences": ((4, 6), lambda: layers.Dense(5)),
    "einsum": ((4, 6), lambda: layers.EinsumDense("abc,cd->abd", (4, 5))),
    "einsum heads": (
        (4, 6),
        lambda: layers.EinsumDense("abc,cde->abde", (4, 2, 5), bias_axes="de"),
    ),
    "conv1d": ((9, 6), lambda: layers.Conv1D(4, 3, strides=2)),
    "conv1d causal": ((9, 6), lambda: layers.Conv1D(4, 3, padding="causal")),
    "conv2d groups": (
        (7, 8, 6),
        lambda: layers.Conv2D(4, 3, groups=2, dilation_rate=2),
    ),
    "conv2d same": ((7, 8, 6), lambda: layers.Conv2D(4, 3, padding="same")),
    "conv2d 1x1 same": ((7, 8, 6), lambda: layers.Conv2D(4, 1, padding="same")),
    "conv3d": ((4, 5, 4, 6), lambda: layers.Conv3D(4, 3, use_bias=False)),
    "conv1d transposed": ((5, 6), lambda: layers.Conv1DTranspose(4, 3, strides=2)),
    "conv2d transposed": (
        (5, 4, 6),
        lambda: layers.Conv2DTranspose(4, 3, padding="same"),
    ),
    "depthwise 1d": ((9, 6), lambda: layers.DepthwiseConv1D(3, depth_multiplier=2)),
    "depthwise 2d": ((7, 8, 6), lambda: layers.DepthwiseConv2D(3, depth_multiplier=2)),
    "separable 1d": ((9, 6), lambda: layers.SeparableConv1D(4, 3)),
    "separable 2d": (
        (7, 8, 6),
        lambda: layers.SeparableConv2D(4, 3, depth_multiplier=2),
    ),
}


def numpy(x):
    return keras.ops.convert_to_numpy(x)


def chain(shape, *parts, dtype="float32"):
    """A functional model of the layers in a row, with random weights."""
    x = inputs = keras.Input(shape, dtype=dtype)
    for part in parts:
        x = part(x)
    model = keras.Model(inputs, x)
    rng = np.random.default_rng(1)
    for v in model.weights:
        low = 0.2 if v.name == "moving_variance" else -2.0
        v.assign(rng.uniform(low, 2, v.shape))
    return model


def same_outputs(model, new, shape, rng):
    x = rng.normal(size=(3, *shape)).astype("float32")
    y, z = numpy(model(x)), numpy(new(x))
    np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("method", ["none", "wn"])
def test_batch_normalization_behind_a_linear_layer(name, method, rng):
    shape, linear = LINEAR[name]
    model = chain(shape, linear(), layers.BatchNormalization())
    new, report = rewrite(model, method, return_report=True, verbose=False)
    (step,) = report.plan.steps
    assert step.fidelity is Fidelity.AT_INFERENCE
    assert not any(isinstance(x, layers.BatchNormalization) for x in new.layers)
    same_outputs(model, new, shape, rng)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("method", ["none", "wn"])
def test_batch_normalization_before_a_linear_layer(name, method, rng):
    shape, linear = LINEAR[name]
    model = chain(shape, layers.BatchNormalization(), linear())
    new, report = rewrite(model, method, return_report=True, verbose=False)
    if kernel_of(model.layers[-1]).sees_padding():
        (refused,) = report.plan.refused
        assert refused.reason is Reason.NOT_EXACT
        assert "border" in refused.detail
    else:
        assert len(report.plan.steps) == 1
        same_outputs(model, new, shape, rng)


@pytest.mark.parametrize("name", ["conv2d same", "conv2d transposed", "separable 2d"])
def test_without_a_shift_padding_does_not_matter(name, rng):
    shape, linear = LINEAR[name]
    norm = layers.BatchNormalization(center=False)
    model = chain(shape, norm, linear())
    norm.moving_mean.assign(np.zeros(norm.moving_mean.shape))
    new = rewrite(model, "none", verbose=False)
    assert len(new.layers) == 2
    same_outputs(model, new, shape, rng)


@pytest.mark.parametrize("method", ["none", "wn"])
def test_embedding(method, rng):
    embedding = layers.Embedding(7, 3)
    model = chain((4,), embedding, layers.BatchNormalization(), dtype="int32")
    new = rewrite(model, method, verbose=False)
    assert not any(isinstance(x, layers.BatchNormalization) for x in new.layers)
    x = rng.integers(0, 7, (3, 4))
    np.testing.assert_allclose(numpy(new(x)), numpy(model(x)), rtol=1e-4, atol=1e-5)


def test_what_does_nothing_at_inference_is_seen_through(rng):
    norm = layers.BatchNormalization()
    model = chain((6,), layers.Dense(5), layers.Dropout(0.5), norm)
    same_outputs(model, rewrite(model, "none", verbose=False), (6,), rng)


@pytest.mark.parametrize(
    ("parts", "reason", "detail"),
    [
        (lambda: [layers.Dense(5, "relu")], Reason.NO_LINEAR, "applies relu"),
        (lambda: [layers.ReLU()], Reason.NO_LINEAR, "ReLU"),
        (lambda: [layers.Reshape((2, 3))], Reason.NO_LINEAR, "Reshape"),
    ],
)
def test_refusals_say_what_stands_in_the_way(parts, reason, detail):
    model = chain((6,), *parts(), layers.BatchNormalization(), layers.ReLU())
    for method in ("none", "wn"):
        (refused,) = plan(model, method).refused
        assert refused.reason is reason
        assert detail in refused.detail


def test_a_layer_called_twice_is_not_folded():
    shared, norm = layers.Dense(6), layers.BatchNormalization()
    model = chain((6,), shared, layers.ReLU(), shared, norm)
    (refused,) = plan(model, "none").refused
    assert refused.reason is Reason.SHARED


def test_a_second_consumer_blocks_the_fold():
    inputs = keras.Input((6,))
    x = layers.Dense(6)(inputs)
    y = layers.BatchNormalization()(x)
    model = keras.Model(inputs, layers.Add()([x, y]))
    (refused,) = plan(model, "none").refused
    assert refused.reason is Reason.NO_LINEAR
    assert "other uses" in refused.detail


def test_forced_training_mode_is_not_folded():
    inputs = keras.Input((6,))
    x = layers.BatchNormalization()(layers.Dense(6)(inputs), training=True)
    (refused,) = plan(keras.Model(inputs, x), "none").refused
    assert refused.reason is Reason.TRAINING


@keras.saving.register_keras_serializable("test_folding")
class OfGraphs(keras.Model):
    """Two graphs that code calls, one of them in the way that `how` names."""

    def __init__(self, how, **kwargs):
        super().__init__(**kwargs)
        self.how = how
        self.encoder = keras.Sequential(
            [keras.Input((6,)), layers.Dense(6), layers.BatchNormalization()]
        )
        inner = keras.Sequential([layers.Dense(5), layers.BatchNormalization()])
        self.decoder = keras.Sequential([keras.Input((6,)), inner, layers.ReLU()])

    def call(self, x):
        if self.how == "twice":
            x = self.encoder(x)
        elif self.how == "also a layer":
            x = self.encoder.layers[0](x)
        elif self.how == "layer by layer":
            for layer in self.encoder.layers:
                x = layer(x)
            return self.decoder(x)
        if self.how == "in training mode":
            return self.encoder(self.decoder(x)[:, :1] + x, training=True)
        return self.decoder(self.encoder(x))

    def get_config(self):
        return {**super().get_config(), "how": self.how}


def of_graphs(how):
    model = OfGraphs(how)
    model(np.zeros((2, 6), "float32"))
    rng = np.random.default_rng(1)
    for v in model.weights:
        v.assign(rng.uniform(0.2, 2, v.shape))
    return model


@pytest.mark.parametrize("method", ["none", "wn"])
@pytest.mark.parametrize("how", ["once", "twice"])
def test_graphs_that_code_calls_as_a_whole(how, method, rng, tmp_path):
    model = of_graphs(how)
    rewrite(model, method, out=tmp_path / "new.keras")
    new = keras.saving.load_model(tmp_path / "new.keras")
    kinds = {type(x).__name__ for x in new._flatten_layers()}
    assert "BatchNormalization" not in kinds
    same_outputs(model, new, (6,), rng)


@pytest.mark.parametrize("how", ["also a layer", "layer by layer"])
def test_a_graph_whose_layers_code_calls_apart_is_not_folded(how):
    made = plan(of_graphs(how), "none")
    assert [s.path.split("/")[0] for s in made.steps] == ["decoder"]
    (refused,) = made.refused
    assert refused.path.startswith("encoder/")
    assert refused.reason is Reason.NO_GRAPH


def test_training_mode_that_code_asks_for_is_seen():
    made = plan(of_graphs("in training mode"), "none")
    assert [s.path.split("/")[0] for s in made.steps] == ["decoder"]
    (refused,) = made.refused
    assert refused.reason is Reason.TRAINING


def test_the_axis_must_be_the_channels():
    model = chain((4, 6), layers.Dense(5), layers.BatchNormalization(axis=1))
    (refused,) = plan(model, "none").refused
    assert refused.reason is Reason.NOT_EXACT


def test_regularizers_and_constraints_are_mentioned():
    dense = layers.Dense(5, kernel_regularizer="l2", kernel_constraint="non_neg")
    model = chain((6,), dense, layers.BatchNormalization())
    (step,) = plan(model, "none").steps
    assert "kernel regularizer and kernel constraint" in step.note


def test_filters_of_length_zero_and_negative_gamma(rng):
    dense, norm = layers.Dense(4), layers.BatchNormalization()
    model = chain((6,), dense, norm)
    kernel = numpy(dense.kernel).copy()
    kernel[:, 1] = 0
    dense.kernel.assign(kernel)
    norm.gamma.assign([-1.0, 2.0, -0.5, 0.0])
    same_outputs(model, rewrite(model, "wn", verbose=False), (6,), rng)


def test_unwrapping_gives_the_stock_layer_back(rng):
    model = chain((5, 6, 3), layers.Conv2D(4, 3), layers.BatchNormalization())
    wrapped = rewrite(model, "wn", verbose=False).layers[1]
    assert isinstance(wrapped, WeightNormalization)
    plain = wrapped.unwrap()
    assert type(plain) is layers.Conv2D
    x = rng.normal(size=(2, 5, 6, 3)).astype("float32")
    np.testing.assert_allclose(numpy(plain(x)), numpy(model(x)), rtol=1e-4, atol=1e-4)
