"""Arguments of public functions, checked by their annotations before any work."""

from __future__ import annotations

import collections.abc
import difflib
import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np

from rewriters.errors import RewriteError


F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Limit:
    """What else a value must be, beside of its type.

    Args:
        text: what is expected, after "Expected".
        holds: whether a value of the right type is.
    """

    text: str
    holds: Callable[[Any], bool]


Count = Annotated[
    int, Limit("a positive whole number below 2**31", lambda n: 1 <= n < 2**31)
]
Whole = Annotated[
    int, Limit("a whole number of at least 0, below 2**31", lambda n: 0 <= n < 2**31)
]
Seed = Annotated[
    int, Limit("a whole number from 0 to 2**32 - 1", lambda n: 0 <= n < 2**32)
]
Positive = Annotated[float, Limit("a finite number above 0", lambda v: v > 0)]
Path = str | os.PathLike[str]


def taking(
    error: type[RewriteError] = RewriteError,
    hint: Callable[[str, Any], str | None] = lambda name, value: None,
) -> Callable[[F], F]:
    """Decorator of a function: a call that it does not take is one clear error.

    Refused are unknown and missing arguments, and values that the annotations do not
    allow. A default is always allowed, and so is what is annotated as `Any`.

    Args:
        error: what is raised.
        hint: given an unknown argument and its value, where it belongs, or None.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        name = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as problem:
                raise _misfit(error, hint, name, signature, kwargs, problem) from None
            check(name, hints_of(function), signature, bound.arguments, error)
            return function(*args, **kwargs)

        return typing.cast(F, call)

    return decorate


@functools.cache
def hints_of(function: Any) -> dict[str, Any]:
    """The annotations of a function or class, as types."""
    return typing.get_type_hints(function, include_extras=True)


def check(
    owner: str,
    hints: Mapping[str, Any],
    signature: inspect.Signature | None,
    values: Mapping[str, Any],
    error: type[RewriteError] = RewriteError,
) -> None:
    """Refuses values that their annotations do not allow.

    Args:
        owner: the function or class, for the message.
        hints: the annotations by name.
        signature: where the defaults are; None where there are none.
        values: by name.
        error: what is raised.

    Raises:
        RewriteError: or the `error` given; naming the first of them.
    """
    for name, value in values.items():
        known = signature and signature.parameters[name]
        if known and known.kind in (known.VAR_KEYWORD, known.VAR_POSITIONAL):
            continue
        hint = hints.get(name, Any)
        if not ((known and value is known.default) or allows(hint, value)):
            raise error(
                f"{owner} does not take this value",
                got=f"{name}={shown(value)}",
                expected=described(hint),
            )


def allows(hint: Any, value: Any) -> bool:
    """Whether a value is what an annotation says."""
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Any:
        return True
    if kind is Annotated:
        inner, *limits = parts
        fits = all(t.holds(value) for t in limits) if allows(inner, value) else False
        return fits
    if kind in (typing.Union, types.UnionType):
        return any(allows(part, value) for part in parts)
    if kind is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if kind in (None, types.NoneType):
        return value is None
    if kind is bool:
        return isinstance(value, (bool, np.bool_))
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if kind is float:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return real and math.isfinite(value)
    if kind is collections.abc.Sequence:
        several = isinstance(value, (collections.abc.Sequence, np.ndarray))
        text = isinstance(value, (str, bytes))
        each = parts[0] if parts else Any
        return several and not text and all(allows(each, v) for v in _items(value))
    if kind is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        if len(parts) == 2 and parts[1] is ...:
            return all(allows(parts[0], v) for v in value)
        return len(parts) == len(value) and all(map(allows, parts, value))
    return isinstance(value, kind) if isinstance(kind, type) else True


def _items(value: Any) -> list[Any]:
    return [[]] if isinstance(value, np.ndarray) and not value.ndim else list(value)


def described(hint: Any) -> str:
    """What an annotation asks for, in words."""
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Annotated:
        return parts[1].text
    if kind in (typing.Union, types.UnionType):
        words = [described(p) for p in parts if p is not type(None)]
        words += ["None"] if type(None) in parts else []
        return " or ".join(dict.fromkeys(words))
    if kind is Literal:
        return " or ".join(map(repr, parts))
    if kind in (collections.abc.Sequence, tuple):
        return f"a list of {described(parts[0]) if parts else 'anything'}"
    words = {
        bool: "True or False",
        int: "a whole number",
        float: "a finite number",
        str: "a text",
        os.PathLike: "a path",
        dict: "a dict",
        collections.abc.Mapping: "a dict",
        collections.abc.Callable: "a function",
    }
    return words.get(kind) or f"a {getattr(kind, '__name__', kind)}"


def shown(value: Any) -> str:
    """A value in a line: what it is of, where its text would be long."""
    if hasattr(value, "shape") and len(getattr(value, "shape", None) or ()):
        return f"<{type(value).__name__} of shape {tuple(value.shape)}>"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _misfit(
    error: type[RewriteError],
    hint: Callable[[str, Any], str | None],
    name: str,
    signature: inspect.Signature,
    given: Mapping[str, Any],
    problem: TypeError,
) -> RewriteError:
    """The error of a call whose arguments are not those of the function."""
    known = [n for n in signature.parameters if n != "self"]
    for wrong in given:
        if wrong in known:
            continue
        near = difflib.get_close_matches(wrong, known, n=1)
        nearest = f"Did you mean {near[0]}=?" if near else None
        return error(
            f"{name} does not take this argument",
            got=f"{wrong}={shown(given[wrong])}",
            expected=f"some of {', '.join(known)}",
            fix=hint(wrong, given[wrong]) or nearest,
        )
    return error(
        f"{name} cannot be called like this",
        got=str(problem),
        expected=f"{name}{_call(signature)}",
    )


def _call(signature: inspect.Signature) -> str:
    names = [n for n, p in signature.parameters.items() if n != "self"]
    return f"({', '.join(names)})"
