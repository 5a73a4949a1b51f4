"""TensorFlow operations in a Keras 2 graph, as the operations of `keras.ops`.

tf.keras made a layer of every TensorFlow function called on a symbolic tensor:
`TensorFlowOpLayer` up to 2.3, which stores a graph node, `TFOpLambda` and
`SlicingOpLambda` since, which store the function's name and arguments.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from rewriters import private
from rewriters.formats.layers import TensorFlowFunction, TensorShape, getitem


LAYERS = (
    "TFOpLambda",
    "SlicingOpLambda",
    "TensorFlowOpLayer",
    "ClassMethod",
    "InstanceMethod",
    "InstanceProperty",
)


# Outputs of one operation.
_OUTPUTS = 1 << 12


class Unsupported(Exception):
    """A call that has no form here; says which operation and why."""


def function(kind: str, config: dict[str, Any]) -> Callable[..., Any] | None:
    """Returns a function of the layer's tensors and arguments, None if unknown.

    It raises `Unsupported` for arguments that it cannot take.
    """
    call = _node_function(config) if kind == "TensorFlowOpLayer" else None
    if kind in ("TFOpLambda", "SlicingOpLambda"):
        call = _named_function(str(config.get("function", "")))
    if call is None:
        return None

    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as e:  # TensorFlow refuses arguments in any way
            ours = isinstance(e, (_NotStatic, Unsupported))
            reason = e if ours else "the stored arguments do not fit"
            raise Unsupported(f"{describe(kind, config)}: {reason}") from e

    return checked


def _named_function(symbol: str) -> Callable[..., Any] | None:
    neutral = _FUNCTIONS.get(symbol.removeprefix("compat.v1."))
    fallback = _tensorflow(symbol)
    if neutral is None:
        return fallback

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("name", None)
        try:
            return neutral(*args, **kwargs)
        except _NotStatic:
            if fallback is None:
                raise
            return fallback(*args, **kwargs)

    return call


def describe(kind: str, config: dict[str, Any]) -> str:
    """The operation's name, for a message."""
    if kind == "TensorFlowOpLayer":
        node = config.get("node_def")
        return str(node.get("op")) if isinstance(node, dict) else "unreadable"
    return f"tf.{config.get('function') or config.get('method_name') or kind}"


def operation_class(kind: str, module: str | None) -> type | None:
    """A Keras 3 operation's class by its name, for graphs that Keras 3 wrote."""
    for name in ("numpy", "nn", "core", "math", "image", "linalg", "einops"):
        if module in (None, f"{private.OPERATIONS}{name}"):
            found = getattr(private.operation_module(name), kind, 0)
            if isinstance(found, type) and issubclass(found, keras.Operation):
                return found
    return None


class _NotStatic(Exception):
    """An argument that `keras.ops` has no form for, though TensorFlow may."""

    def __init__(
        self, reason: str = "takes a tensor or an option that keras.ops does not"
    ):
        super().__init__(reason)


def _static(value: Any) -> Any:
    value = _folded(value)
    if _symbolic(value):
        raise _NotStatic
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return value


def _symbolic(value: Any) -> bool:
    return any(isinstance(v, keras.KerasTensor) for v in keras.tree.flatten(value))


def _folded(value: Any) -> Any:
    """`value` with numbers in place of what shapes settle before any call."""

    def one(v: Any) -> Any:
        try:
            numbers = _numbers(v, {}) if isinstance(v, keras.KerasTensor) else None
        except _NotStatic:
            return v
        if numbers is None or not np.isfinite(numbers).any():
            return v
        if numbers.ndim == 0:
            return int(numbers)
        return [int(n) if np.isfinite(n) else v[i] for i, n in enumerate(numbers)]

    return keras.tree.map_structure(one, value)


