"""Where the filters lie in the kernel of each of Keras's linear layers.

Folding, weight normalization and sphere analysis all ask the same questions: which
axes of the kernel make one output channel, which read one input channel, and what
becomes of the weights when these channels are scaled and shifted. The answers follow
from the layer's type and are here once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from kerasnorm.method.registry import Reason, Refusal
from rewriters import private


_L = keras.layers
CONVOLUTIONS = (_L.Conv1D, _L.Conv2D, _L.Conv3D)
TRANSPOSED = (_L.Conv1DTranspose, _L.Conv2DTranspose, _L.Conv3DTranspose)
DEPTHWISE = (_L.DepthwiseConv1D, _L.DepthwiseConv2D)
SEPARABLE = (_L.SeparableConv1D, _L.SeparableConv2D)
LINEAR = (
    _L.Dense,
    _L.EinsumDense,
    _L.Embedding,
    *CONVOLUTIONS,
    *TRANSPOSED,
    *DEPTHWISE,
    *SEPARABLE,
)

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Kernel:
    """The kernel of a linear layer, described.

    Args:
        layer: the layer.
        name: attribute of the kernel that makes the outputs.
        filters: its axes that tell one filter from another, all others lie within one.
        channels: its axes that, flattened, are the channel axis of the output.
        axis: channel axis of the output and of the input.
        label: tells it from the other kernels within one layer; empty for its main one.
    """

    layer: Any
    name: str
    filters: tuple[int, ...]
    channels: tuple[int, ...]
    axis: int = -1
    label: str = ""

    @property
    def variable(self) -> Any:
        """The kernel as the layer holds it."""
        return getattr(self.layer, self.name)

    @property
    def fan_in(self) -> tuple[int, ...]:
        """Axes that lie within one filter."""
        rank = len(self.variable.shape)
        return tuple(a for a in range(rank) if a not in self.filters)

    def shape(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """The kernel's shape with size 1 everywhere but at `axes`."""
        return tuple(n if a in axes else 1 for a, n in enumerate(self.variable.shape))

    def weights(self) -> Weights:
        """Values by attribute name, float64."""
        names = (self.name, "depthwise_kernel", "bias")
        return {
            n: keras.ops.convert_to_numpy(v).astype("float64")
            for n in names
            if isinstance(v := getattr(self.layer, n, None), keras.Variable)
        }

    def size(self) -> int:
        """Number of output channels."""
        return math.prod(self.variable.shape[a] for a in self.channels)

    def columns(self, value: Any) -> Any:
        """The kernel's value as `(fan_in, filters)`."""
        order = self.fan_in + self.filters
        if order != tuple(sorted(order)):
            value = keras.ops.transpose(value, order)
        return keras.ops.reshape(value, self.view_shape())

    def view_shape(self) -> tuple[int, int]:
        """`(fan_in, filters)`."""
        shape = self.variable.shape
        fan_in, filters = (
            math.prod(shape[a] for a in axes) for axes in (self.fan_in, self.filters)
        )
        return fan_in, filters

    def from_columns(self, value: Any) -> Any:
        """The inverse of `columns`."""
        order = self.fan_in + self.filters
        shape = [self.variable.shape[a] for a in order]
        value = keras.ops.reshape(value, shape)
        if order != tuple(sorted(order)):
            inverse = [order.index(a) for a in range(len(order))]
            value = keras.ops.transpose(value, inverse)
        return value

    # What scaling and shifting channels does to the weights; all in NumPy.

    def scale_outputs(self, weights: Weights, scale, shift) -> Weights:
        """Weights that give `scale * outputs + shift`, per output channel."""
        spread = np.reshape(scale, self.shape(self.channels))
        kernel = weights[self.name] * spread
        if isinstance(self.layer, _L.Embedding):
            return {**weights, self.name: kernel + np.reshape(shift, spread.shape)}
        bias = weights.get("bias", np.zeros(self.size()))
        return {**weights, self.name: kernel, "bias": bias * scale + shift}

    def scale_inputs(self, weights: Weights, scale, shift) -> Weights:
        """Weights that read `scale * inputs + shift`, per input channel, away from
        padding (see `sees_padding`)."""
        layer, kernel = self.layer, weights[self.name]
        out = dict(weights)
        taps = tuple(range(kernel.ndim - 2))
        if isinstance(layer, _L.EinsumDense):
            axis = self._einsum_input()
            shape = [len(scale) if a == axis else 1 for a in range(kernel.ndim)]
            kept = _letters(layer.equation)[1]
            others = tuple(a for a in range(kernel.ndim) if a not in self.filters)
            extra = (kernel * np.reshape(shift, shape)).sum(others)
            out[self.name] = kernel * np.reshape(scale, shape)
            order = [kept[a] for a in self.filters]
            target = [c for c in _letters(layer.equation)[2] if c in order]
            extra = extra.transpose([order.index(c) for c in target])
        elif isinstance(layer, DEPTHWISE):
            out[self.name] = kernel * np.reshape(scale, (-1, 1))
            extra = (kernel * np.reshape(shift, (-1, 1))).sum(taps).ravel()
        elif isinstance(layer, SEPARABLE):
            depth = weights["depthwise_kernel"]
            out["depthwise_kernel"] = depth * np.reshape(scale, (-1, 1))
            seen = (depth * np.reshape(shift, (-1, 1))).sum(taps).ravel()
            extra = seen @ kernel.reshape(len(seen), -1)
        elif isinstance(layer, TRANSPOSED):
            out[self.name] = kernel * scale
            extra = np.zeros(kernel.shape[-2])  # asked for with shift 0 alone
        else:
            # Output o of group g reads the input channels of group g.
            reads, outputs = kernel.shape[-2:]
            groups = len(scale) // reads
            index = np.arange(reads)[:, None] + reads * (
                np.arange(outputs) // (outputs // groups)
            )
            out[self.name] = kernel * np.asarray(scale)[index]
            extra = (kernel * np.asarray(shift)[index]).sum((*taps, -2))
        out["bias"] = weights.get("bias", 0.0) + extra
        return out

    def sees_padding(self) -> bool:
        """Whether some outputs read zeros from beyond the input, or fewer taps."""
        layer = self.layer
        if isinstance(layer, TRANSPOSED):
            return True
        if getattr(layer, "padding", "valid") == "valid":
            return False
        return any(k > 1 for k in layer.kernel_size)

    def _einsum_input(self) -> int | None:
        """Kernel axis of the input's last axis; None if the kernel keeps that axis
        or the bias could not take the shift."""
        given, kept, made = _letters(self.layer.equation)
        if not given or given[-1] not in kept or given[-1] in made:
            return None
        shared = set(given) & set(kept) & set(made)
        bias = self.layer.bias_axes
        wanted = {c for c in made if c in kept}
        if shared or (bias is not None and set(bias) != wanted):
            return None
        return kept.index(given[-1])

    def reads_channels(self) -> bool:
        """Whether `scale_inputs` is possible at all."""
        if isinstance(self.layer, _L.Embedding):
            return False
        return not isinstance(self.layer, _L.EinsumDense) or (
            self._einsum_input() is not None
        )

    def with_bias(self, serialized: Mapping[str, Any], inputs=False) -> dict[str, Any]:
        """The layer's serialized form with its bias switched on."""
        config = dict(serialized["config"])
        if isinstance(self.layer, _L.EinsumDense):
            _, kept, made = _letters(self.layer.equation)
            axes = "".join(c for c in made if c in kept) if inputs else made[-1]
            config["bias_axes"] = self.layer.bias_axes or axes
        elif "use_bias" in config:
            config["use_bias"] = True
        return {**serialized, "config": config}


