"""The error base: what happened, with which values, what was expected, the mend."""

from __future__ import annotations

import re


class RewriteError(ValueError):
    """Raised when a model cannot be read, edited or saved as asked.

    Args:
        what: what happened, a clause without a full stop.
        got: the values it happened with.
        expected: what would have been right.
        fix: what the caller can do about it.

    The message is made of these, in this order, as short sentences; each stays
    readable as an attribute of the same name.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: str | None = None,
        fix: str | None = None,
    ):
        self.what, self.got, self.expected, self.fix = what, got, expected, fix
        head = what if got is None else f"{what}: got {got}"
        parts = [head, expected and f"Expected {expected}", fix]
        super().__init__(" ".join(f"{p.rstrip('.')}." for p in parts if p))

    def __reduce__(self):
        # Exceptions pickle by their positional arguments alone; ours are keywords.
        return _rebuild, (type(self), self.what, self.got, self.expected, self.fix)


def _rebuild(cls, what, got, expected, fix):
    return cls(what, got=got, expected=expected, fix=fix)


# Keras sets what a layer's call raised in bold, between words of its own.
_WRAPPED = re.compile(r"Exception encountered when .*?\x1b\[1m(.*?)\x1b\[0m", re.S)


def reason(error: BaseException) -> str:
    """One line that says why, of what may be somebody else's error of many."""
    wrapped = _WRAPPED.search(str(error))
    text = wrapped[1] if wrapped else str(error)
    return (text.strip() or repr(error)).splitlines()[0]
