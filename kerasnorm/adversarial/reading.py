"""Radii, bounds and labels, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from keras import ops, tree

from kerasnorm.adversarial.attack import Attack, read
from kerasnorm.adversarial.ball import canonical
from kerasnorm.common.arrays import as_array
from kerasnorm.common.data import batch_count, batches_of, joined
from kerasnorm.common.errors import KerasNormError
from rewriters.arguments import shown


def read_settings(
    attacks: Any, norm: Any, eps: Any
) -> tuple[list[Attack], str, tuple[float, ...]]:
    """Attacks, the name of the norm, and radii.

    Raises:
        KerasNormError: one of them makes no sense, or they do not go together.
    """
    norm, radii, found = canonical(norm), read_radii(eps), read(attacks)
    for attack in found:
        if norm not in attack.norms:
            raise KerasNormError(
                f"{attack.name!r} does not work by this norm",
                got=norm,
                expected=" or ".join(attack.norms),
            )
        if np.isinf(radii[-1]) and not attack.minimal:
            raise KerasNormError(
                f"{attack.name!r} needs a radius",
                got="eps=inf",
                expected="a finite one",
                fix="fab-t, deepfool and cw-l2 look for distances",
            )
    return found, norm, radii


def read_radii(eps: Any) -> tuple[float, ...]:
    """Radii, growing, none twice.

    Raises:
        KerasNormError: a negative one, NaN, or no numbers.
    """
    try:
        given = np.atleast_1d(np.asarray(eps, "float64"))
    except (TypeError, ValueError):
        given = np.array([np.nan])
    if given.ndim != 1 or not given.size or np.isnan(given).any() or (given < 0).any():
        raise KerasNormError(
            "eps is no radius",
            got=repr(eps),
            expected="one number, or a list of numbers, none of them negative or NaN",
        )
    return tuple(float(e) for e in np.unique(given))


def read_bounds(bounds: Any, x: np.ndarray) -> tuple[Any, Any]:
    """Lowest and highest values of the inputs, checked against them.

    Raises:
        KerasNormError: not a pair, the wrong way round, or inputs beyond them.
    """
    if not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1))
        raise KerasNormError(
            "the inputs have NaN or infinite values",
            got=f"{len(bad)} of {len(x)}, the first at index {bad[0]}",
        )
    if bounds is None:
        return float(x.min()), float(x.max())
    low, high = read_pair(bounds, x.shape)
    beyond = ((x < low) | (x > high)).reshape(len(x), -1).any(1)
    if beyond.any():
        raise KerasNormError(
            "inputs lie out of bounds",
            got=f"{beyond.sum()} of {len(x)}, with values {x.min():.6g} to"
            f" {x.max():.6g}",
            expected=f"{_short(low)} to {_short(high)}",
            fix="Give the bounds of the data: bounds=(0, 255), or bounds=None",
        )
    return (low, high) if low.ndim or high.ndim else (float(low), float(high))


def read_pair(bounds: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest values of inputs `(rows, ...)`, in float32.

    Raises:
        KerasNormError: not a pair, the wrong way round, or infinite.
    """
    try:
        low, high = (np.asarray(b, "float32") for b in bounds)
        np.broadcast_shapes(low.shape, high.shape, shape)
        fine = bool(np.all(low < high)) and max(low.ndim, high.ndim) < len(shape)
    except (TypeError, ValueError):
        low = high = np.zeros(())
        fine = False
    if not fine:
        raise KerasNormError(
            "the bounds are no pair of lowest and highest values",
            got=repr(bounds),
            expected="bounds=(0, 1)"
            + (", or arrays that broadcast against one input" if shape[1:] else ""),
        )
    if np.isinf(low).any() or np.isinf(high).any():
        raise KerasNormError(
            "the bounds are infinite",
            got=repr(bounds),
            expected="finite ones, as attacks share out the room up to them",
            fix="Give values that no input reaches: bounds=(-100, 100)",
        )
    return low, high


