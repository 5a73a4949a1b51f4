"""Normalization by analytic variance propagation."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.kernels.kernel import CONVOLUTIONS
from kerasnorm.kernels.reparametrized import (
    CASES,
    CLAIMS,
    UNDECIDED,
    Reparametrized,
    linear,
)
from kerasnorm.kernels.wrapping import rules
from kerasnorm.method import adoption
from kerasnorm.method.registry import declare
from kerasnorm.numerics import moments
from rewriters.program import Program


@keras.saving.register_keras_serializable("kerasnorm")
class AnalyticNormalization(Reparametrized):
    r"""Batch normalization by statistics that are computed from the weights.

        y = g * (v x - mu') / sqrt(var' + epsilon) + bias
        mu' = sum v m,      var' = sum v^2 s            per filter, over its inputs

    with the mean `m` and the variance `s` of the inputs over the data set, channel by
    channel, as if inputs were independent. No statistics of batches: the same in
    training and inference, at any batch size. `propagate` carries `m` and `s` through
    a model; they start at 0 and 1. Gradients take them as they are.

    Paper: Shekhovtsov and Flach, 2018, https://arxiv.org/abs/1803.10560

    Args:
        layer: a dense layer or convolution with a bias, built or not.
        epsilon: added to the variance. Defaults to 1e-5.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        Those of the wrapped layer.

    Raises:
        KerasNormError: another kind of layer, or one without a bias.
    """

    def __init__(self, layer, epsilon: float = 1e-5, **kwargs):
        super().__init__(layer, **kwargs)
        self.epsilon = float(epsilon)

    @classmethod
    def unfit(cls, layer):
        if not isinstance(layer, (keras.layers.Dense, *CONVOLUTIONS)):
            return "moments go through dense layers and convolutions alone"
        if getattr(layer, "groups", 1) != 1:
            return "its filters read groups of channels"
        return None if layer.use_bias else "it has no bias to take the mean"

    def kernel(self, v, g, input_mean, input_variance):
        return v * self._slope(v, g, input_variance)

    def _slope(self, v, g, variance):
        square = self._sum(ops.square(v), variance)
        return g * moments.inverse_root(square, self.epsilon)

    def _sum(self, v, values):
        """Sum over a filter's inputs, the last axis of which are the channels."""
        taps = v.shape[0] // values.shape[0]
        return ops.matmul(ops.tile(values, (taps,)), v)

    def bias(self):
        """The bias in use: the wrapped layer's, less the mean."""
        (kernel,) = self.kernels
        held = {n: ops.convert_to_tensor(p) for n, p in self.parameters(kernel).items()}
        v = kernel.columns(ops.cast(kernel.variable, held["g"].dtype))
        mean = self._sum(v, held["input_mean"])
        bias = ops.cast(self.layer.bias, mean.dtype)
        return bias - mean * self._slope(v, held["g"], held["input_variance"])

    def initial(self, v):
        return {"g": ops.ones_like(v[0])}

    def state(self, v):
        channels = v.shape[0] // math.prod(getattr(self.layer, "kernel_size", (1,)))
        shape = (channels,)
        return {
            "input_mean": ops.zeros(shape, v.dtype),
            "input_variance": ops.ones(shape, v.dtype),
        }

    def absorb(self, v, w):
        square = ops.sum(ops.square(w), 0)
        return {"v": w, "g": ops.sqrt(square + self.epsilon), **self.state(w)}

    def call(self, *args, training=None, **kwargs):
        (kernel,) = self.kernels
        exchanged = {id(kernel.variable): self.weight(kernel)}
        exchanged[id(self.layer.bias)] = self.bias()
        return self.run(exchanged, args, kwargs, training)

    def fold_into(self, plain):
        super().fold_into(plain)
        plain.bias.assign(self.bias())

    def output_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of the outputs, per channel, by the same assumption."""
        mean, g = (
            ops.convert_to_numpy(t).astype("float64") for t in (self.layer.bias, self.g)
        )
        return moments_of(self.layer.activation, mean, g**2)


def propagate(model: Any, mean: Any = 0.0, variance: Any = 1.0) -> None:
    """Carries the moments of the inputs through a model, in each of its layers.

    To be repeated after the weights change. Moments go through activations (ReLU in
    closed form, others by quadrature) and averages; they pass layers that neither
    scale nor mix (reshaping, dropout, max pooling) as they are, and are 0 and 1 behind
    any other.

    Args:
        model: a Functional or Sequential model.
        mean, variance: of its inputs over the data set, numbers or one per channel.
    """
    program = Program(model)
    names = ("input_mean", "input_variance")
    known = {v: (np.asarray(mean), np.asarray(variance)) for v in program.inputs}
    kept = (keras.layers.Dropout, keras.layers.Identity)
    pools = tuple(
        getattr(keras.layers, f"{kind}Pooling{n}D")
        for kind in ("Max", "GlobalMax", "Average", "GlobalAverage")
        for n in (1, 2, 3)
    )
    for step in program.instructions:
        layer = step.operation
        found = known.get(step.inputs[0]) if step.inputs else None
        if isinstance(layer, AnalyticNormalization):
            if found is not None:
                for name, value in zip(names, found, strict=True):
                    variable = getattr(layer, name)
                    adoption.assign(variable, np.broadcast_to(value, variable.shape))
            found = layer.output_moments()
        elif isinstance(layer, keras.layers.ReLU) and found is not None:
            own = (layer.max_value, layer.negative_slope, layer.threshold)
            plain = own == (None, 0.0, 0.0)
            found = moments_of(keras.activations.relu if plain else layer, *found)
        elif isinstance(layer, keras.layers.Activation) and found is not None:
            found = moments_of(layer.activation, *found)
        elif isinstance(layer, keras.layers.Add):
            pairs = [known.get(v) for v in step.inputs]
            found = None
            if all(pair is not None for pair in pairs):
                found = tuple(
                    np.sum(np.broadcast_arrays(*m), 0) for m in zip(*pairs, strict=True)
                )
        elif not isinstance(layer, (*kept, *pools)):
            found = None
        if found is not None:
            known[step.outputs[0]] = found


def moments_of(
    activation: Any, mean: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of an activation of normal variables, by quadrature."""
    if activation in (None, keras.activations.linear):
        return mean, variance
    if activation is keras.activations.relu:
        # Its kink spoils the quadrature, and it has a closed form.
        s = np.sqrt(variance)
        a = mean / s
        density = np.exp(-(a**2) / 2) / math.sqrt(2 * math.pi)
        below = np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)))(a)
        first = mean * below + s * density
        second = (mean**2 + variance) * below + mean * s * density
        return first, second - first**2
    nodes, weights = np.polynomial.hermite_e.hermegauss(99)
    weights = weights / weights.sum()
    z = mean[..., None] + np.sqrt(variance)[..., None] * nodes
    y = ops.convert_to_numpy(activation(ops.convert_to_tensor(z, "float32")))
    first = (y * weights).sum(-1)
    return first, ((y - first[..., None]) ** 2 * weights).sum(-1)


