"""Scaling-based weight normalization: the same function from balanced filters.

In a network of rectifiers the weights into a node can be divided by any factor, and
those out of it multiplied, without any change of the function; but gradient descent
runs another way from each of these points. This method moves the point instead of
changing the layers: after a step, or now and then, each filter is brought to unit
length and the next layer takes the factor, bias included:

    w_in <- w_in / a,    b <- b / a,    w_out <- a w_out,    a = ||w_in||

It works with every optimizer and beside every normalization. As a target of `rewrite`
it folds batch normalization away, as no normalization does; `rescale` is what follows.

Paper: Yuan and Xiao, 2019, https://doi.org/10.1109/ACCESS.2018.2890373
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.kernels import folding
from kerasnorm.kernels.kernel import Kernel, kernel_of
from kerasnorm.method import adoption
from kerasnorm.method.registry import declare
from kerasnorm.weights import fold
from rewriters.graph import SiteMap


__all__ = ["rescale"]


# f(c x) = c f(x) for c > 0, channel by channel.
HOMOGENEOUS = (
    keras.activations.linear,
    keras.activations.relu,
    keras.activations.leaky_relu,
)
LAYERS = (
    *folding.TRANSPARENT,
    keras.layers.LeakyReLU,
    keras.layers.PReLU,
    *(
        getattr(keras.layers, f"{kind}Pooling{n}D")
        for kind in ("Max", "GlobalMax", "Average", "GlobalAverage")
        for n in (1, 2, 3)
    ),
    *(getattr(keras.layers, f"ZeroPadding{n}D") for n in (1, 2, 3)),
)


def rescale(model: Any, balance: str = "unit") -> int:
    """Rescales the nodes of a model in place; its outputs stay the same.

    A node is a channel between two linear layers, with nothing but rectifiers,
    pooling and dropout between them and no other reader.

    Args:
        model: a Functional or Sequential model.
        balance: `"unit"` brings each filter to length 1; `"equal"` makes the weights
            into and out of each node equally long, by one sweep.

    Returns:
        The number of layers whose filters were rescaled.

    Raises:
        KerasNormError: another `balance`.
    """
    if balance not in ("unit", "equal"):
        raise KerasNormError(
            "unknown balance", got=repr(balance), expected="'unit' or 'equal'"
        )
    count = 0
    for site in SiteMap(model, tracing=False):
        pair = _pair(site)
        if pair is None:
            continue
        first, second = pair
        weights = first.weights()
        into = _lengths(weights[first.name], first)
        if balance == "equal":
            ones = np.ones_like(into)
            probe = second.scale_inputs(second.weights(), ones, 0 * ones)
            into = np.sqrt(into / np.maximum(_reads(second, probe, len(into)), 1e-30))
        factor = np.where(into > 0, into, 1.0)
        _assign(first, first.scale_outputs(weights, 1 / factor, 0 * factor))
        _assign(second, second.scale_inputs(second.weights(), factor, 0 * factor))
        count += 1
    return count


class NodeRescaling(keras.callbacks.Callback):
    """Rescales the model's nodes while it trains.

    Args:
        every: optimizer steps from one time to the next. Defaults to 1.
        balance: see `rescale`.
    """

    def __init__(self, every: int = 1, balance: str = "unit"):
        super().__init__()
        self.every, self.balance = every, balance

    def on_train_batch_end(self, batch, logs=None):
        if (batch + 1) % self.every == 0:
            if hasattr(self.model, "jax_state_sync"):
                self.model.jax_state_sync()  # the trainer holds the weights meanwhile
            rescale(self.model, self.balance)


def _pair(site: Any) -> tuple[Kernel, Kernel] | None:
    """The kernels on both sides of a layer of nodes, `site` being the first."""
    first = _linear(site)
    if first is None or getattr(site.layer, "activation", None) not in (
        None,
        *HOMOGENEOUS,
    ):
        return None
    behind = site.after()
    while behind is not None and not behind.shared and _homogeneous(behind.layer):
        behind = behind.after()
    second = None if behind is None else _linear(behind)
    if second is None or not second.reads_channels():
        return None
    return first, second


def _linear(site: Any) -> Kernel | None:
    kernel = kernel_of(site.layer)
    if not isinstance(kernel, Kernel) or site.shared or site.inner:
        return None
    return None if isinstance(site.layer, keras.layers.Embedding) else kernel


def _homogeneous(layer: Any) -> bool:
    if isinstance(layer, keras.layers.Activation):
        return layer.activation in HOMOGENEOUS
    if isinstance(layer, keras.layers.ReLU):
        return layer.max_value is None and not layer.threshold
    return any(isinstance(layer, c) and type(layer).call is c.call for c in LAYERS)


def _lengths(kernel: np.ndarray, where: Kernel) -> np.ndarray:
    others = tuple(a for a in range(kernel.ndim) if a not in where.channels)
    return np.sqrt(np.sum(kernel**2, others)).ravel()


def _reads(second: Kernel, weights: dict[str, np.ndarray], channels: int) -> np.ndarray:
    """Length of the weights that read each channel: by what scaling it changes."""
    found = np.zeros(channels)
    for c in range(channels):
        only = (np.arange(channels) == c).astype("float64")
        scaled = second.scale_inputs(second.weights(), only, 0 * only)
        name = "depthwise_kernel" if "depthwise_kernel" in scaled else second.name
        found[c] = np.sqrt(np.sum(scaled[name] ** 2))
    return found


def _assign(kernel: Kernel, weights: dict[str, np.ndarray]) -> None:
    for name, value in weights.items():
        variable: Any = getattr(kernel.layer, name, None)
        if isinstance(variable, keras.Variable):
            adoption.assign(variable, np.broadcast_to(value, variable.shape))


def _small_model():
    rng = np.random.default_rng(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(6, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.DepthwiseConv2D(3, depth_multiplier=2),
            layers.ReLU(),
            layers.Conv2D(4, 1, use_bias=False),
            layers.LeakyReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(5),
        ]
    )
    for v in model.variables:
        v.assign(rng.normal(0, 0.5, v.shape))
    return model, rng.normal(size=(4, 8, 8, 3)).astype("float32"), rng


def check_same_function_from_unit_filters():
    for balance in ("unit", "equal"):
        model, x, _ = _small_model()
        y = ops.convert_to_numpy(model(x))
        np.testing.assert_equal(rescale(model, balance), 3)
        np.testing.assert_allclose(ops.convert_to_numpy(model(x)), y, atol=1e-4)
        if balance == "unit":
            w = ops.convert_to_numpy(model.layers[0].kernel).reshape(-1, 6)
            np.testing.assert_allclose(np.linalg.norm(w, axis=0), 1, rtol=1e-5)


def check_callback():
    model, x, rng = _small_model()
    model.compile(keras.optimizers.SGD(1e-2, momentum=0.9), "mse")
    y = rng.normal(size=(4, 5))
    model.fit(x, y, epochs=2, verbose=0, callbacks=[NodeRescaling()])
    w = ops.convert_to_numpy(model.layers[0].kernel).reshape(-1, 6)
    np.testing.assert_allclose(np.linalg.norm(w, axis=0), 1, rtol=1e-5)


# There is no layer: claims are judged on the identity, as where nothing normalizes.
declare(
    name="scaling",
    title="Scaling-based weight normalization",
    family="weight",
    paper="Yuan and Xiao, 2019, doi:10.1109/ACCESS.2018.2890373",
    adopt=fold.adopt,
    carry=fold.carry,
    claims={
        "batch_independent",
        "sign_equivariant",
        "train_equals_inference",
        "idempotent",
        "bounded_jacobian",
    },
    checks=(check_same_function_from_unit_filters, check_callback),
)