# What operations do to sizes: numbers, NaN where only a call can tell.
_SIZES: dict[str, Callable[..., Any]] = {
    "TensorShape": lambda _, x: [np.nan if n is None else n for n in x.shape],
    "GetItem": lambda _, x, key: x[key],
    "Cast": lambda _, x: x,
    "Add": lambda _, x, y: x + y,
    "Subtract": lambda _, x, y: x - y,
    "Multiply": lambda _, x, y: x * y,
    "FloorDivide": lambda _, x, y: x // y,
    "Maximum": lambda _, x, y: np.maximum(x, y),
    "Minimum": lambda _, x, y: np.minimum(x, y),
    "Prod": lambda op, x: np.prod(x, keepdims=op.keepdims),
    "ExpandDims": lambda op, x: np.expand_dims(x, op.axis),
    "Stack": lambda _, xs: np.stack(xs),
    "Concatenate": lambda _, xs: np.concatenate(xs),
}


def _numbers(tensor: keras.KerasTensor, seen: dict[int, Any]) -> np.ndarray:
    """The sizes that an integer tensor holds, found back along the graph."""
    shape = tensor.shape
    # A float may be rounded otherwise than here; no shape has more than 16 numbers.
    if tensor.dtype not in ("int32", "int64") or None in shape or shape > (16,):
        raise _NotStatic
    if id(tensor) not in seen:
        history = private.keras_history(tensor)
        rule = _SIZES.get(type(history.operation).__name__)
        if rule is None:
            return np.full(shape, np.nan)
        arguments = private.inbound_nodes(history.operation)[
            history.node_index
        ].arguments

        def known(v: Any) -> Any:
            return _numbers(v, seen) if isinstance(v, keras.KerasTensor) else v

        args = arguments.args
        if not isinstance(history.operation, TensorShape):
            args = keras.tree.map_structure(known, args)
        with np.errstate(all="ignore"):
            seen[id(tensor)] = np.asarray(rule(history.operation, *args), "float64")
    return seen[id(tensor)]


def _tensorflow(symbol: str) -> Callable[..., Any] | None:
    """The TensorFlow function itself, where that is the backend."""
    if keras.backend.backend() != "tensorflow" or not TensorFlowFunction.find(symbol):
        return None

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("name", None)
        folded = _folded((args, kwargs))
        args, kwargs = folded if _symbolic(folded) else (args, kwargs)
        return TensorFlowFunction(symbol)(*args, **kwargs)

    return call


def _tensor(value: Any) -> Any:
    """A list of numbers as an array, so that it is an operand and not a structure."""
    if not isinstance(value, (list, tuple)):
        return value
    array = np.asarray(value)
    return array.astype(
        {"f": "float32", "i": "int32"}.get(array.dtype.kind, array.dtype)
    )


def _alike(values: Any) -> list[Any]:
    """Tensors and constants; TensorFlow gives a constant the tensors' type."""
    dtype = next(v.dtype for v in values if isinstance(v, keras.KerasTensor))
    return [
        v if isinstance(v, keras.KerasTensor) else np.asarray(v).astype(dtype)
        for v in values
    ]


def _binary(op: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Any, y: Any) -> Any:
        x, y = _tensor(x), _tensor(y)
        tensor = next(v for v in (x, y) if isinstance(v, keras.KerasTensor))
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        # TensorFlow gives a constant the tensor's type.
        x, y = (v.astype(dtype) if isinstance(v, np.ndarray) else v for v in (x, y))
        return op(x, y)

    return call


