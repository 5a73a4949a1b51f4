"""Do properties at initialization predict accuracy after training?

A 10-layer and a 20-layer convolutional network and a small ResNet, on CIFAR-10 at 16x16
pixels, each under the ten methods of Lubana et al. (2021) and under none. Everything is
measured before training on 256 images; then each is trained for a few hundred steps of
SGD and tested. Printed is, per network, Spearman's rank correlation between accuracy
and each property, and the compass's own ranking. Results are kept in ``build/compass``,
so that a run that was stopped goes on.

    python tests/benchmarks/compass.py [--steps 300] [--seeds 1] [--networks cnn10 ...]
    python tests/benchmarks/compass.py --cost
"""

from __future__ import annotations

import argparse
import json
import time

import keras
import numpy as np
from common import ROOT, cifar10
from common import resnet as wide_resnet

from kerasnorm.method.registry import get
from kerasnorm.properties import Measurement, Site, measure, rules
from kerasnorm.properties.candidates import STUDIED, as_inputs, fresh, put_under


CACHE = ROOT / "build" / "compass"
BATCH, RATE, MOMENTUM = 64, 0.05, 0.9
WIDTHS = (16, 32, 64)
layers = keras.layers


def conv_norm(x, filters, name, strides=1, kernel=3):
    x = layers.Conv2D(
        filters,
        kernel,
        strides,
        "same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=name,
    )(x)
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")(x)


def cnn(depth):
    x = inputs = keras.Input((16, 16, 3))
    for k in range(depth):
        stage, before = 3 * k // depth, 3 * (k - 1) // depth
        strides = 2 if k and stage > before else 1
        x = layers.ReLU(name=f"relu{k}")(
            conv_norm(x, WIDTHS[stage], f"conv{k}", strides)
        )
    return head(inputs, x, f"cnn{depth}")


def resnet(depth):
    inputs = keras.Input((16, 16, 3))
    x = layers.ReLU(name="stem_relu")(conv_norm(inputs, WIDTHS[0], "stem"))
    for stage, filters in enumerate(WIDTHS):
        for block in range((depth - 2) // 6):
            name = f"stage{stage}_block{block}"
            strides = 2 if stage and not block else 1
            y = conv_norm(x, filters, f"{name}_a", strides)
            y = conv_norm(layers.ReLU(name=f"{name}_relu")(y), filters, f"{name}_b")
            if strides > 1:
                x = conv_norm(x, filters, f"{name}_skip", strides, 1)
            x = layers.ReLU(name=f"{name}_out")(layers.Add(name=f"{name}_add")([x, y]))
    return head(inputs, x, f"resnet{depth}")


def head(inputs, x, name):
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x), name=name)


NETWORKS = {
    "cnn10": lambda: cnn(10),
    "cnn20": lambda: cnn(20),
    "resnet14": lambda: resnet(14),
}


def data():
    """CIFAR-10, averaged over 2x2 pixels."""

    def shrink(x):
        return x.reshape(len(x), 16, 2, 16, 2, 3).mean((2, 4))

    (x, y), (x_test, y_test) = cifar10()
    return (shrink(x), y), (shrink(x_test[:5000]), y_test[:5000])


