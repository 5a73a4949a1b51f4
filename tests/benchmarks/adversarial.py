"""Robust accuracy and time beside ART, foolbox, CleverHans and torchattacks.

    python -m venv build/peers
    build/peers/bin/pip install -r tests/benchmarks/requirements-adversarial.txt -e .
    build/peers/bin/python tests/benchmarks/adversarial.py agreement
    build/peers/bin/python tests/benchmarks/adversarial.py speed
    build/peers/bin/python tests/benchmarks/adversarial.py epoch

Three models of CIFAR-10 (the JPEG copy in ``../shared/data``), trained on first use: a
convolutional network, the same trained on adversarial examples, and a linear one whose
robust accuracy is known exactly. Only `agreement` and `speed` need the peers; whichever
is not installed is left out. torchattacks runs the same weights in its own process,
through Keras on PyTorch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import time


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from common import ROOT, cifar10_pixels


CACHE = ROOT / "build" / "adversarial"
PIXEL = 1 / 255
# Steps of 2/255 at eps 8/255 (Madry et al. 2018), the same share of eps elsewhere.
LENGTH = 0.25
BATCH = 125
TRAINED = {"linf": 4 * PIXEL}


# ------------------------------------------------------------------- models


def cifar10():
    """(x_train, y_train), (x_test, y_test); float32 in [0, 1]."""
    return [(x / 255, y) for x, y in cifar10_pixels()]


def network():
    """Four convolutions with batch normalization; logits out."""
    layers = keras.layers
    model = [keras.Input((32, 32, 3))]
    for filters, strides in ((32, 1), (32, 2), (64, 1), (64, 2)):
        model += [
            layers.Conv2D(filters, 3, strides, "same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
        ]
    return keras.Sequential([*model, layers.Flatten(), layers.Dense(10)])


def train(name):
    """A model trained here, within a few minutes on 2 cores."""
    import kerasnorm.adversarial as adversarial

    keras.utils.set_random_seed(0)
    (x, y), test = cifar10()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if name == "linear":
        model = keras.Sequential(
            [keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(10)]
        )
    else:
        model = network()
    trainer, epochs = model, {"linear": 3, "standard": 3, "robust": 3}[name]
    if name == "robust":
        x, y = x[:25000], y[:25000]
        trainer = adversarial.adversarial_training(
            model, eps=TRAINED["linf"], steps=2, length=0.6, seed=0
        )
    steps = epochs * (len(x) // 128)
    peak = 1e-4 if name == "linear" else 3e-3
    schedule = keras.optimizers.schedules.CosineDecay(
        peak / 10, steps, warmup_target=peak, warmup_steps=steps // 5
    )
    trainer.compile(
        keras.optimizers.Adam(schedule),
        loss,
        metrics=["accuracy"],
        jit_compile=False,
    )
    start = time.perf_counter()
    trainer.fit(x, y, batch_size=128, epochs=epochs, verbose=2)
    model.compile(loss=loss, metrics=["accuracy"], jit_compile=False)
    accuracy = model.evaluate(*test, verbose=0, batch_size=500)[1]
    seconds = time.perf_counter() - start
    print(f"{name}: {100 * accuracy:.1f} % on the test set, {seconds:.0f} s")
    CACHE.mkdir(parents=True, exist_ok=True)
    model.save(CACHE / f"{name}.keras")


def load(name):
    path = CACHE / f"{name}.keras"
    if not path.exists():
        train(name)
    return keras.models.load_model(path, compile=False)


# -------------------------------------------------------------------- peers


def peers():
    """The peers that are installed."""
    names = {
        "ART": "art",
        "foolbox": "foolbox",
        "CleverHans": "cleverhans",
        "torchattacks": "torchattacks",
    }
    return [name for name, module in names.items() if importlib.util.find_spec(module)]


def chunks(x, size=BATCH):
    return [slice(i, i + size) for i in range(0, len(x), size)]


def robust(model, x, y, moved):
    """Robust accuracy: what is right on clean inputs and on what they were moved to."""
    right = [
        np.argmax(model.predict(a, batch_size=BATCH, verbose=0), -1) == y
        for a in (x, moved)
    ]
    return float(np.mean(right[0] & right[1]))


def cleverhans_pgd(model, x, y, norm, eps, steps):
    import tensorflow as tf
    from cleverhans.tf2.attacks.projected_gradient_descent import (
        projected_gradient_descent,
    )

    order = {"linf": np.inf, "l2": 2}[norm]
    return np.concatenate(
        [
            projected_gradient_descent(
                model,
                tf.constant(x[rows]),
                eps,
                LENGTH * eps,
                steps,
                order,
                clip_min=0.0,
                clip_max=1.0,
                y=tf.constant(y[rows], tf.int64),
                rand_init=norm == "linf",  # its l2 start is not in the ball
                sanity_checks=False,
            ).numpy()
            for rows in chunks(x)
        ]
    )


def foolbox_pgd(model, x, y, norm, eps, steps):
    import foolbox
    import tensorflow as tf

    attacked = foolbox.TensorFlowModel(model, bounds=(0, 1))
    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    attack = kind(abs_stepsize=LENGTH * eps, steps=steps, random_start=True)
    return np.concatenate(
        [
            attack(
                attacked, tf.constant(x[r]), tf.constant(y[r], tf.int64), epsilons=eps
            )[1].numpy()
            for r in chunks(x)
        ]
    )


def art_classifier(model):
    import tensorflow as tf
    from art.estimators.classification import TensorFlowV2Classifier

    return TensorFlowV2Classifier(
        model=model,
        nb_classes=10,
        input_shape=(32, 32, 3),
        loss_object=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        clip_values=(0, 1),
    )


def art_pgd(model, x, y, norm, eps, steps):
    from art.attacks.evasion import ProjectedGradientDescent

    attack = ProjectedGradientDescent(
        art_classifier(model),
        norm={"linf": np.inf, "l2": 2}[norm],
        eps=eps,
        eps_step=LENGTH * eps,
        max_iter=steps,
        num_random_init=1,
        batch_size=BATCH,
        verbose=False,
    )
    return attack.generate(x, y)


def art_apgd(model, x, y, norm, eps, steps, loss="cross_entropy"):
    from art.attacks.evasion import AutoProjectedGradientDescent

    attack = AutoProjectedGradientDescent(
        art_classifier(model),
        norm={"linf": np.inf, "l2": 2}[norm],
        eps=eps,
        eps_step=2 * eps,
        max_iter=steps,
        nb_random_init=1,
        batch_size=BATCH,
        loss_type=loss,
        verbose=False,
    )
    return attack.generate(x, y)


def art_apgd_dlr(*args):
    return art_apgd(*args, loss="difference_logits_ratio")


PEERS = {
    "CleverHans PGD": cleverhans_pgd,
    "foolbox PGD": foolbox_pgd,
    "ART PGD": art_pgd,
    "ART AutoPGD": art_apgd,
    "ART AutoPGD-DLR": art_apgd_dlr,
}


def torchattacks_ensemble(name, count, norm, eps, ensemble):
    """Robust accuracy by torchattacks, in a process with Keras on PyTorch."""
    command = [sys.executable, __file__, "torch", name, str(count), norm, repr(eps)]
    run = subprocess.run(
        [*command, ensemble],
        env={**os.environ, "KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


def in_torch(name, count, norm, eps, ensemble):
    """Runs torchattacks' AutoAttack: its own, or without FAB and Square."""
    import torch
    import torchattacks

    model = load(name)
    x, y = sample(count)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, images):
            return self.inner(images.permute(0, 2, 3, 1), training=False)

    net = Net().eval()
    kind = {"linf": "Linf", "l2": "L2"}[norm]
    if ensemble == "standard":
        attacks = [torchattacks.AutoAttack(net, kind, float(eps), n_classes=10, seed=0)]
    else:
        attacks = [
            torchattacks.APGD(net, kind, float(eps), steps=100, seed=0),
            torchattacks.APGDT(net, kind, float(eps), steps=100, seed=0, n_classes=10),
        ]
    # Gradients take the strides of what they are of.
    images = torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    labels = torch.tensor(y.astype("int64"))

    def stands(points, rows):
        """Which of the rows are right, or were moved out of the ball."""
        with torch.no_grad():
            right = (net(points).argmax(1) == labels[rows]).numpy()
        gap = (points - images[rows]).flatten(1)
        far = gap.abs().amax(1) if norm == "linf" else gap.norm(dim=1)
        return right | (far > float(eps) * 1.001).numpy()

    start = time.perf_counter()
    standing = stands(images, np.arange(len(x)))
    for attack in attacks:
        for part in chunks(rows := np.flatnonzero(standing)):
            which = rows[part]
            with contextlib.redirect_stdout(io.StringIO()):
                moved = attack(images[which], labels[which]).detach()
            standing[which] = stands(moved, which)
    seconds = time.perf_counter() - start
    print(json.dumps({"robust": float(standing.mean()), "seconds": seconds}))


