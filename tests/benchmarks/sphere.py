"""Learning rates over four decades, on spheres and off them.

A CNN with batch normalization is trained by SGD with momentum and by OnSphere of the
same, with and without weight decay, from several seeds. For each rate: test accuracy
(mean and spread over seeds), and by how much the lengths of the scale-invariant filters
grew. Then, for each optimizer, the best rate, and the decades of rates within one point
of the best. Also what the optimizer and the monitor cost, with --cost.

    python tests/benchmarks/sphere.py
    python tests/benchmarks/sphere.py --dataset cifar10 --images 50000 --epochs 10
    python tests/benchmarks/sphere.py --cost

The default is small (12 000 images at half their size, 3 epochs) and takes some minutes
on 2 cores.
"""

from __future__ import annotations

import argparse
import time

import keras
import numpy as np
from common import cifar10, fashion_mnist, resnet
from keras import layers

from kerasnorm.callbacks import SphereMonitor
from kerasnorm.sphere import OnSphere, scale_invariant_weights


def halved(x):
    """Means over 2 x 2 pixels."""
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def network(shape):
    inputs = x = keras.Input(shape)
    for filters, strides in ((16, 1), (32, 2), (32, 1), (64, 2)):
        x = layers.Conv2D(filters, 3, strides, "same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Rates(keras.callbacks.Callback):
    """From the full rate to 0 along a cosine, step by step."""

    def __init__(self, rate, steps):
        super().__init__()
        self.rate, self.steps, self.step = rate, steps, 0

    def on_train_batch_begin(self, batch, logs=None):
        now = self.rate * 0.5 * (1 + np.cos(np.pi * self.step / self.steps))
        self.model.optimizer.learning_rate = now
        self.step += 1


def kernels(model):
    return [f.kernel.variable for f in scale_invariant_weights(model).invariant]


def sweep(options, make, train, test):
    """{rate: (accuracies, growth of norms)}; one compiled model, set back each time."""
    model = network(train[0].shape[1:])
    optimizer = make(model)
    model.compile(optimizer, loss(), metrics=["accuracy"])
    optimizer.build(model.trainable_variables)
    start = [v.numpy() for v in optimizer.variables]
    steps = options.epochs * -(-len(train[0]) // options.batch)
    radii = {id(v): v for v in getattr(optimizer, "_radii", {}).values()}
    found = {}
    for rate in options.rates:
        accuracies, growth = [], []
        for seed in range(options.seeds):
            keras.utils.set_random_seed(seed)
            model.set_weights(network(train[0].shape[1:]).get_weights())
            for v, value in zip(optimizer.variables, start, strict=True):
                if id(v) not in radii:
                    v.assign(value)
            for i, radius in getattr(optimizer, "_radii", {}).items():
                spheres = optimizer._held[i]
                value = spheres.split(model.trainable_variables[i].value)
                radius.assign(spheres.radius(value))
            before = [np.linalg.norm(v.numpy()) for v in kernels(model)]
            model.fit(
                *train,
                batch_size=options.batch,
                epochs=options.epochs,
                verbose=0,
                callbacks=[Rates(rate, steps)],
            )
            after = [np.linalg.norm(v.numpy()) for v in kernels(model)]
            growth.append(np.mean(np.divide(after, before)))
            scores = model.predict(test[0], batch_size=500, verbose=0)
            right = np.argmax(np.nan_to_num(scores, nan=-1e9), -1) == test[1]
            accuracies.append(100 * right.mean() if np.isfinite(scores).all() else 10.0)
        found[rate] = np.array(accuracies), float(np.mean(growth))
        a = found[rate][0]
        print(
            f"  rate {rate:<8g} accuracy {a.mean():5.1f} spread {np.ptp(a):4.1f}"
            f"   norms x {found[rate][1]:.3g}",
            flush=True,
        )
    return found


def summary(found):
    means = {rate: a.mean() for rate, (a, _) in found.items()}
    best = max(means, key=means.get)
    near = [rate for rate, mean in means.items() if mean >= means[best] - 1]
    width = np.log10(max(near) / min(near))
    return best, means[best], width, min(near), max(near)


def sweeps(options):
    load = {"fashion_mnist": fashion_mnist, "cifar10": cifar10}[options.dataset]
    (x, y), (x_test, y_test) = load()
    if options.half:
        x, x_test = halved(x[: options.images]), halved(x_test)
    train, test = (x[: options.images], y[: options.images]), (x_test, y_test)
    print(f"{options.dataset}, {len(train[0])} images, {options.epochs} epochs")
    results = {}
    for decay in (None, 5e-4):
        for name in ("SGD", "OnSphere(SGD)"):

            def make(model, name=name, decay=decay):
                sgd = keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=decay)
                return (
                    sgd
                    if name == "SGD"
                    else OnSphere(sgd, model, max_angle=options.max_angle)
                )

            label = f"{name}, weight decay {decay or 0:g}"
            print(label)
            results[label] = sweep(options, make, train, test)
    print(f"\n{'':34}best rate  accuracy  decades within one point")
    for label, found in results.items():
        best, mean, width, low, high = summary(found)
        print(f"{label:34}{best:9g}  {mean:8.1f}  {width:.1f} ({low:g} to {high:g})")


def cost(options):
    """Time of a training step of ResNet-20, wrapped and not, turn by turn."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(options.batch, 32, 32, 3)).astype("float32"))
    y = tf.constant(np.arange(options.batch) % 10)

    def step(make, jit, monitored=False):
        model = resnet(20)
        model.compile(make(model), loss(), jit_compile=jit)
        model.optimizer.build(model.trainable_variables)
        if monitored:
            monitor = SphereMonitor()
            monitor.set_model(model)
            monitor.on_train_begin()

        @tf.function(jit_compile=jit)
        def run():
            with tf.GradientTape() as tape:
                value = loss()(y, model(x, training=True))
            gradients = tape.gradient(value, model.trainable_variables)
            model.optimizer.apply(gradients, model.trainable_variables)
            return value

        for _ in range(2):
            run()
        return run

    optimizers = {
        "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
        "Adam": lambda: keras.optimizers.Adam(1e-3),
    }
    for jit in (False, True):
        for name, make in optimizers.items():
            pairs = {
                f"OnSphere({name})": lambda m, make=make: OnSphere(make(), m),
                f"{name} with SphereMonitor": lambda m, make=make: make(),
            }
            plain = step(lambda m, make=make: make(), jit)
            for label, other in pairs.items():
                both = plain, step(other, jit, "Monitor" in label)
                times = np.array(
                    [[timed(f) for f in both] for _ in range(options.turns)]
                )
                first, second = np.median(times, 0)
                print(
                    f"{'XLA' if jit else 'plain':6}{label:28}{first * 1e3:7.1f} ms"
                    f" -> {second * 1e3:7.1f} ms: {second / first - 1:+.1%}",
                    flush=True,
                )


def timed(f):
    start = time.perf_counter()
    f().numpy()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dataset", default="fashion_mnist", choices=("fashion_mnist", "cifar10")
    )
    parser.add_argument("--images", type=int, default=12000)
    parser.add_argument("--full-size", dest="half", action="store_false")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-angle", type=float)
    parser.add_argument("--cost", action="store_true", help="time steps instead")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0],
    )
    options = parser.parse_args()
    (cost if options.cost else sweeps)(options)


if __name__ == "__main__":
    main()
