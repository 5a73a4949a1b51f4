"""Weight methods around every kind of layer, as targets of `rewrite`, and `export`."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers, ops

import kerasnorm
import rewriters
from kerasnorm.kernels.kernel import kernels_of
from kerasnorm.kernels.reparametrized import Reparametrized
from kerasnorm.method.registry import Fidelity, methods
from kerasnorm.numerics import backend


WRAPPERS = {
    m.name: m.layer
    for m in methods().values()
    if m.layer is not None and issubclass(m.layer, Reparametrized)
}
ANY = sorted(n for n in WRAPPERS if n not in ("cosine", "analytic"))

# Shape of the input without the batch, and a function that makes the layer.
LAYERS = {
    "dense": ((6,), lambda: layers.Dense(4, activation="tanh")),
    "einsum": ((5, 6), lambda: layers.EinsumDense("abc,cde->abde", (5, 2, 4))),
    "conv1d": ((9, 6), lambda: layers.Conv1D(4, 3, padding="causal")),
    "conv2d": ((7, 8, 6), lambda: layers.Conv2D(4, 3, groups=2, strides=2)),
    "conv3d": ((4, 5, 4, 6), lambda: layers.Conv3D(4, 2)),
    "transposed1d": ((5, 6), lambda: layers.Conv1DTranspose(4, 3)),
    "transposed2d": ((5, 4, 6), lambda: layers.Conv2DTranspose(4, 3, strides=2)),
    "transposed3d": ((3, 3, 3, 4), lambda: layers.Conv3DTranspose(4, 2)),
    "depthwise1d": ((9, 6), lambda: layers.DepthwiseConv1D(3)),
    "depthwise2d": ((7, 8, 6), lambda: layers.DepthwiseConv2D(3, depth_multiplier=2)),
    "separable1d": ((9, 6), lambda: layers.SeparableConv1D(4, 3)),
    "separable2d": ((7, 8, 6), lambda: layers.SeparableConv2D(4, 3)),
    "embedding": ((5,), lambda: layers.Embedding(11, 6, mask_zero=True)),
    "simple": ((5, 6), lambda: layers.SimpleRNN(4)),
    "lstm": ((5, 6), lambda: layers.LSTM(4, return_sequences=True, dropout=0.5)),
    "gru": ((5, 6), lambda: layers.GRU(4)),
    "bidirectional": ((5, 6), lambda: layers.Bidirectional(layers.GRU(4))),
    "time": ((3, 6), lambda: layers.TimeDistributed(layers.Dense(4))),
    "convlstm": ((3, 6, 6, 3), lambda: layers.ConvLSTM2D(4, 3)),
    "stacked": (
        (5, 6),
        lambda: layers.RNN([layers.LSTMCell(4, name="a"), layers.GRUCell(3, name="b")]),
    ),
}


def made(kind, method, **policy):
    shape, make = LAYERS[kind]
    rng = np.random.default_rng(0)
    if kind == "embedding":
        x, inputs = rng.integers(0, 11, (2, *shape)), keras.Input(shape, dtype="int32")
    else:
        x, inputs = rng.normal(size=(2, *shape)).astype("float32"), keras.Input(shape)
    layer = make()
    layer = type(layer).from_config({**layer.get_config(), **policy})
    wrapper = WRAPPERS[method](layer, **policy)
    return keras.Model(inputs, wrapper(inputs)), wrapper, x


@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_every_layer_runs_with_the_kernel_in_use(kind, tmp_path):
    """Forward as the plain layer with the folded kernel; saved and loaded."""
    for method in ("weight", "spectral", "weight_standardization"):
        model, wrapper, x = made(kind, method)
        y = ops.convert_to_numpy(model(x))
        plain = wrapper.unwrap()
        for kernel, folded in zip(wrapper.kernels, kernels_of(plain), strict=True):
            w = ops.convert_to_numpy(wrapper.weight(kernel))
            np.testing.assert_array_equal(w, ops.convert_to_numpy(folded.variable))
        np.testing.assert_allclose(ops.convert_to_numpy(plain(x)), y, atol=1e-5)
        exported = kerasnorm.export(model)
        assert type(exported.layers[-1]) is type(plain)
        np.testing.assert_allclose(ops.convert_to_numpy(exported(x)), y, atol=1e-5)
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(ops.convert_to_numpy(again(x)), y)


@pytest.mark.parametrize(
    "kind", ["dense", "conv2d", "transposed2d", "depthwise2d", "lstm", "gru"]
)
def test_gradients_reach_all_parameters(kind):
    """Against difference quotients of the loss in float64, for every method."""
    for method in ANY:
        with backend.double_precision():
            _, wrapper, x = made(kind, method, dtype="float64")
            others = [v.value for v in wrapper.non_trainable_variables]
            x = ops.convert_to_tensor(x, "float64")
            rng = np.random.default_rng(1)

            def loss(*values, wrapper=wrapper, others=others, x=x):
                y, _ = wrapper.stateless_call(list(values), others, x, training=False)
                return ops.sum(ops.square(y))

            start = [ops.convert_to_numpy(v) for v in wrapper.trainable_variables]
            _, found = backend.vjp(loss, start)
            step = [1e-6 * rng.normal(size=v.shape) for v in start]
            ends = [
                float(loss(*(v + s * d for v, d in zip(start, step, strict=True))))
                for s in (1, -1)
            ]
            numeric = (ends[0] - ends[1]) / 2
            analytic = sum(
                float(np.vdot(ops.convert_to_numpy(g), d))
                for g, d in zip(found, step, strict=True)
            )
            # 1e-16 of the loss is left by rounding, 1e-12 by truncation.
            assert abs(numeric - analytic) <= 1e-5 * abs(numeric) + 1e-11, method


@pytest.mark.parametrize("kind", ["dense", "conv2d", "lstm", "embedding"])
@pytest.mark.parametrize("jit", [False, True])
def test_trains_plain_and_under_xla(kind, jit):
    model, wrapper, x = made(kind, "weight")
    seeds = [np.array(v) for v in wrapper.layer.non_trainable_variables]
    before = [np.array(v) for v in wrapper.trainable_variables]
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
    model.fit(x, np.ones(model(x).shape), verbose=0)
    for old, new in zip(before, wrapper.trainable_variables, strict=True):
        assert np.abs(old - np.array(new)).max() > 0, new.path
    after = [np.array(v) for v in wrapper.layer.non_trainable_variables]
    for old, new in zip(seeds, after, strict=True):
        assert np.any(old != new), "the same dropout in every step"


@pytest.mark.parametrize("method", sorted(WRAPPERS))
def test_mixed_precision_keeps_float32_kernels(method):
    x = np.random.default_rng(0).normal(size=(2, 7, 8, 6)).astype("float16")
    conv = layers.Conv2D(4, 3, dtype="mixed_float16")
    wrapper = WRAPPERS[method](conv, dtype="mixed_float16")
    y = wrapper(x)
    assert keras.backend.standardize_dtype(y.dtype) == "float16"
    assert np.isfinite(ops.convert_to_numpy(ops.cast(y, "float32"))).all()
    for v in (wrapper.weight(), *wrapper.trainable_variables):
        assert keras.backend.standardize_dtype(v.dtype) == "float32"


@pytest.mark.parametrize("method", sorted(WRAPPERS))
def test_build_changes_no_argument(method):
    wrapper = WRAPPERS[method](layers.Dense(4))

    def arguments():
        config = wrapper.get_config()
        config["layer"].pop("build_config", None)
        return config

    before = arguments()
    wrapper.build((None, 6))
    assert arguments() == before


def test_attention():
    rng = np.random.default_rng(0)
    x = list(rng.normal(size=(2, 2, 5, 6)).astype("float32"))
    inputs = [keras.Input((5, 6)), keras.Input((5, 6))]
    plain = keras.Model(inputs, layers.MultiHeadAttention(2, 3, dropout=0.2)(*inputs))
    for method in ("wn", "sn"):
        new, report = kerasnorm.rewrite(plain, weights=method, return_report=True)
        assert [s.source for s in report.plan.steps] == ["MultiHeadAttention"]
        assert len(new.layers[-1].kernels) == 4
        assert rewriters.compare(plain, new, x).relative < 1e-5
        exported = kerasnorm.export(new)
        assert type(exported.layers[-1]) is layers.MultiHeadAttention
        assert rewriters.compare(plain, exported, x).relative < 1e-5


def test_activity_regularizers_are_heard():
    dense = layers.Dense(3, activity_regularizer=keras.regularizers.L2(1.0))
    wrapper = WRAPPERS["weight"](dense)
    y = wrapper(np.ones((2, 4), "float32"))
    expected = float(ops.sum(ops.square(y))) / 2
    assert float(sum(wrapper.losses)) == pytest.approx(expected, rel=1e-5)


def small():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, name="conv")(inputs)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.Flatten()(layers.ReLU()(x))
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    rng = np.random.default_rng(0)
    for v in model.variables:
        v.assign(rng.uniform(0.5, 1.5, v.shape))
    return model


@pytest.mark.parametrize("name", ["wn", "sn", "ngpt", "avp"])
def test_a_fold_is_exact_where_the_kernel_keeps_its_form(name):
    model = small()
    new, report = kerasnorm.rewrite(model, name, return_report=True)
    assert report.plan.fidelity is Fidelity.AT_INFERENCE
    assert report.comparison.relative < 1e-5
    back = kerasnorm.export(new)
    assert type(back.get_layer("conv")) is layers.Conv2D
    assert rewriters.compare(model, back).relative < 1e-5


@pytest.mark.parametrize("name", ["cwn", "ws", "sws"])
def test_centring_is_exact_for_centred_filters_alone(name):
    model = small()
    refused = kerasnorm.plan(model, name).refused
    assert [r.reason.name for r in refused] == ["NOT_EXACT"]
    assert kerasnorm.plan(model, name, force=True).fidelity is Fidelity.FRESH
    kernel = model.get_layer("conv").kernel
    w = np.array(kernel)
    kernel.assign(w - w.mean((0, 1, 2)))
    _, report = kerasnorm.rewrite(model, name, return_report=True)
    assert report.plan.fidelity is Fidelity.AT_INFERENCE
    assert report.comparison.relative < 1e-4


def test_norms_and_kernels_in_one_rewrite():
    new, report = kerasnorm.rewrite(
        small(), "gn", weights="ws", groups=2, return_report=True
    )
    assert report.plan.weights == "weight_standardization"
    assert [s.path for s in report.plan.steps] == ["bn", "conv", "head"]
    assert kerasnorm.Plan.from_json(report.plan.to_json()) == report.plan
    assert isinstance(new.get_layer("conv"), WRAPPERS["weight_standardization"])
    with pytest.raises(kerasnorm.KerasNormError, match="no method for kernels"):
        kerasnorm.plan(small(), weights="gn")
    with pytest.raises(kerasnorm.KerasNormError, match="nothing to rewrite to"):
        kerasnorm.plan(small())


@pytest.mark.parametrize("name", ["gn", "ln", "in", "renorm", "l1"])
def test_export_finds_keras_layers_that_compute_the_same(name):
    new = kerasnorm.rewrite(small(), name, layers="kerasnorm")
    assert type(new.get_layer("bn")).__module__.startswith("kerasnorm.")
    back = kerasnorm.export(new)
    assert type(back.get_layer("bn")).__module__.startswith("keras.")
    assert rewriters.compare(new, back).relative < 1e-5


def test_export_leaves_what_keras_has_not(tmp_path):
    new = kerasnorm.rewrite(small(), "frn")
    back = kerasnorm.export(new, out=tmp_path / "out.keras")
    assert type(back.get_layer("bn")) is type(new.get_layer("bn"))
    assert (tmp_path / "out.keras").exists()


def test_spectral_agrees_with_keras():
    """Once both have settled: Keras's own writes into the kernel, ours does not."""
    x = np.random.default_rng(0).normal(size=(2, 6)).astype("float32")
    stock = layers.SpectralNormalization(layers.Dense(4))
    ours = WRAPPERS["spectral"](layers.Dense(4))
    stock.build((None, 6))
    ours.build((None, 6))
    plain = np.array(stock.layer.kernel)
    ours.v.assign(plain)
    for _ in range(60):
        y = ours(x, training=True)
        stock.layer.kernel.assign(plain)
        z = stock(x, training=True)
    np.testing.assert_array_equal(np.array(ours.v), plain)
    np.testing.assert_allclose(np.array(y), np.array(z), atol=1e-4)