# --------------------------------------------------------------- comparison


def sample(count):
    """The first test images, in [0, 1]."""
    _, (x, y) = cifar10()
    return x[:count], y[:count]


def exact(model, x, y, norm, eps):
    """Robust accuracy of the linear model: the best margin of every wrong class, with
    the room that the bounds leave."""
    w, b = (a.astype("float64") for a in model.get_weights())
    flat = x.reshape(len(x), -1).astype("float64")
    z = flat @ w + b
    stands = np.zeros(len(x), bool)
    for i in range(len(x)):
        v = w - w[:, y[i], None]
        room = np.where(v > 0, 1 - flat[i][:, None], flat[i][:, None])
        a = np.abs(v)
        if norm == "linf":
            best = (a * np.minimum(eps, room)).sum(0)
        else:
            # All move by their weight times one factor, until they meet the bound.
            low, high = np.zeros(10), np.full(10, 1e9)
            for _ in range(200):
                factor = np.sqrt(np.maximum(low, 1e-12) * high)
                d = np.minimum(a * factor, room)
                over = (d**2).sum(0) > eps**2
                low, high = np.where(over, low, factor), np.where(over, factor, high)
            best = (a * np.minimum(a * low, room)).sum(0)
        gap = z[i] + best - z[i, y[i]]
        stands[i] = np.all(np.delete(gap, y[i]) < 0)
    return float(stands.mean())


