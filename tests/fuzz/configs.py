"""Mutations of JSON configs: each changes one parsed config in place.

A mutation is a function of (config, rng). `rng` alone decides, so that a number gives
the same file again.
"""

from __future__ import annotations

import copy
import functools
import inspect

import keras


HUGE = (10**5, 10**9, 2**31, 2**63, 10**30)
ODD = (
    None, True, False, -1, 0, 0.5, 1e308, float("nan"), float("inf"), "", "x" * 50,
    "\x00", "\x1b[31m", "../../x", "/etc/hostname", "file:///etc/hostname", "é\u202e",
    [], {}, [[]], [None], {"class_name": 1}, {"a": {}}, [[1, 2], [3]], "linear",
    "float16", "int8", "mixed_float16", "string", "auto", "channels_first", "*",
)  # fmt: skip
WRAPPERS = ("TimeDistributed", "Bidirectional", "SpectralNormalization")


def places(value, found=None):
    """Every (container, key) in a config."""
    found = [] if found is None else found
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            places(value[key], found)
    return found


def pick(rng, items):
    items = list(items)
    return items[rng.integers(len(items))] if items else None


def some_place(config, rng, test=lambda value: True):
    return pick(rng, [(c, k) for c, k in places(config) if test(c[k])])


def is_entry(value):
    return isinstance(value, dict) and "class_name" in value and "config" in value


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def layers(config):
    """Every list of layers, of nested models too."""
    found = [
        value
        for container, key in [({"": config}, ""), *places(config)]
        for value in [container[key]]
        if isinstance(value, list) and value and all(map(is_entry, value))
    ]
    return found or [[]]


@functools.cache
def names():
    """Everything that Keras exports, as (module, name, whether it is a class)."""
    found = []
    todo, seen = [("keras", keras)], set()
    while todo:
        path, module = todo.pop()
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or name in ("src", "tree"):
                continue
            if inspect.ismodule(value) and value.__name__.startswith("keras"):
                if id(value) not in seen:
                    seen.add(id(value))
                    todo.append((f"{path}.{name}", value))
            elif callable(value):
                found.append((path, name, inspect.isclass(value)))
    others = (
        "builtins exec", "builtins open", "os system", "numpy load",
        "keras.src.utils.file_utils get_file", "keras.src.saving.saving_api load_model",
        "tensorflow io.read_file", "subprocess Popen", "keras.src.ops.numpy Tile",
        "keras.src.ops.numpy Repeat", "keras.src.ops.core WhileLoop",
        "keras.src.ops.core Map",
    )  # fmt: skip
    others = [tuple(x.split()) for x in others]
    return found + [(module, name, name[0].isupper()) for module, name in others]


def arguments(cls, rng):
    """Some arguments for a class, of values that now and then are right."""
    try:
        parameters = inspect.signature(cls.__init__).parameters.values()
    except (TypeError, ValueError):
        return {}
    made = {}
    for parameter in list(parameters)[1:]:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.default is inspect.Parameter.empty or rng.random() < 0.2:
            made[parameter.name] = value(rng)
    return made


def value(rng):
    """Any value: small, huge or odd, or an entry."""
    kind = rng.integers(6)
    if kind == 0:
        return int(rng.integers(1, 8))
    if kind == 1:
        return pick(rng, HUGE)
    if kind == 2:
        return special(rng)
    if kind == 3:
        return reference(rng)
    if kind == 4:
        return [int(n) for n in rng.integers(1, 5, rng.integers(1, 4))]
    return copy.deepcopy(pick(rng, ODD))


def reference(rng):
    """An entry that names something of Keras, or of Python."""
    module, name, is_class = pick(rng, names())
    if not is_class:
        made = {"module": module, "class_name": "function", "config": name}
        made["registered_name"] = pick(rng, (name, "function", None))
        return made
    found = getattr(inspect.importlib.import_module(module), name, None)
    config = arguments(found, rng) if module.startswith("keras") else {}
    if rng.random() < 0.7:
        config["name"] = "made"
    return {
        "module": module,
        "class_name": name,
        "config": config,
        "registered_name": pick(rng, (None, name, "rewriters>PinnedTraining")),
    }


