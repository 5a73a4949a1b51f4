"""Do two models compute the same? By how much not, and how often do they agree?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np
from keras import tree

from rewriters import private
from rewriters.errors import RewriteError
from rewriters.program import fixed_batch


@dataclass(frozen=True)
class Comparison:
    """The difference between the outputs of two models on the same inputs.

    Attributes:
        max_abs: largest absolute difference over all outputs.
        relative: `max_abs` over `max(1, max|y|)` of the first model, per output, the
            largest.
        agreement: share of samples with the same arg max on the last axis; None where
            no output has more than one unit.
        finite: whether both models gave finite numbers only.
        samples: how many inputs were compared.
    """

    max_abs: float
    relative: float
    agreement: float | None
    finite: bool
    samples: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    first: Any, second: Any, x: Any = None, *, samples: int = 4, seed: int = 0
) -> Comparison:
    """Runs two models on the same inputs, in inference mode.

    Args:
        first: a model, or the outputs it gave, see `outputs`.
        second: another with the same inputs and outputs.
        x: array, or list or dict of arrays; random inputs that suit the first model
            when None (standard normal; small integers for integer inputs and in
            front of embeddings).
        samples: how many random inputs.
        seed: of the random inputs.

    Raises:
        RewriteError: there are no samples, or the outputs differ in number or shape.
    """
    x = random_inputs(first, samples, seed) if x is None else x
    if not len(tree.flatten(x)[0]):
        raise RewriteError(
            "nothing to compare two models on", got="0 samples", expected="at least one"
        )
    ours = first if isinstance(first, list) else outputs(first, x)
    theirs = outputs(second, x)
    if [y.shape for y in ours] != [y.shape for y in theirs]:
        raise RewriteError(
            "the two models have outputs of other shapes",
            got=[y.shape for y in theirs],
            expected=f"{[y.shape for y in ours]}",
        )
    gaps = _gaps(ours, theirs)
    classes = [
        np.mean(a.argmax(-1) == b.argmax(-1))
        for a, b in zip(ours, theirs, strict=True)
        if a.ndim and a.shape[-1] > 1
    ]
    return Comparison(
        max_abs=max(gap for gap, _ in gaps),
        relative=_relative(gaps),
        agreement=float(np.mean(classes)) if classes else None,
        finite=all(np.isfinite(y).all() for y in (*ours, *theirs)),
        samples=len(tree.flatten(x)[0]),
    )


def rounding(model: Any, x: Any, *, draws: int = 3) -> float:
    """How far a model's outputs move when its inputs are rounded otherwise.

    Each floating input moves by one unit in the last place, up or down. No rewrite of
    the model can be expected to agree with it better than it agrees with itself.

    Args:
        model: a model.
        x: array, or list or dict of arrays.
        draws: how many random choices of directions are tried.

    Returns:
        The largest difference, relative as in `Comparison`.
    """
    run = _runner(model, x)
    y = run(x)
    moved = (run(nudged(x, seed)) for seed in range(draws))
    return max((relative(y, z) for z in moved), default=0.0)


def nudged(x: Any, seed: int = 0) -> Any:
    """Inputs with each floating value moved by one unit in the last place, at random
    up or down."""
    rng = np.random.default_rng(seed)

    def step(a: Any) -> Any:
        a = np.asarray(a)
        if a.dtype.kind != "f":
            return a
        towards = np.where(rng.random(a.shape) < 0.5, -np.inf, np.inf)
        return np.nextafter(a, towards.astype(a.dtype))

    return tree.map_structure(step, x)


def relative(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Difference of two lists of outputs, as in `Comparison`; NaN where one has NaN."""
    return _relative(_gaps(ours, theirs))


def _relative(gaps: Sequence[tuple[float, float]]) -> float:
    return float(np.max([gap / max(1.0, size) for gap, size in gaps]))


def _gaps(ours: Sequence[Any], theirs: Sequence[Any]) -> list[tuple[float, float]]:
    """Largest difference of each pair, and the largest value of the first."""
    doubles = [[np.asarray(y, "float64") for y in side] for side in (ours, theirs)]
    return [
        (
            float(np.max(np.abs(a - b), initial=0)),
            float(np.max(np.abs(a), initial=0)),
        )
        for a, b in zip(*doubles, strict=True)
    ]


