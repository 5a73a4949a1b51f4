"""What the tests of `test_distributed.py` run in processes of their own, where devices
can still be split. Every part prints one line of JSON: what differs, and by how much.

    python distributed.py mirrored | worker | jax
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
from typing import Any

import keras
import numpy as np

import kerasnorm
from kerasnorm.method.normalization import BatchStatistics
from kerasnorm.method.registry import methods
from kerasnorm.numerics import replicas


# Samples of each replica: unequal, so that nothing passes by averaging averages.
PARTS = (4, 2)


def subjects(most: int = 2):
    """`(name, function that makes the layer, shape, masked)` of every method: a case
    with a mask where there is one, and one without for those of the whole batch."""
    for method in methods().values():
        if method.layer is None:
            continue
        cases = [c for c in method.cases if c.masked][:1]
        if not cases or issubclass(method.layer, BatchStatistics):
            cases.append(next(c for c in method.cases if not c.masked))
        for case in cases[:most]:
            name = f"{method.name}{' masked' if case.masked else ''}"
            yield name, maker(method.layer, case.config), case.shape[1:], case.masked


def maker(cls: Any, config: Any):
    config = dict(config)
    if issubclass(cls, BatchStatistics):
        config["synchronized"] = True
    if "ghost_batch_size" in config or cls.__name__.startswith("Ghost"):
        config["ghost_batch_size"] = 2  # divides the part of every replica

    def make(shape):
        keras.utils.set_random_seed(0)
        inner = {
            k: type(v).from_config(v.get_config())
            for k, v in config.items()
            if isinstance(v, keras.layers.Layer)
        }
        layer = cls(**{**config, **inner})
        layer.build((None, *shape))
        rng = np.random.default_rng(1)
        for v in layer.variables:
            if "seed" not in v.path:
                v.assign(rng.uniform(0.5, 1.5, v.shape))
        return layer

    return make


def batch(layer: Any, shape: tuple, masked: bool, rows: int, seed: int) -> list:
    """Inputs, what is multiplied with the outputs to make a loss, and a mask."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0.7, 2.0, (rows, *shape)).astype("float32")
    out = layer.compute_output_shape(x.shape)
    u = (rng.normal(size=out) / np.prod(out[1:])).astype("float32")
    mask = rng.random((rows, *shape[:1])) > 0.4
    mask[:, 0] = True
    return [x, u, *([mask] if masked else [])]


def steps(layer: Any) -> int:
    """Training steps to compare: two where one leaves something for the next."""
    sent = any(v.overwrite_with_gradient for v in layer.trainable_variables)
    return 2 if sent else 1


def call(layer: Any, x: Any, mask: Any) -> Any:
    more = {"training": True} if layer._call_has_training_arg else {}
    return layer(x, **more, **({} if mask is None else {"mask": mask}))


