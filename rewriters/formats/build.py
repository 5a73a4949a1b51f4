"""Builds a `Spec` with no memory for its weights, which are given their values after.

A config may claim layers of any size. The variables are therefore made inside a
`keras.StatelessScope`, where Keras only notes their shapes; `initialize` allocates
them, each from its stored value, once every shape was found in the file.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from rewriters import private
from rewriters.errors import RewriteError, reason
from rewriters.formats import masks
from rewriters.formats.modernize import problems
from rewriters.formats.spec import Call, Ref, Spec, map_refs, refs
from rewriters.formats.tensorflow_ops import Unsupported
from rewriters.pinned import PinnedTraining, depends_on_training


# What a model may have beyond the arrays of its file: counters, seeds.
_SLACK = 1 << 20
# Numbers in the states of stateful recurrent layers.
_STATES = 1 << 26
# Elements of a constant that a graph may make of constants.
_CONSTANT = 1 << 24


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Variables made inside have shapes and no values; a failure leaves no trace."""
    before = private.pending_variables()
    try:
        with warnings.catch_warnings():
            # What Keras has to say of a stored model, it says when that is called.
            warnings.simplefilter("ignore", UserWarning)
            with keras.StatelessScope(initialize_variables=False):
                yield
    except BaseException:
        private.set_pending_variables(before)
        raise


def makes_variables_of_values(error: Exception) -> bool:
    """Whether a layer, such as a stateful recurrent one, could not be `deferred`. The
    text of an error may quote the file, so that this alone is no reason to build."""
    refused = str(error).startswith("You are attempting to create a variable while in")
    return isinstance(error, CannotCallError) or refused


def check_size(model: Any, stored: int, stateful: bool = False) -> None:
    """Raises if a model whose variables are `deferred` is larger than its file.

    Args:
        model: the model.
        stored: bytes of all arrays of the file.
        stateful: whether its recurrent layers keep states, which no file holds.
    """
    declared = sum(_bytes(v) for v in model.weights)
    if declared > stored + _SLACK:
        raise RewriteError(
            "Weights are missing",
            got=f"a model of {declared} bytes with {stored} bytes of weights",
            expected="one array of the right shape for every weight of the model",
            fix="The file is damaged: fetch or save it again",
        )
    states = sum(_states(x) for x in private.flatten_layers(model)) if stateful else 0
    if states > _STATES:
        raise RewriteError(
            "The states of the recurrent layers are out of all proportion",
            got=f"{states:.0f} numbers",
            expected=f"at most {_STATES}",
            fix="The file is damaged: fetch or save it again",
        )


def _states(layer: Any) -> float:
    """An upper bound of the numbers in a recurrent layer's states."""
    if not hasattr(layer, "cell"):
        return 0
    nodes = private.inbound_nodes(layer, ())
    shapes = [t.shape for node in nodes for t in node.input_tensors]
    given = (private.build_shapes_dict(layer, None) or {}).values()
    shapes += [s for s in given if isinstance(s, tuple)]
    units = sum(int(n) for n in keras.tree.flatten(layer.cell.state_size))
    largest = 1.0
    for shape in shapes:
        sizes = [float(n or 1) for n in (shape[0], *shape[2:-1])]
        largest = max(largest, math.prod(sizes))
    return units * largest


