"""Whether an exact rewrite is one: the outputs before and after, compared."""

from __future__ import annotations

from typing import Any

import numpy as np

from kerasnorm.common.errors import KerasNormError
from rewriters import private
from rewriters.compare import Comparison, compare, outputs, random_inputs, rounding


# An exact step may differ by float32 rounding through a deep model, no more. Each
# layer rounds, where `rounding` moves the inputs alone: hence the factor.
TOLERANCE = 1e-4
TOLERANCE_FLOAT16 = 1e-2
ROUNDINGS = 10


def verify(model: Any, new: Any, what: str, **more: str) -> Comparison | None:
    """Compares the outputs of a model and of an exact rewrite on random inputs.

    Args:
        model: the model before.
        new: the model after.
        what: what was done, for the message.
        **more: further arguments of the error.

    Returns:
        The comparison; None where no random input suits the model.

    Raises:
        KerasNormError: they differ by more than rounding explains.
    """
    try:
        x = random_inputs(model)
        ours = outputs(model, x)
    except Exception:
        # Inputs of a kind of their own (strings, graphs, ragged): nothing to show.
        return None
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
