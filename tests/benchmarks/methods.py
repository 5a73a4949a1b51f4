"""What every method does on two small networks: accuracy at batch sizes 128, 8 and 1,
seconds per step, memory.

    python tests/benchmarks/methods.py [--methods bn gn ...] [--markdown table.md]

A convolutional network and a recurrent one are trained on scikit-learn's digits under
each method, which starts as its paper says from the same weights; the same number of
samples seen. A step is forward and backward pass of 128 images of 28 x 28 pixels in
training mode, timed in turns with the same network under Keras's batch normalization;
memory is that of the temporaries of the step as compiled by JAX, whatever the backend.
Both are ratios.

About 25 s a method on 2 cores. Results are kept in build/methods.<backend>.json and
reused; `--again accuracy` or `--again step` measures the named methods anew.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers, ops
from sklearn.datasets import load_digits

import kerasnorm
from kerasnorm.method.registry import get
from kerasnorm.numerics import backend
from kerasnorm.properties.candidates import as_inputs, put_under


ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 6144  # seen in each training
TEST = 360
# Steps differ by a factor of 128: Adam's rate falls with the batch, and the moving
# statistics remember about as many samples.
RATES = {128: 1e-2, 8: 3e-3, 1: 1e-3}
MOMENTA = {128: 0.9, 8: 0.99, 1: 0.999}
STEP, PIXELS, TURNS = 128, 28, 9


def digits():
    """Images in [-1, 1] and labels; the last `TEST` are for testing."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = data.images[order].astype("float32") / 8 - 1
    return x, data.target[order].astype("int32")


def convolutional(momentum, pixels=8):
    """Three convolutions, each with a normalization and a ReLU."""
    x = inputs = keras.Input((pixels, pixels, 1))
    for k, (filters, strides) in enumerate([(16, 1), (32, 2), (32, 1)]):
        x = layers.Conv2D(
            filters, 3, strides, padding="same", use_bias=False, name=f"conv{k}"
        )(x)
        x = layers.BatchNormalization(momentum=momentum, name=f"norm{k}")(x)
        x = layers.ReLU(name=f"relu{k}")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x))


def recurrent(momentum):
    """Rows of an image as a sequence: normalized layers before and after recurrence."""
    x = inputs = keras.Input((8, 8))
    x = layers.Dense(32, use_bias=False, name="dense")(x)
    x = layers.BatchNormalization(momentum=momentum, name="norm0")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.SimpleRNN(32, return_sequences=True, unroll=True, name="rnn")(x)
    x = layers.Dense(32, use_bias=False, name="dense1")(x)
    x = layers.BatchNormalization(momentum=momentum, name="norm1")(x)
    x = layers.ReLU(name="relu1")(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x))


def under(method, network, *args):
    """The network as it starts under the method, and why it is not wholly so; None if
    not at all."""
    keras.utils.set_random_seed(0)
    model = network(*args)
    if method == "batch":
        return model, ""
    shape = (STEP, *model.input_shape[1:])
    x = np.random.default_rng(3).uniform(-1, 1, shape).astype("float32")
    new, made = put_under(model, method, as_inputs([x], STEP))
    refused = [f"{r.path}: {r.detail}" for r in made.refused]
    if new is None:
        return None, refused[0].partition(": ")[2]
    return new, refused[0] if refused else ""


