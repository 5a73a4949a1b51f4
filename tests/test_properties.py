"""The properties: equal to plain NumPy, and what theory says where it says any."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
from keras import ops

import kerasnorm
from kerasnorm import KerasNormError
from kerasnorm.properties import definitions, measure


layers = keras.layers


def numpy_of(x):
    return ops.convert_to_numpy(x)


# ------------------------------------------------------------ definitions alone


def naive_cosines(h):
    h = h.reshape(len(h), -1)
    return np.array(
        [
            [
                a @ b / np.sqrt((a @ a) * (b @ b)) if a.any() and b.any() else 0
                for b in h
            ]
            for a in h
        ]
    )


@pytest.mark.parametrize("shape", [(6, 5), (7, 4, 3), (5, 4, 4, 3)])
@pytest.mark.parametrize("scale", [1.0, 1e15, 1e-15])
def test_sums_equal_numpy(rng, shape, scale):
    """At any size that float32 holds, although its squares do not fit."""
    h = rng.normal(0.5, 1.0, shape)
    mean, variance = map(numpy_of, definitions.moments((h * scale).astype("float32")))
    axes = tuple(range(len(shape) - 1))
    np.testing.assert_allclose(mean / scale, h.mean(axes), rtol=1e-4, atol=1e-5)
    if scale < 1e10:
        np.testing.assert_allclose(variance / scale**2, h.var(axes), rtol=1e-4)
    cosines, norms = map(
        numpy_of, definitions.gram((h * scale).astype("float32"), len(h))
    )
    np.testing.assert_allclose(cosines, naive_cosines(h), atol=1e-5)
    expected = np.sqrt((h.reshape(len(h), -1) ** 2).sum(1))
    np.testing.assert_allclose(norms / scale, expected, rtol=1e-5)


def test_channels_first(rng):
    h = rng.normal(size=(4, 3, 5, 6)).astype("float32")
    mean, variance = map(numpy_of, definitions.moments(h, 1))
    np.testing.assert_allclose(mean, h.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(variance, h.var((0, 2, 3)), rtol=1e-5)


def test_windows_of_a_sample_count_as_one(rng):
    h = rng.normal(size=(8, 5)).astype("float32")
    cosines, _ = definitions.gram(h, 4)
    np.testing.assert_allclose(
        numpy_of(cosines), naive_cosines(h.reshape(4, 10)), atol=1e-6
    )


def test_a_sample_of_zeros_is_no_division_by_zero():
    h = np.zeros((3, 4), "float32")
    h[0] = 1
    cosines, norms = map(numpy_of, definitions.gram(h, 3))
    np.testing.assert_array_equal(cosines, np.diag([1.0, 0, 0]))
    np.testing.assert_array_equal(norms, [2, 0, 0])


@pytest.mark.parametrize(
    "cosines, similarity, stable, effective",
    [
        (np.eye(5), 0.0, 5.0, 5.0),  # orthogonal
        (np.ones((5, 5)), 1.0, 1.0, 1.0),  # all the same
        (np.kron(np.eye(2), np.ones((3, 3))), 0.4, 2.0, 2.0),  # two classes of three
        ([[1, -1], [-1, 1]], -1.0, 1.0, 1.0),  # opposite
    ],
)
def test_similarity_and_ranks(cosines, similarity, stable, effective):
    cosines = np.asarray(cosines, "float64")
    assert definitions.cosine_similarity(cosines) == pytest.approx(similarity)
    assert definitions.stable_rank(cosines) == pytest.approx(stable)
    assert definitions.effective_rank(cosines) == pytest.approx(effective)


def test_ranks_equal_singular_values(rng):
    h = rng.normal(size=(6, 9))
    h /= np.linalg.norm(h, axis=1, keepdims=True)
    s = np.linalg.svd(h, compute_uv=False)
    p = s / s.sum()
    gram = h @ h.T
    assert definitions.stable_rank(gram) == pytest.approx(np.sum(s**2) / s[0] ** 2)
    entropy = np.exp(-np.sum(p * np.log(p)))
    assert definitions.effective_rank(gram) == pytest.approx(entropy)
    assert 1 <= definitions.stable_rank(gram) <= definitions.effective_rank(gram) <= 6


def test_one_sample_has_no_similarity():
    assert np.isnan(definitions.cosine_similarity(np.ones((1, 1))))


def test_dead_share():
    mean, variance = np.array([0, 0, 1.0, 0.5]), np.array([0, 1.0, 0, 0.2])
    assert definitions.dead_share(mean, variance) == 0.25


def test_statistics_distance():
    """One standard deviation off in the mean, or twice as wide: 1."""
    one, zero = np.ones(3), np.zeros(3)
    distance = definitions.statistics_distance
    assert distance(zero, one, zero, one) == 0
    assert distance(one * 2, one * 4, zero, one * 4) == pytest.approx(1)
    assert distance(zero, one * 4, zero, one) == pytest.approx(1)


def test_dependence(rng):
    a = rng.normal(size=(500, 20))
    independent = rng.normal(size=(500, 20))
    assert definitions.batch_dependence(a, a) == 0
    # Of two independent draws the difference has twice the variance.
    value = definitions.batch_dependence(a, independent)
    assert value == pytest.approx(np.sqrt(2), rel=0.05)
    assert definitions.batch_dependence(np.ones((3, 2)), np.zeros((3, 2))) == np.inf


@pytest.mark.parametrize(
    "values, kind, factor, exponent",
    [
        (2.0 ** np.arange(12), "exponential", 2.0, None),
        (0.5 ** np.arange(12), "exponential", 0.5, None),
        (3.0 * (1 + np.arange(30)), "polynomial", None, 1.0),
        ((1.0 + np.arange(30)) ** 2, "polynomial", None, 2.0),
        (1 + 0.1 * np.sin(np.arange(20)), "stable", None, None),
    ],
)
def test_laws_of_growth(values, kind, factor, exponent):
    law = definitions.growth(values)
    assert law.kind == kind
    assert law.total == pytest.approx(values[-1] / values[0])
    assert factor is None or law.factor == pytest.approx(factor)
    assert exponent is None or law.exponent == pytest.approx(exponent)


def test_growth_of_what_has_none():
    assert np.isnan(definitions.growth([1.0]).factor)
    assert definitions.growth([0.0, 1.0, np.inf, 2.0]).total == pytest.approx(2)


def test_effective_learning_rate():
    assert definitions.effective_learning_rate(0.1, 2.0) == pytest.approx(0.025)
    assert definitions.relative_step(0.1, 4.0, 2.0) == pytest.approx(0.2)
    assert definitions.effective_learning_rate(0.1, 0.0) == np.inf


# ------------------------------------------------- a small net, by hand in NumPy


def test_measurement_equals_numpy(rng):
    """Dense, batch norm, ReLU, dense, squared error: everything written out."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, name="first"),
            layers.BatchNormalization(name="norm", epsilon=1e-3),
            layers.ReLU(),
            layers.Dense(3, name="last"),
        ]
    )
    values = [rng.normal(size=w.shape) for w in model.get_weights()]
    values[5] = np.abs(values[5]) + 0.5  # the running variance
    model.set_weights(values)
    x, y = rng.normal(size=(8, 6)), rng.normal(size=(8, 3))
    m = measure(
        model,
        x.astype("float32"),
        y.astype("float32"),
        loss="mse",
        learning_rate=0.1,
    )
    w1, b1, gamma, beta, running, spread, w2, b2 = values
    z = x @ w1 + b1
    mu, var = z.mean(0), z.var(0)
    root = np.sqrt(var + 1e-3)
    normal = (z - mu) / root
    h = np.maximum(gamma * normal + beta, 0)
    out = h @ w2 + b2
    # Loss: the sum over samples of the mean over outputs.
    d_out = 2 * (out - y) / 3
    d_norm = (d_out @ w2.T) * (h > 0)
    g = d_norm * gamma
    d_z = (g - g.mean(0) - normal * (g * normal).mean(0)) / root

    def expect(path, read, gradient, kernel=None, kernel_gradient=None):
        site = m.at(path)
        cosines = naive_cosines(read)
        s = np.linalg.eigvalsh(cosines).clip(0) ** 0.5
        p = s[s > 1e-6] / s.sum()
        expected = {
            "variance": read.var(0).mean(),
            "cosine": (cosines.sum() - 8) / 56,
            "stable_rank": 8 / s.max() ** 2,
            "effective_rank": np.exp(-np.sum(p * np.log(p))),
            "gradient": np.sqrt(np.sum(gradient**2) / 8),
            "dead": np.mean(~read.any(0)),
        }
        if kernel is not None:
            norm = np.linalg.norm(kernel)
            size = np.linalg.norm(kernel_gradient) / 8
            expected |= {
                "weight_norm": norm,
                "weight_gradient": size,
                "effective_learning_rate": 0.1 / norm**2,
                "relative_step": 0.1 * size / norm,
            }
        for name, value in expected.items():
            found = getattr(site, name)
            assert found == pytest.approx(value, rel=2e-3, abs=1e-5), (path, name)

    expect("first", x, d_z, w1, x.T @ d_z)
    expect("norm", z, d_norm)
    expect("last", h, d_out, w2, h.T @ d_out)
    drift = ((mu - running) ** 2 + (np.sqrt(var) - np.sqrt(spread)) ** 2) / spread
    assert m.at("norm").statistics_distance == pytest.approx(
        np.sqrt(drift.mean()), rel=1e-3
    )
    assert m.at("output").variance == pytest.approx(out.var(0).mean(), rel=1e-3)

    def forward(x):
        z = x @ w1 + b1
        z = gamma * (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-3) + beta
        return np.maximum(z, 0) @ w2 + b2

    again = forward(np.concatenate([x[:4], x[:4]]))[:4]
    change = np.sum((again - out[:4]) ** 2)
    differ = np.sum((out[:4] - out[:4].mean(0)) ** 2)
    assert m.at("output").dependence == pytest.approx(
        np.sqrt(change / differ), rel=1e-3
    )
    assert m.at("first").dependence == 0


