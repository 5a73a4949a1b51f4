"""Layers that are not Keras's own: a registry of converters to classes that are.

A converter takes the layer's stored config and returns a `Conversion`. Converters
to stock Keras 3 layers are here; a package with layers of its own registers its
converters when it is imported:

    @alias("Addons>FilterResponseNormalization", "FilterResponseNormalization")
    def _(config):
        return Conversion(MyFilterResponseNormalization, config)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from rewriters import private
from rewriters.formats.saved import Array


Fold = Callable[[list[Array], str], list[Array]]
Converter = Callable[[dict[str, Any]], "Conversion"]
_aliases: dict[str, list[tuple[Callable[[dict], bool], Converter]]] = {}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a foreign layer becomes.

    Args:
        cls: the class that replaces it.
        config: arguments of `cls`; a wrapped layer stays as the file has it, and is
            converted in turn.
        rename: stored variable name to the variable name of `cls`, where they
            differ, and None for an array that is not needed, or for all below a
            part, `"part/"`. `.keras` archives of Keras 2 have no names but places,
            such as `"layer/vars/0"`.
        fold: what makes the renamed arrays into those of `cls`, given all arrays and
            the layer's name; None where they are these.
    """

    cls: type
    config: dict[str, Any]
    rename: dict[str, str | None] = dataclasses.field(default_factory=dict)
    fold: Fold | None = None


def alias(*names: str, when: Callable[[dict], bool] = lambda config: True):
    """Decorates a converter for the stored class `names` (plain or `package>name`).

    Args:
        names: names under which files know the class.
        when: tells twins apart: whether a config is this class's.
    """

    def register(converter: Converter) -> Converter:
        for name in names:
            _aliases.setdefault(name, []).insert(0, (when, converter))
        return converter

    return register


def find(names: list[str], config: dict[str, Any]) -> Converter | None:
    """Returns the converter for the first of `names` that has one for `config`."""
    for name in names:
        for when, converter in _aliases.get(name, ()):
            if when(config):
                return converter
    return None


def _keras():
    import keras

    return keras.layers


@alias("Addons>GroupNormalization")
def _addons_group(config):
    return Conversion(_keras().GroupNormalization, config)


@alias("Addons>InstanceNormalization")
@alias("InstanceNormalization", when=lambda config: "groups" in config)
def _addons_instance(config):
    # One group per channel, whatever number the file spells it with.
    return Conversion(_keras().GroupNormalization, {**config, "groups": -1})


@alias("InstanceNormalization", when=lambda config: "groups" not in config)
@alias("keras_contrib>InstanceNormalization")
def _contrib_instance(config):
    from rewriters.formats.layers import StdInstanceNormalization

    return Conversion(StdInstanceNormalization, config)


def _has_kernel(config):
    layer = config.get("layer")
    return isinstance(layer, dict) and hasattr(_keras(), str(layer.get("class_name")))


@alias("Addons>WeightNormalization", "WeightNormalization", when=_has_kernel)
def _addons_weight(config):
    """Any layer with a kernel: the kernel in use becomes a plain one."""
    cls = getattr(_keras(), config["layer"]["class_name"])
    recurrent = issubclass(cls, _keras().RNN)
    kernel = "recurrent_kernel" if recurrent else "kernel"
    places = {"vars/0": "g", "vars/1": kernel, "vars/2": None, "layer/vars/0": "bias"}
    places |= {"layer/cell/vars/0": "kernel", "layer/cell/vars/1": "bias"}
    unused = {"initialized": None, "data_dep_init/": None, "_naked_clone_layer/": None}
    outer = {k: config[k] for k in ("name", "trainable", "dtype") if k in config}
    return Conversion(
        cls,
        {**config["layer"]["config"], **outer},
        {**unused, **places},
        functools.partial(_fold_lengths, kernel),
    )


def _fold_lengths(kernel: str, arrays: list[Array], name: str) -> list[Array]:
    """`g v / |v|` instead of `v`, per index of the last axis of any kernel."""

    def find(tail: str) -> Array:
        for a in arrays:
            parts = a.name.split("/")
            if parts[-1] == tail and (len(parts) == 1 or name in parts):
                return a
        raise KeyError(f"{name} has no {tail}")

    g, v = find("g"), find(kernel)

    def read() -> np.ndarray:
        x = np.asarray(v.read(), "float64")
        square = np.sum(x**2, axis=tuple(range(x.ndim - 1)))
        w = x * (np.asarray(g.read()) / np.sqrt(np.maximum(square, 1e-12)))
        return w.astype(v.read().dtype)

    folded = Array(v.name, v.shape, read)
    return [folded if a is v else a for a in arrays if a is not g]


@alias("Addons>SpectralNormalization")
@alias("SpectralNormalization", when=lambda config: "power_iterations" in config)
def _addons_spectral(config):
    places = {"layer/vars/0": "kernel", "layer/vars/1": "bias"}
    cls = _keras().SpectralNormalization
    if config["layer"]["class_name"] == "Embedding":
        from rewriters.formats.layers import SpectralEmbedding

        cls = SpectralEmbedding
        places = {"layer/vars/0": "embeddings"}
    return Conversion(
        cls,
        config,
        {"sn_u": "vector_u", **places, "vars/0": None, "vars/1": "vector_u"},
    )


@alias(
    "BatchNormalizationV1",
    "BatchNormalizationV2",
    "SyncBatchNormalization",
    "ExperimentalSyncBatchNormalization",
)
def _batch(config):
    return Conversion(_keras().BatchNormalization, config)


@alias(
    "BatchNormalization",
    "BatchNormalizationV1",
    "BatchNormalizationV2",
    when=lambda config: (
        isinstance(config.get("axis"), (list, tuple)) and len(config["axis"]) > 1
    ),
)
def _batch_of_several_axes(config):
    from rewriters.formats.layers import SeveralAxesBatchNormalization

    gone = ("renorm", "fused", "virtual_batch_size", "adjustment")
    kept = {k: v for k, v in config.items() if not k.startswith(gone)}
    return Conversion(SeveralAxesBatchNormalization, kept)


@alias("AddLoss", "AddMetric", "RandomHeight", "RandomWidth")
def _added(config):
    return Conversion(_keras().Identity, {"name": config.get("name")})


@alias("RandomCrop")
def _random_crop(config):
    # Keras 2 cropped and resized to the middle where Keras 3 crops nothing.
    words = ("name", "dtype", "trainable", "height", "width")
    kept = {k: config[k] for k in words if k in config}
    return Conversion(_keras().Resizing, {**kept, "crop_to_aspect_ratio": True})


def _applications(name: str):
    """Layers that Keras keeps inside its model zoo, and models of it hold."""

    def convert(config):

        return Conversion(private.convnext_class(name), config)

    return convert


for _name in ("LayerScale", "StochasticDepth"):
    alias(_name)(_applications(_name))
