"""Backend-specific code, second part: gradients at inputs, compiled programs that
change no variable, and the insides of a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from kerasnorm.runtime import compilation
from rewriters import private
from rewriters.program import fixed_batch
from rewriters.transfer import innermost


Tensor = Any


def value_and_gradient(
    f: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor
) -> tuple[Tensor, Any, Tensor]:
    """`f(x) = (rows, aux)`; returns rows, aux and the gradient of `sum(rows)`."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            rows, aux = f(x)
        unconnected = tf.UnconnectedGradients.ZERO
        return rows, aux, tape.gradient(rows, x, unconnected_gradients=unconnected)
    import jax

    rows, pull, aux = jax.vjp(f, x, has_aux=True)
    return rows, aux, pull(ops.ones_like(rows))[0]


def value_and_gradients(
    f: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """`f(x)`, `(rows, k)`, and the gradient of each of its columns."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(x)
            y = f(x)
            columns = tf.unstack(y, axis=1)
        unconnected = tf.UnconnectedGradients.ZERO
        return y, [
            tape.gradient(c, x, unconnected_gradients=unconnected) for c in columns
        ]
    import jax

    y, pull = jax.vjp(f, x)
    units = [ops.zeros_like(y).at[:, k].set(1.0) for k in range(y.shape[1])]
    return y, [pull(unit)[0] for unit in units]


def watched_gradients(
    f: Callable[..., tuple[Tensor, Any]],
    model: Any,
    variables: Sequence[Any],
) -> Callable[..., tuple[Any, list[Tensor], list[Tensor]]]:
    """A function that runs `f` once forward and once backward.

    Nothing that `f` assigns to variables (moving statistics, seeds) stays assigned, and
    all are read anew at every call. Compiled once per shape where `compilation` says
    so; else step by step on TensorFlow, where tracing takes longer than running a few
    times.

    Args:
        f: `f(tensors, constants) -> (loss, more)`: lists of tensors; a scalar, and any
            structure of tensors.
        model: whose variables `f` reads.
        variables: those of them that gradients are asked for.

    Returns:
        A function of the same lists that gives `more` and the gradients of the loss,
        0 where it does not depend on them, with respect to `tensors` and to
        `variables`.
    """
    jit = compilation.compiles(model)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        def both(tensors, constants):
            with (
                tf.GradientTape() as tape,
                keras.StatelessScope(),
                compilation.tracing([model] if jit else []),
            ):
                tape.watch(tensors)
                loss, more = f(tensors, constants)
            sources = [*tensors, *(private.value(v) for v in variables)]
            found = tape.gradient(
                loss, sources, unconnected_gradients=tf.UnconnectedGradients.ZERO
            )
            # Gathered rows of an embedding come as slices.
            found = [tf.convert_to_tensor(g) for g in found]
            return more, found[: len(tensors)], found[len(tensors) :]

        run = tf.function(both, jit_compile=True, autograph=False) if jit else both

        def on_tensors(tensors, constants):
            return run(
                *([tf.convert_to_tensor(t) for t in v] for v in (tensors, constants))
            )

        return on_tensors
    import jax

    ours = {id(v) for v in variables}
    others = [v for v in model.variables if id(v) not in ours]

    def pure(tensors, values, fixed, constants):
        mapping = [
            *zip(variables, values, strict=True),
            *zip(others, fixed, strict=True),
        ]
        with keras.StatelessScope(mapping):
            return f(tensors, constants)

    whole = jax.value_and_grad(pure, argnums=(0, 1), has_aux=True)
    whole = jax.jit(whole) if jit else whole

    def on_values(tensors, constants):
        tensors = [ops.convert_to_tensor(t) for t in tensors]
        values, fixed = ([v.value for v in part] for part in (variables, others))
        (_, more), (at_tensors, at_values) = whole(
            tensors, values, fixed, list(constants)
        )
        return more, at_tensors, at_values

    return on_values


class Compiled:
    """A function that reads variables, compiled once per shape and never writing them.

    Whatever the function assigns (moving statistics, states of random generators) is
    forgotten when it returns.

    Args:
        f: function of a nested structure of tensors; those of rank 1 and more have the
            batch in front.
        variables: pairs `(variable, read instead)` of the Keras variables `f` reads;
            their values are read anew at every call.
        models: that `f` runs.
        jit: through XLA; None where `compilation` says so. Unless it was asked for,
            what XLA refuses goes on without it.

    Attributes:
        traces: how often `f` was traced so far.
        fixed: each batch size compiles anew; otherwise one program serves all.
    """

    def __init__(
        self,
        f: Callable,
        variables: Sequence[tuple[Any, Any]],
        models: Sequence[Any] = (),
        jit: bool | None = None,
    ):
        self.f, self.variables, self.models = f, list(variables), list(models)
        self.jit = compilation.compiles(*models, wanted=jit)
        self.asked = jit is True or compilation.mode() is True
        self.traces = 0
        self.fixed = (
            self.jit
            or keras.backend.backend() == "jax"
            or any(fixed_batch(model) for model in models)
        )
        self._compiled: dict[Any, Callable] = {}

    def __call__(self, *args: Any) -> Any:
        if keras.backend.backend() == "jax":
            import jax

            if not self._compiled:
                self._compiled[()] = (
                    jax.jit(self._on_values) if self.jit else self._on_values
                )
            values = [source.value for _, source in self.variables]
            return self._compiled[()](values, *args)
        import tensorflow as tf

        args = tf.nest.map_structure(tf.convert_to_tensor, args)
        flat = tf.nest.flatten(args)
        batch = (lambda t: t.shape[:1]) if self.fixed else (lambda t: [None])
        specs = [
            tf.TensorSpec([*batch(t), *t.shape[1:]] if t.shape.rank else [], t.dtype)
            for t in flat
        ]
        key = tuple((tuple(s.shape), s.dtype) for s in specs)
        if key in self._compiled:
            return self._compiled[key](*args)
        signature = tf.nest.pack_sequence_as(args, specs)
        # Rewriting the source of all that is called takes longer than tracing it, and
        # Keras's trainers do without as well.
        made = tf.function(
            self._on_reads,
            input_signature=signature,
            jit_compile=self.jit,
            autograph=False,
        )
        # It counts traces by place in the source, and every program is made here.
        made._omit_frequent_tracing_warning = True
        try:
            result = made(*args)
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
            if self.asked or not self.jit:
                raise
            self.jit = False  # an operation that XLA does not know
            return self(*args)
        self._compiled[key] = made
        return result

    def _on_values(self, values: Sequence[Any], *args: Any) -> Any:
        self.traces += 1
        mapping = [(v, x) for (v, _), x in zip(self.variables, values, strict=True)]
        with keras.StatelessScope(state_mapping=mapping):
            return self.f(*args)

    def _on_reads(self, *args: Any) -> Any:
        self.traces += 1
        # Only what is replaced is mapped: the others are read where they are, which
        # keeps every variable's own kind (mirrored, synchronized on reading).
        mapping = [(v, s.value) for v, s in self.variables if s is not v]
        with (
            keras.StatelessScope(state_mapping=mapping),
            compilation.tracing(self.models if self.jit else []),
        ):
            return self.f(*args)


def in_training(
    model: Any, state: Sequence[Any], f: Callable[[], Any]
) -> tuple[Any, list]:
    """Runs `f` on the variables of a training step.

    Args:
        model: whose `train_step` is running.
        state: what it was called with in front of the data: nothing on TensorFlow; on
            JAX one tuple, the values of all variables.
        f: reads the model, and may draw from random generators that it holds.

    Returns:
        What `f` returned, and the state after it.
    """
    if not state:
        return f(), []
    trainable, fixed, optimizer, metrics = state[0]
    mapping = list(zip(model.trainable_variables, trainable, strict=True))
    mapping += zip(model.non_trainable_variables, fixed, strict=True)
    with keras.StatelessScope(state_mapping=mapping) as scope:
        result = f()
    fixed = [scope.get_current_value(v) for v in model.non_trainable_variables]
    return result, [(trainable, fixed, optimizer, metrics)]


def train_step(
    model: Any, state: Sequence[Any], x: Tensor, y: Tensor, sample_weight: Any
) -> tuple[Any, list, Tensor]:
    """One training step of Keras, and what it throws away: the gradient at the input.

    Args:
        model: a compiled model of one input.
        state: as for `in_training`.
        x, y, sample_weight: the batch.

    Returns:
        Logs, the state after the step, and the gradient of the loss at `x`.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            y_pred = model(x, training=True)
            loss = private.compute_loss(
                model,
                x=x,
                y=y,
                y_pred=y_pred,
                sample_weight=sample_weight,
                training=True,
            )
            unscaled = loss
            strategy = tf.distribute.get_strategy()
            if strategy.num_replicas_in_sync > 1:
                unscaled = loss * strategy.num_replicas_in_sync
            rows: Any = tf.shape(x)
            private.loss_tracker(model).update_state(unscaled, sample_weight=rows[0])
            loss = model.optimizer.scale_loss(loss)
        weights = model.trainable_weights
        *gradients, at_x = tape.gradient(loss, [*weights, x])
        model.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        logs = model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        return logs, [], at_x
    import jax

    trainable, fixed, optimizer, metrics = state[0]
    both = jax.value_and_grad(
        model.compute_loss_and_updates, argnums=(0, 3), has_aux=True
    )
    (_, aux), (gradients, at_x) = both(
        trainable,
        fixed,
        metrics,
        x,
        y,
        sample_weight,
        training=True,
        optimizer_variables=optimizer,
    )
    loss, y_pred, fixed, metrics = aux
    trainable, optimizer = model.optimizer.stateless_apply(
        optimizer, gradients, trainable
    )
    logs, metrics = private.update_metrics_variables(
        model, metrics, loss, x, y, y_pred, sample_weight
    )
    return logs, [(trainable, fixed, optimizer, metrics)], at_x


def one_of(optimizer: Any, variable: Any = None) -> Any:
    """The optimizer that makes the steps of a variable, within those that wrap it and,
    of a `MultiOptimizer`, among several; without a variable the first of these."""
    optimizer = innermost(optimizer)
    if not isinstance(optimizer, getattr(keras.optimizers, "MultiOptimizer", ())):
        return optimizer
    if variable is not None and (optimizer.optimizers or not optimizer.built):
        return innermost(private.optimizer_of(optimizer, variable))
    found = optimizer.optimizers
    return innermost(found[0]) if found else keras.optimizers.SGD()


def learning_rate(optimizer: Any, variable: Any) -> float:
    """The rate at which a variable is trained now."""
    rate = one_of(optimizer, variable).learning_rate
    return float(keras.ops.convert_to_numpy(rate))
