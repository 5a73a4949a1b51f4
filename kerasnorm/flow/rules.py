"""What each operation does to the scale of a kernel: the rules that `flow` follows.

A rule gets the operation and what is known of its inputs, and says what is known of
its outputs, ties factors, or raises `Stop`. Layers match by class, where the subclass
keeps `call`; bare operations of `keras.ops` by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.flow import operations
from kerasnorm.flow.operations import Context, Result, Rule
from kerasnorm.flow.ties import Absorber, Owners, Scaled, Stop, Ties
from kerasnorm.kernels import kernel as kernels
from kerasnorm.kernels.reparametrized import Reparametrized
from kerasnorm.method.moving_statistics import is_running
from kerasnorm.method.registry import Refusal, Source, get, read
from rewriters import private
from rewriters.program import Instruction, Value


_L = keras.layers


def apply(
    step: Instruction, layer: Any, known: dict[Value, Scaled], ties: Ties, start: bool
) -> tuple[list[Result], tuple[Absorber, Owners] | None]:
    """Follows the factors through one operation.

    Args:
        step: the call.
        layer: what is called, or what to think in its place.
        known: what is known of the values that carry factors.
        ties: the factors.
        start: the operation holds the kernel itself.

    Returns:
        What is known of the outputs, and the absorber with the owners that reached it
        where the factor ends here.

    Raises:
        Stop: a factor is tied to 1.
    """
    context = Context(step, layer, [known.get(v) for v in step.inputs], ties, start)
    result = _follow(context)
    if isinstance(result, tuple):
        return [None] * len(step.outputs), result
    results = result if isinstance(result, list) else [result]
    if len(results) != len(step.outputs):
        raise Stop(f"{step.path} has outputs nobody knows", False)
    return results, None


def is_known(operation: Any) -> bool:
    """Whether there is a rule, so that nobody needs to look inside."""
    if isinstance(operation, _L.Layer):
        opaque = (_L.RNN, _L.Bidirectional, _L.TimeDistributed, Reparametrized)
        return (
            isinstance(operation, opaque)
            or _rule(operation) is not None
            or read(operation) is not None
        )
    return True


def probe(wrapper: Any, kernel: kernels.Kernel) -> tuple[int, ...] | None:
    """Units of a reparametrized kernel: the finest equal runs of filters whose scale
    the method takes out, None where it takes out not even that of all."""
    for own in wrapper.kernels:
        if own.variable is kernel.variable:
            kernel = own
    v = kernel.columns(ops.cast(ops.convert_to_tensor(kernel.variable), "float32"))
    held = {
        n: ops.cast(ops.convert_to_tensor(p), "float32")
        for n, p in wrapper.parameters(kernel).items()
    }
    count = kernel.view_shape()[1]
    w = ops.convert_to_numpy(wrapper.kernel(v, **held))
    rng = np.random.default_rng(0)
    for number in (n for n in range(count, 0, -1) if count % n == 0):
        units = np.repeat(np.arange(number), count // number)
        factors = np.exp(rng.normal(size=number)).astype("float32")[units]
        u = ops.convert_to_numpy(wrapper.kernel(v * factors, **held))
        if np.abs(u - w).max() <= 1e-3 * np.abs(w).max():
            return tuple(units.tolist())
    return None


def _follow(c: Context) -> Any:
    layer, path = c.layer, c.step.path
    if isinstance(layer, _L.Layer) and getattr(layer, "activity_regularizer", None):
        if not isinstance(layer, _L.ActivityRegularization):
            raise Stop(f"{path} has an activity regularizer", False)
    if isinstance(layer, _L.TimeDistributed):
        return _time_distributed(c)
    if isinstance(layer, Reparametrized):
        if not layer.foldable:
            raise Stop(f"{path} is a {type(layer).__name__}", False)
        return _follow(replace(c, layer=layer.layer))
    if isinstance(layer, (_L.RNN, _L.Bidirectional)):
        raise Stop(f"{path} is recurrent", False)
    source = read(layer) if isinstance(layer, _L.Layer) else None
    if isinstance(source, Refusal):
        raise Stop(f"{path}: {source.detail}", False)
    if source is not None:
        return _normalize(c, source)
    rule = _rule(layer)
    if rule is None:
        raise Stop(f"nobody can see into {path} ({type(layer).__name__})", False)
    return rule(c)


def _rule(operation: Any) -> Rule | None:
    if isinstance(operation, _L.Layer):
        for cls in type(operation).__mro__:
            if cls in _LAYERS:
                return _LAYERS[cls] if type(operation).call is cls.call else None
        return None
    name = type(operation).__name__
    if private.is_operation_of_keras(operation):
        if name in _OPS:
            return _OPS[name]
        if name.lower() in _NONLINEAR:
            return operations.nonlinear
    return None


# ------------------------------------------------------------- normalization


def _normalize(c: Context, source: Source) -> Any:
    x, path, layer = c.only(), c.step.path, c.layer
    axes = [source.axis] if isinstance(source.axis, int) else list(source.axis)
    channel = max(a % x.rank for a in axes)
    fixed = c.step.kwargs.get("training", c.step.training)
    if is_running(source) and (fixed is False or not layer.trainable):
        return _affine(x, channel)  # its moving statistics: a line per channel
    method = get(source.method)
    claims = method.claims
    if method.invariance == "none" or not claims.get("scale_invariant"):
        raise Stop(f"{path} ({method.title.lower()}) keeps a part of its scale", False)
    others = [a for a in range(x.rank) if a != channel]
    shift = bool(claims.get("shift_invariant"))
    if x.shift is not None:
        groups = getattr(layer, "groups", None) if method.name == "group" else None
        alone = groups in (-1, c.step.inputs[0].shape[channel])  # one channel a group
        free = {channel} if alone or claims.get("channel_scale_invariant") else set()
        if not shift or not x.shift <= free:
            raise Stop(f"{path} keeps a part of the bias, which does not scale", True)
    if method.invariance == "filter":
        owners = c.merge(x, others)
    elif method.invariance == "group":
        owners = _groups(c, x, channel, source)
    else:
        owners = c.merge(x, range(x.rank))
    shifted = x.shift is not None
    return Absorber(path, layer, None, x.degree, shifted), owners


def _groups(c: Context, x: Scaled, channel: int, source: Source) -> Owners:
    groups = getattr(c.layer, "groups", 1)
    channels = c.step.inputs[0].shape[channel]
    others = [a for a in range(x.rank) if a != channel]
    owners = c.merge(x, others)
    if not isinstance(groups, int) or channels is None:
        return c.merge(x, range(x.rank))
    groups = channels if groups == -1 else groups
    if owners.shape[channel] == 1 or channels % groups:
        return c.merge(x, range(x.rank))
    for row in owners.reshape(groups, -1):
        c.ties.tie(row, c.step.path)
    return owners


def _affine(x: Scaled, channel: int) -> Scaled:
    return replace(x, shift=(x.shift or frozenset()) | {channel})


def _unit(c: Context) -> Any:
    x = c.only()
    c.unshifted(x)
    axis = c.layer.axis
    owners = c.merge(x, [axis] if isinstance(axis, int) else list(axis))
    return Absorber(c.step.path, c.layer, None, x.degree, False), owners


# -------------------------------------------------------------- linear layers


def _linear(c: Context) -> Result:
    layer, path = c.layer, c.step.path
    kernel = kernels.kernel_of(layer)
    if not isinstance(kernel, kernels.Kernel):
        raise Stop(f"{path}: {getattr(kernel, 'detail', 'no kernel')}", False)
    rank = len(c.step.outputs[0].shape)
    channel = kernel.axis % rank
    x = None if c.x is None else _mix(c, kernel, c.x, rank)
    if c.start:
        x = _own(c, kernel, x, rank)
    if x is None:
        raise Stop(f"{path} is not known to read it", False)
    if isinstance(getattr(layer, "bias", None), keras.Variable):
        if c.start and c.ties.joint:
            if x.degree != 1:
                raise Stop(f"{path} is applied to its own output", False)
        else:
            axes = {channel}
            if isinstance(layer, _L.EinsumDense):
                made = layer.equation.split("->")[1].replace("...", "").strip()
                axes = {rank - len(made) + made.index(a) for a in layer.bias_axes}
            x = replace(x, shift=(x.shift or frozenset()) | axes)
    return operations.activate(c, x, getattr(layer, "activation", None))


def _own(c: Context, kernel: kernels.Kernel, x: Result, rank: int) -> Scaled:
    """The output of the layer that holds the kernel."""
    if x is not None:  # it reads what depends on it: s times s to the power of before
        return replace(x, owners=c.mixed(x, rank), degree=x.degree + 1)
    layer, wanted = kernel.layer, c.ties.kernel
    ids = np.arange(c.ties.count)
    if wanted.name != kernel.name:  # depthwise part of a separable convolution
        return Scaled(c.ties.merge(ids.reshape((1,) * (rank - 1) + (-1,)), [-1], "it"))
    if isinstance(layer, _L.EinsumDense):
        _, kept, made = kernels._letters(layer.equation)
        letters = [kept[a] for a in kernel.filters]
        ids = ids.reshape([kernel.variable.shape[a] for a in kernel.filters])
        order = [letters.index(a) for a in made if a in letters]
        shape = [
            kernel.variable.shape[kept.index(a)] if a in letters else 1 for a in made
        ]
        ids = ids.transpose(order).reshape((1,) * (rank - len(made)) + tuple(shape))
        return Scaled(ids)
    shape = [1] * rank
    shape[kernel.axis % rank] = len(ids)
    return Scaled(ids.reshape(shape))


def _mix(c: Context, kernel: kernels.Kernel, x: Scaled, rank: int) -> Scaled:
    """What a linear layer makes of scaled inputs, its own bias left out."""
    layer = c.layer
    channel = kernel.axis % x.rank
    shift = x.shift
    if isinstance(layer, _L.Embedding):
        raise Stop(f"{c.step.path} looks it up in a table", False)
    if isinstance(layer, _L.EinsumDense):
        c.unshifted(x)
        return _einsum_dense(c, x, rank)
    if isinstance(layer, _L.Dense):
        owners = c.merge(x, [channel])
        return replace(
            x, owners=owners, shift=None if shift is None else shift | {channel}
        )
    if shift is not None:
        # At the border a kernel reads zeros in the place of the constant.
        if kernel.sees_padding() or not shift <= {channel}:
            c.unshifted(x)
        shift = frozenset({channel})
    owners = c.merge(x, [a for a in range(x.rank) if a != channel])
    made = c.step.outputs[0].shape[channel]
    if isinstance(layer, kernels.DEPTHWISE):
        if owners.shape[channel] > 1:
            owners = np.repeat(owners, made // owners.shape[channel], channel)
    elif isinstance(layer, kernels.CONVOLUTIONS) and layer.groups > 1:
        if owners.shape[channel] > 1:
            rows = owners.reshape(layer.groups, -1)
            for row in rows:
                c.ties.tie(row, c.step.path)
            spread = np.repeat(rows[:, 0], made // layer.groups)
            owners = spread.reshape([-1 if a == channel else 1 for a in range(rank)])
    else:
        owners = c.merge(replace(x, owners=owners), [channel])
    return replace(x, owners=owners, shift=shift)


def _einsum_dense(c: Context, x: Scaled, rank: int) -> Scaled:
    given, _, made = kernels._letters(c.layer.equation)
    extra = x.rank - len(given)
    gone = [extra + n for n, a in enumerate(given) if a not in made]
    owners = c.merge(x, gone)
    axes = [extra + given.index(a) for a in made if a in given]
    owners = owners.transpose([*range(extra), *axes, *gone])
    shape = [
        owners.shape[extra + axes.index(extra + given.index(a))] if a in given else 1
        for a in made
    ]
    return replace(x, owners=owners.reshape((*owners.shape[:extra], *shape)))


def _time_distributed(c: Context) -> Any:
    def inside(x: Result) -> Result:
        if x is None:
            return None
        owners = c.merge(x, [1]).squeeze(1)
        if x.shift is not None and 1 in x.shift:
            c.unshifted(x)
        shift = None if x.shift is None else frozenset(a - (a > 1) for a in x.shift)
        return replace(x, owners=owners, shift=shift)

    def outside(x: Result) -> Result:
        if x is None:
            return None
        shift = None if x.shift is None else frozenset(a + (a > 0) for a in x.shift)
        return replace(x, owners=np.expand_dims(x.owners, 1), shift=shift)

    def one(v: Value) -> Value:
        return Value((v.shape[0], *v.shape[2:]), v.dtype, v.masked)

    first, *_ = c.step.inputs
    step = replace(
        c.step,
        operation=c.layer.layer,
        args=(one(first),),
        kwargs={},
        outputs=tuple(one(v) for v in c.step.outputs),
    )
    inner = replace(c, step=step, layer=c.layer.layer, scaled=[inside(c.x)])
    result = _follow(inner)
    if isinstance(result, tuple):
        absorber, owners = result
        return absorber, np.expand_dims(owners, 1)
    return [outside(x) for x in (result if isinstance(result, list) else [result])]


def _layers(words: str, sizes: Sequence[int] = (1, 2, 3)) -> list[Any]:
    return [getattr(_L, f"{word}{n}D") for word in words.split() for n in sizes]


_LAYERS: dict[type, Rule] = {
    **dict.fromkeys(kernels.LINEAR, _linear),
    _L.Activation: operations.activation,
    _L.ReLU: operations.relu,
    **dict.fromkeys(
        (_L.LeakyReLU, _L.PReLU, _L.Dropout, _L.GaussianDropout), operations.homogeneous
    ),
    **dict.fromkeys(_layers("SpatialDropout"), operations.homogeneous),
    **dict.fromkeys(
        (_L.Identity, _L.Masking, _L.ActivityRegularization), operations.identity
    ),
    **dict.fromkeys((_L.Softmax, _L.ELU), operations.nonlinear),
    _L.GaussianNoise: operations.noise,
    **dict.fromkeys((_L.Add, _L.Subtract, _L.Average), operations.add),
    **dict.fromkeys((_L.Maximum, _L.Minimum), operations.extreme),
    _L.Multiply: operations.multiply,
    _L.Concatenate: operations.concatenate,
    _L.UnitNormalization: _unit,
    **dict.fromkeys(
        _layers("MaxPooling AveragePooling UpSampling Cropping"), operations.window
    ),
    **dict.fromkeys(_layers("ZeroPadding"), operations.pad),
    **dict.fromkeys(
        _layers("GlobalMaxPooling GlobalAveragePooling"), operations.global_pool
    ),
    **dict.fromkeys(
        (_L.Flatten, _L.Reshape, _L.Permute, _L.RepeatVector), operations.move
    ),
}
_MOVES = (
    "BroadcastTo Copy ExpandDims Flip GetItem Moveaxis Ravel Repeat Reshape Roll Slice "
    "Split Squeeze Swapaxes Take Tile Transpose Unstack DepthToSpace SpaceToDepth"
)
_OPS: dict[str, Rule] = {
    **dict.fromkeys(_MOVES.split(), operations.move),
    **dict.fromkeys(("Add", "Subtract"), operations.add),
    **dict.fromkeys(("Maximum", "Minimum"), operations.extreme),
    "Multiply": operations.multiply,
    **dict.fromkeys(("Divide", "TrueDivide"), operations.divide),
    **dict.fromkeys(("Concatenate",), operations.concatenate),
    **dict.fromkeys(("Mean", "Sum"), operations.reduce(True)),
    **dict.fromkeys(("Max", "Min", "Amax", "Amin", "Norm"), operations.reduce(False)),
    **dict.fromkeys(("Matmul", "Dot", "Einsum", "Tensordot"), operations.product),
    **dict.fromkeys(("Relu", "LeakyRelu", "Absolute", "Abs"), operations.homogeneous),
    **dict.fromkeys(("Cast", "Negative", "StopGradient", "_Cast"), operations.identity),
    "Square": operations.power(2.0),
    "Sqrt": operations.power(0.5),
    "Rsqrt": operations.power(-0.5),
    "Reciprocal": operations.power(-1.0),
}
_NONLINEAR = {name.replace("_", "") for name in dir(keras.activations)} | {
    "cos",
    "dotproductattention",
    "exp",
    "log",
    "sin",
}
