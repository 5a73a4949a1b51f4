"""Replace and remove layers of any model; the result is a new model.

One recursive copy does it. Every layer is rebuilt from its config; where an edit says
so another layer takes its place; graphs are replayed node by node, so that shared
layers stay shared, nested models nested, and recorded call keywords are kept. Custom
layers and subclassed models get the new inner layer at the attribute that held the old
one. Weights follow by identity (`transfer`).
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
from keras import tree

from rewriters import private, transfer
from rewriters.errors import RewriteError, reason
from rewriters.exchange import (
    Exchange,
    build_like,
    construct,
    own_functions,
    put_when_there,
    remember,
)
from rewriters.graph import SiteMap
from rewriters.holders import Layer, children, internals, paired_children
from rewriters.program import is_graph, ordered_nodes


Replacement = Any  # a layer, None to remove, or a function old layer -> layer | None


class Edited:
    """A rewritten model and what became of each layer.

    Attributes:
        model: the new model.
        layers: `id(old layer) -> (old layer, new layer)` for every layer that was
            copied or replaced; the new one is None where the layer was removed.
    """

    def __init__(
        self,
        model: Any,
        layers: dict[int, tuple[Any, Any]],
        replaced: set[int],
    ):
        self.model, self.layers, self._replaced = model, layers, replaced

    def new(self, old: Any) -> Any:
        """The layer that stands where `old` stood, None if it was removed."""
        return self.layers[id(old)][1]

    def renew_averages(self) -> None:
        """To call when weights of the new model were set: an optimizer that averages
        weights begins at these, or `fit` would bring back what they were."""
        transfer.renew_averages(self.model, self.layers, self._replaced)


def edit(
    model: Any,
    edits: Mapping[str, Replacement],
    *,
    drops: Mapping[str, Iterable[str]] | None = None,
    site_map: SiteMap | None = None,
    carry: Callable[[Edited], None] | None = None,
) -> Edited:
    """Copies a model with some of its layers replaced or removed.

    Args:
        model: any Keras model; left untouched.
        edits: site path -> the unbuilt layer that takes the place, or None to remove
            the layer (its input passes through), or a function of the old layer that
            gives one of these.
        drops: site path -> recorded call keywords that the new layer may do without.
        site_map: the model's sites where they are known already.
        carry: sets what the layers that replace others take from these, weights and
            `trainable` flags, before the new model is compiled.

    Returns:
        `Edited`: the new model, compiled like the old one, with the weights and
        optimizer slots of every layer that was not replaced.

    Raises:
        RewriteError: unknown path; a recorded call keyword that the new layer does
            not take and that was not None; a custom class that cannot be rebuilt.
    """
    site_map = site_map or SiteMap(model, tracing=False)
    unknown = [path for path in edits if path not in site_map.by_path]
    if unknown:
        raise RewriteError(
            "no layer at this path",
            got=", ".join(map(repr, unknown)),
            expected="paths as `rewriters.sites(model)` lists them",
        )
    replaced = {}
    for path, new in edits.items():
        old = site_map[path].layer
        replaced[id(old)] = new(old) if callable(new) and not _is_layer(new) else new
    needless = {id(site_map[p].layer): set(d) for p, d in (drops or {}).items()}
    copier = _Copier(replaced, needless, site_map)
    new_model = copier.copy(model)
    if not is_graph(new_model):
        build_like(model, new_model)
    for old, new in reversed(list(copier.memo.values())):  # owners first
        build_like(old, new)
    copier.set_aliases()
    result = Edited(new_model, copier.memo, set(replaced))
    transfer.copy_weights(result.layers, skip=set(replaced))
    if carry is not None:
        carry(result)
    transfer.copy_compile_state(model, new_model, result.layers, set(replaced))
    return result


def _is_layer(x: object) -> bool:
    return isinstance(x, Layer)


class _Copier:
    def __init__(
        self,
        replaced: dict[int, Any],
        drops: dict[int, set[str]],
        site_map: SiteMap,
    ):
        self.replaced, self.drops = replaced, drops
        self.memo: dict[int, tuple[Any, Any]] = {}
        self.aliases: list[tuple[Any, str, Any]] = []
        self.classes = custom_objects_of(site_map)
        # A layer needs its inside rebuilt when an edit, or a layer that is also held
        # elsewhere, lies within.
        self.special = {id(s.layer) for s in site_map if len(s.paths) > 1}
        self.special |= set(replaced)
        self._within: dict[int, bool] = {}

    # ------------------------------------------------------------- one layer

    def copy(self, layer: Any) -> Any:
        """The counterpart of `layer` in the new model, made on first sight."""
        if id(layer) in self.memo:
            return self.memo[id(layer)][1]
        if id(layer) in self.replaced:
            new = self.replaced[id(layer)]
        elif is_graph(layer) and not isinstance(layer, keras.Sequential):
            new = self._functional(layer)
        elif isinstance(layer, keras.Sequential):
            new = self._sequential(layer)
        else:
            new = self._opaque(layer)
        self.memo[id(layer)] = (layer, new)
        return new

    def _needs_inside(self, layer: Any) -> bool:
        key = id(layer)
        if key not in self._within:
            self._within[key] = False  # guards against layers that refer to owners
            self._within[key] = any(
                id(child) in self.special or self._needs_inside(child)
                for _, child, _ in children(layer)
            )
        return self._within[key]

    def _from_config(self, layer: Any) -> Any:
        """A fresh, unbuilt layer of the same class and arguments."""
        if isinstance(layer, keras.layers.Lambda):
            return _copy_lambda(layer)
        try:
            config = layer.get_config()
        except NotImplementedError:
            return self._replica(layer)
        if type(layer).__module__.startswith("keras."):
            config = {**config, **own_functions(layer, config)}
        try:
            with keras.saving.custom_object_scope(self.classes):
                new = construct(type(layer), config)
        except Exception as error:
            raise RewriteError(
                f"{type(layer).__name__} {layer.name!r} cannot be rebuilt from its"
                " config",
                got=reason(error),
                expected="a class whose `from_config` takes what `get_config` gives",
                fix="Give it a `get_config` that returns its constructor's arguments",
            ) from error
        _same_names(layer, new)
        return new

    def _replica(self, layer: Any) -> Any:
        """For a custom class without a config: a new object of the class whose
        attributes are copies of the old one's."""
        cls: Any = type(layer)
        new = cls.__new__(cls)
        base = keras.Model if isinstance(layer, keras.Model) else Layer
        base.__init__(
            new, name=layer.name, trainable=layer.trainable, dtype=layer.dtype_policy
        )
        self._copy_attributes(layer, new)
        new.built = layer.built
        private.set_build_shapes(new, private.build_shapes_dict(layer))
        return new

    def _copy_attributes(self, layer: Any, new: Any) -> None:
        theirs = {n: v for n, v in vars(layer).items() if n not in internals()}
        if not theirs:
            return
        inner = list(private.flatten_layers(layer, include_self=False))
        with _unlocked(new):
            for name, value in theirs.items():
                if isinstance(value, keras.Variable) and any(
                    value is v for x in inner for v in transfer.own_variables(x)
                ):
                    self.aliases.append((new, name, value))
                    continue  # until the layer that has it is built
                setattr(new, name, self._attribute(value, layer, new))

    def set_aliases(self) -> None:
        """Sets the attributes that are variables of inner layers, which are built."""
        for holder, name, value in self.aliases:
            mate = _copy_variable(value)
            for old, new in self.memo.values():
                if old.__class__ is not new.__class__ or holder is new:
                    continue
                for v, w in transfer.paired_variables(old, new):
                    mate = w if v is value else mate
            with _unlocked(holder):
                setattr(holder, name, mate)

    def _metric(self, metric: Any) -> Any:
        try:
            with keras.saving.custom_object_scope(self.classes):
                return type(metric).from_config(metric.get_config())
        except Exception:  # one's own, or made of a function: the model does not use it
            return metric

    def _attribute(self, value: Any, old: Any, new: Any) -> Any:
        if isinstance(value, Layer):
            held = self.copy(value)
            held = keras.layers.Identity(name=value.name) if held is None else held
            build_like(value, held)
            return held
        if isinstance(value, keras.Metric):
            return self._metric(value)
        if isinstance(value, keras.Variable):
            return _copy_variable(value)
        if isinstance(value, (list, tuple, dict)):  # as TensorFlow wraps them
            value = getattr(value, "__wrapped__", value)
        if isinstance(value, list):
            value = list(value)  # Keras's own kind of list
        if isinstance(value, (list, set, frozenset, tuple)):
            parts = [self._attribute(v, old, new) for v in value]
            fields = hasattr(value, "_fields")  # a named tuple
            return type(value)(*parts) if fields else type(value)(parts)
        if isinstance(value, dict):
            return {k: self._attribute(v, old, new) for k, v in value.items()}
        if getattr(value, "__self__", None) is old:
            return types.MethodType(value.__func__, new)  # pyright: ignore
        return value

    def _opaque(self, layer: Any) -> Any:
        """A layer whose computation is its own code."""
        new = self._from_config(layer)
        if not isinstance(layer, Layer) or not self._needs_inside(layer):
            return new
        exchanged = {}
        for step, child, slot in children(layer):
            if slot and (id(child) in self.special or self._needs_inside(child)):
                there = self.copy(child)
                if there is None:  # its owner calls it, so something must be there
                    there = keras.layers.Identity(name=child.name)
                exchanged[step] = Exchange(slot.attribute, slot.keys, there)
        put_when_there(new, exchanged.values())
        return remember(new, exchanged)

    # ---------------------------------------------------------------- graphs

    def _sequential(self, model: Any) -> Any:
        layers = [
            _copy_input(x)
            for x in private.held_layers(model)[:1]
            if isinstance(x, keras.layers.InputLayer)
        ]
        layers += [x for x in map(self.copy, model.layers) if x is not None]
        new = keras.Sequential(layers, name=model.name, trainable=model.trainable)
        return self._as_class(model, new)

    def _functional(self, model: Any) -> Any:
        env = {
            id(t): _copy_input(private.keras_history(t).operation).output
            for t in model.inputs
        }
        outputs = {id(t) for t in model.outputs}
        for node in ordered_nodes(model):
            if any(id(t) not in env for t in node.input_tensors):
                continue
            op = node.operation
            args, kwargs = tree.map_structure(
                lambda leaf: env.get(id(leaf), leaf),
                (tuple(node.arguments.args), dict(node.arguments.kwargs)),
            )
            new = self.copy(op)
            if new is None:
                result = args[0] if args else next(iter(kwargs.values()))
                if any(id(t) in outputs for t in node.outputs):
                    # An output is named after its layer; keep one of that name.
                    result = keras.layers.Identity(name=op.name)(result)
            else:
                if id(op) in self.replaced:
                    kwargs = accepted(new, kwargs, op, self.drops.get(id(op), ()))
                result = new(*args, **kwargs)
            results = tree.flatten(result)
            env.update((id(t), r) for t, r in zip(node.outputs, results, strict=True))
        inputs, outputs = tree.map_structure(
            lambda t: env[id(t)],
            (private.inputs_struct(model), private.outputs_struct(model)),
        )
        new = keras.Model(inputs, outputs, name=model.name, trainable=model.trainable)
        return self._as_class(model, new)

    def _as_class(self, model: Any, new: Any) -> Any:
        """Keeps the attributes, and the class of a subclass of Functional or
        Sequential."""
        if new.dtype_policy.name != model.dtype_policy.name:  # the global one is new
            new.dtype_policy = model.dtype_policy
        own = type(model) is not type(new)
        new.__class__ = type(model)
        if own and not _rebuilds_graph(model):
            exchanged = {
                step: Exchange(step, (), self.memo[id(child)][1], graph=True)
                for step, child, slot in children(model)
                if slot is None
                and (id(child) in self.special or self._needs_inside(child))
            }
            new = remember(new, exchanged)
        self._copy_attributes(model, new)
        return new


