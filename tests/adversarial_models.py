"""What the adversarial tests attack: a linear model with known answers, and small
networks. The oracles are NumPy in float64 and share no code with the attacks."""

from __future__ import annotations

import keras
import numpy as np


SHAPE = (6, 6, 2)
CLASSES = 5
NORMS = ("linf", "l2", "l1")


def linear(classes=CLASSES, activation=None, scale=0.3):
    """(model, weights (features, classes), bias)."""
    rng = np.random.default_rng(3)
    w = rng.normal(0, scale, (int(np.prod(SHAPE)), classes)).astype("float32")
    b = rng.normal(0, 0.1, classes).astype("float32")
    dense = keras.layers.Dense(classes, activation=activation)
    model = keras.Sequential([keras.Input(SHAPE), keras.layers.Flatten(), dense])
    dense.set_weights([w, b])
    return model, w.astype("float64"), b.astype("float64")


def images(n=60, seed=0):
    return np.random.default_rng(seed).random((n, *SHAPE)).astype("float32")


def labels(w, b, x):
    """What the linear model answers: all points are classified correctly."""
    return (x.reshape(len(x), -1) @ w + b).argmax(1).astype("int32")


def network(classes=4, ending="logits", seed=0):
    """A small trained network, and the data it was trained on."""
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    x = rng.random((256, 8, 8, 3)).astype("float32")
    y = np.arange(256) % classes
    for c in range(classes):  # a bright bar whose place is the class
        x[y == c, 2 * c : 2 * c + 2] = 0.4 * x[y == c, 2 * c : 2 * c + 2] + 0.6
    layers = keras.layers
    parts = [
        keras.Input((8, 8, 3)),
        layers.Conv2D(8, 3, padding="same", use_bias=False),
        layers.BatchNormalization(momentum=0.8),
        layers.ReLU(),
        layers.Dropout(0.1),
        layers.Flatten(),
        layers.Dense(classes),
    ]
    if ending == "softmax":
        parts.append(layers.Softmax())
    model = keras.Sequential(parts)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=ending == "logits")
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    model.fit(x, y, batch_size=64, epochs=6, verbose=0)
    return model, x, y.astype("int32")


# ------------------------------------------------------------------ oracles


def norm_of(norm, d):
    d = np.abs(np.asarray(d, "float64")).reshape(len(d), -1)
    if norm == "linf":
        return d.max(1)
    return d.sum(1) if norm == "l1" else np.sqrt((d**2).sum(1))


def gain(norm, v, x, eps, low=0.0, high=1.0):
    """Largest <v, d> over |d| <= eps with low <= x + d <= high, one row."""
    room = np.where(v > 0, high - x, x - low)
    a = np.abs(v)
    if norm == "linf":
        return float((a * np.minimum(eps, room)).sum())
    if norm == "l1":
        total, left = 0.0, eps
        for i in np.argsort(-a):
            step = min(room[i], left)
            total, left = total + a[i] * step, left - step
        return float(total)
    free, d = np.ones_like(a, bool), np.zeros_like(a)
    for _ in range(len(a) + 1):  # those that hit their bound stay there
        left = max(eps**2 - (d[~free] ** 2).sum(), 0.0)
        size = np.sqrt((a[free] ** 2).sum())
        if size == 0:
            break
        d[free] = a[free] * np.sqrt(left) / size
        over = free & (d > room)
        if not over.any():
            break
        d[over], free = room[over], free & ~over
    return float((a * d).sum())


def stands(norm, w, b, x, y, eps):
    """Whether each point of a linear model stands, exactly, `(n,)` bool."""
    flat = x.reshape(len(x), -1).astype("float64")
    z = flat @ w + b
    answer = np.ones(len(x), bool)
    for i in range(len(x)):
        for t in range(w.shape[1]):
            if t != y[i]:
                best = gain(norm, w[:, t] - w[:, y[i]], flat[i], eps)
                answer[i] &= z[i, t] + best < z[i, y[i]]
    return answer


def radius(norm, w, b, x, y, share=0.5):
    """A radius at which about this share of the points stands."""
    low, high = 0.0, 40.0
    for _ in range(30):
        middle = (low + high) / 2
        if stands(norm, w, b, x, y, middle).mean() > share:
            low = middle
        else:
            high = middle
    return low
