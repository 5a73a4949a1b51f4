"""kerasnorm's layers beside their twins: seconds as a ratio, ours over theirs.

    python tests/benchmarks/layers.py [--methods batch group ...] [--repeats 7]
    python tests/benchmarks/layers.py --peer tfa --python /path/to/python

Twins are those of Keras 3, of tf-keras (Keras 2 with TensorFlow's fused kernels, in the
same process) and, with the second form, of tensorflow-addons, which runs in an
environment of its own (requirements-tfa.txt). All sides compute the same and take
turns; the least time of each counts. Those of tensorflow-addons, of another TensorFlow,
are taken in units of a yardstick, a multiply-add copy that both time in the same turns.

"forward" and "backward" (forward and backward pass, gradients of inputs and weights)
are in training mode, moving statistics updated. "graph" is TensorFlow's plain graph,
"xla" compiled; KERAS_BACKEND=jax has xla and Keras alone. Below 1 is faster than the
twin; "floor" is our time over the yardstick's.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from pathlib import Path


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# tf-keras looks for parts of itself in `tf.keras`.
os.environ["TF_USE_LEGACY_KERAS"] = "1"

import keras
import timing
from keras import layers

from kerasnorm.method.registry import get
from kerasnorm.numerics import backend


IMAGES = [
    (64, 32, 32, 64),
    (16, 56, 56, 64),
    (128, 8, 8, 256),
    (32, 16, 16, 128),
    (8, 28, 28, 192),
    (2, 128, 128, 64),
    (256, 4, 4, 512),
    (4, 56, 56, 256),
]
SEQUENCES = [(32, 128, 512), (8, 1024, 256)]
VECTORS = [(256, 512), (4096, 128)]
SHAPES = IMAGES + SEQUENCES + VECTORS
# A convolution or dense layer runs behind the kernel, and hides it on larger inputs.
WRAPPED = [
    (2, 32, 32, 64),
    (1, 28, 28, 128),
    (4, 8, 8, 256),
    (8, 16, 16, 32),
    (4, 128, 512),
    (2, 256, 256),
    (64, 512),
    (16, 2048),
]

# Method -> arguments of ours, shapes.
METHODS = {
    "batch": ({}, SHAPES),
    "sync": ({}, IMAGES),
    "ghost": ({}, IMAGES),
    "renorm": ({}, IMAGES),
    "group": ({}, SHAPES),
    "layer": ({}, SHAPES),
    "layer of images": ({"axis": (1, 2, 3)}, IMAGES),
    "instance": ({}, IMAGES + SEQUENCES),
    "rms": ({}, SHAPES),
    "scale": ({"scale": False}, SHAPES),
    # The activation is a layer of its own in tensorflow-addons.
    "filter_response": ({"threshold": False}, IMAGES),
    "weight": ({}, WRAPPED),
    "spectral": ({}, WRAPPED),
}
WEIGHTS = ("weight", "spectral")


def ours(method, shape):
    """kerasnorm's layer."""
    cls = get(method.split()[0]).layer
    arguments = METHODS[method][0]
    if method in WEIGHTS:
        return cls(timing.wrapped_layer(shape)(layers), **arguments)
    return cls(**arguments)


def of_keras(method, shape):
    """Keras 3's layer, None where it has none."""
    makers = {
        "batch": layers.BatchNormalization,
        "sync": lambda: layers.BatchNormalization(synchronized=True),
        "group": layers.GroupNormalization,
        "layer": layers.LayerNormalization,
        "layer of images": lambda: layers.LayerNormalization(axis=(1, 2, 3)),
        "instance": lambda: layers.GroupNormalization(groups=-1),
        "rms": layers.RMSNormalization,
        "scale": layers.UnitNormalization,
        "spectral": lambda: layers.SpectralNormalization(
            timing.wrapped_layer(shape)(layers)
        ),
    }
    if keras.backend.backend() != "tensorflow":
        del makers["sync"]  # Keras has it on TensorFlow alone
    return makers[method]() if method in makers else None


