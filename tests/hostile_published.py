"""Cases of `test_hostile_files`: the published vulnerabilities of Keras's loaders.

Each does what its report describes, with a harmless payload: it reads a file in the
folder of secrets, or would write an empty file where it runs. CVE-2025-12060, of tar
archives that `keras.utils.get_file` unpacks, needs a file that calls that function,
as CVE-2025-8747 does.
"""

from __future__ import annotations

import base64
import marshal

import hostile_hdf5
import numpy as np
from hostile_configs import TEXT, add, function, last, layer
from hostile_folders import case, copied


def byte_code():
    """Of a function that writes a file, as Keras stores it."""
    code = compile("lambda x: (open('written', 'w').close(), x)[1]", "<x>", "eval")
    (made,) = (c for c in code.co_consts if hasattr(c, "co_code"))
    return base64.encodebytes(marshal.dumps(made)).decode()


def of_keras_2():
    return layer("Lambda", function=[byte_code(), None, None], function_type="lambda")


def of_keras_3():
    config = {"code": byte_code(), "defaults": None, "closure": None}
    return layer("Lambda", function={"class_name": "__lambda__", "config": config})


def calling(module, name, **arguments):
    """A Lambda that calls a function with arguments of the file's."""
    return layer("Lambda", function=function(module, name), arguments=arguments)


def called_on_constants(entry, value):
    """A layer of a functional model that is called on an array of the file's, and so
    runs while the model is made."""

    def change(config):
        array = {
            "class_name": "__numpy__",
            "config": {"value": value, "dtype": "float32"},
        }
        node = {"args": [array], "kwargs": {}}
        name = entry["config"]["name"]
        config["config"]["layers"].append(
            {**entry, "name": name, "inbound_nodes": [node]}
        )

    return change


def unsafe_first(config):
    off = calling("keras.config", "enable_unsafe_deserialization")
    off["config"]["name"] = "off"
    config["config"]["layers"][-1:] = [off, of_keras_3()]


CVES = {
    "CVE-2024-3660 byte code of Keras 2": last(of_keras_2()),
    "CVE-2025-1550 os.system": last(calling("os", "system", command="true")),
    "CVE-2025-1550 a class of subprocess": last(
        layer("Popen", "subprocess", args=["true"])
    ),
    "CVE-2025-1550 builtins.exec": last(calling("builtins", "exec")),
    "CVE-2025-8747 get_file": last(
        calling("keras.utils", "get_file", origin=f"file://{TEXT}", cache_dir=".")
    ),
    "CVE-2025-8747 get_file by its module": last(
        calling("keras.src.utils.file_utils", "get_file", origin=f"file://{TEXT}")
    ),
    "CVE-2025-12060 get_file of a tar archive": last(
        calling("keras.utils", "get_file", origin=f"file://{TEXT}", extract=True)
    ),
    "CVE-2025-9905 byte code in any format": last(of_keras_3()),
    "CVE-2025-9906 enable_unsafe_deserialization": unsafe_first,
    "CVE-2025-12058 vocabulary of a local file": last(
        layer("StringLookup", vocabulary=TEXT)
    ),
    "CVE-2025-12058 vocabulary of an address": last(
        layer("StringLookup", vocabulary="http://127.0.0.1:9/words.txt")
    ),
}
for _name, _change in CVES.items():
    add("published", _name, _change)


@hostile_hdf5._h5(group="published", name="CVE-2026-0897 declared shape")
def declared(f, secrets):
    name = hostile_hdf5._first(f)
    del f[name]
    f.create_dataset(name, (1 << 20, 1 << 14), "f4", chunks=(1 << 10, 1 << 10))


@hostile_hdf5._h5(group="published", name="CVE-2026-0897 packed zeros")
def packed(f, secrets):
    name = hostile_hdf5._first(f)
    del f[name]
    f.create_dataset(name, data=np.zeros((1 << 14, 1 << 13), "f4"), compression="gzip")


@hostile_hdf5._h5(group="published", name="CVE-2026-1669 external storage")
def storage(f, secrets):
    hostile_hdf5.external_storage(f, secrets)


@hostile_hdf5._h5(group="published", name="CVE-2026-1669 external link")
def link(f, secrets):
    hostile_hdf5.external_dataset(f, secrets)


