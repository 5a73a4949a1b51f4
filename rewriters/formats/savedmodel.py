"""SavedModel directories written by Keras 2 and tf.keras."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any

from rewriters.errors import RewriteError
from rewriters.formats import budget
from rewriters.formats.files import walk
from rewriters.formats.saved import (
    Array,
    Saved,
    check_model_entry,
    has_layers,
    parse_json,
)
from rewriters.formats.tensor_bundle import (
    damaged,
    fields,
    read_bundle,
    string_elements,
    text,
)


_GRAPH = "saved_model.pb"
_METADATA = "keras_metadata.pb"
_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"


def is_folder(folder: pathlib.Path) -> bool:
    """Whether TensorFlow made the folder."""
    return os.path.lexists(folder / _GRAPH)


def members(folder: pathlib.Path) -> Iterator[str]:
    """The places in the folder of the files that are read."""
    yield _GRAPH
    if os.path.lexists(folder / _METADATA):
        yield _METADATA
    if os.path.lexists(folder / "variables"):
        yield from walk(folder, "variables")


def read(path: str) -> Saved:
    """Reads the directory at `path`: the Keras config and the variables, no graph.

    Raises:
        RewriteError: if Keras did not write it, if the model was saved without a
            config, or if it is damaged.
    """
    nodes = _object_graph(path)
    metadata = _metadata(path, nodes)
    root = metadata.get(0)
    if root is None and any(_by_keras(node) for node in nodes):
        raise RewriteError(
            "keras_metadata.pb, in which Keras describes the model, is missing",
            expected="the whole folder that model.save wrote",
            fix="Fetch that file too; where there is none, as tf.saved_model.save "
            "writes none, wrap the folder with keras.layers.TFSMLayer",
        )
    if root is None:
        raise RewriteError(
            "The SavedModel was not written by Keras",
            got=f"{len(nodes)} objects without Keras's description",
            expected="a SavedModel written by model.save of Keras 2",
            fix="Wrap it as it is with keras.layers.TFSMLayer",
        )
    if not isinstance(root.get("config"), dict):
        raise RewriteError(
            f"The model {root.get('name')!r} was saved without its config",
            got=f"the subclassed model {root.get('class_name')!r}",
            expected="a functional or sequential model, or one with a get_config",
            fix="Build it in code and load its weights from the SavedModel",
        )
    arrays = _arrays(path, nodes)
    own = not has_layers(root["config"])
    found = _layer_nodes(nodes, metadata) + (_attributes(nodes) if own else [])
    layers = {
        name: [arrays[i] for i in _variables(nodes, node) if i in arrays]
        for name, node in found
    }
    if own:
        children = nodes[0]["children"].values()
        layers[""] = [arrays[i] for i in children if i in arrays]
    return Saved(
        config=check_model_entry(root),
        version=_version(root),
        layers=layers,
        training=root.get("training_config"),
        optimizer=_optimizer(nodes, arrays),
    )


def _version(root: dict[str, Any]) -> str:
    version = str(root.get("keras_version") or "2")
    return version if version[:1] in "23" else "2"


def _object_graph(path: str) -> list[dict[str, Any]]:
    """Objects of the SavedModel: children by local name, metadata, variable name."""
    model = (pathlib.Path(path) / _GRAPH).read_bytes()
    nodes = []
    for number, graph in fields(model):
        for number2, objects in fields(graph) if number == 2 else ():
            for number3, node in fields(objects) if number2 == 7 else ():
                if number3 == 1:
                    budget.spend("members", what="the objects of saved_model.pb")
                    nodes.append(_node(node))
    if not nodes:
        raise damaged("no objects in saved_model.pb")
    return nodes


def _node(message: Any) -> dict[str, Any]:
    node: dict[str, Any] = {"children": {}}
    for number, value in fields(message):
        if number == 1:
            child = dict(fields(value))
            node["children"][text(child.get(2, b""))] = child.get(1, 0)
        elif number == 4:
            user = dict(fields(value))
            node["identifier"] = text(user.get(1, b""))
            node["metadata"] = text(user.get(3, b""))
        elif number == 7:
            node["variable"] = text(dict(fields(value)).get(6, b""))
    return node


def _by_keras(node: dict[str, Any]) -> bool:
    return node.get("identifier", "").startswith("_tf_keras")


def _is_layer(node: dict[str, Any]) -> bool:
    return _by_keras(node) and node["identifier"] != "_tf_keras_metric"


def _metadata(path: str, nodes: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Keras's JSON by object; its own file since TensorFlow 2.5, else in the graph."""
    found: dict[int, str] = {}
    own = pathlib.Path(path) / _METADATA
    if own.exists():
        for number, message in fields(own.read_bytes()):
            node = dict(fields(message)) if number == 1 else {}
            if 5 in node:
                found[node.get(2, 0)] = text(node[5])
    else:
        for i, node in enumerate(nodes):
            if _by_keras(node) and node["metadata"]:
                found[i] = node["metadata"]
    parsed = {i: parse_json(m, f"The metadata of object {i}") for i, m in found.items()}
    return {i: m for i, m in parsed.items() if isinstance(m, dict)}