def of_tf_keras(method, shape):
    """tf-keras's layer, None where it has none."""
    import tf_keras
    from tf_keras.api._v1.keras.layers import BatchNormalization  # takes `renorm`

    theirs = tf_keras.layers
    makers = {
        "batch": lambda: theirs.BatchNormalization(
            fused=True if len(shape) == 4 else None
        ),
        "sync": lambda: theirs.BatchNormalization(synchronized=True),
        "ghost": lambda: BatchNormalization(virtual_batch_size=32),
        "renorm": lambda: BatchNormalization(
            renorm=True, renorm_clipping={"rmax": 3.0, "rmin": 1 / 3, "dmax": 5.0}
        ),
        "group": theirs.GroupNormalization,
        "layer": theirs.LayerNormalization,
        "layer of images": lambda: theirs.LayerNormalization(axis=(1, 2, 3)),
        "instance": lambda: theirs.GroupNormalization(groups=-1),
        "scale": theirs.UnitNormalization,
        "spectral": lambda: theirs.SpectralNormalization(
            timing.wrapped_layer(shape)(theirs)
        ),
    }
    if method == "ghost" and shape[0] % 32:
        return None  # parts of one size only
    return makers[method]() if method in makers else None


PEERS = {"keras": of_keras, "tf-keras": of_tf_keras}


def steps(layer, shape, jit):
    """Functions without arguments, by name."""
    if keras.backend.backend() == "tensorflow":
        return timing.tensorflow_steps(layer, shape, jit)
    x, dy = map(keras.ops.convert_to_tensor, timing.inputs(shape))
    layer.build(shape)
    trainable = [v.value for v in layer.trainable_variables]
    others = [v.value for v in layer.non_trainable_variables]
    modal = layer._call_has_training_arg and others

    def call(training, x, *weights):
        kwargs = {"training": training} if modal else {}
        return layer.stateless_call(list(weights), others, x, **kwargs)

    def backward(x, dy):
        return backend.vjp(lambda *v: call(True, *v)[0], [x, *trainable], dy)

    found = {"forward": lambda x, dy: call(True, x, *trainable), "backward": backward}
    if modal:
        found["inference"] = lambda x, dy: call(False, x, *trainable)[0]

    def ready(f):
        import jax

        compiled = jax.jit(f)
        return lambda: compiled(x, dy)

    return {name: ready(f) for name, f in found.items()}


def yardstick(shape, jit):
    if keras.backend.backend() == "tensorflow":
        f = timing.multiply_add(shape)
        return timing.tensorflow_steps(f, shape, jit)["forward"]
    import jax

    x = keras.ops.convert_to_tensor(timing.inputs(shape)[0])
    a = keras.ops.linspace(0.5, 1.5, shape[-1])
    f = jax.jit(lambda x: x * a + (1 - a))
    return lambda: f(x)


def seconds(sides, repeats):
    """Least seconds of each of several steps that take turns.

    Args:
        sides: by name; functions of no argument, or `(function, None)` for one that
            returns its own seconds.
    """
    counted = {
        name: f if isinstance(f, tuple) else (f, timing.repeats_of(f))
        for name, f in sides.items()
    }
    found = dict.fromkeys(sides, math.inf)
    for _ in range(repeats):
        for name, (f, times) in counted.items():
            spent = f() if times is None else timing.turn(f, times)
            found[name] = min(found[name], spent)
    return found


def compare(method, shape, jit, elsewhere, repeats):
    """Of each step our seconds, over the yardstick's, and over each twin's."""
    twins = {name: make(method, shape) for name, make in PEERS.items()}
    twins = {n: steps(t, shape, jit) for n, t in twins.items() if t is not None}
    if elsewhere is not None:
        twins = {}  # measured apart, so that no more than two take turns
        far = elsewhere.steps(method, list(shape), jit)
    rule = yardstick(shape, jit)
    rows = {}
    for step, mine in steps(ours(method, shape), shape, jit).items():
        sides = {"ours": mine, "yardstick": rule}
        sides |= {n: found[step] for n, found in twins.items() if step in found}
        if elsewhere is not None and step in far:
            sides |= {"tfa": (far[step], None), "unit": (far["yardstick"], None)}
        found = seconds(sides, repeats)
        ratios = {n: found["ours"] / found[n] for n in twins if n in found}
        if "tfa" in found:
            ratios["tfa"] = (found["ours"] / found["yardstick"]) / (
                found["tfa"] / found["unit"]
            )
        rows[step] = found["ours"], found["ours"] / found["yardstick"], ratios
    return rows