# Not published: what the same paths led to.
for _format in ("lambda.h5", "lambda.keras", "lambda"):

    def _byte_code(folder, sound, secrets, source=_format):
        return copied(sound / source, folder / source)

    _byte_code.__name__ = f"a Lambda that Keras 2 saved, {_format}"
    case("published")(_byte_code)

IMAGE = [[[[0.0, 0.0, 0.0]] * 4] * 4]
RUN = {
    "a picture written over a file": called_on_constants(
        calling("keras.visualization", "plot_image_gallery", path=TEXT, rows=1, cols=1),
        IMAGE,
    ),
    "float type changed": called_on_constants(
        calling("keras.config", "set_floatx"), IMAGE
    ),
    "an address connected to": called_on_constants(
        calling(
            "keras.distribution",
            "initialize",
            num_processes=2,
            process_id=1,
        ),
        IMAGE,
    ),
    "weights of a local file": called_on_constants(
        calling("keras.applications", "MobileNetV2", weights=TEXT), IMAGE
    ),
    "an endless loop": called_on_constants(
        calling("keras.ops", "while_loop", body=None, loop_vars=None), IMAGE
    ),
    "a picture read": called_on_constants(calling("keras.utils", "load_img"), IMAGE),
}
for _kind, _size in (
    ("Tile", {"repeats": [100_000, 100_000, 1, 1]}),
    ("Repeat", {"repeats": 10**10, "axis": None}),
    ("Pad", {"pad_width": [[10**5, 10**5]] * 4, "mode": "constant"}),
    ("OneHot", {"num_classes": 10**10}),
    ("BroadcastTo", {"shape": [10**4, 10**4, 10**4, 3]}),
    ("Reshape", {"newshape": [10**9]}),
    ("Resize", {"size": [10**6, 10**6]}),
    ("Unpack", {"num": 10**9}),
    ("Split", {"indices_or_sections": 10**9, "axis": 0}),
    ("Linspace", {"num": 10**10}),
):
    _module = "keras.src.ops.image" if _kind == "Resize" else "keras.src.ops.numpy"
    RUN[f"{_kind} of constants"] = called_on_constants(
        layer(_kind, _module, **_size), IMAGE
    )
for _name, _change in RUN.items():
    add("run", _name, _change, source="k3")


def tensorflow(function, *arguments, **named):
    """A TensorFlow operation of Keras 2 on constants alone, in front of the output."""

    def change(config):
        layers = config["config"]["layers"]
        entry = {
            "class_name": "TFOpLambda",
            "config": {"name": "op", "trainable": True, "function": function},
            "name": "op",
            "inbound_nodes": [["_CONSTANT_VALUE", -1, arguments[0], named]],
        }
        joined = {
            "class_name": "TFOpLambda",
            "config": {"name": "join", "trainable": True, "function": "math.add"},
            "name": "join",
            "inbound_nodes": [["last", 0, 0, {"y": ["op", 0, 0]}]],
        }
        layers += [entry, joined]
        config["config"]["output_layers"] = [["join", 0, 0]]

    return change


for _function, *_arguments in (
    ("zeros", [10**5, 10**5]),
    ("ones", [10**5, 10**5]),
    ("eye", 10**6),
    ("range", 10**10),
    ("fill", [10**5, 10**5]),
    ("random.normal", [10**5, 10**5]),
    ("random.uniform", [10**5, 10**5]),
    ("one_hot", [1, 2]),
    ("linspace", 0.0),
    ("io.read_file", TEXT),
    ("io.write_file", TEXT),
    ("py_function", None),
    ("numpy_function", None),
    ("while_loop", None),
    ("image.resize", [[[[1.0]]]]),
):
    _named = {
        "fill": {"value": 1.0},
        "one_hot": {"depth": 10**10},
        "linspace": {"stop": 1.0, "num": 10**10},
        "image.resize": {"size": [10**6, 10**6]},
        "io.write_file": {"contents": "x"},
    }.get(_function, {})
    add(
        "run",
        f"tf.{_function}",
        tensorflow(_function, *_arguments, **_named),
        "k2",
        (".h5",),
    )