SETTINGS = {
    "standard": {"linf": 1 * PIXEL, "l2": 0.15},
    "robust": {"linf": 4 * PIXEL, "l2": 0.5},
    "linear": {"linf": 2 * PIXEL, "l2": 0.3},
}


ENSEMBLES = {"standard": "standard", "apgd": ["apgd-ce", "apgd-t"]}


def agreement(
    models=tuple(SETTINGS), norms=("linf", "l2"), count=500, ensemble="standard"
):
    """Robust accuracy by kerasnorm and by every peer, in percent.

    `ensemble="apgd"` leaves FAB and Square out on both sides, which takes a quarter of
    the time.
    """
    import kerasnorm.adversarial as ours

    there, steps = peers(), 40
    x, y = sample(int(count))
    print(f"{count} test images of CIFAR-10; PGD-{steps} with steps of eps/4; percent")
    for name in models:
        model = load(name)
        for norm in norms:
            eps = SETTINGS[name][norm]
            print(f"\n{name}, {norm} {eps:.4g}")

            def show(label, share, seconds=0.0):
                print(f"  {label:26}{100 * share:7.1f}{seconds:9.1f} s", flush=True)

            if name == "linear":
                show("exact", exact(model, x, y, norm, eps))
            found = ours.evaluate(model, x, y, ours.pgd(steps), norm, eps, verbose=0)
            show("clean", found.clean_accuracy)
            show("kerasnorm pgd", found.robust_accuracy, found.seconds)
            attacks = ENSEMBLES[ensemble]
            found = ours.evaluate(model, x, y, attacks, norm, eps, verbose=0)
            for result in found.attacks:
                show(f"kerasnorm .. {result.name}", result.accuracy, result.seconds)
            for warning in found.warnings:
                print("  ", warning)
            for peer, attack in PEERS.items():
                if peer.split()[0] in there:
                    start = time.perf_counter()
                    with contextlib.redirect_stdout(io.StringIO()):
                        moved = attack(model, x, y, norm, eps, steps)
                    seconds = time.perf_counter() - start
                    show(peer, robust(model, x, y, moved), seconds)
            if "torchattacks" in there:
                answer = torchattacks_ensemble(name, count, norm, eps, ensemble)
                show(f"torchattacks {ensemble}", answer["robust"], answer["seconds"])


