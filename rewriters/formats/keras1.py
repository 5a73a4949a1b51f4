"""Layer arguments of Keras 1, rewritten in the words of Keras 2."""

from __future__ import annotations

import re
from typing import Any


_CLASSES = {
    "Convolution1D": "Conv1D",
    "Convolution2D": "Conv2D",
    "Convolution3D": "Conv3D",
    "AtrousConvolution1D": "Conv1D",
    "AtrousConvolution2D": "Conv2D",
    "AtrousConv1D": "Conv1D",
    "AtrousConv2D": "Conv2D",
    "Deconvolution2D": "Conv2DTranspose",
    "Deconv2D": "Conv2DTranspose",
    "SeparableConvolution2D": "SeparableConv2D",
    "SeparableConv2D": "SeparableConv2D",
}
_WORDS = {
    "output_dim": "units",
    "nb_filter": "filters",
    "subsample": "strides",
    "subsample_length": "strides",
    "border_mode": "padding",
    "bias": "use_bias",
    "init": "kernel_initializer",
    "inner_init": "recurrent_initializer",
    "inner_activation": "recurrent_activation",
    "W_regularizer": "kernel_regularizer",
    "U_regularizer": "recurrent_regularizer",
    "b_regularizer": "bias_regularizer",
    "W_constraint": "kernel_constraint",
    "b_constraint": "bias_constraint",
    "dropout_W": "dropout",
    "dropout_U": "recurrent_dropout",
    "filter_length": "kernel_size",
    "atrous_rate": "dilation_rate",
    "pool_length": "pool_size",
    "stride": "strides",
    "length": "size",
    "p": "rate",
    "sigma": "stddev",
    "beta_init": "beta_initializer",
    "gamma_init": "gamma_initializer",
}
_MERGES = {
    "sum": "Add", "mul": "Multiply", "ave": "Average", "max": "Maximum",
    "min": "Minimum", "concat": "Concatenate", "dot": "Dot", "cos": "Dot",
}  # fmt: skip
_UNUSED = (
    "consume_less", "forget_bias_init", "input_dim", "input_length", "input_dtype",
    "weights", "arguments", "output_mask", "output_mask_type", "mode_type",
)  # fmt: skip


def modernize(kind: str, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the Keras 2 class name and arguments of a Keras 1 layer."""
    if kind == "Merge":
        return _merge(config)
    if kind == "TimeDistributedDense":
        kind = "Dense"  # a dense layer acts on the last axis, at every step
    config = dict(config)
    embedding = kind == "Embedding"
    new = {}
    for key, value in config.items():
        keep = embedding and key in ("input_dim", "output_dim")
        if key in _UNUSED and not keep and kind != "Lambda":
            continue
        if embedding and key in ("init", "W_regularizer", "W_constraint", "dropout"):
            key = _WORDS.get(key, key).replace("kernel", "embeddings")
            if key == "dropout":
                continue
        elif kind == "PReLU" and key == "init":
            key = "alpha_initializer"
        elif kind == "RepeatVector" or kind == "Permute":
            pass
        elif not keep:
            key = _WORDS.get(key, key)
        new[key] = value
    if "LSTM" in kind and new.pop("unit_forget_bias", None) is None:
        new["unit_forget_bias"] = config.get("forget_bias_init", "one") == "one"
    if kind == "GRU":
        new["reset_after"] = False
    if "dim_ordering" in new:
        order = new.pop("dim_ordering")
        first = order == "th"
        if order in ("th", "tf"):
            new["data_format"] = "channels_first" if first else "channels_last"
    spatial = [new.pop(k) for k in config if k.startswith(("nb_row", "nb_col"))]
    spatial += [new.pop(k) for k in sorted(new) if k.startswith("kernel_dim")]
    if len(spatial) > 1:
        new["kernel_size"] = spatial
    if kind == "Deconvolution2D" or kind == "Deconv2D":
        new.pop("output_shape", None)
    if kind == "BatchNormalization" and new.get("mode") == 1:
        new["mode"] = "1, within each sample"
    if kind == "ZeroPadding2D" and len(new.get("padding") or ()) == 4:
        top, bottom, left, right = new["padding"]
        new["padding"] = [[top, bottom], [left, right]]
    for key, value in new.items():
        if key.endswith("_regularizer") and isinstance(value, dict):
            new[key] = _regularizer(value)
        elif key.endswith("_constraint") and isinstance(value, dict):
            new[key] = _constraint(value)
    return _CLASSES.get(kind, kind), new


def _merge(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    mode = config.get("mode")
    new = {k: config[k] for k in ("name", "trainable", "layers") if k in config}
    if mode == "concat":
        new["axis"] = config.get("concat_axis", -1)
    elif mode in ("dot", "cos"):
        axes = config.get("dot_axes", -1)
        new["axes"] = axes
        new["normalize"] = mode == "cos"
    return _MERGES.get(str(mode), f"Merge(mode={mode!r})"), new


def _regularizer(value: dict[str, Any]) -> dict[str, Any] | None:
    if "class_name" in value:
        return value
    values = {k: value.get(k) or 0.0 for k in ("l1", "l2")}
    return {"class_name": "L1L2", "config": values}


def _constraint(value: dict[str, Any]) -> dict[str, Any]:
    if "class_name" in value:
        return value
    config = {k: v for k, v in value.items() if k != "name"}
    if "m" in config:
        config["max_value"] = config.pop("m")
    return {"class_name": str(value.get("name")), "config": config}


_PARAMETER = re.compile(
    r"_(running_mean|running_std|gamma|beta|alphas?|depthwise_kernel|"
    r"pointwise_kernel|[WUb](?:_[a-z]+)?)(?::0)?$"
)
_VARIABLES = {
    "W": "kernel", "U": "recurrent_kernel", "b": "bias", "alphas": "alpha",
    "running_mean": "moving_mean", "running_std": "moving_variance",
}  # fmt: skip


def variable(name: str) -> tuple[str, str]:
    """Splits a stored name of Keras 1, `"dense_1_W"`, in layer and variable."""
    tail = name.rsplit("/", 1)[-1]
    match = _PARAMETER.search(tail)
    if not match:
        return "", tail.split(":", 1)[0]
    return tail[: match.start()], _VARIABLES.get(match[1], match[1])
