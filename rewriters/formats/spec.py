"""A model described in Keras 3's terms: what `modernize` returns and `build` builds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Ref(NamedTuple):
    """A tensor of a graph: output `tensor` of the `node`-th call of a layer."""

    layer: str
    node: int
    tensor: int


@dataclasses.dataclass
class Call:
    """One call of a layer; tensors among the arguments are `Ref`s."""

    args: list[Any]
    kwargs: dict[str, Any]


@dataclasses.dataclass
class Spec:
    """One layer, operation or model.

    Args:
        name: the layer's name.
        kind: class name in the file, without its package.
        cls: Keras 3 class, or for an operation a function of its tensors.
        config: arguments of `cls`; wrapped layers are `Spec`s.
        calls: the layer's calls, in a functional model's graph.
        layers: sublayers, if this is a model.
        inputs: `Ref`s of a functional model's inputs, in any structure.
        outputs: likewise of its outputs; None makes a model sequential.
        trainable: the layer's flag, None where the file does not say.
        rename: stored variable name to this layer's, None for one not needed.
        fold: what makes the renamed arrays into this layer's, see `Conversion`.
        input_shape: of a subclassed model, whose layers only a call builds: the
            shape of its inputs, batch included, in their structure.
        keras_2: of a functional model: whether it is of Keras 1 or 2, where a
            `training` that calls recorded wins, and masks are passed otherwise.
    """

    name: str
    kind: str
    cls: Callable[..., Any]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    calls: list[Call] = dataclasses.field(default_factory=list)
    layers: list[Spec] | None = None
    inputs: Any = None
    outputs: Any = None
    trainable: bool | None = None
    operation: bool = False
    rename: dict[str, str | None] = dataclasses.field(default_factory=dict)
    fold: Callable[..., Any] | None = None
    input_shape: Any = None
    keras_2: bool = False


def within(spec: Spec) -> Iterator[Spec]:
    """The spec, and all that it holds."""
    todo: list[Any] = [spec]
    while todo:
        value = todo.pop()
        if isinstance(value, Spec):
            yield value
            todo += [*(value.layers or ()), *value.config.values()]
        elif isinstance(value, list):
            todo += value


def has_own_classes(spec: Spec) -> bool:
    """Whether a class anywhere in the model is not Keras's."""
    known = ("keras.", "functools", "rewriters.")
    modules = (str(getattr(s.cls, "__module__", "")) for s in within(spec))
    return not all(module.startswith(known) for module in modules)


def has_states(spec: Spec) -> bool:
    """Whether a recurrent layer keeps its state between batches."""
    return any(s.config.get("stateful") for s in within(spec))


def without_states(spec: Spec) -> Spec:
    """A copy in which no layer keeps a state between batches."""

    def plain(value: Any) -> Any:
        if isinstance(value, Spec):
            return without_states(value)
        return [plain(v) for v in value] if isinstance(value, list) else value

    config = {k: plain(v) for k, v in spec.config.items()}
    if "stateful" in config:
        config["stateful"] = False
    layers = None if spec.layers is None else [without_states(s) for s in spec.layers]
    return dataclasses.replace(spec, config=config, layers=layers)


def map_refs(function: Callable[[Ref], Any], value: Any) -> Any:
    """Returns `value` with `function` applied to each `Ref` in it."""
    if isinstance(value, Ref):
        return function(value)
    if isinstance(value, dict):
        return {k: map_refs(function, v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([map_refs(function, v) for v in value])
    return value


def refs(value: Any) -> list[Ref]:
    """Every `Ref` in `value`, in order."""
    found: list[Ref] = []
    map_refs(found.append, value)
    return found


def safe_name(name: Any) -> str:
    """A layer's name without the slash, which Keras 3 keeps for paths."""
    return str(name).replace("/", "_")
