"""One policy for compilation through XLA, asked by everything that runs a model: fits,
attacks, measurements, monitors.

"auto" compiles on a GPU or TPU, and JAX, which has nothing else, everywhere. TensorFlow
on a CPU is left to its plain graph: `tests/benchmarks/compilation.py` measures what XLA
does there to whole programs, convolutions above all, and what compiling costs.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import keras

from kerasnorm.common.errors import KerasNormError, taking
from kerasnorm.numerics import backend
from rewriters import private


VARIABLE = "KERASNORM_JIT"
_WORDS = {"auto": "auto", "1": True, "true": True, "0": False, "false": False}
_chosen: list[jit] = []


class jit:
    """Says whether kerasnorm compiles through XLA: for good, or within a `with`.

    Without a call the environment variable `KERASNORM_JIT` decides (`auto`, `1`, `0`),
    and without that "auto" does. The argument `jit` of a single function goes before
    both. What was compiled already stays as it is.

    Args:
        mode: `"auto"`, on a GPU or TPU, and on JAX; True, everywhere, an error where
            XLA refuses a model; False, nowhere: TensorFlow's plain graph, and JAX
            operation by operation, which is slow and shows where an error comes from.

    Raises:
        KerasNormError: another mode.

    ```python
    kerasnorm.jit(False)  # from here on
    with kerasnorm.jit(True):  # and here only
        result = kerasnorm.adversarial.evaluate(model, x, y, "pgd", eps=8 / 255)
    ```
    """

    @taking()
    def __init__(self, mode: bool | Literal["auto"]):
        self.mode = mode
        # The first `with` goes back to before it was made, if nothing was chosen since.
        self._before = [list(_chosen)]
        self._entered = False
        _chosen[:] = [self]

    def __enter__(self) -> jit:
        if self._entered or _chosen != [self]:
            self._before.append(list(_chosen))
        self._entered = True
        _chosen[:] = [self]
        return self

    def __exit__(self, *exception: object) -> None:
        _chosen[:] = self._before.pop()


def mode() -> bool | str:
    """What is chosen now: `"auto"`, True or False.

    Raises:
        KerasNormError: the environment variable holds something else.
    """
    if _chosen:
        return _chosen[0].mode
    word = os.environ.get(VARIABLE, "auto").lower()
    if word not in _WORDS:
        raise KerasNormError(
            f"the environment variable {VARIABLE} says nothing that is known",
            got=repr(word),
            expected=", ".join(_WORDS),
        )
    return _WORDS[word]


def compiles(*models: Any, wanted: bool | None = None) -> bool:
    """Whether a program that runs these models is compiled through XLA.

    Args:
        models: Keras models.
        wanted: what the caller was asked for, None where nothing.
    """
    choice = mode() if wanted is None else wanted
    if choice != "auto":
        return bool(choice)
    if keras.backend.backend() == "jax":
        return True
    return _accelerated() and not any(_refuses(model) for model in models)


@functools.cache
def _accelerated() -> bool:
    """Whether TensorFlow has a device on which XLA wins."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not backend.on_cpu() or bool(tf.config.list_logical_devices("TPU"))


def _refuses(model: Any) -> bool:
    """Whether a layer cannot be compiled, whatever is done about it."""
    return any(
        not layer.supports_jit and not _has_cudnn(layer)
        for layer in private.flatten_layers(model)
    )


def _has_cudnn(layer: Any) -> bool:
    return getattr(layer, "use_cudnn", None) in ("auto", True)


@contextlib.contextmanager
def tracing(models: Sequence[Any]) -> Iterator[None]:
    """Context in which models are traced for XLA.

    LSTM and GRU layers say that they refuse it because of one kernel (cuDNN's). They
    have the same computation without it, which is what is traced here.
    """
    found = [x for m in models for x in private.flatten_layers(m) if _has_cudnn(x)]
    kept = [(layer, layer.use_cudnn, layer.supports_jit) for layer in found]
    try:
        for layer in found:
            layer.use_cudnn, layer.supports_jit = False, True
        yield
    finally:
        for layer, *before in reversed(kept):
            layer.use_cudnn, layer.supports_jit = before
