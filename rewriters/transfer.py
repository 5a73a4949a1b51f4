"""What a model has learnt, carried over by identity: weights, flags, optimizer slots.

Nothing is matched by its position in a flat list of the whole model, which shifts as
soon as one layer gains or loses a variable.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from rewriters import private
from rewriters.errors import RewriteError, reason
from rewriters.holders import children, paired_children


Pairs = Mapping[int, tuple[Any, Any]]


def copy_weights(pairs: Pairs, skip: set[int] = frozenset()) -> None:  # type: ignore
    """Copies weights, vocabularies and `trainable` flags from old layers to new.

    Args:
        pairs: `id(old) -> (old, new)`; layers inside them are paired by where their
            owners hold them.
        skip: ids of old layers whose counterpart is of another kind.

    Raises:
        RewriteError: a variable has no counterpart of the same shape.
    """
    for old, new in paired_layers(pairs, skip):
        if old.trainable != new.trainable:
            new.trainable = old.trainable
        _adapt(old, new)
        for v, w in paired_variables(old, new):
            if old.trainable and not v.trainable and w.trainable:
                w.trainable = False  # one variable is frozen by itself
            if v.shape != w.shape:
                raise RewriteError(
                    f"the copy of {old.name!r} has another weight shape",
                    got=f"{w.path} {tuple(w.shape)}",
                    expected=f"{tuple(v.shape)}",
                )
            assign(w, v)
        finalize(new)
        _copy_vocabulary(old, new)


def _adapt(old: Any, new: Any) -> None:
    """Quantizes a copy and gives it LoRA as was done to the original after it was
    made: where an owner constructs the layer, no config tells."""
    mode = getattr(old, "quantization_mode", None)
    if mode and not getattr(new, "quantization_mode", None):
        settings = getattr(old, "quantization_config", None)
        new.quantize(mode, **({"config": settings} if settings else {}))
    if getattr(old, "lora_enabled", False) and not getattr(new, "lora_enabled", False):
        new.enable_lora(old.lora_rank, lora_alpha=old.lora_alpha)


def finalize(layer: Any) -> None:
    """Makes an adapted normalization use its variables, once these have values."""
    if isinstance(layer, keras.layers.Normalization):
        layer.finalize_state()


def _copy_vocabulary(old: Any, new: Any) -> None:
    """A vocabulary that was adapted is neither a variable nor in the config."""
    lookups = (keras.layers.StringLookup, keras.layers.IntegerLookup)
    if not isinstance(old, lookups) or not int(old.lookup_table.size()):
        return
    words, weights = old.get_vocabulary(), None
    if old.output_mode == "tf_idf":  # they may be padded
        weights = old.idf_weights_const.numpy()[: len(words)]
    new.set_vocabulary(words, weights)


def paired_layers(
    pairs: Pairs,
    skip: set[int] = frozenset(),  # type: ignore
) -> Iterator[tuple[Any, Any]]:
    """All pairs of layers, owners before what they hold, each once."""
    done: set[int] = set(skip)

    def visit(old: Any, new: Any) -> Iterator[tuple[Any, Any]]:
        if id(old) in done or new is None or not isinstance(old, keras.layers.Layer):
            return
        done.add(id(old))
        yield old, new
        held = {id(a): b for a, b in paired_children(old, new)}
        for _, child, _ in children(old):
            mate = pairs[id(child)][1] if id(child) in pairs else held.get(id(child))
            yield from visit(child, mate)

    # A model comes after its layers in the order of copying.
    for old, new in reversed(list(pairs.values())):
        yield from visit(old, new)


def paired_variables(old: Any, new: Any) -> Iterator[tuple[Any, Any]]:
    """The variables of two layers of one class, those of inner layers left out."""
    ours, theirs = own_variables(old), own_variables(new)
    if len(ours) != len(theirs):
        if not ours:
            return  # never built; nothing learnt
        raise RewriteError(
            f"the copy of {old.name!r} has another number of weights",
            got=len(theirs),
            expected=f"{len(ours)}",
            fix="Give its class a `build` that creates them, or call the model once",
        )
    names = [v.name for v in ours]
    if len(set(names)) == len(names) and {v.name for v in theirs} == set(names):
        by_name = {v.name: v for v in theirs}
        yield from ((v, by_name[v.name]) for v in ours)
    else:
        yield from zip(ours, theirs, strict=True)


def assign(new: Any, old: Any) -> None:
    """Gives a variable the value of another, in memory of its own: training on JAX
    donates the buffers of the variables it updates."""
    new.assign(keras.ops.copy(old.value))


def own_variables(layer: Any) -> list[Any]:
    """Variables the layer holds itself, random state included."""
    seeds = [g.state for g in private.seed_generators(layer)]
    return [*private.own_variables(layer), *seeds]


def _all_variables(pairs: Pairs, skip: set[int]) -> Iterator[tuple[Any, Any]]:
    for old, new in paired_layers(pairs, skip):
        yield from paired_variables(old, new)


def copy_compile_state(old: Any, new: Any, pairs: Pairs, skip: set[int]) -> None:
    """Compiles the new model like the old one and carries optimizer slots over.

    Slots follow their variables; a variable that is new starts with fresh ones. An
    optimizer that knows more of its model than the variables has a method
    `for_model(new, old)`, which gives its like for another model.
    """
    if not getattr(old, "compiled", False):
        return
    arguments = _compile_arguments(old)
    if arguments is None:
        return
    optimizer = arguments.get("optimizer")
    if isinstance(optimizer, keras.optimizers.Optimizer):
        arguments["optimizer"] = _for_model(old.optimizer, optimizer, new, old)
    if not _compile(new, arguments, old):
        return
    if old.optimizer is None:
        return
    variables = list(_all_variables(pairs, skip))
    _copy_exclusions(old.optimizer, new.optimizer, variables)
    if old.optimizer.built:
        new.optimizer.build(new.trainable_variables)
        mates = {id(v): w for v, w in variables}
        _copy_slots(old.optimizer, new.optimizer, mates)


def _compile(new: Any, arguments: dict[str, Any], old: Any) -> bool:
    own = type(old).compile is not keras.Model.compile
    if not own:
        # What Keras wraps by itself for float16 is in `arguments` already.
        arguments["auto_scale_loss"] = False
    try:
        new.compile(**arguments)
    except Exception as error:
        if not own:
            raise
        warnings.warn(
            f"The new model is not compiled: {type(old).__name__}.compile takes other "
            f"arguments than Keras's ({reason(error)}).",
            stacklevel=5,
        )
        return False
    return True


def _for_model(used: Any, copy: Any, new: Any, old: Any) -> Any:
    """`copy`, of an optimizer that was used, or what it wants to be for `new`."""
    if hasattr(used, "for_model"):
        return used.for_model(new, old)
    inner = getattr(used, "inner_optimizer", None)
    if inner is None:
        return copy
    if type(copy) is not type(used):  # Keras wrapped it when it compiled
        copy = type(used)(copy)
    copy.inner_optimizer = _for_model(inner, copy.inner_optimizer, new, old)
    return copy


def _compile_arguments(model: Any) -> dict[str, Any] | None:
    try:
        config = model.get_compile_config()
    except Exception as error:  # of a class of one's own, such as a schedule
        warnings.warn(
            f"The new model is not compiled: what the old one was compiled with has no "
            f"config ({reason(error)}).",
            stacklevel=5,
        )
        return None
    raw = private.compile_config(model, None)
    raw = dict(raw.config) if raw is not None else {}
    if not config:
        return None

    def fresh(name: str, value: Any) -> Any:
        """A copy through its config; what has none (a plain function) as it is."""
        try:
            return keras.saving.deserialize_keras_object(value)
        except Exception:
            if isinstance(raw.get(name), keras.optimizers.Optimizer):
                raise  # it belongs to one model
            return raw.get(name)

    try:
        with keras.saving.custom_object_scope(_classes_of(raw)):
            return {name: fresh(name, value) for name, value in config.items()}
    except Exception as error:
        warnings.warn(
            f"The new model is not compiled: the old one's optimizer cannot be made "
            f"again from its config ({reason(error)}).",
            stacklevel=5,
        )
        return None


def _classes_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    values = keras.tree.flatten(dict(raw))
    for value in values:  # which grows
        if isinstance(value, keras.optimizers.Optimizer):
            inner = getattr(value, "inner_optimizer", None)
            values += [private.learning_rate(value, None), inner]
        cls = value if callable(value) and hasattr(value, "__name__") else type(value)
        if not cls.__module__.startswith(("keras.", "builtins")):
            found[cls.__name__] = cls
            found[keras.saving.get_registered_name(cls)] = cls
    return found


def _copy_exclusions(old: Any, new: Any, variables: list[tuple[Any, Any]]) -> None:
    """What `exclude_from_weight_decay` told an optimizer, which no config has."""
    old, new = innermost(old), innermost(new)
    told = private.decay_exclusions(old)
    if told is None:
        return
    excluded, pattern = told
    keys = {
        private.variable_key(new, w)
        for v, w in variables
        if private.variable_key(old, v) in excluded
    }
    private.set_decay_exclusions(new, keys, pattern)


def innermost(optimizer: Any) -> Any:
    """The optimizer that makes the steps, within those that wrap it."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def _copy_slots(old: Any, new: Any, mates: Mapping[int, Any]) -> None:
    """Copies an optimizer's state: lists of one entry per trainable variable follow
    the variables, single variables are copied, inner optimizers are visited."""
    inner = getattr(old, "inner_optimizer", None)
    if type(old) is not type(new) and inner is not None:
        old = inner  # the new model has no use for what was around it
    ours, theirs = private.trainable_variables(old), private.trainable_variables(new)
    place = {id(w): k for k, w in enumerate(theirs)}
    where = [place.get(id(mates.get(id(v)))) for v in ours]
    for name, value in vars(old).items():
        mine = getattr(new, name, None)
        if name in ("_trainable_variables", "_variables") or mine is None:
            continue
        if isinstance(value, keras.Variable):
            assign(mine, value)
        elif isinstance(value, keras.optimizers.Optimizer):
            _copy_slots(value, mine, mates)
        elif isinstance(value, list) and len(value) == len(ours):
            for slot, k in zip(value, where, strict=True):
                if k is not None and isinstance(slot, keras.Variable):
                    if slot.shape == mine[k].shape:
                        assign(mine[k], slot)
    if isinstance(private.learning_rate(old, None), keras.Variable):
        assign(private.learning_rate(new), private.learning_rate(old))
    if not ours:
        warnings.warn(
            "The optimizer held no variables; it starts afresh.", stacklevel=3
        )


def renew_averages(new: Any, pairs: Pairs, skip: set[int]) -> None:
    """Lets an optimizer's averages of weights (`use_ema`) begin anew where a weight of
    the new model is not that of the old one: `fit` puts the averages in their place."""
    optimizer = getattr(new, "optimizer", None)
    while optimizer is not None:
        averages = private.moving_averages(optimizer, None)
        if averages:
            before = {id(w): v for v, w in _all_variables(pairs, skip)}
            weights = private.trainable_variables(optimizer)
            for w, average in zip(weights, averages, strict=True):
                if average is None:  # of a state that the gradient overwrites
                    continue
                v = before.get(id(w))
                if v is None or not keras.ops.all(keras.ops.equal(v.value, w.value)):
                    assign(average, w)
        optimizer = getattr(optimizer, "inner_optimizer", None)