def special(rng):
    """An entry that Keras resolves by itself."""
    size = pick(rng, (1, 4, *HUGE))
    spec = {"spec_name": "TensorSpec", "module": "tensorflow", "registered_name": None}
    tensor = {"shape": [None, size], "dtype": "float32", "keras_history": ["x", 0, 0]}
    kinds = (
        ("__tensor__", {"value": [1.0], "dtype": "float32"}),
        ("__numpy__", {"value": [1], "dtype": f"S{size}"}),
        ("__numpy__", {"value": [1], "dtype": "O"}),
        ("__numpy__", {"value": [1], "dtype": f"({size},)f4"}),
        ("__bytes__", {"value": "x"}),
        ("__slice__", {"start": 0, "stop": size, "step": 1}),
        ("__ellipsis__", {}),
        ("__tuple__", {}),
        ("TensorShape", {}),
        ("__typespec__", [[size], "float32", "x"]),
        ("__lambda__", {"code": "4wE=", "defaults": None, "closure": None}),
        ("__keras_tensor__", tensor),
    )
    name, config = pick(rng, kinds)
    made = {"class_name": name, "config": config, "items": [1, size]}
    return {**made, **(spec if name == "__typespec__" else {})}


# The mutations.


def any_value(config, rng):
    container, key = some_place(config, rng)
    container[key] = copy.deepcopy(pick(rng, ODD))


def huge_number(config, rng):
    place = some_place(config, rng, is_number)
    if place:
        place[0][place[1]] = pick(rng, (*HUGE, -1, 0, 1.5, -(10**9)))


def remove(config, rng):
    container, key = some_place(config, rng)
    del container[key]


def repeat(config, rng):
    place = some_place(config, rng, lambda v: isinstance(v, list) and v)
    if place:
        items = place[0][place[1]]
        items.insert(rng.integers(len(items) + 1), copy.deepcopy(pick(rng, items)))


def many(config, rng):
    place = some_place(config, rng, lambda v: isinstance(v, list) and v)
    if place:
        items = place[0][place[1]]
        count = pick(rng, (100, 3000, 30_000))
        items += [copy.copy(items[-1]) for _ in range(count)]


def exchange(config, rng):
    (a, i), (b, j) = some_place(config, rng), some_place(config, rng)
    try:
        a[i], b[j] = copy.deepcopy(b[j]), copy.deepcopy(a[i])
    except (IndexError, KeyError):
        pass


def deepen(config, rng):
    container, key = some_place(config, rng)
    for _ in range(pick(rng, (2, 50, 300, 900))):
        container[key] = pick(rng, ([container[key]], {"a": container[key]}))


def refer(config, rng):
    """Something is a reference, where one stood or where a text stood."""
    test = is_entry if rng.random() < 0.5 else lambda v: isinstance(v, str)
    place = some_place(config, rng, test)
    if place:
        place[0][place[1]] = reference(rng)


def insert_special(config, rng):
    container, key = some_place(config, rng)
    container[key] = special(rng)


def another_class(config, rng):
    place = some_place(config, rng, is_entry)
    if place:
        module, name, _ = pick(rng, names())
        place[0][place[1]].update(class_name=name, module=module)


def new_arguments(config, rng):
    """A layer with other arguments of its class."""
    entry = pick(rng, pick(rng, layers(config)))
    if entry is None:
        return
    cls = getattr(keras.layers, str(entry["class_name"]), None)
    if cls is not None and isinstance(entry["config"], dict):
        entry["config"].update(arguments(cls, rng))


def another_layer(config, rng):
    """A layer of some kind, where another one is called."""
    entry = pick(rng, pick(rng, layers(config)))
    if entry is None or not isinstance(entry["config"], dict):
        return
    kinds = [n for n, v in sorted(vars(keras.layers).items()) if inspect.isclass(v)]
    kind = pick(rng, kinds)
    made = arguments(getattr(keras.layers, kind), rng)
    name = entry["config"].get("name")
    entry.update(class_name=kind, module="keras.layers", config={**made, "name": name})


def wrap(config, rng):
    """A layer inside wrappers, nested."""
    entry = pick(rng, pick(rng, layers(config)))
    if entry is None:
        return
    inner = {k: v for k, v in entry.items() if k not in ("inbound_nodes", "name")}
    for i in range(pick(rng, (1, 3, 40, 150))):
        outer = {"name": f"wrapper{i}", "layer": inner}
        kind = pick(rng, WRAPPERS)
        inner = {"module": "keras.layers", "class_name": kind, "config": outer}
    entry.update(inner)