def _layer_nodes(nodes, metadata) -> list[tuple[str, int]]:
    found = {}
    for local, i in nodes[0]["children"].items():
        prefix, _, index = local.rpartition("-")
        if prefix in ("layer", "layer_with_weights") and index.isdigit():
            if i in metadata:
                found[str(metadata[i].get("name"))] = i
    return list(found.items())


def _attributes(nodes) -> list[tuple[str, int]]:
    """The layers that a subclassed model holds, by the path of their attribute, as
    `"head"`, or `"blocks/0"` in a list or dict."""
    found = []
    todo = [
        (name, i)
        for name, i in nodes[0]["children"].items()
        if not name.startswith(("layer-", "layer_with_weights-"))
    ]
    todo.reverse()
    while todo:
        path, i = todo.pop()
        budget.spend("names", what="the attributes of the model")
        budget.spend("bytes", len(path), what="the attributes of the model")
        if _is_layer(nodes[i]):
            found.append((path, i))
        elif nodes[i].get("identifier", "").startswith("trackable_"):
            held = nodes[i]["children"].items()
            todo += reversed([(f"{path}/{key}", j) for key, j in held])
    return found


def _optimizer(nodes, arrays: dict[int, Array]) -> list[Array]:
    """The step, and the slots of Keras 2.11 and later; earlier ones have no names."""
    held = nodes[nodes[0]["children"].get("optimizer", 0)]["children"]
    listed = nodes[held["_variables"]]["children"] if "_variables" in held else {}
    found = {i: arrays[i] for i in (*held.values(), *listed.values()) if i in arrays}
    return list(found.values())


def _variables(nodes, node: int) -> list[int]:
    """Ids of a layer's variables: trainable ones, then others, as Keras listed them.

    A few layers (`Normalization`) track variables without listing them; these come
    last, from the layer's own attributes or its sublayers'.
    """
    found = dict.fromkeys(
        i
        for kind in ("trainable_variables", "non_trainable_variables")
        for i in _listed(nodes, node, kind)
    )
    todo, seen = [node], {node}
    while todo:
        children = nodes[todo.pop()]["children"].values()
        budget.spend("values", len(children), what="the variables of layers")
        for i in children:
            if "variable" in nodes[i]:
                found.setdefault(i)
            layer = nodes[i].get("identifier", "").startswith("_tf_keras")
            if layer and i not in seen:
                todo.append(i)
                seen.add(i)
    return list(found)


def _listed(nodes, node: int, kind: str) -> list[int]:
    # Keras keeps its lists beneath `keras_api`, or directly on the layer.
    children = nodes[node]["children"]
    holder = children if kind in children else {}
    if not holder and "keras_api" in children:
        holder = nodes[children["keras_api"]]["children"]
    if kind not in holder:
        return []
    items = nodes[holder[kind]]["children"]
    budget.spend("values", len(items), what="the variables of layers")
    return [items[k] for k in sorted((k for k in items if k.isdigit()), key=int)]


def _arrays(path: str, nodes: list[dict[str, Any]]) -> dict[int, Array]:
    """Array of each variable object, found by walking both graphs side by side."""
    bundle = read_bundle(pathlib.Path(path), "variables/variables")
    graph = bundle.get(_GRAPH_KEY)
    if not isinstance(graph, bytes):
        raise damaged("a checkpoint without its object graph")
    saved = []
    for number, message in fields(string_elements(graph)):
        children, key = {}, None
        for number2, value in fields(message) if number == 1 else ():
            part = dict(fields(value))
            if number2 == 1:
                children[text(part.get(2, b""))] = part.get(1, 0)
            elif number2 == 2 and text(part.get(1, b"")) == "VARIABLE_VALUE":
                key = text(part.get(3, b""))
        saved.append((children, key))
    arrays: dict[int, Array] = {}
    todo, seen = [(0, 0)], {0}
    while todo:
        ours, theirs = todo.pop()
        children, key = saved[theirs]
        stored = bundle.get(key) if key else None
        if "variable" in nodes[ours] and isinstance(stored, Array):
            name = nodes[ours]["variable"]
            arrays[ours] = Array(name, stored.shape, stored.read)
        for local, i in nodes[ours]["children"].items():
            if local in children and i not in seen:
                seen.add(i)
                todo.append((i, children[local]))
    return arrays
