"""Layer arguments of Keras 2, rewritten for Keras 3."""

from __future__ import annotations

import inspect
from typing import Any

import keras

from rewriters.formats.layers import hard_sigmoid_2


_CLASSES = {
    "CuDNNLSTM": "LSTM",
    "CuDNNGRU": "GRU",
    "ThresholdedReLU": "ReLU",
    "Model": "Functional",
    "Network": "Functional",
    "Container": "Functional",
    "GroupedQueryAttention": "GroupQueryAttention",
}
_WORDS = {
    "LeakyReLU": {"alpha": "negative_slope"},
    "ThresholdedReLU": {"theta": "threshold"},
    "CategoryEncoding": {"max_tokens": "num_tokens"},
    "Conv1DTranspose": {},
}
# What a missing argument meant when the file was written, where Keras 3 differs.
_DEFAULTS = {"GRU": {"reset_after": False}, "GRUCell": {"reset_after": False}}
_FIXED = {
    "CuDNNLSTM": {"activation": "tanh", "recurrent_activation": "sigmoid"},
    "CuDNNGRU": {
        "activation": "tanh",
        "recurrent_activation": "sigmoid",
        "reset_after": True,
    },
}
# Arguments without a Keras 3 counterpart that change no output at inference.
_HARMLESS = frozenset(
    "implementation batch_input_shape batch_shape input_shape input_dtype "
    "input_length input_dim ragged sparse fused renorm_momentum virtual_batch_size "
    "adjustment num_constants autocast build_input_shape expects_training_arg "
    "query_shape key_shape value_shape kernel_initializer kernel_regularizer "
    "kernel_constraint filters activity_regularizer has_arg force_generator "
    "vocabulary_size idf_weights ragged_output output_shape pad_to_max_tokens "
    "rng_type trainable dtype name".split()
)
_NEUTRAL: tuple[Any, ...] = (None, False, "", [], {}, 0, 0.0, 1, [1, 1], [1])


def modernize(kind: str, config: dict[str, Any], generation: int):
    """Returns (Keras 3 class name, arguments) of a stock layer of Keras 2."""
    config = {**_DEFAULTS.get(kind, {}), **config, **_FIXED.get(kind, {})}
    words = _WORDS.get(kind, {})
    config = {words.get(k, k): v for k, v in config.items()}
    if isinstance(config.get("axis"), (list, tuple)) and len(config["axis"]) == 1:
        config["axis"] = int(config["axis"][0])
        if kind == "BatchNormalization" and config.get("virtual_batch_size"):
            # It was stored as an axis of the batch cut into virtual ones.
            config["axis"] -= config["axis"] > 0
    if kind == "Discretization" and "int" in str(policy(config.get("dtype"))):
        del config["dtype"]  # its output's; Keras 3 casts the inputs to it
    if kind == "BatchNormalization" and not config.get("renorm"):
        config = {k: v for k, v in config.items() if not k.startswith("renorm")}
    return _CLASSES.get(kind, kind), values(config, generation)


def values(config: dict[str, Any], generation: int) -> dict[str, Any]:
    """Returns `config` with activations, initializers and policies made readable."""
    new = {}
    for key, value in config.items():
        if isinstance(value, dict) and value.get("type") == "ndarray":
            value = value.get("value")
        if key == "dtype":
            value = policy(value)
            if value is None:
                continue
        elif key in ("activation", "recurrent_activation"):
            value = activation(value, generation)
        elif key.endswith("_initializer"):
            value = _initializer(value)
            if value is None:
                continue
        elif key.endswith(("_regularizer", "_constraint")):
            value = _plain_object(value)
        new[key] = value
    return new


def policy(value: Any) -> Any:
    """The name of a dtype policy, however it was written; None to inherit it."""
    if isinstance(value, dict):
        inner = value.get("config")
        quantized = isinstance(inner, dict) and "mode" in inner
        if quantized or value.get("class_name") == "DTypePolicyMap":
            return value
        value = inner.get("name") if isinstance(inner, dict) else None
    return None if value in (None, "infer", "_infer") else value


def activation(value: Any, generation: int) -> Any:
    """An activation as Keras 3 knows it, told apart by the Keras that wrote it."""
    value = activation_name(value) or value
    if value == "hard_sigmoid" and generation < 3:
        return hard_sigmoid_2
    renamed = {
        "swish_impl": "silu",
        "sigmoid_v2": "sigmoid",
        "log_softmax_v2": "log_softmax",
    }
    return renamed.get(str(value), value)


def activation_name(value: Any) -> str | None:
    """The name under which a function is stored, if `value` is one."""
    if isinstance(value, dict) and value.get("class_name") == "function":
        value = value.get("config")
    return value if isinstance(value, str) else None


def _plain_object(value: Any) -> Any:
    """A serialized object without the fields that tie it to one version of Keras."""
    if not isinstance(value, dict) or "class_name" not in value:
        return value
    config = value.get("config")
    if isinstance(config, dict):
        config = {k: v for k, v in config.items() if k != "dtype"}
    return {"class_name": value["class_name"], "config": config or {}}


_INITIALIZERS = {
    "normal": "random_normal",
    "uniform": "random_uniform",
    "one": "ones",
    "zero": "zeros",
}


def _initializer(value: Any) -> Any:
    """The initializer, or None: stored weights replace what it would have made."""
    if isinstance(value, str):
        value = _INITIALIZERS.get(value, value)
    value = _plain_object(value)
    if isinstance(value, dict) and value["config"].get("distribution") == "normal":
        config = {**value["config"], "distribution": "truncated_normal"}
        value = {**value, "config": config}
    try:
        keras.initializers.get(value)
    except (ValueError, TypeError):
        return None
    return value


def fit(cls: type, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits `config` in arguments that `cls` takes and those it lost with Keras 3.

    Those that change nothing at inference are left out of both.
    """
    known = _parameters(cls)
    if known is None:
        return config, {}
    if "vocabulary" in known:
        known |= {"vocabulary_size"}  # taken, though in no signature
    kept = {k: v for k, v in config.items() if k in known}
    lost = {
        k: v
        for k, v in config.items()
        if k not in known and k not in _HARMLESS and not _is_neutral(v)
    }
    return kept, lost


def _is_neutral(value: Any) -> bool:
    return any(type(value) is type(n) and value == n for n in _NEUTRAL)


def _parameters(cls: type) -> frozenset[str] | None:
    """Names of the arguments of a stock class, None where they cannot be told."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())
        names |= {p.name for p in parameters[1:] if p.kind is not p.VAR_KEYWORD}
        if base is keras.layers.Layer:
            break
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return frozenset(names)
