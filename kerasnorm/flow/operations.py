"""Rules of `flow` for what has no weights: activations, sums, pooling, reshapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from kerasnorm.flow.ties import Absorber, Owners, Scaled, Stop, Ties, compress
from rewriters.program import Instruction, Value


LINEAR = (keras.activations.linear, None)
# f(c x) = c f(x) for c > 0, element by element.
HOMOGENEOUS = (keras.activations.relu, keras.activations.leaky_relu)

# Larger tensors of indices are not made: all factors are tied instead, which is safe.
MOST = 1 << 21


@dataclass
class Context:
    """One operation, and what is known of what it reads."""

    step: Instruction
    layer: Any
    scaled: list[Scaled | None]  # per input value
    ties: Ties
    start: bool = False

    @property
    def x(self) -> Scaled | None:
        """Of the first input."""
        return self.scaled[0] if self.scaled else None

    def only(self) -> Scaled:
        """Of the first input, where no other one carries the factor."""
        if self.x is None or any(s is not None for s in self.scaled[1:]):
            raise Stop(f"{self.step.path} reads it beside its first input", False)
        return self.x

    def merge(self, x: Scaled, axes: Sequence[int]) -> Owners:
        return self.ties.merge(x.owners, axes, self.step.path)

    def mixed(self, x: Scaled, rank: int) -> Owners:
        """Everything tied to one factor, for a value of another shape."""
        owners = self.merge(x, range(x.rank))
        return owners.reshape((1,) * rank)

    def unshifted(self, *values: Scaled | None) -> None:
        """Stops where a constant would not scale along."""
        if any(v is not None and v.shift is not None for v in values):
            raise Stop(
                f"{self.step.path} mixes it with a bias that does not scale", True
            )


Result = Scaled | None
Rule = Callable[[Context], Result | list[Result]]


# ------------------------------------------------------ element by element


def activate(c: Context, x: Scaled, f: Any) -> Scaled:
    """The activation `f` of a layer."""
    name = getattr(f, "__name__", type(f).__name__)
    if f in LINEAR:
        return x
    if f in HOMOGENEOUS:
        c.unshifted(x)
        return x
    known = getattr(keras.activations, name, None) is f
    raise Stop(f"{c.step.path} applies {name}, which is not homogeneous", known)


def activation(c: Context) -> Result:
    """An activation layer."""
    return activate(c, c.only(), c.layer.activation)


def relu(c: Context) -> Result:
    """`ReLU`, where it has no bound."""
    bounds = (c.layer.max_value, c.layer.threshold)
    if any(bounds):
        raise Stop(f"{c.step.path} has a bound that does not scale", True)
    return homogeneous(c)


def homogeneous(c: Context) -> Result:
    """What commutes with a positive factor."""
    x = c.only()
    c.unshifted(x)
    return x


def identity(c: Context) -> Result:
    """What passes its input on."""
    return c.only()


def nonlinear(c: Context) -> Result:
    """What is known to keep no factor."""
    name = type(c.layer).__name__.lower()
    raise Stop(f"{c.step.path} applies {name}, which is not homogeneous", True)


def power(exponent: float) -> Rule:
    """A power of its input."""

    def rule(c: Context) -> Result:
        x = c.only()
        c.unshifted(x)
        return replace(x, degree=exponent * x.degree)

    return rule


def noise(c: Context) -> Result:
    """Noise of a size of its own."""
    raise Stop(f"{c.step.path} adds noise that does not scale", True)


# ------------------------------------------------------------ several inputs


def _operands(c: Context) -> list[tuple[Any, Result]]:
    """What is merged, constants too, each with what is known of it."""
    names = ("x1", "x2", "inputs")
    given = list(c.step.args) or [c.step.kwargs[n] for n in names if n in c.step.kwargs]
    if len(given) < 2 and "x2" in c.step.kwargs:
        given.append(c.step.kwargs["x2"])
    known = dict(zip(c.step.inputs, c.scaled, strict=True))
    leaves = [leaf for g in given for leaf in (tree.flatten(g) if _is_list(g) else [g])]
    return [
        (leaf, known.get(leaf) if isinstance(leaf, Value) else None) for leaf in leaves
    ]


def _is_list(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and any(isinstance(v, Value) for v in given)


def _varies(constant: Any, rank: int) -> frozenset[int]:
    shape = tuple(
        np.shape(constant) if not hasattr(constant, "shape") else constant.shape
    )
    return frozenset(rank - len(shape) + a for a, n in enumerate(shape) if n != 1)


def add(c: Context) -> Result:
    """Sums and differences."""
    rank = len(c.step.outputs[0].shape)
    shift: frozenset[int] | None = None
    found = []
    for leaf, x in _operands(c):
        if x is not None:
            found.append(x)
            if x.shift is not None:
                lead = rank - x.rank
                shift = (shift or frozenset()) | {a + lead for a in x.shift}
        elif isinstance(leaf, Value):
            raise Stop(f"{c.step.path} adds what does not scale", True)
        elif not np.isscalar(leaf) or leaf != 0:
            shift = (shift or frozenset()) | _varies(leaf, rank)
    if len({x.degree for x in found}) > 1:
        raise Stop(f"{c.step.path} adds other powers of it", False)
    owners = c.ties.same([x.owners for x in found], c.step.path)
    return Scaled(_ranked(owners, rank), found[0].degree, shift)


def extreme(c: Context) -> Result:
    """Maxima and minima."""
    operands = _operands(c)
    if any(x is None and not (np.isscalar(leaf) and leaf == 0) for leaf, x in operands):
        raise Stop(f"{c.step.path} compares it with what does not scale", True)
    c.unshifted(*c.scaled)
    return add(c)


def multiply(c: Context) -> Result:
    """Products."""
    rank = len(c.step.outputs[0].shape)
    found = [x for _, x in _operands(c) if x is not None]
    shift = None
    if any(x.shift is not None for x in found):
        if len(found) > 1 or any(
            isinstance(v, Value) and x is None for v, x in _operands(c)
        ):
            c.unshifted(*found)
        constant = [_varies(v, rank) for v, x in _operands(c) if x is None]
        lead = rank - found[0].rank
        shift = frozenset(a + lead for a in found[0].shift or ()).union(*constant)
    owners = c.ties.same([x.owners for x in found], c.step.path)
    degree = sum(x.degree for x in found)
    return Scaled(_ranked(owners, rank), degree, shift) if degree else None


def divide(c: Context) -> Any:
    """Quotients; that of equal powers is a normalization."""
    (_top, x), (_bottom, y) = _operands(c)
    rank = len(c.step.outputs[0].shape)
    if y is None:
        return multiply(c)
    c.unshifted(x, y)
    if x is None:
        return Scaled(_ranked(y.owners, rank), -y.degree)
    owners = c.ties.same([x.owners, y.owners], c.step.path)
    if x.degree == y.degree:  # a normalization written by hand
        return Absorber(c.step.path, c.layer, None, x.degree, False), owners
    return Scaled(_ranked(owners, rank), x.degree - y.degree)


def concatenate(c: Context) -> Result:
    """Pieces side by side."""
    operands = _operands(c)
    rank = len(c.step.outputs[0].shape)
    axis = c.layer.axis % rank
    found = [x for _, x in operands if x is not None]
    if len({x.degree for x in found}) > 1:
        raise Stop(f"{c.step.path} joins other powers of it", False)
    parts, shift = [], None
    for leaf, x in operands:
        size = leaf.shape[axis] if isinstance(leaf, Value) else None
        if size is None:
            raise Stop(f"{c.step.path} joins pieces of unknown size", False)
        owners = np.full((1,) * rank, c.ties.fixed) if x is None else x.owners
        if x is not None and x.shift is not None:
            shift = (shift or frozenset()) | x.shift | {axis}
        shape = [size if a == axis else n for a, n in enumerate(owners.shape)]
        parts.append(np.broadcast_to(owners, shape))
    shape = [max(p.shape[a] for p in parts) for a in range(rank)]
    full = [
        np.broadcast_to(
            p, [p.shape[a] if a == axis else n for a, n in enumerate(shape)]
        )
        for p in parts
    ]
    return Scaled(compress(np.concatenate(full, axis)), found[0].degree, shift)


def _ranked(owners: Owners, rank: int) -> Owners:
    return owners.reshape((1,) * (rank - owners.ndim) + owners.shape)


# ------------------------------------------------- pooling, moving, reducing


def window(c: Context) -> Result:
    """Pooling, upsampling, cropping: along space, channel by channel."""
    x = c.only()
    channel = 1 if getattr(c.layer, "data_format", None) == "channels_first" else -1
    space = [a for a in range(x.rank) if a != channel % x.rank]
    if x.shift is not None and not x.shift <= {channel % x.rank}:
        c.unshifted(x)
    return replace(x, owners=c.merge(x, space))


def pad(c: Context) -> Result:
    """Zeros around."""
    c.unshifted(c.only())
    return window(c)


def global_pool(c: Context) -> Result:
    """One number a channel."""
    x = c.only()
    channel = (1 if c.layer.data_format == "channels_first" else -1) % x.rank
    space = [a for a in range(1, x.rank) if a != channel]
    return _reduced(c, x, space, bool(c.layer.keepdims))


def reduce(linear: bool) -> Rule:
    """Sums (`linear`) or extremes along axes."""

    def rule(c: Context) -> Result:
        x = c.only()
        axis = c.layer.axis
        axes = (
            range(x.rank) if axis is None else [axis] if isinstance(axis, int) else axis
        )
        if not linear:
            c.unshifted(x)
        return _reduced(c, x, [a % x.rank for a in axes], bool(c.layer.keepdims))

    return rule


def _reduced(c: Context, x: Scaled, axes: Sequence[int], keepdims: bool) -> Scaled:
    owners = c.merge(x, axes)
    shift = None if x.shift is None else x.shift - set(axes)
    if not keepdims:
        kept = [a for a in range(x.rank) if a not in axes]
        owners = owners.reshape([owners.shape[a] for a in kept])
        shift = None if shift is None else frozenset(kept.index(a) for a in shift)
    return replace(x, owners=owners, shift=shift)


def move(c: Context) -> Result | list[Result]:
    """Reshapes, transposes, slices: run on indices in the place of the values."""
    x = c.only()
    shape = [1, *c.step.inputs[0].shape[1:]]
    ranks = [len(v.shape) for v in c.step.outputs]
    if None in shape or math.prod(s or 1 for s in shape) > MOST:
        c.unshifted(x)
        return [replace(x, owners=c.mixed(x, rank)) for rank in ranks]
    moved = _moved(c, np.broadcast_to(x.owners, shape))
    shifts: list[frozenset[int] | None] = [None] * len(ranks)
    if x.shift is not None:
        inside = [n if a in x.shift else 1 for a, n in enumerate(shape)]
        index = np.arange(math.prod(inside)).reshape(inside)
        for n, made in enumerate(_moved(c, np.broadcast_to(index, shape))):
            made = compress(made)
            shifts[n] = frozenset(a for a in range(made.ndim) if made.shape[a] > 1)
    return [
        replace(x, owners=compress(made), shift=shift)
        for made, shift in zip(moved, shifts, strict=True)
    ]


def _moved(c: Context, indices: np.ndarray) -> list[np.ndarray]:
    value = ops.convert_to_tensor(indices.astype("float32"))

    def given(leaf: Any) -> Any:
        return value if isinstance(leaf, Value) else leaf

    args, kwargs = tree.map_structure(given, (tuple(c.step.args), dict(c.step.kwargs)))
    kwargs.pop("mask", None)
    try:
        made = c.layer.call(*args, **kwargs)
    except Exception as error:
        raise Stop(f"{c.step.path} moves it nobody knows where", False) from error
    return [ops.convert_to_numpy(m).astype("int64") for m in tree.flatten(made)]


def product(c: Context) -> Result:
    """A matrix product: everything is mixed with everything."""
    found = [s for s in c.scaled if s is not None]
    c.unshifted(*found)
    rank = len(c.step.outputs[0].shape)
    owners = c.ties.same([c.mixed(s, rank) for s in found], c.step.path)
    return Scaled(owners, sum(s.degree for s in found))