def rename(config, rng):
    names = [e for group in layers(config) for e in group]
    entry, other = pick(rng, names), pick(rng, names)
    if entry is None or not isinstance(entry["config"], dict):
        return
    new = pick(rng, (other.get("name"), "a/b", "\x1b[2J", "x" * 100_000, "", 7, None))
    entry["config"]["name"] = new
    if rng.random() < 0.5:
        entry["name"] = new


def rewire(config, rng):
    """A call takes other inputs: those of another layer, its own, a constant."""
    entries = [e for group in layers(config) for e in group if e.get("inbound_nodes")]
    entry = pick(rng, entries)
    if entry is None:
        return
    place = some_place(entry["inbound_nodes"], rng, lambda v: isinstance(v, (str, int)))
    if place:
        names = [e.get("name") for e in entries]
        place[0][place[1]] = pick(rng, (*names, -1, 0, 1, 99, "_CONSTANT_VALUE"))


def constant_call(config, rng):
    entry = pick(rng, pick(rng, layers(config)))
    if entry is not None:
        nodes = (
            {"args": [special(rng)], "kwargs": {}},
            {"args": [[1.0, 2.0]], "kwargs": {"training": reference(rng)}},
            [["_CONSTANT_VALUE", -1, [[1.0]], {"y": pick(rng, HUGE)}]],
            [[]], [], {}, None,
        )  # fmt: skip
        entry["inbound_nodes"] = [copy.deepcopy(pick(rng, nodes))]


def recur(config, rng):
    place = some_place(
        config, rng, lambda v: is_entry(v) and "units" in (v["config"] or {})
    )
    if place:
        place[0][place[1]]["config"].update(
            stateful=bool(rng.integers(2)),
            unroll=bool(rng.integers(2)),
            units=pick(rng, (1, 3, *HUGE)),
        )


def shape(config, rng):
    keys = {"batch_shape", "batch_input_shape"}
    place = some_place(config, rng, lambda v: isinstance(v, dict) and keys & set(v))
    if place:
        inner = place[0][place[1]]
        inner[(keys & set(inner)).pop()] = [
            pick(rng, (None, 1, 4, *HUGE)) for _ in range(int(rng.integers(0, 7)))
        ]


def vocabulary(config, rng):
    entry = pick(rng, pick(rng, layers(config)))
    if entry is None or not isinstance(entry["config"], dict):
        return
    name = entry["config"].get("name")
    kind = pick(rng, ("StringLookup", "IntegerLookup", "TextVectorization", "Hashing"))
    words = pick(
        rng, ("/etc/hostname", "http://127.0.0.1:9/x", ["a"], [1, 2], None, "a")
    )
    made = {"name": name, "vocabulary": words, "num_oov_indices": pick(rng, (1, *HUGE))}
    if rng.random() < 0.5:
        made["idf_weights"] = pick(rng, ([1.0], "/etc/hostname"))
    if kind == "Hashing":
        made = {"name": name, "num_bins": pick(rng, (1, *HUGE)), "salt": [1, 2]}
    entry.update(class_name=kind, module="keras.layers", config=made)


def training(config, rng):
    """The optimizer, a loss or metrics are something else."""
    key = pick(
        rng, ("optimizer", "loss", "metrics", "weighted_metrics", "loss_weights")
    )
    made = reference(rng) if rng.random() < 0.6 else metric(rng)
    place = some_place(config, rng, lambda v: isinstance(v, dict) and "loss" in v)
    inner = config if place is None else place[0][place[1]]
    inner[key] = pick(rng, (made, [made], {"out": [made]}))


def metric(rng):
    kinds = (
        ("MeanIoU", {"num_classes": pick(rng, (2, *HUGE))}),
        ("AUC", {"num_thresholds": pick(rng, (2, *HUGE))}),
        ("Precision", {"thresholds": [0.5] * pick(rng, (1, 100_000))}),
        ("MeanMetricWrapper", {"fn": reference(rng)}),
        ("PrecisionAtRecall", {"recall": 0.5, "num_thresholds": pick(rng, HUGE)}),
    )
    kind, made = pick(rng, kinds)
    return {"module": "keras.metrics", "class_name": kind, "config": made}


MUTATIONS = (
    any_value, any_value, huge_number, huge_number, remove, remove, repeat, many,
    exchange, deepen, refer, refer, refer, insert_special, another_class, new_arguments,
    new_arguments, another_layer, another_layer, wrap, rename, rewire, rewire,
    constant_call, recur, shape, vocabulary, training, training,
)  # fmt: skip