# ------------------------------------------------ networks with known answers


def deep(depth, width, norm=None, activation=None, kernel="he_normal", residual=False):
    x = inputs = keras.Input((width,))
    for k in range(depth):
        y = layers.Dense(width, kernel_initializer=kernel, name=f"dense{k}")(x)
        if norm is not None:
            y = norm()(y)
        if activation is not None:
            y = layers.Activation(activation)(y)
        x = layers.Add()([x, y]) if residual else y
    return keras.Model(inputs, layers.Dense(10, name="head")(x))


def gaussian(rng, n, width, mean=0.0):
    return rng.normal(mean, 1.0, (n, width)).astype("float32")


def test_orthogonal_linear_network_changes_nothing(rng):
    """Isometries: variance, cosines, ranks and gradients are the same everywhere."""
    model = deep(12, 32, kernel=keras.initializers.Orthogonal(seed=0))
    m = measure(model, gaussian(rng, 64, 32, 0.5))
    for name in ("cosine", "stable_rank", "effective_rank"):
        values = m.profile(name)[1]
        np.testing.assert_allclose(values, values[0], rtol=1e-3, err_msg=name)
    gradient = m.profile("gradient")[1][:-1]
    np.testing.assert_allclose(gradient, gradient[0], rtol=1e-3)
    # The energy is kept, not its split into mean and variance within the batch.
    assert m.forward.kind == "stable"
    assert m.forward.factor == pytest.approx(1, abs=0.02)
    assert m.backward.total == pytest.approx(1, rel=0.5)


