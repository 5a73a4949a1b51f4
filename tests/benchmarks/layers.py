"""kerasnorm's layers beside Keras's own: seconds as a ratio, ours over Keras's.

    python tests/benchmarks/layers.py [--repeats 15] [--methods batch group ...]

Both sides compute the same and take turns within one run; medians. "forward" and
"backward" (forward and backward pass, gradients of inputs and weights) are in training
mode; "graph" is TensorFlow's plain graph, "xla" compiled. KERAS_BACKEND=jax has xla
alone. A ratio below 1 is faster than Keras.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers, tree

from kerasnorm import backend
from kerasnorm.method import get


IMAGES = [(64, 32, 32, 64), (16, 56, 56, 64), (128, 8, 8, 256)]
SEQUENCES = [(32, 128, 512), (8, 1024, 256)]
VECTORS = [(256, 512)]
SHAPES = IMAGES + SEQUENCES + VECTORS

# Method -> Keras's layer, arguments of ours, arguments of theirs, shapes.
PAIRS = {
    "batch": (layers.BatchNormalization, {}, {}, SHAPES),
    "group": (layers.GroupNormalization, {}, {}, SHAPES),
    "layer": (layers.LayerNormalization, {}, {}, SHAPES),
    "layer of images": (
        layers.LayerNormalization,
        {"axis": (1, 2, 3)},
        {"axis": (1, 2, 3)},
        IMAGES,
    ),
    "instance": (layers.GroupNormalization, {}, {"groups": -1}, IMAGES + SEQUENCES),
    "rms": (layers.RMSNormalization, {}, {}, SHAPES),
}


def functions(layer, shape, jit):
    """Forward pass, forward and backward pass, and inference, compiled."""
    layer.build(shape)
    trainable = [v.value for v in layer.trainable_variables]
    others = [v.value for v in layer.non_trainable_variables]
    modal = layer._call_has_training_arg and others

    def call(training, x, *weights):
        kwargs = {"training": training} if modal else {}
        return layer.stateless_call(list(weights), others, x, **kwargs)

    def forward(inputs):
        return call(True, inputs[0], *trainable)

    def backward(inputs):
        x, dy = inputs
        return backend.vjp(lambda *v: call(True, *v)[0], [x, *trainable], dy)

    def inference(inputs):
        return call(False, inputs[0], *trainable)[0]

    found = {"forward": forward, "backward": backward}
    if modal:
        found["inference"] = inference
    return {name: backend.compiled(f, jit) for name, f in found.items()}


def wait(result):
    for leaf in tree.flatten(result):
        if hasattr(leaf, "block_until_ready"):
            leaf.block_until_ready()


def compare(ours, theirs, inputs, repeats):
    """Ratio of the medians of two functions that take turns, after a warm-up."""
    seconds = [], []
    for turn in range(repeats + 2):
        for f, into in zip((ours, theirs), seconds, strict=True):
            start = time.perf_counter()
            wait(f(inputs))
            if turn > 1:
                into.append(time.perf_counter() - start)
    ours, theirs = map(statistics.median, seconds)
    return ours / theirs, theirs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--methods", nargs="*", default=list(PAIRS))
    arguments = parser.parse_args()
    modes = [True] if keras.backend.backend() == "jax" else [False, True]
    rng = np.random.default_rng(0)
    worst, ratios = (0.0, ""), []
    print(f"{'method':16} {'shape':18} {'':6} ratio (Keras in ms)")
    for name in arguments.methods:
        stock, mine, theirs, shapes = PAIRS[name]
        for shape in shapes:
            inputs = [
                keras.ops.convert_to_tensor(rng.normal(size=shape).astype("float32"))
                for _ in range(2)
            ]
            for jit in modes:
                ours = functions(get(name.split()[0]).layer(**mine), shape, jit)
                other = functions(stock(**theirs), shape, jit)
                cells = []
                for step in ours:
                    ratio, base = compare(
                        ours[step], other[step], inputs, arguments.repeats
                    )
                    cells.append(f"{step} {ratio:4.2f} ({1000 * base:6.1f})")
                    where = f"{name} {shape} {'xla' if jit else 'graph'} {step}"
                    worst = max(worst, (ratio, where))
                    ratios.append(ratio)
                mode = "xla" if jit else "graph"
                print(f"{name:16} {shape!s:18} {mode:6}", "  ".join(cells), flush=True)
    mean = math.exp(statistics.mean(map(math.log, ratios)))
    print(f"geometric mean {mean:.2f}, worst {worst[0]:.2f} ({worst[1]})")


if __name__ == "__main__":
    main()
