"""What a model was compiled with: optimizer and its state, loss, metrics."""

from __future__ import annotations

import re
import warnings
from typing import Any

import keras
import numpy as np

from rewriters.formats.saved import Array, Saved


_OPTIMIZER_WORDS = {"lr": "learning_rate"}
# Order in which Keras 2's optimizers kept a variable's slots, by what `keras.ops`
# optimizers call theirs.
_SLOTS = {
    "SGD": ["momentums"],
    "Adam": ["_momentums", "_velocities", "_velocity_hats"],
    "AdamW": ["_momentums", "_velocities", "_velocity_hats"],
    "Nadam": ["_momentums", "_velocities"],
    "Adamax": ["_m", "_u"],
    "RMSprop": ["_velocities", "_momentums", "_average_gradients"],
    "Adagrad": ["_accumulators"],
    "Adadelta": ["_accumulated_grads", "_accumulated_delta_vars"],
}


def restore(model: Any, saved: Saved, custom_objects: dict[str, Any]) -> None:
    """Compiles `model` as it was; what cannot be restored is told in one warning."""
    if saved.training is None or not _optimizer_entry(saved.training):
        return
    lost = []
    with keras.saving.custom_object_scope(custom_objects):
        try:
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
    if saved.optimizer and not _restore_state(model, saved):
        lost.append("the optimizer's state")
    if lost:
        warnings.warn(
            f"The model is compiled without {', '.join(lost)}, "
            "which Keras 3 cannot restore from this file.",
            stacklevel=4,
        )


def _optimizer_entry(training: dict[str, Any]) -> Any:
    return training.get("optimizer_config") or training.get("optimizer")


def _optimizer(entry: Any) -> keras.optimizers.Optimizer:
    if isinstance(entry, str):
        return keras.optimizers.get(entry)
    name = entry["class_name"].rpartition(">")[2]
    config = dict(entry.get("config") or {})
    if name == "LossScaleOptimizer":  # Keras 3 wraps by the policy when it compiles
        return _optimizer(config.get("inner_optimizer") or config["optimizer"])
    cls = getattr(keras.optimizers, name)
    config = {_OPTIMIZER_WORDS.get(k, k): v for k, v in config.items()}
    rate, decay = config.get("learning_rate"), config.pop("decay", None)
    if isinstance(rate, dict) and "class_name" in rate:
        plain = {"class_name": rate["class_name"], "config": rate["config"]}
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
    module = keras.losses if hasattr(keras.losses, name) else keras.metrics
    return getattr(module, name)(**config)


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
        slots = _slots(optimizer)
        steps, arrays = _steps(saved.optimizer)
        by_slot = _by_slot(arrays, len(slots), variables)
    except Exception:
        return False
    if by_slot is None:
        return False
    values = []
    index = {id(v): i for i, v in enumerate(model.trainable_variables)}
    for slot, stored in zip(slots, by_slot, strict=True):
        for variable, array in zip(variables, stored, strict=True):
            target = slot[index[id(variable)]]
            if tuple(target.shape) != array.shape:
                return False
            values.append((target, array))
    for target, array in values:
        target.assign(array.read())
    if steps is not None:
        optimizer.iterations.assign(int(np.asarray(steps.read()).reshape(())))
    return True


def _slots(optimizer: Any) -> list[list[Any]]:
    names = _SLOTS[type(optimizer).__name__]
    found = [getattr(optimizer, n, None) for n in names]
    return [list(s) for s in found if s]


def _stored_order(model: Any, saved: Saved) -> list[Any]:
    """Trainable variables in the order of the file's layers."""
    layers = {layer.name: layer for layer in model.layers}
    ordered = [
        v
        for name in saved.layers
        if name in layers
        for v in layers[name].trainable_variables
    ]
    return list({id(v): v for v in ordered}.values())


def _steps(arrays: list[Array]) -> tuple[Array | None, list[Array]]:
    steps = [a for a in arrays if a.shape == () and re.search("iter", a.name)]
    return (steps[0] if steps else None), [a for a in arrays if a.shape != ()]


def _by_slot(arrays: list[Array], count: int, variables: list[Any]) -> Any:
    """Splits the arrays by slot: whole slots one after another, or interleaved."""
    size = len(variables)
    if count == 0:
        return [] if not arrays else None
    if len(arrays) > count * size:  # Keras kept one placeholder per variable
        arrays = [a for a in arrays if a.shape != (1,)]
    if len(arrays) != count * size:
        return None
    shapes = [tuple(v.shape) for v in variables]
    blocks = [arrays[i * size : (i + 1) * size] for i in range(count)]
    strided = [arrays[i::count] for i in range(count)]
    # Keras 2.11 and later name an array "Adam/m/dense/kernel", and interleave.
    new = all(re.match(r"[A-Za-z]+/[a-z_]+/.+/.+", a.name) for a in arrays)
    new = new and not arrays[0].name.startswith("training/")
    order = [strided, blocks] if new else [blocks, strided]
    fitting = [s for s in order if all([a.shape for a in b] == shapes for b in s)]
    return fitting[0] if fitting else None
