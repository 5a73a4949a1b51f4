"""Small sound files of every format and dialect, from which the fuzzer starts.

A file is a dictionary of places and bytes, its own place "" if it is no folder.
"""

from __future__ import annotations

import io
import json
import pathlib
import warnings
import zipfile

import h5py
import numpy as np


Files = dict[str, bytes]


def functional(k):
    """Shared layers, a nested model, wrappers, attributes of every kind."""
    image = k.Input((6, 6, 2), name="image")
    x = k.layers.Conv2D(3, 3, activation="relu", name="conv")(image)
    x = k.layers.BatchNormalization(name="bn")(x)
    inner = k.Sequential(
        [
            k.Input((4, 4, 3)),
            k.layers.Flatten(),
            k.layers.Dense(4, kernel_regularizer=k.regularizers.L2(0.1)),
        ],
        name="inner",
    )
    a, b = inner(x), inner(k.layers.Activation("tanh", name="act")(x))
    shared = k.layers.Dense(4, kernel_constraint=k.constraints.NonNeg(), name="shared")
    x = k.layers.Add(name="add")([shared(a), shared(b)])
    return k.Model(image, k.layers.Dense(2, "softmax", name="out")(x), name="net")


def recurrent(k):
    words = k.Input((5,), dtype="int32", name="words")
    x = k.layers.Embedding(7, 4, mask_zero=True, name="embedding")(words)
    x = k.layers.Bidirectional(k.layers.LSTM(3, return_sequences=True), name="both")(x)
    x = k.layers.TimeDistributed(k.layers.Dense(2), name="each")(x)
    cells = [k.layers.GRUCell(2), k.layers.SimpleRNNCell(3)]
    return k.Model(words, k.layers.RNN(cells, name="cells")(x), name="net")


def stateful(k):
    batch = k.Input(batch_shape=(2, 4, 3), name="x")
    x = k.layers.LSTM(3, stateful=True, name="lstm")(batch)
    return k.Model(batch, k.layers.Dense(1, name="out")(x), name="net")


def lookups(k):
    word = k.Input((1,), dtype="string", name="word")
    number = k.Input((1,), name="number")
    index = k.layers.StringLookup(vocabulary=["a", "b", "c"], name="lookup")(word)
    x = k.layers.CategoryEncoding(5, output_mode="one_hot", name="encoding")(index)
    scaled = k.layers.Normalization(mean=1.0, variance=4.0, name="scaling")(number)
    ranges = k.layers.Discretization(bin_boundaries=[0.0, 1.0], name="ranges")(number)
    ranges = k.layers.Rescaling(0.5, name="rescaling")(ranges)
    x = k.layers.Concatenate(name="join")([x, scaled, ranges])
    return k.Model([word, number], k.layers.Dense(2, name="out")(x), name="net")


def operations(k):
    x = k.Input((4, 4), name="x")
    y = k.layers.Dense(4, name="dense")(x)
    if k.__name__ == "keras":
        y = k.ops.tile(k.ops.reshape(y, (-1, 16)) * 2.0 + 1.0, (1, 2))
        y = k.ops.concatenate([y, k.ops.sum(x, axis=-1)], axis=1)
        y = k.layers.Lambda(k.ops.abs, name="abs")(y)
    else:
        import tensorflow as tf

        y = tf.tile(tf.reshape(y, (-1, 16)) * 2.0 + 1.0, (1, 2))
        y = tf.concat([y, tf.reduce_sum(x, axis=-1)], axis=1)
    return k.Model(x, k.layers.Dense(2, name="out")(y), name="net")


MODELS = (functional, recurrent, stateful, lookups, operations)


def train(model, k):
    optimizer = k.optimizers.Adam(k.optimizers.schedules.ExponentialDecay(0.1, 9, 0.9))
    model.compile(optimizer, "mse", metrics=["mae", k.metrics.MeanSquaredError()])
    optimizer.build(model.trainable_variables)


def write(folder: pathlib.Path) -> dict[str, Files]:
    """Every seed by its name, which ends as its file does; folders have no ending."""
    import keras

    seeds = {}
    libraries = {"k3": keras}
    try:
        import tf_keras

        libraries["k2"] = tf_keras
    except ImportError:
        pass
    for library, k in libraries.items():
        for make in MODELS:
            k.backend.clear_session()
            k.utils.set_random_seed(0)
            model = make(k)
            if make is not lookups:
                train(model, k)
            name = f"{library}_{make.__name__}"
            endings = [".keras", ".h5"]
            if library == "k2" and make is lookups:
                endings = [".keras"]  # tables of words have no place in its .h5
            for ending in endings:
                seeds[name + ending] = saved(folder / (name + ending), model)
            if library == "k3" and make in (functional, lookups):
                seeds[name] = saved(folder / name, model, zipped=False)
            if library == "k2" and make is not lookups:
                seeds[name] = saved(folder / name, model, save_format="tf")
    seeds["k1.h5"] = keras_1()
    return {name: plain(files) for name, files in seeds.items()}


def saved(path, model, **options) -> Files:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(str(path), **options)
    if path.is_file():
        return {"": path.read_bytes()}
    found = [p for p in sorted(path.rglob("*")) if p.is_file()]
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


def plain(files: Files) -> Files:
    """Without what differs from run to run: numbers of objects, times of members."""
    if "" in files and files[""][:2] == b"PK":
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(files[""])) as old:
            with zipfile.ZipFile(stream, "w") as new:
                for name in old.namelist():
                    new.writestr(zipfile.ZipInfo(name), stable(name, old.read(name)))
        return {"": stream.getvalue()}
    return {name: stable(name, data) for name, data in files.items()}


def stable(name, data):
    if name != "config.json":
        return data
    numbers = {}

    def renumber(value):
        if isinstance(value, dict):
            shared = value.get("shared_object_id")
            if shared is not None:
                value["shared_object_id"] = numbers.setdefault(shared, len(numbers))
            for inner in value.values():
                renumber(inner)
        elif isinstance(value, list):
            for inner in value:
                renumber(inner)
        return value

    return json.dumps(renumber(json.loads(data))).encode()


def keras_1() -> Files:
    """As Keras 1.2 wrote it."""
    first = {"name": "first", "batch_input_shape": [None, 4], "output_dim": 3}
    layers = [
        {"class_name": "Dense", "config": {**first, "init": "glorot_uniform"}},
        {"class_name": "BatchNormalization", "config": {"name": "bn", "mode": 0}},
        {"class_name": "Dropout", "config": {"name": "drop", "p": 0.5}},
    ]
    weights = {
        "first": {"first_W": np.ones((4, 3), "f4"), "first_b": np.zeros(3, "f4")},
        "bn": {
            f"bn_{n}": np.ones(3, "f4")
            for n in ("gamma", "beta", "running_mean", "running_std")
        },
        "drop": {},
    }
    stream = io.BytesIO()
    with h5py.File(stream, "w") as f:
        f.attrs["model_config"] = json.dumps(
            {"class_name": "Sequential", "config": layers}
        )
        f.attrs["keras_version"] = "1.2.2"
        group = f.create_group("model_weights")
        group.attrs["layer_names"] = np.array(list(weights), "S")
        for name, arrays in weights.items():
            layer = group.create_group(name)
            layer.attrs["weight_names"] = np.array(list(arrays), "S20")
            for key, array in arrays.items():
                layer[key] = array
    return {"": stream.getvalue()}
