"""Models inside models, as Keras 3.0 to 3.10 described their inputs and outputs."""

import json
import zipfile

import keras
import numpy as np
import pytest
from keras import layers

from rewriters.formats import load


def base(lists=False):
    inputs = keras.Input((4,))
    y = layers.Dense(3, name="inner")(inputs)
    return keras.Model([inputs] if lists else inputs, [y] if lists else y, name="base")


def in_a_sequential():
    return keras.Sequential([keras.Input((4,)), base(), layers.Dense(2)])


def repeated_in_time():
    x = [keras.Input((5, 4)), layers.TimeDistributed(base()), layers.Dense(2)]
    return keras.Sequential(x)


def a_sequential_in_a_sequential():
    inner = keras.Sequential([base(), layers.Dense(3)])
    return keras.Sequential([keras.Input((4,)), inner, layers.Dense(2)])


def ends_in_lists():
    inputs = keras.Input((4,))
    return keras.Model([inputs], [layers.Dense(2)(base(lists=True)(inputs)[0])])


def shared_and_deep():
    shared, a, b = base(), keras.Input((4,)), keras.Input((4,))
    x = layers.Add()([shared(a), shared(b)])
    middle = keras.Model([a, b], [layers.Dense(4)(x), x], name="middle")
    c, d = keras.Input((4,)), keras.Input((4,))
    first, second = middle([c, d])
    return keras.Model([c, d], [base()(first), layers.Dense(2)(second)])


MODELS = [
    in_a_sequential,
    repeated_in_time,
    a_sequential_in_a_sequential,
    ends_in_lists,
    shared_and_deep,
]


def written_by(version, model, folder):
    """The archive as `version` of Keras 3 wrote it: single ends in lists."""

    def listed(value):
        if isinstance(value, list):
            return [listed(v) for v in value]
        if not isinstance(value, dict):
            return value
        ends = {
            k: [v]
            for k, v in value.items()
            if k in ("input_layers", "output_layers") and isinstance(v[0], str)
        }
        return {**{k: listed(v) for k, v in value.items()}, **ends}

    model.save(folder / "new.keras")
    with (
        zipfile.ZipFile(folder / "new.keras") as new,
        zipfile.ZipFile(folder / "old.keras", "w") as old,
    ):
        for name in new.namelist():
            data = new.read(name)
            if name == "config.json":
                data = json.dumps(listed(json.loads(data)))
            elif name == "metadata.json":
                data = json.dumps({"keras_version": version})
            old.writestr(name, data)
    return folder / "old.keras"


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_ends_that_earlier_keras_3_wrote_in_lists(make, tmp_path, rng):
    model = make()
    x = [rng.normal(size=(3, *t.shape[1:])).astype("float32") for t in model.inputs]
    x = x if len(x) > 1 else x[0]
    wanted = keras.tree.flatten(model.predict(x, verbose=0))
    found = load(written_by("3.4.1", model, tmp_path))
    found.save(tmp_path / "again.keras")
    for new in (found, load(tmp_path / "again.keras")):
        for got in (new.predict(x, verbose=0), new(x)):
            for y, golden in zip(keras.tree.flatten(got), wanted, strict=True):
                np.testing.assert_allclose(np.array(y), golden, 1e-5, 1e-6)


def test_a_list_of_one_of_a_later_version_stays(tmp_path):
    inputs = keras.Input((4,))
    keras.Model([inputs], [layers.Dense(2)(inputs)]).save(tmp_path / "m.keras")
    assert isinstance(load(tmp_path / "m.keras").output, list)
