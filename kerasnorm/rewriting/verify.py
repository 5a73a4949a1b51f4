"""Whether an exact rewrite is one: the outputs before and after, compared."""

from __future__ import annotations

from typing import Any

import numpy as np

from kerasnorm.common.errors import KerasNormError
from rewriters import private
from rewriters.compare import Comparison, compare, outputs, random_inputs, rounding
from rewriters.errors import reason


# An exact step may differ by float32 rounding through a deep model, no more. Each
# layer rounds, where `rounding` moves the inputs alone: hence the factor.
TOLERANCE = 1e-4
TOLERANCE_FLOAT16 = 1e-2
ROUNDINGS = 10


def verify(model: Any, new: Any, what: str, **more: str) -> Comparison | str:
    """Compares the outputs of a model and of an exact rewrite on random inputs.

    Args:
        model: the model before.
        new: the model after.
        what: what was done, for the message.
        **more: further arguments of the error.

    Returns:
        The comparison; the reason where there is none: no random input suits the model.

    Raises:
        KerasNormError: they differ by more than rounding explains.
    """
    try:
        x = random_inputs(model)
        ours = outputs(model, x)
    except Exception as error:
        # Inputs of a special kind (strings, graphs, ragged).
        return f"the original cannot be called on random inputs ({reason(error)})"
    result = compare(ours, new, x)
    half = any("16" in x.compute_dtype for x in private.flatten_layers(model))
    limit = TOLERANCE_FLOAT16 if half else TOLERANCE
    if result.relative <= limit or not all(np.isfinite(y).all() for y in ours):
        return result
    limit = max(limit, ROUNDINGS * rounding(model, x))
    if not result.relative <= limit:
        raise KerasNormError(
            f"{what} should be exact and is not",
            got=f"relative difference {result.relative:.2e} on random inputs",
            expected=f"at most {limit:.1e}",
            **more,
        )
    return result
