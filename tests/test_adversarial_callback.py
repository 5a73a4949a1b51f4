"""Robust accuracy inside `fit`: honest, resumable, of use to other callbacks; and
training on adversarial examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import adversarial_models as zoo
import keras
import numpy as np
import pytest
from conftest import ROOT, mostly_ci
from keras import ops

from kerasnorm import adversarial, sphere
from kerasnorm.adversarial.evaluate import evaluate
from kerasnorm.callbacks import AdversarialEvaluation
from kerasnorm.callbacks._steps import Steps
from kerasnorm.callbacks.adversarial_evaluation import weight_norm
from kerasnorm.common.errors import KerasNormError


ATTACKS = [adversarial.pgd(steps=3), adversarial.fgsm()]
QUICK = adversarial.noise(1)


def fresh(optimizer=None, jit=False, policy=None, random=True):
    """A model with everything that could be disturbed: moving statistics, dropout."""
    keras.utils.set_random_seed(5)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(6, 3, dtype=policy),
            layers.BatchNormalization(dtype=policy),
            layers.ReLU(),
            *(
                [layers.Dropout(0.3, seed=1), layers.GaussianNoise(0.1)]
                if random
                else []
            ),
            layers.Flatten(),
            layers.Dense(4, dtype="float32"),
        ]
    )
    model.compile(
        optimizer or keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=jit,
    )
    return model


def small(optimizer="sgd", **compiled):
    keras.utils.set_random_seed(5)
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Flatten(), layers.Dense(4)]
    )
    return compiled_again(model, optimizer, **compiled)


def compiled_again(model, optimizer="sgd", **compiled):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    jit = keras.backend.backend() == "jax"
    model.compile(optimizer, loss, jit_compile=jit, **compiled)
    return model


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = rng.random((96, 8, 8, 3)).astype("float32")
    y = np.arange(96) % 4
    for c in range(4):
        x[y == c, 2 * c : 2 * c + 2] *= 0.5
    return x, y


def watcher(data, **settings):
    given = {"attacks": ATTACKS, "eps": 0.03, "samples": 40, **settings}
    return AdversarialEvaluation(*data, **given)


def state(model):
    values = [*model.variables, *model.optimizer.variables]
    return [np.array(ops.convert_to_numpy(v.value)) for v in values]


FITS = {
    "plain": {},
    "ema": {"optimizer": lambda: keras.optimizers.SGD(0.1, use_ema=True)},
    "bfloat16": {"policy": "mixed_bfloat16"},
    "jit": {"jit": True},
}


@pytest.mark.parametrize("kind", mostly_ci(FITS, ["plain"]))
def test_training_is_the_same_to_the_last_bit(kind, data):
    made = dict(FITS[kind])
    optimizer = made.pop("optimizer", lambda: None)
    runs = []
    for watched in (False, True):
        model = fresh(optimizer(), **made)
        callbacks = [watcher(data, every_steps=2, ema=kind == "ema")] if watched else []
        history = model.fit(
            *data, batch_size=32, epochs=2, verbose=0, callbacks=callbacks
        ).history
        runs.append((state(model), history["loss"], np.random.random()))  # noqa: NPY002
    (one, losses, drawn), (two, again, drawn_again) = runs
    assert losses == again and drawn == drawn_again
    assert len(one) == len(two)
    assert all((a == b).all() for a, b in zip(one, two, strict=True))


def test_tf_data_and_other_callbacks(data, tmp_path):
    watch = watcher(data, weight_norms=True, file=tmp_path / "r.jsonl")
    model = fresh()
    batches = [(data[0][i : i + 32], data[1][i : i + 32]) for i in (0, 32, 64)]

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return batches[index]

    log = tmp_path / "log.csv"
    best = tmp_path / "best.keras"
    history = model.fit(
        Batches(),
        epochs=3,
        verbose=0,
        callbacks=[
            watch,
            keras.callbacks.EarlyStopping("val_pgd_accuracy", mode="max", patience=5),
            keras.callbacks.ModelCheckpoint(
                best, "val_robust_accuracy", mode="max", save_best_only=True
            ),
            keras.callbacks.CSVLogger(log),
        ],
    ).history
    names = ["val_clean_accuracy", "val_pgd_accuracy", "val_fgsm_accuracy"]
    for name in [*names, "val_robust_accuracy", "weight_norm"]:
        assert len(history[name]) == 3
        assert name in log.read_text().splitlines()[0]
    assert best.exists()
    assert history["weight_norm"][-1] == pytest.approx(weight_norm(model))
    # What is logged is what `evaluate` says of the same weights.
    x, y = (a[np.linspace(0, 95, 40).astype(int)] for a in data)
    found = evaluate(model, x, y, ATTACKS, eps=0.03)
    assert history["val_robust_accuracy"][-1] == found.robust_accuracy
    assert history["val_pgd_accuracy"][-1] == found.accuracy("pgd")
    # Compiled in the first epoch, never again.
    assert set(watch._evaluator.traces.values()) == {1}
    assert 0 < watch.share < 1
    watch.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_interrupted_training_logs_the_same(data, tmp_path):
    # Without dropout: Keras does not take random states up again.
    whole = watcher(data, every=2)
    history = (
        fresh(random=False)
        .fit(
            *data, batch_size=32, epochs=5, verbose=0, shuffle=False, callbacks=[whole]
        )
        .history
    )

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    file, backup = tmp_path / "r.jsonl", tmp_path / "backup"
    rows = []
    for stop in (True, False):
        model = fresh(random=False)
        watch = watcher(data, every=2, file=file)
        kept = keras.callbacks.BackupAndRestore(str(backup))
        log = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: rows.append((epoch, dict(logs)))
        )
        try:
            model.fit(
                *data,
                batch_size=32,
                epochs=5,
                verbose=0,
                shuffle=False,
                callbacks=[watch, log, kept, *([Stop()] if stop else [])],
            )
        except KeyboardInterrupt:
            assert stop
    by_epoch = dict(rows)
    for name in ("val_pgd_accuracy", "val_robust_accuracy"):
        assert [by_epoch[e][name] for e in range(5)] == history[name]
    epochs = [json.loads(line)["epoch"] for line in file.read_text().splitlines()]
    assert epochs == [0, 2, 4]


def test_epochs_between_repeat_the_last_values(data):
    watch = watcher(data, every=3)
    history = fresh().fit(*data, epochs=5, verbose=0, callbacks=[watch]).history
    assert [h["epoch"] for h in watch.history] == [0, 3]
    values = history["val_pgd_accuracy"]
    assert values[0] == values[1] == values[2] and values[3] == values[4]


def test_several_radii_and_steps(data):
    watch = watcher(data, eps=[0.01, 0.05], every_steps=2, prefix="adv_")
    history = (
        fresh()
        .fit(*data, batch_size=32, epochs=1, verbose=0, callbacks=[watch])
        .history
    )
    assert {"adv_pgd_accuracy_eps0.01", "adv_pgd_accuracy_eps0.05"} <= set(history)
    assert history["adv_pgd_accuracy"] == history["adv_pgd_accuracy_eps0.05"]
    assert [h["step"] for h in watch.history] == [2, None]


@pytest.mark.parametrize(
    "batches, of, told",
    [
        ([0, 1, 2, 3, 0, 1, 2, 3], None, [3, 6]),
        ([3, 7, 3, 7], 6, [4, 6, 10, 12]),  # four at a time, the last two
        ([1, 1, 1, 1], 1, [3]),
        ([7, 15], None, [8, 16]),  # two multiples at once are told once
    ],
)
def test_steps_are_counted(batches, of, told):
    steps = Steps(3)
    assert [steps.count for b in batches if steps.passed(b, of)] == told
    never = Steps(None)
    assert not any(never.passed(b) for b in batches) and never.count


def test_steps_that_run_several_at_a_time(data):
    model = small(steps_per_execution=4)
    watch = watcher(data, attacks=QUICK, every_steps=4)
    model.fit(*data, batch_size=8, epochs=1, verbose=0, callbacks=[watch])
    assert [h["step"] for h in watch.history] == [4, 8, 12, None]


def test_each_fit_is_evaluated_anew(data):
    """Another model, or other averages of it, are what is attacked then."""
    x = data[0][np.linspace(0, 95, 40).astype(int)]

    def sgd():
        return keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5)

    watch, other = watcher(data, attacks=QUICK, ema=True, every=2), small(sgd())
    for fit, model in enumerate((small(sgd()), other, other)):
        if fit == 2:
            compiled_again(model, sgd())
        before, first = watch._evaluator, min(fit, 1)
        model.fit(
            *data, initial_epoch=first, epochs=first + 1, verbose=0, callbacks=[watch]
        )
        # Training ends with the averages in place of the weights.
        found = model.predict(x, verbose=0).argmax(1)
        assert (watch.evaluation.predicted == found).all()
        assert watch._evaluator is not before
    assert [h["epoch"] for h in watch.history] == [0, 1, 1]


def test_inputs_and_classes_are_thinned_together(data):
    x, y = data
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 96, 16)]
    few = np.linspace(0, 95, 20).astype(int)
    for given, rows in (((x, list(y)), few), ((iter(batches), None), range(20))):
        watch = AdversarialEvaluation(*given, QUICK, samples=20)
        model = small()
        for _ in range(2):
            model.fit(*data, verbose=0, callbacks=[watch])
        assert (watch.x == x[rows]).all() and (watch.evaluation.y == y[rows]).all()
        assert watch._evaluator.traces == {"noise": 1}  # in both fits


def test_average_of_the_weights(data):
    model = fresh(keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5))
    watch = watcher(data, ema=True)
    own = []  # at its end training puts the average in place of the weights
    see = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: own.append(model.layers[-1].get_weights()[0])
    )
    model.fit(*data, batch_size=32, epochs=2, verbose=0, callbacks=[watch, see])
    logged = watch.evaluation
    for v, average in watch._averages():
        v.assign(average)
    x, y = (a[np.linspace(0, 95, 40).astype(int)] for a in data)
    found = evaluate(model, x, y, ATTACKS, eps=0.03)
    assert (own[-1] != model.layers[-1].get_weights()[0]).any()
    assert (found.predicted == logged.predicted).all()
    assert found.robust_accuracy == logged.robust_accuracy
    with pytest.raises(KerasNormError, match="keeps no average"):
        fresh().fit(*data, verbose=0, callbacks=[watcher(data, ema=True)])


def test_another_model(data):
    other, x, y = zoo.network()
    watch = AdversarialEvaluation(x, y, "fgsm", eps=0.05, samples=50, model=other)
    fresh().fit(*data, epochs=1, verbose=0, callbacks=[watch])
    assert watch.history[0]["val_clean_accuracy"] > 0.9
    # One that shares its weights with that which is trained.
    inner = small()
    inputs = keras.Input((8, 8, 3))
    outer = compiled_again(keras.Model(inputs, inner(inputs)))
    watch = watcher(data, attacks=QUICK, model=inner, every_steps=2, weight_norms=True)
    outer.fit(*data, batch_size=32, verbose=0, callbacks=[watch])
    assert watch.history[-1]["weight_norm"] == pytest.approx(weight_norm(inner))


def test_average_under_several_optimizers(data):
    model = fresh()
    inner = keras.optimizers.SGD(0.1, use_ema=True)
    held = sphere.OnSphere(inner, model)
    scaled = keras.optimizers.LossScaleOptimizer(held)
    model.compile(scaled, model.loss, jit_compile=False)
    watch = watcher(data, attacks=QUICK, ema=True)
    model.fit(*data, verbose=0, callbacks=[watch])
    averages = {id(v) for v in watch._evaluator.victim.replaced.values()}
    assert averages and averages <= {id(v) for v in inner.variables}


def test_file_of_an_interrupted_training(data, tmp_path):
    file = tmp_path / "not" / "yet" / "r.jsonl"
    for attack in (QUICK, adversarial.noise(1, name="other")):
        watch = watcher(data, attacks=attack, file=file, weight_norms=attack != QUICK)
        small().fit(*data, verbose=0, callbacks=[watch])
        with file.open("a") as out:
            out.write('{"epoch": 1, "st')
    assert len(watch.history) == 2
    watch.plot(tmp_path / "figure.png")
    watch = watcher(data, attacks=QUICK, file=file)
    small().fit(*data, verbose=0, callbacks=[watch])
    assert len(watch.history) == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"every": 0}, "every=0. Expected a positive"),
        ({"samples": -1}, "samples=-1. Expected a positive"),
        ({"eps": -1}, "eps is no radius"),
        ({"attacks": "nothing"}, "no such attack"),
        ({"bounds": (0, 0.5)}, "out of bounds"),
        ({"file": ROOT / "Makefile"}, "holds no evaluations"),
        ({"y": np.zeros(50, int)}, "different numbers of samples"),
        ({"y": None}, "inputs without classes"),
    ],
)
def test_mistakes_show_before_training(settings, message, data):
    trained = []

    class Count(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            trained.append(batch)

    with pytest.raises(KerasNormError, match=message):
        watch = watcher((data[0], settings.pop("y", data[1])), **settings)
        fresh().fit(*data, verbose=0, callbacks=[watch, Count()])
    assert not trained


STRATEGY = """
import keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, two)
from kerasnorm import adversarial
from kerasnorm.callbacks import AdversarialEvaluation
rng = np.random.default_rng(0)
x, y = rng.random((64, 8, 8, 3)).astype("float32"), np.arange(64) % 4
kept = []
for watched in (False, True):
    keras.utils.set_random_seed(0)
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential([
            keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(), keras.layers.Dropout(0.2),
            keras.layers.Flatten(), keras.layers.Dense(4)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss, jit_compile=False)
    watch = AdversarialEvaluation(x, y, adversarial.pgd(steps=3), eps=0.05)
    model.fit(x, y, batch_size=32, epochs=2, verbose=0, callbacks=[watch] * watched)
    kept.append([np.array(w) for w in model.get_weights()])
assert all((a == b).all() for a, b in zip(*kept)), "training was changed"
assert len(watch.history) == 2 and watch._evaluator.traces == {"pgd": 1}
print("done", watch.history[-1]["val_pgd_accuracy"])
"""


@pytest.mark.ci
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's own")
def test_mirrored_strategy():
    """In a process of its own, where devices can still be split."""
    run = subprocess.run(
        [sys.executable, "-c", STRATEGY],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.startswith("done"), run.stdout + run.stderr[-3000:]


# ------------------------------------------------------ adversarial training


@pytest.mark.ci
@pytest.mark.parametrize(
    ("norm", "method"),
    [
        ("linf", "pgd"),
        ("l2", "free"),
        pytest.param("linf", "free", marks=pytest.mark.slow),
        pytest.param("l2", "pgd", marks=pytest.mark.slow),
    ],
)
def test_training_makes_robust(norm, method):
    plain, x, y = zoo.network()
    eps = {"linf": 0.15, "l2": 1.2}[norm]
    model = keras.models.clone_model(plain)
    trainer = adversarial.adversarial_training(
        model, norm, eps, method=method, steps=4, seed=0
    )
    trainer.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = trainer.fit(x, y, batch_size=64, epochs=12, verbose=0).history
    assert history["accuracy"][-1] > history["accuracy"][0]
    before, after = (
        evaluate(m, x, y, "apgd-ce", norm, eps).robust_accuracy for m in (plain, model)
    )
    assert after > before + 0.1
    # The same weights, and any use of the trainer is a use of the model.
    assert (trainer.predict(x, verbose=0) == model.predict(x, verbose=0)).all()


def test_perturbations_are_in_the_ball():
    model, x, y = zoo.network(ending="softmax")
    for norm, eps in (("linf", 0.1), ("l2", 1.0), ("l1", 5.0)):
        trainer = adversarial.adversarial_training(model, norm, eps, seed=0)
        hot = keras.utils.to_categorical(y, 4)
        for labels in (y, hot):
            moved = trainer.perturb(
                ops.convert_to_tensor(x), ops.convert_to_tensor(labels)
            )
            moved = ops.convert_to_numpy(moved)
            assert (zoo.norm_of(norm, moved - x) <= eps * 1.001 + 1e-5).all()
            assert moved.min() >= 0 and moved.max() <= 1
            wrong = model.predict(moved, verbose=0).argmax(1) != y
            assert wrong.mean() > (model.predict(x, verbose=0).argmax(1) != y).mean()


@pytest.mark.parametrize("norm", zoo.NORMS)
def test_inputs_out_of_bounds_move_no_further(norm):
    model, _, _ = zoo.linear()
    x = np.random.default_rng(0).normal(size=(20, *zoo.SHAPE)).astype("float32")
    trainer = adversarial.adversarial_training(model, norm, 0.5, steps=2, seed=0)
    moved = ops.convert_to_numpy(trainer.perturb(x, np.zeros(20, int)))
    size = zoo.norm_of(norm, moved - x)
    assert (size <= 0.5 * 1.001).all() and (size > 0.1).all()
    assert (moved >= np.minimum(x, 0)).all() and (moved <= np.maximum(x, 1)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_overflow_of_a_scaled_loss_spoils_nothing(norm, data):
    model = fresh()
    model.set_weights([1e3 * w for w in model.get_weights()])
    trainer = adversarial.adversarial_training(model, norm, method="free", replays=2)
    scaled = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(), initial_scale=1e38
    )
    trainer.compile(scaled, model.loss, jit_compile=False)
    trainer.fit(*data, batch_size=48, verbose=0)
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_trainer_is_saved(tmp_path):
    model, x, y = zoo.network()
    trainer = adversarial.adversarial_training(model, eps=0.1, steps=2, seed=0)
    trainer.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    trainer.fit(x, y, epochs=1, verbose=0)
    trainer.save(tmp_path / "trainer.keras")
    again = keras.models.load_model(tmp_path / "trainer.keras")
    one, two = ({**t.get_config(), "model": 0} for t in (again, trainer))
    assert one == two
    assert (again.predict(x, verbose=0) == model.predict(x, verbose=0)).all()
    again.fit(x, y, epochs=1, verbose=0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "free lunch"}, "Expected 'pgd' or 'free'"),
        ({"eps": -1}, "eps is no radius"),
        ({"eps": "a"}, "eps is no radius"),
        ({"eps": [0.1, 0.2]}, "eps is no radius"),
        ({"eps": np.inf}, "eps is no radius"),
        ({"steps": 0}, "steps=0. Expected a positive"),
        ({"length": -1}, "length=-1. Expected"),
        ({"length": "a"}, "length='a'. Expected"),
        ({"bounds": None}, "no pair"),
        ({"bounds": (1, 0)}, "no pair"),
        ({"bounds": (np.zeros(6), np.ones(6))}, "no pair"),
        ({"bounds": (-np.inf, np.inf)}, "bounds are infinite"),
        ({"norm": "l3"}, "no such norm"),
    ],
)
def test_bad_training(settings, message):
    model, _, _ = zoo.linear()
    with pytest.raises(KerasNormError, match=message):
        adversarial.adversarial_training(model, **settings)
    image = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
    with pytest.raises(KerasNormError, match="not classes"):
        adversarial.adversarial_training(image)