@pytest.mark.parametrize("gain", [0.8, 1.25])
def test_scaled_orthogonal_network_grows_by_its_gain(rng, gain):
    """Forward by gain squared a layer, backward by the gain: exponentially."""
    kernel = keras.initializers.Orthogonal(gain, seed=0)
    m = measure(deep(16, 32, kernel=kernel), gaussian(rng, 64, 32))
    assert m.forward.kind == m.backward.kind == "exponential"
    assert m.forward.factor == pytest.approx(gain**2, rel=0.02)
    depth_gradient = m.profile("gradient")[1][:-1]
    law = definitions.growth(depth_gradient[::-1])
    assert law.factor == pytest.approx(gain, rel=0.01)


def test_relu_network_collapses_without_batch_norm_and_not_with(rng):
    """Without, cosines rise to 1 (arc-cosine kernel); batch norm holds them apart."""
    x = gaussian(rng, 64, 128)
    plain = measure(deep(25, 128, activation="relu"), x)
    norm = measure(deep(25, 128, layers.BatchNormalization, activation="relu"), x)
    assert plain.hidden("cosine")[-1] > 0.9
    assert norm.hidden("cosine")[-1] < 0.6
    assert plain.hidden("stable_rank")[-1] < 1.2
    assert norm.hidden("stable_rank")[-1] > 1.6
    assert norm.hidden("effective_rank")[-1] > 1.4 * plain.hidden("effective_rank")[-1]


