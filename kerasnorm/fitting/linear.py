"""Linear layers as least-squares problems: inputs as rows, the kernel solved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from kerasnorm.fitting import solve
from kerasnorm.fitting.observations import (
    Array,
    Parts,
    Sampler,
    assign,
    mask_of,
    numpy_of,
)
from kerasnorm.kernels.kernel import is_composed
from rewriters.transfer import own_variables


# Beyond this many inputs of one output the normal equations cost more than they buy.
MAX_COLUMNS = 6144
# Multiplications for the products of the rows, where more rows are but better, and so
# many more for each value that is gathered.
PRODUCTS = 1e10


class Linear:
    """A linear layer whose outputs are, group by group, rows times a matrix.

    Attributes:
        layer: the layer.
        kernel: the variable that is solved.
        groups: number of groups; the outputs of each depend on its own columns.
        columns: inputs of one output.
    """

    def __init__(self, layer: Any):
        self.layer = layer
        self.kernel = self._variable()
        self.groups = self._groups()
        self.columns = self.matrices().shape[1]

    # What a kind of layer says; these are a dense layer's.

    def _variable(self) -> Any:
        return self.layer.kernel

    def _groups(self) -> int:
        return 1

    def matrices(self) -> Array:
        """The kernel as `(groups, columns, outputs of a group)`."""
        kernel = numpy_of(self.kernel)
        return kernel.reshape(1, -1, kernel.shape[-1])

    def _kernel_of(self, matrices: Array) -> Array:
        return matrices.reshape(self.kernel.shape)

    def channels_last(self, value: Any) -> Array:
        """An input or output of the layer, channels last."""
        return numpy_of(value)

    def rows(self, x: Any, shape: tuple[int, ...], picked: Array) -> Array:
        """What the matrices are multiplied with, at picked positions of an output of
        this shape, channels last: `(rows, groups, columns)`."""
        x = self.channels_last(x)
        x = x.reshape(len(x), -1, x.shape[-1])
        return np.take_along_axis(x, picked[..., None], 1).reshape(-1, 1, x.shape[-1])

    # What all have in common.

    def targets(self, old: Any, x: Any, y: Array, picked: Array) -> Array:
        """The old layer's outputs before its activation, (rows, outputs); `y` has its
        channels last."""
        if old.activation is not keras.activations.linear:
            other = type(self)(old)
            return other.forward(other.rows(x, y.shape, picked))
        y = y.reshape(len(y), -1, y.shape[-1])
        return np.take_along_axis(y, picked[..., None], 1).reshape(-1, y.shape[-1])

    def forward(self, x: Array) -> Array:
        """The layer's outputs before its activation for rows of its inputs."""
        y = np.matmul(x.swapaxes(0, 1), self.matrices())
        y = y.swapaxes(0, 1).reshape(len(x), -1)
        return y + numpy_of(self.layer.bias) if self.layer.use_bias else y

    def equations(
        self,
        old: Any,
        x: Parts,
        old_x: Parts,
        old_y: Parts,
        missing: Parts | None,
        held: Sequence[Array],
        samples: int,
        seed: int,
        memory: float,
    ) -> tuple[solve.Normal, Array]:
        """What a change of the kernel is solved from, and what errors of each output
        count: in units of its power, but for outputs that are nearly zero.

        Args:
            old: the original's layer, without its activation to be followed.
            x, old_x, old_y: inputs of this layer, inputs and outputs of the old one.
            missing: what is to be made up for beside the old outputs.
            held: by part, which samples are held out.
            samples: how many there are in all.
            seed: of the positions that are used.
            memory: bytes, of which a share may be used.
        """
        sampler = Sampler(self._limit(memory), samples, seed)
        normal, sizes = solve.Normal(self.layer.use_bias), np.float64(0)
        for k in range(len(x)):
            wanted = self.channels_last(old_y[k])
            picked = sampler.all_positions(k, wanted.shape)
            out = np.repeat(held[k], picked.shape[1])
            keep = np.ones(len(out), bool)
            mask = mask_of(x[k])
            if mask is not None and mask.shape == wanted.shape[:-1]:
                mask = mask.reshape(len(mask), -1)
                keep = np.take_along_axis(mask, picked, 1).reshape(-1)
            rows = self.rows(x[k], wanted.shape, picked)[keep]
            targets = self.targets(old, old_x[k], wanted, picked)
            if missing is not None:
                more = self.channels_last(missing[k])
                more = more.reshape(len(more), -1, more.shape[-1])
                more = np.take_along_axis(more, picked[..., None], 1)
                targets = targets + more.reshape(targets.shape)
            targets, out = targets[keep], out[keep]
            normal.add(rows, self.residual(rows, targets), out)
            sizes = sizes + np.square(targets).sum(0, dtype="float64")
        weights = 1 / (sizes + 1e-3 * np.mean(sizes) + 1e-30)
        return normal, np.reshape(weights, (self.groups, -1))

    def _limit(self, memory: float) -> int:
        """How many rows to solve on: several times as many as there are unknowns of one
        output, and more as long as the products are cheap."""
        least = min(2**15, 8 * self.columns)
        cheap = int(PRODUCTS / (self.groups * self.columns * (self.columns + 100)))
        room = int(memory / 32 / (self.groups * self.columns))
        return max(256, min(room, max(least, min(cheap, 2**16))))

    def residual(self, x: Array, y: Array) -> Array:
        """What the outputs for rows of inputs lack of y: `(rows, groups, outputs)`."""
        return (y - self.forward(x)).reshape(len(y), self.groups, -1)

    def update(self, change: Array, shift: Array) -> bool:
        """Adds to the kernel and, where there is one, the bias. False, and nothing is
        moved, where the values are not finite."""
        if not (np.isfinite(change).all() and np.isfinite(shift).all()):
            return False
        assign(self.kernel, self._kernel_of(self.matrices().astype("float64") + change))
        if self.layer.use_bias:
            bias = numpy_of(self.layer.bias).astype("float64") + shift.reshape(-1)
            assign(self.layer.bias, bias)
        return True

    def scale(self, by: Array) -> None:
        """Multiplies each output by a number."""
        matrices = self.matrices().astype("float64")
        by = by.reshape(self.groups, 1, -1)
        assign(self.kernel, self._kernel_of(matrices * by))
        if self.layer.use_bias:
            bias = numpy_of(self.layer.bias).astype("float64")
            assign(self.layer.bias, bias * by.reshape(-1))


