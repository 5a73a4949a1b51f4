"""The error a kerasnorm user meets, and the checks that most arguments need."""

from __future__ import annotations

import contextlib
import functools
import numbers
from collections.abc import Iterator

from rewriters import arguments
from rewriters.errors import RewriteError


class KerasNormError(RewriteError):
    """What happened, with which values, what was expected, how to mend it."""


# For every public function: see there.
taking = functools.partial(arguments.taking, KerasNormError)


@contextlib.contextmanager
def accepting(what: str, arguments: object) -> Iterator[None]:
    """Makes one error of what a constructor raises over its arguments."""
    try:
        yield
    except KerasNormError:
        raise
    except (TypeError, ValueError) as error:
        raise KerasNormError(
            f"{what} refuses its arguments", got=f"{arguments}: {error}"
        ) from error


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
