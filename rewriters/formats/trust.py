"""What a stored config may refer to. A file is data, whatever it says.

Keras makes an object of every entry `{"module": ..., "class_name": ..., "config": ...}`
wherever it stands, and its own safe mode asks little more than that the name is one of
Keras's. Here every entry of a config, the model's and the training's, is judged before
anything is built: it may name a building block of models, or what the caller gave or
registered. What writes files, opens connections, changes settings, takes functions to
call or reads another file is refused.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import tree

from rewriters import private
from rewriters.errors import RewriteError
from rewriters.formats import budget
from rewriters.formats.build import deferred, discard
from rewriters.formats.earlier import entries


# Layers that open a path, unpickle bytes or run a program that the file holds.
_CODE = ("TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer")
# Arguments that are functions to call; no operation of a stored graph needs them.
_CALLED = frozenset(
    "f fn function body body_fun cond true_fn false_fn branches call_fn init_fn".split()
)
# First arguments of functions that compute something of a tensor.
_TENSORS = frozenset(
    "x x1 a inputs input images image logits target xs variable condition query data "
    "subscripts".split()
)
# Operations that make as many tensors as an axis is long.
_MANY = frozenset("unstack split array_split dsplit hsplit vsplit".split())
# Entries that Keras resolves by itself, without a class behind them.
PLAIN = frozenset(
    "__tensor__ __numpy__ __bytes__ __ellipsis__ ellipsis __slice__ __keras_tensor__ "
    "__tuple__ TensorShape".split()
)
# Arguments that make as many Python objects as they say, and the most that is of use.
_COUNTS = {
    "num_oov_indices": 1 << 20,
    "num_thresholds": 1 << 20,
    "num": 1 << 12,
    "indices_or_sections": 1 << 12,
    "num_or_size_splits": 1 << 12,
    "cell": 1 << 8,
    "cells": 1 << 8,
}
# A recurrent layer that is unrolled is traced step by step.
_UNROLLED = 1 << 12
# Deeper than any published model is nested.
_DEPTH = 100
# Numbers that metrics, and the states of recurrent layers, may hold together.
_STATE = 1 << 24
# Names in what a model was compiled with; Keras makes a metric for some of them.
_NAMES = 1 << 13
# What Keras 2 wrote for the layer of an argument that is a constant.
_CONSTANT = "_CONSTANT_VALUE"
# Calls looked at while those in the wrong order wait for their inputs.
_WAITS = 1_000_000
# Signs that make a text a regular expression which may take for ever to match.
_PATTERN = frozenset("*+?{(|[\\")
# Where a config has what its model was compiled with.
_TRAINING = "compile_config"
# Layers of one Sequential.
_IN_A_ROW = 500
# Tensors that one call takes.
_TOGETHER = 1 << 11


def check(
    config: Mapping[str, Any], custom_objects: Mapping[str, Any], safe_mode: bool
) -> None:
    """Raises a `RewriteError` if a model's config refers to what no file may name.

    Args:
        config: the model's entry.
        custom_objects: classes and functions that the caller gave.
        safe_mode: False lets a file name any class or function of Keras; the limits on
            sizes hold all the same.
    """
    code: set[int] = set()  # of Lambdas, which the caller replaces or names
    for entry in entries(config, without=_TRAINING):
        if entry["class_name"] == "Lambda" and isinstance(entry["config"], dict):
            code.add(id(entry["config"].get("function")))
        if safe_mode and not (
            entry["class_name"] == "__lambda__" and id(entry) in code
        ):
            _check_entry(entry, custom_objects)
        _check_values(entry)
        _check_graph(entry)


def untrained(config: Any) -> Any:
    """A copy of a config without what its models were compiled with."""
    # Keras takes a config apart as it reads it. All of it is JSON, which this copies
    # ten times as fast as `deepcopy`.
    config = json.loads(json.dumps(config))
    for entry in entries(config):
        entry.pop(_TRAINING, None)
    return config


def check_training(config: Any, custom_objects: Mapping[str, Any]) -> None:
    """Raises if what a model was compiled with names what no file may name, or takes
    memory out of proportion. Its metrics and losses are made without their values."""
    size, names = 0.0, sum(isinstance(v, str) for v in tree.flatten(config))
    if names > _NAMES:
        raise _damaged(f"{names} names of losses, metrics and the like", _NAMES)
    for entry in entries(config):
        _check_entry(entry, custom_objects)
        _check_values(entry)
        found = _named(str(entry.get("module") or "keras.metrics"), entry["class_name"])
        if isinstance(found, type) and issubclass(found, keras.metrics.Metric):
            size += _numbers(found, entry["config"])
    if size > _STATE:
        raise _damaged(f"metrics that hold {size:.0f} numbers", _STATE)


def _numbers(metric: type, config: Any) -> float:
    """How many numbers a metric would hold; 0 for one that cannot be made anyway."""
    try:
        with deferred():
            made = metric.from_config(dict(config or {}))
            return sum(elements(v.shape) for v in made.variables)
    except Exception:  # it is told of when the model is compiled
        return 0.0
    finally:
        discard()


def is_known(entry: Mapping[str, Any], custom_objects: Mapping[str, Any]) -> bool:
    """Whether the caller, or code that was imported, gave what an entry names."""
    return _given(entry, custom_objects) is not None


def is_unknown_function(entry: Mapping[str, Any]) -> bool:
    """Whether an entry is of a function that Keras does not have."""
    if entry["class_name"] != "function":
        return False
    return _named(str(entry.get("module") or ""), str(entry["config"])) is None


def _check_entry(entry: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    kind = entry["class_name"]
    if kind in PLAIN or kind == "Lambda" or _given(entry, given) is not None:
        return  # a Lambda is judged by the function inside it
    if kind in ("__lambda__", "__typespec__"):
        raise _refused(f"an entry {kind!r}")
    name = entry["config"] if kind == "function" else kind
    module = str(entry.get("module") or "")
    found = _named(module, str(name))
    if (
        _is_python(module, str(name))
        if found is None
        else not _is_building_block(found)
    ):
        raise _refused(f"{module}.{name}")


def _given(entry: Mapping[str, Any], custom_objects: Mapping[str, Any]) -> Any:
    # As Keras resolves them: functions by their names alone.
    names = [entry.get("registered_name"), entry["class_name"]]
    if entry["class_name"] == "function":
        names = [entry["config"]]
    for name in names:
        if isinstance(name, str) and name:
            found = custom_objects.get(name)
            if found is None:
                found = keras.saving.get_registered_object(name)
            if found is not None:
                return found
    return None


def _named(module: str, name: str) -> Any:
    """What Keras would find under a name. No module is imported for it."""
    if module == "builtins":
        for own in ("activations", "losses", "metrics", "regularizers"):
            found = private.public_symbol(f"keras.{own}.{name}")
            if found is not None:
                return found
        return None
    if module.partition(".")[0] != "keras":
        return None
    found = private.public_symbol(f"{module}.{name}")
    if found is None:
        found = getattr(sys.modules.get(module), name, None)
    return found


def _is_python(module: str, name: str) -> bool:
    """Whether a name is one of Python itself: `os.system`, `exec`. Keras writes
    "builtins" for every function, so there the name decides."""
    if module == "builtins":
        return hasattr(builtins, name)
    return module.partition(".")[0] in sys.stdlib_module_names


def _is_building_block(found: Any) -> bool:
    if isinstance(found, type):
        bases = (*_bases(), keras.layers.Layer)
        return issubclass(found, bases) and not _runs_code(found)
    return id(found) in _functions()


@functools.cache
def _bases() -> tuple[type, ...]:
    schedule = keras.optimizers.schedules.LearningRateSchedule
    return (
        keras.Operation,
        keras.initializers.Initializer,
        keras.regularizers.Regularizer,
        keras.constraints.Constraint,
        keras.losses.Loss,
        keras.metrics.Metric,
        keras.optimizers.Optimizer,
        schedule,
        keras.DTypePolicy,
        *private.building_blocks(),
    )


def _runs_code(cls: type) -> bool:
    if cls.__name__ in _CODE:
        return True
    if not cls.__module__.startswith(private.OPERATIONS):
        return False
    made = inspect.signature(cls.__init__).parameters
    called = inspect.signature(cls.call).parameters
    return bool(_CALLED & {*made, *called})


@functools.cache
def _functions() -> dict[int, Any]:
    """Functions that a file may name, by identity: activations, losses, metrics, and
    what `keras.ops` computes of a tensor."""
    found = list(private.named_functions())
    for name, function in vars(keras.ops).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            arguments = list(inspect.signature(function).parameters)
            tensor = arguments and arguments[0] in _TENSORS
            if tensor and not _CALLED & set(arguments) and name not in _MANY:
                found.append(function)
    return {id(f): f for f in found}


def _check_values(entry: Mapping[str, Any]) -> None:
    """The arguments of one entry: no paths, no types and counts that fill memory."""
    kind, config = entry["class_name"], entry["config"]
    if not isinstance(config, dict):
        return
    if kind in ("__numpy__", "__tensor__"):
        if not _is_plain_dtype(config.get("dtype")):
            raise _damaged(f"an array of {config.get('dtype')!r}")
        return
    if isinstance(config.get("vocabulary"), str):
        raise RewriteError(
            "A vocabulary is the path of another file",
            got=f"vocabulary={config['vocabulary']!r} in {config.get('name')!r}",
            expected="a list of words",
            fix="Load the model with the Keras that wrote it, and call set_vocabulary",
        )
    for key, most in _COUNTS.items():
        value = config.get(key)
        count = len(value) if isinstance(value, list) else value
        if isinstance(count, int | float) and not -1 <= count <= most:
            raise _damaged(f"{key}={count!r} in {config.get('name', kind)!r}", most)
    if kind == "Sequential" and isinstance(config.get("layers"), list):
        if len(config["layers"]) > _IN_A_ROW:  # Keras builds it anew with each
            raise _damaged(f"{len(config['layers'])} layers in a row", _IN_A_ROW)
    for key, value in config.items():
        made = isinstance(value, dict) and value.get("class_name") == "function"
        if made and key.endswith("initializer"):
            module = str(value.get("module"))
            if module.startswith("keras.ops"):  # it would be given a shape
                raise _refused(f"{module}.{value.get('config')} as {key}")
    for name in config.get("exclude_layers") or ():
        if _PATTERN & set(str(name)):  # an optimizer searches names for it
            raise _refused(f"the regular expression {name!r} in an optimizer")
    if config.get("unroll") is True:
        for node in entry.get("inbound_nodes") or ():
            for shape in _shapes(node):
                if len(shape) > 1 and (shape[1] or 0) > _UNROLLED:
                    raise _damaged(f"{shape[1]} steps to unroll", _UNROLLED)


def _is_plain_dtype(name: Any) -> bool:
    """Whether items of a type have the few bytes of a number each."""
    try:
        name = keras.backend.standardize_dtype(name)
    except (ValueError, TypeError):
        try:
            return np.dtype(name).kind in "biufc"
        except TypeError:
            return False
    return True


def _shapes(node: Any) -> Iterator[list[Any]]:
    for entry in entries(node):
        shape = entry["config"].get("shape") if isinstance(entry["config"], dict) else 0
        if isinstance(shape, list):
            yield shape


def check_extent(config: Any) -> None:
    """Raises if there are too many layers, or too deep: they are walked many times."""
    cost = budget.current()
    todo = [(config, 0)]
    while todo:
        value, depth = todo.pop()
        if isinstance(value, dict):
            if "class_name" in value:
                depth += 1
                nodes = value.get("inbound_nodes")
                if isinstance(nodes, list) and len(nodes) > 1:  # each is a call
                    cost.spend("layers", len(nodes) - 1, what="the calls of its layers")
                if "inbound_nodes" in value or "build_config" in value:
                    cost.spend("layers", what="the layers of the model's config")
            todo += [(v, depth) for v in value.values() if isinstance(v, dict | list)]
        elif isinstance(value, list):
            todo += [(v, depth) for v in value if isinstance(v, dict | list)]
        if depth > _DEPTH:
            raise _damaged(f"layers nested {depth} deep", _DEPTH)


def _check_graph(entry: Mapping[str, Any]) -> None:
    """A functional model's layers: names that differ, calls on tensors that exist and
    that come nearly in order, since Keras goes over all calls that wait again."""
    config = entry["config"]
    if not isinstance(config, dict) or "output_layers" not in config:
        return
    layers = config.get("layers")
    if not isinstance(layers, list) or not all(isinstance(x, dict) for x in layers):
        return
    names = [_name(layer) for layer in layers]
    twice = [name for name, count in Counter(map(str, names)).items() if count > 1]
    if twice:
        raise RewriteError(
            f"The model {config.get('name')!r} has two layers of one name",
            got=", ".join(map(repr, twice[:5])),
            expected="a name of its own for each layer",
            fix="Rename them with the Keras that wrote the file, and save it again",
        )
    waiting, ready, work = [], set(), 0
    for layer, name in zip(layers, names, strict=True):
        nodes = layer.get("inbound_nodes")
        for index, node in enumerate(nodes if isinstance(nodes, list) else ()):
            given = _inputs(node)
            if len(given) > _TOGETHER:
                raise _damaged(f"{name!r} called on {len(given)} tensors", _TOGETHER)
            needed = set(given)
            if not needed and isinstance(node, dict) and node:
                raise RewriteError(
                    f"The layer {name!r} is called on no tensor of the model",
                    got=str(node)[:80],
                    expected="the output of an input or of another layer",
                    fix="The file is damaged: fetch or save it again",
                )
            waiting.append(((name, index), needed))
        if not nodes:
            ready.add(name)
    while waiting:
        left = []
        for call, needed in waiting:
            if all(n in ready for n in needed):
                ready.add(call[0])
            else:
                left.append((call, needed))
        work += len(waiting)
        if len(left) == len(waiting):
            return  # a circle or a missing layer: the builder says which
        if work > _WAITS:
            raise _damaged("calls in an order that takes too long to follow")
        waiting = left


def _name(layer: Mapping[str, Any]) -> Any:
    config = layer.get("config")
    inner = config.get("name") if isinstance(config, dict) else None
    return layer.get("name") or inner


def _inputs(node: Any) -> list[Any]:
    """Names of the layers whose outputs a stored call takes, one for each tensor."""
    found: list[Any] = []
    todo = [node]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if value.get("class_name") == "__keras_tensor__":
                history = (value.get("config") or {}).get("keras_history") or [None]
                found.append(history[0])
            else:
                todo += value.values()
        elif isinstance(value, list):
            if len(value) >= 3 and isinstance(value[0], str) and type(value[1]) is int:
                found.append(value[0])
            todo += value
    return [name for name in found if name != _CONSTANT]


def _refused(got: str) -> RewriteError:
    return RewriteError(
        "The file names what is not a part of a model",
        got=got,
        expected="layers, operations, activations, initializers, losses, metrics, "
        "optimizers and their like, of Keras or given in custom_objects",
        fix="Do not trust this file. Where you know it, pass the function or class by "
        "its name in custom_objects, or as the function of a Lambda in lambdas",
    )


def _damaged(got: str, most: int | None = None) -> RewriteError:
    return RewriteError(
        "The model's config is out of all proportion",
        got=got,
        expected=None if most is None else f"at most {most}",
        fix="The file is damaged: fetch or save it again",
    )


def elements(shape: Any) -> float:
    """How many numbers an array of a shape holds, sizes of None counted as one."""
    return float(np.prod([float(n or 1) for n in shape])) if len(shape) else 1.0
