"""Data of any kind as checked arrays: what a fit sees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import tree

from kerasnorm.errors import KerasNormError


Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Inputs:
    """Checked inputs of a model.

    Args:
        arrays: one array per input, equally long.
        structure: how the model's call takes them: a nested structure of indices into
            `arrays`.
        cut: the source had more than was read.
    """

    arrays: Arrays
    structure: Any
    cut: bool = False

    def pack(self, flat: Sequence[Any]) -> Any:
        """Flat values as the model's call takes them."""
        return tree.map_structure(lambda k: flat[k], self.structure)

    def __len__(self) -> int:
        return len(self.arrays[0])

    def spread(self, samples: int) -> Inputs:
        """At most this many samples, evenly spaced: data may be sorted by class."""
        return Inputs(_spread(self.arrays, samples), self.structure)


def collect(
    model: Any, data: Any, samples: int | None = None, memory: float = 2e9
) -> Inputs:
    """Inputs of a data source, checked against the model.

    Args:
        model: the Keras model that the inputs are for.
        data: array, list or dict of arrays (several inputs), `tf.data.Dataset`,
            `keras.utils.PyDataset`, or an iterable of batches; each element or batch
            `x`, `(x, y)` or `(x, y, sample_weight)`, of which only `x` is used.
        samples: at most this many, None for all: evenly spaced ones of arrays, the
            first of a source that comes in batches.
        memory: batches are read until they take this many bytes.

    Raises:
        KerasNormError: no data; NaN or infinite values; shapes, number or names of
            inputs that are not the model's; a dtype that holds no numbers.
    """
    batches = _batches(data)
    parts, seen, size, structure, cut = [], 0, 0, 0, False
    for batch in [_inputs_of_arrays(model, data)] if batches is None else batches:
        if size > memory or (samples is not None and seen >= samples):
            cut = samples is None
            break
        x = batch if batches is None else _inputs_of_batch(batch)
        flat, structure = _flat(model, x)
        parts.append(flat)
        seen += len(flat[0])
        size += sum(a.nbytes for a in flat)
    if not seen:
        raise KerasNormError(
            "there is no data to fit with",
            got="0 samples",
            expected="at least a few dozen inputs of the model",
        )
    for part in parts:
        _check_shapes(model, part)
    columns = [list(p) for p in zip(*parts, strict=True)]
    arrays = [np.concatenate(p) if len(p) > 1 else p[0] for p in columns]
    arrays = [a[:samples] for a in arrays]
    for name, a in zip(_names(model, len(arrays)), arrays, strict=True):
        _check_values(name, a)
    return Inputs(arrays, structure, cut)


def split(arrays: Arrays, batch_size: int) -> list[Arrays]:
    """Cuts arrays along the batch into nearly equal parts of at most `batch_size`."""
    n = -(-len(arrays[0]) // batch_size)
    cut = (np.array_split(a, n) for a in arrays)
    return [list(part) for part in zip(*cut, strict=True)]


def _spread(arrays: Arrays, samples: int | None) -> Arrays:
    n = len(arrays[0])
    if samples is None or n <= samples:
        return arrays
    rows = np.linspace(0, n - 1, samples).astype(int)
    return [a[rows] for a in arrays]


# ------------------------------------------------------------------ reading


def _batches(data: Any) -> Iterator[Any] | None:
    """The batches of a source that comes in batches; None for plain arrays."""
    if isinstance(data, keras.utils.PyDataset):
        return (data[k] for k in range(len(data)))
    if _is_array(data) or isinstance(data, (list, tuple, Mapping)):
        return None
    if isinstance(data, Iterable):
        return iter(data)
    raise KerasNormError(
        "cannot read data of this kind",
        got=type(data).__name__,
        expected="arrays, a tf.data.Dataset, a PyDataset or an iterable of batches",
    )


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
        if _count(model) != len(data) or not all(_is_array(d) for d in data):
            return data[0]
    return data


def _flat(model: Any, x: Any) -> tuple[Arrays, Any]:
    """The arrays of one batch in the order of the model's inputs, and how its call
    takes them."""
    wanted = getattr(model, "_inputs_struct", None)  # None where there is no graph
    names = _names(model)
    if isinstance(x, Mapping):
        order = _keys(wanted, names) or sorted(x)
        missing = [k for k in order if k not in x]
        if missing:
            raise KerasNormError(
                "the data lacks inputs of the model",
                got=f"keys {sorted(map(str, x))}",
                expected=f"keys {sorted(map(str, order))}",
            )
        leaves = [x[k] for k in order]
        structure = {k: n for n, k in enumerate(order)}
    elif isinstance(x, (list, tuple)) and x and all(_is_array(v) for v in x):
        leaves = list(x)
        structure = type(x)(range(len(x))) if len(x) > 1 else 0
    else:
        leaves, structure = [x], 0
    if wanted is not None:
        structure = tree.pack_sequence_as(wanted, range(len(names)))
    arrays = [
        keras.ops.convert_to_numpy(v) if _is_array(v) else np.asarray(v) for v in leaves
    ]
    if names and len(arrays) != len(names):
        raise KerasNormError(
            "wrong number of inputs in the data",
            got=f"{len(arrays)} array(s) of shape {[a.shape for a in arrays]}",
            expected=f"{len(names)}, for {', '.join(names)}",
        )
    if len({len(a) if a.ndim else -1 for a in arrays}) != 1 or not arrays[0].ndim:
        raise KerasNormError(
            "the inputs have different numbers of samples",
            got=[a.shape for a in arrays],
            expected="as many samples in every input",
        )
    return arrays, structure


def _keys(structure: Any, names: list[str]) -> list[Any]:
    """The keys under which a dict holds the inputs, in the order of the inputs."""
    if isinstance(structure, Mapping):
        return tree.flatten({k: k for k in structure})
    return names


def _count(model: Any) -> int:
    return len(_names(model))


def _names(model: Any, count: int = 0) -> list[str]:
    """Names of the model's inputs; numbers where it has no graph."""
    inputs = getattr(model, "inputs", None)
    if inputs:
        return [t.name for t in inputs]
    return [f"input {k}" for k in range(count)]


# ----------------------------------------------------------------- checking


def _check_shapes(model: Any, arrays: Arrays) -> None:
    for t, a in zip(getattr(model, "inputs", None) or [], arrays, strict=False):
        wanted = tuple(t.shape)
        pairs = zip(wanted[1:], a.shape[1:], strict=False)
        if len(wanted) != a.ndim or any(w not in (None, g) for w, g in pairs):
            raise KerasNormError(
                f"the data does not fit input {t.name!r}",
                got=f"shape {a.shape}",
                expected=f"shape {wanted}",
            )


def _check_values(name: str, a: np.ndarray) -> None:
    if a.dtype.kind in "iub":
        return
    try:
        # Also reads bfloat16, whose kind is that of no number.
        finite = np.isfinite(a if a.dtype.kind in "fc" else a.astype("float32"))
    except (TypeError, ValueError):
        raise KerasNormError(
            f"the data for {name!r} holds no numbers",
            got=f"dtype {a.dtype}",
            expected="integers or floating point numbers",
        ) from None
    if not finite.all():
        bad = np.unique(np.nonzero(~finite)[0])
        raise KerasNormError(
            f"the data for {name!r} has NaN or infinite values",
            got=f"{len(bad)} of {len(a)} samples, the first at index {bad[0]}",
            expected="finite numbers",
            fix="Drop or repair these samples",
        )