def is_composed(layer: Any) -> bool:
    """Whether the kernel is no variable as it is used: quantized, or with LoRA."""
    return bool(
        getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", 0)
    )


def kernel_of(layer: Any) -> Kernel | Refusal | None:
    """Describes the kernel of a linear layer.

    Returns:
        A `Kernel`; None when the layer is not linear; a `Refusal` when it is one that
        must not be touched: its `call` is its own, or its kernel is quantized or a sum
        with a low-rank part. An activation within the layer is not looked at.
    """
    cls = next((c for c in type(layer).__mro__ if c in LINEAR), None)
    if cls is None:
        return None
    if type(layer).call is not cls.call:
        return Refusal(
            Reason.OVERRIDDEN,
            f"{layer.name} is a {cls.__name__} with a `call` of its own",
        )
    if is_composed(layer):
        return Refusal(
            Reason.NOT_EXACT, f"the kernel of {layer.name} is quantized or has LoRA"
        )
    first = getattr(layer, "data_format", None) == "channels_first"
    axis = 1 if first else -1
    if not layer.built:
        return Refusal(Reason.NO_GRAPH, f"{layer.name} is not built")
    if isinstance(layer, _L.EinsumDense):
        _, kept, made = _letters(layer.equation)
        filters = tuple(a for a, c in enumerate(kept) if c in made)
        if not made or made[-1] not in kept:
            return Refusal(
                Reason.NOT_EXACT,
                f"the kernel of {layer.name} ({layer.equation}) does not make the last "
                "axis of the output",
            )
        return Kernel(layer, "kernel", filters, (kept.index(made[-1]),))
    if isinstance(layer, _L.Embedding):
        return Kernel(layer, "embeddings", (1,), (1,))
    name = "pointwise_kernel" if isinstance(layer, SEPARABLE) else "kernel"
    rank = len(getattr(layer, name).shape)
    filters = (rank - 1,)
    if isinstance(layer, DEPTHWISE):
        filters = (rank - 2, rank - 1)
    elif isinstance(layer, TRANSPOSED):
        filters = (rank - 2,)
    return Kernel(layer, name, filters, filters, axis)


