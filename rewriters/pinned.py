"""Functional models whose calls recorded `training=True` or `training=False`.

In Keras 2 a recorded `training` won over the model's own: dropout that stays on, batch
statistics at inference, a base that is never in training mode. Keras 3 records it too,
and then overrides it in `fit`, `evaluate` and `predict`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras

from rewriters import private


# These pass the argument on, and do nothing else with it.
_PASSING = (
    keras.Model,
    keras.layers.TimeDistributed,
    keras.layers.Bidirectional,
    keras.layers.RNN,
    keras.layers.StackedRNNCells,
)
_RATES = ("dropout", "recurrent_dropout", "_dropout", "rate")


@keras.saving.register_keras_serializable("rewriters")
class PinnedTraining(private.GraphWithHook):
    """A functional model in which a recorded `training` wins, as in Keras 2.

    The graph is an ordinary one: `layer(x, training=True)` inside it holds in `fit`,
    `evaluate`, `predict` and calls alike, whatever `training` the model is called
    with. Shapes are those of any `keras.Model(inputs, outputs)`.

    Args:
        inputs: tensors from `keras.Input`, in any structure.
        outputs: tensors computed from them.
        name: name of the model.

    Example:

    >>> import keras
    >>> x = keras.Input((3,))
    >>> y = keras.layers.Dropout(0.5)(x, training=True)
    >>> model = PinnedTraining(x, y)
    >>> bool((model.predict(keras.ops.ones((64, 3)), verbose=0) == 0).any())
    True
    """

    def call_of(self, operation: Any, wrap: Callable[[Any], Any]) -> Any:
        given = wrap(operation)
        plain = isinstance(given, keras.Operation)  # Keras copies the graph
        if plain or getattr(given, "__self__", None) is operation:
            return given

        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("training") is None:
                return given(*args, **kwargs)
            # Keras overrides the argument of layers alone, not of functions. What a
            # layer is called with would also reach those that follow.
            context = private.call_context()
            before = None if context is None else context.get_value("training")
            try:
                return wrap(functools.partial(operation))(*args, **kwargs)
            finally:
                if context is not None:
                    context.set_value("training", before)

        return call


def depends_on_training(layer: Any) -> bool:
    """Whether a layer, or one that it holds, computes something else in training."""
    return any(
        private.call_has_training_arg(x, False)
        and not isinstance(x, _PASSING)
        and not _never_drops(x)
        for x in private.flatten_layers(layer)
    )


def _never_drops(layer: Any) -> bool:
    rates = [getattr(layer, k) for k in _RATES if hasattr(layer, k)]
    return bool(rates) and not any(rates) and layer.__module__.startswith("keras.")
