"""Statistics of a batch that is spread over the replicas of a strategy.

On TensorFlow the replicas of a `tf.distribute` strategy each run the same code on their
own part of the batch. On JAX there is one program, which sees the whole batch: the
compiler inserts the communication that its sharding asks for, and everything here does
nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops, tree

from rewriters import private


Tensor = Any

# Replicas of a MirroredStrategy are traced in threads of their own.
_scope = threading.local()


@contextlib.contextmanager
def synchronized(on: bool = True) -> Iterator[None]:
    """Context in which statistics of the batch are taken over the batches of all
    replicas together. With `on=False`, on JAX and on one device it changes nothing."""
    before = getattr(_scope, "on", False)
    _scope.on = on
    try:
        yield
    finally:
        _scope.on = before


def together() -> bool:
    """Whether there are other replicas whose statistics count: see `synchronized`."""
    return getattr(_scope, "on", False) and count() > 1


def count() -> int:
    """Number of replicas that each run this code on their own part of the batch: those
    of the strategy in whose replica context the call is made, else 1."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def of(model: Any) -> int:
    """Number of replicas that a model is trained on."""
    strategy = getattr(model, "distribute_strategy", None)
    return 1 if strategy is None else strategy.num_replicas_in_sync


def across(axes: Sequence[int]) -> bool:
    """Whether a reduction over these axes goes on over the replicas: where they are
    synchronized and the batch, axis 0, is one of them."""
    return 0 in axes and together()


def totals(axes: Sequence[int], *sums: Tensor) -> list[Tensor]:
    """Sums over `axes` as they are, or added up over the replicas: see `across`."""
    return sum_all(*sums) if across(axes) else list(sums)


def any_valid(mask: Tensor, axes: Sequence[int], keepdims: bool = False) -> Tensor:
    """Whether a boolean mask lets anything in along `axes`, on any replica where these
    are synchronized."""
    found = ops.any(mask, axes, keepdims=keepdims)
    if not across(axes):
        return found
    return sum_all(ops.cast(found, "float32"))[0] > 0


def sum_all(*tensors: Tensor) -> list[Tensor]:
    """Sums of the tensors of all replicas, the same on each; differentiable."""
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return context.all_reduce("SUM", [tf.convert_to_tensor(t) for t in tensors])


def gather(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The tensors of all replicas one after the other, in their order.

    Args:
        x: `(rows, ...)`, where each replica may have another number of rows.

    Returns:
        `(all rows, ...)`, the same on each replica, and a function that cuts the rows
        of this replica out of such a tensor.
    """
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    rows: Any = tf.shape(x)[:1]
    sizes = context.all_gather(rows, axis=0)
    start = tf.reduce_sum(sizes[: context.replica_id_in_sync_group])
    return context.all_gather(x, axis=0), lambda v: v[start : start + rows[0]]


def writes(model: Any) -> bool:
    """Whether this process writes the files of a training of `model`: of several
    workers one alone does, the chief."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.process_index() == 0
    strategy = getattr(model, "distribute_strategy", None)
    return strategy is None or strategy.extended.should_checkpoint


def multi_worker(model: Any) -> Any:
    """Lets `fit` and `evaluate` of a model run under `MultiWorkerMirroredStrategy`.

    Keras 3 raises there as soon as it looks at the first batch, and again when it
    averages the logs over the workers (keras-team/keras issue 20585). The former it is
    given here as what this worker has of it, the latter with an axis to average over.

    ```python
    with strategy.scope():
        model = ...
        model.compile(...)
    kerasnorm.replicas.multi_worker(model).fit(x, y, batch_size=256)
    ```

    Args:
        model: made within the scope of the strategy.

    Returns:
        The same model. Under any other strategy, and on JAX, nothing is changed.
    """
    if keras.backend.backend() != "tensorflow":
        return model
    import tensorflow as tf

    strategy = model.distribute_strategy
    workers = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    if not workers or "train_step" in vars(model):
        return model
    build = private.maybe_symbolic_build(model)

    def local(iterator: Any = None, data_batch: Any = None) -> None:
        for _, _, batches in iterator or ():
            data_batch = tree.map_structure(
                lambda v: strategy.experimental_local_results(v)[0], next(batches)
            )
            break
        build(data_batch=data_batch)

    def averaged(step: Callable) -> Callable:
        return lambda data: tree.map_structure(
            lambda v: ops.reshape(v, (1,)) if len(v.shape) == 0 else v, step(data)
        )

    private.set_symbolic_build(model, local)
    model.train_step = averaged(model.train_step)
    model.test_step = averaged(model.test_step)
    return model