def difference(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest value or 1."""
    a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float(np.abs(a - b).max(initial=0) / max(1.0, np.abs(b).max(initial=0)))


# ------------------------------------------------------------------ TensorFlow


def tf_step(layer: Any, optimizer: Any, x: Any, u: Any, mask: Any = None) -> Any:
    import tensorflow as tf

    weights = layer.trainable_variables
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = call(layer, x, mask)
        loss = tf.reduce_sum(y * u)
    dx, *gradients = tape.gradient(loss, [x, *(v.value for v in weights)])
    if weights:
        optimizer.apply(gradients, weights)
    return y, dx


def tf_train(strategy: Any, make: Any, shape: Any, masked: bool) -> list:
    """Outputs and input gradients of each step, and the variables of each replica."""
    import tensorflow as tf

    with strategy.scope():
        layer = make(shape)
        optimizer = keras.optimizers.SGD(0.05, momentum=0.5)
        optimizer.build(layer.trainable_variables)
    outputs = []
    total = strategy.num_replicas_in_sync
    for step in range(steps(layer)):
        data = batch(layer, shape, masked, sum(PARTS), step)
        if total == 1:
            parts = [data]
        else:
            cut = np.cumsum(PARTS)[:-1]
            parts = list(zip(*(np.split(a, cut) for a in data), strict=True))

        def of(k, parts=parts):
            def value(context):
                return tf.constant(parts[context.replica_id_in_sync_group][k])

            return strategy.experimental_distribute_values_from_function(value)

        args = tuple(of(k) for k in range(len(data)))
        results = strategy.run(lambda *a: tf_step(layer, optimizer, *a), args=args)
        outputs.append(
            [
                [v.numpy() for v in strategy.experimental_local_results(r)]
                for r in results
            ]
        )
    states = [
        [v.numpy() for v in strategy.experimental_local_results(variable.value)]
        for variable in layer.variables
    ]
    return outputs, states, [v.path for v in layer.variables]


def compare_tf(strategy: Any, only: str = "", most: int = 2) -> dict[str, Any]:
    """What differs from one device, by method."""
    import tensorflow as tf

    single = tf.distribute.get_strategy()
    if single is strategy:
        raise RuntimeError("call outside of the scope")
    starts = np.concatenate([[0], np.cumsum(PARTS)])
    first = 0
    if hasattr(strategy, "cluster_resolver") and strategy.cluster_resolver is not None:
        first = strategy.cluster_resolver.task_id or 0
    wrong, compared = {}, set()
    for name, make, shape, masked in subjects(most):
        if only and only not in name:
            continue
        compared.add(name.split()[0])
        expected, states, paths = tf_train(single, make, shape, masked)
        got, copies, _ = tf_train(strategy, make, shape, masked)
        found = {}
        for step, (a, b) in enumerate(zip(got, expected, strict=True)):
            for what, mine, whole in zip(("output", "gradient"), a, b, strict=True):
                for k, part in enumerate(mine):
                    rows = slice(*starts[first + k : first + k + 2])
                    found[f"{what} {step} replica {first + k}"] = difference(
                        part, whole[0][rows]
                    )
        for path, mine, whole in zip(paths, copies, states, strict=True):
            for k, copy in enumerate(mine):
                found[f"{path} replica {first + k}"] = difference(copy, whole[0])
        bad = {k: v for k, v in found.items() if not v <= 1e-5}
        if bad:
            wrong[name] = ", ".join(f"{k}: {v:.1e}" for k, v in bad.items())
    return {"methods": wrong, "compared": len(compared)}


def network(**norm: Any) -> Any:
    """A small network with the layers whose state could come apart."""
    keras.utils.set_random_seed(1)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(6, 3, use_bias=False, padding="same"),
            kerasnorm.layers.BatchNormalization(synchronized=True, momentum=0.5),
            layers.ReLU(),
            layers.Conv2D(4, 3, use_bias=False),
            kerasnorm.layers.OnlineNormalization(synchronized=True, momentum=0.9),
            layers.ReLU(),
            kerasnorm.layers.StreamingNormalization(synchronized=True),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    sgd = keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(kerasnorm.sphere.OnSphere(sgd, model), loss, jit_compile=False)
    return model


def images(rows: int = 32) -> tuple:
    rng = np.random.default_rng(3)
    y = np.arange(rows) % 3
    x = rng.random((rows, 6, 6, 2)) * 0.5 + y[:, None, None, None] / 6
    return x.astype("float32"), y


def train(strategy: Any, folder: str, callbacks: Any = ()) -> tuple[Any, Any]:
    """The network after three epochs, and what was logged."""
    x, y = images()
    with strategy.scope():
        model = replicas.multi_worker(network())
    history = model.fit(
        *(x, y),
        batch_size=8,
        epochs=3,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )
    return model, history.history


def watchers(file: Any) -> list:
    """Callbacks that evaluate and measure, and one that listens to the gradients."""
    x, y = images()
    pgd = kerasnorm.adversarial.pgd(steps=3)
    return [
        kerasnorm.callbacks.AdversarialEvaluation(x, y, pgd, eps=0.1, file=file),
        kerasnorm.callbacks.SphereMonitor(),
        kerasnorm.callbacks.PropertyMonitor(x, y),
    ]


def values(model: Any) -> list:
    return [v.numpy() for v in model.variables]


def fits(strategy: Any, weights: list) -> dict[str, Any]:
    """Group normalization in the place of the batch's: outputs after the fits, and the
    losses of distillation, each of which comes from the weights that the steps before
    it have made."""
    x, _ = images(16)
    options, found = {"epochs": 3, "batch_size": 8}, {}
    with strategy.scope():
        model = network()
        for v, w in zip(model.variables, weights, strict=True):
            v.assign(w)
        for fit in ("affine", "refit", "distill"):
            new, report = kerasnorm.rewrite(
                *(model, "gn"),
                where="batch*",
                groups=2,
                data=x,
                fit=fit,
                fit_options=options if fit == "distill" else {},
                verbose=False,
                return_report=True,
            )
            found[fit] = new.predict(x, verbose=0)
        found["distill"] = report.fit.history["loss"]
    return found


def mirrored(folder: str, only: str = "") -> dict[str, Any]:
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    single = tf.distribute.get_strategy()
    sides = []
    for side in (single, strategy):
        file = pathlib.Path(folder) / f"{side.num_replicas_in_sync}.jsonl"
        model, logs = train(side, folder, watchers(file))
        state = sides[0]["weights"] if sides else values(model)
        sides.append({"weights": values(model), **logs})
        sides[-1] |= fits(side, state)
    lives = {
        what: max(map(difference, two, one))
        if isinstance(one, list)
        else difference(two, one)
        for (what, one), two in zip(sides[0].items(), sides[1].values(), strict=True)
    }
    return {"lives": lives, **compare_tf(strategy, only)}


def worker(folder: str, what: str) -> dict[str, Any]:
    """One of two processes, named by TF_CONFIG: the methods, then a training that may
    be interrupted, against one device."""
    import tensorflow as tf

    single = tf.distribute.get_strategy()
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    me = strategy.cluster_resolver.task_id
    place = pathlib.Path(folder)
    backup = keras.callbacks.BackupAndRestore(place / f"backup-{me}")

    began = []

    class Lost(keras.callbacks.Callback):
        """One machine goes away in the middle of the second epoch."""

        def on_epoch_begin(self, epoch, logs=None):
            began.append(epoch)

        def on_train_batch_end(self, batch, logs=None):
            if what == "lost" and me == 1 and (began[-1], batch) == (1, 1):
                os.kill(os.getpid(), signal.SIGKILL)

    file = place / "evaluations.jsonl"
    watching = watchers(file)[:2] if what == "whole" else []
    model, logs = train(strategy, folder, [*watching, backup, Lost()])
    np.savez(place / f"{what}-{me}.npz", *values(model))
    if what != "whole":
        return {"first epoch": began[0]}
    expected, before = train(single, folder, watchers(None)[:2])
    lives = {k: difference(logs[k], before[k]) for k in before}
    lives["weights"] = max(map(difference, values(model), values(expected)))
    return {"lives": lives, **compare_tf(strategy, most=1)}


# ------------------------------------------------------------------------ JAX


def jax_train(make: Any, shape: Any, masked: bool, place: Any) -> tuple:
    """Outputs and input gradients of each step, and the variables after them."""
    import jax

    layer = make(shape)
    optimizer = keras.optimizers.SGD(0.01, momentum=0.5)
    optimizer.build(layer.trainable_variables)

    @jax.jit
    def step(trainable, fixed, slots, x, u, mask=None):
        def loss(trainable, x):
            more = {"training": True} if layer._call_has_training_arg else {}
            more |= {} if mask is None else {"mask": mask}
            y, after = layer.stateless_call(trainable, fixed, x, **more)
            return (y * u).sum(), (y, after)

        both = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (gradients, dx), (y, fixed) = both(trainable, x)
        if trainable:
            trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        return y, dx, trainable, fixed, slots

    variables = layer.trainable_variables, layer.non_trainable_variables
    state = [[v.value for v in vs] for vs in (*variables, optimizer.variables)]
    outputs = []
    for k in range(steps(layer)):
        data = [place(a) for a in batch(layer, shape, masked, 8, k)]
        y, dx, *state = step(*state, *data)
        outputs += [y, dx]
    return outputs, [*state[0], *state[1]]


def data_parallel(only: str = "") -> dict[str, Any]:
    """Each method on four devices against one."""
    import jax

    devices = keras.distribution.list_devices()
    if len(devices) != 4:
        raise RuntimeError(f"{devices}: four are needed")
    chosen = {name: s for name, *s in subjects(1) if only in name}
    expected = {n: jax_train(*s, place=jax.numpy.asarray) for n, s in chosen.items()}
    distribution = keras.distribution.DataParallel(devices=devices)
    keras.distribution.set_distribution(distribution)

    def place(a):
        layout = distribution.get_data_layout(a.shape)
        return keras.distribution.distribute_tensor(a, layout)

    wrong = {}
    for name, subject in chosen.items():
        outputs, states = jax_train(*subject, place=place)
        if len(outputs[0].sharding.device_set) != 4:
            raise RuntimeError(f"{name} ran on {outputs[0].sharding}")
        one = [*expected[name][0], *expected[name][1]]
        pairs = zip([*outputs, *states], one, strict=True)
        bad = [d for d in (difference(a, b) for a, b in pairs) if not d <= 1e-5]
        if bad:
            wrong[name] = f"{len(bad)} values differ, by up to {max(bad):.1e}"
    return {"methods": wrong, "compared": len(chosen)}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