def _unary(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x=None, **named: op(
        x if x is not None else next(iter(named.values()))
    )


def _reduction(op: Callable[..., Any]) -> Callable[..., Any]:
    def call(input_tensor: Any, axis: Any = None, keepdims: Any = False, **old: Any):
        axis = _static(old.get("reduction_indices", axis))
        axis = tuple(axis) if isinstance(axis, list) else axis
        return op(
            input_tensor, axis=axis, keepdims=old.get("keep_dims") or bool(keepdims)
        )

    return call


def _arg(op: Callable[..., Any]) -> Callable[..., Any]:
    def call(input: Any, axis: Any = None, output_type: Any = "int64", **old: Any):
        axis = old.get("dimension") if axis is None else axis
        return ops.cast(
            op(input, axis=0 if axis is None else _static(axis)), output_type
        )

    return call


def _concat(values: Any, axis: Any) -> Any:
    return ops.concatenate(_alike(values), axis=_static(axis))


def _split(value: Any, num_or_size_splits: Any, axis: Any = 0, num: Any = None) -> Any:
    sizes = _static(num_or_size_splits)
    _check_count(sizes)
    if isinstance(sizes, list):
        if -1 in sizes:
            rest = value.shape[axis] - sum(s for s in sizes if s != -1)
            sizes = [rest if s == -1 else s for s in sizes]
        sizes = np.cumsum(sizes)[:-1].tolist()
    return ops.split(value, sizes, axis=_static(axis))


def _reshape(tensor: Any, shape: Any) -> Any:
    shape = _folded(shape)
    if isinstance(shape, (list, tuple)):
        unknown = [n for n in shape if isinstance(n, keras.KerasTensor) or n == -1]
        if len(unknown) == 1:  # the others settle it
            shape = [-1 if n is unknown[0] else n for n in shape]
    return ops.reshape(tensor, [int(n) for n in _static(shape)])


def _like(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda tensor, dtype=None, **_: op(tensor, dtype=dtype)


def _convert(value: Any, dtype: Any = None, **_: Any) -> Any:
    value = _tensor(value)
    return value if dtype is None else ops.cast(value, dtype)


def _add_n(inputs: Any) -> Any:
    return functools.reduce(ops.add, inputs)


def _batch_flatten(x: Any) -> Any:
    return keras.layers.Flatten()(x)


def _squeeze(input: Any, axis: Any = None, **old: Any) -> Any:
    axis = _static(old.get("squeeze_dims", axis))
    axis = tuple(axis) if isinstance(axis, list) else axis
    return ops.squeeze(input, axis=axis or None if axis == () else axis)


def _pad(tensor: Any, paddings: Any, mode: str = "CONSTANT", constant_values: Any = 0):
    constant = {"constant_values": constant_values} if mode == "CONSTANT" else {}
    return ops.pad(tensor, _static(paddings), mode=mode.lower(), **constant)


def _matmul(a: Any, b: Any, transpose_a: bool = False, transpose_b: bool = False, **_):
    a, b = _tensor(a), _tensor(b)
    a = ops.swapaxes(a, -1, -2) if transpose_a else a
    b = ops.swapaxes(b, -1, -2) if transpose_b else b
    return ops.matmul(a, b)


def _l2_normalize(x: Any, axis: Any = None, epsilon: float = 1e-12, dim: Any = None):
    axis = _static(axis if dim is None else dim)
    axis = tuple(axis) if isinstance(axis, list) else axis
    squares = ops.sum(ops.square(x), axis=axis, keepdims=True)
    return ops.multiply(x, ops.rsqrt(ops.maximum(squares, epsilon)))


_FORMATS = {"N": "channels_last"}


def _data_format(name: Any) -> str:
    return "channels_first" if str(name).startswith("NC") else "channels_last"


def _depth_to_space(input: Any, block_size: int, data_format: str = "NHWC") -> Any:
    return ops.depth_to_space(input, int(block_size), _data_format(data_format))


def _space_to_depth(input: Any, block_size: int, data_format: str = "NHWC") -> Any:
    return ops.space_to_depth(input, int(block_size), _data_format(data_format))


def _resize(
    images: Any,
    size: Any,
    method: str = "bilinear",
    preserve_aspect_ratio: bool = False,
    antialias: bool = False,
) -> Any:
    if preserve_aspect_ratio or method not in ("bilinear", "nearest", "bicubic"):
        raise _NotStatic
    size = tuple(int(s) for s in _static(size))
    resized = ops.image.resize(
        images, size, interpolation=method, antialias=antialias,
        data_format="channels_last",
    )  # fmt: skip
    return resized


def _pool(kind: str) -> Callable[..., Any]:
    op = ops.max_pool if kind == "max" else ops.average_pool

    def call(
        input: Any, ksize: Any, strides: Any, padding: str, data_format="NHWC", **_
    ):
        rank = len(input.shape) - 2
        first = str(data_format).startswith("NC")

        def spatial(value: Any) -> Any:
            value = _static(value)
            if isinstance(value, list) and len(value) == rank + 2:
                value = value[2:] if first else value[1:-1]
            return tuple(value) if isinstance(value, list) else value

        return op(
            input, spatial(ksize), spatial(strides), padding.lower(),
            data_format=_data_format(data_format),
        )  # fmt: skip

    return call


def _getitem(tensor: Any, slice_spec: Any, var: Any = None) -> Any:
    index = _folded(slice_spec)
    if _symbolic(index):
        raise _NotStatic
    return getitem(tensor, index if isinstance(index, (list, tuple)) else [index])


def _one_hot(
    indices: Any, depth: Any, on_value=None, off_value=None, axis=None, dtype=None
):
    if on_value not in (None, 1) or off_value not in (None, 0):
        raise _NotStatic
    axis = -1 if axis is None else axis
    return ops.one_hot(indices, _static(depth), axis=axis, dtype=dtype or "float32")


def _gather(params: Any, indices: Any, validate_indices=None, axis=None, batch_dims=0):
    if batch_dims:
        raise _NotStatic
    return ops.take(_tensor(params), _tensor(indices), axis=_static(axis) or 0)


def _transpose(a: Any, perm: Any = None, conjugate: bool = False) -> Any:
    return ops.transpose(a, axes=_static(perm))


def _clip(t: Any, clip_value_min: Any, clip_value_max: Any) -> Any:
    return ops.clip(t, clip_value_min, clip_value_max)


def _tile(input: Any, multiples: Any) -> Any:
    return ops.tile(input, _static(multiples))


def _repeat(input: Any, repeats: Any, axis: Any = None) -> Any:
    repeats = _static(repeats)
    if isinstance(repeats, list) and len(repeats) > 1 and axis is not None:
        return ops.take(input, np.repeat(np.arange(len(repeats)), repeats), axis=axis)
    return ops.repeat(_tensor(input), repeats, axis=axis)


def _leaky_relu(features: Any, alpha: float = 0.2) -> Any:
    return ops.leaky_relu(features, negative_slope=alpha)


def _gelu(features: Any, approximate: bool = False) -> Any:
    return ops.gelu(features, approximate=approximate)


def _softmax(op: Callable[..., Any]) -> Callable[..., Any]:
    def call(logits: Any, axis: Any = None, dim: Any = None) -> Any:
        axis = dim if axis is None else axis
        return op(logits, axis=-1 if axis is None else axis)

    return call


def _bias_add(value: Any, bias: Any, data_format: Any = None) -> Any:
    if _data_format(data_format or "NHWC") == "channels_first":
        raise _NotStatic
    return ops.add(value, _tensor(bias))


def _where(condition: Any, x: Any = None, y: Any = None) -> Any:
    if x is None or y is None:
        raise _NotStatic
    x, y = _alike([x, y]) if _symbolic([x, y]) else (_tensor(x), _tensor(y))
    return ops.where(condition, x, y)


def _cast(x: Any, dtype: Any) -> Any:
    return ops.cast(x, str(dtype))


def _identity(input: Any = None, x: Any = None) -> Any:
    return keras.layers.Identity()(input if input is not None else x)


def _cumsum(op: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Any, axis: int = 0, exclusive: bool = False, reverse: bool = False):
        if exclusive or reverse:
            raise _NotStatic
        return op(x, axis=axis)

    return call


def _tensordot(a: Any, b: Any, axes: Any) -> Any:
    return ops.tensordot(_tensor(a), _tensor(b), axes=_static(axes))


def _incomplete(*_: Any, **__: Any) -> Any:
    raise Unsupported("Keras 2 left some of its tensors out of the file")


def _sort(op: Callable[..., Any]) -> Callable[..., Any]:
    def call(values: Any, axis: int = -1, direction: str = "ASCENDING", **_: Any):
        if direction != "ASCENDING":
            raise _NotStatic
        return op(values, axis=axis)

    return call


def _norm(tensor: Any, ord: Any = "euclidean", axis: Any = None, keepdims=None, **old):
    if ord != "euclidean":
        raise _NotStatic
    keepdims = keepdims or old.get("keep_dims")
    return ops.sqrt(_reduction(ops.sum)(ops.square(tensor), axis, keepdims))


def _squared_difference(x: Any, y: Any) -> Any:
    return ops.square(ops.subtract(x, y))


def _expand_dims(input: Any, axis: Any = None, dim: Any = None) -> Any:
    return ops.expand_dims(input, _static(axis if dim is None else dim))


def _stack(values: Any, axis: int = 0) -> Any:
    if all(isinstance(v, keras.KerasTensor) for v in values):
        return ops.stack(values, axis=axis)
    # Keras saves a constant without axes as a number, which it cannot stack.
    wide = [
        ops.expand_dims(v, axis)
        if isinstance(v, keras.KerasTensor)
        else np.expand_dims(v, axis)
        for v in _alike(values)
    ]
    return ops.concatenate(wide, axis=axis)


def _unstack(value: Any, num: Any = None, axis: int = 0) -> Any:
    _check_count(num)
    return ops.unstack(value, num=num, axis=axis)


def _check_count(number: Any) -> None:
    """An operation makes as many tensors as it says, each an object."""
    if isinstance(number, int | float) and number > _OUTPUTS:
        raise Unsupported(f"{number} outputs, more than {_OUTPUTS}")


def _reverse(tensor: Any, axis: Any) -> Any:
    axis = _static(axis)
    return ops.flip(tensor, axis=tuple(axis) if isinstance(axis, list) else axis)


def _broadcast_to(input: Any, shape: Any) -> Any:
    return ops.broadcast_to(input, _static(shape))


_FUNCTIONS: dict[str, Callable[..., Any]] = {}


def _define(function: Callable[..., Any], *names: str) -> None:
    for name in names:
        _FUNCTIONS[name] = function
        if name.startswith(("math.", "nn.", "linalg.")):
            _FUNCTIONS.setdefault(name.partition(".")[2], function)


for _name in (
    "add subtract multiply maximum minimum equal not_equal greater greater_equal "
    "less less_equal logical_and logical_or"
).split():
    _define(_binary(getattr(ops, _name)), f"math.{_name}")
for _name, _op in {
    "divide": ops.true_divide, "truediv": ops.true_divide, "pow": ops.power,
    "floordiv": ops.floor_divide, "floor_div": ops.floor_divide,
    "floormod": ops.mod, "mod": ops.mod,
    "squared_difference": _squared_difference, "atan2": ops.arctan2,
}.items():  # fmt: skip
    _define(_binary(_op), f"math.{_name}")
for _name, _op in {
    "add": ops.add, "sub": ops.subtract, "mul": ops.multiply, "pow": ops.power,
    "truediv": ops.true_divide, "div": ops.true_divide, "floordiv": ops.floor_divide,
    "mod": ops.mod, "eq": ops.equal, "ne": ops.not_equal, "gt": ops.greater,
    "ge": ops.greater_equal, "lt": ops.less, "le": ops.less_equal,
    "and": ops.logical_and, "or": ops.logical_or,
}.items():  # fmt: skip
    _define(_binary(_op), f"__operators__.{_name}")
    _define(_binary(lambda x, y, op=_op: op(y, x)), f"__operators__.r{_name}")
for _name in (
    "exp log log1p expm1 sqrt rsqrt square abs sin cos tan tanh arcsin arccos arctan "
    "sinh cosh sigmoid floor ceil sign erf softplus reciprocal isnan isfinite isinf "
    "logical_not negative round"
).split():
    _define(_unary(getattr(ops, _name)), f"math.{_name}")
for _name, _op in {
    "asin": ops.arcsin, "acos": ops.arccos, "atan": ops.arctan, "is_nan": ops.isnan,
    "log_sigmoid": ops.log_sigmoid, "softsign": ops.softsign,
}.items():  # fmt: skip
    _define(_unary(_op), f"math.{_name}")
for _name in "relu relu6 elu selu silu sigmoid tanh softplus softsign".split():
    _define(_unary(getattr(ops, _name)), f"nn.{_name}")
_define(_unary(ops.silu), "nn.swish")
_define(_unary(ops.negative), "__operators__.neg", "neg")
_define(_unary(ops.absolute), "__operators__.abs")
for _name, _op in {
    "mean": ops.mean, "sum": ops.sum, "max": ops.max, "min": ops.min, "prod": ops.prod,
    "all": ops.all, "any": ops.any, "variance": ops.var, "std": ops.std,
    "logsumexp": ops.logsumexp,
}.items():  # fmt: skip
    _define(_reduction(_op), f"math.reduce_{_name}")
_NAMED: tuple[tuple[Any, ...], ...] = (
    (_arg(ops.argmax), "math.argmax"), (_arg(ops.argmin), "math.argmin"),
    (_concat, "concat"), (_split, "split"), (_reshape, "reshape"),
    (_squeeze, "squeeze"), (_expand_dims, "expand_dims"), (_stack, "stack"),
    (_unstack, "unstack"), (_pad, "pad"), (_tile, "tile"), (_repeat, "repeat"),
    (_transpose, "transpose"), (_clip, "clip_by_value"), (_cast, "cast"),
    (_where, "where"), (_gather, "gather"), (_one_hot, "one_hot"),
    (_reverse, "reverse"), (_broadcast_to, "broadcast_to"),
    (_incomplete, "einsum", "meshgrid"),
    (_tensordot, "tensordot"), (_matmul, "linalg.matmul"),
    (lambda x, y: _matmul(x, y), "__operators__.matmul"),
    (_l2_normalize, "math.l2_normalize", "nn.l2_normalize"),
    (_depth_to_space, "nn.depth_to_space"), (_space_to_depth, "nn.space_to_depth"),
    (_resize, "image.resize"), (_leaky_relu, "nn.leaky_relu"), (_gelu, "nn.gelu"),
    (_softmax(ops.softmax), "nn.softmax"),
    (_softmax(ops.log_softmax), "nn.log_softmax"),
    (_bias_add, "nn.bias_add"), (_identity, "identity", "stop_gradient"),
    (_cumsum(ops.cumsum), "math.cumsum"), (_cumsum(ops.cumprod), "math.cumprod"),
    (_pool("max"), "nn.max_pool2d", "nn.max_pool", "nn.max_pool1d"),
    (_pool("avg"), "nn.avg_pool2d", "nn.avg_pool", "nn.avg_pool1d"),
    (_getitem, "__operators__.getitem"), (_norm, "norm", "linalg.norm"),
    (_sort(ops.sort), "sort"), (_sort(ops.argsort), "argsort"),
    (ops.binary_crossentropy, "keras.backend.binary_crossentropy"),
    (ops.categorical_crossentropy, "keras.backend.categorical_crossentropy"),
    (_batch_flatten, "keras.backend.batch_flatten"), (_add_n, "math.add_n"),
    (_convert, "convert_to_tensor"),
    (_like(ops.zeros_like), "zeros_like"), (_like(ops.ones_like), "ones_like"),
    (lambda input, out_type="int32": TensorShape(out_type)(input), "shape"),
)  # fmt: skip
_named: Any
for _named in _NAMED:
    _define(_named[0], *_named[1:])
del _FUNCTIONS["stop_gradient"]
_define(lambda input: ops.stop_gradient(input), "stop_gradient")


# Graph nodes of TensorFlowOpLayer

_NODES: dict[str, str] = {
    "Add": "math.add", "AddV2": "math.add", "Sub": "math.subtract",
    "Mul": "math.multiply", "RealDiv": "math.truediv", "Div": "math.truediv",
    "FloorDiv": "math.floordiv", "FloorMod": "math.floormod", "Pow": "math.pow",
    "Maximum": "math.maximum", "Minimum": "math.minimum", "Equal": "math.equal",
    "SquaredDifference": "math.squared_difference", "Greater": "math.greater",
    "GreaterEqual": "math.greater_equal", "Less": "math.less",
    "LessEqual": "math.less_equal", "NotEqual": "math.not_equal",
    "LogicalAnd": "math.logical_and", "LogicalOr": "math.logical_or",
    "LogicalNot": "math.logical_not",
    "Exp": "math.exp", "Log": "math.log", "Log1p": "math.log1p", "Sqrt": "math.sqrt",
    "Rsqrt": "math.rsqrt", "Square": "math.square", "Abs": "math.abs",
    "Neg": "math.negative", "Tanh": "math.tanh", "Sigmoid": "math.sigmoid",
    "Sin": "math.sin", "Cos": "math.cos", "Floor": "math.floor", "Ceil": "math.ceil",
    "Round": "math.round", "Sign": "math.sign", "Erf": "math.erf",
    "Softplus": "math.softplus", "Reciprocal": "math.reciprocal",
    "Relu": "nn.relu", "Relu6": "nn.relu6", "Elu": "nn.elu", "Selu": "nn.selu",
    "Identity": "identity", "StopGradient": "stop_gradient",
    "Softmax": "nn.softmax", "LogSoftmax": "nn.log_softmax", "BiasAdd": "nn.bias_add",
    "Reshape": "reshape", "Transpose": "transpose", "ExpandDims": "expand_dims",
    "Tile": "tile", "GatherV2": "gather", "SelectV2": "where", "Select": "where",
    "ClipByValue": "clip_by_value", "ReverseV2": "reverse",
    "BroadcastTo": "broadcast_to", "Pad": "pad", "PadV2": "pad",
}  # fmt: skip
_REDUCTIONS = {
    "Mean": "mean", "Sum": "sum", "Max": "max", "Min": "min", "Prod": "prod",
    "All": "all", "Any": "any",
}  # fmt: skip


def _node_function(config: dict[str, Any]) -> Callable[..., Any] | None:
    node = config.get("node_def")
    if not isinstance(node, dict):
        return None
    call = _node_call(str(node.get("op")), _attributes(node))
    if call is None:
        return None
    constants = {int(k): v for k, v in (config.get("constants") or {}).items()}

    def run(inputs: Any) -> Any:
        operands = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        for index in sorted(constants):
            operands.insert(index, constants[index])
        return call(*operands)

    return run


def _attributes(node: dict[str, Any]) -> dict[str, Any]:
    """A graph node's attributes as Python values."""

    def value(stored: dict[str, Any]) -> Any:
        for kind, v in stored.items():
            if kind == "s":
                return base64.b64decode(v).decode("latin-1")
            if kind == "i":
                return int(v)
            if kind == "list":
                return [value({k: x}) for k, xs in v.items() for x in xs]
            return v
        return None

    return {k: value(v) for k, v in (node.get("attr") or {}).items() if v}


def _node_call(op: str, attr: dict[str, Any]) -> Callable[..., Any] | None:
    if op in _NODES:
        return _FUNCTIONS[_NODES[op]]
    if op in _REDUCTIONS:
        reduce = _FUNCTIONS[f"math.reduce_{_REDUCTIONS[op]}"]
        return lambda x, axis: reduce(x, axis, bool(attr.get("keep_dims", False)))
    data_format = attr.get("data_format", "NHWC")
    calls: dict[str, Callable[..., Any]] = {
        "DepthToSpace": lambda x: _depth_to_space(x, attr["block_size"], data_format),
        "SpaceToDepth": lambda x: _space_to_depth(x, attr["block_size"], data_format),
        "LeakyRelu": lambda x: _leaky_relu(x, attr.get("alpha", 0.2)),
        "Squeeze": lambda x: _squeeze(x, attr.get("squeeze_dims") or None),
        "ConcatV2": lambda *xs: _concat(list(xs[:-1]), xs[-1]),
        "Pack": lambda *xs: _stack(list(xs), attr.get("axis", 0)),
        "Shape": lambda x: TensorShape()(x),
        "Einsum": lambda *xs: ops.einsum(attr["equation"], *xs),
        "AddN": lambda *xs: _add_n(xs),
        "Split": lambda axis, x: _split(x, attr["num_split"], axis),
        "SplitV": lambda x, sizes, axis: _split(x, sizes, axis),
        "Unpack": lambda x: _unstack(x, attr.get("num"), attr.get("axis", 0)),
        "MirrorPad": lambda x, pads: _pad(x, pads, attr["mode"]),
        "Cast": lambda x: _cast(x, _DTYPES[attr["DstT"]]),
        "MatMul": lambda a, b: _matmul(
            a, b, attr.get("transpose_a", False), attr.get("transpose_b", False)
        ),
        "BatchMatMulV2": lambda a, b: _matmul(
            a, b, attr.get("adj_x", False), attr.get("adj_y", False)
        ),
        "StridedSlice": lambda x, *bounds: x[_strided(attr, *bounds)],
        "MaxPool": lambda x: _pool("max")(
            x, attr["ksize"], attr["strides"], attr["padding"], data_format
        ),
        "AvgPool": lambda x: _pool("avg")(
            x, attr["ksize"], attr["strides"], attr["padding"], data_format
        ),
    }
    if op in ("ResizeBilinear", "ResizeNearestNeighbor"):
        if attr.get("half_pixel_centers") and not attr.get("align_corners"):
            method = "bilinear" if op == "ResizeBilinear" else "nearest"
            return lambda x, size: _resize(x, size, method)
        return None
    return calls.get(op)


_DTYPES = {
    "DT_FLOAT": "float32", "DT_DOUBLE": "float64", "DT_HALF": "float16",
    "DT_BFLOAT16": "bfloat16", "DT_INT32": "int32", "DT_INT64": "int64",
    "DT_BOOL": "bool", "DT_UINT8": "uint8", "DT_INT8": "int8", "DT_INT16": "int16",
}  # fmt: skip


def _strided(attr: dict[str, Any], begin: Any, end: Any, strides: Any) -> tuple:
    """The index that a StridedSlice node spells in lists and bit masks."""

    def bit(mask: str, i: int) -> bool:
        return bool(int(attr.get(mask, 0)) >> i & 1)

    index: list[Any] = []
    for i, (b, e, s) in enumerate(
        zip(_static(begin), _static(end), _static(strides), strict=True)
    ):
        if bit("ellipsis_mask", i):
            index.append(Ellipsis)
        elif bit("new_axis_mask", i):
            index.append(None)
        elif bit("shrink_axis_mask", i):
            index.append(b)
        else:
            start = None if bit("begin_mask", i) else b
            stop = None if bit("end_mask", i) else e
            index.append(slice(start, stop, s))
    return tuple(index)
