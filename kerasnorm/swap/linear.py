"""Linear layers as least-squares problems: inputs as rows, the kernel solved."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from kerasnorm.swap import solve
from kerasnorm.swap.rows import Array, assign, numpy_of


# Beyond this many inputs of one output the normal equations cost more than they buy.
MAX_COLUMNS = 6144


def problem(layer: Any) -> Linear | None:
    """The layer's least-squares problem, None where it has none that is worth it."""
    layers = keras.layers
    known = (layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D)
    if type(layer) not in known or not layer.trainable:
        return None
    if getattr(layer, "groups", 1) != 1:
        return None
    found = Linear(layer)
    return found if found.columns <= MAX_COLUMNS else None


class Linear:
    """A dense layer or convolution, outputs as a matrix product of patches."""

    def __init__(self, layer: Any):
        self.layer = layer
        self.conv = not isinstance(layer, keras.layers.Dense)
        self.shape = tuple(layer.kernel.shape)
        self.columns = int(np.prod(self.shape[:-1]))

    def channels_last(self, value: Any) -> Array:
        """An input or output of the layer, channels last."""
        value = numpy_of(value)
        first = self.conv and self.layer.data_format == "channels_first"
        return np.moveaxis(value, 1, -1) if first else value

    def rows(self, x: Any, shape: tuple[int, ...], picked: Array) -> Array:
        """What the kernel is multiplied with, (rows, columns), at picked positions
        of an output of this shape, channels last."""
        x = self.channels_last(x)
        if self.conv:
            return self._patches(x, picked, tuple(shape[1:-1]))
        x = x.reshape(len(x), -1, x.shape[-1])
        return np.take_along_axis(x, picked[..., None], 1).reshape(-1, x.shape[-1])

    def targets(self, old: Any, x: Any, y: Array, picked: Array) -> Array:
        """The old layer's outputs before its activation, (rows, outputs); `y` has its
        channels last."""
        if old.activation is not keras.activations.linear:
            return Linear(old).forward(self.rows(x, y.shape, picked))
        y = y.reshape(len(y), -1, y.shape[-1])
        return np.take_along_axis(y, picked[..., None], 1).reshape(-1, y.shape[-1])

    def forward(self, x: Array) -> Array:
        """The layer's outputs before its activation for rows of its inputs."""
        y = x @ numpy_of(self.layer.kernel).reshape(-1, self.shape[-1])
        return y + numpy_of(self.layer.bias) if self.layer.use_bias else y

    def _patches(self, x: Array, picked: Array, lead: tuple[int, ...]) -> Array:
        layer = self.layer
        kernel, strides, dilation = (
            layer.kernel_size,
            layer.strides,
            layer.dilation_rate,
        )
        pads = []
        for size, out, k, s, d in zip(
            x.shape[1:-1], lead, kernel, strides, dilation, strict=True
        ):
            reach = (k - 1) * d + 1
            total = max(0, (out - 1) * s + reach - size)
            before = {"same": total // 2, "valid": 0, "causal": reach - 1}[
                layer.padding
            ]
            pads.append((before, max(0, total - before)))
        x = np.pad(x, ((0, 0), *pads, (0, 0)))
        size = x.shape[1:-1]
        # Flat index of each patch's corner, plus that of each tap within a patch.
        corner = np.zeros(picked.shape, np.int64)
        for p, n, s in zip(np.unravel_index(picked, lead), size, strides, strict=True):
            corner = corner * n + p * s
        taps = np.zeros(1, np.int64)
        for n, k, d in zip(size, kernel, dilation, strict=True):
            taps = (taps[:, None] * n + np.arange(k) * d).reshape(-1)
        corner = corner + np.arange(len(x))[:, None] * int(np.prod(size))
        flat = x.reshape(-1, x.shape[-1])
        return flat[corner.reshape(-1, 1) + taps].reshape(-1, len(taps) * x.shape[-1])

    def update(self, x: Array, y: Array, pull: float) -> None:
        """Moves the kernel so that x @ kernel comes close to y."""
        layer = self.layer
        change, shift = solve.ridge(x, y - self.forward(x), pull, layer.use_bias)
        kernel = numpy_of(layer.kernel).astype("float64")
        assign(layer.kernel, kernel + change.reshape(self.shape))
        if layer.use_bias:
            assign(layer.bias, numpy_of(layer.bias).astype("float64") + shift)
