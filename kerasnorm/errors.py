"""The error a kerasnorm user meets, and the check that most arguments need."""

from __future__ import annotations

import numbers

from rewriters.errors import RewriteError


class KerasNormError(RewriteError):
    """What happened, with which values, what was expected, how to mend it."""


def count(name: str, value: object) -> int:
    """The argument `name` as an `int`, if it counts something.

    Raises:
        KerasNormError: no whole number (`True` is none, a NumPy integer is) or below 1.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    number = int(value) if whole else 0  # type: ignore[arg-type]
    if number < 1:
        raise KerasNormError(
            f"{name} is no positive whole number", got=f"{name}={value!r}"
        )
    return number
