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
