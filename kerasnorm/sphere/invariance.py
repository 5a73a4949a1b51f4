"""Which weights have a scale that cannot matter: proved on the graph, checked on data.

Multiplying a filter by c > 0 multiplies what it computes by c, and a normalization
behind it divides by c again, if nothing else gets in between. `kerasnorm.flow` follows
the factor along every path out of a kernel; this module asks it for a whole model, and
checks its answers with numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from keras import ops

from kerasnorm.common.data import collect
from kerasnorm.common.errors import KerasNormError, taking
from kerasnorm.common.results import render
from kerasnorm.flow.analysis import Flow, flows
from kerasnorm.method.registry import read
from kerasnorm.runtime.models import opened
from rewriters import private
from rewriters.compare import nudged, outputs, relative


Array = np.ndarray

# Factors of the numeric check, and what two outputs in training mode may differ by,
# relative to the largest of them; more where rounding the inputs makes more of it.
FACTORS = (0.1, 10.0)
TOLERANCE, TOLERANCE_FLOAT16 = 1e-4, 1e-2
ROUNDINGS = 10
# In place of the epsilons meanwhile, which know of no scale.
EPSILON = 1e-12


class Weights(Sequence[Flow]):
    """The kernels of a model, each with its verdict; `print` shows a table.

    Attributes:
        difference: largest difference of the outputs in training mode with all
            invariant weights scaled at random, relative to the largest output; None
            where that was not checked.
    """

    def __init__(self, found: Sequence[Flow], difference: float | None = None):
        self._found = tuple(found)
        self.difference = difference

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            named = {f.name: f for f in self._found} | {f.path: f for f in self._found}
            if key not in named:
                raise KerasNormError(
                    "no such weight", got=repr(key), expected=", ".join(named)
                )
            return named[key]
        return self._found[key]

    @property
    def invariant(self) -> tuple[Flow, ...]:
        """Those whose scale cannot matter."""
        return tuple(f for f in self._found if f.invariant)

    def __str__(self) -> str:
        rows = [
            (
                f.name,
                "undecided" if not f.decided else f.granularity or "no",
                "with its bias" if f.joint else "",
                f.reason,
            )
            for f in self._found
        ]
        return render(("weight", "scale invariant", "", "because"), rows)


@taking()
def scale_invariant_weights(model: Any, verify: Any = None) -> Weights:
    """Which weights can be scaled without changing what the model computes in training.

    A proof on the graph: along every path out of a kernel (sums, concatenations,
    positively homogeneous activations, pooling, dropout, reshapes, further linear
    layers, custom layers made of these) its scale must meet a normalization that is
    blind to it before anything else. The claim holds for epsilon = 0; with an epsilon,
    up to its share of the variance. Kernels of any of Keras's linear layers are found,
    wherever they are held; where their filters lie follows from the layer.

    Args:
        model: any built Keras model, or the path of a saved one; left untouched.
        verify: inputs (arrays as `model` takes them): each unit of each invariant
            weight is scaled by 0.1 or 10 at random, all at once, and the outputs in
            training mode are compared.

    Returns:
        A sequence of one `Flow` per kernel, in order of computation: `invariant`,
        `granularity` (`"filter"`, `"group"`, `"layer"`), `joint` (its bias must be
        scaled with it), `through` (the normalizations), `reason`, and `decided`, which
        is False where no proof was found either way.

    Raises:
        KerasNormError: `verify` does not fit the model; the outputs change: a layer
            does not do what it declares.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4),
    ...                           keras.layers.BatchNormalization()])
    >>> scale_invariant_weights(model)["dense/kernel"].granularity
    'filter'
    """
    model = opened(model)
    found = flows(model)
    if verify is None:
        return Weights(found)
    given = collect(model, verify)
    verify = given.pack(given.arrays)
    result = Weights(found, 0.0)
    if result.invariant:
        result.difference, limit = measure(model, result.invariant, verify)
        if not result.difference <= limit:
            single = [
                (measure(model, [f], verify)[0], f.name) for f in result.invariant
            ]
            worst = ", ".join(
                f"{name} {gap:.1e}" for gap, name in sorted(single)[:-4:-1]
            )
            raise KerasNormError(
                "weights that should be scale invariant are not",
                got=f"outputs differ by {result.difference:.1e}: {worst}",
                expected=f"at most {limit:.1e}",
                fix="Report this model, with the layers behind these weights.",
            )
    return result


def measure(
    model: Any, found: Sequence[Flow], x: Any, seed: int = 0
) -> tuple[float, float]:
    """By how much the outputs in training mode change when weights are scaled.

    Every unit is multiplied by 0.1 or 10, at random. The epsilons of all normalizations
    are next to nothing meanwhile; the model is left as it was.

    Args:
        model: the model.
        found: which weights; units of a weight that is not invariant are its whole.
        x: inputs.
        seed: of the choice of factors.

    Returns:
        The largest difference relative to the largest output (at least 1), and how much
        of it float32 may be: 1e-4, or ten times what the outputs move by when the
        inputs are rounded otherwise.
    """
    rng = np.random.default_rng(seed)
    with _epsilons(model), _kept(model) as restore:
        y = outputs(model, x, training=True)
        restore()
        z = outputs(model, nudged(x), training=True)
        restore()
        for f in found:
            scale_units(f, rng.choice(FACTORS, max(f.units, default=0) + 1))
        scaled = outputs(model, x, training=True)
    half = any("16" in layer.compute_dtype for layer in private.flatten_layers(model))
    limit = TOLERANCE_FLOAT16 if half else TOLERANCE
    return relative(y, scaled), max(limit, ROUNDINGS * relative(y, z))


def scale_units(flow: Flow, factors: Array) -> None:
    """Multiplies the units of a weight, and their biases where they go together.

    Args:
        flow: the weight; one unit where it is not invariant.
        factors: one per unit.
    """
    kernel, count = flow.kernel, flow.kernel.view_shape()[1]
    per_filter = np.asarray(factors)[list(flow.units) if flow.units else [0] * count]
    columns = ops.convert_to_numpy(
        kernel.columns(ops.convert_to_tensor(kernel.variable))
    )
    kernel.variable.assign(
        kernel.from_columns(columns * per_filter.astype(columns.dtype))
    )
    if flow.joint:
        bias = kernel.layer.bias
        value = ops.convert_to_numpy(bias)
        fits = per_filter.size == value.size and len(set(flow.units)) > 1
        by = per_filter.reshape(value.shape) if fits else per_filter[0]
        bias.assign((value * by).astype(value.dtype))


@contextlib.contextmanager
def _kept(model: Any) -> Iterator[Any]:
    """Context after which all variables, seeds included, are what they were."""
    values = [(v, ops.convert_to_numpy(v).copy()) for v in model.variables]

    def restore() -> None:
        for variable, value in values:
            variable.assign(value)

    try:
        yield restore
    finally:
        restore()


@contextlib.contextmanager
def _epsilons(model: Any) -> Iterator[None]:
    layers = {
        id(x): x
        for x in private.flatten_layers(model)
        if hasattr(x, "epsilon") and read(x) is not None
    }
    before = [(x, x.epsilon) for x in layers.values()]
    try:
        for x, _ in before:
            x.epsilon = EPSILON
        yield
    finally:
        for x, value in before:
            x.epsilon = value
