"""The one place with backend-specific code: custom gradients and fused kernels.

Everything here has a neutral meaning; what changes with the backend is only how fast
it is, and how a gradient is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops


Tensor = Any

# Sums over fewer elements than this are no work for a matrix product; over more than
# the other it is neither faster nor as exact as a reduction.
SHORT, LONG = 32, 2**17
# Modules that trace a model for other programs.
EXPORTERS = ("keras.src.export", "tensorflow.lite")


def custom_gradient(f: Callable) -> Callable:
    """Gives a function of tensors a gradient in closed form.

    Args:
        f: `f(*tensors) -> (outputs, backward)`, where `backward(*gradients)` takes one
            gradient per output and returns one per input. Both are made of
            differentiable operations, so that second derivatives follow.

    Returns:
        A function of the same tensors that returns `outputs`.
    """

    def wrapped(*tensors):
        outputs, backward = f(*tensors)

        def grad(*args, upstream=None):
            # TensorFlow passes the gradients one by one, JAX as one tuple, torch
            # by keyword after the inputs.
            gradients = args if upstream is None else (upstream,)
            if len(gradients) == 1 and isinstance(gradients[0], (tuple, list)):
                gradients = tuple(gradients[0])
            result = backward(*gradients)
            return result if len(result) > 1 else result[0]

        return outputs, grad

    return ops.custom_gradient(wrapped)


def vjp(
    f: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Output of `f(*inputs)` and the gradients of `sum(output * upstream)` with
    respect to each input; `upstream` is ones where it is None."""
    inputs = [ops.convert_to_tensor(v) for v in inputs]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = f(*inputs)
        return outputs, tape.gradient(
            outputs,
            inputs,
            output_gradients=upstream,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
    if keras.backend.backend() == "jax":
        import jax

        outputs, pull = jax.vjp(f, *inputs)
        return outputs, list(
            pull(ops.ones_like(outputs) if upstream is None else upstream)
        )
    raise NotImplementedError(
        f"gradients on the {keras.backend.backend()!r} backend; "
        "kerasnorm supports 'tensorflow' and 'jax'"
    )


# The graphs that are traced to be read, see `readable`.
_graphs: list[Any] = []


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Context of a function that hands out tensors which it sees while it runs."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    _graphs.append(tf.compat.v1.get_default_graph())
    try:
        yield
    finally:
        _graphs.pop()


def is_readable(x: Tensor) -> bool:
    """Whether a tensor may leave the function that computes it: in TensorFlow not from
    within a loop or a `tf.function` inside it, which run a graph of their own."""
    if keras.backend.backend() != "tensorflow" or hasattr(x, "numpy"):
        return True
    return bool(_graphs) and getattr(x, "graph", None) is _graphs[-1]


def compiled(f: Callable, jit: bool = True, shape: Sequence | None = None) -> Callable:
    """`f(x)` as one compiled graph.

    Args:
        f: function of one tensor.
        jit: through XLA; otherwise TensorFlow's plain graph, and JAX's eager mode.
        shape: shape to trace for, None where dynamic. JAX knows static shapes alone
            and ignores it.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        def once(x):
            return f(x)

        program = functools.partial(tf.function, once, jit_compile=jit, autograph=False)
        if shape is None:
            return program()
        made: dict[Any, Callable] = {}

        def call(x):
            x = tf.convert_to_tensor(x)
            if x.dtype not in made:
                made[x.dtype] = program([tf.TensorSpec(shape, x.dtype)])
            return made[x.dtype](x)

        return call
    if keras.backend.backend() == "jax" and jit:
        import jax

        return jax.jit(f)
    return f


@functools.cache
def on_cpu() -> bool:
    """Whether the backend computes on a CPU."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return not tf.config.list_physical_devices("GPU")
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_backend() == "cpu"
    return False


def reads_once() -> bool:
    """Whether to take mean and variance from one reading of the input: under XLA on an
    accelerator. A CPU finds the input in its cache the second time."""
    return not on_cpu() and _under_xla()


def apart(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same small tensors, which XLA on an accelerator computes before what uses
    them: not anew for each element of a large one, nor for two uses at once, which
    would then share large intermediates that are written out."""
    if keras.backend.backend() != "jax" or on_cpu():
        return tensors
    return barrier(*tensors)


def settled(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The same statistics of the rows of `x`, all there before the rows are normalized.

    For JAX on a CPU, which takes up to 1.7 times as long over fewer rows than 4096
    otherwise. Over more it goes on with a row while it is in the cache.
    """
    if not on_jax_cpu():
        return tensors
    rows = math.prod(x.shape[:-1])
    few = isinstance(rows, int) and rows < 4096  # not where an export has symbols
    return barrier(*tensors) if few else tensors


def on_jax_cpu() -> bool:
    """Whether JAX computes, on a CPU."""
    return keras.backend.backend() == "jax" and on_cpu()


def barrier(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors, computed on JAX before anything that uses them."""
    return importlib.import_module("jax.lax").optimization_barrier(tensors)


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` without rounding to TF32 or bfloat16 on accelerators; on JAX, as
    TensorFlow has one switch for all."""
    if keras.backend.backend() != "jax":
        return ops.matmul(a, b)
    return importlib.import_module("jax.numpy").matmul(a, b, precision="highest")


def row_mean(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over the last axis, of `x * weights` where given: `(columns,)`, or one of
    several rows, `(groups, columns)`.

    On a CPU a matrix product is the fastest where there are weights, which it takes
    along, and under TensorFlow. Elsewhere it may run in reduced precision (TF32,
    bfloat16), so it is not used there.
    """
    columns = x.shape[-1]
    if weights is not None and len(weights.shape) > 1:
        x, weights = x * weights, None
    product = weights is not None or keras.backend.backend() == "tensorflow"
    if on_cpu() and product and SHORT <= columns < LONG:
        if weights is None:
            weights = ops.ones((columns,), x.dtype)
        return ops.matmul(x, ops.reshape(weights / columns, (columns, 1)))
    return ops.mean(x if weights is None else x * weights, axis=-1, keepdims=True)


def row_mean_square(x: Tensor) -> Tensor:
    """Mean over the last axis of `x**2`."""
    if on_cpu() and _under_tensorflow_xla():
        return row_mean(ops.square(x))
    return mean_square(x, (-1,), float(x.shape[-1]))


def mean(x: Tensor, axes: Sequence[int], n: Tensor | float) -> Tensor:
    """`sum(x) / n` over `axes`, kept with size 1.

    Over many positions of `(batch, positions, channels)` TensorFlow's own reduction
    takes up to 1.7 times as long on a CPU as a matrix product; over few it is faster.
    Over the batch alone JAX's takes ten times as long.
    """
    axes = tuple(axes)
    if axes == (0,) and on_jax_cpu():
        total = column_sum(ops.reshape(x, (x.shape[0], -1)))
        return ops.reshape(total, (1, *x.shape[1:])) / n
    if len(x.shape) != 3 or axes not in ((1,), (0, 1)) or not _plain_cpu():
        return ops.sum(x, axes, keepdims=True) / n
    if axes == (1,) and (x.shape[1] or SHORT) < SHORT:
        return ops.sum(x, axes, keepdims=True) / n
    if axes == (0, 1) and x.shape[0] != 1:
        x = ops.reshape(x, (1, -1, x.shape[-1]))
    weight = ops.ones((1, 1, ops.shape(x)[1]), x.dtype) / n
    return ops.matmul(weight, x)


def column_sum(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over the first axis, weighted by `(rows, 1)`, or `(rows, groups, 1)`.

    On a CPU a matrix product is the fastest of `(rows, columns)`, but for XLA as
    TensorFlow calls it, which reduces together with what comes before.
    """
    if len(x.shape) > 2 or not on_cpu() or _under_tensorflow_xla():
        return ops.sum(x if weights is None else x * weights, axis=0)
    if weights is None:
        weights = ops.ones((ops.shape(x)[0], 1), x.dtype)
    return ops.reshape(ops.matmul(ops.transpose(weights), x), (x.shape[-1],))


def multiply_add(x: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """`x * slope + offset` of `(batch, positions, channels)` and two `(channels,)`, in
    one pass where there is a kernel for it: in TensorFlow's plain graph on a CPU."""
    # On few vectors, or an unknown number, most of the time is that of calling it.
    few = x.shape[1] == 1 and (x.shape[0] or 0) * x.shape[2] < 2**18
    if few or not _plain_cpu() or x.dtype != "float32":
        return x * slope + offset
    import tensorflow as tf

    def kernel(x, slope, offset):
        # Inference of a batch normalization whose statistics are 0 and 1.
        channels = x.shape[-1]
        y, *_ = tf.raw_ops.FusedBatchNormV3(
            x=ops.expand_dims(x, 2),
            scale=slope,
            offset=offset,
            mean=tf.zeros((channels,)),
            variance=tf.ones((channels,)),
            epsilon=0.0,
            is_training=False,
        )

        # Its own gradient computes all three, needed or not.
        def backward(dy):
            return (
                dy * slope,
                column_sum(ops.reshape(dy * x, (-1, channels))),
                column_sum(ops.reshape(dy, (-1, channels))),
            )

        return tf.squeeze(y, 2), backward

    return custom_gradient(kernel)(x, slope, offset)


def fused_batch_normalization(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Training-mode batch normalization of `(rows, positions, channels)`, one kernel.

    Args:
        x: float32 tensor.
        gamma, beta: `(channels,)`.
        epsilon: added to the variance.

    Returns:
        The output, the mean and the biased variance; None where there is no such
        kernel. TensorFlow alone has one, in float32. Under XLA it is not used: there
        it is lowered to E[x**2] - E[x]**2, which loses all digits once the mean is
        large beside the standard deviation (measured: NaN at 1000 to 1).
    """
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    # cuDNN asks for an epsilon of at least 1e-5.
    if x.dtype != tf.float32 or _under_xla() or (not on_cpu() and epsilon < 1.001e-5):
        return None
    y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=ops.expand_dims(x, 2),
        scale=gamma,
        offset=beta,
        mean=tf.zeros((0,)),
        variance=tf.zeros((0,)),
        epsilon=epsilon,
        is_training=True,
    )
    # The kernel reports the unbiased variance; Keras's moving one is biased.
    shape: Any = tf.shape(x)
    n = tf.cast(shape[0] * shape[1], tf.float32)
    variance = variance * (tf.maximum(n - 1.0, 1.0) / n)
    return tf.squeeze(y, 2), mean, variance


def eagerly() -> contextlib.AbstractContextManager:
    """Context in which values are at hand, while a function is being traced too."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.init_scope()
    return contextlib.nullcontext()


class Tap:
    """Takes a tensor out of a compiled step: `put` within it, `get` outside.

    Args:
        shape: of the float32 tensor.
    """

    def __init__(self, shape: Sequence[int]):
        self._last: Any = None
        if keras.backend.backend() == "tensorflow":
            self._last = keras.Variable(ops.zeros(shape), trainable=False)

    def put(self, x: Tensor) -> None:
        """Keeps the tensor; the last one stays."""
        if keras.backend.backend() == "jax":
            import jax

            jax.debug.callback(lambda value: setattr(self, "_last", value), x)
        else:
            self._last.assign(x)

    def get(self) -> Any:
        """The last tensor as an array, None where there was none."""
        if keras.backend.backend() == "jax":
            import jax

            jax.effects_barrier()
        return None if self._last is None else ops.convert_to_numpy(self._last)


def value(x: Any) -> Tensor:
    """A variable's value now, or a gradient, as a plain tensor.

    TensorFlow gives the gradient of an embedding as rows, and `keras.ops` pass a
    variable on as it is, so that it would be read later, after the next assignment.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.convert_to_tensor(x)
    return ops.convert_to_tensor(x)


def squared_difference(x: Tensor, y: Tensor) -> Tensor:
    """`(x - y)**2` in one pass over `x`."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.math.squared_difference(x, y)
    return ops.square(x - y)


def mean_square(x: Tensor, axes: Sequence[int], n: Tensor | float) -> Tensor:
    """`sum(x**2) / n` over `axes`, kept with size 1, without a tensor of squares."""

    def kernel(x):
        if keras.backend.backend() == "tensorflow" and not (
            _under_xla() or _exported()
        ):
            import tensorflow as tf

            # Its own gradient is NaN where everything is 0.
            result = tf.square(tf.math.reduce_euclidean_norm(x, axes, keepdims=True))
        else:
            result = ops.sum(ops.square(x), axes, keepdims=True)
        return result / n, lambda upstream: (x * (upstream * 2 / n),)

    return custom_gradient(kernel)(x)


def _exported() -> bool:
    """Whether TensorFlow traces what other programs will run, which lack operations:
    TensorFlow Lite, ONNX. Nothing but who asks for it tells."""
    import tensorflow as tf

    frame = None if tf.executing_eagerly() else sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(EXPORTERS):
            return True
        frame = frame.f_back
    return False


def _plain_cpu() -> bool:
    """Whether TensorFlow runs operation by operation, on a CPU."""
    return keras.backend.backend() == "tensorflow" and on_cpu() and not _under_xla()


def _under_tensorflow_xla() -> bool:
    return keras.backend.backend() == "tensorflow" and _under_xla()


def _under_xla() -> bool:
    """Whether XLA compiles what is being traced; when in doubt, True."""
    if keras.backend.backend() != "tensorflow":
        return keras.backend.backend() == "jax"
    import tensorflow as tf

    try:
        from tensorflow.python.ops import control_flow_util
    except ImportError:
        return True
    graph = tf.compat.v1.get_default_graph()
    return bool(
        tf.config.optimizer.get_jit()
        or control_flow_util.GraphOrParentsInXlaContext(graph)
    )


@contextlib.contextmanager
def double_precision():
    """Context in which float64 is float64, for tests.

    JAX needs to be told, and Keras on JAX turns every float64 result into float32 by a
    table of its own, which is lifted meanwhile.
    """
    if keras.backend.backend() != "jax":
        yield
        return
    import jax
    from keras.src.backend.common import dtypes

    enable = getattr(jax, "enable_x64", None)
    if enable is None:
        # Where it was before it became a name of jax itself.
        enable = importlib.import_module("jax.experimental").enable_x64
    table = dtypes.BIT64_TO_BIT32_DTYPE
    narrowed = table["float64"]
    table["float64"] = "float64"
    try:
        with enable(True):
            yield
    finally:
        table["float64"] = narrowed


def traced(f: Callable) -> Callable:
    """`f` compiled where running it operation by operation is slow: on JAX, which
    compiles every operation by itself."""
    return compiled(f) if keras.backend.backend() == "jax" else f
