"""A model's computation as straight-line code.

`Program` flattens a graph model into instructions in order of computation, with nested
models inlined; folding, fitting and analysis walk along it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
from keras import tree

from rewriters import private
from rewriters.errors import RewriteError


Shape = tuple[int | None, ...]


def is_graph(layer: Any) -> bool:
    """Whether the layer is a model whose computation is its recorded graph."""
    if isinstance(layer, keras.Sequential):
        own = type(layer).call is keras.Sequential.call
        return own and private.functional(layer, None) is not None
    return (
        isinstance(layer, private.Functional)
        and type(layer).call is private.Functional.call
        and (private.nodes_by_depth(layer, None) is not None)
    )


def fixed_batch(model: Any) -> int | None:
    """The number of samples that a model always takes at once; None where any will
    do."""
    sizes = {t.shape[0] for t in getattr(model, "inputs", None) or ()} - {None}
    return sizes.pop() if len(sizes) == 1 else None


def maker_of(model: Any, k: int) -> Any:
    """The operation that makes an output, in whatever models lie within; one whose
    computation is no recorded graph stands for what it does."""
    while is_graph(model) and k < len(model.outputs):
        made = private.keras_history(model.outputs[k])
        model, k = made.operation, made.tensor_index
    return model


def graph_of(model: Any) -> Any:
    """The Functional that holds the nodes: a Sequential keeps its own inside."""
    return private.functional(model) if isinstance(model, keras.Sequential) else model


def ordered_nodes(model: Any) -> list[Any]:
    """Nodes of a graph model, inputs left out, each after all it depends on."""
    by_depth = private.nodes_by_depth(graph_of(model))
    return [
        node
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
        if node.operation is not None and not node.is_input
    ]


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor between two instructions: static shape (None where dynamic), dtype,
    and whether a mask is attached to it."""

    shape: Shape
    dtype: str
    masked: bool = False


@dataclass(frozen=True, eq=False)
class Instruction:
    """One call of one operation.

    Args:
        path: names from the root model to the operation, joined by `/`.
        operation: the layer or bare operation.
        args, kwargs: what it is called with; tensors are `Value`s.
        outputs: flat tuple of `Value`s.
        training: the training argument fixed by the call of an enclosing model
            (`base(x, training=False)`), None where it is free.
    """

    path: str
    operation: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Value, ...]
    training: bool | None = None

    @functools.cached_property
    def inputs(self) -> tuple[Value, ...]:
        """Flat tuple of the values it reads, masks given as keywords included."""
        leaves = tree.flatten((self.args, dict(self.kwargs)))
        return tuple(v for v in leaves if isinstance(v, Value))


class _Cast(keras.Operation):
    """What a nested model does to an input of another dtype."""

    def __init__(self, dtype: str):
        super().__init__()
        self.dtype = dtype

    def call(self, x: Any) -> Any:
        return keras.ops.cast(x, self.dtype)


class Program:
    """A graph model as straight-line code, nested models inlined.

    Args:
        model: a built Functional or Sequential, or a subclass that keeps their call.

    Attributes: `inputs`, `outputs` (flat tuples of `Value`), `instructions` (each after
    all it reads), `producer` (value -> instruction), `consumers` (value -> list).

    Raises:
        RewriteError: the model has no graph (subclassed, or not built yet).
    """

    def __init__(self, model: Any):
        if not is_graph(model):
            raise RewriteError(
                "this model has no graph to walk",
                got=f"{type(model).__name__} {getattr(model, 'name', '')!r}",
                expected="a built Functional or Sequential model",
            )
        self.model = model
        instructions: list[Instruction] = []
        graph = graph_of(model)
        self.inputs = tuple(_value(t) for t in graph.inputs)
        self.outputs = tuple(_inline(model, self.inputs, "", None, instructions))
        self.instructions = tuple(instructions)
        self.producer = {v: i for i in instructions for v in i.outputs}
        self.consumers: dict[Value, list[Instruction]] = {}
        for instruction in instructions:
            for v in dict.fromkeys(instruction.inputs):
                self.consumers.setdefault(v, []).append(instruction)

    def last_use(self) -> dict[Value, int]:
        """Index of the instruction after which a value is needed no more."""
        last = {v: k for k, i in enumerate(self.instructions) for v in i.inputs}
        return last | dict.fromkeys(self.outputs, len(self.instructions))

    def run(
        self,
        inputs: list[Any],
        training: bool | None = False,
        call: Callable[[Instruction, tuple, dict], Any] | None = None,
    ) -> list[Any]:
        """Executes the program on flat `inputs`; returns the flat outputs.

        Args:
            inputs: tensors in the order of `self.inputs`.
            training: passed to every layer that takes it, unless the instruction's
                own is fixed.
            call: `call(instruction, args, kwargs) -> outputs` in place of the plain
                call, e.g. to record or to substitute.
        """
        if self.outputs and len(inputs) != len(self.inputs):
            raise RewriteError(
                "wrong number of inputs",
                got=len(inputs),
                expected=f"{len(self.inputs)} tensors",
            )
        env: dict[Value, Any] = dict(zip(self.inputs, inputs, strict=True))
        last = self.last_use()
        for k, instruction in enumerate(self.instructions):
            args, kwargs = fill(instruction, env, training)
            if call is None:
                result = instruction.operation(*args, **kwargs)
            else:
                result = call(instruction, args, kwargs)
            env.update(zip(instruction.outputs, tree.flatten(result), strict=True))
            for v in (*instruction.inputs, *instruction.outputs):
                if last.get(v, -1) <= k:
                    env.pop(v, None)
        return [env[v] for v in self.outputs]


