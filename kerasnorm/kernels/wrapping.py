"""How weight methods take over trained layers: adoption rules from the wrapper alone.

From a batch normalization: what it is at inference goes into the linear layer before
or behind it, and the method has to make the kernel that comes out. From a linear layer:
the method has to make the kernel that is there. Whether it can is not a rule kept by
hand: the kernel it makes is computed and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.kernels import folding
from kerasnorm.kernels.kernel import Kernel, kernel_of, kernels_of
from kerasnorm.kernels.reparametrized import Reparametrized, copy
from kerasnorm.method import adoption
from kerasnorm.method.registry import Adoption, Edit, Fidelity, Options, Reason, Refusal
from rewriters.exchange import deserialize


# What is left of a kernel that float32 can hold, with room for long sums.
TOLERANCE = 1e-5

# Layers whose kernels lie in layers of their own, wrapped as a whole.
HOLDERS = (
    keras.layers.RNN,
    keras.layers.Bidirectional,
    keras.layers.MultiHeadAttention,
    keras.layers.GroupQueryAttention,
)


def rules(cls: type[Reparametrized]) -> dict[str, Any]:
    """`adopt`, `carry` and `wrap` of a weight method, as arguments of `declare`."""

    def adopt(source, site, options):
        found = folding.find(source, site)
        if isinstance(found, Refusal):
            return found
        layer, kernel = found.site.layer, found.kernel
        serialized = keras.saving.serialize_keras_object(layer)
        serialized = kernel.with_bias(serialized, inputs=not found.after)
        plain = deserialize(_unbuilt(serialized), layer)
        wrapped = _make(cls, layer, plain, options)
        if isinstance(wrapped, Refusal):
            return wrapped
        weights = found.weights(source)
        error = _error(wrapped, _pairs(layer, weights).values())
        if isinstance(error, Refusal):
            return error
        fidelity, note = Fidelity.AT_INFERENCE, f"around {layer.name}"
        if error > TOLERANCE:
            lost = f"{layer.name}'s kernel comes out {error:.0%} off"
            if not options.force:
                return Refusal(Reason.NOT_EXACT, lost, "wn, or force=True and training")
            fidelity, note = Fidelity.FRESH, f"{note}: {lost}"
        serialized = keras.saving.serialize_keras_object(wrapped)
        return Adoption(folding.edits(found, site, serialized), fidelity, note)

    return {"adopt": adopt, "carry": carry, "wrap": wrapper(cls)}


def wrapper(cls: type[Reparametrized]) -> Callable:
    """The rule that wraps a linear layer as it is: `wrap(site, options)`."""

    def wrap(site, options):
        layer = site.layer
        if isinstance(layer, Reparametrized):
            return Refusal(Reason.ALREADY, f"{layer.name} is a {type(layer).__name__}")
        if isinstance(layer, keras.layers.SpectralNormalization):
            return Refusal(Reason.NOT_EXACT, f"{layer.name} overwrites its kernel")
        found = kernel_of(layer)
        if isinstance(found, Refusal):
            return found
        if found is None and not isinstance(layer, HOLDERS):
            return None
        kernels = kernels_of(layer)
        if isinstance(kernels, Refusal):
            return kernels
        if not kernels:
            return None
        wrapped = _make(cls, layer, copy(layer), options)
        if isinstance(wrapped, Refusal):
            return wrapped
        error = _error(wrapped, [(k, (k.variable, k.variable)) for k in kernels])
        if isinstance(error, Refusal):
            return error
        fidelity, note = Fidelity.EXACT, ""
        if error > TOLERANCE:
            fidelity, note = Fidelity.FRESH, f"the kernel comes out {error:.0%} off"
        elif cls.state is not Reparametrized.state:
            fidelity = Fidelity.AT_INFERENCE  # it moves on in training
        held = folding.penalties(layer.get_config(), but=("activity", "bias"))
        if held:
            told = f"the {' and '.join(held)} now sees what the kernel is computed from"
            note = f"{note}; {told}" if note else told
        edit = Edit(site.path, keras.saving.serialize_keras_object(wrapped))
        return Adoption((edit,), fidelity, note)

    return wrap


def carry(source: Any, layers: Mapping[str, tuple[Any, Any]]) -> None:
    """Sets the weights of a wrapper from the layer, and normalization, it replaces."""
    if source is None:
        for old, new in layers.values():
            new.layer.set_weights(old.get_weights())
            kernels = kernels_of(old)
            if isinstance(kernels, list):  # `wrap` has seen to that
                new.take({k.label: (k.variable, k.variable) for k in kernels})
        return
    kernel, new, weights = folding.folded(source, layers)
    pairs = _pairs(kernel.layer, weights)
    new.take({label: pair for label, (_, pair) in pairs.items()})
    for name, value in weights.items():
        if name not in {k.name for k, _ in pairs.values()}:
            adoption.assign(getattr(new.layer, name), value)


def _pairs(layer: Any, weights: Mapping[str, Any]) -> dict[str, tuple[Kernel, tuple]]:
    """`label -> (kernel, (value before the fold, value after it))`."""
    before = kernel_of(layer).weights()  # type: ignore[union-attr]
    return {
        k.label: (k, (before[k.name], weights[k.name]))
        for k in kernels_of(layer)  # type: ignore[union-attr]
    }


def _make(cls, layer, plain, options: Options) -> Reparametrized | Refusal:
    if options.layers == "keras":
        return Refusal(Reason.NO_RULE, "Keras has no layer for it", 'layers="auto"')
    problem = cls.unfit(plain)
    if problem is not None:
        return Refusal(Reason.UNDEFINED, f"{layer.name}: {problem}")
    arguments = {**cls.preserving, **options.arguments}
    return adoption.in_place_of(layer, cls, plain, **arguments)


def _error(wrapped: Reparametrized, pairs: Iterable) -> float | Refusal:
    """By how much the kernels would differ from the wanted ones, at most."""
    found = 0.0
    for kernel, pair in pairs:
        v, w = (kernel.columns(ops.convert_to_tensor(t, "float32")) for t in pair)
        try:
            found = max(found, wrapped.error(v, w))
        except KerasNormError as error:
            return Refusal(Reason.UNDEFINED, str(error))
    return found


def _unbuilt(serialized: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in serialized.items() if k != "build_config"}
