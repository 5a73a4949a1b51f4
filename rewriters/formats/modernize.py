"""The config of any generation, as a `Spec` of Keras 3 classes and arguments.

Nothing is built here. Whatever stands in the way is collected over the whole
config, nested models included, and raised as one error.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from rewriters import private
from rewriters.errors import RewriteError
from rewriters.formats import foreign, keras1, keras2, tensorflow_ops
from rewriters.formats.saved import Saved, has_layers
from rewriters.formats.spec import Call, Ref, Spec, map_refs, refs, safe_name
from rewriters.pinned import PinnedTraining


_MODELS = ("Functional", "Model", "Network", "Container", "Sequential")
_WRAPPED = ("layer", "backward_layer", "forward_layer", "cell", "cells")
# What a converted layer does no more.
_CHANGED = {
    "AddLoss": "adds no loss",
    "AddMetric": "adds no metric",
    "RandomCrop": "crops the centre in training too",
    "RandomHeight": "changes no height",
    "RandomWidth": "changes no width",
}
_RECURRENT = ("RNN", "LSTM", "GRU", "Bidirectional")


def modernize(
    saved: Saved,
    custom_objects: dict[str, Any],
    lambdas: dict[str, Callable[..., Any]],
    safe_mode: bool = True,
) -> Spec:
    """Returns what `saved` is in Keras 3.

    Args:
        saved: a model as read.
        custom_objects: classes and functions by the names that the file uses.
        lambdas: functions by the name of the layer that they replace.
        safe_mode: if False, byte code in the file may run.

    Raises:
        RewriteError: naming every class, Lambda, operation and argument of the
            model that has no counterpart.
    """
    translator = _Translator(saved.generation, custom_objects, lambdas, safe_mode)
    with keras.saving.custom_object_scope(custom_objects):
        spec = translator.entry(saved.config)
    if spec.layers is None:
        built = saved.config.get("build_config") or {}
        shape = built.get("input_shape", saved.config.get("build_input_shape"))
        spec.input_shape = decode(shape)
    check_names(lambdas, translator.replaceable)
    error = problems(
        translator.missing, translator.refused, translator.operations, translator.lost
    )
    if error:
        raise error
    if translator.changed:
        warnings.warn(
            f"Training differs under Keras 3: {', '.join(translator.changed)}.",
            stacklevel=3,
        )
    return spec


@dataclasses.dataclass
class _Translator:
    generation: int
    custom_objects: dict[str, Any]
    lambdas: dict[str, Callable[..., Any]]
    safe_mode: bool
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    refused: list[str] = dataclasses.field(default_factory=list)
    operations: list[str] = dataclasses.field(default_factory=list)
    lost: list[str] = dataclasses.field(default_factory=list)
    changed: list[str] = dataclasses.field(default_factory=list)
    replaceable: list[str] = dataclasses.field(default_factory=list)

    def entry(self, entry: dict[str, Any]) -> Spec:
        """One layer's or model's entry, `{"class_name": ..., "config": ...}`."""
        kind, config = entry["class_name"], entry.get("config", {})
        registered = entry.get("registered_name") or kind
        names = list(dict.fromkeys([registered, kind, kind.rpartition(">")[2]]))
        bare = names[-1]
        if isinstance(config, list):  # Sequential of Keras 1 and early Keras 2
            config = {"layers": config}
        config = {k: v for k, v in config.items() if k != "shared_object_id"}
        name = safe_name(
            entry.get("name") or config.get("name") or private.to_snake_case(bare)
        )
        custom = self._custom(names)
        if self._is_model(bare, config, custom):
            spec = self._model(bare, config, custom)
            return self._finished(spec, name, bare, config)
        config = decode(config)
        if name in self.lambdas or bare == "Lambda" or bare in tensorflow_ops.LAYERS:
            self.replaceable.append(name)
        if name in self.lambdas:
            spec = self._given(name, config)
        elif bare == "Lambda" and custom is None:
            spec = self._lambda(name, config)
        elif bare in tensorflow_ops.LAYERS:
            spec = self._operation(bare, name, config)
        elif custom is not None:
            config = self._inner(config, custom)
            spec = Spec(name, bare, custom, keras2.values(config, self.generation))
        else:
            spec = self._known(names, config, entry)
        return self._finished(spec, name, bare, config, own=custom is not None)

    def _finished(
        self, spec: Spec, name: str, kind: str, config: dict, own: bool = False
    ) -> Spec:
        spec.name, spec.kind = name, kind
        takes_name = "name" in config or not own  # a class of one's own need not
        if spec.layers is None and not spec.operation and takes_name:
            spec.config["name"] = name
        trainable = config.get("trainable")
        spec.trainable = trainable if isinstance(trainable, bool) else None
        return spec

    def _custom(self, names: list[str]) -> Any:
        for name in names:
            found = self.custom_objects.get(name)
            if found is None and ">" in name:
                found = keras.saving.get_registered_object(name)
            if found is not None:
                return found
        return None

    def _known(self, names: list[str], config: dict, entry: dict) -> Spec:
        """A stock or foreign layer; a class that is neither is noted as missing."""
        kind, rename, fold = names[-1], {}, None
        if self.generation == 1:
            kind, config = keras1.modernize(kind, config)
        config = self._with_functions(config)
        converter = foreign.find(names, config) if self.generation < 3 else None
        cls = None
        if converter is not None:
            if kind in _CHANGED:
                self.changed.append(f"{config.get('name')} {_CHANGED[kind]}")
            conversion = converter(dict(config))
            cls, config, rename = conversion.cls, conversion.config, conversion.rename
            fold = conversion.fold
            config = keras2.modernize(cls.__name__, config, self.generation)[1]
        elif ">" not in names[0]:
            if kind == "BatchNormalization" and config.get("virtual_batch_size"):
                self.changed.append(f"{config.get('name')} has no virtual batches")
            kind, config = keras2.modernize(kind, config, self.generation)
            cls = self._stock(kind, config, entry.get("module"))
        if cls is None:
            self.missing[names[0]] = names[-1]
            return Spec(names[-1], kind, keras.layers.Layer)
        if kind == "InputLayer":
            config = _input_config(config)
        config = self._inner(config, cls)
        if cls.__module__.startswith("keras."):
            config, lost = keras2.fit(cls, config)
            self.lost += [f"{config.get('name')}: {k}={v!r}" for k, v in lost.items()]
            for key, value in config.items():
                self._check_object(key, value)
        operation = not issubclass(cls, keras.layers.Layer)
        if operation:  # of Keras 3: its arguments are not the call's
            make = functools.partial(_call_operation, cls, config)
            return Spec(kind, kind, make, operation=True)
        return Spec(kind, kind, cls, config, rename=rename, fold=fold)

    def _with_functions(self, config: dict[str, Any]) -> dict[str, Any]:
        """Puts functions that were given or registered in the place of their names."""
        new = dict(config)
        for key in ("activation", "recurrent_activation"):
            name = keras2.activation_name(config.get(key))
            if name is not None:
                found = self._custom([name, name.rpartition(">")[2]])
                new[key] = new[key] if found is None else found
        return new

    def _stock(self, kind: str, config: dict, module: str | None) -> type | None:
        if self.generation == 3 and "trainable" not in config:
            # Operations share names with layers, and lack the arguments of a layer.
            found = tensorflow_ops.operation_class(kind, module)
            if found is not None:
                return found
        cls = getattr(keras.layers, kind, None)
        if cls is None and kind == "Functional":
            cls = keras.Model
        return cls if isinstance(cls, type) else None

    def _check_object(self, key: str, value: Any) -> None:
        """Notes a regularizer, constraint or activation that nobody knows."""
        get = (
            keras.regularizers.get
            if key.endswith("_regularizer")
            else keras.constraints.get
            if key.endswith("_constraint")
            else keras.activations.get
            if key in ("activation", "recurrent_activation")
            else None
        )
        if get is None or value is None:
            return
        try:
            get(value)
        except (ValueError, TypeError):
            name = str(value.get("class_name") if isinstance(value, dict) else value)
            self.missing[name] = name.rpartition(">")[2]

    def _inner(self, config: dict[str, Any], cls: Any) -> dict[str, Any]:
        """Translates wrapped layers, for classes that take them ready-made."""
        module = getattr(cls, "__module__", "")
        if module.partition(".")[0] not in ("keras", "rewriters", "kerasnorm"):
            return config
        config = dict(config)
        for key in _WRAPPED:
            value = config.get(key)
            if isinstance(value, dict) and "class_name" in value:
                config[key] = self.entry(value)
            elif isinstance(value, list) and key in ("cell", "cells"):
                config[key] = [self.entry(v) for v in value]
        return config

    # Lambdas and operations

    def _given(self, name: str, config: dict[str, Any]) -> Spec:
        function = self.lambdas[name]
        arguments = config.get("arguments") or {}
        known = inspect.signature(function).parameters
        config = {
            "function": function,
            "arguments": {k: v for k, v in arguments.items() if k in known},
            "dtype": keras2.policy(config.get("dtype")),
        }
        # Not from_config, which wants the function as stored.
        return Spec(name, "Lambda", functools.partial(keras.layers.Lambda), config)

    def _lambda(self, name: str, config: dict[str, Any]) -> Spec:
        function = config.get("function")
        if isinstance(function, dict):
            inner = function.get("config")
            function = inner.get("code") if isinstance(inner, dict) else inner
        by_name = function if isinstance(function, str) else None
        if by_name in self.custom_objects:
            self.lambdas = {**self.lambdas, name: self.custom_objects[by_name]}
            return self._given(name, config)
        if self.safe_mode:
            self.refused.append(name)
            return Spec(name, "Lambda", keras.layers.Lambda)
        return self._byte_code(name, config)

    def _byte_code(self, name: str, config: dict[str, Any]) -> Spec:

        function = config.get("function")
        if isinstance(function, dict):
            inner = function.get("config") or {}
            function = [inner.get(k) for k in ("code", "defaults", "closure")]
        try:
            code, defaults, closure = (list(function or []) + [None] * 3)[:3]
            loaded = private.func_load(code, defaults=defaults, closure=closure)
        except Exception:  # byte code of another Python can fail in any way
            self.refused.append(name)
            return Spec(name, "Lambda", keras.layers.Lambda)
        self.lambdas = {**self.lambdas, name: loaded}
        return self._given(name, config)

    def _operation(self, kind: str, name: str, config: dict[str, Any]) -> Spec:
        function = tensorflow_ops.function(kind, config)
        if function is None:
            self.operations.append(f"{name} ({tensorflow_ops.describe(kind, config)})")
            function = keras.ops.add
        return Spec(name, kind, function, operation=True)

    # Models

    def _is_model(self, kind: str, config: dict[str, Any], custom: Any) -> bool:
        if not has_layers(config):
            return False
        plain = isinstance(custom, type) and issubclass(custom, keras.Sequential)
        plain = plain and custom.__init__ is keras.Sequential.__init__
        return kind in _MODELS or "output_layers" in config or plain

    def _model(self, kind: str, config: dict[str, Any], custom: Any) -> Spec:
        if "output_layers" not in config:
            return self._sequential(config, custom)
        if custom is None and kind == PinnedTraining.__name__:
            custom = PinnedTraining  # HDF5 files keep no package of the whole model
        elif custom is None and kind not in _MODELS:
            self.missing[kind] = kind
        elif custom is not None and self.generation < 3:
            self._note_overridden(config)
        entries = config["layers"]
        layers = [self.entry(e) for e in entries]
        first = {} if self.generation == 3 else _first_node(entries, layers, config)
        # Keras 3 counts a functional model's own graph at the ends alone.
        graphs = {s.name for s in layers if s.outputs is not None}
        last = dict.fromkeys(graphs, 1) if self.generation == 3 else first

        def tensor(ref: Ref) -> Ref:
            return ref._replace(node=ref.node - first.get(ref.layer, 0))

        def end(ref: Ref) -> Ref:
            return ref._replace(node=ref.node - last.get(ref.layer, 0))

        for spec, entry in zip(layers, entries, strict=True):
            for node in entry.get("inbound_nodes", ()):
                call = _call(node, preserve=spec.operation)
                call = _recurrent_states(spec, call)
                spec.calls.append(
                    Call(map_refs(tensor, call.args), map_refs(tensor, call.kwargs))
                )
        return Spec(
            str(config.get("name")),
            kind,
            custom or keras.Model,
            layers=layers,
            inputs=_ends(config["input_layers"], end),
            outputs=_ends(config["output_layers"], end),
            keras_2=self.generation < 3,
        )

    def _note_overridden(self, config: dict[str, Any]) -> None:
        """Notes the `training` that the calls of a custom class's graph recorded."""
        for entry in config["layers"]:
            calls = [_call(n, True) for n in entry.get("inbound_nodes", ())]
            if any(c.kwargs.get("training") is not None for c in calls):
                self.changed.append(
                    f"{entry.get('name')} runs as the model does, whatever `training` "
                    "its call recorded"
                )

    def _sequential(self, config: dict[str, Any], custom: Any) -> Spec:
        entries = config["layers"]
        if not entries or entries[0]["class_name"] == "Merge":
            raise RewriteError(
                "A Sequential model does not begin with a layer",
                got="a Merge of models" if entries else "no layers",
                expected="a functional model where models are merged",
                fix="Save it as one with the Keras that wrote it",
            )
        layers = [self.entry(e) for e in entries]
        _tell_apart(layers)
        if layers[0].kind != "InputLayer":
            shape = _input_shape(entries[0]) or config.get("build_input_shape")
            if shape is not None:
                layers.insert(0, _input_spec(layers[0], entries[0], shape))
        cls = custom or keras.Sequential
        return Spec(str(config.get("name")), "Sequential", cls, layers=layers)


