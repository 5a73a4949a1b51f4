"""What files written with tensorflow-addons hold, as layers of Keras and kerasnorm.

Imported with kerasnorm, which is all that `kerasnorm.load` needs. Layers that are
stock Keras 3 layers under another name are converted in `rewriters.formats.foreign`;
here are those that need a class of kerasnorm's. tensorflow-addons itself is never
imported.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerasnorm.layers.filter_response import FilterResponseNormalization
from kerasnorm.recurrent import LSTMCell, SimpleRNNCell
from kerasnorm.weights.weight import WeightNormalization
from rewriters.formats.foreign import Conversion, alias


@keras.saving.register_keras_serializable("kerasnorm")
class TLU(keras.layers.Layer):
    """Thresholded linear unit with a threshold per position, `max(x, tau)`.

    The form of tensorflow-addons, whose `tau` has the shape of the whole input; the
    paper's has one value per channel, which is `FilterResponseNormalization`'s.
    With `affine=True` it is `max(x, alpha * x + tau)`.

    Singh and Krishnan, 2019, https://arxiv.org/abs/1911.09737

    Args:
        affine: whether to learn `alpha`. Defaults to False.
        tau_initializer: initializer of the threshold. Defaults to `"zeros"`.
        tau_regularizer: regularizer of the threshold. Defaults to none.
        tau_constraint: constraint on the threshold. Defaults to none.
        alpha_initializer: initializer of the slope. Defaults to `"zeros"`.
        alpha_regularizer: regularizer of the slope. Defaults to none.
        alpha_constraint: constraint on the slope. Defaults to none.
        **kwargs: `name`, `dtype`, `trainable`.
    """

    def __init__(
        self,
        affine: bool = False,
        tau_initializer: Any = "zeros",
        tau_regularizer: Any = None,
        tau_constraint: Any = None,
        alpha_initializer: Any = "zeros",
        alpha_regularizer: Any = None,
        alpha_constraint: Any = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.affine = affine
        self.tau_initializer = keras.initializers.get(tau_initializer)
        self.tau_regularizer = keras.regularizers.get(tau_regularizer)
        self.tau_constraint = keras.constraints.get(tau_constraint)
        self.alpha_initializer = keras.initializers.get(alpha_initializer)
        self.alpha_regularizer = keras.regularizers.get(alpha_regularizer)
        self.alpha_constraint = keras.constraints.get(alpha_constraint)

    def build(self, input_shape):
        for name in ("tau", "alpha") if self.affine else ("tau",):
            weight = self.add_weight(
                name=name,
                shape=tuple(input_shape[1:]),
                initializer=getattr(self, f"{name}_initializer"),
                regularizer=getattr(self, f"{name}_regularizer"),
                constraint=getattr(self, f"{name}_constraint"),
            )
            setattr(self, name, weight)

    def call(self, inputs):
        floor = self.alpha * inputs + self.tau if self.affine else self.tau
        return ops.maximum(inputs, floor)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        config = {**super().get_config(), "affine": self.affine}
        for name in ("tau", "alpha"):
            for kind in ("initializer", "regularizer", "constraint"):
                value = getattr(self, f"{name}_{kind}")
                config[f"{name}_{kind}"] = keras.saving.serialize_keras_object(value)
        return config


@alias("Addons>TLU", "TLU")
def _tlu(config):
    return Conversion(TLU, config)


@alias(
    "Addons>FilterResponseNormalization",
    "FilterResponseNormalization",
    when=lambda config: list(config.get("axis", ())) == [1, 2],
)
def _filter_response(config):
    unused = ("axis", "learned_epsilon", "learned_epsilon_constraint")
    kept = {k: v for k, v in config.items() if k not in unused}
    learns = bool(config.get("learned_epsilon"))
    kept |= {"axis": -1, "threshold": False, "learn_epsilon": learns}
    order = ("learned_epsilon", "gamma", "beta") if learns else ()
    places = {f"vars/{i}": name for i, name in enumerate(order)}
    return Conversion(FilterResponseNormalization, kept, {**places})


# tensorflow-addons keeps the last axis of any kernel apart, which is that of the
# filters in these layers alone.
_FILTERS_LAST = ("Dense", "Conv1D", "Conv2D", "Conv3D")


@alias(
    "Addons>WeightNormalization",
    "WeightNormalization",
    when=lambda config: config["layer"]["class_name"] in _FILTERS_LAST,
)
def _weight(config):
    kept = {k: v for k, v in config.items() if k != "data_init"}
    places = {"vars/0": "g", "vars/1": "kernel", "vars/2": None, "layer/vars/0": "bias"}
    # A copy of the layer, which served to initialize from data.
    unused = {"data_dep_init/": None, "_naked_clone_layer/": None}
    rename = {"initialized": None, **unused, **places}
    return Conversion(WeightNormalization, kept, rename)


@alias("Addons>LayerNormLSTMCell", "LayerNormLSTMCell")
def _layer_norm_lstm(config):
    kept, arguments = _split(config, "norm_")
    return Conversion(LSTMCell, kept | {"cell_state": "carry"} | arguments)


@alias("Addons>LayerNormSimpleRNNCell", "LayerNormSimpleRNNCell")
def _layer_norm_simple_rnn(config):
    kept, arguments = _split(config, "gamma_", "layernorm_")
    arguments["norm_arguments"]["center"] = False  # the cell's bias is its offset
    places = {
        "vars/0": "kernel",
        "vars/1": "recurrent_kernel",
        "vars/2": "bias",
        "layernorm/vars/0": "gamma",
    }
    return Conversion(SimpleRNNCell, kept | arguments, {**places})


def _split(config, *prefixes):
    """The arguments of the cell, and those of its norms as the cell takes them."""
    kept = {k: v for k, v in config.items() if not k.startswith(prefixes)}
    norm = {
        k.removeprefix("norm_").removeprefix("layernorm_"): v
        for k, v in config.items()
        if k not in kept
    }
    return kept, {"norm": "layer", "norm_arguments": norm}
