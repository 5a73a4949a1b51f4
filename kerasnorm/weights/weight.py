"""Weight normalization."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.kernels.reparametrized import (
    CASES,
    CLAIMS,
    UNDECIDED,
    Reparametrized,
    oracle_of,
)
from kerasnorm.kernels.wrapping import rules
from kerasnorm.method.registry import declare
from kerasnorm.numerics import moments, standardize
from rewriters.program import Program, is_graph


@keras.saving.register_keras_serializable("kerasnorm")
class WeightNormalization(Reparametrized):
    r"""Learns the length and the direction of each filter of a layer by themselves.

    No statistics of activations: the same in training and inference, at any batch
    size, and right for recurrent and generative models.

        w = g * v / ||v||                    per filter, ||v|| over all its weights

    `v` is the wrapped layer's own kernel, `g` is added; it starts at `||v||`, so that
    wrapping a trained layer changes nothing. `initialize` starts from data instead.

    Any layer with kernels can be wrapped: dense layers, convolutions, embeddings (one
    filter per output dimension), attention, recurrent layers (both kernels).

    Paper: Salimans and Kingma, 2016, https://arxiv.org/abs/1602.07868

    Args:
        layer: the layer to wrap, built or not; it keeps its name and config.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        Those of the wrapped layer.

    Raises:
        KerasNormError: the layer has no kernel to normalize.
    """

    def kernel(self, v, g):
        return standardize.lengths(v, g)

    def initial(self, v):
        return {"g": ops.sqrt(ops.sum(ops.square(v), 0))}

    def absorb(self, v, w):
        # A sign goes into g, so that v keeps the direction and the length it was
        # trained with; a fold that turns a filter (of an embedding) starts it anew.
        length = ops.sqrt(ops.sum(ops.square(w), 0))
        inner = ops.sum(v * w, 0)
        parallel = ops.abs(inner) >= (1 - 1e-6) * length * ops.sqrt(
            ops.sum(ops.square(v), 0)
        )
        g = ops.where(ops.logical_and(parallel, inner < 0), -length, length)
        return {"v": ops.where(parallel, v, w), "g": g}


def initialize(model: Any, x: Any, epsilon: float = 1e-10) -> None:
    """Data-dependent initialization: unit variance and zero mean before training.

    One pass of a batch from the input on: each weight-normalized layer with a bias and
    without an activation of its own gets `g <- g / std` and `bias <- -mean / std` of
    its outputs per channel (of those with bias zero), so that the next one sees
    standardized inputs.

    Paper: Salimans and Kingma, 2016, section 3

    Args:
        model: a Functional or Sequential model, or a single built
            `WeightNormalization`.
        x: a batch of its inputs.
        epsilon: added to the variance.

    Raises:
        RewriteError: the model has no graph.
        KerasNormError: it has no layer to initialize.
    """
    done = []

    def standardize(layer, args, kwargs):
        bias = getattr(layer.layer, "bias", None)
        linear = getattr(layer.layer, "activation", None) in (
            None,
            keras.activations.linear,
        )
        kernels = layer.kernels
        if bias is None or not linear or id(layer) in done or len(kernels) != 1:
            return
        done.append(id(layer))
        bias.assign(ops.zeros(bias.shape, bias.dtype))
        y = ops.cast(layer(*args, **kwargs), "float32")
        axis = kernels[0].axis % len(y.shape)
        axes = [a for a in range(len(y.shape)) if a != axis]
        mean, variance = ops.moments(y, axes)
        inverse = moments.inverse_root(variance, epsilon)
        # An einsum's filters run over more axes than its channels.
        shape = kernels[0].shape(kernels[0].filters)
        spread = ops.reshape(inverse, kernels[0].shape(kernels[0].channels))
        g = ops.reshape(layer.g, shape) * spread
        layer.g.assign(ops.reshape(g, layer.g.shape))
        bias.assign(ops.broadcast_to(-mean * inverse, bias.shape))

    if isinstance(model, WeightNormalization):
        standardize(model, (ops.convert_to_tensor(x),), {})
    else:

        def call(instruction, args, kwargs):
            if isinstance(instruction.operation, WeightNormalization):
                standardize(instruction.operation, args, kwargs)
            return instruction.operation(*args, **kwargs)

        inputs = [ops.convert_to_tensor(v) for v in keras.tree.flatten(x)]
        Program(model).run(inputs, training=False, call=call)
    if not done:
        raise KerasNormError(
            "no layer to initialize",
            got=f"{type(model).__name__} {model.name!r}",
            expected="weight-normalized layers with a bias and without an activation",
        )


def start(model, layers, x):
    """As the paper starts: from data, where the layers can take it in."""
    able = [
        w
        for w in layers
        if len(w.kernels) == 1
        and getattr(w.layer, "bias", None) is not None
        and getattr(w.layer, "activation", None) in (None, keras.activations.linear)
    ]
    if able and is_graph(model):
        initialize(model, x)


def check_wrapping_changes_nothing():
    rng = np.random.default_rng(0)
    layers = keras.layers
    cases = [
        ((2, 6), layers.Dense(5)),
        ((2, 4, 6), layers.EinsumDense("abc,cde->abde", (4, 2, 5), bias_axes="e")),
        ((2, 7, 8, 6), layers.Conv2D(4, 3, groups=2)),
        ((2, 5, 4, 6), layers.Conv2DTranspose(4, 3, strides=2)),
        ((2, 7, 8, 6), layers.DepthwiseConv2D(3, depth_multiplier=2)),
        ((2, 9, 6), layers.SeparableConv1D(4, 3)),
        ((2, 9, 6), layers.GRU(4)),
    ]
    for shape, layer in cases:
        x = rng.normal(size=shape).astype("float32")
        y = ops.convert_to_numpy(layer(x))
        wrapped = WeightNormalization(layer)
        for same in (wrapped(x), wrapped.unwrap()(x)):
            same = ops.convert_to_numpy(same)
            np.testing.assert_allclose(same, y, rtol=1e-5, atol=1e-5)
        own = len(wrapped.trainable_weights) - len(layer.trainable_weights)
        np.testing.assert_equal(own, len(wrapped.kernels))


def check_embedding():
    embedding = keras.layers.Embedding(7, 3, mask_zero=True)
    x = np.array([[1, 2, 0], [3, 6, 5]])
    y = ops.convert_to_numpy(embedding(x))
    wrapped = WeightNormalization(embedding)
    np.testing.assert_allclose(ops.convert_to_numpy(wrapped(x)), y, rtol=1e-5)
    mask = ops.convert_to_numpy(wrapped.compute_mask(x))
    np.testing.assert_array_equal(mask, x != 0)


def check_training_moves_both():
    rng = np.random.default_rng(0)
    layer = WeightNormalization(keras.layers.Dense(3))
    model = keras.Sequential([keras.Input((5,)), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    g, v = (ops.convert_to_numpy(t).copy() for t in (layer.g, layer.v))
    x, y = rng.normal(size=(8, 5)), rng.normal(size=(8, 3))
    model.fit(x, y, verbose=0)
    for old, new in ((g, layer.g), (v, layer.v)):
        if not np.abs(ops.convert_to_numpy(new) - old).max() > 1e-4:
            raise AssertionError("a weight did not move")


def check_data_dependent_initialization():
    rng = np.random.default_rng(0)
    layers = [
        keras.layers.Conv2D(4, 3),
        keras.layers.EinsumDense("bhwc,cd->bhwd", (None, None, 5), bias_axes="d"),
    ]
    model = keras.Sequential([keras.Input((8, 8, 3))])
    for layer in layers:
        model.add(WeightNormalization(layer))
        model.add(keras.layers.ReLU())
    x = rng.normal(3.0, 2.0, (16, 8, 8, 3)).astype("float32")
    initialize(model, x)
    for n in (1, 3):
        part = keras.Model(model.inputs[0], model.layers[n - 1].output)
        y = ops.convert_to_numpy(part(x))
        np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-4)
        np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-4)


declare(
    WeightNormalization,
    name="weight",
    aliases=("wn",),
    family="weight",
    paper="Salimans and Kingma, 2016, arXiv:1602.07868",
    invariance="filter",  # in v; g sets the scale
    oracle=oracle_of(lambda v, p, *_: p["g"] * v / np.sqrt(np.sum(v**2, 0))),
    **rules(WeightNormalization),
    start=start,
    cases=CASES,
    claims=CLAIMS,
    undecided=UNDECIDED,
    checks=(
        check_wrapping_changes_nothing,
        check_embedding,
        check_training_moves_both,
        check_data_dependent_initialization,
    ),
)