def one(network, name, seed, steps, train, test):
    """Measurement and accuracy of one network under one method, cached."""
    path = CACHE / f"{network}_{name}_{steps}steps_seed{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    start = time.time()
    (x, y), (x_test, y_test) = train, test
    keras.utils.set_random_seed(seed)
    base = fresh(NETWORKS[network](), seed)
    model, _ = put_under(base, name, as_inputs([x[:256]], BATCH), seed)
    measured = measure(model, x[:256], y[:256], learning_rate=RATE, batch_size=BATCH)
    model.compile(
        keras.optimizers.SGD(RATE, momentum=MOMENTUM),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    rows = np.random.default_rng(seed).permutation(len(x))[: steps * BATCH]
    history = model.fit(
        x[rows], y[rows], batch_size=BATCH, epochs=1, shuffle=False, verbose=0
    )
    scores = model.predict(x_test, batch_size=500, verbose=0)
    found = {
        "accuracy": float(np.mean(np.argmax(scores, -1) == y_test)),
        "loss": float(history.history["loss"][0]),
        "measurement": json.loads(measured.to_json()),
    }
    CACHE.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    print(f"# {network} {name} seed {seed}: {time.time() - start:.0f} s", flush=True)
    keras.backend.clear_session()
    return found


def measurement(plain):
    """The `Measurement` that was written as JSON."""
    known = {k: plain[k] for k in Measurement.__dataclass_fields__ if k != "sites"}
    sites = tuple(Site(**site) for site in plain["sites"])
    return Measurement(**{**known, "sites": sites, "notes": tuple(plain["notes"])})


def stability(law):
    return -abs(np.log(law.total)) if law.total > 0 else -np.inf


# Larger is better, as the theory has it.
PREDICTORS = {
    "variance": lambda m: stability(m.forward),
    "cosine": lambda m: -m.hidden("cosine")[-1],
    "stable rank": lambda m: m.hidden("stable_rank")[-1],
    "eff. rank": lambda m: m.hidden("effective_rank")[-1],
    "gradient": lambda m: stability(m.backward),
}


def standing(m, name):
    """Where the compass puts a candidate: those ruled out behind the others."""
    method = get(name)
    out = bool(rules.findings(m, method, MOMENTUM))
    return rules.score(m, method, MOMENTUM) - (1e6 if out else 0), out


def spearman(a, b):
    """Spearman's rank correlation; ties share their mean rank."""

    def ranks(v):
        v = np.asarray(v, "float64")
        return np.array([np.sum(v < u) + (np.sum(v == u) - 1) / 2 for u in v])

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def cost(repeats=5):
    """Seconds of a compass, and what a measurement costs in passes over its images.

    A pass is forward and backward of the loss in training mode, gradients at all
    weights, without an update: step by step, as a measurement runs on TensorFlow, and
    as a graph that was compiled before.
    """
    import tensorflow as tf

    import kerasnorm

    (x, y), _ = cifar10()
    x, y = x[:256], y[:256]
    model = wide_resnet(20)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def step(a, b):
        with tf.GradientTape() as tape:
            value = loss(b, model(a, training=True))
        return tape.gradient(value, model.trainable_weights)

    def passes(run):
        for k in range(0, len(x), BATCH):
            run(tf.constant(x[k : k + BATCH]), tf.constant(y[k : k + BATCH]))

    graph = tf.function(step)
    timed = {
        "measure": lambda: measure(model, x, y, loss=loss, batch_size=BATCH),
        "step by step": lambda: passes(step),
        "as a graph": lambda: passes(graph),
    }
    best = dict.fromkeys(timed, float("inf"))
    for _ in range(repeats + 1):  # the first round traces; least times drop it
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    print(f"ResNet-20, {len(x)} images of 32x32, batches of {BATCH}")
    print(f"a measurement takes {best['measure']:.2f} s")
    for name in list(timed)[1:]:
        ratio = best["measure"] / best[name]
        print(f"that is {ratio:.1f} forward and backward passes, run {name}")
    start = time.perf_counter()
    found = kerasnorm.compass(model, x, y, loss=loss, learning_rates=RATE)
    seconds = time.perf_counter() - start
    print(f"a compass over {len(found.candidates)} methods takes {seconds:.0f} s")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--cost", action="store_true", help="time them instead")
    args = parser.parse_args()
    if args.cost:
        return cost()
    train, test = data()
    correlations = {}
    for network in args.networks:
        rows = []
        for name in STUDIED:
            found = [
                one(network, name, seed, args.steps, train, test)
                for seed in range(args.seeds)
            ]
            measured = [measurement(f["measurement"]) for f in found]
            places = [standing(m, name) for m in measured]
            rows.append(
                {
                    "name": name,
                    "accuracy": float(np.mean([f["accuracy"] for f in found])),
                    "compass": float(np.mean([p[0] for p in places])),
                    "out": any(p[1] for p in places),
                    **{
                        title: float(np.mean([f(m) for m in measured]))
                        for title, f in PREDICTORS.items()
                    },
                }
            )
        accuracy = [row["accuracy"] for row in rows]
        correlations[network] = {
            title: spearman([row[title] for row in rows], accuracy)
            for title in (*PREDICTORS, "compass")
        }
        rows.sort(key=lambda row: -row["compass"])
        print(f"\n{network}, {args.steps} steps, {args.seeds} seed(s)")
        print(f"{'compass':>7}  {'method':30}{'accuracy':>9}{'place':>7}")
        by_accuracy = sorted(accuracy, reverse=True)
        for place, row in enumerate(rows, 1):
            mark = "out" if row["out"] else str(place)
            true = 1 + by_accuracy.index(row["accuracy"])
            print(f"{mark:>7}  {row['name']:30}{row['accuracy']:9.1%}{true:7}")
    print("\nSpearman's rank correlation with accuracy")
    titles = (*PREDICTORS, "compass")
    print(f"{'':12}" + "".join(f"{title:>13}" for title in titles))
    for network, found in correlations.items():
        print(f"{network:12}" + "".join(f"{found[t]:13.2f}" for t in titles))
    means = [np.mean([c[t] for c in correlations.values()]) for t in titles]
    print(f"{'mean':12}" + "".join(f"{v:13.2f}" for v in means))


if __name__ == "__main__":
    main()
