"""Arrays of what users hold."""

from __future__ import annotations

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
        if hasattr(values, "shape"):
            return keras.ops.convert_to_numpy(values)
        return np.asarray(values)
    except ValueError:
        raise KerasNormError(
            "the data is no array",
            got=f"{type(values).__name__} {shown(values)}, uneven within",
            expected="samples of one shape; batches as a generator or a dataset",
        ) from None
