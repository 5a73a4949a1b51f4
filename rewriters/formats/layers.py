"""The few things that older Keras computes and Keras 3 has no layer for."""

from __future__ import annotations

from collections.abc import Callable
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
class SeveralAxesBatchNormalization(keras.layers.Layer):
    """Batch normalization with statistics per position of several axes.

    Keras 2's `BatchNormalization(axis=[1, 3])`, which Keras 3 lacks:
    `y = gamma * (x - mean) / sqrt(variance + epsilon) + beta`. The statistics are taken
    over the axes that are not in `axis`: those of the batch in training, moving ones
    otherwise. The weights have the rank of the input, with length one elsewhere.

    Args:
        axis: axes that keep their own statistics, the batch's not among them.
        momentum: of the moving statistics.
        epsilon: added to the variance.
        center: whether to add beta.
        scale: whether to multiply by gamma.
    """

    def __init__(
        self,
        axis: list[int],
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.axis, self.momentum, self.epsilon = list(axis), momentum, epsilon
        self.center, self.scale = center, scale
        self._own = {
            "beta_initializer": keras.initializers.get(beta_initializer),
            "gamma_initializer": keras.initializers.get(gamma_initializer),
            "moving_mean_initializer": keras.initializers.get(moving_mean_initializer),
            "moving_variance_initializer": keras.initializers.get(
                moving_variance_initializer
            ),
            "beta_regularizer": keras.regularizers.get(beta_regularizer),
            "gamma_regularizer": keras.regularizers.get(gamma_regularizer),
            "beta_constraint": keras.constraints.get(beta_constraint),
            "gamma_constraint": keras.constraints.get(gamma_constraint),
        }

    def build(self, input_shape):
        rank = len(input_shape)
        kept = {a % rank for a in self.axis}
        shape = [input_shape[i] if i in kept else 1 for i in range(rank)]
        for name, wanted, trained in (
            ("gamma", self.scale, True),
            ("beta", self.center, True),
            ("moving_mean", True, False),
            ("moving_variance", True, False),
        ):
            weight = wanted and self.add_weight(
                name=name,
                shape=shape,
                initializer=self._own[f"{name}_initializer"],
                regularizer=self._own.get(f"{name}_regularizer"),
                constraint=self._own.get(f"{name}_constraint"),
                trainable=trained,
                autocast=False,
            )
            setattr(self, name, weight if wanted else None)

    def call(self, inputs, training=None):
        x = ops.cast(inputs, "float32")
        mean = ops.cast(self.moving_mean, "float32")
        variance = ops.cast(self.moving_variance, "float32")
        if training and self.trainable:
            rank = len(inputs.shape)
            kept = {a % rank for a in self.axis}
            axes = [i for i in range(rank) if i not in kept]
            rate, old = 1 - self.momentum, (mean, variance)
            mean, variance = ops.moments(x, axes, keepdims=True)
            self.moving_mean.assign(old[0] + (mean - old[0]) * rate)
            self.moving_variance.assign(old[1] + (variance - old[1]) * rate)
        x = (x - mean) * ops.rsqrt(variance + self.epsilon)
        if self.scale:
            x = x * ops.cast(self.gamma, "float32")
        if self.center:
            x = x + ops.cast(self.beta, "float32")
        return ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        own = {k: keras.saving.serialize_keras_object(v) for k, v in self._own.items()}
        plain = ("axis", "momentum", "epsilon", "center", "scale")
        return {
            **super().get_config(),
            **{k: getattr(self, k) for k in plain},
            **own,
        }


@keras.saving.register_keras_serializable("rewriters")
class SpectralEmbedding(keras.layers.SpectralNormalization):
    """`SpectralNormalization` of an `Embedding`, with floats as output.

    Keras's casts the output to the type of the input, which are integers here.
    """

    def call(self, inputs, training=False):
        y = super().call(ops.cast(inputs, "float32"), training=training)
        return ops.cast(y, self.compute_dtype)


def getitem(tensor: Any, slice_spec: Any, var: Any = None) -> Any:
    """`tensor[slice_spec]`, where a slice is a dict of its start, stop and step."""

    def one(item: Any) -> Any:
        named = ("start", "stop", "step")
        return slice(*(item[k] for k in named)) if isinstance(item, dict) else item

    if isinstance(slice_spec, (list, tuple)):
        return tensor[tuple(one(item) for item in slice_spec)]
    return tensor[one(slice_spec)]


@keras.saving.register_keras_serializable("rewriters")
class TensorFlowFunction(keras.Operation):
    """A TensorFlow function that Keras 3 has no operation for, called by its name.

    Works on the TensorFlow backend alone.

    Args:
        function: name below `tf.`, such as `"signal.stft"`.
        name: name of the operation.
    """

    # What a file may name: functions of tensors alone. Nothing that reads or writes
    # files, calls back into Python or runs a graph is reachable from here.
    MODULES = ("math", "nn", "linalg", "image", "signal", "bitwise", "strings")
    FUNCTIONS = frozenset(
        "shape rank size fill zeros ones zeros_like ones_like range reshape tile "
        "repeat pad broadcast_to strided_slice slice split squeeze expand_dims "
        "transpose where gather gather_nd scatter_nd reverse sequence_mask "
        "searchsorted unique boolean_mask eye linspace roll one_hot unstack stack "
        "concat sort argsort norm tensordot cumsum clip_by_norm "
        "tensor_scatter_nd_update reverse_sequence ensure_shape space_to_batch "
        "space_to_batch_nd batch_to_space batch_to_space_nd div convert_to_tensor "
        "constant complex dtypes.complex dtypes.saturate_cast saturate_cast "
        "random.normal random.uniform random.truncated_normal".split()
    )

    def __init__(self, function: str, *, name: str | None = None):
        super().__init__(name=name)
        self.function = function
        if self.find(function) is None:
            raise ValueError(f"tf.{function} may not be called from a file")

    @classmethod
    def find(cls, function: str) -> Callable[..., Any] | None:
        """Returns `tf.<function>`, None if there is none that a file may name."""
        if function == "__operators__.getitem":
            return getitem
        name = function.removeprefix("compat.v1.")
        head, _, tail = name.partition(".")
        if name not in cls.FUNCTIONS and not (tail and head in cls.MODULES):
            return None
        import tensorflow as tf

        found: Any = tf
        for part in function.split("."):
            # Behind an underscore lie the modules that TensorFlow imports.
            found = None if part.startswith("_") else getattr(found, part, None)
        return found if callable(found) else None

    def compute_output_spec(self, *args, **kwargs):
        # Keras calls the product of a tensor and a number sparse; TensorFlow would
        # then trace this function with a tensor that it never sees.
        def dense(x):
            symbolic = isinstance(x, keras.KerasTensor)
            return keras.KerasTensor(x.shape, x.dtype) if symbolic else x

        args, kwargs = keras.tree.map_structure(dense, (args, kwargs))
        return super().compute_output_spec(*args, **kwargs)

    def call(self, *args, **kwargs):
        function: Any = self.find(self.function)
        return function(*args, **kwargs)


@keras.saving.register_keras_serializable("rewriters")
class TensorShape(keras.Operation):
    """A tensor's shape as a tensor, like `tf.shape`.

    Args:
        dtype: integer type of the result.
        name: name of the operation.
    """

    def __init__(self, dtype: str = "int32", *, name: str | None = None):
        super().__init__(name=name)
        self.dtype = dtype

    def compute_output_spec(self, x):
        return keras.KerasTensor((len(x.shape),), self.dtype)

    def call(self, x):
        return ops.convert_to_tensor(ops.shape(x), self.dtype)
