"""What reaches the terminal, in one place: results, errors, warnings."""

from __future__ import annotations

import io
import os
import re
import sys
from typing import Any, TextIO


# Text of a file may move the cursor, clear the screen or turn the reading direction.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# The rules of tables, where the terminal has no such signs.
_PLAIN = str.maketrans({"─": "-", "━": "-", "│": "|", "…": "~"})


def show(text: str, stream: TextIO | None = None) -> None:
    """Prints text: control characters, and what the stream cannot encode, escaped."""
    stream = sys.stdout if stream is None else stream
    print(encodable(escaped(text), stream), file=stream, flush=True)


def escaped(text: str) -> str:
    """The text with control characters as `\\x1b` and the like; lines stay lines."""
    return _CONTROL.sub(lambda m: ascii(m[0])[1:-1], text)


def encodable(text: str, stream: Any) -> str:
    """The text as far as the stream has the letters, the rest escaped."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = text.translate(_PLAIN)
        return plain.encode(encoding, "backslashreplace").decode(encoding)
    return text


def close() -> None:
    """Nothing reads stdout any more: what Python writes at its end goes nowhere."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # not a file
        sys.stdout = io.StringIO()
