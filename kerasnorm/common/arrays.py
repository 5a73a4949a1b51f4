"""Arrays of what users hold."""

from __future__ import annotations

import hashlib
from typing import Any

import keras
import numpy as np

from kerasnorm.common.errors import KerasNormError
from rewriters.arguments import shown


def as_array(values: Any) -> np.ndarray:
    """An array of a tensor, an array or nested lists.

    Raises:
        KerasNormError: the lists are uneven within.
    """
    try:
        if type(values) is np.ndarray:
            return values  # Keras would copy it
        if hasattr(values, "shape"):
            return keras.ops.convert_to_numpy(values)
        return np.asarray(values)
    except ValueError:
        raise KerasNormError(
            "the data is no array",
            got=f"{type(values).__name__} {shown(values)}, uneven within",
            expected="samples of one shape; batches as a generator or a dataset",
        ) from None


class Taken:
    """Some rows of an array, copied as they are asked for."""

    def __init__(self, array: Any, rows: np.ndarray):
        if isinstance(array, Taken):
            array, rows = array.array, array.rows[rows]
        self.array, self.rows = array, np.asarray(rows)
        self.shape, self.dtype = (len(self.rows), *array.shape[1:]), array.dtype
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.array[self.rows[rows]]


def fed(a: np.ndarray) -> Any:
    """An array as Keras's trainers take it: strings, of which NumPy has many kinds, as
    tensors."""
    return keras.ops.convert_to_tensor(a, "string") if a.dtype.kind in "OSU" else a


def print_of(sample: Any) -> bytes:
    """What tells one input from others."""
    a = np.asarray(sample)
    raw = repr(a.tolist()).encode() if a.dtype.kind in "OSU" else a.tobytes()
    return hashlib.blake2b(raw, digest_size=16).digest()


def check_strings(name: str, a: np.ndarray) -> None:
    """Refuses an input that holds anything but strings.

    Raises:
        KerasNormError: it does.
    """
    if a.dtype.kind == "O":
        other = {type(v).__name__ for v in a.flat if not isinstance(v, (str, bytes))}
    else:
        other = set() if a.dtype.kind in "SU" else {str(a.dtype)}
    if other:
        raise KerasNormError(
            f"the data for {name!r} holds no strings",
            got=", ".join(sorted(other)),
            expected="an array of strings",
        )


def check_numbers(name: str, a: np.ndarray) -> None:
    """Refuses an input that holds anything but finite numbers.

    Raises:
        KerasNormError: it does.
    """
    if a.dtype.kind in "iub":
        return
    try:
        if a.dtype.kind in "OSU":
            raise TypeError
        # Also reads bfloat16, whose kind is that of no number.
        known = a.dtype.kind in "fc"
        finite = [np.isfinite(v if known else v.astype("float32")).all() for v in a]
        bad = np.flatnonzero(~np.array(finite, bool))
    except (TypeError, ValueError):
        raise KerasNormError(
            f"the data for {name!r} holds no numbers",
            got=f"dtype {a.dtype}",
            expected="an array of integers or floating point numbers",
        ) from None
    if len(bad):
        raise KerasNormError(
            f"the data for {name!r} has NaN or infinite values",
            got=f"{len(bad)} of {len(a)} samples, the first at index {bad[0]}",
            expected="finite numbers",
            fix="Drop or repair these samples",
        )