def test_relu_cosines_follow_the_arc_cosine_kernel(rng):
    """Cho and Saul, 2009: after a wide ReLU layer two inputs at cosine c are at
    (sqrt(1 - c^2) + (pi - arccos c) c) / pi."""
    a, b = np.linalg.qr(rng.normal(size=(64, 2)))[0].T * 8
    x = np.stack([a, 0.5 * a + np.sqrt(0.75) * b]).astype("float32")
    layer = layers.Dense(8192, "relu", kernel_initializer="he_normal", use_bias=False)
    model = keras.Sequential([keras.Input((64,)), layer, layers.Dense(2, name="head")])
    c = 0.5
    expected = (np.sqrt(1 - c**2) + (np.pi - np.arccos(c)) * c) / np.pi
    m = measure(model, x)
    assert m.sites[0].cosine == pytest.approx(c, abs=1e-4)
    assert m.at("head").cosine == pytest.approx(expected, abs=0.02)


def test_batch_norm_makes_gradients_explode(rng):
    """Yang et al., 2019: by sqrt(pi / (pi - 1)) = 1.21 a layer for ReLU, at any
    initialization; without batch norm He's initialization keeps them."""
    x = gaussian(rng, 128, 256)
    depth = 20
    norm = measure(
        deep(depth, 256, layers.BatchNormalization, activation="relu"),
        x,
        batch_size=128,
    )
    plain = measure(deep(depth, 256, activation="relu"), x, batch_size=128)
    law = definitions.growth(norm.profile("gradient")[1][:-1][::-1])
    assert law.factor == pytest.approx(np.sqrt(np.pi / (np.pi - 1)), rel=0.05)
    law = definitions.growth(plain.profile("gradient")[1][:-1][::-1])
    assert law.factor == pytest.approx(1, abs=0.05)


def test_residual_networks_grow_linearly_with_norm_and_exponentially_without(rng):
    """A branch of unit variance adds 1; a branch that keeps variance doubles it."""
    x = gaussian(rng, 64, 64)
    linear = measure(deep(24, 64, layers.BatchNormalization, residual=True), x)
    double = measure(deep(24, 64, kernel="orthogonal", residual=True), x)
    assert linear.forward.kind == "polynomial"
    assert linear.forward.exponent == pytest.approx(1, abs=0.3)
    assert double.forward.kind == "exponential"
    assert double.forward.factor == pytest.approx(2, rel=0.1)


def test_dead_units_are_counted(rng):
    layer = layers.Dense(8, "relu")
    model = keras.Sequential([keras.Input((4,)), layer, layers.Dense(2, name="head")])
    kernel, bias = layer.get_weights()
    bias[:3] = -100
    bias[3:] = 100
    layer.set_weights([kernel, bias])
    assert measure(model, gaussian(rng, 16, 4)).at("head").dead == pytest.approx(3 / 8)


def test_calls_of_a_shared_layer_count_as_one_long_gradient(rng):
    inputs, shared = keras.Input((6,)), layers.Dense(6, name="shared")
    hidden = shared(shared(inputs))
    model = keras.Model(inputs, layers.Dense(3, use_bias=False, name="head")(hidden))
    x, y = gaussian(rng, 8, 6), gaussian(rng, 8, 3)
    site = measure(model, x, y, loss="mse").at("shared")
    last = 2 * (numpy_of(model(x)) - y) / 3 @ numpy_of(model.layers[-1].kernel).T
    calls = np.stack([last, last @ numpy_of(shared.kernel).T], 1)
    assert site.gradient == pytest.approx(np.sqrt((calls**2).sum() / 16), rel=1e-4)
    cosines = naive_cosines(calls)
    assert site.gradient_cosine == pytest.approx((cosines.sum() - 8) / 56, rel=1e-4)