@contextlib.contextmanager
def _unlocked(layer: Any) -> Iterator[None]:
    """Lets a built layer take attributes that Keras tracks."""
    locked = private.tracker(layer).locked
    private.tracker(layer).unlock()
    try:
        yield
    finally:
        if locked:
            private.tracker(layer).lock()


def _copy_variable(variable: Any) -> Any:
    return keras.Variable(
        keras.ops.copy(variable.value),
        trainable=variable.trainable,
        dtype=variable.dtype,
        name=variable.name,
    )


def accepted(
    layer: Any, kwargs: Mapping[str, Any], old: Any, drops: Iterable[str] = ()
) -> dict[str, Any]:
    """The recorded call keywords that the new layer takes.

    Raises:
        RewriteError: one it does not take had a value other than None.
    """
    parameters = inspect.signature(layer.call).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(kwargs)
    kept = {k: v for k, v in kwargs.items() if k in parameters or k == "training"}
    needless = {*kept, *drops}
    lost = {k: v for k, v in kwargs.items() if k not in needless and v is not None}
    if lost:
        raise RewriteError(
            f"{type(layer).__name__} in place of {old.name!r} does not take the call"
            f" keyword(s) {', '.join(map(repr, lost))} the model passes",
            got={k: getattr(v, "name", v) for k, v in lost.items()},
            expected="a layer whose `call` takes them",
        )
    return kept


