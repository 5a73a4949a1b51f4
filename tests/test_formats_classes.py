"""Loading what Keras 2 saved of classes of one's own, once they are given."""

import keras
import numpy as np
import pytest
from keras_2 import save_as_keras_2_13

import kerasnorm
from rewriters import RewriteError
from rewriters.formats import load


k = pytest.importorskip("tf_keras")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file"),
    pytest.mark.filterwarnings("ignore:The model is compiled without"),
    pytest.mark.filterwarnings("ignore:.*unclosed.*:ResourceWarning"),
]


def classes(k):
    """The same classes for either Keras: each leaves something to its call."""
    layers = k.layers

    class Block(layers.Layer):
        """Holds layers under attributes, in a model, a list and a dict."""

        def __init__(self, units, **kwargs):
            super().__init__(**kwargs)
            self.units = units
            self.trunk = k.Sequential(
                [layers.Dense(units), layers.LayerNormalization()]
            )
            self.last = [layers.Dense(units), layers.Dense(units)]
            self.gates = {"b": layers.Dense(units), "a": layers.Dense(units)}

        def call(self, x):
            x = self.trunk(x)
            for layer in self.last:
                x = layer(x)
            return self.gates["a"](x) * self.gates["b"](x)

        def get_config(self):
            return {**super().get_config(), "units": self.units}

    class Sorted(k.Model):
        """A subclassed model whose config has no name, and names that sort around
        Keras's own `layers`, beneath which an archive keeps what it meets there."""

        def __init__(self, units=4):
            super().__init__()
            self.units = units
            self.zeroth = layers.Dense(units)
            self.norms = [layers.BatchNormalization() for _ in range(2)]
            self.blocks = [Block(units), Block(units)]
            self.body = k.Sequential([layers.Dense(units), layers.BatchNormalization()])
            self.head = layers.Dense(3)

        def call(self, x, training=False):
            x = self.zeroth(x)
            for norm, block in zip(self.norms, self.blocks, strict=True):
                x = block(norm(x, training=training))
            return self.head(self.body(x, training=training))

        def get_config(self):
            return {"units": self.units}

        @classmethod
        def from_config(cls, config):
            return cls(**config)

    class Late(layers.Layer):
        """Builds what it holds in its call alone, though Keras need not make that."""

        def __init__(self, units):
            super().__init__()
            self.units = units
            self.first, self.second = layers.Dense(units), layers.Dense(units)

        def build(self, shape):
            self.built = True

        def call(self, x):
            return self.second(k.activations.tanh(self.first(x)))

        def compute_output_shape(self, shape):
            return (*shape[:-1], self.units)

        def get_config(self):
            return {"units": self.units}

    class Tracked(k.Model):
        """Appended lists, nested ones, dicts, a tuple, and what is no layer."""

        def __init__(self, units=4):
            super().__init__()
            self.units = units
            self.z, self.head = [], layers.Dense(units)
            self.z += [layers.Dense(units)]
            self.z.append(layers.Dense(units))
            self.a, self.y = [], layers.Dense(units)
            self.a.append(layers.Dense(units))
            self.mixed = {"b": layers.Dense(units), "a": layers.Dense(units)}
            self.pairs = [[layers.Dense(units), layers.Dense(units)]]
            self.both = (layers.Dense(units), layers.BatchNormalization())
            if units == 4:  # within another, Keras 2 counted it among its weights
                self.tracker = k.metrics.Mean(name="tracked")

        def call(self, x):
            inner = [*self.z, *self.a, *self.pairs[0], *self.both]
            for layer in (self.head, *inner, self.mixed["b"], self.y, self.mixed["a"]):
                x = layer(x)
            return x

        def get_config(self):
            return {"units": self.units}

    class Words(k.Model):
        """Wants integers."""

        def __init__(self):
            super().__init__()
            self.table = layers.Embedding(9, 4)
            self.head = layers.Dense(2)

        def call(self, x):
            return self.head(self.table(x + (x // 2) % 2))

        def get_config(self):
            return {}

    class Standard(k.Model):
        """Holds a layer whose adapted values are tensors."""

        def __init__(self):
            super().__init__()
            self.normal = layers.Normalization()
            self.head = layers.Dense(2)

        def call(self, x):
            return self.head(self.normal(x))

        def get_config(self):
            return {}

    class Chain(k.Sequential):
        """A name of its own, and nothing else."""

    class Two(k.Model):
        """Two inputs, a weight of its own and a build that leaves the rest undone."""

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.left, self.right = layers.Dense(4), layers.Dense(4)
            self.norm = layers.BatchNormalization()

        def build(self, shapes):
            self.kernel = self.add_weight(
                name="kernel", shape=(shapes[0][-1],), initializer="ones"
            )
            self.built = True

        def call(self, inputs, training=False):
            left, right = inputs
            x = self.left(left * self.kernel) + self.right(right)
            return self.norm(x, training=training)

        def get_config(self):
            return {}

    return Block, Sorted, Late, Tracked, Words, Standard, Chain, Two


def sorted_(k, made):
    return made["Sorted"](5)


def two(k, made):
    return made["Two"](name="pair")


def functional(k, made):
    x = inputs = k.Input((7,))
    for units in (6, 5):
        x = k.layers.BatchNormalization()(made["Block"](units)(x))
    return k.Model(inputs, x)


def inside_functional(k, made):
    inputs = k.Input((7,))
    return k.Model(inputs, k.layers.Dense(2)(made["Sorted"](5)(inputs)))


def sequence(k, made):
    return k.Sequential([k.Input((7,)), made["Sorted"](4), k.layers.Dense(2)])


def tracked(k, made):
    model = made["Tracked"]()
    model.compile("adam", "mse")
    return model


def inside_tracked(k, made):
    inputs = k.Input((7,))
    return k.Model(inputs, k.layers.Dense(2)(made["Tracked"](7)(inputs)))


def late(k, made):
    inputs = k.Input((7,))
    return k.Model(inputs, made["Late"](3)(made["Late"](5)(inputs)))


def words(k, made):
    return made["Words"]()


def standard(k, made):
    model = made["Standard"]()
    model.normal.adapt(np.random.default_rng(1).normal(3, 2, (64, 7)))
    return model


def chain(k, made):
    parts = [k.layers.Dense(4), k.layers.Dense(4), k.layers.BatchNormalization()]
    return made["Chain"]([k.Input((7,)), *parts])


SUBCLASSED = (sorted_, two, tracked, words, standard)  # which tf-keras keeps out of .h5
MODELS = (
    *SUBCLASSED,
    functional,
    inside_functional,
    sequence,
    inside_tracked,
    late,
    chain,
)


def given(k):
    return {cls.__name__: cls for cls in classes(k)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Writes a model in a format: its path, inputs and outputs."""
    done = {}

    def get(make, suffix):
        key = make, suffix
        if key not in done:
            rng = np.random.default_rng(0)
            k.backend.clear_session()
            model = make(k, given(k))
            widths = (3, 2) if make is two else (7,)
            x = [rng.normal(size=(4, n)).astype("float32") for n in widths]
            x = x if make is two else x[0]
            x = rng.integers(0, 8, (4, 7)) if make is words else x
            model(x)
            model.set_weights([0.2 + rng.random(w.shape) for w in model.get_weights()])
            path = tmp_path_factory.mktemp(make.__name__) / f"model{suffix}"
            write = save_as_keras_2_13 if suffix == ".2.13.keras" else type(model).save
            write(model, path)
            done[key] = path, x, model(x).numpy()
        return done[key]

    return get


@pytest.mark.parametrize(
    ("make", "suffix"),
    [
        (make, suffix)
        for make in MODELS
        for suffix in (".keras", ".2.13.keras", "", ".h5")
        if suffix != ".h5" or make not in SUBCLASSED
    ],
)
def test_keras_2_computes_the_same(make, suffix, saved):
    path, x, wanted = saved(make, suffix)
    keras.layers.Dense(1)  # names go on from there: none agrees with the file's
    model = load(path, custom_objects=given(keras))
    np.testing.assert_allclose(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_loaded_class_is_rewritten(saved):
    path, x, wanted = saved(sorted_, ".keras")
    model = kerasnorm.load(path, custom_objects=given(keras))
    plan = kerasnorm.plan(model, "bn")
    assert len(plan.steps) + len(plan.refused) == 5
    assert [s.path.split("/")[1] for s in plan.steps] == ["0", "1"]
    new = kerasnorm.rewrite(model, "wn")
    np.testing.assert_allclose(new(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".keras", ""])
def test_what_is_not_given_or_does_not_run_is_named(suffix, saved):
    path, *_ = saved(sorted_, suffix)
    with pytest.raises(RewriteError, match='"Sorted": Sorted'):
        load(path)

    class Broken(given(keras)["Sorted"]):
        def call(self, x):
            return x @ self.gone

    with pytest.raises(RewriteError, match=r"'Sorted' cannot be called.*'gone'"):
        load(path, custom_objects={"Sorted": Broken})


def test_another_class_does_not_fit(saved):
    path, *_ = saved(sorted_, ".keras")

    class Fewer(given(keras)["Sorted"]):
        def __init__(self, units):
            super().__init__(units)
            del self.zeroth

        def call(self, x, training=False):
            return self.norms[0](x, training=training)

    with pytest.raises(RewriteError, match=r"no layer for some weights.* 'zeroth'"):
        load(path, custom_objects={"Sorted": Fewer})

    class More(given(keras)["Sorted"]):
        """Reads a config for two blocks, and makes one."""

        def __init__(self, units):
            super().__init__(units)
            self.blocks = self.blocks[:1]
            self.norms = self.norms[:1]

    with pytest.raises(RewriteError, match=r"no layer for some weights"):
        load(path, custom_objects={"Sorted": More})