def test_dependence_of_batch_methods_alone(rng):
    x = gaussian(rng, 32, 16)
    for norm, depends in (
        (layers.BatchNormalization, True),
        (layers.LayerNormalization, False),
    ):
        m = measure(deep(3, 16, norm, "relu"), x)
        assert (m.at("output").dependence > 1e-3) is depends
    inference = measure(deep(3, 16, layers.BatchNormalization), x, training=False)
    assert inference.at("output").dependence < 1e-5


# --------------------------------------------------------------- any model, any data


class Subclassed(keras.Model):
    """Layers in a list, a norm in a dict, one layer called twice."""

    def __init__(self):
        super().__init__()
        self.blocks = [layers.Dense(8), layers.Dense(8)]
        self.norms = {"a": layers.BatchNormalization()}
        self.shared = layers.Dense(8, activation="relu")
        self.head = layers.Dense(3)

    def call(self, x, training=None):
        for block in self.blocks:
            x = self.norms["a"](block(x), training=training)
            x = self.shared(x)
        return self.head(x)


def test_subclassed_model(rng):
    model = Subclassed()
    x = gaussian(rng, 16, 8)
    model(x)
    before = model.get_weights()
    m = measure(model, x, np.arange(16) % 3)
    paths = [s.path for s in m.sites]
    assert {"blocks/0", "blocks/1", "norms/a", "shared", "head", "output"} == set(paths)
    assert m.at("blocks/0").variance == pytest.approx(x.var(0).mean(), rel=1e-4)
    assert all(s.gradient > 0 for s in m.sites if s.kind != "output")
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_model_that_takes_batches_of_one_size(rng):
    x = gaussian(rng, 21, 8)
    inputs = keras.Input((8,))
    model = keras.Model(inputs, layers.BatchNormalization()(layers.Dense(6)(inputs)))
    same = keras.Input(batch_shape=(5, 8))
    held = measure(keras.Model(same, model(same)), x)
    free = measure(model, x, batch_size=5)
    assert held.batch_size == 5 and held.samples == 20
    for a, b in zip(held.sites, free.sites, strict=True):
        for name in ("variance", "cosine", "dependence"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-5)
    with pytest.raises(KerasNormError, match="fill no batch"):
        measure(keras.Model(same, model(same)), x[:4])


