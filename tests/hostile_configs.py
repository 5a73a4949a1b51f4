"""Cases of `test_hostile_files`: configs made to hurt, in archives and HDF5 files."""

from __future__ import annotations

import copy
import json
import zipfile

import h5py
from hostile_folders import SOUND, case


def function(module, name):
    return {
        "module": module,
        "class_name": "function",
        "config": name,
        "registered_name": name,
    }


def layer(kind, module="keras.layers", **config):
    return {
        "module": module,
        "class_name": kind,
        "config": {"name": "bad", **config},
        "registered_name": None,
    }


def last(entry):
    """The last layer is another one."""

    def change(config):
        config["config"]["layers"][-1] = copy.deepcopy(entry)

    return change


def activation(entry):
    def change(config):
        config["config"]["layers"][-1]["config"]["activation"] = entry

    return change


def metrics(*entries):
    def change(config):
        config["compile_config"]["metrics"] = list(entries)

    return change


def pattern(config):
    """An optimizer searches the names of layers for a regular expression."""
    config["config"]["layers"][1]["config"]["name"] = "a" * 40
    config["compile_config"]["optimizer"] = layer(
        "Muon", "keras.optimizers", exclude_layers=["(a+)+$!"]
    )


def row(config):
    layers = config["config"]["layers"]
    layers[1:] = [layer("Activation", name=f"a{i}") for i in range(9_000)]


def stateful(config):
    config["config"]["layers"][0]["config"]["batch_shape"] = [100_000, 5, 4]
    recurrent = layer("LSTM", units=50_000, stateful=True)
    config["config"]["layers"][1:] = [recurrent]


def deep(config):
    entry = layer("Dense", units=3)
    for i in range(150):
        entry = layer("TimeDistributed", name=f"n{i}", layer=entry)
    config["config"]["layers"][-1] = entry


FUNCTIONS = (
    ("keras.visualization", "plot_image_gallery"),
    ("keras.datasets.mnist", "load_data"),
    ("keras.distribution", "initialize"),
    ("keras.distribution", "set_distribution"),
    ("keras.applications", "ResNet50"),
    ("keras.config", "set_floatx"),
    ("keras.config", "set_backend"),
    ("keras.config", "set_epsilon"),
    ("keras.config", "set_max_epochs"),
    ("keras.config", "enable_unsafe_deserialization"),
    ("keras.ops", "while_loop"),
    ("keras.ops", "zeros"),
    ("keras.utils", "get_file"),
    ("keras.saving", "load_model"),
    ("keras.activations", "deserialize"),
    ("builtins", "eval"),
    ("os", "system"),
)
MARKER = "You are attempting to create a variable while in a stateless scope"
TEXT = "VOCABULARY"  # stands for the path of a text file outside the model
CONFIGS = {
    **{
        f"lambda-{m}.{n}": last(layer("Lambda", function=function(m, n)))
        for m, n in FUNCTIONS
    },
    **{f"activation-{m}.{n}": activation(function(m, n)) for m, n in FUNCTIONS},
    "registered-name": last(
        layer(
            "Lambda",
            function={
                **function("keras.config", "set_floatx"),
                "registered_name": "rewriters>PinnedTraining",
            },
        )
    ),
    "pipeline": last(
        layer("Pipeline", layers=[function("keras.config", "set_floatx")])
    ),
    "saved-model-inside": last(layer("TFSMLayer", filepath="/")),
    "vocabulary": last(layer("StringLookup", vocabulary=TEXT)),
    "vocabulary-wrapped": last(
        layer("TimeDistributed", layer=layer("IntegerLookup", vocabulary=TEXT))
    ),
    "vocabulary-text": last(layer("TextVectorization", vocabulary=TEXT)),
    "huge-dense": last(layer("Dense", units=10**9)),
    "huge-marker": last(layer("Dense", units=10**9, activation=MARKER)),
    "huge-name": last(layer("Dense", units=10**9, name=MARKER)),
    "tokens": last(layer("StringLookup", vocabulary=["a"], num_oov_indices=10**9)),
    "bytes": last(
        layer(
            "Normalization",
            mean={
                "class_name": "__numpy__",
                "config": {"value": [1], "dtype": "S1000000000"},
            },
            variance=1.0,
        )
    ),
    "split": last(
        layer(
            "Lambda",
            function=function("keras.ops", "split"),
            arguments={"axis": 1, "indices_or_sections": 10**7},
        )
    ),
    "unstack": last(
        layer(
            "Lambda",
            function=function("keras.ops", "unstack"),
            arguments={"axis": 1},
        )
    ),
    "cells": last(
        layer(
            "RNN", cell=[layer("LSTMCell", units=1, name=f"c{i}") for i in range(3000)]
        )
    ),
    "initializer": last(
        layer(
            "Dense",
            units=1,
            kernel_initializer=function("keras.ops.numpy", "diagflat"),
        )
    ),
    "row": row,
    "stateful": stateful,
    "deep": deep,
    "one-name": lambda c: c["config"]["layers"].append(c["config"]["layers"][1]),
    "controls": last(layer("\x1b[2J\x07" + "x" * 1_000_000, units=1)),
}
# What a model was compiled with never stands in its way: it loads, uncompiled.
TRAINING = {
    "mean-iou": metrics(layer("MeanIoU", "keras.metrics", num_classes=25_000)),
    "thresholds": metrics(layer("AUC", "keras.metrics", num_thresholds=10**9)),
    "pattern": pattern,
    "metrics": metrics(*["mse"] * 60_000),
    "metric-function": metrics(function("keras.config", "set_floatx")),
}


def _changed(config, change, secrets):
    change(config)
    return json.dumps(config).replace(TEXT, str(secrets / "words.txt"))


def change_archive(source, target, change, secrets):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "config.json":
                data = _changed(json.loads(data), change, secrets)
            new.writestr(name, data)


def change_hdf5(source, target, change, secrets, version="2.15.0"):
    """As Keras 2 writes it, whose files take another way."""
    target.write_bytes(source.read_bytes())
    with h5py.File(target, "r+") as file:
        text = _changed(json.loads(file.attrs["model_config"]), change, secrets)
        del file.attrs["model_config"], file.attrs["training_config"]
        if len(text) < 60_000:
            file.attrs["model_config"] = text
        else:
            file.attrs.create("model_config", text, dtype=h5py.string_dtype())
        if version:
            file.attrs["keras_version"] = version
            file["model_weights"].attrs["keras_version"] = version


CHANGED = {".keras": change_archive, ".h5": change_hdf5}


def add(group, name, change, source="sequential", endings=CHANGED):
    for ending in endings:

        def damage(folder, sound, secrets, ending=ending):
            path = folder / f"model{ending}"
            CHANGED[ending](sound / f"{source}{ending}", path, change, secrets)
            return path

        damage.__name__ = f"{name}, {source}{ending}"
        case(group)(damage)


for _name, _change in CONFIGS.items():
    add("configs", _name, _change)
for _name, _change in TRAINING.items():
    add("configs", _name, _change, endings=(".keras",))
    SOUND.add(f"{_name}, sequential.keras")