def read_seed(seed: Any) -> int:
    """A seed, which programs hold in 32 bits.

    Raises:
        KerasNormError: no whole number, or one of more bits.
    """
    if not isinstance(seed, (int, np.integer)) or not -(2**31) <= seed < 2**31:
        raise KerasNormError(
            "the seed is no whole number of 32 bits",
            got=repr(seed),
            expected=f"{-(2**31)} to {2**31 - 1}",
        )
    return int(seed)


def _short(b: np.ndarray) -> str:
    return f"{b.min():.6g}" if b.min() == b.max() else f"[{b.min():.6g}..{b.max():.6g}]"


def check_source(x: Any, y: Any) -> None:
    """Refuses classes beside a source of batches, and what cannot be classes.

    Raises:
        KerasNormError: as said.
    """
    listed = y if isinstance(y, (list, tuple)) else [y]
    attacks = [v for v in listed if isinstance(v, (str, Attack))]
    if attacks:
        raise KerasNormError(
            "y are the classes",
            got=f"y={shown(y)}",
            fix="Give attacks by their keyword: attacks='pgd'.",
        )
    if y is not None and batches_of(x) is not None:
        raise KerasNormError(
            "a source of batches has its classes itself",
            got=f"{type(x).__name__} and y",
            expected="batches (inputs, classes), and y=None",
        )


def pieces(data: Any, rows: int, whole: bool) -> Iterator[tuple[Any, Any]]:
    """`(inputs, classes)` of at least so many rows, but for the last, of a source that
    comes in batches of them.

    Raises:
        KerasNormError: it does not; there are none; or no last one, where the `whole`
            source will be read.
    """
    source = batches_of(data)
    if source is None:
        raise KerasNormError(
            "inputs without classes",
            got=f"{type(data).__name__} and y=None",
            expected="y, or a source of batches (inputs, classes)",
        )
    if whole and batch_count(data) == math.inf:
        raise KerasNormError(
            "the source has no end",
            got=f"{type(data).__name__} without a last batch",
            expected="each sample once",
            fix="Cut it off: data.take(n)",
        )
    held: list[Any] = []

    def joined_parts() -> Any:
        return tree.map_structure(lambda *parts: joined(parts), *held)

    count, empty = 0, True
    for batch in source:
        if not isinstance(batch, tuple) or len(batch) < 2:
            raise KerasNormError(
                "batches without classes",
                got=f"{type(batch).__name__} as a batch",
                expected="tuples (inputs, classes)",
            )
        held.append(tree.map_structure(ops.convert_to_numpy, batch[:2]))
        count, empty = count + len(held[-1][1]), False
        if count >= rows:
            yield joined_parts()
            held, count = [], 0
    if held:
        yield joined_parts()
    if empty:
        raise KerasNormError("there is nothing to attack", got="no batches")


def read_labels(y: Any, n: int, classes: int) -> np.ndarray:
    """Classes as `(n,)` int32, from integers or one-hot rows.

    Raises:
        KerasNormError: another shape, or classes that the model does not have.
    """
    if isinstance(y, dict) and len(y) == 1:  # by the name of the output
        (y,) = y.values()
    given = as_array(y)
    a = given
    if a.ndim == 2 and a.shape[1] == 1:
        a = a[:, 0]
    if a.ndim == 2 and a.shape == (n, classes):
        if not ((a.sum(1) == 1).all() and ((a == 0) | (a == 1)).all()):
            raise KerasNormError(
                "the labels are not one-hot",
                got=f"rows such as {a[0].tolist()}",
                expected="a single 1 in each row",
            )
        a = a.argmax(1)
    if a.shape != (n,) or a.dtype.kind not in "iubf" or (a != np.floor(a)).any():
        raise KerasNormError(
            "the labels do not fit the inputs",
            got=f"shape {np.shape(given)}, dtype {a.dtype}",
            expected=f"integers ({n},) or one-hot rows ({n}, {classes})",
        )
    if n and (a.min() < 0 or a.max() >= classes):
        raise KerasNormError(
            "labels name classes that the model does not have",
            got=f"{a.min():g} to {a.max():g}",
            expected=f"0 to {classes - 1}",
        )
    return a.astype("int32")
