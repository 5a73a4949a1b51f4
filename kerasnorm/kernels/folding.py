"""Where a trained batch normalization can go: into a linear layer next to it.

At inference it is a scale and a shift per channel, which a linear layer before or
behind it can hold. Removing normalization and weight normalization both start here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from kerasnorm.kernels.kernel import Kernel, kernel_of
from kerasnorm.method import adoption, moving_statistics
from kerasnorm.method.registry import Edit, Reason, Refusal


# At inference these pass their input through; in training they commute with a scale
# but not with a shift, which is why folding is exact at inference only.
TRANSPARENT = (
    keras.layers.Dropout,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
    keras.layers.GaussianNoise,
    keras.layers.GaussianDropout,
    keras.layers.AlphaDropout,
    keras.layers.ActivityRegularization,
    keras.layers.Identity,
)


@dataclass(frozen=True)
class Fold:
    """Where a batch normalization can go: the linear layer, and on which side of it
    the normalization stands."""

    site: Any
    kernel: Kernel
    after: bool  # the normalization comes after the linear layer

    def weights(self, source) -> dict[str, np.ndarray]:
        """The linear layer's weights with the normalization in them."""
        scale, shift = affine(source)
        move = self.kernel.scale_outputs if self.after else self.kernel.scale_inputs
        return move(self.kernel.weights(), scale, shift)


def affine(source):
    """Scale and shift per channel of a batch normalization at inference, float64."""
    mean, variance = (source.weights[k].astype("float64") for k in ("mean", "variance"))
    scale = source.weights.get("gamma", 1.0) / np.sqrt(variance + source.epsilon)
    return scale, source.weights.get("beta", 0.0) - mean * scale


def find(source, site) -> Fold | Refusal:
    """The linear layer that can take the batch normalization at `site`."""
    if source.method != "batch" and not moving_statistics.is_running(source):
        return Refusal(
            Reason.NOT_EXACT,
            f"{source.method} normalization depends on its input at inference too",
            "fold a batch normalization, or train one first",
        )
    refusal = adoption.forced_training(source, site)
    if refusal is not None:
        return refusal
    if "mean" not in source.weights:
        return Refusal(Reason.NO_GRAPH, f"{site.path} is not built")
    if site.shared:
        return Refusal(Reason.SHARED, f"{site.path} is called or held more than once")
    if site.inner and not site.placed:
        return Refusal(
            Reason.NO_GRAPH, "its owner's code decides what reads the layers around it"
        )
    if not site.calls:
        return Refusal(Reason.NO_GRAPH, "the layers around it are not known")
    before = _side(source, site, after=True)
    if isinstance(before, Fold):
        return before
    behind = _side(source, site, after=False)
    if isinstance(behind, Fold):
        return behind
    # The reason of a linear neighbour that is there says more than that of one that
    # is not.
    first = min(before, behind, key=lambda r: r.reason is Reason.NO_LINEAR)
    return Refusal(
        first.reason,
        f"before it: {before.detail}; behind it: {behind.detail}",
        first.instead,
    )


def _side(source, site, after) -> Fold | Refusal:
    place = _step(site, after)
    while place is not None and _transparent(place):
        place = _step(place, after)
    if place is None:
        return Refusal(
            Reason.NO_LINEAR, "no layer, or one whose tensors have other uses"
        )
    layer = place.layer
    kernel = kernel_of(layer)
    if kernel is None:
        return Refusal(Reason.NO_LINEAR, f"{layer.name} ({type(layer).__name__})")
    if isinstance(kernel, Refusal):
        return kernel
    if place.shared:
        return Refusal(Reason.SHARED, f"{layer.name} is called or held more than once")
    activation = getattr(layer, "activation", None)
    if after and activation not in (None, keras.activations.linear):
        name = getattr(activation, "__name__", type(activation).__name__)
        return Refusal(Reason.NO_LINEAR, f"{layer.name} applies {name}")
    rank = len(site.calls[0].shape)
    if adoption.channel_axis(source, rank) != kernel.axis % rank:
        return Refusal(
            Reason.NOT_EXACT,
            f"axis {source.axis} is not the channel axis of {layer.name}",
        )
    if after:
        return Fold(place, kernel, after)
    if not kernel.reads_channels():
        return Refusal(Reason.NOT_EXACT, f"{layer.name} does not read the channels")
    shift = affine(source)[1]
    if np.any(shift) and kernel.sees_padding():
        return Refusal(
            Reason.NOT_EXACT,
            f"{layer.name} reads zeros beyond the border, where the shift is missing",
            "wn or gn",
        )
    return Fold(place, kernel, after)


def _step(site, after):
    return site.before() if after else site.after()


def _transparent(place) -> bool:
    if any(call.kwargs.get("training") is True for call in place.calls):
        return False
    layer = place.layer
    if isinstance(layer, keras.layers.Activation):
        return layer.activation is keras.activations.linear
    return isinstance(layer, TRANSPARENT) and any(
        type(layer).call is cls.call for cls in TRANSPARENT
    )


def penalties(config: dict, but: tuple[str, ...] = ("activity",)) -> list[str]:
    """The regularizers and constraints in a layer's config, in words."""
    return [
        k.replace("_", " ")
        for kind in ("_regularizer", "_constraint")
        for k, value in config.items()
        if k.endswith(kind) and value and not k.startswith(but)
    ]


def notes(fold: Fold, config: dict) -> str:
    """What the user should know about the linear layer's training after a fold."""
    name, told = fold.site.layer.name, []
    held = penalties(config)
    if held:
        told.append(f"the {' and '.join(held)} of {name} now sees folded weights")
    if config.get("activity_regularizer") and fold.after:
        told.append(
            f"the activity regularizer of {name} now sees what was normalized after it"
        )
    return "; ".join(told)


def edits(fold: Fold, site, linear: dict) -> tuple[Edit, ...]:
    """Puts `linear` at the linear layer's place and removes the normalization; in
    order of computation, which is how `folded` knows the side."""
    pair = (Edit(fold.site.path, linear), adoption.edit(site, None))
    return pair if fold.after else pair[::-1]


def folded(source, layers) -> tuple[Kernel, Any, dict[str, np.ndarray]]:
    """The old linear layer's kernel, the new layer, and the weights after the fold."""
    pairs = list(layers.values())
    after = pairs[0][1] is not None
    old, new = pairs[0] if after else pairs[1]
    kernel: Any = kernel_of(old)  # `find` has made sure that it is one
    return kernel, new, Fold(None, kernel, after).weights(source)