@pytest.mark.parametrize("kind", ["weight", "spectral"])
def test_tensorflow_addons_golden_outputs(shared, kind):
    folder = shared / "models" / "generated" / f"tfa_{kind}_normalization"
    golden = np.load(folder / "golden.npz")
    model = kerasnorm.load(folder / "model.h5")
    for found in (model, kerasnorm.export(model)):
        y = ops.convert_to_numpy(found(golden["x0"], training=False))
        np.testing.assert_allclose(y, golden["y0"], atol=1e-4)


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have")
@pytest.mark.parametrize("name", ["weight", "spectral"])
def test_computed_kernels_are_not_quantized(name):
    inputs = keras.Input((8,))
    wrapped = WRAPPERS[name](layers.Dense(6))
    model = keras.Model(inputs, layers.Dense(4)(wrapped(inputs)))
    x = np.random.default_rng(0).normal(size=(5, 8)).astype("float32")
    before = model.predict(x, verbose=0)
    with pytest.warns(UserWarning, match=r"once kerasnorm.export\(model\) has"):
        model.quantize("int8")
    np.testing.assert_allclose(model.predict(x, verbose=0), before, atol=0.1)
    with pytest.raises(NotImplementedError, match="quantized or adapted"):
        wrapped.layer.enable_lora(2)
    plain = kerasnorm.export(keras.Sequential([inputs, wrapped]))
    plain.layers[-1].quantize("int8")


def test_frozen_spectral_normalization_keeps_its_state():
    layer = WRAPPERS["spectral"](layers.Dense(4))
    layer.build((None, 6))
    layer.trainable = False
    before = [ops.convert_to_numpy(v) for v in layer.non_trainable_variables]
    x = np.ones((3, 6), "float32")
    y = layer(x, training=True)
    np.testing.assert_array_equal(y, layer(x, training=False))
    for v, was in zip(layer.non_trainable_variables, before, strict=True):
        np.testing.assert_array_equal(v, was)