def kernels_of(layer: Any) -> list[Kernel] | Refusal:
    """Every kernel within a layer, that of a linear layer first.

    Those of the layer itself (both of a separable convolution, both of a recurrent
    cell) and of the layers it holds: the cells of a recurrent layer, the dense layers
    of attention.

    Returns:
        A list, empty where there is none; a `Refusal` where one must not be touched.
    """
    own = kernel_of(layer)
    if isinstance(own, Refusal):
        return own
    if isinstance(own, Kernel):
        if not isinstance(layer, SEPARABLE):
            return [own]
        rank = len(layer.depthwise_kernel.shape)
        both, name = (rank - 2, rank - 1), "depthwise_kernel"
        return [own, Kernel(layer, name, both, both, own.axis, label="depthwise_")]
    found = []
    if isinstance(getattr(layer, "recurrent_kernel", None), keras.Variable):
        for name in ("kernel", "recurrent_kernel"):
            last = (len(getattr(layer, name).shape) - 1,)
            label = name.removesuffix("kernel")
            found.append(Kernel(layer, name, last, last, label=label))
        return found
    for child in private.flatten_layers(layer, include_self=False, recursive=False):
        inner = kernels_of(child)
        if isinstance(inner, Refusal):
            return inner
        prefix = "" if child is getattr(layer, "cell", None) else f"{child.name}_"
        found += [replace(k, label=prefix + k.label) for k in inner]
    return found


def convolve(layer: Any, x: Any, kernel: Any) -> Any:
    """What a convolution or depthwise one makes of `x`, with another kernel and
    neither bias nor activation."""
    padding = layer.padding
    if padding == "causal":
        ahead = (layer.kernel_size[0] - 1) * layer.dilation_rate[0]
        pads = [(0, 0)] * len(x.shape)
        pads[-1 if layer.data_format == "channels_first" else 1] = (ahead, 0)
        x, padding = keras.ops.pad(x, pads), "valid"
    depthwise = isinstance(layer, DEPTHWISE)
    operation = keras.ops.depthwise_conv if depthwise else keras.ops.conv
    return operation(
        x,
        kernel,
        strides=layer.strides,
        padding=padding,
        data_format=layer.data_format,
        dilation_rate=layer.dilation_rate,
    )


def _letters(equation: str) -> tuple[str, str, str]:
    """Subscripts of input, kernel and output, the ellipsis left out."""
    left, made = equation.replace("...", "").replace(" ", "").split("->")
    given, kept = left.split(",")
    return given, kept, made
