"""Times steps of layers, of any generation of Keras, against each other.

Imports neither kerasnorm nor Keras: it also runs beside tensorflow-addons, in an
environment of its own, where it is a program that times what it is told on its
standard input (see `Elsewhere`).
"""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np


# Of our environment, what is nothing for another.
OURS = ("PYTHONPATH", "TF_USE_LEGACY_KERAS")

# The first runs of a turn find cold caches and sleeping threads, and say more about
# what ran before than about the step.
TURN = 5e-2


def inputs(shape):
    """An input and the gradient of the outputs, the same wherever they are made."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype("float32") for _ in range(2)]


def tensorflow_steps(layer, shape, jit):
    """Forward pass, forward and backward pass, inference: functions without arguments.

    Args:
        layer: of Keras 3, tf-keras or the Keras beside tensorflow-addons; or a plain
            function, which has no weights.
        shape: of the inputs.
        jit: through XLA.
    """
    import tensorflow as tf

    x, dy = map(tf.constant, inputs(shape))
    modal = "training" in inspect.signature(getattr(layer, "call", layer)).parameters
    layer(x, **({"training": True} if modal else {}))
    # A Keras 3 variable holds one of TensorFlow, which the others are themselves.
    variables = [
        v._value if type(v).__module__.startswith("keras.") else v
        for v in getattr(layer, "trainable_variables", ())
    ]

    def call(x, training):
        return layer(x, **({"training": training} if modal else {}))

    def forward(x, dy):
        return call(x, True)

    def backward(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(x, True)
        return y, tape.gradient(y, [x, *variables], dy)

    def inference(x, dy):
        return call(x, False)

    found = {"forward": forward, "backward": backward}
    if modal and getattr(layer, "non_trainable_variables", None):
        found["inference"] = inference

    def ready(f):
        compiled = tf.function(f, jit_compile=jit)
        return lambda: compiled(x, dy)

    return {name: ready(f) for name, f in found.items()}


def multiply_add(shape):
    """The yardstick: a copy of the input, multiplied and added to by channel."""
    import tensorflow as tf

    a = tf.constant(np.linspace(0.5, 1.5, shape[-1]).astype("float32"))
    return lambda x: x * a + (1 - a)


def repeats_of(f, seconds=TURN):
    """Warms a step up; how often a turn of so many seconds runs it."""
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        wait(f())
    start = time.perf_counter()
    wait(f())
    return max(1, math.ceil(seconds / (time.perf_counter() - start)))


def turn(f, times):
    """Seconds of one run, the mean of so many."""
    start = time.perf_counter()
    for _ in range(times):
        result = f()
    wait(result)
    return (time.perf_counter() - start) / times


def wait(result):
    """Until a result is there: JAX and PyTorch answer before they have computed."""
    if "jax" in sys.modules:
        sys.modules["jax"].block_until_ready(result)
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.synchronize()


# ------------------------------------------------------- in another environment


class Elsewhere:
    """Steps of tensorflow-addons, timed by this file under another Python.

    Args:
        python: an interpreter that has what `requirements-tfa.txt` says.
    """

    def __init__(self, python):
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.process = subprocess.Popen(
            [python, "-W", "ignore", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={k: v for k, v in environment.items() if k not in OURS},
            text=True,
        )

    def _ask(self, **question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("the process that times tensorflow-addons has ended")
        return json.loads(answer)

    def steps(self, method, shape, jit):
        """`{name: function -> seconds}`; empty where there is no such layer."""
        names = self._ask(method=method, shape=shape, jit=jit)
        return {name: lambda name=name: self._ask(turn=name) for name in names}

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def addons(method, wrapped):
    """The layer of tensorflow-addons, None where it has none."""
    import tensorflow as tf

    if not hasattr(tf.keras, "__version__"):
        import keras

        tf.keras.__version__ = keras.__version__  # addons read it, 2.15.1 forgot it
    import tensorflow_addons as tfa

    layers = {
        "group": lambda: tfa.layers.GroupNormalization(32, epsilon=1e-3),
        "instance": lambda: tfa.layers.InstanceNormalization(epsilon=1e-3),
        "filter_response": lambda: tfa.layers.FilterResponseNormalization(),
        "weight": lambda: tfa.layers.WeightNormalization(
            wrapped(tf.keras.layers), data_init=False
        ),
        "spectral": lambda: tfa.layers.SpectralNormalization(wrapped(tf.keras.layers)),
    }
    return layers[method]() if method in layers else None


def wrapped_layer(shape):
    """Function of a module of layers that makes the one whose kernel is normalized."""
    channels = shape[-1]
    if len(shape) == 4:
        return lambda layers: layers.Conv2D(channels, 3, padding="same")
    return lambda layers: layers.Dense(channels)


def serve():
    """Answers the questions of `Elsewhere`, a line each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    known = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "turn" in question:
            answer = turn(*known[question["turn"]])
        else:
            shape, jit = tuple(question["shape"]), question["jit"]
            made = addons(question["method"], wrapped_layer(shape))
            steps = {} if made is None else tensorflow_steps(made, shape, jit)
            if steps:
                yardstick = tensorflow_steps(multiply_add(shape), shape, jit)
                steps["yardstick"] = yardstick["forward"]
            known = {name: (f, repeats_of(f)) for name, f in steps.items()}
            answer = list(known)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