def summary(rows, peers):
    """A table of the geometric mean over the shapes, and the largest, of each row.

    Args:
        rows: `(method, shape, mode, step, {peer: ratio})`.
    """
    found = {}
    for method, _, mode, step, ratios in rows:
        for name, ratio in ratios.items():
            place = found.setdefault((method, mode, step), {})
            place.setdefault(name, []).append(ratio)
    print(f"\n| method | | step | shapes | {' | '.join(peers)} |")
    print("|---|---|---|---:|" + "---:|" * len(peers))
    for where, ratios in found.items():
        means = {
            n: math.exp(statistics.mean(map(math.log, v))) for n, v in ratios.items()
        }
        cells = [
            f"{means[n]:.2f} ({max(ratios[n]):.2f})" if n in ratios else ""
            for n in peers
        ]
        count = max(map(len, ratios.values()))
        print(f"| {' | '.join(where)} | {count} | {' | '.join(cells)} |")


def read(paths):
    """Rows of tables that were printed before, and their peers."""
    rows, peers = [], []
    for path in paths:
        for line in path.read_text("utf-8").splitlines():
            cells = [c.strip() for c in line.strip().strip("|").split("|")]
            if cells[0] == "method" and "ms" in cells:
                names = cells[6:]
                peers += [n for n in names if n not in peers]
            elif len(cells) > 6 and cells[2] in ("graph", "xla"):
                found = zip(names, cells[6:], strict=True)
                ratios = {n: float(v) for n, v in found if v}
                rows.append((*cells[:4], ratios))
    return rows, peers


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--shapes", type=int, help="only so many of each method")
    parser.add_argument("--peer", choices=["tfa"], help="the twins of this one")
    parser.add_argument("--python", help="of the environment of --peer")
    parser.add_argument(
        "--read", nargs="*", type=Path, help="only sum up tables printed before"
    )
    arguments = parser.parse_args()
    if arguments.read:
        summary(*read(arguments.read))
        return
    elsewhere = None
    if arguments.peer:
        if not arguments.python:
            parser.error("--peer tfa needs --python /path/to/python, which has it")
        elsewhere = timing.Elsewhere(arguments.python)
    on_jax = keras.backend.backend() == "jax"
    if on_jax:
        del PEERS["tf-keras"]
    peers = ["tfa"] if arguments.peer else list(PEERS)
    worst, ratios, rows = (0.0, ""), {name: [] for name in peers}, []
    print(f"| method | shape | | step | ms | floor | {' | '.join(peers)} |")
    print("|---|---|---|---|---:|---:|" + "---:|" * len(peers))
    for method in arguments.methods:
        for shape in METHODS[method][1][: arguments.shapes]:
            for jit in [True] if on_jax else [False, True]:
                seen = compare(method, shape, jit, elsewhere, arguments.repeats)
                for step, (spent, floor, found) in seen.items():
                    if not found:
                        continue
                    mode = "xla" if jit else "graph"
                    where = f"{method} | {shape} | {mode} | {step}"
                    cells = [f"{found[n]:.2f}" if n in found else "" for n in peers]
                    print(
                        f"| {where} | {1e3 * spent:.2f} | {floor:.1f} | "
                        f"{' | '.join(cells)} |",
                        flush=True,
                    )
                    rows.append((method, str(shape), mode, step, found))
                    for name, ratio in found.items():
                        worst = max(worst, (ratio, f"{where} | {name}"))
                        ratios[name].append(ratio)
    for name, found in ratios.items():
        if found:
            mean = math.exp(statistics.mean(map(math.log, found)))
            slower = sum(r > 1 for r in found)
            print(
                f"{name}: geometric mean {mean:.2f} over {len(found)}, "
                f"{slower} above 1, {sum(r > 1.05 for r in found)} above 1.05"
            )
    print(f"worst {worst[0]:.2f}: {worst[1]}")
    summary(rows, peers)
    if elsewhere is not None:
        elsewhere.close()


if __name__ == "__main__":
    main()