def accuracy(model, x, y, batch):
    """Percent right on the test digits after training in batches of `batch`."""
    train, test = slice(None, -TEST), slice(-TEST, None)
    rows = np.random.default_rng(1).integers(0, len(x) - TEST, SAMPLES)
    model.compile(
        keras.optimizers.Adam(RATES[batch]),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # Compiling takes longer than training does.
        jit_compile=keras.backend.backend() == "jax",
        steps_per_execution=min(32, SAMPLES // batch),
    )
    model.fit(
        x[train][rows], y[train][rows], batch_size=batch, shuffle=False, verbose=0
    )
    scores = ops.convert_to_numpy(model(x[test], training=False))
    return 100 * float(np.mean(np.argmax(scores, -1) == y[test]))


def step_of(model):
    """A step, gradients of a loss and new statistics, and what to call it with."""
    x = np.random.default_rng(2).normal(size=(STEP, PIXELS, PIXELS, 1))
    x = ops.convert_to_tensor(x.astype("float32"))
    others = [v.value for v in model.non_trainable_variables]

    def step(x):
        kept = []

        def loss(*weights):
            y, new = model.stateless_call(list(weights), others, x, training=True)
            kept.extend(new)
            return ops.mean(ops.square(y))

        value, slopes = backend.vjp(loss, [v.value for v in model.trainable_variables])
        if keras.backend.backend() == "jax":
            kept = []  # tracers of the inner function
        return value, slopes, kept

    return step, x


def stepper(model, jit):
    """A step as a function without arguments that has run once."""
    step, x = step_of(model)
    run = backend.compiled(step, jit, x.shape)

    def once():
        ops.convert_to_numpy(run(x)[0])

    once()
    return once


def turns(*sides):
    """Median seconds of each side; they take turns."""
    seconds = [[] for _ in sides]
    for _ in range(TURNS):
        for run, found in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return [statistics.median(s) for s in seconds]


def memory(names):
    """Bytes of temporaries of the compiled step under each method, relative to those
    under batch normalization. JAX knows them; TensorFlow does not tell."""
    if keras.backend.backend() != "jax":
        command = [sys.executable, __file__, "--memory", "--methods", *names]
        environment = {**os.environ, "KERAS_BACKEND": "jax"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    import jax

    def temporaries(model):
        step, x = step_of(model)
        analysis = jax.jit(step).lower(x).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    stock = temporaries(convolutional(0.9, PIXELS))
    found = {}
    for name in names:
        try:
            model, _ = under(name, convolutional, 0.9, PIXELS)
        except Exception:  # told by `measure`
            continue
        if model is not None:
            found[name] = temporaries(model) / stock
        keras.backend.clear_session()
    return found


def trained(method, x, y):
    """Accuracies under the method, and what was left as it was."""
    row = {"notes": []}
    for name, network in (("cnn", convolutional), ("rnn", recurrent)):
        for batch in RATES:
            model, reason = under(method, network, MOMENTA[batch])
            if reason and reason not in row["notes"]:
                row["notes"].append(reason)
            if model is None:
                break
            row[f"{name} {batch}"] = accuracy(model, x, y, batch)
    return row


def timed(method):
    """Seconds of a step under the method, relative to stock batch normalization."""
    row = {}
    stock = convolutional(0.9, PIXELS)
    model, _ = under(method, convolutional, 0.9, PIXELS)
    if model is None:
        return row
    kinds = {"plain": False, "xla": True}
    if keras.backend.backend() == "jax":
        del kinds["plain"]  # that would be operation by operation
    for name, jit in kinds.items():
        sides = stepper(stock, jit), stepper(model, jit)
        base, seconds = turns(*sides)
        row[name] = seconds / base
        row[f"{name} ms"] = 1000 * base
    return row


COLUMNS = {
    "CNN 128": "cnn 128",
    "8": "cnn 8",
    "1": "cnn 1",
    "RNN 128": "rnn 128",
    "8 ": "rnn 8",
    "1 ": "rnn 1",
    "step": "plain",
    "step, XLA": "xla",
    "memory": "memory",
}


def table(results):
    """The results as Markdown."""
    lines = [
        f"| method | {' | '.join(COLUMNS)} |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    left_out = []
    for name, row in sorted(results.items()):
        cells = []
        for key in COLUMNS.values():
            digits = 1 if key[:3] in ("cnn", "rnn") else 2
            cells.append(f"{row[key]:.{digits}f}" if key in row else "")
        if any(cells):
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
        left_out += [f"- `{name}`: {note}" for note in row["notes"]]
    if left_out:
        lines += ["", "Left as they were, or left out:", "", *left_out]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", help="names or aliases; default: all")
    parser.add_argument(
        "--again", nargs="+", default=[], choices=["accuracy", "step"], help="anew"
    )
    parser.add_argument("--markdown", type=Path, help="file for the table")
    parser.add_argument("--memory", action="store_true", help="memory alone, as JSON")
    args = parser.parse_args()
    path = ROOT / "build" / f"methods.{keras.backend.backend()}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    names = [get(m).name for m in args.methods or kerasnorm.methods()]
    if args.memory:
        print(json.dumps(memory(names)))
        return
    x, y = digits()
    for name in names:
        if name in results and not args.again:
            continue
        start = time.perf_counter()
        try:
            if name not in results or "accuracy" in args.again:
                results[name] = trained(name, x, y)
                keras.backend.clear_session()
            results[name] |= timed(name)
        except Exception as error:  # one method that breaks must not lose the others
            first = str(error).partition("\n")[0]
            note = f"{type(error).__name__}: {first}"
            results[name] = {**results.get(name, {}), "notes": [note]}
        keras.backend.clear_session()
        seconds = time.perf_counter() - start
        shown = {k: round(v, 2) for k, v in results[name].items() if k != "notes"}
        print(f"{name} ({seconds:.0f} s): {shown} {'; '.join(results[name]['notes'])}")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1))
    for name, ratio in memory([n for n in names if "xla" in results[n]]).items():
        results[name]["memory"] = ratio
    path.write_text(json.dumps(results, indent=1))
    text = table({n: results[n] for n in names})
    print(text)
    if args.markdown:
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