def test_nested_graph_and_subclass_agree(rng):
    """The same layers in a graph, nested and in a class are measured the same."""
    inner = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(8, name="d"),
            layers.BatchNormalization(name="n"),
        ]
    )
    inputs = keras.Input((8,))
    graph = keras.Model(inputs, layers.Dense(2, name="head")(inner(inputs)))

    class Same(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner, self.head = inner, graph.get_layer("head")

        def call(self, x, training=None):
            return self.head(self.inner(x, training=training))

    x = gaussian(rng, 16, 8)
    same = Same()
    same(x)
    one, other = measure(graph, x), measure(same, x)
    assert [s.kind for s in one.sites] == [s.kind for s in other.sites]
    for a, b in zip(one.sites, other.sites, strict=True):
        assert a.path.split("/")[-1] == b.path.split("/")[-1]
        for name in ("variance", "cosine", "gradient", "dependence"):
            u, v = getattr(a, name), getattr(b, name)
            assert u == v or u == pytest.approx(v, rel=1e-4)


def test_models_of_other_kinds(rng):
    """Embeddings, recurrence, attention, two inputs, two outputs, half precision."""
    words = keras.Input((7,), dtype="int32")
    h = layers.Embedding(11, 8, name="embedding")(words)
    h = layers.LayerNormalization(name="norm")(h)
    h = layers.MultiHeadAttention(2, 4, name="attention")(h, h)
    h = layers.GRU(6, name="gru")(h)
    other = keras.Input((5,))
    h = layers.Concatenate()(
        [h, layers.Dense(4, dtype="mixed_float16", name="half")(other)]
    )
    model = keras.Model(
        [words, other],
        [layers.Dense(3, name="a")(h), layers.Dense(1, name="b")(h)],
    )
    x = [rng.integers(0, 11, (12, 7)), gaussian(rng, 12, 5)]
    m = measure(model, x, batch_size=6)
    found = {s.path: s for s in m.sites}
    assert found["embedding"].variance is None and found["embedding"].gradient > 0
    for path in ("norm", "gru", "half", "a", "b"):
        assert found[path].variance > 0 and found[path].gradient > 0, path
    assert any("attention/" in path for path in found)
    assert m.samples == 12 and m.batch_size == 6


def test_datasets_and_spread_samples(rng):
    model = deep(2, 8)
    x = gaussian(rng, 100, 8)
    batches = [x[k : k + 10] for k in range(0, 100, 10)]
    from_batches = measure(model, iter(batches), samples=30, batch_size=30)
    from_array = measure(model, x[:30], batch_size=30)
    assert from_batches.sites == from_array.sites
    assert measure(model, x, samples=20).samples == 20


def test_of_a_source_no_more_is_read_than_used(rng):
    read = []

    class Source(keras.utils.PyDataset):
        def __len__(self):
            return 50

        def __getitem__(self, k):
            read.append(k)
            return np.full((8, 8), k, "float32")

    y = np.arange(400) % 10
    found = measure(deep(1, 8), Source(), y, samples=16)
    assert read == [0, 1] and found.samples == 16
    x = np.repeat([[0.0], [1.0]], 8, 0) * np.ones(8)
    same = measure(deep(1, 8), x, y[:16], samples=16)
    assert same.at("dense0").variance == found.at("dense0").variance


def test_memory_bounds_the_batch(rng):
    model = deep(2, 64)
    m = measure(model, gaussian(rng, 64, 64), memory=20_000)
    assert 1 <= m.batch_size < 64 and "to stay below" in m.notes[0]


def test_losses(rng):
    model = deep(2, 8)
    x, y = gaussian(rng, 16, 8), np.arange(16) % 10
    labelled, random = measure(model, x, y), measure(model, x)
    assert labelled.labelled and not random.labelled
    assert labelled.at("head").gradient < 2  # softmax minus one-hot
    assert random.at("head").gradient == pytest.approx(np.sqrt(10), rel=0.2)
    model.compile(
        keras.optimizers.SGD(0.5),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    compiled = measure(model, x, y)
    assert compiled.learning_rate == 0.5
    assert compiled.at("head").gradient == pytest.approx(
        labelled.at("head").gradient, rel=1e-4
    )


def two_heads(units=(3, 3), **activations):
    inputs = keras.Input((6,))
    heads = zip("za", units, strict=True)
    return keras.Model(
        inputs,
        [layers.Dense(n, activations.get(k), name=k)(inputs) for k, n in heads],
    )


def test_outputs_go_by_their_names(rng):
    """Their order is the model's, not the alphabet's."""
    model, x = two_heads(), gaussian(rng, 8, 6)
    y = [gaussian(rng, 8, 3), gaussian(rng, 8, 3)]
    names, losses = model.output_names, ["mse", "mae"]
    expected = measure(model, x, y, loss=losses)
    named = dict(zip(names, losses, strict=True))
    labels = dict(reversed([*zip(names, y, strict=True)]))
    model.compile("sgd", named, loss_weights={"a": 1.0, "z": 10.0})
    for found, factor in (
        (measure(model, x, labels, loss=named), 1),
        (measure(model, x, y), 10),  # the compiled losses and their weights
        (measure(model, x, y, loss=losses, loss_weights=[10, 1]), 10),
    ):
        for name, by in (("a", 1), ("z", factor)):
            wanted = by * expected.at(name).gradient
            assert found.at(name).gradient == pytest.approx(wanted, rel=1e-5)
    only = measure(model, x, y, loss={"a": "mae", "z": None})
    assert only.at("z").gradient == 0 < only.at("a").gradient


@pytest.mark.parametrize("reduction", ["sum", "none", "sum_over_batch_size"])
def test_gradients_are_those_of_the_sum_over_samples(rng, reduction):
    model, x, y = deep(1, 8), gaussian(rng, 16, 8), gaussian(rng, 16, 10)
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    gradient = 2 * (numpy_of(model(x)) - y) / 10
    expected = np.sqrt((gradient**2).sum(1).mean())
    found = measure(model, x, y, loss=loss).at("head").gradient
    assert found == pytest.approx(expected, rel=1e-4)


def test_losses_suit_each_output(rng):
    """One unit and three, classes and one-hot, logits and probabilities."""
    model = two_heads((1, 3), z="sigmoid")
    x, y = gaussian(rng, 8, 6), np.arange(8) % 3
    found = [
        measure(model, x, [y > 1, labels])
        for labels in (y, np.eye(3, dtype=int)[y], np.eye(3)[y])
    ]
    p, logits = map(numpy_of, model(x))
    binary = np.linalg.norm(x.T @ (p - (y > 1)[:, None]) / 8)
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    cross = softmax - np.eye(3)[y]
    square = 2 * (logits - np.eye(3)[y]) / 3
    for m, gradient in zip(found, (cross, cross, square), strict=True):
        expected = np.sqrt((gradient**2).sum(1).mean())
        assert m.at("a").gradient == pytest.approx(expected, rel=1e-4)
        assert m.at("z").weight_gradient == pytest.approx(binary, rel=1e-3)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": np.full((4, 8), np.nan, "float32")}, "NaN"),
        ({"x": np.zeros((4, 9), "float32")}, "shape"),
        ({"y": np.zeros(3)}, "as many labels"),
        ({"batch_size": 0}, "batch_size"),
        ({"model": 5}, "no Keras model"),
        ({"y": np.zeros(4), "loss": "no such loss"}, "loss"),
        ({"y": np.zeros(4), "loss": ["mse", "mse"]}, "do not match"),
        ({"y": np.zeros((4, 3)), "loss": "mse"}, "does not fit"),
        ({"y": {"tail": np.zeros(4)}}, "unknown outputs: got 'tail'"),
        ({"x": iter([np.zeros((4, 8))]), "y": np.zeros(5), "samples": 8}, "as many"),
    ],
)
def test_bad_arguments_are_refused(change, words):
    given = {"model": deep(1, 8), "x": np.zeros((4, 8), "float32"), **change}
    with pytest.raises(KerasNormError, match=words):
        measure(**given)


