"""The few things that older Keras computes and Keras 3 has no layer for."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable("rewriters")
def hard_sigmoid_2(x):
    """Keras 1 and 2's hard sigmoid, `clip(x / 5 + 1 / 2, 0, 1)`.

    Keras 3 changed the slope to 1 / 6 under the same name.
    """
    return ops.clip(0.2 * x + 0.5, 0.0, 1.0)


@keras.saving.register_keras_serializable("rewriters")
class StdInstanceNormalization(keras.layers.Layer):
    """keras-contrib's instance normalization: epsilon is added to the deviation.

    `y = gamma * (x - mean) / (std + epsilon) + beta`, the statistics taken over all
    axes but the batch and `axis`; with `axis=None` over all but the batch, with one
    gamma and one beta.

    Args:
        axis: axis that keeps its own statistics, or None.
        epsilon: added to the standard deviation.
        center: whether to add beta.
        scale: whether to multiply by gamma.
    """

    def __init__(
        self,
        axis: int | None = None,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.axis, self.epsilon = axis, epsilon
        self.center, self.scale = center, scale
        self._own = {
            "beta_initializer": keras.initializers.get(beta_initializer),
            "gamma_initializer": keras.initializers.get(gamma_initializer),
            "beta_regularizer": keras.regularizers.get(beta_regularizer),
            "gamma_regularizer": keras.regularizers.get(gamma_regularizer),
            "beta_constraint": keras.constraints.get(beta_constraint),
            "gamma_constraint": keras.constraints.get(gamma_constraint),
        }

    def build(self, input_shape):
        shape = (1,) if self.axis is None else (input_shape[self.axis],)
        for name, wanted in (("gamma", self.scale), ("beta", self.center)):
            weight = wanted and self.add_weight(
                name=name,
                shape=shape,
                initializer=self._own[f"{name}_initializer"],
                regularizer=self._own[f"{name}_regularizer"],
                constraint=self._own[f"{name}_constraint"],
            )
            setattr(self, name, weight if wanted else None)

    def call(self, inputs):
        x = ops.cast(inputs, "float32")
        rank = len(inputs.shape)
        kept = {0} if self.axis is None else {0, self.axis % rank}
        axes = [i for i in range(rank) if i not in kept]
        shape = [1] * rank
        if self.axis is not None:
            shape[self.axis] = -1
        mean = ops.mean(x, axis=axes, keepdims=True)
        x = (x - mean) / (ops.std(x, axis=axes, keepdims=True) + self.epsilon)
        if self.scale:
            x = x * ops.cast(ops.reshape(self.gamma, shape), "float32")
        if self.center:
            x = x + ops.cast(ops.reshape(self.beta, shape), "float32")
        return ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        own = {k: keras.saving.serialize_keras_object(v) for k, v in self._own.items()}
        plain = {k: getattr(self, k) for k in ("axis", "epsilon", "center", "scale")}
        return {**super().get_config(), **plain, **own}


@keras.saving.register_keras_serializable("rewriters")
class TensorFlowFunction(keras.Operation):
    """A TensorFlow function that Keras 3 has no operation for, called by its name.

    Works on the TensorFlow backend alone.

    Args:
        function: name below `tf.`, such as `"signal.stft"`.
        name: name of the operation.
    """

    # What a file may name: pure functions of tensors. Nothing that reads or writes
    # files, calls back into Python or runs a graph is reachable from here.
    MODULES = ("math", "nn", "linalg", "image", "signal", "bitwise", "strings")
    FUNCTIONS = (
        "shape rank size fill zeros ones zeros_like ones_like range reshape "
        "broadcast_to strided_slice slice gather gather_nd scatter_nd reverse "
        "sequence_mask searchsorted unique boolean_mask eye linspace roll "
        "space_to_batch batch_to_space convert_to_tensor constant stack concat"
    ).split()

    def __init__(self, function: str, *, name: str | None = None):
        super().__init__(name=name)
        self.function = function
        if not self.allowed(function):
            raise ValueError(f"tf.{function} may not be called from a file")

    @classmethod
    def allowed(cls, function: str) -> bool:
        """Whether a file may name `function`."""
        head, _, tail = function.partition(".")
        return head in cls.FUNCTIONS if not tail else head in cls.MODULES

    def compute_output_spec(self, *args, **kwargs):
        # Keras calls the product of a tensor and a number sparse; TensorFlow would
        # then trace this function with a tensor that it never sees.
        def dense(x):
            symbolic = isinstance(x, keras.KerasTensor)
            return keras.KerasTensor(x.shape, x.dtype) if symbolic else x

        args, kwargs = keras.tree.map_structure(dense, (args, kwargs))
        return super().compute_output_spec(*args, **kwargs)

    def call(self, *args, **kwargs):
        import tensorflow as tf

        function: Any = tf
        for part in self.function.split("."):
            function = getattr(function, part)
        return function(*args, **kwargs)
