"""The model that a user means: itself, or the one in a file."""

from __future__ import annotations

import os
from typing import Any

import keras

from kerasnorm.common.errors import KerasNormError
from rewriters.arguments import shown


def opened(
    model: Any, custom_objects: Any = None, *, kind: type = keras.layers.Layer
) -> Any:
    """The model itself, loaded where a path is given.

    Args:
        model: a Keras model or layer, or the path of a saved model.
        custom_objects: passed on to `load`.
        kind: what it must be; `keras.Model` where its `predict` is used.

    Raises:
        KerasNormError: something else, a model of tf_keras among them.
        RewriteError: a file that cannot be loaded.
    """
    if is_path(model):
        from rewriters.formats import load

        return load(model, custom_objects=custom_objects)
    if not isinstance(model, kind):
        roots = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
        raise KerasNormError(
            "this is no Keras model",
            got=f"{type(model).__name__} {shown(model)}",
            expected="a keras.Model, or the path of a saved one",
            fix="It is a model of tf_keras, which is Keras 2. Save it with"
            " model.save('model.h5') and give that path"
            if "tf_keras" in roots
            else None,
        )
    return model


def is_path(model: Any) -> bool:
    """Whether this names a file."""
    return isinstance(model, (str, os.PathLike))
