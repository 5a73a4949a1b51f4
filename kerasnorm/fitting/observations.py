"""What a fit reads: a layer's parameters, and rows of observations of a value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from rewriters import private


Array = np.ndarray
Parts = list[Any]  # one value for all samples: tensors, split along the batch


# --------------------------------------------------------------- parameters


class Parameters:
    """The scale and shift of a normalization layer, by whatever name.

    Attributes: `gamma`, `beta`, `tau` (threshold of a TLU), None where absent; `tied`:
    one gamma for all channels.
    """

    def __init__(self, layer: Any):
        def variable(*names: str) -> Any:
            found = (getattr(layer, n, None) for n in names)
            return next((v for v in found if isinstance(v, keras.Variable)), None)

        # Keras calls the gamma of RMS normalization `scale`.
        self.gamma, self.beta = variable("gamma", "scale"), variable("beta")
        self.tau = variable("tau")
        self.layer = layer
        self.learnt = [v for v in (self.gamma, self.beta) if v is not None]
        shapes = [tuple(v.shape) for v in self.learnt]
        self.shape = max(shapes, key=np.prod, default=())
        self.tied = self.gamma is not None and np.prod(self.gamma.shape) == 1

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The axes of the input that gamma and beta live on."""
        axis = getattr(self.layer, "axis", -1)
        axes = sorted(a % ndim for a in ([axis] if isinstance(axis, int) else axis))
        return tuple(axes[-max(1, len(self.shape)) :])

    def fit(self, columns: int) -> bool:
        """Whether each is one number or one for each of so many columns."""
        return all(np.prod(v.shape) in (1, columns) for v in self.learnt)

    def values(self, columns: int) -> tuple[Array, Array]:
        """gamma and beta as float64, flat; ones and zeros where absent."""

        def flat(v: Any, default: float) -> Array:
            value = default if v is None else keras.ops.convert_to_numpy(v)
            return np.broadcast_to(np.float64(value).reshape(-1), (columns,)).copy()

        return flat(self.gamma, 1.0), flat(self.beta, 0.0)

    def assign(self, gamma: Array, beta: Array) -> None:
        for v, new in ((self.gamma, gamma), (self.beta, beta)):
            if v is not None:
                assign(v, new[: np.prod(v.shape, dtype=int)].reshape(v.shape))

    def last(self, forward: Callable[[], Any], axes: tuple[int, ...]) -> bool:
        """Whether the layer's output is `gamma z + beta`, z what it gives without."""
        with self.neutral():
            z = forward()
            for v, fill in ((self.gamma, 2.0), (self.beta, 1.0)):
                if v is not None:
                    v.assign(np.full(v.shape, fill, "float32"))
            wanted, got = (numpy_of(v) for v in (self.apply(z, axes), forward()))
        return np.allclose(got, wanted, 1e-2, 1e-2 * np.abs(wanted).max(initial=0.0))

    def apply(self, z: Any, axes: tuple[int, ...]) -> Any:
        """gamma z + beta for normalized values z."""
        shape = [d if a in axes else 1 for a, d in enumerate(z.shape)]
        for v, combine in (
            (self.gamma, keras.ops.multiply),
            (self.beta, keras.ops.add),
        ):
            if v is not None:
                full = shape if np.prod(v.shape) > 1 else [1] * len(shape)
                z = combine(z, keras.ops.cast(keras.ops.reshape(v, full), z.dtype))
        return z

    @contextlib.contextmanager
    def neutral(self) -> Iterator[None]:
        """While it lasts the layer gives its normalized input, no scale, no shift."""
        held = [
            (v, keras.ops.convert_to_numpy(v)) for v in self._all() if v is not None
        ]
        try:
            for v, fill in zip(self._all(), (1.0, 0.0, -3e38), strict=True):
                if v is not None:
                    v.assign(np.full(v.shape, fill, "float32"))
            yield
        finally:
            for v, old in held:
                v.assign(old)

    def _all(self) -> tuple[Any, Any, Any]:
        return self.gamma, self.beta, self.tau


def assign(variable: Any, value: Array) -> None:
    """Sets a trained variable within its constraint."""
    variable.assign(value)
    if variable.constraint is not None:
        variable.assign(variable.constraint(variable.value))


# ----------------------------------------------------------------- sampling


class Sampler:
    """Picks the same positions of a value on both sides.

    A value of shape (batch, ..., channels) gives rows of channels; where there are
    more rows than `limit`, as many random positions of every sample.
    """

    def __init__(self, limit: int, samples: int, seed: int):
        self.per_sample = max(1, limit // max(1, samples))
        self.seed = seed

    def positions(self, part: int, batch: int, positions: int) -> Array | None:
        """Indices (batch, k) into the flattened positions; None for all of them."""
        k = self.per_sample
        if positions <= k:
            return None
        rng = np.random.default_rng((self.seed, part, positions))
        return rng.integers(0, positions, (batch, k))

    def all_positions(self, part: int, shape: tuple[int, ...]) -> Array:
        """Indices (batch, k) into the positions of a (batch, ..., channels) value."""
        n = int(np.prod(shape[1:-1]))
        picked = self.positions(part, shape[0], n)
        return np.tile(np.arange(n), (shape[0], 1)) if picked is None else picked

    def rows(
        self, part: int, value: Any, axes: tuple[int, ...], mask: Array | None
    ) -> tuple[Array, Array]:
        """Observations (rows, columns) of one part of a value, padded positions left
        out, and which sample of the part each is of."""
        a = numpy_of(value)
        at = tuple(range(a.ndim - len(axes), a.ndim))
        if axes != at:
            a = np.moveaxis(a, axes, at)
        lead = a.shape[1 : at[0]]
        n = int(np.prod(lead))
        a = a.reshape(len(a), n, -1)
        picked = self.positions(part, len(a), n)
        if picked is not None:
            a = np.take_along_axis(a, picked[..., None], 1)
        samples = np.repeat(np.arange(len(a)), a.shape[1])
        a = a.reshape(-1, a.shape[-1])
        if mask is not None and mask.ndim - 1 <= len(lead):
            m = mask.reshape(mask.shape + (1,) * (1 + len(lead) - mask.ndim))
            m = np.broadcast_to(m, (len(m), *lead)).reshape(len(m), n)
            if picked is not None:
                m = np.take_along_axis(m, picked, 1)
            a, samples = a[m.reshape(-1)], samples[m.reshape(-1)]
        return a, samples


def numpy_of(x: Any) -> Array:
    """A tensor as float32, or float64 if it is that."""
    a = keras.ops.convert_to_numpy(x)
    return a if a.dtype in ("float32", "float64") else a.astype("float32")


def mask_of(x: Any) -> Array | None:
    """The mask that Keras attached to a tensor."""
    mask = private.get_keras_mask(x)
    return None if mask is None else keras.ops.convert_to_numpy(mask).astype(bool)
