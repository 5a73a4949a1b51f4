"""`Reparametrized`, the base of every weight method: any layer, its kernels exchanged.

A method writes `kernel(v, **parameters) -> w` on a `(fan_in, filters)` view in float32
or better, and the parameters it starts from. The base does the rest: which kernels of
which layer and where their filters lie, gradients, states, masks, losses, mixed
precision, saving, adopting trained layers, and folding back.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.kernels.kernel import Kernel, kernels_of
from kerasnorm.method.registry import Case, Refusal
from kerasnorm.numerics import moments
from rewriters import private
from rewriters.exchange import own_functions


Tensor = Any


class Reparametrized(keras.layers.Wrapper):
    """Base wrapper; subclass it to write a weight method.

    The wrapped layer's kernels become the parameters `v`. For one call each is
    exchanged for `w`, made of `v` and of the method's own parameters, and gradients
    reach both. Dense layers, convolutions (transposed, depthwise, separable),
    embeddings, attention, recurrent layers and whatever holds them can be wrapped.
    Regularizers and constraints of the kernel see `v`.

    `get_config` follows from the signatures of `__init__` along the class hierarchy:
    keep every argument as an attribute of the same name.

    Args:
        layer: the layer to wrap, built or not; it keeps its name and config.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        Those of the wrapped layer.

    Raises:
        KerasNormError: the layer has no kernel.
    """

    # Arguments with which the method can hold a trained kernel's scale.
    preserving: ClassVar[Mapping[str, Any]] = {}
    # Whether the layer is the wrapped one with another kernel, and nothing more.
    foldable = True

    def __init__(self, layer, **kwargs):
        problem = self.unfit(layer)
        if problem is not None:
            raise KerasNormError(
                f"{type(self).__name__} cannot wrap this layer",
                got=f"{type(layer).__name__} {layer.name!r}: {problem}",
            )
        # Keras reads the names of arguments, and of their shapes, off signatures.
        self.__dict__["call"] = _like(layer.call)
        super().__init__(layer, autocast=False, **kwargs)
        del self.__dict__["call"]
        self.build.__dict__["__signature__"] = inspect.signature(layer.build)
        self.supports_masking = layer.supports_masking
        self._names: list[str] = []
        for inner in private.flatten_layers(layer):
            # They would replace the kernels that are computed from.
            inner.__dict__["quantize"] = inner.__dict__["enable_lora"] = self._refuse

    def _refuse(self, *args, **kwargs):
        raise NotImplementedError(
            f"{type(self).__name__} {self.name!r} computes the kernels of "
            f"{self.layer.name!r}, which can be quantized or adapted once "
            "kerasnorm.export(model) has put them in place."
        )

    # What a method writes.

    @classmethod
    def unfit(cls, layer: Any) -> str | None:
        """Why the method is not defined for a layer, which may be unbuilt."""
        return None

    def kernel(self, v: Tensor, **parameters: Tensor) -> Tensor:
        """The kernel in use.

        Args:
            v: `(fan_in, filters)`, float32 or float64.
            **parameters: what `initial` and `state` name, in the dtype of `v`.

        Returns:
            A tensor of the shape of `v`.
        """
        raise NotImplementedError(f"{type(self).__name__}.kernel")

    def initial(self, v: Tensor) -> dict[str, Tensor]:
        """Initial values of the method's trainable parameters, by name."""
        return {}

    def state(self, v: Tensor) -> dict[str, Tensor]:
        """Initial values of what is kept between calls and not trained."""
        return {}

    def update(self, v: Tensor, **parameters: Tensor) -> dict[str, Tensor]:
        """New values of the state in training, computed before `kernel`, to which they
        are constants."""
        return {}

    def absorb(self, v: Tensor, w: Tensor) -> dict[str, Tensor]:
        """Values with which `kernel` gives `w`, or comes as near as it can.

        Args:
            v: the kernel as it was trained, `(fan_in, filters)`.
            w: the kernel wanted: `v`, or with a normalization folded into it.

        Returns:
            Values of `v` and of the parameters, by name.
        """
        return {"v": w, **self.initial(w), **self.state(w)}

    # What every method gets.

    @property
    def kernels(self) -> list[Kernel]:
        """The kernels within the wrapped layer, which must be built."""
        found = kernels_of(self.layer)
        if isinstance(found, Refusal) or not found:
            raise KerasNormError(
                "this layer has no kernel to normalize",
                got=f"{type(self.layer).__name__} {self.layer.name!r}"
                + (f": {found.detail}" if isinstance(found, Refusal) else ""),
                expected="a dense layer, a convolution, an embedding, attention, a "
                "recurrent layer, or a layer that holds some of them",
            )
        return found

    @property
    def v(self) -> Any:
        """The first kernel's parameter: the wrapped layer's own variable."""
        return self.kernels[0].variable

    def build(self, *args, **kwargs):
        if not self.layer.built:
            self.layer.build(*args, **kwargs)
            self.layer.built = True
        for kernel in self.kernels:
            view = keras.KerasTensor(kernel.view_shape(), kernel.variable.dtype)
            for make in (self.initial, self.state):
                for name, spec in _specs(make, view).items():
                    variable = self.add_weight(
                        name=kernel.label + name,
                        shape=spec,
                        dtype=moments.statistics_dtype(kernel.variable.dtype),
                        initializer=functools.partial(_first, make, kernel, name),
                        trainable=make == self.initial,
                        autocast=False,
                    )
                    setattr(self, kernel.label + name, variable)
                    if name not in self._names:
                        self._names.append(name)
        self.built = True

    def parameters(self, kernel: Kernel) -> dict[str, Any]:
        """The method's own variables for a kernel, by their names in `kernel()`."""
        return {n: getattr(self, kernel.label + n) for n in self._names}

    def weight(self, kernel: Kernel | None = None, training: bool = False) -> Tensor:
        """The kernel in use, in float32 or better; of the first one by default."""
        kernel = self.kernels[0] if kernel is None else kernel
        v, values = self.values(kernel, training)
        return kernel.from_columns(self.kernel(v, **values))

    def values(self, kernel: Kernel, training: bool) -> tuple[Tensor, dict]:
        """What `kernel()` takes, with the state brought up to date in training."""
        with _as_stored():
            v = _columns(kernel)
            held = self.parameters(kernel)
            values = {n: ops.cast(p, v.dtype) for n, p in held.items()}
            if training and self.trainable:
                for name, value in self.update(v, **values).items():
                    values[name] = ops.stop_gradient(value)
                    held[name].assign(values[name])
        return v, values

    def call(self, *args, training=None, **kwargs):
        weights = {id(k.variable): self.weight(k, bool(training)) for k in self.kernels}
        return self.run(weights, args, kwargs, training)

    def run(
        self,
        weights: Mapping[int, Tensor],
        args: tuple,
        kwargs: Mapping[str, Any],
        training: bool | None,
    ) -> Any:
        """Calls the wrapped layer with variables exchanged for tensors.

        Args:
            weights: `id(variable) -> tensor`.
            args, kwargs, training: of the call.
        """
        layer = self.layer
        if _takes_training(layer):
            kwargs = {**kwargs, "training": training}
        # A scope inside another one (JAX in training) hides the outer one's values,
        # so that the other variables' current values come along.
        with _as_stored():
            values = [
                (v, ops.cast(weights.get(id(v), v.value), v.dtype))
                for v in layer.variables
            ]
            scope = keras.StatelessScope(
                values, collect_losses=True, initialize_variables=False
            )
        before = dict(scope.state_mapping)
        with scope:
            outputs = layer(*args, **kwargs)
        for loss in scope.losses:
            self.add_loss(loss)
        for v in layer.variables:  # seeds of dropout, states of recurrent layers
            after = scope.get_current_value(v)
            if not v.trainable and after is not before[id(v)]:
                v.assign(after)
        return outputs

    def compute_output_spec(self, *args, **kwargs):
        if not _takes_training(self.layer):
            kwargs.pop("training", None)
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, *args, **kwargs):
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_mask(self, inputs, previous_mask=None):
        return self.layer.compute_mask(inputs, previous_mask)

    def get_build_config(self):
        return self.layer.get_build_config()

    def get_config(self):
        config = super().get_config()
        cls: Any = type(self)
        return {**config, **{n: getattr(self, n) for n in _arguments(cls)}}

    # Taking over trained layers, and giving them back.

    def take(self, wanted: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Sets kernels and parameters so that each kernel in use is the wanted one.

        Args:
            wanted: `label of the kernel -> (v, w)`, see `absorb`, as kernels.
        """
        for kernel in self.kernels:
            v, w = (kernel.columns(_tensor(t)) for t in wanted[kernel.label])
            values = self.absorb(v, w)
            # In memory of its own: training on JAX donates the buffers of variables.
            kernel.variable.assign(ops.copy(kernel.from_columns(values.pop("v"))))
            for name, variable in self.parameters(kernel).items():
                variable.assign(ops.copy(values[name]))

    def error(self, v: Tensor, w: Tensor) -> float:
        """By how much the kernel in use would differ from `w`, relative to it."""
        values = {n: _tensor(t) for n, t in self.absorb(v, w).items()}
        got = ops.convert_to_numpy(self.kernel(values.pop("v"), **values))
        w = ops.convert_to_numpy(w)
        return float(np.abs(got - w).max() / max(np.abs(w).max(), 1e-30))

    def unwrap(self) -> keras.layers.Layer:
        """The plain layer that computes the same at inference, of the same name."""
        plain = self.plain()
        plain.build_from_config(self.get_build_config())
        self.fold_into(plain)
        return plain

    def plain(self) -> keras.layers.Layer:
        """A copy of the wrapped layer, not built yet, under the wrapper's name."""
        return copy(self.layer, name=self.name, trainable=self.trainable)

    def fold_into(self, plain: keras.layers.Layer) -> None:
        """Gives a built copy of the wrapped layer the weights in use."""
        plain.set_weights(self.layer.get_weights())
        theirs = kernels_of(plain)
        for kernel, other in zip(self.kernels, theirs, strict=True):  # type: ignore
            other.variable.assign(ops.copy(self.weight(kernel)))


def centred(v: Tensor) -> Tensor:
    """`(fan_in, filters)` with mean zero in each filter.

    The second pass takes away what rounding left of the mean, which inputs with a
    large mean of their own would show.
    """
    v = v - ops.mean(v, 0, keepdims=True)
    return v - ops.mean(v, 0, keepdims=True)


def copy(layer: Any, **changes: Any) -> Any:
    """A fresh layer of the same class and arguments, some of them changed."""
    config = layer.get_config()
    config |= own_functions(layer, config) | changes
    return type(layer).from_config(config)


@contextlib.contextmanager
def _as_stored() -> Iterator[None]:
    """Context in which variables are read in their own dtype: a mixed precision
    layer's call would round them first."""
    scope = private.autocast_scope()
    private.set_autocast_scope(None)
    try:
        yield
    finally:
        private.set_autocast_scope(scope)


def _like(call: Callable) -> Callable:
    """A function with the signature of `call`, and `training` in it."""
    signature = inspect.signature(call)
    parameters = list(signature.parameters.values())
    if "training" not in signature.parameters:
        more = bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
        training = inspect.Parameter(
            "training", inspect.Parameter.KEYWORD_ONLY, default=None
        )
        parameters.insert(len(parameters) - more, training)

    def like(*args, **kwargs):
        raise NotImplementedError

    like.__dict__["__signature__"] = signature.replace(parameters=parameters)
    return like


def _takes_training(layer: Any) -> bool:
    return "training" in inspect.signature(layer.call).parameters


def _specs(make: Callable, view: keras.KerasTensor) -> dict[str, tuple[int, ...]]:
    if not make.__func__.__qualname__.startswith("Reparametrized."):
        made = private.compute_output_spec(make, view)
        return {name: tuple(spec.shape) for name, spec in made.items()}
    return {}


def _columns(kernel: Kernel) -> Tensor:
    return kernel.columns(_tensor(kernel.variable))


def _tensor(value: Any) -> Tensor:
    value = ops.convert_to_tensor(value)
    dtype = keras.backend.standardize_dtype(value.dtype)
    return ops.cast(value, moments.statistics_dtype(dtype))


def _first(make, kernel, name, shape, dtype=None):
    with _as_stored():
        return ops.cast(make(_columns(kernel))[name], dtype or "float32")


@functools.cache
def _arguments(cls: Any) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for base in cls.__mro__[: cls.__mro__.index(Reparametrized)]:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            names |= {
                p.name: None
                for p in list(parameters)[2:]  # behind self and layer
                if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            }
    return tuple(names)


# ---------------------------------------------------- what declarations share

# The layers on which the generated tests run, and an oracle of what they compute.
CASES = (
    Case({"layer": keras.layers.Dense(3)}, (4, 5)),
    Case({"layer": keras.layers.Dense(4)}, (2, 7, 3)),
    Case({"layer": keras.layers.Conv2D(3, (2, 3))}, (2, 5, 6, 2)),
)

CLAIMS = {
    "batch_independent",
    "sign_equivariant",
    "train_equals_inference",
    "weight_scale_invariant",
    "bounded_jacobian",
}
# The output of such a layer is no input of it.
UNDECIDED = {"idempotent"}


def oracle_of(w_of: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """An oracle from the formula of the kernel alone.

    Args:
        w_of: `w_of(v, weights, config, training) -> w` on `(fan_in, filters)`, NumPy.
    """

    def oracle(x, weights, config, training, mask):
        v = weights["kernel"]
        w = w_of(v.reshape(-1, v.shape[-1]), weights, config, training)
        return linear(x, np.reshape(w, v.shape)) + weights["bias"]

    return oracle


def linear(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """A dense layer, or a convolution of images without padding, in NumPy."""
    if w.ndim == 2:
        return x @ w
    (h, k), (rows, columns) = w.shape[:2], x.shape[1:3]
    y = np.zeros((len(x), rows - h + 1, columns - k + 1, w.shape[-1]))
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            y[:, i, j] = np.tensordot(x[:, i : i + h, j : j + k], w, 3)
    return y