def best_of(f, times, warm_up):
    """Least time of a few runs after something that compiles, and the last result."""
    warm_up()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        result = f()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


# Model, radius; what stands at each is printed.
SPEEDS = (("standard", 8 * PIXEL), ("standard", 1.5 * PIXEL), ("robust", 4 * PIXEL))


def speed(cases=(0, 1, 2), count=500, steps=40):
    """Least seconds of PGD and Auto-PGD by every peer, compilation apart."""
    import kerasnorm.adversarial as ours

    there = peers()
    x, y = sample(count)
    attacks = (
        (f"PGD-{steps}", ours.pgd(steps), ("CleverHans PGD", "foolbox PGD", "ART PGD")),
        (f"APGD-{steps}", ours.apgd(steps=steps), ("ART AutoPGD",)),
    )
    for name, eps in (SPEEDS[int(case)] for case in cases):
        model = load(name)
        print(f"\n{name}, linf {eps * 255:.3g}/255, {count} images")
        for kind, attack, names in attacks:
            run = ours.Evaluator(model, attack, eps=eps, verbose=0)
            mine, found = best_of(
                lambda run=run: run(x, y), 2, lambda run=run: run(x[:BATCH], y[:BATCH])
            )
            share = 100 * found.robust_accuracy
            print(f"  {kind:9}{'kerasnorm':18}{mine:8.2f} s{share:7.1f} %")
            for peer in names:
                if peer.split()[0] not in there:
                    continue

                def go(n=count, peer=peer, model=model, eps=eps):
                    with contextlib.redirect_stdout(io.StringIO()):
                        moved = PEERS[peer](model, x[:n], y[:n], "linf", eps, steps)
                    return robust(model, x[:n], y[:n], moved)

                seconds, share = best_of(go, 1, lambda go=go: go(BATCH))
                print(
                    f"  {'':9}{peer:18}{seconds:8.2f} s{100 * share:7.1f} %"
                    f"{seconds / mine:7.1f} times",
                    flush=True,
                )


def epoch(count=500, steps=20):
    """Share of training time that an evaluation in every epoch takes."""
    import kerasnorm.adversarial as ours
    from kerasnorm.callbacks import AdversarialEvaluation

    keras.utils.set_random_seed(0)
    (x, y), test = cifar10()
    model = network()
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    watch = AdversarialEvaluation(*test, ours.pgd(steps), samples=count)
    start = time.perf_counter()
    model.fit(
        x[:20000], y[:20000], batch_size=128, epochs=3, callbacks=[watch], verbose=0
    )
    total = time.perf_counter() - start
    for entry in watch.history:
        accuracy = 100 * entry["val_pgd_accuracy"]
        print(f"epoch {entry['epoch']}: {entry['seconds']:.2f} s, pgd {accuracy:.1f} %")
    spent = watch.seconds
    attack = sum(r.seconds for r in watch.evaluation.attacks)
    print(
        f"{100 * spent / total:.1f} % of {total:.0f} s; last: the attack {attack:.2f} s"
    )


def main(argv):
    command, words = (argv[0] if argv else ""), argv[1:]
    if command == "agreement":
        lists = [word.split(",") for word in words[:2]]
        agreement(*lists, *words[2:])
    elif command == "speed":
        speed(*[words] if words else [])
    elif command == "torch":
        in_torch(words[0], int(words[1]), *words[2:])
    elif command == "epoch":
        epoch()
    else:
        for name in SETTINGS:
            load(name)


if __name__ == "__main__":
    main(sys.argv[1:])