def check_names(lambdas: Iterable[str], names: Iterable[str]) -> None:
    """Raises if `lambdas` is for a layer that is not among `names`."""
    unknown = sorted(set(lambdas) - set(names))
    if unknown:
        listed = ", ".join(dict.fromkeys(names))
        raise RewriteError(
            "lambdas names layers that the file does not have",
            got=", ".join(unknown),
            expected=f"its Lambda and operation layers: {listed or 'it has none'}",
        )


def problems(
    missing: dict[str, str] | None = None,
    refused: list[str] | None = None,
    operations: list[str] | None = None,
    lost: list[str] | None = None,
) -> RewriteError | None:
    """Returns one error naming all that stands in the way of a load, if anything.

    Args:
        missing: unknown classes, as the file and as Python names them.
        refused: names of the Lambda layers without a function.
        operations: TensorFlow operations, `"layer name (operation)"`.
        lost: arguments that Keras 3 does not have.
    """
    parts, fixes = [], []
    if missing:
        parts.append(f"the classes {', '.join(sorted(missing))} are not known")
        given = ", ".join(f'"{k}": {v}' for k, v in sorted(missing.items()))
        fixes.append(f"Pass them: custom_objects={{{given}}}")
    if refused:
        listed = ", ".join(refused)
        parts.append(f"the Lambda layers {listed} hold byte code, which is not run")
    if operations:
        listed = ", ".join(operations)
        parts.append(f"the TensorFlow operations {listed} have no Keras 3 form")
    if refused or operations:
        layers = [*(refused or ()), *(o.split(" ", 1)[0] for o in operations or ())]
        given = ", ".join(f'"{name}": function' for name in layers)
        fixes.append(f"Give a function for each by name: lambdas={{{given}}}")
    if lost:
        parts.append(f"Keras 3 has no counterpart of {'; '.join(lost)}")
        fixes.append("Pass a class of your own for that layer in custom_objects")
    if not parts:
        return None
    return RewriteError(
        "; ".join(parts),
        expected="layers that Keras 3 or a registered package knows",
        fix=". ".join(fixes),
    )


