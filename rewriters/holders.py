"""Which layer holds which others, and where: graphs, attributes, lists and dicts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras

from rewriters.program import graph_of, is_graph


Layer = keras.layers.Layer


@dataclass(frozen=True)
class Slot:
    """The place in a custom layer that holds an inner one: `owner.attribute`, then
    indices or keys into the list or dict found there."""

    owner: Any
    attribute: str
    keys: tuple[Any, ...] = ()

    def get(self) -> Any:
        held = getattr(self.owner, self.attribute)
        for key in self.keys:
            held = held[key]
        return held


def children(layer: Any) -> Iterator[tuple[str, Any, Slot | None]]:
    """The layers a layer holds: `(step of the path, child, slot)`.

    The slot is None where the graph holds the child, not an attribute.
    """
    seen = set()
    if is_graph(layer) or isinstance(layer, keras.Sequential):
        graph = graph_of(layer) if is_graph(layer) else None
        ops = graph.operations if graph else layer.layers
        for op in ops:
            if isinstance(op, Layer) and not isinstance(op, keras.layers.InputLayer):
                seen.add(id(op))
                yield op.name, op, None
    for name, value in list(vars(layer).items()):
        if name in internals() or name == "_functional":
            continue
        for keys, child in layers_in(value):
            if id(child) not in seen:
                step = "/".join([name, *(str(k) for k in keys)])
                yield step, child, Slot(layer, name, keys)


def paired_children(old: Any, new: Any) -> Iterator[tuple[Any, Any]]:
    """Layers two objects of one class hold in the same places.

    By order where they hold equally many: layers of a graph that a constructor made
    have names of their own.
    """
    ours, theirs = list(children(old)), list(children(new))
    if len(ours) == len(theirs):
        yield from ((a[1], b[1]) for a, b in zip(ours, theirs, strict=True))
        return
    by_step = {step: child for step, child, _ in theirs}
    yield from ((c, by_step[step]) for step, c, _ in ours if step in by_step)


@functools.cache
def internals() -> frozenset[str]:
    """Attributes that Keras itself keeps on every layer and model."""
    x = keras.Input((1,))
    graph = keras.Model(x, keras.layers.Identity()(x))
    models = keras.Model(), keras.Sequential(), graph
    graph.compile("sgd", "mse")
    while_training = {  # set by fit, evaluate and predict
        "history",
        "stop_training",
        "stop_evaluating",
        "stop_predicting",
        "_eval_epoch_iterator",
        "_compiled_trainable_state",
        "_jax_state",
    }
    return frozenset(n for model in models for n in vars(model)) | while_training


def layers_in(value: Any, depth: int = 0) -> Iterator[tuple[tuple, Any]]:
    """`(keys, layer)` of the layers in an attribute's value: it, or what its lists,
    tuples and dicts hold."""
    if isinstance(value, Layer):
        yield (), value
    elif depth < 8 and isinstance(value, (list, tuple)):
        for k, v in enumerate(value):
            yield from (((k, *keys), c) for keys, c in layers_in(v, depth + 1))
    elif depth < 8 and isinstance(value, dict):
        for k, v in value.items():
            yield from (((k, *keys), c) for keys, c in layers_in(v, depth + 1))


def walk(root: Any) -> Iterator[tuple[str, Any, bool]]:
    """`(path, layer, inner)` of all layers below `root`, every path to each once."""

    def visit(layer: Any, prefix: str, inner: bool, above: tuple[int, ...]):
        for step, child, slot in children(layer):
            if id(child) in above:
                continue  # a layer that refers back to its owner
            held = inner or slot is not None
            yield prefix + step, child, held
            yield from visit(child, f"{prefix}{step}/", held, (*above, id(child)))

    yield from visit(root, "", False, (id(root),))
