"""What XLA does to whole programs: an evaluation by PGD, plain and compiled.

    python tests/benchmarks/compilation.py

TensorFlow; seconds of the first evaluation of a model, which traces and compiles, and
the least of two more. Where the first costs more than the others save, compiling does
not pay; `kerasnorm.jit("auto")` is what these figures say of a CPU.
"""

from __future__ import annotations

import os
import time


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

from kerasnorm import adversarial


def convolutional(x):
    for filters in (16, 32):
        x = layers.Conv2D(filters, 3, 2, padding="same")(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    return layers.GlobalAveragePooling2D()(x)


def dense(x):
    x = layers.Flatten()(x)
    for _ in range(3):
        x = layers.ReLU()(layers.BatchNormalization()(layers.Dense(256)(x)))
    return x


def attention(x):
    x = layers.Dense(64)(layers.Reshape((28, 28))(x))
    for _ in range(3):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(4, 16)(y, y)])
        y = layers.Dense(128, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(64)(y)])
    return layers.GlobalAveragePooling1D()(x)


def recurrent(x):
    return layers.LSTM(64)(layers.Reshape((28, 28))(x))


def main():
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).random((512, 28, 28, 1), "float32")
    print("| model | plain: first | next | XLA: first | next |")
    print("|---|---:|---:|---:|---:|")
    for body in (convolutional, dense, attention, recurrent):
        inputs = keras.Input((28, 28, 1))
        model = keras.Model(inputs, layers.Dense(10)(body(inputs)))
        y = model.predict(x, verbose=0).argmax(1)
        cells = []
        for jit in (False, True):
            run = adversarial.Evaluator(
                model, adversarial.pgd(steps=20), eps=1e-4, jit=jit, verbose=False
            )
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                run(x, y)
                seconds.append(time.perf_counter() - start)
            cells += [f"{seconds[0]:.1f}", f"{min(seconds[1:]):.2f}"]
        print(f"| {body.__name__} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