def test_a_model_without_layers_to_measure():
    model = keras.Sequential([keras.Input((4,)), layers.ReLU()])
    with pytest.raises(KerasNormError, match="nothing to measure"):
        measure(model, np.zeros((4, 4), "float32"))


# ------------------------------------------------------------------- what it gives


def test_table_json_frame_figure(rng, tmp_path):
    pytest.importorskip("matplotlib")
    m = measure(deep(3, 8, layers.BatchNormalization, "relu"), gaussian(rng, 16, 8))
    text = str(m)
    assert "dense0" in text and "Forward:" in text and "Backward:" in text
    data = json.loads(m.to_json())
    assert [s["path"] for s in data["sites"]] == [s.path for s in m.sites]
    assert data["sites"][0]["variance"] == pytest.approx(m.sites[0].variance)
    for ending in ("png", "html", "json", "md"):
        m.save(tmp_path / f"m.{ending}")
        assert (tmp_path / f"m.{ending}").stat().st_size > 500
    with pytest.raises(KerasNormError, match="unknown kind"):
        m.save(tmp_path / "m.txt")
    with pytest.raises(KerasNormError, match="unknown property"):
        m.profile("charm")
    with pytest.raises(KerasNormError, match="dense0"):
        m.at("nowhere")


def test_frame_without_pandas_says_so(rng, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(KerasNormError, match="pandas"):
        measure(deep(1, 8), gaussian(rng, 4, 8)).to_frame()


def test_public_names():
    assert kerasnorm.properties.measure is measure
    assert callable(kerasnorm.compass)


def test_labels_for_some_of_the_outputs(rng):
    """As in `fit`: what has no labels counts for nothing."""
    model, x = two_heads(), gaussian(rng, 8, 6)
    y = gaussian(rng, 8, 3)
    model.compile("sgd", {"a": "mse"})
    found = measure(model, x, {"a": y})
    assert found.at("z").gradient == 0 < found.at("a").gradient
    whole = measure(model, x, {"a": y, "z": y}, loss={"a": "mse", "z": None})
    assert found.at("a").gradient == pytest.approx(whole.at("a").gradient, rel=1e-6)


def test_the_rate_is_that_of_the_model_also_without_kernels(rng):
    model = keras.Sequential([keras.Input((6,)), layers.BatchNormalization()])
    x = gaussian(rng, 8, 6)
    model.compile(keras.optimizers.SGD(0.5), "mse")
    assert measure(model, x).learning_rate == 0.5
    assert measure(model, x, learning_rate=0.25).learning_rate == 0.25
