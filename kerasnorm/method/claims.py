"""What a normalization method may claim, each as one measured number.

A measure takes a built layer and inputs and returns the violation of the property: 0
where it holds, of the order of 1 where it does not. Tests judge the number, and the
diagnosis of a trained model prints it. All are measured in training mode, on the
layer's own parameters unless said otherwise; nothing of the layer's state is changed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.numerics import backend
from rewriters import private


Array = np.ndarray
Measure = Callable[[Any, Array, np.random.Generator], float]

# A claim holds up to here, in float64 with a tiny epsilon; a counterexample is
# `COUNTEREXAMPLE` times as large. What lies between is judged neither.
TOLERANCE = 1e-6
COUNTEREXAMPLE = 100.0

_CLAIMS: dict[str, Measure] = {}


def claims() -> dict[str, Measure]:
    """Every claim by name, in the order of their definition."""
    return dict(_CLAIMS)


def measure(name: str, layer: Any, x: Array, rng: np.random.Generator) -> float:
    """Violation of the claim `name` by a built layer.

    Args:
        name: one of `claims()`.
        layer: any Keras layer; its variables are left as they were.
        x: inputs, at least two samples.
        rng: source of the perturbations.

    Returns:
        The largest violation found, relative to the outputs.
    """
    with _kept(layer):
        return float(_CLAIMS[name](layer, x, rng))


def judge(violation: float) -> bool | None:
    """True: the claim holds. False: a counterexample. None: too close to call."""
    if violation <= TOLERANCE:
        return True
    return False if violation >= COUNTEREXAMPLE * TOLERANCE else None


# ------------------------------------------------------------------ measuring


def _claim(f: Measure) -> Measure:
    _CLAIMS[f.__name__] = f
    return f


def _neutral(f: Measure) -> Measure:
    """Measured with gamma = 1 and without beta or bias: it is about what is normal,
    not about what was learned on top."""

    @functools.wraps(f)
    def measured(layer, x, rng):
        inner = getattr(layer, "layer", layer)
        for name, value in (("gamma", 1.0), ("beta", 0.0), ("bias", 0.0)):
            variable: Any = getattr(inner, name, None)
            if isinstance(variable, keras.Variable):
                variable.assign(ops.full(variable.shape, value, variable.dtype))
        return f(layer, x, rng)

    return measured


@contextlib.contextmanager
def _kept(layer: Any) -> Iterator[None]:
    values = [ops.convert_to_numpy(v).copy() for v in layer.variables]
    try:
        yield
    finally:
        for variable, value in zip(layer.variables, values, strict=True):
            variable.assign(value)


def _output(layer: Any, x: Array, training: bool = True) -> Array:
    f = _function(layer, training)
    return ops.convert_to_numpy(f(*_state(layer), ops.convert_to_tensor(x)))


def _gradient(layer: Any, x: Array, upstream: Array) -> Array:
    f = _gradient_function(layer)
    x, upstream = ops.convert_to_tensor(x), ops.convert_to_tensor(upstream)
    return ops.convert_to_numpy(f(*_state(layer), x, upstream))


def _state(layer: Any) -> tuple[list[Any], list[Any]]:
    return (
        [v.value for v in layer.trainable_variables],
        [v.value for v in layer.non_trainable_variables],
    )


def _call(layer: Any, training: bool) -> Callable:
    """The layer without side effects, its state among the arguments."""
    kwargs = {"training": training} if private.call_has_training_arg(layer) else {}

    def call(trainable, others, x):
        return layer.stateless_call(trainable, others, x, **kwargs)[0]

    return call


# Kept for the layers in hand: every claim runs the same functions on other inputs.
@functools.lru_cache(maxsize=32)
def _function(layer: Any, training: bool) -> Callable:
    return backend.traced(_call(layer, training))


@functools.lru_cache(maxsize=16)
def _gradient_function(layer: Any) -> Callable:
    call = _call(layer, True)

    def gradient(trainable, others, x, upstream):
        return backend.vjp(lambda v: call(trainable, others, v), [x], upstream)[1][0]

    return backend.traced(gradient)


def _difference(a: Array, b: Array) -> float:
    return float(np.abs(a - b).max() / (np.abs(b).max() + 1e-30))


# -------------------------------------------------------------------- claims


@_claim
def batch_independent(layer, x, rng):
    """The output of a sample does not depend on the others in the batch."""
    other = x.copy()
    other[1:] = rng.normal(3.0, 5.0, other[1:].shape)
    return _difference(_output(layer, other)[:1], _output(layer, x)[:1])


@_claim
def scale_invariant(layer, x, rng):
    """f(c x) = f(x) for c > 0."""
    return _difference(_output(layer, 3.0 * x), _output(layer, x))


@_claim
def channel_scale_invariant(layer, x, rng):
    """f(c * x) = f(x) with a c > 0 of its own for each channel."""
    axis = getattr(layer, "axis", -1)
    axis = axis if isinstance(axis, int) else max(a % x.ndim for a in axis)
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return _difference(
        _output(layer, x * rng.uniform(0.5, 2, shape)), _output(layer, x)
    )


@_claim
def shift_invariant(layer, x, rng):
    """f(x + c) = f(x)."""
    return _difference(_output(layer, x + 1.7), _output(layer, x))


@_claim
@_neutral
def sign_equivariant(layer, x, rng):
    """f(-x) = -f(x), without beta."""
    return _difference(_output(layer, -x), -_output(layer, x))


@_claim
@_neutral
def unit_output_scale(layer, x, rng):
    """The mean square of the output is 1, with gamma = 1 and without beta."""
    return abs(float(np.mean(_output(layer, x) ** 2)) - 1.0)


@_claim
@_neutral
def zero_output_mean(layer, x, rng):
    """The mean of the output is 0, without beta."""
    y = _output(layer, x)
    return abs(float(y.mean())) / (float(np.sqrt(np.mean(y**2))) + 1e-30)


@_claim
def train_equals_inference(layer, x, rng):
    """Training and inference mode compute the same."""
    return _difference(_output(layer, x), _output(layer, x, training=False))


@_claim
@_neutral
def idempotent(layer, x, rng):
    """f(f(x)) = f(x), with gamma = 1 and without beta."""
    y = _output(layer, x)
    return _difference(_output(layer, y), y)


@_claim
def weight_scale_invariant(layer, x, rng):
    """Scaling the weights in use leaves the output alone: the kernel of a dense layer
    in front, or the layer's own `v` where it has one."""
    if getattr(layer, "v", None) is not None:
        y = _output(layer, x)
        layer.v.assign(layer.v * 3.0)
        return _difference(_output(layer, x), y)
    kernel = rng.normal(size=(x.shape[-1], x.shape[-1]))
    return _difference(_output(layer, x @ (3.0 * kernel)), _output(layer, x @ kernel))


@_claim
def gradient_orthogonal_to_input(layer, x, rng) -> float:
    """The gradient with respect to the input is orthogonal to it: a step along it
    changes the direction of the input, not its length."""
    dx = _gradient(layer, x, rng.normal(size=_output(layer, x).shape))
    lengths = np.linalg.norm(dx) * np.linalg.norm(x) + 1e-30
    return float(abs(np.vdot(dx, x)) / lengths)


@_claim
def bounded_jacobian(layer, x, rng):
    """Gradients do not grow as the input shrinks."""
    upstream = rng.normal(size=_output(layer, x).shape)
    small, usual = (
        np.linalg.norm(_gradient(layer, scale * x, upstream)) for scale in (1e-2, 1.0)
    )
    return max(0.0, float(small / usual) - 1.0)
