"""Data of any kind as checked arrays: what a fit sees."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import tree

from kerasnorm.common.arrays import (
    Taken,
    as_array,
    check_numbers,
    check_strings,
    print_of,
)
from kerasnorm.common.errors import KerasNormError
from rewriters import private
from rewriters.program import fixed_batch


Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Inputs:
    """Checked inputs of a model.

    Args:
        arrays: one array per input, equally long.
        structure: how the model's call takes them: a nested structure of indices into
            `arrays`.
        cut: the source had more than was read.
        stream: all of it, where it can be read again; None where that was all, or
            where there is no second reading.
    """

    arrays: Arrays
    structure: Any
    cut: bool = False
    stream: Stream | None = None
    total: int = 0

    def pack(self, flat: Sequence[Any]) -> Any:
        """Flat values as the model's call takes them."""
        return tree.map_structure(lambda k: flat[k], self.structure)

    def flat(self, packed: Any) -> list[Any]:
        """What `pack` packed."""
        leaves = zip(tree.flatten(self.structure), tree.flatten(packed), strict=True)
        return [v for _, v in sorted(leaves, key=lambda pair: pair[0])]

    def __len__(self) -> int:
        return len(self.arrays[0])

    def spread(self, samples: int) -> Inputs:
        """At most this many samples, evenly spaced: data may be sorted by class."""
        rows = spaced(len(self), samples)
        return self if isinstance(rows, slice) else self.taken(rows)

    def taken(self, rows: np.ndarray) -> Inputs:
        """Some of the samples, in this order; nothing is copied."""
        arrays: Any = [Taken(a, rows) for a in self.arrays]
        return Inputs(arrays, self.structure)

    def without(self, rows: np.ndarray) -> Inputs:
        """The samples but for some."""
        rest = np.setdiff1d(np.arange(len(self)), rows)
        stream = self.stream
        if stream is not None and len(rows):
            stream = Stream(stream.model, stream.data, stream.first)
            stream.left_out = {print_of(v) for v in self.arrays[0][rows]}
        return replace(self, arrays=self.taken(rest).arrays, stream=stream)


def collect(
    model: Any,
    data: Any,
    samples: int | None = None,
    memory: float = 2e9,
    every: bool = True,
) -> Inputs:
    """Inputs of a data source, checked against the model.

    Args:
        model: the Keras model that the inputs are for.
        data: array, list or dict of arrays (several inputs), `tf.data.Dataset`,
            `keras.utils.PyDataset`, or an iterable of batches; each element or batch
            `x`, `(x, y)` or `(x, y, sample_weight)`, of which only `x` is used.
        samples: at most this many, None for all: evenly spaced ones of arrays, the
            first of a source that comes in batches.
        memory: batches are read until they take this many bytes; to join them takes as
            many again.
        every: check the values of those that are not used too.

    Raises:
        KerasNormError: no data; NaN or infinite values; shapes, number or names of
            inputs that are not the model's; no numbers, or no strings where the model
            takes strings.
    """
    batches = batches_of(data)
    parts, seen, size, structure, cut = [], 0, 0, 0, False
    for batch in [_inputs_of_arrays(model, data)] if batches is None else batches:
        if size > memory:
            cut = True
            break
        x = batch if batches is None else _inputs_of_batch(batch)
        flat, structure = _flat(model, x)
        parts.append(flat)
        seen += len(flat[0])
        size += sum(a.nbytes for a in flat)
        if samples is not None and seen >= samples:
            break
    if not seen:
        raise KerasNormError(
            "there is no data to fit with",
            got="0 samples",
            expected="at least a few dozen inputs of the model",
        )
    for part in parts:
        _check_shapes(model, part)
    columns = [list(p) for p in zip(*parts, strict=True)]
    arrays = [joined(p) for p in columns]
    if batches is not None:
        arrays = [a[:samples] for a in arrays]
    total = len(arrays[0])
    if every:
        _check_values(model, arrays)
    if batches is None:
        arrays = _spread(arrays, samples)
    if not every:
        _check_values(model, arrays)
    stream = None
    once = isinstance(data, Iterator) or batch_count(data) == math.inf
    if cut and samples is None and not once:
        stream = Stream(model, data, len(parts[0][0]))
    return Inputs(arrays, structure, cut, stream, total)


