"""A `training` that the calls of a Keras 2 model recorded, which won there."""

import keras
import numpy as np
import pytest

import kerasnorm
from rewriters.formats import load
from rewriters.pinned import PinnedTraining


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file"),
    pytest.mark.filterwarnings("ignore:.*unclosed.*:ResourceWarning"),
]


def batch_statistics(k):
    made, x = k.layers, k.Input((6,))
    y = made.BatchNormalization()(made.Dense(5)(x), training=True)
    return k.Model(x, made.Dense(4)(made.BatchNormalization()(y)))


def calls_that_differ(k):
    made, x = k.layers, k.Input((5,))
    shared = made.BatchNormalization()
    return k.Model(x, [shared(x, training=True), shared(x), shared(x, training=False)])


def nested(k):
    made, x = k.layers, k.Input((6,))
    y = made.Dense(5)(made.BatchNormalization()(x))
    y = made.BatchNormalization(name="batch")(y, training=True)
    base = k.Model(x, made.Dropout(0.5)(y), name="base")
    z = k.Input((6,))
    return k.Model(z, made.Dense(3)(base(z, training=False)))


def repeated_in_time(k):
    made, x = k.layers, k.Input((6,))
    base = k.Model(x, made.BatchNormalization()(made.Dense(5)(x)), name="base")
    z = k.Input((3, 6))
    return k.Model(z, made.TimeDistributed(base)(z, training=False))


def a_sequential(k):
    base = k.Sequential([k.Input((6,)), k.layers.BatchNormalization()])
    z = k.Input((6,))
    return k.Model(z, k.layers.Dense(3)(base(z, training=True)))


MODELS = [batch_statistics, calls_that_differ, nested, repeated_in_time, a_sequential]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes a model of Keras 2 once: its input, outputs and folder."""
    k = pytest.importorskip("tf_keras")
    done = {}

    def get(make, suffix):
        if make not in done:
            rng = np.random.default_rng(0)
            k.backend.clear_session()
            model = make(k)
            for w in model.weights:
                w.assign(np.abs(rng.normal(size=w.shape)) + 0.3)
            x = rng.normal(size=(8, *model.input_shape[1:])).astype("float32")
            folder = tmp_path_factory.mktemp(make.__name__)
            model.save(folder / "model.h5")
            model.save(folder / "model.keras")
            if make in (nested, batch_statistics):
                model.save(folder / "model")
            y = model.predict(x, verbose=0)
            done[make] = x, y if isinstance(y, list) else [y], folder
        return *done[make][:2], done[make][2] / f"model{suffix}"

    return get


@pytest.mark.parametrize(
    ("make", "suffix"),
    [
        (make, suffix)
        for make in MODELS
        for suffix in (".h5", ".keras", "")
        if suffix or make in (nested, batch_statistics)
    ],
)
def test_what_was_recorded_wins(make, suffix, written, tmp_path):
    x, wanted, path = written(make, suffix)
    model = load(path)
    weights = model.get_weights()
    model.save(tmp_path / "new.keras")
    model.save(tmp_path / "new.h5")
    again = load(tmp_path / "new.keras"), load(tmp_path / "new.h5")
    for new in (model, *again, keras.models.clone_model(model)):
        assert isinstance(new, PinnedTraining)
        for run in (lambda m: m.predict(x, verbose=0), lambda m: m(x)):
            new.set_weights(weights)  # batch statistics move the others
            found = keras.tree.flatten(run(new))
            for y, golden in zip(found, wanted, strict=True):
                np.testing.assert_allclose(np.array(y), golden, 1e-4, 1e-4)


def statistics(model):
    norms = keras.layers.BatchNormalization
    found = [x for x in model._flatten_layers() if isinstance(x, norms)]
    found.sort(key=lambda x: x.name, reverse=True)
    return [np.array(keras.ops.copy(x.moving_mean.value)) for x in found]


def test_fit_leaves_alone_what_is_never_in_training_mode(written):
    x, wanted, path = written(repeated_in_time, ".h5")
    model = load(path)
    before, kernel = statistics(model), model.trainable_weights[0].numpy()
    model.compile("sgd", "mse")
    model.fit(x, 0 * wanted[0], verbose=0)
    np.testing.assert_array_equal(before, statistics(model))
    assert not np.array_equal(kernel, model.trainable_weights[0].numpy())


def test_fit_moves_what_is_always_in_training_mode(written):
    x, wanted, path = written(nested, ".keras")
    model = load(path)
    before = statistics(model)  # of batch_normalization_..., and of batch
    model.compile("sgd", "mse")
    model.fit(x, wanted[0], verbose=0)
    moved = [
        not np.array_equal(a, b) for a, b in zip(before, statistics(model), strict=True)
    ]
    assert moved == [False, True]


def random_layers(k):
    made, x = k.layers, k.Input((4, 6))
    noisy = k.Sequential([k.Input((4, 6)), made.GaussianNoise(0.5)])
    return k.Model(
        x,
        [
            made.Dropout(0.5)(x, training=True),
            noisy(x, training=True),
            made.LSTM(3, dropout=0.5)(x, training=True),
            made.MultiHeadAttention(2, 3, dropout=0.5)(x, x, training=True),
            made.Dropout(0.5)(x),
        ],
    )


@pytest.mark.parametrize("suffix", [".h5", ".keras"])
def test_random_layers_stay_random(suffix, written):
    x, _, path = written(random_layers, suffix)
    model = load(path)
    one, two = model.predict(x, verbose=0), model.predict(x, verbose=0)
    differ = [not np.allclose(a, b) for a, b in zip(one, two, strict=True)]
    assert differ == [True] * 4 + [False]


def plain(k):
    made, x = k.layers, k.Input((6,))
    y = made.LSTM(3)(made.Reshape((2, 3))(x), training=False)
    return k.Model(x, made.Dropout(0.0)(y, training=True))


def test_what_makes_no_difference_needs_keras_alone(written):
    model = load(written(plain, ".keras")[2])
    assert type(model).__module__.startswith("keras.")


@pytest.mark.parametrize("method", ["gn", "none", "wn"])
def test_a_rewrite_and_an_export_keep_what_was_recorded(method, written, tmp_path):
    x, wanted, path = written(nested, ".keras")
    model = load(path)
    new, report = kerasnorm.rewrite(model, method, return_report=True)
    reasons = {r.path: str(r.reason) for r in report.plan.refused}
    assert "forced training mode" in reasons["base/batch"]
    assert [s.path for s in report.plan.steps] == ["base/batch_normalization"]
    new.save(tmp_path / "new.keras")
    exported = kerasnorm.export(new)
    for other in (new, exported, keras.saving.load_model(tmp_path / "new.keras")):
        assert isinstance(other, PinnedTraining)
        assert isinstance(other.get_layer("base"), PinnedTraining)
        if method != "gn":
            found = other.predict(x, verbose=0)
            np.testing.assert_allclose(found, wanted[0], 1e-3, 1e-3)


def dropout_that_stays_on(k):
    made, x = k.layers, k.Input((6,))
    y = made.BatchNormalization()(made.Dense(5)(x))
    return k.Model(x, made.Dropout(0.5)(y, training=True))


def test_a_model_with_dropout_that_stays_on_is_rewritten(written):
    model = load(written(dropout_that_stays_on, ".keras")[2])
    new = kerasnorm.rewrite(model, "none")
    x = np.ones((64, 6), "float32")
    assert (new.predict(x, verbose=0) == 0).any()
