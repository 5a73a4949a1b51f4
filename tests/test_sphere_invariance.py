"""Scale invariance: proofs checked with numbers, refutations with counterexamples."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from conftest import sometimes
from keras import layers, ops
from test_architectures import ALL, SMALL, make
from test_published import files
from zoo import ZOO, Block, images, randomize

import kerasnorm
import rewriters
from kerasnorm.common.errors import KerasNormError
from kerasnorm.sphere import scale_invariant_weights
from kerasnorm.sphere.invariance import measure


JAX = keras.backend.backend() == "jax"


def verdicts(model):
    return {f.name: f for f in scale_invariant_weights(model)}


def functional(inputs, make):
    return randomize(keras.Model(inputs, make(inputs)))


def judged(model, samples=6):
    """Holds every verdict to numbers, weight by weight; returns them by name."""
    x = rewriters.random_inputs(model, samples=samples)
    before = [ops.convert_to_numpy(v).copy() for v in model.variables]
    found = scale_invariant_weights(model, verify=x)
    for f in found:
        if f.decided:
            gap, limit = measure(model, [f], x)
            assert (gap <= limit) == f.invariant, (f.name, f.reason, gap, limit)
        assert f.reason
    for a, b in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(a, ops.convert_to_numpy(b))
    return {f.name: f for f in found}


@pytest.mark.parametrize(
    "name", ZOO if not JAX else [n for n in ZOO if n != "time_distributed"]
)
def test_zoo(name):
    judged(ZOO[name]())


@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")
@pytest.mark.parametrize(
    "name",
    [sometimes((n,), n.startswith("k215_")) for n in sorted(files()) or ["none"]],
)
def test_published(name, shared):
    model = kerasnorm.load(files()[name], compile=False)
    found = scale_invariant_weights(model)
    if found.invariant:
        x = rewriters.random_inputs(model, samples=4)
        gap, limit = measure(model, found.invariant, x)
        assert gap <= limit


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.ci if n in SMALL[-4:] else pytest.mark.slow)
        for n in ALL
    ],
)
def test_applications(name):
    model = make(name)
    found = scale_invariant_weights(model)
    assert all(f.decided for f in found), [f.reason for f in found if not f.decided]
    if found.invariant:
        x = rewriters.random_inputs(model, samples=4)
        gap, limit = measure(model, found.invariant, x)
        assert gap <= limit


def test_granularity_follows_the_normalization():
    expected = {
        layers.BatchNormalization(): "filter",
        layers.GroupNormalization(4): "group",
        layers.GroupNormalization(1): "layer",
        layers.GroupNormalization(-1): "filter",
        layers.LayerNormalization(): "layer",
        layers.UnitNormalization(): "layer",
        kerasnorm.methods()["instance"].layer(): "filter",
    }
    for norm, granularity in expected.items():
        model = functional(images(), lambda x: norm(layers.Conv2D(8, 3, name="c")(x)))  # noqa: B023
        flow = judged(model)["c/kernel"]
        assert flow.granularity == granularity
        # A bias cancels only where each channel is centred by itself.
        assert flow.joint == (granularity != "filter")
        assert flow.through == (norm.name,)


def test_every_kind_of_kernel():
    cases = [
        (layers.Dense(6), (5, 4), "filter"),
        (layers.EinsumDense("abc,cde->abde", (5, 2, 3), bias_axes="de"), (5, 4), None),
        (layers.Conv1D(6, 2, groups=2), (5, 4), "filter"),
        (layers.Conv3D(6, 2), (4, 4, 4, 2), "filter"),
        (layers.Conv2DTranspose(6, 2), (4, 4, 2), "filter"),
        (layers.DepthwiseConv2D(2, depth_multiplier=3), (4, 4, 2), "filter"),
        (layers.SeparableConv2D(6, 2), (4, 4, 2), "filter"),
    ]
    for layer, shape, granularity in cases:
        model = functional(
            keras.Input(shape),
            lambda x: layers.BatchNormalization()(layer(x)),  # noqa: B023
        )
        found = judged(model)
        main = found[
            f"{layer.name}/{'pointwise_' * ('Sep' in type(layer).__name__)}kernel"
        ]
        if granularity is None:  # statistics per last axis tie the other one
            assert main.granularity == "group"
            assert main.units == (0, 1, 2) * 2
        else:
            assert main.granularity == granularity
        if len(found) > 1:
            assert found[f"{layer.name}/depthwise_kernel"].granularity == "layer"


def test_embedding_and_positions():
    tokens = keras.Input((5,), dtype="int32")
    embed = layers.Embedding(9, 4, name="embed")
    model = functional(tokens, lambda t: layers.LayerNormalization()(embed(t)))
    assert judged(model)["embed/embeddings"].granularity == "layer"

    class Positions(layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(1, *shape[1:]))

        def call(self, x):
            return x + self.table

    model = functional(
        tokens, lambda t: layers.LayerNormalization()(Positions()(embed(t)))
    )
    assert not judged(model)["embed/embeddings"].invariant


def test_paths_out_of_a_kernel():
    def conv(x, name, **kwargs):
        return layers.Conv2D(4, 3, padding="same", name=name, **kwargs)(x)

    def norm(x):
        return layers.BatchNormalization()(x)

    def net(x):
        # Both branches of the sum are normalized; the raw one is not.
        a = norm(conv(x, "a"))
        b = layers.Add()([a, norm(conv(layers.ReLU()(a), "b"))])
        # Through activations, pooling, dropout and a linear layer with a bias.
        c = layers.MaxPooling2D()(layers.LeakyReLU()(conv(b, "c")))
        c = norm(conv(layers.SpatialDropout2D(0.2)(c), "d"))
        # Concatenated with others, before one normalization of all.
        e = layers.Concatenate()([conv(c, "e"), c])
        e = layers.ReLU()(norm(e))
        # A sum with itself, pooled otherwise; and with something else.
        f = conv(e, "f", use_bias=False)
        f = norm(layers.Subtract()([f, layers.ReLU()(f)]))
        h = norm(layers.Add()([conv(f, "h"), f]))
        # Bounds, saturation, multiplication by a gate of itself.
        i = norm(layers.ReLU(6.0)(conv(h, "i")))
        j = norm(layers.Activation("sigmoid")(conv(i, "j")))
        k = conv(j, "k", use_bias=False)
        k = norm(layers.Multiply()([k, k]))
        flat = layers.Flatten()(layers.AveragePooling2D(2)(conv(k, "l")))
        return norm(layers.Dense(3, name="m")(flat))

    found = judged(functional(images(), net))
    granularity = {n.split("/")[0]: f.granularity for n, f in found.items()}
    assert granularity == {
        **dict.fromkeys("abdefm", "filter"),
        "c": "layer",
        "h": None,
        "i": None,
        "j": None,
        "k": "filter",
        "l": "layer",
    }
    assert found["c/kernel"].joint
    assert not found["d/kernel"].joint


def test_a_frozen_normalization_is_a_line():
    def net(x):
        x = layers.BatchNormalization(trainable=False, name="frozen")(
            layers.Dense(6, name="a")(x)
        )
        return layers.BatchNormalization(name="live")(layers.Dense(4, name="b")(x))

    found = judged(functional(keras.Input((5,)), net))
    assert found["a/kernel"].granularity == "layer"
    assert found["a/kernel"].through == ("live",)


def test_attention_is_followed_inside():
    def net(x):
        x = layers.MultiHeadAttention(2, 4, name="mha")(x, x)
        return layers.LayerNormalization()(x)

    found = judged(functional(keras.Input((5, 6)), net))
    kinds = {n.split("/")[-2].strip("_"): f for n, f in found.items()}
    assert kinds["output_dense"].granularity == "layer"
    assert kinds["value_dense"].granularity is None  # the output's bias remains
    assert not kinds["query_dense"].invariant
    assert not kinds["key_dense"].invariant


def test_custom_layers_are_followed_and_left_alone():
    block = Block(8, name="block")
    model = functional(keras.Input((6,)), block)
    nodes = [len(x._inbound_nodes) for x in model._flatten_layers()]
    assert judged(model)["block/dense/kernel"].granularity == "filter"
    assert nodes == [len(x._inbound_nodes) for x in model._flatten_layers()]


def test_what_cannot_be_followed_is_said():
    class Opaque(layers.Layer):
        def call(self, x):
            return ops.convert_to_tensor(np.asarray(x)) if 0 else _hidden(x)

    def _hidden(x):
        return ops.convert_to_numpy(x) if isinstance(x, float) else ops.erf(x)

    model = functional(
        keras.Input((6,)),
        lambda x: layers.BatchNormalization()(Opaque(name="o")(layers.Dense(4)(x))),
    )
    flow = next(iter(verdicts(model).values()))
    assert not flow.invariant
    assert not flow.decided
    assert "o" in flow.reason


def test_reparametrized_kernels():
    model = functional(
        keras.Input((6,)),
        lambda x: layers.Dense(2, name="out")(
            kerasnorm.weights.WeightNormalization(layers.Dense(4, name="d"))(x)
        ),
    )
    found = judged(model)
    inner = next(f for f in found.values() if f.path != "out")
    assert inner.granularity == "filter"


def test_shared_layers_and_the_layer_in_front_of_itself():
    dense = layers.Dense(6, name="d", use_bias=False)
    model = functional(
        keras.Input((6,)),
        lambda x: layers.LayerNormalization()(dense(layers.ReLU()(dense(x)))),
    )
    assert judged(model)["d/kernel"].granularity == "layer"


def test_a_lie_is_found_out(monkeypatch):
    model = ZOO["plain_functional"]()
    x = rewriters.random_inputs(model)
    found = scale_invariant_weights(model, verify=x)
    assert found.difference < 1e-4
    assert "conv0/kernel" in str(found)
    with pytest.raises(KerasNormError, match="no such weight"):
        found["conv9"]

    def affine(self, x, training=None, mask=None):
        return x * self.gamma + self.beta

    monkeypatch.setattr(layers.BatchNormalization, "call", affine)
    with pytest.raises(KerasNormError, match="that should be scale invariant are not"):
        scale_invariant_weights(model, verify=x)


class Tied(layers.Layer):
    """Reads the kernel of another layer."""

    def __init__(self, other, **kwargs):
        super().__init__(**kwargs)
        self.other = other

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.other.kernel))


@pytest.mark.parametrize("how", ["layer", "operation", "subclass"])
def test_a_kernel_that_is_read_elsewhere_too_is_undecided(how):
    """Its scale has a second way to the output."""
    dense = layers.Dense(4, use_bias=False, name="coder")
    norm = layers.LayerNormalization()
    inputs = keras.Input((6,))
    if how == "layer":
        model = keras.Model(inputs, Tied(dense)(norm(dense(inputs))))
    elif how == "operation":
        h = norm(dense(inputs))
        model = keras.Model(inputs, ops.einsum("bi,ji->bj", h, dense.kernel))
    else:

        class Coder(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense, self.norm = dense, norm

            def call(self, x):
                h = self.norm(self.dense(x))
                return ops.matmul(h, ops.transpose(self.dense.kernel))

        model = Coder()
        model(np.ones((2, 6), "float32"))
    found = scale_invariant_weights(model)
    assert not found.invariant
    (flow,) = (f for f in found if f.kernel.variable is dense.kernel)
    assert not flow.decided and "outside its layer" in flow.reason