class Convolution(Linear):
    """A convolution, of one group or more: rows are patches."""

    def _groups(self) -> int:
        return getattr(self.layer, "groups", 1)  # which only plain ones have

    def matrices(self) -> Array:
        """See `Linear.matrices`."""
        kernel = numpy_of(self.kernel)
        filters = kernel.shape[-1]
        kernel = kernel.reshape(-1, self.groups, filters // self.groups)
        return kernel.swapaxes(0, 1)

    def _kernel_of(self, matrices: Array) -> Array:
        return matrices.swapaxes(0, 1).reshape(self.kernel.shape)

    def channels_last(self, value: Any) -> Array:
        """See `Linear.channels_last`."""
        value = numpy_of(value)
        first = self.layer.data_format == "channels_first"
        return np.moveaxis(value, 1, -1) if first else value

    def rows(self, x: Any, shape: tuple[int, ...], picked: Array) -> Array:
        """See `Linear.rows`."""
        patches = self._patches(self.channels_last(x), picked, tuple(shape[1:-1]))
        n, taps, channels = patches.shape
        patches = patches.reshape(n, taps, self.groups, channels // self.groups)
        return patches.swapaxes(1, 2).reshape(n, self.groups, -1)

    def _taps(self) -> Iterator[tuple[int, int, int]]:
        """Size, stride and dilation of the kernel, by axis."""
        layer = self.layer
        return zip(layer.kernel_size, layer.strides, layer.dilation_rate, strict=True)

    def _patches(self, x: Array, picked: Array, lead: tuple[int, ...]) -> Array:
        """`(rows, taps, channels)`: what each picked output sees."""
        pads = []
        for size, out, (k, s, d) in zip(x.shape[1:-1], lead, self._taps(), strict=True):
            reach = (k - 1) * d + 1
            total = max(0, (out - 1) * s + reach - size)
            before = {"same": total // 2, "valid": 0, "causal": reach - 1}
            before = before[self.layer.padding]
            pads.append((before, max(0, total - before)))
        x = np.pad(x, ((0, 0), *pads, (0, 0)))
        return self._gathered(x, picked, lead)

    def _gathered(self, x: Array, picked: Array, lead: tuple[int, ...]) -> Array:
        size = x.shape[1:-1]
        # Flat index of each patch's corner, plus that of each tap within a patch.
        corner, taps = np.zeros(picked.shape, np.int64), np.zeros(1, np.int64)
        places = np.unravel_index(picked, lead)
        for place, n, (k, s, d) in zip(places, size, self._taps(), strict=True):
            corner = corner * n + place * s
            taps = (taps[:, None] * n + np.arange(k) * d).reshape(-1)
        corner = corner + np.arange(len(x))[:, None] * int(np.prod(size))
        return x.reshape(-1, x.shape[-1])[corner.reshape(-1, 1) + taps]


class Depthwise(Convolution):
    """A depthwise convolution: a group for each channel."""

    def _groups(self) -> int:
        return self.kernel.shape[-2]

    def matrices(self) -> Array:
        """See `Linear.matrices`."""
        kernel = numpy_of(self.kernel)
        return kernel.reshape(-1, *kernel.shape[-2:]).swapaxes(0, 1)


class Separable(Convolution):
    """A separable convolution: its pointwise kernel, after the depthwise one."""

    def _variable(self) -> Any:
        return self.layer.pointwise_kernel

    def rows(self, x: Any, shape: tuple[int, ...], picked: Array) -> Array:
        """See `Linear.rows`."""
        patches = super().rows(x, shape, picked)
        depthwise = numpy_of(self.layer.depthwise_kernel)
        channels, multiplier = depthwise.shape[-2:]
        depthwise = depthwise.reshape(-1, channels, multiplier)
        patches = patches.reshape(len(patches), -1, channels)
        return np.einsum("ntc,tcm->ncm", patches, depthwise, optimize=True).reshape(
            len(patches), 1, -1
        )


class Transposed(Convolution):
    """A transposed convolution: a convolution of the inputs with zeros in between."""

    def _flipped(self, kernel: Array) -> Array:
        """Between `(taps, filters, channels)` and, from the end, with these two in the
        other order; either way."""
        return np.flip(kernel, axis=tuple(range(kernel.ndim - 2))).swapaxes(-1, -2)

    def matrices(self) -> Array:
        """See `Linear.matrices`."""
        kernel = self._flipped(numpy_of(self.kernel))
        return kernel.reshape(1, -1, kernel.shape[-1])

    def _kernel_of(self, matrices: Array) -> Array:
        *taps, filters, channels = self.kernel.shape
        return self._flipped(matrices.reshape(*taps, channels, filters))

    def _taps(self) -> Iterator[tuple[int, int, int]]:
        return ((k, 1, d) for k, _, d in super()._taps())

    def _patches(self, x: Array, picked: Array, lead: tuple[int, ...]) -> Array:
        sizes, pads = x.shape[1:-1], []
        spread = [
            (n - 1) * s + 1 for n, s in zip(sizes, self.layer.strides, strict=True)
        ]
        wide = np.zeros((len(x), *spread, x.shape[-1]), x.dtype)
        wide[(slice(None), *(slice(None, None, s) for s in self.layer.strides))] = x
        for size, out, (k, _, d) in zip(spread, lead, self._taps(), strict=True):
            reach = (k - 1) * d + 1
            cut = (
                max(0, size + reach - 1 - out) // 2
                if self.layer.padding == "same"
                else 0
            )
            pads.append((reach - 1 - cut, max(0, out + cut - size)))
        # A cut beyond the reach leaves out inputs at the edge.
        wide = np.pad(wide, ((0, 0), *((max(0, a), b) for a, b in pads), (0, 0)))
        wide = wide[(slice(None), *(slice(max(0, -a), None) for a, _ in pads))]
        return self._gathered(wide, picked, lead)


def _kinds() -> dict[type, type[Linear]]:
    found = {keras.layers.Dense: Linear}
    for n in (1, 2, 3):
        for name, kind in (
            ("Conv{}D", Convolution),
            ("Conv{}DTranspose", Transposed),
            ("DepthwiseConv{}D", Depthwise),
            ("SeparableConv{}D", Separable),
        ):
            cls = getattr(keras.layers, name.format(n), None)
            if cls is not None:
                found[cls] = kind
    return found


KINDS = _kinds()


def _kernels(layer: Any) -> list[Any]:
    return [v for v in own_variables(layer) if v.name.endswith("kernel")]


def problem(layer: Any) -> Linear | str | None:
    """The layer's least-squares problem, why it is not solved, or None where it has no
    kernel."""
    kind = KINDS.get(type(layer))
    if kind is None or getattr(layer, "output_padding", None):
        if isinstance(layer, keras.Model):
            return None
        own = getattr(layer, "trainable_variables", ())
        if any(v.name.endswith("kernel") and len(v.shape) > 1 for v in own):
            return f"no problem of least squares: {type(layer).__name__}"
        return None
    if is_composed(layer):
        return "its kernel is quantized or has LoRA"
    if not layer.trainable or any(not v.trainable for v in _kernels(layer)):
        return "frozen"
    found = kind(layer)
    wide = found.columns > MAX_COLUMNS
    return f"more than {MAX_COLUMNS} inputs of one output" if wide else found