# From this many bytes of intermediate tensors, a graph is traced and run sample by
# sample: called eagerly, Keras keeps all of them until the call ends.
LARGE = 2**28


def outputs(model: Any, x: Any, training: bool = False) -> list[Any]:
    """Flat list of a model's outputs as float32 arrays.

    What the call assigns, such as the states of a stateful recurrent layer, is as it
    was afterwards. Graphs with large intermediate tensors run sample by sample, in the
    memory of a `predict`.
    """
    return _runner(model, x, training)(x)


def _runner(model: Any, x: Any, training: bool = False) -> Callable[[Any], list[Any]]:
    """A function of inputs like these, see `outputs`; traced at most once."""

    def call(inputs: Any) -> list[Any]:
        with keras.StatelessScope() if model.built else contextlib.nullcontext():
            result = tree.flatten(model(inputs, training=training))
        return [keras.ops.cast(y, "float32") for y in result]

    def run(x: Any) -> list[Any]:
        inputs = tree.map_structure(keras.ops.convert_to_tensor, x)
        return [keras.ops.convert_to_numpy(y) for y in call(inputs)]

    rows = {len(a) for a in tree.flatten(x) if np.ndim(a)}
    large = len(rows) == 1 and _bytes(model) * max(rows) >= LARGE
    if not large:
        return run
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        call = tf.function(call, autograph=False)
    if fixed_batch(model):
        return run

    def one_by_one(x: Any) -> list[Any]:
        parts = [
            run(tree.map_structure(lambda a, k=k: a[k : k + 1], x))
            for k in range(len(tree.flatten(x)[0]))
        ]
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    return one_by_one


def _bytes(model: Any) -> int:
    """Size of what the layers of a model give for one sample, where graphs say so."""
    layers = private.flatten_layers(model)
    nodes = [n for x in layers for n in private.inbound_nodes(x, ())]
    shapes = [t.shape[1:] for n in nodes for t in n.outputs]
    return 4 * sum(math.prod(d or 1 for d in shape) for shape in shapes)


def random_inputs(model: Any, samples: int = 4, seed: int = 0, size: int = 16) -> Any:
    """Inputs of the shapes a model wants, in its own structure.

    Dimensions that are dynamic get `size`. Integer inputs, and those that feed an
    embedding, get integers from 0 (so that masks occur) to below its vocabulary.
    """
    rng = np.random.default_rng(seed)
    struct = private.inputs_struct(model, None)
    if struct is None:
        struct = private.inputs_struct(private.functional(model, None), None)
    if struct is None:
        shapes = (model.get_build_config() or {}).get("input_shape")
        if shapes is None:
            raise RewriteError(
                f"the inputs of {model.name!r} are not known",
                expected="a model that was built or called, or `x` given",
            )
        if isinstance(shapes, dict):
            struct = {k: keras.KerasTensor(tuple(s)) for k, s in shapes.items()}
        elif shapes and isinstance(shapes[0], (list, tuple)):
            struct = [keras.KerasTensor(tuple(s)) for s in shapes]
        else:
            struct = keras.KerasTensor((None, *shapes[1:]))
    vocabularies = _vocabularies(model)

    def one(t: Any) -> np.ndarray:
        shape = tuple(d or size for d in t.shape[1:])
        shape = (t.shape[0] or samples, *shape)
        dtype = keras.backend.standardize_dtype(t.dtype)
        top = vocabularies.get(id(t))
        if top is not None or "int" in dtype or dtype == "bool":
            return rng.integers(0, top or 2, shape).astype(dtype)
        if dtype == "string":
            return np.full(shape, "a")
        return rng.standard_normal(shape).astype(dtype)

    return tree.map_structure(one, struct)


def _vocabularies(model: Any) -> dict[int, int]:
    """Smallest vocabulary among the embeddings that read each input directly."""
    found: dict[int, int] = {}
    for t in getattr(model, "inputs", None) or ():
        operation = private.keras_history(t).operation
        for node in private.outbound_nodes(operation, ()):
            if isinstance(node.operation, keras.layers.Embedding):
                n = node.operation.input_dim
                found[id(t)] = min(n, found.get(id(t), n))
    return found
