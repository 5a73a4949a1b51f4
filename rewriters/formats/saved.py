"""What every reader hands over: a config and named arrays. Nothing is built or run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from rewriters.errors import RewriteError
from rewriters.formats import budget


@dataclasses.dataclass(frozen=True)
class Array:
    """One stored array, read only when asked for.

    Args:
        name: its path in the file, such as `"block/conv2d/kernel"`.
        shape: its declared shape.
        read: returns the values as a NumPy array.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass
class Saved:
    """A saved model, read but not yet understood.

    Args:
        config: the model's entry, `{"class_name": ..., "config": ...}`.
        version: version of the Keras that wrote it, such as `"2.15.0"`.
        layers: arrays of each top-level layer by its name, trainable ones first.
            Arrays that belong to the model itself lie under the empty name.
        tree: the nested HDF5 group of a `.keras` archive, instead of `layers`.
        training: what the model was compiled with, where the file says so.
        optimizer: the optimizer's arrays in their stored order.
        assets: an archive's vocabularies by their place, as `"layers/lookup/"`.
        backend: the backend that wrote it; Theano's convolutions are flipped.
        close: closes the file that the arrays are read from.
    """

    config: dict[str, Any]
    version: str = "2"
    layers: dict[str, list[Array]] = dataclasses.field(default_factory=dict)
    tree: Any = None
    training: dict[str, Any] | None = None
    optimizer: list[Array] = dataclasses.field(default_factory=list)
    assets: dict[str, str] = dataclasses.field(default_factory=dict)
    backend: str = "tensorflow"
    close: Callable[[], None] = lambda: None

    def stored_bytes(self) -> int:
        """Bytes of the weights that the file holds, were they all of 8 bytes a number.
        Its readers have compared the shapes with what is there."""
        arrays = [a for group in self.layers.values() for a in group]
        total = sum(8 * math.prod(a.shape) for a in arrays)
        found: list[int] = []
        if self.tree is not None:
            self.tree.visititems(
                lambda _, x: found.append(8 * x.size) if hasattr(x, "size") else None
            )
        return total + sum(found)

    @property
    def generation(self) -> int:
        """Major version of the Keras that wrote the file: 1, 2 or 3."""
        head = self.version.split(".", 1)[0]
        return int(head) if head in ("1", "2", "3") else 2

    @property
    def counts_twice(self) -> bool:
        """Whether names in an archive count a model's layers with weights twice: Keras
        2.12 and 2.13 found one as `layer_with_weights-0` and again as `layer-1`."""
        return self.version.startswith(("2.12.", "2.13."))

    @property
    def walks_back(self) -> bool:
        """Whether an archive's layers were met in the order of their attributes' names
        from the end, as since Keras 2.15."""
        return not self.version.startswith(("2.12.", "2.13.", "2.14."))


def parse_json(text: str | bytes, what: str) -> Any:
    """Returns the parsed `text`, or raises a `RewriteError` naming `what`."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    budget.spend("bytes", len(text), what=what)
    budget.spend("values", sum(map(text.count, "[{,:")), what=what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise RewriteError(
            f"{what} is not readable JSON",
            got=str(e),
            expected="the JSON text that Keras wrote",
            fix="The file is damaged: fetch or save it again",
        ) from None


def check_model_entry(config: Any) -> dict[str, Any]:
    """Returns `config` if it is a model's entry, and raises otherwise."""
    if isinstance(config, dict) and isinstance(config.get("class_name"), str):
        inner = config.get("config")
        if isinstance(inner, dict) or isinstance(inner, list):
            return config
    raise RewriteError(
        "The model's config is not that of a Keras model",
        got=str(config)[:80],
        expected="a class_name and a config",
        fix="The file is damaged: fetch or save it again",
    )


def has_layers(config: dict[str, Any]) -> bool:
    """Whether a model's config is of layers, not of a class of one's own, which may
    call something else so."""
    layers = config.get("layers")
    return isinstance(layers, list) and all(isinstance(x, dict) for x in layers)
