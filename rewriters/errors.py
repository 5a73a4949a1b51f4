"""The error base: what happened, with which values, what was expected, the mend."""

from __future__ import annotations

import re
from typing import Any


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
        what, expected, fix = readable(what), readable(expected), readable(fix)
        got = readable(got) if isinstance(got, str) else got
        self.what, self.got, self.expected, self.fix = what, got, expected, fix
        head = what if got is None else f"{what}: got {readable(str(got))}"
        parts = [head, expected and f"Expected {expected}", fix]
        super().__init__(" ".join(_sentence(p) for p in parts if p))

    def __reduce__(self):
        # Exceptions pickle by their positional arguments alone; ours are keywords.
        return _rebuild, (type(self), self.what, self.got, self.expected, self.fix)


def _sentence(text: str) -> str:
    return text if text.endswith(("?", "...")) else f"{text.rstrip('.')}."


# Longer parts of a message are cut in the middle: they may quote a whole file.
_LONGEST = 1200
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e]")


def readable(text: Any) -> Any:
    """A text that may come from a file, for a terminal: of bounded length, and control
    characters, which move the cursor or hide text, written out. None stays None."""
    if not isinstance(text, str):
        return text
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return _UNPRINTABLE.sub(lambda m: repr(m[0])[1:-1], text)


def _rebuild(cls, what, got, expected, fix):
    return cls(what, got=got, expected=expected, fix=fix)


# Keras sets what a layer's call raised in bold, between words of its own.
_WRAPPED = re.compile(r"Exception encountered when .*?\x1b\[1m(.*?)\x1b\[0m", re.S)


def reason(error: BaseException) -> str:
    """One line that says why, of what may be somebody else's error of many."""
    wrapped = _WRAPPED.search(str(error))
    text = wrapped[1] if wrapped else str(error)
    # Keras quotes the whole config before it says what went wrong with it.
    text = text.rpartition("Exception encountered: ")[2]
    return (text.strip() or repr(error)).splitlines()[0]
