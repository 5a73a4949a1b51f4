"""What the benchmarks share: CIFAR-10 as arrays, and a ResNet trained on it once.

CIFAR-10 is read from the JPEG copy in ``../shared/data``, so its pixels are slightly
lossy: accuracies are not comparable to the second digit with published ones.
Decoded arrays and trained models are cached under ``build/fidelity``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np


ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "fidelity"
SHARED = Path(os.environ.get("KERASNORM_SHARED", ROOT.parent / "shared"))


def fashion_mnist():
    """(x_train, y_train), (x_test, y_test); float32 in [-1, 1]."""
    with np.load(SHARED / "data" / "fashion_mnist.npz") as d:
        pairs = [(d[f"x_{part}"], d[f"y_{part}"]) for part in ("train", "test")]
    return [((x[..., None] / 127.5 - 1).astype("float32"), y) for x, y in pairs]


def cifar10_pixels():
    """(x_train, y_train), (x_test, y_test); float32 in [0, 255]."""
    path = CACHE / "cifar10.npz"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        spec = importlib.util.spec_from_file_location(
            "shared_datasets", SHARED / "data" / "datasets.py"
        )
        datasets = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(datasets)
        (x, y), (x_test, y_test) = datasets.cifar10()
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, x=x, y=y, x_test=x_test, y_test=y_test)
        partial.replace(path)
    with np.load(path) as d:
        return [
            (d[f"x{part}"].astype("float32"), d[f"y{part}"].astype("int32"))
            for part in ("", "_test")
        ]


def cifar10(each=False):
    """The same, standardized per channel, or `each` image by its own mean and standard
    deviation, as `tf.image.per_image_standardization` does."""
    if each:
        return [(standardized(x), y) for x, y in cifar10_pixels()]
    mean = np.array([125.3, 123.0, 113.9], "float32")
    scale = np.array([63.0, 62.1, 66.7], "float32")
    return [((x - mean) / scale, y) for x, y in cifar10_pixels()]


def standardized(x):
    axes = tuple(range(1, x.ndim))
    least = 1 / np.sqrt(x[0].size)
    deviation = np.maximum(x.std(axes, keepdims=True), least)
    return (x - x.mean(axes, keepdims=True)) / deviation


def resnet(depth=14, widths=(16, 32, 64), classes=10, shape=(32, 32, 3)):
    """The CIFAR ResNet of He et al. (2016): conv-BN-ReLU blocks, logits out."""
    layers = keras.layers

    def conv_norm(x, filters, name, strides=1, kernel=3):
        x = layers.Conv2D(
            filters, kernel, strides, "same", use_bias=False, name=f"{name}_conv"
        )(x)
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")(
            x
        )

    inputs = keras.Input(shape, name="image")
    x = layers.ReLU(name="stem_relu")(conv_norm(inputs, widths[0], "stem"))
    for stage, filters in enumerate(widths, 1):
        for block in range(1, (depth - 2) // 6 + 1):
            name = f"stage{stage}_block{block}"
            strides = 2 if stage > 1 and block == 1 else 1
            y = conv_norm(x, filters, f"{name}_1", strides)
            y = layers.ReLU(name=f"{name}_1_relu")(y)
            y = conv_norm(y, filters, f"{name}_2")
            if strides > 1:
                x = conv_norm(x, filters, f"{name}_shortcut", strides, 1)
            x = layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_add")([x, y]))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    outputs = layers.Dense(classes, name="logits")(x)
    return keras.Model(inputs, outputs, name=f"resnet{depth}")


class Augmented(keras.utils.PyDataset):
    """Batches shifted by up to 4 pixels and, half of the images, mirrored; reshuffled
    each epoch."""

    def __init__(self, x, y, batch_size=128, seed=0, mirror=True):
        super().__init__()
        self.mirrored = 0.5 if mirror else 0.0
        self.x = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
        self.y, self.batch_size = y, batch_size
        self.rng = np.random.default_rng(seed)
        self.order = self.rng.permutation(len(y))

    def __len__(self):
        return len(self.y) // self.batch_size

    def __getitem__(self, index):
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        dy, dx = self.rng.integers(0, 9, 2)
        x = self.x[rows, dy : dy + 32, dx : dx + 32]
        flip = self.rng.random(len(rows)) < self.mirrored
        return np.where(flip[:, None, None, None], x[:, :, ::-1], x), self.y[rows]

    def on_epoch_end(self):
        self.order = self.rng.permutation(len(self.y))


def trained_resnet(
    depth=14, epochs=10, widths=(16, 32, 64), each=False, mirror=True, verbose=2
):
    """The benchmark's model, trained on first use (about half an hour on 2 cores)."""
    wide = "" if widths == (16, 32, 64) else f"_{widths[0]}wide"
    way = ("_each" if each else "") + ("" if mirror else "_unmirrored")
    path = CACHE / f"resnet{depth}{wide}{way}_{epochs}epochs.keras"
    if not path.exists():
        keras.utils.set_random_seed(0)
        (x, y), test = cifar10(each)
        model = resnet(depth, widths)
        data = Augmented(x, y, mirror=mirror)
        steps = epochs * len(data)
        schedule = keras.optimizers.schedules.CosineDecay(
            0.01, steps - len(data), warmup_target=0.2, warmup_steps=len(data)
        )
        model.compile(
            keras.optimizers.SGD(
                schedule, momentum=0.9, nesterov=True, weight_decay=5e-4
            ),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=False,
        )
        start = time.time()
        model.fit(data, epochs=epochs, verbose=verbose)
        print("trained in", round(time.time() - start), "s", file=sys.stderr)
        print(model.evaluate(*test, batch_size=500, verbose=0), file=sys.stderr)
        CACHE.mkdir(parents=True, exist_ok=True)
        model.save(path)
    return keras.models.load_model(path, compile=False)


def accuracy(model, x, labels):
    """Share of rows whose largest output is the label, in percent."""
    scores = model.predict(x, batch_size=500, verbose=0)
    return 100 * float(np.mean(np.argmax(scores, -1) == labels))


if __name__ == "__main__":
    trained_resnet()


def forward_seconds(model, x, repeats=3):
    """Best wall time of `predict` over the images, after a first call."""
    model.predict(x, batch_size=128, verbose=0)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model.predict(x, batch_size=128, verbose=0)
        times.append(time.perf_counter() - start)
    return min(times)
