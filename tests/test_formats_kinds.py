"""Kinds of layers that Keras 3 lacks or stores otherwise, in files of Keras 2."""

import json
import zipfile

import h5py
import keras
import numpy as np
import pytest

import kerasnorm  # noqa: F401 (knows tensorflow-addons' layers)
from rewriters.formats import load


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file"),
    pytest.mark.filterwarnings("ignore:.*unclosed.*:ResourceWarning"),
]


def virtual_batches(k):
    made, x = k.layers, k.Input((4, 5, 3))
    y = made.BatchNormalization(virtual_batch_size=2)(made.Conv2D(4, 3)(x))
    y = made.BatchNormalization(virtual_batch_size=2, axis=1)(y)
    inner = k.Model(x, y)
    z = k.Input((4, 5, 3))
    return k.Model(z, made.Flatten()(inner(z)))


def several_axes(k):
    made, x = k.layers, k.Input((4, 5, 3))
    y = made.BatchNormalization(axis=[1, 2, 3])(x)
    y = made.BatchNormalization(axis=[1, -1], scale=False)(y)
    return k.Model(x, made.TimeDistributed(made.BatchNormalization(axis=[1, 2]))(y))


def adapted_first(k):
    norm = k.layers.Normalization()
    norm.adapt(np.random.default_rng(1).normal(2, 3, size=(99, 5)).astype("float32"))
    return k.Sequential([norm, k.layers.Dense(2)])


def adapted_of_two_axes(k):
    norm = k.layers.Normalization(axis=(1, 3))
    data = np.random.default_rng(1).normal(2, 3, size=(99, 4, 5, 3))
    norm.adapt(data.astype("float32"))
    inner = k.Sequential([norm, k.layers.Conv2D(2, 3)])
    z = k.Input((4, 5, 3))
    return k.Model(z, inner(z))


SHAPES = {
    virtual_batches: (6, 4, 5, 3),
    several_axes: (6, 4, 5, 3),
    adapted_first: (6, 5),
    adapted_of_two_axes: (6, 4, 5, 3),
}


def write(model, folder, names, rng):
    for w in model.weights:
        adapted = w.name.split("/")[-1] in ("mean:0", "variance:0")
        if w.dtype.is_floating and w.shape.rank and not adapted:
            w.assign(np.abs(rng.normal(size=w.shape)) + 0.3)
    for name in names:
        model.save(folder / name)


@pytest.mark.filterwarnings("ignore:Training differs")
@pytest.mark.parametrize(
    "names",
    [("model.h5", "model.keras"), pytest.param(("model",), marks=pytest.mark.ci)],
    ids=["files", "SavedModel"],
)
@pytest.mark.parametrize("make", SHAPES, ids=lambda f: f.__name__)
def test_all_formats_compute_what_keras_2_did(make, names, tmp_path, rng):
    k = pytest.importorskip("tf_keras")
    x = rng.normal(size=SHAPES[make]).astype("float32")
    model = make(k)
    model(x[:2])
    write(model, tmp_path, names, rng)
    wanted = model.predict(x, verbose=0)
    for name in names:
        new = load(tmp_path / name)
        new.save(tmp_path / "new.keras")
        for found in (new, keras.saving.load_model(tmp_path / "new.keras")):
            for y in (found.predict(x, verbose=0), found(x)):
                np.testing.assert_allclose(np.array(y), wanted, 1e-4, 1e-4)


def test_virtual_batches_are_told(tmp_path, rng):
    k = pytest.importorskip("tf_keras")
    virtual_batches(k).save(tmp_path / "model.h5")
    with pytest.warns(UserWarning, match="batch_normalization.* no virtual batches"):
        load(tmp_path / "model.h5")


def test_several_axes_train_as_they_did(tmp_path, rng):
    k = pytest.importorskip("tf_keras")
    x = k.Input((4, 5, 3))
    model = k.Model(x, k.layers.BatchNormalization(axis=[1, 3])(x))
    model.save(tmp_path / "model.h5")
    new = load(tmp_path / "model.h5")
    data = rng.normal(2, 3, size=(6, 4, 5, 3)).astype("float32")
    for m in (model, new):
        m.compile("sgd", "mse")
        m.fit(data, 0 * data, verbose=0)
    for a, b in zip(model.get_weights(), new.get_weights(), strict=True):
        np.testing.assert_allclose(b, a, 1e-4, 1e-5)