def _tell_apart(layers: list[Spec]) -> None:
    """Numbers layers of one name: the config of a class of one's own may have none."""
    taken: set[str] = set()
    for spec in layers:
        name, count = spec.name, 0
        while spec.name in taken:
            count += 1
            spec.name = f"{name}_{count}"
        taken.add(spec.name)


def _call_operation(cls: type, config: dict[str, Any], *args, **kwargs):
    return cls(**config)(*args, **kwargs)


def _input_shape(entry: dict[str, Any]) -> Any:
    """Shape, with the batch, that an entry says its inputs have, if it does."""
    config = entry.get("config")
    if isinstance(config, list):
        config = {"layers": config}
    if not isinstance(config, dict):
        return None
    shape = config.get("batch_input_shape", config.get("batch_shape"))
    if shape is None and isinstance(config.get("layers"), list) and config["layers"]:
        names = [ref.layer for ref in refs(_ends(config.get("input_layers", []), None))]
        inner = [e for e in config["layers"] if e.get("name") in names[:1]]
        shape = _input_shape((inner or config["layers"])[0])
        shape = shape or config.get("build_input_shape")
    if shape is None and isinstance(config.get("layer"), dict):
        return None
    return decode(shape)


def _input_spec(layer: Spec, entry: dict[str, Any], shape: Any) -> Spec:
    config = entry.get("config")
    dtype = config.get("dtype") if isinstance(config, dict) else None
    dtype = (isinstance(config, dict) and config.get("input_dtype")) or dtype
    if layer.kind == "Embedding":
        dtype = "int32"
    elif not isinstance(dtype, str) or dtype.startswith("mixed"):
        dtype = None
    config = {"batch_shape": decode(shape), "dtype": dtype}
    name = f"{layer.name}_input"
    return Spec(name, "InputLayer", keras.layers.InputLayer, {**config, "name": name})


