"""What a model was compiled with: optimizer and its state, loss, metrics."""

from __future__ import annotations

import re
import warnings
from typing import Any

import keras
import numpy as np

from rewriters import private
from rewriters.formats import trust
from rewriters.formats.pairing import pair
from rewriters.formats.saved import Array, Saved
from rewriters.formats.spec import safe_name


_OPTIMIZER_WORDS = {"lr": "learning_rate"}
# An optimizer's slots by the names that files give them, in the order in which
# Keras 2.11 and later made them; those of one group, for each variable in turn.
_SLOTS: dict[str, list[dict[str, str]]] = {
    "SGD": [{"momentums": "m momentum"}],
    "Adam": [{"_momentums": "m", "_velocities": "v"}, {"_velocity_hats": "vhat"}],
    "AdamW": [{"_momentums": "m", "_velocities": "v"}, {"_velocity_hats": "vhat"}],
    "Nadam": [{"_momentums": "m", "_velocities": "v"}],
    "Adamax": [{"_m": "m", "_u": "u v"}],
    "RMSprop": [
        {"_velocities": "velocity rms"},
        {"_momentums": "momentum"},
        {"_average_gradients": "average_gradient mg"},
    ],
    "Adagrad": [{"_accumulators": "accumulator"}],
    "Adadelta": [
        {
            "_accumulated_grads": "accumulated_grad accum_grad",
            "_accumulated_delta_vars": "accumulated_delta_var accum_var",
        }
    ],
    "Ftrl": [{"_accumulators": "accumulator", "_linears": "linear"}],
    "Lion": [{"_momentums": "m"}],
}
_AVERAGES = {"_model_variables_moving_average": "average"}


def restore(model: Any, saved: Saved, custom_objects: dict[str, Any]) -> None:
    """Compiles `model` as it was; what cannot be restored is told in one warning."""
    if saved.training is None or not _optimizer_entry(saved.training):
        return
    lost = []
    with (
        private.safe_mode_scope(True),
        keras.saving.custom_object_scope(custom_objects),
    ):
        try:
            trust.check_training(saved.training, custom_objects)
            optimizer = _optimizer(_optimizer_entry(saved.training))
        except Exception:  # whatever a stored config breaks, the model stands
            warnings.warn(
                "The model is not compiled: its optimizer could not be restored.",
                stacklevel=4,
            )
            return
        arguments: dict[str, Any] = {"optimizer": optimizer}
        for key in ("loss", "loss_weights", "metrics", "weighted_metrics"):
            stored = saved.training.get(key)
            try:
                if stored is not None:
                    arguments[key] = _named(stored)
                    _check(key, arguments[key])
            except Exception:
                arguments.pop(key, None)
                lost.append(key)
        try:
            model.compile(**arguments)
        except Exception:
            warnings.warn(
                "The model is not compiled: its loss and metrics do not fit it.",
                stacklevel=4,
            )
            return
    # As Keras does when it loads: an optimizer saved unbuilt does not load again.
    model.optimizer.build(model.trainable_variables)
    if not _restore_state(model, saved) if saved.optimizer else _keeps_none(saved):
        lost.append("the optimizer's state")
    if lost:
        warnings.warn(
            f"The model is compiled without {', '.join(lost)}, "
            "which Keras 3 cannot restore from this file.",
            stacklevel=4,
        )


def _keeps_none(saved: Saved) -> bool:
    """Whether it is an archive with a legacy optimizer, whose state Keras 2 omitted."""
    entry = saved.training and _optimizer_entry(saved.training)
    module = entry.get("module") if isinstance(entry, dict) else None
    return saved.tree is not None and "legacy" in str(module)


def _optimizer_entry(training: dict[str, Any]) -> Any:
    return training.get("optimizer_config") or training.get("optimizer")


def _optimizer(entry: Any) -> keras.optimizers.Optimizer:
    if isinstance(entry, str):
        return keras.optimizers.get(entry)
    name = entry["class_name"].rpartition(">")[2]
    config = dict(entry.get("config") or {})
    if name == "LossScaleOptimizer":  # Keras 3 wraps by the policy when it compiles
        return _optimizer(config.get("inner_optimizer") or config["optimizer"])
    cls = _class(keras.optimizers, name, keras.optimizers.Optimizer)
    config = {_OPTIMIZER_WORDS.get(k, k): v for k, v in config.items()}
    rate, decay = config.get("learning_rate"), config.pop("decay", None)
    if isinstance(rate, dict) and "class_name" in rate:
        inner = {k: v for k, v in rate["config"].items() if v is not None}
        plain = {"class_name": rate["class_name"], "config": inner}
        config["learning_rate"] = keras.optimizers.schedules.deserialize(plain)
    elif rate is not None and decay:
        config["learning_rate"] = keras.optimizers.schedules.InverseTimeDecay(
            float(rate), decay_steps=1, decay_rate=float(decay)
        )
    known = cls.__init__.__code__.co_varnames
    if "epsilon" in config and config["epsilon"] is None:
        del config["epsilon"]
    return cls(**{str(k): v for k, v in config.items() if k in known and k != "self"})


