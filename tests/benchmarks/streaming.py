"""Peak memory and time of what reads its data as it comes, at 1 000 to 100 000 images.

    python tests/benchmarks/streaming.py [images ...]

The images are made on the fly by a `PyDataset`, so that whatever memory is taken is
taken by kerasnorm. Each line is a process of its own: "peak" is what it took at its
highest (VmHWM) above what it had with the models made (VmRSS), in MB; "seconds" are
those of the task, compilation included. Fits read as many images as there are only to
distill: the closed-form ones solve on the first 1024 or 2048.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
IMAGES = (1_000, 10_000, 100_000)
CLASSES, BATCH = 10, 100
TASKS = ("affine", "refit", "distill", "evaluate", "measure")


def memory(key: str) -> float:
    """Memory of this process in MB: `VmHWM`, the most so far, or `VmRSS`, now."""
    for line in pathlib.Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {key} here")


def source(images: int, size: int):
    """A `PyDataset` that draws its images when it is asked for them."""
    import keras
    import numpy as np

    class Drawn(keras.utils.PyDataset):
        def __len__(self):
            return images // BATCH

        def __getitem__(self, index):
            rng = np.random.default_rng(index)
            x = rng.random((BATCH, size, size, 3), "float32")
            return x, rng.integers(0, CLASSES, BATCH)

    return Drawn()


def network(size: int):
    """Three convolutions, each with batch normalization."""
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    x = inputs = keras.Input((size, size, 3))
    for channels in (8, 16, 16):
        x = layers.Conv2D(channels, 3, strides=2, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, x)


def run(task: str, images: int, size: int = 32, most: float = 2e9) -> dict[str, float]:
    """Peak memory above the models and seconds of one task, on images of `size` by
    `size`; a fit may take `most` bytes for data and activations."""
    import kerasnorm

    model, data = network(size), source(images, size)
    held = memory("VmRSS")
    started = time.perf_counter()
    if task == "evaluate":
        kerasnorm.adversarial.evaluate(
            model, data, attacks="fgsm", eps=0.01, verbose=False
        )
    elif task == "measure":
        kerasnorm.properties.measure(model, data)
    else:
        options = {"epochs": 1, "batch_size": 100} if task == "distill" else {}
        options["memory"] = most
        kerasnorm.rewrite(
            *(model, "gn"),
            groups=4,
            data=data,
            fit=task,
            fit_options=options,
            verbose=False,
        )
    seconds = time.perf_counter() - started
    return {"peak": memory("VmHWM") - held, "seconds": seconds}


def main(counts: list[int]) -> None:
    print("| task | images | peak, MB | seconds |\n|---|---:|---:|---:|")
    for task in TASKS:
        for images in counts:
            found = subprocess.run(
                [sys.executable, __file__, "--one", task, str(images)],
                capture_output=True,
                text=True,
                check=True,
            )
            line = json.loads(found.stdout.splitlines()[-1])
            print(
                f"| {task} | {images} | {line['peak']:.0f} | {line['seconds']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(run(sys.argv[2], *map(int, sys.argv[3:]))))
    else:
        main([int(n) for n in sys.argv[1:]] or list(IMAGES))
