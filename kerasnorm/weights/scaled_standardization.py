"""Scaled weight standardization."""

from __future__ import annotations

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
from kerasnorm.method.registry import Case, declare
from kerasnorm.weights.standardization import WeightStandardization
from rewriters.program import Program, is_graph


# 1 / sqrt(var(f(z))) for standard normal z; of the normalizer-free networks' own
# code, an estimate from samples: the ReLU's is 1.7128586 exactly.
GAINS = {
    "linear": 1.0,
    "relu": 1.7139588594436646,
    "silu": 1.7881293296813965,
    "gelu": 1.7015043497085571,
}


@keras.saving.register_keras_serializable("kerasnorm")
class ScaledWeightStandardization(WeightStandardization):
    r"""Standardized filters that keep the variance of their inputs: no norm needed.

        w = gain * gamma * (v - mean(v)) / sqrt(max(fan_in * var(v), epsilon))

    With the gain of the activation in front (`"relu"` for a layer that reads a ReLU),
    the variance stays the same through the network, which needs no normalization of
    activations then (NF-ResNets; their residual branches are scaled as well).

    Paper: Brock, De and Smith, 2021, https://arxiv.org/abs/2101.08692, and Brock et
    al., 2021, https://arxiv.org/abs/2102.06171

    Args:
        layer: the layer to wrap, built or not.
        epsilon: least value of `fan_in * var`. Defaults to 1e-4.
        scale: whether to learn `gamma` per filter, which starts at 1.
        gain: a number, or the activation whose output the layer reads: `"linear"`
            (1, the default), `"relu"`, `"silu"` or `"gelu"`.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        Those of the wrapped layer.

    Raises:
        KerasNormError: unknown gain, or the layer has no kernel to standardize.
    """

    def __init__(
        self,
        layer,
        epsilon: float = 1e-4,
        scale: bool = True,
        gain: float | str = 1.0,
        **kwargs,
    ):
        super().__init__(layer, epsilon=epsilon, scale=scale, **kwargs)
        if isinstance(gain, str) and gain not in GAINS:
            raise KerasNormError(
                "no gain is known for this activation",
                got=repr(gain),
                expected=f"a number, or one of {', '.join(GAINS)}",
            )
        self.gain = gain

    def inverse(self, variance, fan_in):
        gain = GAINS[self.gain] if isinstance(self.gain, str) else self.gain
        return gain * ops.rsqrt(ops.maximum(fan_in * variance, self.epsilon))


def start(model, layers, x):
    """Gives each layer the gain of the activation whose output it reads."""
    if not is_graph(model):
        return
    program = Program(model)
    for layer in layers:
        i = next((i for i in program.instructions if i.operation is layer), None)
        name = _activation_before(program, i.inputs[0]) if i is not None else None
        layer.gain = name if name in GAINS else 1.0


def _activation_before(program, value):
    """Name of the activation behind a value, through layers that have none."""
    producer = program.producer.get(value)
    if producer is None:
        return None
    operation = producer.operation
    if isinstance(operation, keras.layers.ReLU):
        return "relu"
    found = getattr(getattr(operation, "activation", None), "__name__", "linear")
    found = type(operation).__name__.lower() if found == "linear" else found
    if found in GAINS:
        return found
    looked = len(producer.inputs) == 1 and not isinstance(operation, Reparametrized)
    return _activation_before(program, producer.inputs[0]) if looked else None


def kernel_of_paper(v, weights, config, training):
    gain = {"relu": 1.7139588594436646}.get(config.get("gain", ""), 1.0)
    root = np.sqrt(np.maximum(len(v) * v.var(0), 1e-4))
    return gain * weights.get("gamma", 1.0) * (v - v.mean(0)) / root


def check_gains():
    z = np.random.default_rng(0).normal(size=1_000_000).astype("float32")
    for name, gain in GAINS.items():
        y = ops.convert_to_numpy(keras.activations.get(name)(z))
        # A million samples give the deviation to about 1e-3.
        np.testing.assert_allclose(1 / y.std(), gain, rtol=4e-3)


declare(
    ScaledWeightStandardization,
    name="scaled_weight_standardization",
    aliases=("sws",),
    title="Scaled weight standardization",
    family="weight",
    paper="Brock, De and Smith, 2021, arXiv:2101.08692",
    invariance="filter",
    oracle=oracle_of(kernel_of_paper),
    **rules(ScaledWeightStandardization),
    start=start,
    cases=(
        *CASES,
        Case({"layer": keras.layers.Dense(3), "gain": "relu"}, (4, 5)),
    ),
    claims=CLAIMS | {"shift_invariant"},
    undecided=UNDECIDED,
    checks=(check_gains,),
)
