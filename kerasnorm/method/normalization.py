"""`Normalization`, the base of every activation method: arguments, shapes, dtypes.

A method writes `statistics`, or `normalize` where its form is another, on an input that
is always `(batch, positions, channels)` in float32 or better. The base does the rest:
Keras arguments and config, `gamma` and `beta`, any rank and axis, masks, mixed
precision.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.numerics import moments, replicas


Tensor = Any


class Normalization(keras.layers.Layer):
    """Base layer; subclass it to write a normalization method.

    `get_config` follows from the signatures of `__init__` along the class hierarchy:
    keep every argument as an attribute of the same name, and never write to it in
    `build`.

    Args:
        axis: axis of `gamma` and `beta`, usually the channels; some methods take
            several.
        epsilon: added to the variance, or to what the method divides by.
        center: whether to add `beta`.
        scale: whether to multiply by `gamma`.
        beta_initializer, gamma_initializer: defaults `"zeros"` and `"ones"`.
        beta_regularizer, gamma_regularizer: none by default.
        beta_constraint, gamma_constraint: none by default.
        **kwargs: `name`, `dtype`, `trainable`.
    """

    # What a method may need beyond the channels: `axis` as a sequence.
    several_axes = False
    # Whether the gradient in training is defined by the paper, and not the derivative.
    surrogate_gradient = False

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        *,
        beta_initializer="zeros",
        gamma_initializer="ones",
        beta_regularizer=None,
        gamma_regularizer=None,
        beta_constraint=None,
        gamma_constraint=None,
        **kwargs,
    ):
        # Inputs are cast once, to float32 at least, by `call`.
        super().__init__(autocast=False, **kwargs)
        if not (isinstance(axis, int) or self.several_axes):
            raise KerasNormError(
                f"{type(self).__name__} normalizes along one axis",
                got=f"axis={axis!r}",
                expected="an integer",
            )
        self.axis = axis if isinstance(axis, int) else [int(a) for a in axis]
        self.epsilon = float(epsilon)
        self.center = center
        self.scale = scale
        self.beta_initializer = keras.initializers.get(beta_initializer)
        self.gamma_initializer = keras.initializers.get(gamma_initializer)
        self.beta_regularizer = keras.regularizers.get(beta_regularizer)
        self.gamma_regularizer = keras.regularizers.get(gamma_regularizer)
        self.beta_constraint = keras.constraints.get(beta_constraint)
        self.gamma_constraint = keras.constraints.get(gamma_constraint)
        self.supports_masking = True
        self.gamma = None
        self.beta = None

    # What a method writes.

    def statistics(
        self, x: Tensor, mask: Tensor | None, training: bool
    ) -> tuple[Tensor | None, Tensor]:
        """What to subtract (None for nothing) and what to multiply by.

        Args:
            x: `(batch, positions, channels)`, float32 or float64.
            mask: None, or boolean, `(batch, positions, 1)` or as `x`; True counts.
            training: training mode.

        Returns:
            `(mean, inverse)`, both broadcastable to `x`.
        """
        raise NotImplementedError(f"{type(self).__name__}.statistics")

    def normalize(self, x: Tensor, mask: Tensor | None, training: bool) -> Tensor:
        """The whole method, `gamma` and `beta` included; arguments as `statistics`."""
        mean, inverse = self.statistics(x, mask, training)
        gamma, beta = self.affine(x.dtype)
        return moments.scale_shift(x, mean, inverse, gamma, beta)

    # What every method gets.

    def affine(self, dtype) -> tuple[Tensor | None, Tensor | None]:
        """`gamma` and `beta` as flat vectors in `dtype`; None where not used."""

        def flat(v):
            if v is None:
                return None
            v = ops.cast(v, dtype)
            return v if len(v.shape) == 1 else ops.reshape(v, (-1,))

        return flat(self.gamma), flat(self.beta)

    def build(self, input_shape):
        shape = tuple(input_shape[a] for a in self._axes(input_shape))
        self.gamma = self.channel_weight("gamma", shape) if self.scale else None
        self.beta = self.channel_weight("beta", shape) if self.center else None
        # Not `axes`: a layer that is called on several ranks counts from the end.
        self.built = True

    def channel_weight(self, name: str, shape: Sequence[int], **kwargs):
        """A weight in float32 or better, with the initializer, regularizer and
        constraint that the arguments `<name>_initializer`, ... give."""
        for word in ("initializer", "regularizer", "constraint"):
            kwargs.setdefault(word, getattr(self, f"{name}_{word}", None))
        return self.add_weight(name=name, shape=shape, autocast=False, **kwargs)

    @property
    def statistics_dtype(self) -> str:
        """float32, or the compute dtype where that is wider."""
        return moments.statistics_dtype(self.compute_dtype)

    def call(self, inputs, training=None, mask=None):
        x = ops.cast(inputs, self.statistics_dtype)
        axes = self._axes(x.shape)
        if mask is not None:
            mask = self._flat_mask(mask, x, axes)
        order = _order(len(x.shape), axes)
        if order is not None:
            x = ops.transpose(x, order)
        shape = ops.shape(x)
        y = self.normalize(_flat(x, len(axes)), mask, bool(training))
        y = ops.reshape(y, shape)
        if order is not None:
            y = ops.transpose(y, [order.index(i) for i in range(len(order))])
        return ops.cast(y, self.compute_dtype)

    def _flat_mask(self, mask, x, axes):
        rank = len(x.shape)
        mask = moments.align_mask(mask, rank, axes)
        per_channel = any(mask.shape[a] != 1 for a in axes)
        target = list(ops.shape(x))
        for a in axes:
            target[a] = target[a] if per_channel else 1
        mask = ops.broadcast_to(mask, target)
        order = _order(rank, axes)
        if order is not None:
            mask = ops.transpose(mask, order)
        return _flat(mask, len(axes))

    def _axes(self, input_shape) -> tuple[int, ...]:
        """`axis` as sorted non-negative axes, checked against the shape."""
        rank = len(input_shape)
        given = [self.axis] if isinstance(self.axis, int) else list(self.axis)
        axes = sorted(a % rank if -rank <= a < rank else a for a in given)
        what = None
        if rank < 2:
            what = "needs a batch axis and one to normalize"
        elif any(not 0 <= a < rank for a in axes):
            what = "has an axis outside the input"
        elif not axes or len(set(axes)) < len(axes):
            what = "needs each axis once"
        elif 0 in axes:
            what = "cannot normalize along the batch axis"
        elif any(input_shape[a] is None for a in axes):
            what = "needs a static size along its axis"
        if what is not None:
            raise KerasNormError(
                f"{type(self).__name__} {self.name!r} {what}",
                got=f"axis={given if len(given) > 1 else given[0]} and input shape "
                f"{tuple(input_shape)}",
                expected="axes between 1 and the rank of the input, of known size",
            )
        return tuple(axes)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        config = super().get_config()
        cls: Any = type(self)
        for name in _arguments(cls):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                value = list(value)
            elif hasattr(value, "get_config"):
                value = keras.saving.serialize_keras_object(value)
            config[name] = value
        return config


class BatchStatistics(Normalization):
    """Base of the methods with statistics over the batch.

    Under a `tf.distribute` strategy each replica sees a part of the batch. With
    `synchronized=True` the statistics are those of all parts together, as if one device
    saw the whole batch; with False (default, as in Keras) each replica normalizes with
    its own. The moving statistics are the same on all replicas either way: in the
    latter case, the mean of what each found. On JAX a program sees the whole batch,
    whatever its sharding, and there is nothing to choose.

    Within the loop of a recurrent layer statistics are those of each replica.

    Args:
        *args: see `Normalization`.
        synchronized: see above.
        **kwargs: see `Normalization`.
    """

    def __init__(self, *args, synchronized: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.synchronized = bool(synchronized)

    def __call__(self, *args, **kwargs):
        with self.over_replicas():
            return super().__call__(*args, **kwargs)

    def over_replicas(self):
        """Context in which `numerics` reduces over replicas, where asked for; for
        backward passes, which run outside of the call."""
        return replicas.synchronized(self.synchronized)

    def channel_weight(self, name, shape, **kwargs):
        # What each replica finds by itself, or has sent back through the optimizer.
        # Synchronized, all of them find the same.
        state = not kwargs.get("trainable", True)
        state = state or kwargs.get("overwrite_with_gradient", False)
        if state and not self.synchronized:
            kwargs.setdefault("aggregation", "mean")
        return super().channel_weight(name, shape, **kwargs)


@functools.cache
def _arguments(cls: type) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if issubclass(base, Normalization) and "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            names |= {
                p.name: None
                for p in list(parameters)[1:]
                if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            }
    return tuple(names)


def _order(rank: int, axes: Sequence[int]) -> list[int] | None:
    """Order that brings `axes` to the end; None where they are there already."""
    order = [a for a in range(rank) if a not in axes] + list(axes)
    return None if order == list(range(rank)) else order


def _flat(x, trailing: int):
    """`(batch, ..., channels...)` as `(batch, positions, channels)`."""
    middle = x.shape[1 : len(x.shape) - trailing]
    channels = math.prod(x.shape[len(x.shape) - trailing :])
    positions = -1 if None in middle else math.prod(middle)
    batch = ops.shape(x)[0] if positions in (-1, 0) else -1
    return ops.reshape(x, (batch, positions, channels))