class Stream:
    """The inputs in a source that comes in batches and can be read again and again.

    Never more of it is held than is asked for.

    Args:
        model, data: as for `collect`.
        first: samples of the first batch.
    """

    def __init__(self, model: Any, data: Any, first: int):
        self.model, self.data, self.first = model, data, first
        self.left_out: set[bytes] = set()  # prints of first inputs, see `print_of`

    def __iter__(self) -> Iterator[Arrays]:
        """The batches of one reading, checked as those of `collect`."""
        for batch in batches_of(self.data) or ():
            flat, _ = _flat(self.model, _inputs_of_batch(batch))
            _check_shapes(self.model, flat)
            _check_values(self.model, flat)
            if self.left_out:
                kept = [print_of(v) not in self.left_out for v in flat[0]]
                flat = [a[np.asarray(kept)] for a in flat]
            yield flat

    def __len__(self) -> int:
        """Number of samples: full batches as many as the source says it has; where it
        does not say, all are read once and counted."""
        batches = batch_count(self.data)
        if batches is not None:
            return int(batches) * self.first
        return sum(len(flat[0]) for flat in self)

    def shuffled(self, size: int, seed: int, memory: float) -> Iterator[Arrays]:
        """Batches of `size` samples without end, reading after reading. The order is
        random within blocks that take `memory` bytes; what is left of a reading comes
        with the next."""
        rng = np.random.default_rng(seed)
        held: list[Arrays] = []
        while True:
            read = 0
            for flat in self:
                read += len(flat[0])
                held.append(flat)
                n = sum(len(part[0]) for part in held)
                if n < size or sum(a.nbytes for part in held for a in part) < memory:
                    continue
                columns = [np.concatenate(c) for c in zip(*held, strict=True)]
                order = rng.permutation(n)
                held = []
                for k in range(0, n - size + 1, size):
                    yield [c[order[k : k + size]] for c in columns]
                rest = order[n - n % size :]
                if len(rest):
                    held = [[c[rest] for c in columns]]
            if not read:
                raise KerasNormError(
                    "the data could be read only once",
                    got="nothing at the second reading",
                    fix="Give a tf.data.Dataset, a PyDataset, or fewer samples.",
                )


def _spread(arrays: Arrays, samples: int | None) -> Arrays:
    rows = spaced(len(arrays[0]), samples)
    return arrays if isinstance(rows, slice) else [a[rows] for a in arrays]


def spaced(n: int, samples: int | None) -> Any:
    """Which of `n` rows are taken where at most so many are wanted: evenly spaced ones,
    or all, as a slice."""
    if samples is None or n <= samples:
        return slice(None)
    return np.linspace(0, n - 1, samples).astype(int)


# ------------------------------------------------------------------ reading


def batches_of(data: Any) -> Iterator[Any] | None:
    """The batches of a source that comes in batches; None for plain arrays."""
    if isinstance(data, keras.utils.PyDataset):
        n = data.num_batches
        return map(data.__getitem__, itertools.count() if n is None else range(n))
    if _is_array(data) or isinstance(data, (list, tuple, Mapping)):
        return None
    if isinstance(data, Iterable):
        return iter(data)
    raise KerasNormError(
        "cannot read data of this kind",
        got=type(data).__name__,
        expected="arrays, a tf.data.Dataset, a PyDataset or an iterable of batches",
    )


def whole_batch(model: Any, samples: int) -> int | None:
    """`fixed_batch`, of which the samples must fill one.

    Raises:
        KerasNormError: they do not.
    """
    fixed = fixed_batch(model)
    if fixed is not None and samples < fixed:
        raise KerasNormError(
            "there are fewer samples than the model takes at once",
            got=f"{samples} samples, which fill no batch of {fixed}",
            expected=f"at least {fixed}",
        )
    return fixed