def _input_config(config: dict[str, Any]) -> dict[str, Any]:
    shape = config.get("batch_input_shape", config.get("batch_shape"))
    dtype = config.get("dtype") or config.get("input_dtype")
    new = {"batch_shape": decode(shape), "dtype": dtype, "name": config.get("name")}
    return {**new, **{k: config[k] for k in ("sparse", "optional") if config.get(k)}}


# Graph nodes


def decode(value: Any) -> Any:
    """A stored argument as a Python value."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("class_name")
    if kind == "__tuple__":
        return tuple(decode(v) for v in value["items"])
    if kind == "TensorShape":
        return [decode(v) for v in value["items"]]
    if kind in ("__ellipsis__", "ellipsis"):
        return Ellipsis
    if kind == "__numpy__":
        return np.array(value["config"]["value"], value["config"]["dtype"])
    if kind == "__tensor__":
        return np.array(value["config"]["value"], value["config"]["dtype"])
    if kind == "__slice__":
        inner = value["config"]
        return slice(*(decode(inner[k]) for k in ("start", "stop", "step")))
    if kind == "__keras_tensor__":
        return _ref(value["config"]["keras_history"])
    if value.get("type") == "ndarray":
        return np.array(value["value"])
    return {k: decode(v) for k, v in value.items()}


def _ref(value: Any) -> Ref:
    return Ref(safe_name(value[0]), *value[1:3])


def _is_ref(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) in (3, 4)
        and isinstance(value[0], str)
        and all(isinstance(v, int) for v in value[1:3])
    )


def _tensors(value: Any) -> Any:
    """A structure in which `[layer, node, tensor]` stands for a tensor."""
    if _is_ref(value):
        return _ref(value)
    if isinstance(value, (list, tuple)):
        return [_tensors(v) for v in value]
    if isinstance(value, dict) and "class_name" not in value:
        return {k: _tensors(v) for k, v in value.items()}
    return decode(value)


def _call(node: Any, preserve: bool) -> Call:
    """A stored node of any generation.

    Keras 3 stores `{"args": ..., "kwargs": ...}`; Keras 2 the structure of the first
    argument, its leaves `[layer, node, tensor, kwargs]`, where a constant has the
    layer "_CONSTANT_VALUE"; Keras 1 a list of `[layer, node, tensor]`.
    """
    if isinstance(node, dict) and "args" in node:
        return Call(list(decode(node["args"])), decode(node.get("kwargs") or {}))
    kwargs: dict[str, Any] = {}

    def leaf(value: Any) -> Any:
        if isinstance(value, list) and len(value) in (3, 4) and _head(value):
            if len(value) == 4 and isinstance(value[3], dict):
                kwargs.update(value[3])
            if value[0] == "_CONSTANT_VALUE":
                return decode(value[2])
            return _ref(value)
        if isinstance(value, dict):
            return {k: leaf(v) for k, v in value.items()}
        return [leaf(v) for v in value]

    first = leaf(node)
    if isinstance(first, list) and len(first) == 1 and not preserve:
        first = first[0]
    return Call([first], {k: _tensors(v) for k, v in kwargs.items()})


def _head(value: list[Any]) -> bool:
    return isinstance(value[0], str) and isinstance(value[1], int)


def _recurrent_states(spec: Spec, call: Call) -> Call:
    """Keras 2 passed a recurrent layer's initial states beside its inputs."""
    first = call.args[0] if call.args else None
    if not any(kind in spec.kind for kind in _RECURRENT):
        return call
    # A wrapper stored a None for each, and the states again among its inputs.
    unset = {k for k in ("initial_state", "constants") if call.kwargs.get(k) is None}
    call = Call(call.args, {k: v for k, v in call.kwargs.items() if k not in unset})
    if isinstance(first, list) and len(first) > 1 and isinstance(first[0], Ref):
        states = {"initial_state": first[1:], **call.kwargs}
        return Call([first[0]], states)
    return call


def _first_node(entries, layers, config) -> dict[str, int]:
    """Index of the first stored call of each layer, where it is not 0.

    A model that has its own inputs counts its own graph as call 0.
    """
    used: dict[str, set[int]] = {}
    nodes = [_call(n, True) for e in entries for n in e.get("inbound_nodes", ())]
    ends = [_ends(config[k], None) for k in ("input_layers", "output_layers")]
    for ref in refs([[c.args, c.kwargs] for c in nodes] + ends):
        used.setdefault(ref.layer, set()).add(ref.node)
    first = {}
    for spec in layers:
        indexes = used.get(spec.name, {0})
        if spec.layers is not None and 0 not in indexes:
            first[spec.name] = 1
    return first


def _ends(value: Any, tensor: Callable[[Ref], Ref] | None) -> Any:
    """Inputs or outputs of a model; a list of one is that one."""
    value = _tensors(value)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Ref):
        value = value[0]
    return value if tensor is None else map_refs(tensor, value)
