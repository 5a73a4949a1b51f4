"""The main job on real input: a trained file, batch to group normalization.

Trains a small residual network on scikit-learn's 8x8 digits, saves it, and rewrites
the file with every fit. The fits see images, never labels. Then the compass says which
normalization suits the network, and why.

    make demo
"""

from __future__ import annotations

import os
import pathlib
import time


os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from sklearn.datasets import load_digits

import kerasnorm


BUILD = pathlib.Path(__file__).resolve().parents[1] / "build"
FITS = (None, "affine", "refit", "distill")


def digits():
    """Images in [0, 1] and labels, 1300 to train on and 497 to test."""
    data = load_digits()
    x = (data.images[..., None] / 16).astype("float32")
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:1300], order[1300:]
    return (x[train], data.target[train]), (x[test], data.target[test])


def residual_network():
    """Conv and three residual blocks, a batch norm after each convolution."""

    def conv_bn(x, filters, name, strides=1):
        x = keras.layers.Conv2D(
            filters, 3, strides, "same", use_bias=False, name=f"{name}_conv"
        )(x)
        return keras.layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(x)

    inputs = keras.Input((8, 8, 1))
    x = keras.layers.ReLU()(conv_bn(inputs, 16, "stem"))
    for i, filters in enumerate((16, 32, 32)):
        strides = 2 if filters != x.shape[-1] else 1
        y = keras.layers.ReLU()(conv_bn(x, filters, f"block{i}_a", strides))
        y = conv_bn(y, filters, f"block{i}_b")
        if strides == 2:
            x = keras.layers.Conv2D(filters, 1, 2, name=f"block{i}_skip")(x)
        x = keras.layers.ReLU()(keras.layers.Add()([x, y]))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10)(x), name="digits")


def accuracy(model, x, y):
    """Share of images classified right."""
    return float(np.mean(np.argmax(model.predict(x, verbose=0), -1) == y))


def main():
    """Train, save, rewrite with every fit, print, plot."""
    keras.utils.set_random_seed(0)
    (x, y), (x_test, y_test) = digits()
    model = residual_network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    start = time.perf_counter()
    model.fit(x, y, batch_size=64, epochs=12, verbose=0)
    BUILD.mkdir(exist_ok=True)
    file = BUILD / "digits.keras"
    model.save(file)
    original = accuracy(model, x_test, y_test)
    print(f"trained in {time.perf_counter() - start:.0f} s and saved {file.name}:")
    print(f"{original:.1%} of {len(x_test)} test digits, batch normalization\n")

    print(f"{'batch to group':16}{'accuracy':>10}{'kept':>8}{'seconds':>10}")
    accuracies, reports = {"batch norm": original}, {}
    for fit in FITS:
        name = fit or "none (copied)"
        start = time.perf_counter()
        new, reports[name] = kerasnorm.rewrite(
            file,
            "gn",
            groups=4,
            data=x if fit else None,
            fit=fit,
            out=BUILD / f"digits_gn_{fit}.keras",
            return_report=True,
            verbose=False,
        )
        seconds = time.perf_counter() - start
        accuracies[name] = result = accuracy(new, x_test, y_test)
        print(f"{name:16}{result:10.1%}{result / original:8.1%}{seconds:10.1f}")
    reports["affine"].plot(BUILD / "demo.png", accuracies)
    print("\nfigure, with the share of variance kept at each site: build/demo.png")

    print("\nwhich normalization would suit this network, before any training:\n")
    compass = kerasnorm.compass(model, x, y)
    compass.save(BUILD / "compass.html")
    print(compass)
    print("\nreport, with figures: build/compass.html")


if __name__ == "__main__":
    main()
