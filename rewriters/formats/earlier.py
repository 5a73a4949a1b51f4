"""What earlier versions of Keras 3 wrote otherwise, in the words of today's.

Keras reads its own archives. It reads some entries of earlier versions otherwise than
these meant them, and refuses others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


# What earlier Keras 3 wrote of a layer and no longer takes; nothing depended on it.
_DROPPED = {"RandomRotation": ("value_range",)}


def translate(config: dict[str, Any], version: str) -> bool:
    """Changes `config`, written by `version` of Keras 3, in place to what Keras reads.

    Returns whether anything was changed.
    """
    changed = False
    for entry in entries(config):
        inner = entry["config"]
        if not isinstance(inner, dict):
            continue
        dropped = _DROPPED.get(entry["class_name"], ()) if by_keras(entry) else ()
        for key in dropped:
            changed |= inner.pop(key, entry) is not entry
        if "output_layers" in inner and _wraps_ends(version):
            for key in ("input_layers", "output_layers"):
                changed |= _unwrap(inner, key)
    return changed


def _wraps_ends(version: str) -> bool:
    """Whether a single input or output of a model was written as a list of one.

    These versions read such a list as its one tensor. Keras 3.11 and later write the
    tensor alone, and read a list of one as a list.
    """
    head = [int(n) if n.isdigit() else 0 for n in version.split(".")[:2]]
    return head < [3, 11]


def _unwrap(config: dict[str, Any], key: str) -> bool:
    ends = config.get(key)
    if not (isinstance(ends, list) and len(ends) == 1 and isinstance(ends[0], list)):
        return False
    if not (len(ends[0]) == 3 and isinstance(ends[0][0], str)):
        return False
    config[key] = ends[0]
    return True


def by_keras(entry: dict[str, Any]) -> bool:
    """Whether the entry says that its class is one of Keras."""
    return str(entry.get("module")).split(".", 1)[0] in ("keras", "builtins")


def entries(value: Any, *, without: str | None = None) -> Iterator[dict[str, Any]]:
    """Every `{"class_name": ..., "config": ...}` in `value`, in order, but for what
    lies under the key `without`."""
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if isinstance(value.get("class_name"), str) and "config" in value:
                yield value
            todo += reversed([v for k, v in value.items() if k != without])
        elif isinstance(value, list):
            todo += reversed(value)
