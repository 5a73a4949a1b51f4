"""What inner layers are called with, learnt by watching their owners run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import tree

from rewriters import private
from rewriters.holders import children
from rewriters.program import Instruction, Program, Shape, Value


@dataclass(frozen=True)
class Call:
    """One recorded call of a layer.

    Args:
        shape: shape of the first input, None where dynamic.
        dtype: dtype of the first input.
        masked: a mask reaches this call.
        kwargs: recorded keywords that are neither None nor tensors; the training
            argument fixed by an enclosing model's call counts as one.
        output: shape of the first output.
    """

    shape: Shape
    dtype: str
    masked: bool
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    output: Shape = ()


def call_of(i: Instruction) -> Call:
    """The instruction as a call of its layer."""
    kwargs = {
        k: v
        for k, v in i.kwargs.items()
        if v is not None and not any(isinstance(x, Value) for x in tree.flatten(v))
    }
    if i.training is not None:
        kwargs.setdefault("training", i.training)
    first = i.inputs[0] if i.inputs else Value((), "float32")
    masked = first.masked or i.kwargs.get("mask") is not None
    output = i.outputs[0].shape if i.outputs else ()
    return Call(first.shape, first.dtype, masked, kwargs, output)


def trace(
    program: Program | None, model: Any, inside: list[Any]
) -> dict[int, list[Call]]:
    """Every call of inner layers, learnt by running their owners on symbolic inputs.

    An owner that cannot be run so (no known input, tensors of a kind of its own)
    leaves its layers without calls; the sites stay known.
    """
    if not inside:
        return {}
    calls: dict[int, list[Call]] = {}

    def note(layer: Any, args: tuple, kwargs: dict) -> None:
        first = next((a for a in tree.flatten(args) if hasattr(a, "shape")), None)
        if first is None:
            return
        given = {
            k: v
            for k, v in kwargs.items()
            if k not in ("training", "mask") and v is not None and _plain(v)
        }
        if kwargs.get("training") is True:  # nobody asked for it but the owner's code
            given["training"] = True
        masked = private.get_keras_mask(first) is not None
        masked = masked or kwargs.get("mask") is not None
        dtype = keras.backend.standardize_dtype(first.dtype)
        call = Call(tuple(first.shape), dtype, masked, given)
        calls.setdefault(id(layer), []).append(call)

    with watching(inside, note):
        for owner, specs, kwargs in _opaque_calls(program, model):
            try:
                private.compute_output_spec(owner, *specs, **kwargs)
            except Exception:
                continue
    return calls


def _plain(v: Any) -> bool:
    return isinstance(v, (bool, int, float, str))


def _opaque_calls(
    program: Program | None, model: Any
) -> Iterator[tuple[Any, tuple, dict]]:
    """The outermost layers without a graph, with symbolic inputs to run them on."""
    if program is None:
        spec = spec_from_build(model)
        if spec is not None:
            yield model, (spec,), {}
        return
    for i in program.instructions:
        layer = i.operation
        if isinstance(layer, keras.layers.Layer) and next(children(layer), None):

            def spec(leaf: Any) -> Any:
                if not isinstance(leaf, Value):
                    return leaf
                t = keras.KerasTensor(leaf.shape, leaf.dtype)
                if leaf.masked:
                    private.set_keras_mask(
                        t, keras.KerasTensor(leaf.shape[:-1], "bool")
                    )
                return t

            args, kwargs = tree.map_structure(spec, (tuple(i.args), dict(i.kwargs)))
            yield i.operation, args, {k: v for k, v in kwargs.items() if v is not None}


def spec_from_build(model: Any) -> Any:
    """Symbolic inputs of the shapes a subclassed model was built with."""
    shapes = (model.get_build_config() or {}).get("input_shape")
    if shapes is None:
        return None

    def spec(shape: Any) -> Any:
        return keras.KerasTensor((None, *shape[1:]), model.compute_dtype)

    if isinstance(shapes, dict):
        return {k: spec(tuple(s)) for k, s in shapes.items()}
    if shapes and isinstance(shapes[0], (list, tuple)):
        return [spec(tuple(s)) for s in shapes]
    return spec(tuple(shapes))


class watching:
    """Context in which `note(layer, args, kwargs)` hears every call of the layers.

    The instance's own `call` is shadowed and restored; nothing else changes. With
    `result=True` the note is `note(layer, args, kwargs, outputs)`, after the call; what
    it returns, unless None, takes the place of the outputs.
    """

    def __init__(self, layers: list[Any], note: Callable[..., Any], result=False):
        self.layers, self.note, self.result = layers, note, result

    def __enter__(self) -> watching:
        for layer in self.layers:
            vars(layer)["call"] = self._shadow(layer, layer.call)
        return self

    def __exit__(self, *exc: object) -> None:
        for layer in self.layers:
            vars(layer).pop("call", None)

    def _shadow(self, layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def shadow(*args: Any, **kwargs: Any) -> Any:
            if not self.result:
                self.note(layer, args, kwargs)
                return call(*args, **kwargs)
            outputs = call(*args, **kwargs)
            other = self.note(layer, args, kwargs, outputs)
            return outputs if other is None else other

        return shadow
