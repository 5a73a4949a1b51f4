"""Draws the figures of the pages on properties, from networks small enough to redo.

python docs/property_figures.py [name ...]
"""

from __future__ import annotations

import os
import pathlib
import sys


sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from matplotlib.figure import Figure

from kerasnorm.callbacks import PropertyMonitor
from kerasnorm.properties import measure


ROOT = pathlib.Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "figures"
layers = keras.layers
WIDTH, DEPTH = 128, 25


def network(
    norm=None, activation="relu", residual=False, kernel="he_normal", depth=DEPTH
):
    """A deep network of equal layers, with a normalization or without."""
    x = inputs = keras.Input((WIDTH,))
    for _ in range(depth):
        y = layers.Dense(WIDTH, kernel_initializer=kernel)(x)
        y = y if norm is None else norm()(y)
        y = layers.Activation(activation)(y)
        x = layers.Add()([x, y]) if residual else y
    return keras.Model(inputs, layers.Dense(10)(x))


def inputs(samples=64, mean=0.0):
    """Standard normal inputs."""
    rng = np.random.default_rng(0)
    return rng.normal(mean, 1, (samples, WIDTH)).astype("float32")


NORMS = {
    "batch": layers.BatchNormalization,
    "layer": layers.LayerNormalization,
    "groups of 4": lambda: layers.GroupNormalization(WIDTH // 4),
    "none": None,
}


def canvas(title, x, y, logarithmic=False):
    """An empty figure and its axes."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    ax = figure.subplots()
    ax.set(title=title, xlabel=x, ylabel=y)
    if logarithmic:
        ax.set_yscale("log")
    ax.grid(alpha=0.25, linewidth=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def along_depth(name, title, label, logarithmic=False):
    """A property against depth, one line a normalization."""
    figure, ax = canvas(title, "depth", label, logarithmic)
    for norm, make in NORMS.items():
        keras.utils.set_random_seed(0)
        ax.plot(*measure(network(make), inputs()).profile(name), ".-", label=norm)
    ax.legend(frameon=False)
    return figure


def variance():
    figure, ax = canvas(
        "residual networks: normalized branches add, others multiply",
        "depth",
        "activation variance",
        True,
    )
    for label, norm in (("batch norm in each branch", NORMS["batch"]), ("none", None)):
        keras.utils.set_random_seed(0)
        model = network(norm, "linear", residual=True, kernel="orthogonal")
        ax.plot(*measure(model, inputs()).profile("variance"), ".-", label=label)
    depth = np.arange(1, DEPTH + 2)
    ax.plot(depth, depth, "k:", linewidth=0.8, label="depth")
    ax.plot(depth, 2.0 ** (depth - 1), "k--", linewidth=0.8, label="2 to the depth")
    ax.legend(frameon=False)
    return figure


def cosine():
    return along_depth(
        "cosine", "ReLU network at initialization", "mean cosine between two samples"
    )


def stable_rank():
    return along_depth("stable_rank", "ReLU network at initialization", "stable rank")


def effective_rank():
    return along_depth(
        "effective_rank", "ReLU network at initialization", "effective rank"
    )


def gradient():
    return along_depth(
        "gradient", "ReLU network at initialization", "gradient norm", logarithmic=True
    )


def dead():
    figure, ax = canvas(
        "one ReLU layer", "bias, in deviations of its inputs", "share of dead units"
    )
    biases = np.linspace(-6, 0, 13)
    for samples in (16, 256):
        shares = []
        for bias in biases:
            keras.utils.set_random_seed(0)
            layer = layers.Dense(
                512, "relu", bias_initializer=keras.initializers.Constant(bias)
            )
            layer.kernel_initializer = keras.initializers.RandomNormal(
                stddev=WIDTH**-0.5, seed=0
            )
            model = keras.Sequential(
                [keras.Input((WIDTH,)), layer, layers.Dense(2, name="head")]
            )
            found = measure(model, inputs(samples), batch_size=samples)
            shares.append(found.at("head").dead)
        ax.plot(biases, shares, ".-", label=f"{samples} samples")
    ax.legend(frameon=False)
    return figure


def drift():
    figure, ax = canvas(
        "batch norm that was trained on inputs of mean 0",
        "mean of the inputs now",
        "distance from running statistics",
    )
    keras.utils.set_random_seed(0)
    norm = layers.BatchNormalization(momentum=0.0, name="norm")
    model = keras.Sequential(
        [keras.Input((WIDTH,)), layers.Dense(64), norm, layers.Dense(2)]
    )
    model(inputs(256), training=True)
    means = np.linspace(0, 3, 10)
    found = [measure(model, inputs(256, m)).at("norm") for m in means]
    ax.plot(means, [site.statistics_distance for site in found], ".-")
    ax.set_ylim(bottom=0)
    return figure


def dependence():
    figure, ax = canvas(
        "ReLU network of 4 layers at initialization",
        "batch size",
        "dependence of the output on the batch",
    )
    sizes = [4, 8, 16, 32, 64, 128, 256]
    for norm in ("batch", "layer"):
        keras.utils.set_random_seed(0)
        model = network(NORMS[norm], depth=4)
        found = [measure(model, inputs(256), batch_size=n) for n in sizes]
        ax.plot(sizes, [m.sites[-1].dependence for m in found], ".-", label=norm)
    ax.set_xscale("log", base=2)
    ax.legend(frameon=False)
    return figure


def weights():
    figure, ax = canvas(
        "SGD, with batch norm behind each layer",
        "step",
        "effective learning rate",
        True,
    )
    x = inputs(256)
    y = (x[:, :10]).argmax(-1)
    for label, decay in (("no weight decay", None), ("weight decay 0.01", 0.01)):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((WIDTH,)),
                layers.Dense(64, name="dense", use_bias=False),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.Dense(10),
            ]
        )
        model.compile(
            keras.optimizers.SGD(0.5, weight_decay=decay),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        monitor = PropertyMonitor(x, y, every=None, every_steps=10)
        model.fit(x, y, batch_size=32, epochs=40, verbose=0, callbacks=[monitor])
        steps = [step for step, _ in monitor.history]
        rates = [m.at("dense").effective_learning_rate for _, m in monitor.history]
        ax.plot(steps, rates, label=label)
    ax.legend(frameon=False)
    return figure


FIGURES = {
    f.__name__: f
    for f in (
        variance,
        cosine,
        stable_rank,
        effective_rank,
        gradient,
        dead,
        drift,
        dependence,
        weights,
    )
}


def main(names):
    """Draws the named figures, all by default."""
    OUT.mkdir(exist_ok=True)
    for name in names or FIGURES:
        path = OUT / f"property_{name}.png"
        FIGURES[name]().savefig(path, dpi=100)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