def fill(
    instruction: Instruction, env: Mapping[Value, Any], training: bool | None
) -> tuple[tuple, dict]:
    """The instruction's arguments with values from `env` and `training` decided."""

    def get(leaf: Any) -> Any:
        return env[leaf] if isinstance(leaf, Value) else leaf

    args, kwargs = tree.map_structure(
        get, (tuple(instruction.args), dict(instruction.kwargs))
    )
    if instruction.training is not None:
        training = instruction.training
    if private.call_has_training_arg(instruction.operation, False):
        if kwargs.get("training") is None and training is not None:
            kwargs["training"] = training
    return args, kwargs


def _value(t: Any) -> Value:
    masked = private.get_keras_mask(t) is not None
    return Value(tuple(t.shape), keras.backend.standardize_dtype(t.dtype), masked)


def _inline(
    model: Any,
    inputs: tuple[Value, ...],
    prefix: str,
    training: bool | None,
    out: list[Instruction],
) -> list[Value]:
    graph = graph_of(model)
    env: dict[int, Value] = {}
    for t, v in zip(graph.inputs, inputs, strict=True):
        inner = _value(t)
        if inner.dtype != v.dtype:
            cast = Value(v.shape, inner.dtype, v.masked)
            name = f"{prefix}{private.keras_history(t).operation.name}"
            out.append(Instruction(name, _Cast(inner.dtype), (v,), {}, (cast,)))
            v = cast
        env[id(t)] = v
    for node in ordered_nodes(model):
        if any(id(t) not in env for t in node.input_tensors):
            continue  # not reachable from these inputs
        op = node.operation

        def swap(leaf: Any) -> Any:
            return env.get(id(leaf), leaf) if _symbolic(leaf) else leaf

        args, kwargs = tree.map_structure(
            swap, (tuple(node.arguments.args), dict(node.arguments.kwargs))
        )
        path = prefix + op.name
        if _inlinable(op, args, kwargs):
            fixed = kwargs.get("training")
            fixed = training if fixed is None else bool(fixed)
            flat = tuple(tree.flatten(args[0] if args else kwargs["inputs"]))
            outputs = _inline(op, flat, path + "/", fixed, out)
        else:
            outputs = [_value(t) for t in node.outputs]
            out.append(Instruction(path, op, args, kwargs, tuple(outputs), training))
        env.update({id(t): v for t, v in zip(node.outputs, outputs, strict=True)})
    return [env[id(t)] for t in graph.outputs]


def _inlinable(op: Any, args: tuple, kwargs: dict) -> bool:
    """A nested graph called plainly: same ranks, no mask given by hand."""
    if not is_graph(op) or kwargs.get("mask") is not None:
        return False
    given = tree.flatten(args[0] if args else kwargs.get("inputs"))
    wanted = graph_of(op).inputs
    return len(given) == len(wanted) and all(
        isinstance(g, Value) and len(g.shape) == len(w.shape)
        for g, w in zip(given, wanted, strict=True)
    )


def _symbolic(x: object) -> bool:
    return isinstance(x, keras.KerasTensor)
