"""Configs made to hurt: one error each, nothing called, nothing read, nothing changed.

Every file is loaded in a process of its own that watches what is opened, connected and
run, with two gigabytes above what Keras itself takes and ten seconds for each.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import zipfile

import h5py
import keras
import pytest
from conftest import ROOT


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
TEXT = "VOCABULARY"  # the path of a text file outside the model
CASES = {
    **{
        f"lambda-{m}.{n}": last(layer("Lambda", function=function(m, n)))
        for m, n in FUNCTIONS
    },
    **{f"activation-{m}.{n}": activation(function(m, n)) for m, n in FUNCTIONS},
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
    "stateful": stateful,
    "deep": deep,
    "one-name": lambda c: c["config"]["layers"].append(c["config"]["layers"][1]),
    "controls": last(layer("\x1b[2J\x07" + "x" * 1_000_000, units=1)),
}
# What a model was compiled with never stands in its way: it loads, uncompiled.
TRAINING = {
    "mean-iou": metrics(layer("MeanIoU", "keras.metrics", num_classes=25_000)),
    "thresholds": metrics(layer("AUC", "keras.metrics", num_thresholds=10**9)),
    "metric-function": metrics(function("keras.config", "set_floatx")),
}

CHECK = """
import json, os, resource, sys, time, warnings
import keras
import kerasnorm
from rewriters import RewriteError
from rewriters.formats import load

folder, sound = sys.argv[1], sys.argv[2]
load(sound)  # what is imported and made at the first load is no trace of a file
outside, watching = [], False

def watch(event, arguments):
    if not watching:
        return
    if event == "open" and isinstance(arguments[0], str):
        path = os.path.abspath(arguments[0])
        here = os.path.dirname(kerasnorm.__path__[0])
        ours = (folder, sys.prefix, sys.base_prefix, here, "/proc/", "/dev/null")
        if not path.startswith(ours):
            outside.append(f"open {path}")
    elif event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "shutil.",
                           "os.rename", "os.remove", "os.mkdir", "ctypes.dlopen")):
        outside.append(f"{event} {arguments!r}"[:200])

def state():
    c = keras.config
    return (c.floatx(), c.epsilon(), c.image_data_format(), c.backend(),
            str(c.dtype_policy()), keras.distribution.distribution(),
            c.max_epochs(), dict(os.environ), os.getcwd())

sys.addaudithook(watch)
before = state()
for name in sorted(os.listdir(folder)):
    start = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outside.clear()
    told = []
    watching = True
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            load(os.path.join(folder, name))
        answer = "loaded"
    except RewriteError as error:
        answer = "refused"
        told = [str(error)]
    except BaseException as error:
        answer, told = f"raw {type(error).__name__}", [str(error)[:300]]
    watching = False
    seconds = time.process_time() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    same = state() == before
    load(sound)
    print(json.dumps({"name": name, "answer": answer, "outside": outside[:3],
                      "seconds": seconds, "grown": grown << 10, "same": same,
                      "told": [str(getattr(w, "message", w)) for w in told]}))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What came of each file, by its name."""
    folder = tmp_path_factory.mktemp("hostile")
    made, away = folder / "made", folder / "away"
    made.mkdir()
    away.mkdir()
    words = away / "words.txt"
    words.write_text("secret\n")
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3),
            keras.layers.Activation("relu"),
        ],
        name="net",
    )
    model.compile("sgd", "mse", metrics=["mae"])
    model.save(folder / "sound.keras")
    model.save(folder / "sound.h5")
    for name, change in {**CASES, **TRAINING}.items():
        change_archive(folder / "sound.keras", made / f"{name}.keras", change, words)
        if name in CASES:
            change_hdf5(folder / "sound.h5", made / f"{name}.h5", change, words)
    run = subprocess.run(
        [sys.executable, "-c", CHECK, made, folder / "sound.keras"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(x) for x in run.stdout.splitlines() if x.startswith("{")]
    return {line["name"]: line for line in lines}


def changed(config, change, words):
    change(config)
    return json.dumps(config).replace(TEXT, str(words))


def change_archive(source, target, change, words):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "config.json":
                data = changed(json.loads(data), change, words)
            new.writestr(name, data)


def change_hdf5(source, target, change, words):
    """As Keras 2 writes it, whose files take another way."""
    target.write_bytes(source.read_bytes())
    with h5py.File(target, "r+") as file:
        text = changed(json.loads(file.attrs["model_config"]), change, words)
        del file.attrs["model_config"], file.attrs["training_config"]
        if len(text) < 60_000:
            file.attrs["model_config"] = text
        else:
            file.attrs.create("model_config", text, dtype=h5py.string_dtype())
        file.attrs["keras_version"] = "2.15.0"
        file["model_weights"].attrs["keras_version"] = "2.15.0"


@pytest.mark.ci
@pytest.mark.parametrize(
    "name",
    [*(f"{n}{s}" for n in CASES for s in (".keras", ".h5"))]
    + [f"{n}.keras" for n in TRAINING],
)
def test_a_hostile_config_does_nothing(results, name):
    found = results[name]
    expected = "loaded" if name.rpartition(".")[0] in TRAINING else "refused"
    assert found["answer"] == expected, found
    assert found["told"] and not found["outside"] and found["same"], found
    assert found["seconds"] < 10 and found["grown"] < 2 << 30, found
    for text in found["told"]:
        assert len(text) < 6000 and not any(ord(c) < 32 and c != "\n" for c in text)