def _same_names(old: Any, new: Any) -> None:
    """Layers a constructor makes are named afresh; give them the names they had."""
    if new.name != old.name:
        new.name = old.name
    if isinstance(old, Layer):
        for mine, theirs in paired_children(old, new):
            _same_names(mine, theirs)


def _copy_input(layer: Any) -> Any:
    return keras.layers.InputLayer.from_config(layer.get_config())


def _copy_lambda(layer: Any) -> Any:
    # Its function is here already; going through its config would be unsafe.
    new = keras.layers.Lambda(
        layer.function,
        output_shape=private.output_shape(layer),
        mask=layer.mask,
        arguments=layer.arguments,
        name=layer.name,
        dtype=layer.dtype_policy,
        trainable=layer.trainable,
    )
    return new


def custom_objects_of(site_map: SiteMap) -> dict[str, Any]:
    """Custom classes and functions of a model, by the names configs use."""
    found = {}
    for layer in [site_map.model, *(s.layer for s in site_map)]:
        for x in (layer, *vars(layer).values()):
            x = x if isinstance(x, (type, types.FunctionType)) else type(x)
            x = vars(x).get("_original", x)
            if not x.__module__.startswith(("keras.", "builtins", "tensorflow.")):
                found[x.__name__] = x
                found[keras.saving.get_registered_name(x)] = x
    return found


def _rebuilds_graph(model: Any) -> bool:
    """Whether the class's own config holds the graph (`inputs`, `outputs`)."""
    if isinstance(model, keras.Sequential):
        return type(model).get_config is keras.Sequential.get_config
    return type(model).get_config is private.Functional.get_config and (
        private.functional_like_constructor(type(model))
    )
