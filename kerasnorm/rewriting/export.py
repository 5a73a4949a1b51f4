"""`export`: a model that needs Keras alone, as far as that is exact."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from kerasnorm.common.errors import taking
from kerasnorm.kernels.reparametrized import Reparametrized
from kerasnorm.method import adoption, moving_statistics
from kerasnorm.method.registry import Options, Source, get, read
from kerasnorm.rewriting.apply import keep_frozen
from kerasnorm.rewriting.verify import verify
from kerasnorm.runtime.models import is_path, opened
from rewriters.compare import outputs
from rewriters.edit import Edited, edit
from rewriters.graph import SiteMap
from rewriters.saving import check_target, save


@taking()
def export(model: Any, out: str | os.PathLike[str] | None = None) -> Any:
    """Folds kerasnorm's layers back into Keras's own.

    A reparametrized layer becomes the plain layer it wraps, with the kernel in use. A
    normalization layer becomes the Keras layer that computes the same at inference:
    its own method's, or batch normalization for methods with moving statistics. What
    has no such layer stays. The outputs of both models are compared on random inputs.

    Args:
        model: a Keras model, or the path of a saved one; left untouched.
        out: where to save the new model; never over the input.

    Returns:
        The new `keras.Model`. Training it goes on from another parametrization.

    Raises:
        KerasNormError: the outputs differ by more than rounding.
        RewriteError: a file that cannot be read or written.

    Example:

    >>> layer = kerasnorm.weights.weight.WeightNormalization(keras.layers.Dense(2))
    >>> model = keras.Sequential([keras.Input((3,)), layer])
    >>> type(kerasnorm.export(model).layers[0]).__name__
    'Dense'
    """
    path = model if is_path(model) else None
    if out is not None:
        check_target(out, inputs=(path,))
    model = opened(model)
    site_map = SiteMap(model)
    edits: dict[str, Any] = {}
    drops: dict[str, tuple[str, ...]] = {}
    after: list[Any] = []
    for site in site_map:
        layer = site.layer
        if isinstance(layer, Reparametrized) and layer.foldable:
            edits[site.path] = layer.plain()
            after.append(lambda old, new: old.fold_into(new))
        elif (found := _stock(site)) is not None:
            made, weights = found
            place = adoption.edit(site, made)
            edits[site.path], drops[site.path] = made, place.drops
            after.append(functools.partial(_set, weights))

    def carry(edited: Edited) -> None:
        for site_path, fold in zip(edits, after, strict=True):
            old = site_map[site_path].layer
            fold(old, edited.new(old))
            keep_frozen(old, edited.new(old))

    edited = edit(model, edits, drops=drops, site_map=site_map, carry=carry)
    edited.renew_averages()
    if edits:
        verify(model, edited.model, "the export")
    if out is not None:
        save(edited.model, out, inputs=(path,))
    return edited.model


def _stock(site: Any) -> tuple[Any, dict[str, np.ndarray]] | None:
    """Keras's own layer that computes the same at inference, and its weights."""
    layer = site.layer
    source = read(layer)
    if not isinstance(source, Source) or type(layer).__module__.startswith("keras."):
        return None
    shape = next(iter(adoption.shapes(site)), None)
    if shape is None or not layer.built:
        return None
    weights = {n: np.asarray(v) for n, v in source.weights.items()}
    classes = [c for c in get(source.method).reads if c.__module__.startswith("keras.")]
    classes.append(keras.layers.GroupNormalization)  # layer and instance norm of images
    if moving_statistics.is_running(source):
        classes.append(keras.layers.BatchNormalization)
        mean, variance = moving_statistics.statistics(source, source.epsilon)
        weights |= {"moving_mean": mean, "moving_variance": variance}
    x = np.random.default_rng(0).normal(size=[n or 4 for n in shape])
    y = outputs(layer, x.astype("float32"))[0]
    for cls in classes:
        fits = adoption.pick(cls, type(layer), site, Options())
        taken = inspect.signature(cls.__init__).parameters
        config = {"groups": -1, **layer.get_config()}
        config = {k: v for k, v in config.items() if k in taken}
        shared = {"name": layer.name, "trainable": layer.trainable}
        try:
            made, tried = (
                cls.from_config({**config, **shared, "dtype": layer.dtype_policy})
                for _ in range(2)
            )
            tried.build(shape)
            _set(weights, layer, tried)
            z = outputs(tried, x.astype("float32"))[0]
        except Exception:
            continue  # arguments that Keras's layer does not know
        limit = 1e-2 if "16" in layer.compute_dtype else 1e-5
        if fits is cls and np.allclose(z, y, limit, limit):
            return made, weights
    return None


def _set(weights: Mapping[str, np.ndarray], old: Any, new: Any) -> None:
    for variable in new.variables:
        name = "gamma" if variable.name == "scale" else variable.name
        if name in weights:
            adoption.assign(variable, np.reshape(weights[name], variable.shape))
