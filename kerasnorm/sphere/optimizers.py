"""Optimizers on spheres: any Keras optimizer, made Riemannian where the scale of a
weight cannot matter."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.flow.analysis import Flow
from kerasnorm.numerics import backend
from kerasnorm.numerics.backend import float_of, tensor
from kerasnorm.sphere import geometry, joint
from kerasnorm.sphere.invariance import scale_invariant_weights
from kerasnorm.sphere.spheres import (
    Spheres,
    bind,
    directions,
    first_radius,
    inverse,
    unless_moved,
)
from rewriters import private


Tensor = Any

SPHERES = ("unit", "layer", "joint", "spectral")
STEPS = ("retract", "geodesic")


@keras.saving.register_keras_serializable("kerasnorm")
class OnSphere(keras.optimizers.Optimizer):
    r"""Makes an optimizer Riemannian on the weights whose scale cannot matter.

    A kernel in front of a normalization is scale invariant, so that only its direction
    is learned; its length grows with every step of plain gradient descent
    (`|w+|**2 = |w|**2 + rate**2 |grad|**2`) and with it the effective learning rate
    `rate / |w|**2` decays, out of control. Here each such filter (group, layer: what
    was proved, see `scale_invariant_weights`) stays on the sphere it starts on:

        g <- g - w <w, g> / r**2                     the Riemannian gradient
        m <- m - w <w, m> / r**2                     momentum, carried to where w is now
        u <- the wrapped optimizer's step from g, m, less its part along w
        w <- r (w + u) / |w + u|                     or along the geodesic

    All other variables are trained as the wrapped optimizer would. It keeps its
    learning rate and schedule, clipping, gradient accumulation and averaging (averages
    of weights are brought to the sphere too); its weight decay is not applied to the
    weights on spheres, where it would be undone. The optimizer given is taken over:
    do not use it by itself as well.

    Papers: Cho and Lee, 2017, https://arxiv.org/abs/1709.09603; Sun et al., 2020,
    https://arxiv.org/abs/2006.09104; Kodryan et al., 2022,
    https://arxiv.org/abs/2209.03695 (`effective`, `"joint"`)

    Args:
        inner_optimizer: any Keras optimizer whose momentum is a direction, or its name.
        model: the built model to train, or some of the `Flow`s of
            `scale_invariant_weights(model)`: then these weights are held on spheres,
            invariant or not. None restores a saved optimizer.
        spheres: `"unit"` (default), one sphere for each unit that was proved;
            `"layer"`, one for each weight (its Frobenius norm); `"joint"`, one for all
            of them together; `"spectral"`, the largest singular value of each weight is
            held instead of its length.
        step: `"retract"` (default) or `"geodesic"`.
        max_angle: largest angle of a step in radians, between 0 and pi / 2; None for no
            limit.
        effective: the learning rate is the effective one: the wrapped optimizer sees
            each sphere as if its radius were 1. Default False.
        name: name of the optimizer.

    Raises:
        KerasNormError: no weight is scale invariant; a weight that is all 0; an
            optimizer whose state cannot be carried along a sphere.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4),
    ...                           keras.layers.BatchNormalization()])
    >>> sgd = keras.optimizers.SGD(0.1, momentum=0.9)
    >>> model.compile(kerasnorm.sphere.OnSphere(sgd, model), "mse")
    """

    # The share of weight decay left to the weights on spheres, and whether they are
    # brought back to them.
    decay_ratio = 0.0
    returns = True

    def __init__(
        self,
        inner_optimizer: Any,
        model: Any = None,
        *,
        spheres: str = "unit",
        step: str = "retract",
        max_angle: float | None = None,
        effective: bool = False,
        name: str | None = None,
    ):
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = keras.optimizers.get(inner_optimizer)
        self.spheres, self.step = spheres, step
        self.max_angle, self.effective = max_angle, effective
        self._check()
        self._wanted: tuple[Spheres, ...] = ()
        self._known: dict[int, Spheres] = {}
        if model is not None:
            self._known = self._find(model)
            self._wanted = tuple(self._known.values())
        self._held: dict[int, Spheres] = {}
        self._radii: dict[int, Any] = {}
        self._slots: dict[int, list[Any]] = {}

    # What is held on spheres.

    def _check(self) -> None:
        inner = self.inner_optimizer
        composite = (
            keras.optimizers.LossScaleOptimizer,
            getattr(keras.optimizers, "MultiOptimizer", OnSphere),
            OnSphere,
        )
        if isinstance(inner, composite):
            raise KerasNormError(
                "OnSphere wraps an optimizer that makes steps of its own",
                got=type(inner).__name__,
                fix=f"Put it inside: {type(inner).__name__}(OnSphere(...)).",
            )
        if inner.built:
            raise KerasNormError(
                "the optimizer has trained already",
                got=f"a built {type(inner).__name__}",
                expected="a fresh one",
            )
        angle = self.max_angle
        number = isinstance(angle, numbers.Real)
        for what, got, fine, expected in (
            ("spheres", self.spheres, self.spheres in SPHERES, f"one of {SPHERES}"),
            ("step", self.step, self.step in STEPS, f"one of {STEPS}"),
            (
                "max_angle",
                angle,
                angle is None or (number and 0 < angle < math.pi / 2),
                "between 0 and pi / 2, or None",
            ),
        ):
            if not fine:
                raise KerasNormError(f"bad {what}", got=repr(got), expected=expected)

    def _find(self, model: Any) -> dict[int, Spheres]:
        if isinstance(model, keras.layers.Layer):
            flows: Sequence[Flow] = scale_invariant_weights(model).invariant
            order = {id(v): i for i, v in enumerate(model.trainable_variables)}
        else:
            flows, order = list(model), {}
        if not flows:
            raise KerasNormError(
                "no weight of this model is scale invariant",
                got=getattr(model, "name", repr(model)),
                expected="a normalization behind some of its kernels",
                fix="print(scale_invariant_weights(model)) tells why.",
            )
        return {
            id(v): Spheres.of(flow, order.get(id(v), n), self.spheres)
            for n, flow in enumerate(flows)
            for v in [flow.kernel.variable]
        }

    def for_model(self, model: Any, old: Any) -> Any:
        """This optimizer, unbuilt, for a model that was made of the one it trained.

        What is scale invariant there is held on spheres; what was left out of them
        here, or held though it is not invariant, is treated so again. Without any such
        weight, the wrapped optimizer alone.

        Args:
            model: the model to train; its weights have the names of the old one's.
            old: the model that this optimizer was made for.
        """
        config = self.get_config()
        held = {s.path: s for s in self._wanted}
        proved = {
            f.kernel.variable.path for f in scale_invariant_weights(old).invariant
        }
        known = {}
        for v in model.trainable_variables:
            spheres = held.get(v.path)
            if spheres and v.path not in proved and spheres.shape == tuple(v.shape):
                known[id(v)] = spheres
        flows = scale_invariant_weights(model).invariant
        left_out = proved - set(held)
        flows = [f for f in flows if f.kernel.variable.path not in left_out]
        known |= self._find(flows) if flows else {}
        if not known:
            warnings.warn(
                f"No weight of {model.name!r} is scale invariant: it trains by the "
                f"{type(self.inner_optimizer).__name__} that {type(self).__name__} "
                "wrapped.",
                stacklevel=6,
            )
            return keras.saving.deserialize_keras_object(config["inner_optimizer"])
        made = type(self).from_config({**config, "held": []})
        made._known, made._wanted = known, tuple(known.values())
        return made

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the state: that of the wrapped optimizer, and the radii."""
        if self.built:
            return
        with backend.eagerly():
            self._build(list(variables))

    def _build(self, variables: list[Any]) -> None:
        inner = self.inner_optimizer
        held = bind(self._wanted, variables, self._known)
        for i, spheres in held.items():
            radius = first_radius(variables[i], spheres)
            if not radius.any():
                raise KerasNormError(
                    "a weight that is all zero has no direction",
                    got=spheres.path,
                    fix="Initialize it otherwise, or leave it out: "
                    "OnSphere(optimizer, [f for f in flows if ...]).",
                )
            self._radii[i] = self.add_variable(
                radius.shape,
                lambda shape, dtype=None, value=radius: ops.cast(value, dtype),
                float_of(variables[i].dtype),
                name=f"radius_{i}",
            )
        inner.build(variables)
        self._slots = {i: directions(inner, i, len(variables)) for i in held}
        for i in held:
            if any(np.any(keras.ops.convert_to_numpy(m)) for m in self._slots[i]):
                raise KerasNormError(
                    "the optimizer's momentum is no direction",
                    got=type(inner).__name__,
                    expected="SGD, Adam, AdamW, Lion, Muon, RMSprop, ...",
                )
        self._held = held
        self._wanted = tuple(
            Spheres(**{**vars(s), "index": i}) for i, s in held.items()
        )
        super().build(variables)
        self._take_over()

    def _take_over(self) -> None:
        """Puts this optimizer's steps in the place of the wrapped one's own: inside its
        clipping and accumulation, before its averaging."""
        inner = self.inner_optimizer
        own = {
            "update_step": self._update_step,
            private.APPLY_WEIGHT_DECAY: self._apply_decay,
            private.UPDATE_AVERAGES: self._average,
        }
        if self.spheres == "joint":
            own[private.BACKEND_UPDATE_STEP] = self._update_jointly
        self._plain = {name: getattr(inner, name) for name in own}
        for name, method in own.items():
            setattr(inner, name, method)

    # The step.

    def _update_step(self, gradient: Tensor, variable: Any, rate: Tensor) -> None:
        plain = self._plain["update_step"]
        i = private.get_variable_index(self.inner_optimizer, variable)
        spheres = self._held.get(i)
        if spheres is None or self.spheres == "joint":
            return plain(gradient, variable, rate)
        w = spheres.split(tensor(variable))
        radius = self._radius(i, w, variable.dtype)
        length = geometry.norm(w) if spheres.spectral else radius
        bottom = inverse(ops.square(length))

        def along(u: Tensor) -> Tensor:
            return u - w * (geometry.inner(w, u, spheres.axes) * bottom)

        g = along(spheres.split(ops.cast(backend.value(gradient), w.dtype)))
        scale = length if self.effective else None
        if scale is not None:
            g = g * scale
        for m in self._slots[i]:
            self._assign(m, spheres.join(along(spheres.split(tensor(m)))))
        plain(spheres.join(g), variable, rate)
        u = along(spheres.split(tensor(variable)) - w)
        if scale is not None:
            u = u * scale
        self._assign(variable, spheres.join(self._moved(w, u, length, radius, spheres)))

    def _radius(self, i: int, w: Tensor, dtype: Any) -> Tensor:
        actual = self._held[i].radius(w)
        if not self.returns:
            return actual
        radius = ops.cast(ops.convert_to_tensor(self._radii[i]), w.dtype)
        return unless_moved(radius, actual, dtype)

    def _moved(
        self, w: Tensor, u: Tensor, length: Tensor, radius: Tensor, spheres: Spheres
    ) -> Tensor:
        """Where a step along the tangent `u` leads."""
        if self.max_angle is not None:
            far = geometry.norm(u, spheres.axes)
            straight = self.step == "retract" or not self.returns
            most = math.tan(self.max_angle) if straight else self.max_angle
            u = u * ops.minimum(1.0, most * length * inverse(far))
        if not self.returns:
            return w + u
        if self.step == "geodesic":
            w = geometry.exp(w, u, spheres.axes, length)
        else:
            w = w + u
        # Rounding would add up along geodesics as well.
        return w * (radius * inverse(spheres.radius(w)))

    def _update_jointly(self, grads: Any, variables: Any, rate: Tensor) -> None:
        joint.update(
            self, self._plain[private.BACKEND_UPDATE_STEP], grads, variables, rate
        )

    def _apply_decay(self, variables: Sequence[Any]) -> None:
        plain, inner = self._plain[private.APPLY_WEIGHT_DECAY], self.inner_optimizer
        parts: tuple[list[Any], list[Any]] = ([], [])
        for v in variables:
            parts[private.get_variable_index(inner, v) in self._held].append(v)
        plain(parts[0])
        before = inner.weight_decay
        if before is not None and self.decay_ratio and parts[1]:
            inner.weight_decay = before * self.decay_ratio
            plain(parts[1])
            inner.weight_decay = before

    def _average(self, variables: Sequence[Any]) -> None:
        """Averages of points on a sphere lie inside it; they are brought back."""
        inner = self.inner_optimizer
        self._plain[private.UPDATE_AVERAGES](variables)
        if not (inner.use_ema and self.returns) or self.spheres == "joint":
            return
        for i, spheres in self._held.items():
            average = private.moving_averages(inner)[i]
            w = spheres.split(tensor(average))
            variable = private.trainable_variables(inner)[i]
            held = spheres.split(tensor(variable))
            radius = self._radius(i, held, variable.dtype)
            back = w * (radius * inverse(spheres.radius(w)))
            average.assign(spheres.join(back))

    def _assign(self, variable: Any, value: Tensor) -> None:
        self.inner_optimizer.assign(variable, ops.cast(value, variable.dtype))

    # Everything else is the wrapped optimizer's business.

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Takes a step; see `keras.optimizers.Optimizer.apply`."""
        if not self.built and trainable_variables is not None:
            with keras.name_scope(self.name):
                self.build(list(trainable_variables))
        given = (
            private.trainable_variables(self) if trainable_variables is None else None
        )
        self.inner_optimizer.apply(grads, trainable_variables or given)

    @property
    def variables(self) -> list[Any]:
        """All state: the radii, and that of the wrapped optimizer."""
        return self._variables + self.inner_optimizer.variables

    @property
    def iterations(self) -> Any:
        """Steps taken."""
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self) -> Any:
        """The wrapped optimizer's."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.inner_optimizer.learning_rate = value

    @property
    def loss_scale_factor(self) -> Any:
        """The wrapped optimizer's."""
        inner = self.__dict__.get("inner_optimizer")
        return None if inner is None else inner.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, value: Any) -> None:
        if "inner_optimizer" in self.__dict__:
            self.inner_optimizer.loss_scale_factor = value

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss, scaled as the wrapped optimizer wants it."""
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Puts averages in the place of the weights, where there are some."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets `variables`."""
        for variable, value in zip(self.variables, weights, strict=True):
            variable.assign(value)

    def get_config(self) -> dict[str, Any]:
        """The wrapped optimizer, the arguments, and which variables lie on spheres."""
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(
                self.inner_optimizer
            ),
            "spheres": self.spheres,
            "step": self.step,
            "max_angle": self.max_angle,
            "effective": self.effective,
            "held": [s.get_config() for s in self._wanted],
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> OnSphere:
        """The inverse of `get_config`."""
        config = dict(config)
        held = [Spheres.from_config(s) for s in config.pop("held")]
        inner = keras.saving.deserialize_keras_object(
            config.pop("inner_optimizer"), custom_objects=custom_objects
        )
        made = cls.__new__(cls)
        OnSphere.__init__(made, inner, **config)
        made._wanted = tuple(held)
        return made