def oracle(x, weights, config, training, mask):
    v, mean, variance = (weights[n] for n in ("kernel", "input_mean", "input_variance"))
    over = tuple(range(v.ndim - 1))
    mu = np.sum(v * mean[:, None], over)
    var = np.sum(v**2 * variance[:, None], over)
    z = (linear(x, v) - mu) / np.sqrt(var + config.get("epsilon", 1e-5))
    return weights["g"] * z + weights["bias"]


def check_moments():
    rng = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((50,))])
    for _ in range(2):
        dense = keras.layers.Dense(40, activation="relu", bias_initializer="normal")
        model.add(AnalyticNormalization(dense))
    model.add(AnalyticNormalization(keras.layers.Dense(30)))
    propagate(model, mean=0.5, variance=4.0)
    y = model.predict(rng.normal(0.5, 2.0, (4000, 50)).astype("float32"), verbose=0)
    # Independence holds at the input alone; a handful of percent is the paper's too.
    np.testing.assert_allclose(y.mean(0), 0, atol=0.5)
    np.testing.assert_allclose(np.mean(y.var(0)), 1, atol=0.35)
    first = model.layers[0]
    first.layer.activation = keras.activations.linear
    z = ops.convert_to_numpy(first(rng.normal(0.5, 2.0, (4000, 50)).astype("float32")))
    bias = ops.convert_to_numpy(first.layer.bias)
    np.testing.assert_allclose(z.mean(0), bias, atol=0.1)
    np.testing.assert_allclose(z.std(0), 1, atol=0.1)


def check_moments_of_relu():
    z = np.random.default_rng(0).normal(0.3, 0.8, 1_000_000)
    mean, variance = moments_of(
        keras.activations.relu, np.array([0.3]), np.array([0.64])
    )
    np.testing.assert_allclose(mean, np.maximum(z, 0).mean(), rtol=5e-3)
    np.testing.assert_allclose(variance, np.maximum(z, 0).var(), rtol=1e-2)


declare(
    AnalyticNormalization,
    name="analytic",
    aliases=("avp",),
    title="Analytic variance propagation",
    family="weight",
    paper="Shekhovtsov and Flach, 2018, arXiv:1803.10560",
    invariance="filter",
    oracle=oracle,
    **rules(AnalyticNormalization),
    cases=CASES,
    claims=CLAIMS - {"sign_equivariant"},  # the mean stays where it is
    undecided=UNDECIDED,
    checks=(check_moments, check_moments_of_relu),
)
