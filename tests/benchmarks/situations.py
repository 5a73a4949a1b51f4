"""One trained network in the situations that batch normalization is left for.

    python tests/benchmarks/situations.py [--only small private federated shift]

A small ResNet is trained on Fashion-MNIST with batch normalization, then meets images
that are turned by a quarter, which it has to learn from few labels: in batches of two;
with the gradient of every image cut to one length and noise on top, as differentially
private training does; at clients that hold two of the ten classes each. Last it meets
images of less contrast without any label. Percent right on 2000 test images of the new
kind, the mean of three seeds. About 20 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import os


os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# With oneDNN, TensorFlow 2.21 crashes in the gradient of a strided convolution of 1x1
# of a single image.
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"

import common
import keras
import numpy as np
import tensorflow as tf

import kerasnorm


SEEDS = range(3)
UNLABELLED = 1024  # images of the old kind, for the fits
CLIENTS, OF_EACH, ROUNDS = 5, 400, 10


def trained(x, y):
    """The network with batch normalization, trained once."""
    path = common.ROOT / "build" / "situations.keras"
    if not path.exists():
        keras.utils.set_random_seed(0)
        model = common.resnet(8, (8, 16, 32), shape=(28, 28, 1))
        compiled(model, keras.optimizers.Adam(3e-3))
        model.fit(x, y, batch_size=128, epochs=3, verbose=2)
        path.parent.mkdir(exist_ok=True)
        model.save(path)
    return keras.saving.load_model(path)


def compiled(model, optimizer, **more):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False, **more)
    return model


def frozen(model):
    """Batch normalization that uses the statistics it came with."""
    new = kerasnorm.rewrite(model, where=lambda site: False, method="bn")
    for layer in new._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    return new


def rewritten(method, **arguments):
    def make(model):
        return kerasnorm.rewrite(model, method, verbose=False, **arguments)

    return make


def accuracy(model, x, y):
    return 100 * float(np.mean(model.predict(x, verbose=0).argmax(-1) == y))


def in_small_batches(model, x, y, seed):
    """One pass over 1000 images, two at a time."""
    compiled(model, keras.optimizers.Adam(3e-4), steps_per_execution=50)
    keras.utils.set_random_seed(seed)
    model.fit(x[:1000], y[:1000], batch_size=2, verbose=0)


def privately(model, x, y, seed, clip=1.0, noise=1.0, batch=128, steps=100):
    """DP-SGD (Abadi et al., 2016): gradients of single images, cut and noisy."""
    each = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="none"
    )
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
    weights = model.trainable_variables
    tf.random.set_seed(seed)

    def cut(example):
        image, label = example
        with tf.GradientTape() as tape:
            value = each(label[None], model(image[None], training=True))
        gradients = tape.gradient(value, weights)
        return tf.clip_by_global_norm(gradients, clip)[0]

    @tf.function(autograph=False)
    def step(x, y):
        parts = tf.vectorized_map(cut, (x, y))
        noisy = [
            (tf.reduce_sum(g, 0) + noise * clip * tf.random.normal(w.shape)) / batch
            for g, w in zip(parts, weights, strict=True)
        ]
        optimizer.apply(noisy, weights)

    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(0, len(x), batch)
        step(tf.constant(x[rows]), tf.constant(y[rows]))


def federated(model, x, y, seed):
    """Federated averaging (McMahan et al., 2017), two classes at each client."""
    compiled(model, keras.optimizers.SGD(0.01, momentum=0.9), steps_per_execution=20)
    classes = np.random.default_rng(seed).permutation(10).reshape(CLIENTS, -1)
    held = [np.flatnonzero(np.isin(y, own))[:OF_EACH] for own in classes]
    shared = model.get_weights()
    for round in range(ROUNDS):
        results = []
        for rows in held:
            model.set_weights(shared)
            for variable in model.optimizer.variables:
                variable.assign(keras.ops.zeros_like(variable))
            model.optimizer.learning_rate = 0.01
            keras.utils.set_random_seed(1000 * seed + round)
            model.fit(x[rows], y[rows], batch_size=20, verbose=0)
            results.append(model.get_weights())
        shared = [np.mean(parts, 0) for parts in zip(*results, strict=True)]
    model.set_weights(shared)


def adapted(model, x, y, seed):
    """Calls in training mode on the test images, which moves statistics alone."""
    if any("Mecta" in type(layer).__name__ for layer in model._flatten_layers()):
        for k in range(0, len(x), 100):
            model(x[k : k + 100], training=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", nargs="*", choices=("small", "private", "federated", "shift")
    )
    only = parser.parse_args().only
    (x, y), (x_test, y_test) = common.fashion_mnist()
    x_test, y_test = x_test[:2000], y_test[:2000]
    model = trained(x, y)
    print(f"as trained: {accuracy(model, x_test, y_test):.1f} % of the old kind")
    turned, turned_test = (np.rot90(v, axes=(1, 2)).copy() for v in (x[:8000], x_test))
    faint_test = 0.3 * x_test + 0.4
    of_samples = {
        name: rewritten(name, data=x[:UNLABELLED], fit="refit", **more)
        for name, more in {"gn": {"groups": 4}, "ln": {}}.items()
    }
    kept = {"batch, frozen": frozen}
    whole = {"batch": rewritten("bn"), **kept}
    turning = (turned, y[:8000]), (turned_test, y_test)
    situations = {
        "small": (in_small_batches, {**whole, "renorm": rewritten("renorm")}, turning),
        "private": (privately, kept, turning),
        "federated": (federated, whole, turning),
        "shift": (
            adapted,
            {"batch": rewritten("bn"), "mecta": rewritten("mecta")},
            ((faint_test, None), (faint_test, y_test)),
        ),
    }
    for name, (train, ways, (given, test)) in situations.items():
        if only and name not in only:
            continue
        print(f"\n{name}: {train.__doc__.splitlines()[0]}")
        print(f"{'normalization':16}{'before':>9}{'after':>9}{'  of three seeds'}")
        for way, make in {**ways, **of_samples}.items():
            before, after = [], []
            for seed in SEEDS:
                new = make(model)
                before.append(accuracy(new, *test))
                train(new, *given, seed)
                after.append(accuracy(new, *test))
            all_of_them = ", ".join(f"{a:.1f}" for a in after)
            print(
                f"{way:16}{np.mean(before):8.1f}%{np.mean(after):8.1f}%  {all_of_them}",
                flush=True,
            )


if __name__ == "__main__":
    main()