def _bytes(variable: Any) -> int:
    bits = private.dtype_size(keras.backend.standardize_dtype(variable.dtype))
    return (bits // 8 or 1) * math.prod(int(n) for n in variable.shape)


def discard() -> None:
    """Forgets every variable that still waits for a value."""
    private.set_pending_variables([])


def initialize(values: dict[int, np.ndarray]) -> None:
    """Gives each waiting variable its value by its id, or its initializer's."""
    for variable in private.pending_variables():
        if id(variable) in values:
            private.set_initializer(variable, _Constant(values[id(variable)]))
    with keras.StatelessScope():
        pass  # leaving a scope is what makes Keras initialize what waits


class _Constant:
    def __init__(self, value: np.ndarray):
        self.value = value

    def __call__(self, shape, dtype=None):
        return keras.ops.convert_to_tensor(self.value, dtype=dtype)


def build(spec: Spec) -> Any:
    """Returns the layer or model that `spec` describes."""
    if spec.layers is None:
        model = _layer(spec)
        if spec.input_shape is not None:
            _call(model, spec)
    elif spec.outputs is None:
        model = spec.cls([build(s) for s in spec.layers], name=spec.name)
    else:
        model = _functional(spec)
    return model


def set_trainable(model: Any, spec: Spec) -> None:
    """Sets the stored flags from the outside in: a model's flag reaches its layers."""
    if spec.trainable is not None and not spec.operation:
        model.trainable = spec.trainable
    for layer, inner in sublayers(model, spec):
        set_trainable(layer, inner)


def sublayers(model: Any, spec: Spec) -> list[tuple[Any, Spec]]:
    """Pairs of a model's or wrapper's direct sublayers and their specs."""
    if spec.layers is not None:
        known = {layer.name: layer for layer in model.layers}
        return [(known[s.name], s) for s in spec.layers if s.name in known]
    pairs = []
    for key, value in spec.config.items():
        inner = getattr(model, key, None)
        if isinstance(value, Spec) and isinstance(inner, keras.layers.Layer):
            pairs.append((inner, value))
    return pairs


def _layer(spec: Spec) -> Any:
    def made(value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(v, Spec) for v in value):
            return [build(v) for v in value]
        return build(value) if isinstance(value, Spec) else value

    config = {k: made(v) for k, v in spec.config.items()}
    wraps = any(config[k] is not v for k, v in spec.config.items())
    plain = wraps or not hasattr(spec.cls, "from_config")
    layer = spec.cls(**config) if plain else spec.cls.from_config(config)
    if "name" not in config:  # a class of one's own that does not take one
        layer.name = spec.name
    return layer


class CannotCallError(RewriteError):
    """A class of one's own fails on inputs without values."""


def _call(model: Any, spec: Spec) -> None:
    """Calls a subclassed model, which builds the layers that it holds: on no values
    where variables are `deferred`, else on zeros.

    The file does not say of what type the inputs are: floats, or else integers.
    """
    without = private.in_stateless_scope()

    def blank(shape: Any, dtype: Any) -> Any:
        if without:
            return keras.KerasTensor((None, *shape[1:]), dtype)
        sizes = [int(size or 8) for size in shape[1:]]
        if math.prod(sizes) > _CONSTANT:
            raise CannotCallError(
                f"The class {spec.kind!r} cannot be called",
                got=f"inputs of {shape}",
                expected=f"at most {_CONSTANT} numbers in one",
                fix="The file is damaged: fetch or save it again",
            )
        return keras.ops.zeros([1, *sizes], dtype)

    wrong: Exception | None = None
    for dtype in (None, "int32"):
        inputs = keras.tree.map_shape_structure(
            functools.partial(blank, dtype=dtype), spec.input_shape
        )
        try:
            if without:
                private.compute_output_spec(model, inputs)
            else:
                model(inputs)
        except Exception as e:  # the class is the user's
            if makes_variables_of_values(e):
                raise
            wrong = wrong or e
        else:
            return
    raise CannotCallError(
        f"The class {spec.kind!r} cannot be called",
        got=f"{type(wrong).__name__}: {reason(wrong)} on inputs of {spec.input_shape}",
        expected="a model that runs under Keras 3 on what the stored one was built for",
        fix="Mend the class given for it",
    ) from wrong


def _build_inside(layer: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Builds what a layer of one's own holds and only its call does: Keras asks for the
    call alone where the class does not compute the shape of its output itself."""
    inner = list(private.flatten_layers(layer))
    own = any(not type(x).__module__.startswith("keras.") for x in inner)
    if own and any(not x.built for x in inner):
        private.compute_output_spec(layer.call, *args, **kwargs)


def _functional(spec: Spec) -> Any:
    assert_layers = spec.layers or []
    layers: dict[str, Any] = {
        s.name: None if s.operation else build(s) for s in assert_layers
    }
    outputs: dict[tuple[str, int], list[Any]] = {}
    todo: list[tuple[Spec, int, Call]] = []
    unsupported: dict[str, Unsupported] = {}
    for s in assert_layers:
        if s.kind == "InputLayer":
            outputs[s.name, 0] = keras.tree.flatten(layers[s.name].output)
        todo += [(s, i, call) for i, call in enumerate(s.calls)]
    steps = [(s, i) for s, i, _ in todo]

    def tensor(ref: Ref) -> Any:
        return outputs[ref.layer, ref.node][ref.tensor]

    while todo:
        waiting = []
        for s, i, call in todo:
            needed = refs(call.args) + refs(list(call.kwargs.values()))
            if not needed and s.kind != "InputLayer":  # it would run here and now
                unsupported[s.name] = Unsupported("called on no tensor of the model")
                continue
            if all((r.layer, r.node) in outputs for r in needed):
                args = map_refs(tensor, call.args)
                kwargs = map_refs(tensor, call.kwargs)
                try:
                    if s.operation:
                        result = _operate(s, i, args, kwargs)
                    elif not _symbolic(args, kwargs):
                        raise Unsupported("a layer called on constants alone")
                    else:
                        layer = layers[s.name]
                        if spec.keras_2:
                            kwargs = masks.given(layer, args, kwargs)
                        result = layer(*args, **kwargs)
                        if spec.keras_2:
                            masks.passed_on(layer, args, result)
                        _build_inside(layer, args, kwargs)
                except Unsupported as e:
                    unsupported[s.name] = e
                else:
                    outputs[s.name, i] = keras.tree.flatten(result)
            else:
                waiting.append((s, i, call))
        error = problems(operations=[f"{k} ({e})" for k, e in unsupported.items()])
        if error and len(waiting) in (0, len(todo)):
            raise error from next(iter(unsupported.values()))
        if len(waiting) == len(todo):
            raise RewriteError(
                f"The graph of the model {spec.name!r} is broken",
                got=f"calls of {sorted({s.name for s, *_ in waiting})[:5]} "
                "on tensors that no layer gives",
                expected="every tensor to come from an input or an earlier layer",
                fix="The file is damaged: fetch or save it again",
            )
        todo = waiting
    ends = map_refs(tensor, spec.outputs)
    own = [x for x in layers.values() if x is not None]
    made = [outputs[s.name, i] for s, i in steps if s.operation]
    own += [private.keras_history(t).operation for t in keras.tree.flatten(made)]
    masks.name_apart(ends, own, layers)
    cls = (
        PinnedTraining
        if spec.keras_2 and spec.cls is keras.Model and _pins(spec, layers)
        else spec.cls
    )
    return cls(
        inputs=map_refs(tensor, spec.inputs),
        outputs=ends,
        name=spec.name,
    )


def _pins(spec: Spec, layers: dict[str, Any]) -> bool:
    """Whether a recorded `training` makes a difference anywhere in a model."""
    return any(
        call.kwargs.get("training") is not None
        for s in spec.layers or ()
        if not s.operation and depends_on_training(layers[s.name])
        for call in s.calls
    )


def _symbolic(args: Any, kwargs: Any) -> bool:
    leaves = keras.tree.flatten((args, kwargs))
    return any(isinstance(x, keras.KerasTensor) for x in leaves)


def _check_constant(spec: Spec, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Raises if an operation on constants, which runs at once, makes a huge one. Its
    shape is found without running it."""
    try:
        made = private.compute_output_spec(spec.cls, *args, **kwargs)
    except Unsupported:
        raise
    except Exception as e:
        raise Unsupported(f"it cannot be sized: {reason(e)}") from e
    shapes = [x.shape for x in keras.tree.flatten(made) if hasattr(x, "shape")]
    if any(math.prod(float(n or 1) for n in shape) > _CONSTANT for shape in shapes):
        raise Unsupported(f"a constant of more than {_CONSTANT} numbers")


def _operate(spec: Spec, index: int, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Calls an operation; the nodes it makes are named after the stored layer."""
    if not _symbolic(args, kwargs):
        _check_constant(spec, args, kwargs)
    result = spec.cls(*args, **kwargs)
    name = spec.name if index == 0 else f"{spec.name}_call_{index}"
    name = name.replace("/", ".")
    known = {id(t) for t in keras.tree.flatten([args, kwargs])}
    todo, named = keras.tree.flatten(result), set()
    while todo:
        made = todo.pop(0)
        history = private.keras_history(made, None)
        if history is None or id(made) in known or history.operation in named:
            continue
        operation = history.operation
        # The last node, found first, is the layer that the file has.
        masks.rename(operation, f"{name}.{len(named)}" if named else name)
        named.add(operation)
        todo += private.inbound_nodes(operation)[history.node_index].input_tensors
    return result
