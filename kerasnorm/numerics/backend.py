"""What differs between backends: custom gradients, compilation, contexts.

Everything here has a neutral meaning, as have the sums in `reductions`; what changes
with the backend is only how fast it is, and how a gradient is asked for.
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

from rewriters import private


Tensor = Any

# Modules that trace a function to translate it, see `translated`.
TRANSLATORS = (
    private.EXPORT,
    "tensorflow.lite",
    "tensorflow.python.ops.parallel_for",
)


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
    return not on_cpu() and under_xla()


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


def tensor(variable: Any) -> Tensor:
    """A variable's value in float32 or better."""
    now = value(variable)
    return ops.cast(now, float_of(now.dtype))


def float_of(dtype: Any) -> str:
    """The type in which steps are computed."""
    dtype = keras.backend.standardize_dtype(dtype)
    return "float64" if dtype == "float64" else "float32"


def plain_cpu() -> bool:
    """Whether TensorFlow runs operation by operation, on a CPU."""
    here = keras.backend.backend() == "tensorflow" and on_cpu()
    return here and not under_xla() and not translated()


def translated() -> bool:
    """Whether TensorFlow traces what another program, or `vectorized_map`, translates.

    These lack operations, and eight bits want the plainest form: TensorFlow Lite sums
    by a matrix product with an error as large as the sum. Nothing but who asks for the
    trace says so.
    """
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    frame = None if tf.executing_eagerly() else sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(TRANSLATORS):
            return True
        frame = frame.f_back
    return False


def under_tensorflow_xla() -> bool:
    """Whether TensorFlow compiles through XLA what is traced now."""
    return keras.backend.backend() == "tensorflow" and under_xla()


def under_xla() -> bool:
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

    enable = getattr(jax, "enable_x64", None)
    if enable is None:
        # Where it was before it became a name of jax itself.
        enable = importlib.import_module("jax.experimental").enable_x64
    table = private.narrowed_dtypes()
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