def entry(kind, name, **config):
    return {"class_name": kind, "config": {"name": name, "trainable": True, **config}}


def write_h5(path, layer, shape, weights, dtype="float32"):
    """A Sequential of one layer, as Keras 2 wrote it."""
    first = entry("InputLayer", "x", batch_input_shape=[None, *shape], dtype=dtype)
    config = {"name": "m", "layers": [first, layer]}
    with h5py.File(path, "w") as f:
        f.attrs["keras_version"] = "2.15.0"
        f.attrs["model_config"] = json.dumps(
            {"class_name": "Sequential", "config": config}
        )
        group = f.create_group("model_weights")
        name = layer["config"]["name"]
        group.attrs["layer_names"] = [name.encode()]
        stored = group.create_group(name)
        stored.attrs["weight_names"] = [w.encode() for w in weights]
        for key, value in weights.items():
            stored.create_dataset(key, data=value)


def test_the_copy_that_weights_were_initialized_with_is_not_needed(tmp_path, rng):
    v, g, bias = rng.normal(size=(5, 4)), rng.normal(size=4), rng.normal(size=4)
    dense = entry("Dense", "dense", units=4)
    layer = entry("Addons>WeightNormalization", "wn", layer=dense, data_init=True)
    weights = {
        "wn/g:0": g,
        "wn/kernel:0": v,
        "wn/bias:0": bias,
        "wn/initialized:0": np.array(True),
        "wn/data_dep_init_1/kernel:0": v + 1,
        "wn/data_dep_init_1/bias:0": bias + 1,
    }
    write_h5(tmp_path / "m.h5", layer, (5,), weights)
    x = rng.normal(size=(3, 5)).astype("float32")
    wanted = x @ (g * v / np.linalg.norm(v, axis=0)) + bias
    y = load(tmp_path / "m.h5").predict(x, verbose=0)
    np.testing.assert_allclose(y, wanted, 1e-4, 1e-5)


def test_normalized_weights_of_other_layers_become_plain(tmp_path, rng):
    v, g, bias = rng.normal(size=(3, 4, 2)), rng.normal(size=2), rng.normal(size=4)
    inner = entry("Conv1DTranspose", "conv", filters=4, kernel_size=[3])
    layer = entry("Addons>WeightNormalization", "wn", layer=inner, data_init=False)
    weights = {
        "wn/g:0": g,
        "wn/kernel:0": v,
        "wn/bias:0": bias,
        "wn/initialized:0": np.array(True),
    }
    write_h5(tmp_path / "m.h5", layer, (5, 2), weights)
    model = load(tmp_path / "m.h5")
    found = model.get_layer("wn")
    assert type(found) is keras.layers.Conv1DTranspose
    wanted = g * v / np.sqrt(np.sum(v**2, axis=(0, 1)))
    np.testing.assert_allclose(np.array(found.kernel.value), wanted, 1e-5, 1e-6)
    np.testing.assert_allclose(np.array(found.bias.value), bias, 1e-5, 1e-6)


def test_only_the_recurrent_kernel_of_cells_was_normalized(tmp_path, rng):
    v, g = rng.normal(size=(4, 4)), rng.normal(size=4)
    kernel, bias = rng.normal(size=(2, 4)), rng.normal(size=4)
    inner = entry("SimpleRNN", "rnn", units=4)
    layer = entry("WeightNormalization", "wn", layer=inner, data_init=True)
    config = {"name": "m", "layers": [
        entry("InputLayer", "x", batch_input_shape=[None, 5, 2]), layer,
    ]}  # fmt: skip
    arrays = {
        "vars/0": g,
        "vars/1": v,
        "vars/2": np.array(True),
        "layer/cell/vars/0": kernel,
        "layer/cell/vars/1": bias,
        "_naked_clone_layer/cell/vars/0": kernel + 1,
    }
    write_archive(tmp_path, config, "weight_normalization", arrays)
    found = load(tmp_path / "m.keras").get_layer("wn").cell
    wanted = g * v / np.linalg.norm(v, axis=0)
    for variable, array in zip(
        (found.kernel, found.recurrent_kernel, found.bias),
        (kernel, wanted, bias),
        strict=True,
    ):
        np.testing.assert_allclose(np.array(variable.value), array, 1e-5, 1e-6)