def batch_count(data: Any) -> float | None:
    """How many batches a source says it has; None where it does not say."""
    if isinstance(data, keras.utils.PyDataset):
        return math.inf if data.num_batches is None else data.num_batches
    for count in ("__len__", "cardinality"):
        try:
            batches = int(getattr(data, count)())
        except (AttributeError, TypeError):
            continue
        # What TensorFlow returns for endless and for unknown.
        return {-1: math.inf, -2: None}.get(batches, batches)
    return None


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Parts of one array behind each other.

    Raises:
        KerasNormError: they differ in more than their length.
    """
    if len({a.shape[1:] for a in parts}) > 1:
        shapes = sorted({a.shape for a in parts})
        raise KerasNormError(
            "the batches differ in more than the number of samples",
            got=f"shapes {', '.join(map(str, shapes[:3]))}",
            expected="one shape for all samples",
            fix="Pad them alike.",
        )
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _inputs_of_batch(batch: Any) -> Any:
    if isinstance(batch, tuple):
        return batch[0]
    return batch


def _inputs_of_arrays(model: Any, data: Any) -> Any:
    """Arrays may come as `x` or `(x, y)`; a model of two inputs makes that ambiguous,
    and there a tuple of as many arrays as inputs is the inputs."""
    if isinstance(data, tuple) and len(data) in (2, 3):
        if len(_names(model)) != len(data) or not all(_is_array(d) for d in data):
            return data[0]
    return data


def _flat(model: Any, x: Any) -> tuple[Arrays, Any]:
    """The arrays of one batch in the order of the model's inputs, and how its call
    takes them."""
    wanted = private.inputs_struct(model, None)  # None where there is no graph
    names = _names(model)
    if _is_deep(wanted):
        leaves, structure = _leaves(wanted, x), None
    elif isinstance(x, Mapping):
        order = keys_of(wanted) or names or sorted(x)
        missing = [k for k in order if k not in x]
        if missing:
            raise KerasNormError(
                "the data lacks inputs of the model",
                got=f"keys {sorted(map(str, x))}",
                expected=f"keys {sorted(map(str, order))}",
            )
        leaves = [x[k] for k in order]
        structure = {k: n for n, k in enumerate(order)}
    elif (
        isinstance(x, (list, tuple))
        and x
        and all(_is_array(v) and len(v.shape) for v in x)
    ):
        leaves = list(x)
        structure = type(x)(range(len(x))) if len(x) > 1 else 0
    else:
        leaves, structure = [x], 0
    if wanted is not None:
        structure = tree.pack_sequence_as(wanted, range(len(names)))
    arrays = [as_array(v) for v in leaves]
    if names and len(arrays) != len(names):
        raise KerasNormError(
            "wrong number of inputs in the data",
            got=f"{len(arrays)} array(s) of shape {[a.shape for a in arrays]}",
            expected=f"{len(names)}, for {', '.join(names)}",
        )
    if names:
        pairs = zip(model.inputs, arrays, strict=True)
        arrays = [_of_rank(tuple(t.shape), a) for t, a in pairs]
    if len({len(a) if a.ndim else -1 for a in arrays}) != 1 or not arrays[0].ndim:
        raise KerasNormError(
            "the inputs have different numbers of samples",
            got=[a.shape for a in arrays],
            expected="as many samples in every input",
        )
    return arrays, structure


def _of_rank(wanted: tuple[int | None, ...], a: np.ndarray) -> np.ndarray:
    """With or without a last axis of length one, as Keras's models take inputs."""
    if a.ndim == len(wanted) - 1 and a.ndim and wanted[-1] == 1:
        return a[..., None]
    if a.ndim == len(wanted) + 1 and a.shape[-1] == 1:
        return a[..., 0]
    return a


def _is_deep(wanted: Any) -> bool:
    """Whether inputs stand in structures within structures."""
    held = wanted.values() if isinstance(wanted, Mapping) else wanted
    return tree.is_nested(wanted) and any(tree.is_nested(v) for v in held)


def _leaves(wanted: Any, x: Any) -> list[Any]:
    try:
        tree.assert_same_structure(wanted, x)
    except (ValueError, TypeError) as error:
        raise KerasNormError(
            "the data has another structure than the model's inputs",
            got=str(tree.map_structure(lambda v: tuple(np.shape(v)), x)),
            expected=str(tree.map_structure(lambda t: tuple(t.shape), wanted)),
        ) from error
    return tree.flatten(x)


def keys_of(structure: Any) -> list[Any]:
    """The keys of a dict in the order of its leaves; none of anything else."""
    if isinstance(structure, Mapping):
        return tree.flatten({k: k for k in structure})
    return []


def _names(model: Any, count: int = 0) -> list[str]:
    """Names of the model's inputs; numbers where it has no graph."""
    inputs = getattr(model, "inputs", None)
    if inputs:
        return [t.name for t in inputs]
    return [f"input {k}" for k in range(count)]


# ----------------------------------------------------------------- checking


def fits(wanted: tuple[int | None, ...], shape: tuple[int, ...]) -> bool:
    """Whether an input of the wanted shape takes one of this, whatever the batch."""
    pairs = zip(wanted[1:], shape[1:], strict=False)
    return len(wanted) == len(shape) and all(w in (None, g) for w, g in pairs)


def _check_shapes(model: Any, arrays: Arrays) -> None:
    for t, a in zip(getattr(model, "inputs", None) or [], arrays, strict=False):
        wanted = tuple(t.shape)
        if not fits(wanted, a.shape):
            raise KerasNormError(
                f"the data does not fit input {t.name!r}",
                got=f"shape {a.shape}",
                expected=f"shape {wanted}",
            )


def _check_values(model: Any, arrays: Arrays) -> None:
    names = _names(model, len(arrays))
    dtypes = [t.dtype for t in getattr(model, "inputs", None) or ()]
    dtypes = dtypes or [None] * len(names)
    for name, dtype, a in zip(names, dtypes, arrays, strict=True):
        if dtype == "string":
            check_strings(name, a)
        else:
            check_numbers(name, a)