def _named(stored: Any) -> Any:
    """Losses and metrics in any structure, serialized ones as names or objects."""
    if isinstance(stored, (list, tuple)):
        return [_named(v) for v in stored]
    if not isinstance(stored, dict):
        return stored
    if "class_name" not in stored:
        return {k: _named(v) for k, v in stored.items()}
    name, config = stored["class_name"], stored.get("config")
    if name == "__tuple__":
        return [_named(v) for v in stored["items"]]
    if name == "function":
        return config
    config = {k: v for k, v in (config or {}).items() if k != "fn" or "Wrap" in name}
    if name in ("MeanMetricWrapper", "LossFunctionWrapper"):
        return _named(config.get("fn"))
    if config.get("reduction") == "auto":
        config["reduction"] = "sum_over_batch_size"
    if isinstance(getattr(keras.losses, name, None), type):
        return _class(keras.losses, name, keras.losses.Loss)(**config)
    return _class(keras.metrics, name, keras.metrics.Metric)(**config)


def _class(module: Any, name: str, base: type) -> Any:
    """A class of Keras by its name in a file, which may be any other name of it."""
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{name!r} is not one of {module.__name__}")
    return found


def _check(key: str, value: Any) -> None:
    get = {"loss": keras.losses.get, "metrics": keras.metrics.get}.get(key)
    for item in keras.tree.flatten(value):
        known = item in ("accuracy", "acc", "crossentropy", "ce")
        if get is not None and isinstance(item, str) and not known:
            get(item)


def _restore_state(model: Any, saved: Saved) -> bool:
    """Gives the optimizer its stored slots; False where they do not fit."""
    try:
        optimizer = model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        variables = _stored_order(model, saved)
        groups = _groups(optimizer)
        steps, arrays = _steps(saved.optimizer)
        count = 0 if steps is None else int(np.asarray(steps.read()).reshape(()))
        if not arrays and not count:  # it had not begun
            return True
        found = _by_name(groups, arrays, variables)
        if found is None:
            found = _by_order(groups, arrays, variables, saved.tree is not None)
        index = {id(v): i for i, v in enumerate(model.trainable_variables)}
        pairs = [(slot[index[id(v)]], array) for slot, v, array in found]
        if any(tuple(target.shape) != array.shape for target, array in pairs):
            return False
        values = [array.read() for _, array in pairs]
    except Exception:  # training state never stands in the model's way
        return False
    for (target, _), value in zip(pairs, values, strict=True):
        target.assign(value)
    optimizer.iterations.assign(count)
    if isinstance(optimizer, keras.optimizers.Nadam):  # follows from the steps
        rates = optimizer.beta_1 * (1 - 0.5 * 0.96 ** np.arange(1, count + 1))
        private.product_of_rates(optimizer).assign(np.prod(rates))
    return True


def _groups(optimizer: Any) -> list[list[tuple[Any, set[str]]]]:
    """The slots that the file may hold, with their names, as `_SLOTS` groups them."""
    groups = [
        [(k, getattr(optimizer, k, None), set(names.split())) for k, names in g.items()]
        for g in (_AVERAGES, *_SLOTS[type(optimizer).__name__])
    ]
    # Keras 2 kept momentums even where the momentum is 0.
    return [
        [(slot, names) for k, slot, names in g if slot or k == "momentums"]
        for g in groups
    ]


def _stored_order(model: Any, saved: Saved) -> list[Any]:
    """Trainable variables in the order of the file's layers."""
    layers = {layer.name: layer for layer in model.layers}
    names = list(saved.layers)
    if saved.tree is not None:
        entries = saved.config["config"]["layers"]
        names = [safe_name(e["config"]["name"]) for e in entries]
    ordered = [v for n in names if n in layers for v in layers[n].trainable_variables]
    return list({id(v): v for v in ordered}.values())


def _steps(arrays: list[Array]) -> tuple[Array | None, list[Array]]:
    steps = [a for a in arrays if a.shape == () and re.search("iter|^0$", a.name)]
    return (steps[0] if steps else None), [a for a in arrays if a.shape != ()]


def _by_name(groups: Any, arrays: list[Array], variables: list[Any]) -> Any:
    """(slot, variable, array) by the name of each array, None where these have none.

    It is `Adam/dense/kernel/m`, and since Keras 2.11 `Adam/m/dense/kernel`.
    """
    slots = [slot for group in groups for slot in group]
    known = {name for _, names in slots for name in names}
    for place in (-1, 1):
        named: dict[str, list[Array]] = {}
        for a in arrays:
            parts = a.name.removesuffix(":0").split("/")
            name = parts.pop(place) if len(parts) > 2 else ""
            named.setdefault(name, []).append(Array("/".join(parts), a.shape, a.read))
        if known.issuperset(named):
            return [
                (slot, variable, array)
                for slot, names in slots
                if slot
                for variable, array in pair(
                    variables,
                    [a for name in names for a in named.get(name, ())],
                    "the optimizer",
                )
            ]
    return None


def _by_order(
    groups: Any, arrays: list[Array], variables: list[Any], grouped: bool
) -> Any:
    """(slot, variable, array) by place: whole slots one after another, or grouped."""
    slots = [slot for group in groups for slot, _ in group]
    if grouped:
        order = [(slot, v) for g in groups for v in variables for slot, _ in g]
    else:
        order = [(slot, v) for slot in slots for v in variables]
    if len(arrays) > len(order):  # Keras kept one placeholder per variable
        arrays = [a for a in arrays if a.shape != (1,)]
    found = zip(order, arrays, strict=True)
    return [(slot, v, a) for (slot, v), a in found if slot]