def test_a_learned_epsilon_comes_first_in_an_archive(tmp_path, rng):
    gamma, beta = rng.normal(size=(2, 1, 1, 1, 3))
    layer = entry(
        "Addons>FilterResponseNormalization",
        "frn",
        axis=[1, 2],
        epsilon=1e-6,
        learned_epsilon=True,
    )
    config = {"name": "m", "layers": [
        entry("InputLayer", "x", batch_input_shape=[None, 5, 5, 3]), layer,
    ]}  # fmt: skip
    arrays = {"vars/0": np.array([0.3]), "vars/1": gamma, "vars/2": beta}
    write_archive(tmp_path, config, "filter_response_normalization", arrays)
    x = rng.normal(size=(2, 5, 5, 3)).astype("float32")
    square = np.mean(x**2, axis=(1, 2), keepdims=True)
    wanted = gamma * x / np.sqrt(square + 1e-6 + 0.3) + beta
    y = load(tmp_path / "m.keras").predict(x, verbose=0)
    np.testing.assert_allclose(y, wanted, 1e-4, 1e-5)


def write_archive(folder, config, place, arrays):
    """A `.keras` archive of Keras 2.15 with the weights of one layer."""
    with h5py.File(folder / "w.h5", "w") as f:
        for name, value in arrays.items():
            f.create_dataset(f"layers/{place}/{name}", data=value)
    model = {"class_name": "Sequential", "config": config}
    with zipfile.ZipFile(folder / "m.keras", "w") as z:
        z.writestr("config.json", json.dumps(model))
        z.writestr("metadata.json", json.dumps({"keras_version": "2.15.0"}))
        z.write(folder / "w.h5", "model.weights.h5")


def test_a_spectrally_normalized_embedding_gives_floats(tmp_path, rng):
    table = rng.normal(size=(7, 4)).astype("float32")
    inner = entry("Embedding", "e", input_dim=7, output_dim=4)
    layer = entry("Addons>SpectralNormalization", "sn", layer=inner, power_iterations=1)
    weights = {"sn/embeddings:0": table, "sn/sn_u:0": rng.normal(size=(1, 4))}
    write_h5(tmp_path / "m.h5", layer, (5,), weights, dtype="int32")
    tokens = rng.integers(0, 7, (3, 5)).astype("int32")
    new = load(tmp_path / "m.h5")
    new.save(tmp_path / "new.keras")
    for found in (new, keras.saving.load_model(tmp_path / "new.keras")):
        y = found.predict(tokens, verbose=0)
        np.testing.assert_allclose(y, table[tokens], 1e-5, 1e-6)


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_discretization_sees_floats(suffix, tmp_path, rng):
    k = pytest.importorskip("tf_keras")
    x = k.Input((4,))
    model = k.Model(x, k.layers.Discretization([0.0, 0.5, 1.0])(x))
    model.save(tmp_path / f"m{suffix}")
    values = rng.normal(size=(9, 4)).astype("float32")
    wanted = model.predict(values, verbose=0)
    assert set(wanted.reshape(-1)) == {0, 1, 2, 3}
    new = load(tmp_path / f"m{suffix}")
    new.save(tmp_path / "new.keras")
    for found in (new, keras.saving.load_model(tmp_path / "new.keras")):
        np.testing.assert_array_equal(found.predict(values, verbose=0), wanted)


def test_the_state_that_legacy_optimizers_lost_is_told(tmp_path):
    k = pytest.importorskip("tf_keras")
    model = k.Sequential([k.Input((3,)), k.layers.Dense(2)])
    model.compile(k.optimizers.legacy.SGD(0.1, momentum=0.9), "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    model.save(tmp_path / "m.keras")
    with pytest.warns(UserWarning, match="without the optimizer's state"):
        assert load(tmp_path / "m.keras").optimizer.momentum == pytest.approx(0.9)
