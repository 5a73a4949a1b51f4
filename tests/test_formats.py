"""Loading what every generation of Keras saved, compared with what it computed."""

import json
import shutil
import warnings
import zipfile

import h5py
import keras
import numpy as np
import pytest
from conftest import SHARED, sometimes
from keras import layers, ops
from keras_2 import save_as_keras_2_13

import kerasnorm.rewriting.addons  # noqa: F401 (registers converters)
from rewriters import RewriteError, edit
from rewriters.formats import load
from rewriters.formats.layers import StdInstanceNormalization, hard_sigmoid_2


pytestmark = [
    # Keras 2 warns of its own formats, and TensorFlow of what it will drop.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file"),
    pytest.mark.filterwarnings("ignore:.*does not support masking"),
    pytest.mark.filterwarnings("ignore:.*was passed an input with a mask"),
    pytest.mark.filterwarnings("ignore:The model is compiled without"),
    pytest.mark.filterwarnings("ignore:Training differs"),
    pytest.mark.filterwarnings("ignore:.*unclosed.*:ResourceWarning"),
]


def outputs(model, inputs):
    inputs = inputs if isinstance(inputs, dict) or len(inputs) > 1 else inputs[0]
    return [np.array(y) for y in keras.tree.flatten(model(inputs, training=False))]


def check(found, wanted, tolerance=1e-4):
    assert len(found) == len(wanted)
    for i, (y, golden) in enumerate(zip(found, wanted, strict=True)):
        assert y.shape == golden.shape
        y, golden = y.astype("float64"), golden.astype("float64")
        scale = max(1.0, float(np.max(np.abs(golden), initial=0.0)))
        assert np.max(np.abs(y - golden), initial=0.0) <= tolerance * scale, i


def resaved(model, folder):
    model.save(folder / "again.keras")
    return keras.saving.load_model(folder / "again.keras")


# Published and generated models

SPECIAL = {
    "mmsplice_exon": ["GlobalAveragePooling1D_Mask0"],
    "mtsplice0": ["SplineWeight1D"],
    "mltk_kws_tenet_alexa": ["MultiScaleTemporalConvolution"],
    "mltk_fingerprint_siamese": ['lambdas={"lambda": function}'],
    "dtln_savedmodel_instantln": ["InstantLayerNormalization", "lambda, lambda_1"],
}


def saved_models():
    found = []
    for folder in sorted(SHARED.glob("models/*/*")):
        for path in sorted(folder.iterdir()):
            if path.suffix != ".npz":
                found.append(str(path.relative_to(SHARED / "models")))
    return found


def golden(folder):
    with np.load(folder / "golden.npz") as data:
        names = sorted(data.files, key=lambda n: int(n[1:]))
        return [[data[n] for n in names if n[0] == kind] for kind in "xy"]


@pytest.mark.parametrize(
    "name",
    [
        sometimes((n,), n.startswith(("generated/k215_conv", "generated/tfa_group")))
        for n in saved_models() or ["no/models"]
        if n.split("/")[1] not in SPECIAL
    ],
)
def test_a_saved_model_computes_what_it_did(name, shared, tmp_path):
    path = shared / "models" / name
    inputs, wanted = golden(path.parent)
    model = load(path)
    tolerance = 1e-2 if "mixed_float16" in name else 1e-4
    check(outputs(model, inputs), wanted, tolerance)
    check(outputs(resaved(model, tmp_path), inputs), wanted, tolerance)


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_missing_is_named(name, shared):
    folder = shared / "models/published" / name
    path = next(p for p in folder.iterdir() if p.suffix != ".npz")
    with pytest.raises(RewriteError) as error:
        load(path)
    assert str(path) in str(error.value)
    for part in SPECIAL[name]:
        assert part in str(error.value)
    if name == "mltk_fingerprint_siamese":  # another Python's byte code
        model = load(path, lambdas={"lambda": distance})
        assert model.get_layer("lambda")


def distance(pair):
    square = ops.sum(ops.square(pair[0] - pair[1]), axis=1, keepdims=True)
    return ops.sqrt(square + 1e-7)


class InstantLayerNormalization(layers.Layer):
    def build(self, shape):
        self.gamma = self.add_weight(name="gamma", shape=shape[-1:])
        self.beta = self.add_weight(name="beta", shape=shape[-1:])

    def call(self, x):
        mean = ops.mean(x, axis=-1, keepdims=True)
        variance = ops.mean(ops.square(x - mean), axis=-1, keepdims=True)
        return (x - mean) / ops.sqrt(variance + 1e-7) * self.gamma + self.beta


def spectrum(x):
    real, imaginary = ops.rfft(ops.expand_dims(x, 1))
    magnitude = ops.sqrt(ops.square(real) + ops.square(imaginary))
    return [magnitude, ops.arctan2(imaginary, real)]


def signal(x):
    return ops.irfft((x[0] * ops.cos(x[1]), x[0] * ops.sin(x[1])))


def test_dtln_loads_when_its_classes_are_given(shared):
    folder = shared / "models/published/dtln_savedmodel_instantln"
    model = load(
        folder / "DTLN_norm_40h_saved_model",
        custom_objects={"InstantLayerNormalization": InstantLayerNormalization},
        lambdas={"lambda": spectrum, "lambda_1": signal},
    )
    (x,), wanted = golden(folder)
    # The model takes one frame at a time. Its golden output was computed on four at
    # once, of which the recurrent layers of that runtime saw the first alone.
    check(outputs(model, [x[:1]]), [wanted[0][:1]])


# Keras 2, written here by tf_keras

REFERENCES = {}


def reference(function):
    """Registers a function that makes a model with tf_keras, and TensorFlow's ops."""
    REFERENCES[function.__name__] = function
    return function


@reference
def activations(k, tf):
    inputs = x = k.Input((6,))
    for name in "relu elu selu softplus softsign tanh sigmoid hard_sigmoid".split():
        x = k.layers.Dense(6, activation=name)(x)
    three = [k.layers.Activation(a)(x * 3) for a in ("hard_sigmoid", "gelu", "swish")]
    return k.Model(inputs, [*three, k.layers.Activation(tf.nn.relu6)(x)])


@reference
def activation_layers(k, tf):
    inputs = k.Input((4, 4, 3))
    made = [
        k.layers.LeakyReLU(0.1), k.layers.LeakyReLU(), k.layers.PReLU(),
        k.layers.PReLU(shared_axes=[1, 2]), k.layers.ELU(0.7),
        k.layers.ThresholdedReLU(0.3), k.layers.ReLU(6.0), k.layers.Softmax(axis=1),
        k.layers.ReLU(max_value=2.0, negative_slope=0.1, threshold=0.2),
    ]  # fmt: skip
    return k.Model(inputs, [layer(inputs) for layer in made])


@reference
def images(k, tf):
    inputs, made = k.Input((12, 12, 4)), k.layers
    return k.Model(
        inputs,
        [
            layer(inputs)
            for layer in (
                made.Conv2D(4, 3, strides=2, padding="same"),
                made.Conv2D(4, (3, 2), dilation_rate=2), made.Conv2D(4, 3, groups=2),
                made.DepthwiseConv2D(3, depth_multiplier=2, strides=2, padding="same"),
                made.SeparableConv2D(5, 3, depth_multiplier=2),
                made.Conv2DTranspose(3, 3, strides=2, padding="same"),
                made.Conv2DTranspose(3, 3, strides=2, output_padding=1),
                made.MaxPooling2D(), made.AveragePooling2D(3, 2, padding="same"),
                made.GlobalMaxPooling2D(), made.GlobalAveragePooling2D(keepdims=True),
                made.UpSampling2D(2),
                made.UpSampling2D((2, 3), interpolation="bilinear"),
                made.ZeroPadding2D(((1, 2), (0, 3))), made.Cropping2D(((1, 2), (0, 3))),
                made.Flatten(), made.Reshape((-1, 8)), made.Permute((3, 1, 2)),
                made.SpatialDropout2D(0.3), made.GaussianNoise(0.1),
                made.AlphaDropout(0.1), made.ActivityRegularization(l2=0.1),
            )
        ],
    )  # fmt: skip


@reference
def sequences(k, tf):
    inputs, made = k.Input((12, 4)), k.layers
    return k.Model(
        inputs,
        [
            layer(inputs)
            for layer in (
                made.Conv1D(4, 3, padding="causal", dilation_rate=2),
                made.SeparableConv1D(5, 3, depth_multiplier=2, padding="same"),
                made.DepthwiseConv1D(3), made.Conv1DTranspose(3, 3, strides=2),
                made.MaxPooling1D(3, strides=1, padding="same"),
                made.GlobalAveragePooling1D(), made.UpSampling1D(3),
                made.ZeroPadding1D(2), made.Cropping1D((1, 2)),
            )
        ],
    )  # fmt: skip


@reference
def recurrent(k, tf):
    inputs, made = k.Input((7, 5)), k.layers
    return k.Model(
        inputs,
        [
            layer(inputs)
            for layer in (
                made.LSTM(4, go_backwards=True, recurrent_activation="hard_sigmoid"),
                made.GRU(4), made.GRU(4, reset_after=False, return_sequences=True),
                made.SimpleRNN(3, activation="relu"), made.Bidirectional(made.LSTM(3)),
                made.Bidirectional(made.GRU(3), merge_mode="sum"),
                made.Bidirectional(
                    made.LSTM(3), backward_layer=made.GRU(3, go_backwards=True)
                ),
                made.RNN([made.LSTMCell(3), made.GRUCell(4)]),
                made.RNN(made.GRUCell(3)),
                made.LSTM(4, use_bias=False), made.TimeDistributed(made.Dense(3)),
            )
        ],
    )  # fmt: skip


@reference
def states(k, tf):
    first, second = k.Input((7, 5)), k.Input((6, 5))
    _, h, c = k.layers.LSTM(4, return_state=True)(first)
    decoded = k.layers.LSTM(4, return_sequences=True)(second, initial_state=[h, c])
    both = k.layers.Bidirectional(k.layers.LSTM(4, return_state=True))(first)
    then = k.layers.Bidirectional(k.layers.LSTM(4))(second, initial_state=both[1:])
    return k.Model([first, second], [decoded, k.layers.GRU(4)(second, h), *both, then])


@reference
def convolutional_recurrent(k, tf):
    inputs = k.Input((5, 6, 6, 2))
    x = k.layers.ConvLSTM2D(3, 3, padding="same", return_sequences=True)(inputs)
    inner = k.Input((6, 6, 3))
    y = k.layers.BatchNormalization()(k.layers.Conv2D(2, 3)(inner))
    model = k.Model(inner, k.layers.Flatten()(y), name="frame")
    return k.Model(inputs, k.layers.LSTM(3)(k.layers.TimeDistributed(model)(x)))


@reference
def masks(k, tf):
    words, steps = k.Input((7,)), k.Input((7, 3))
    embedded = k.layers.Embedding(20, 6, mask_zero=True)(words)
    return k.Model(
        [words, steps],
        [
            k.layers.Bidirectional(k.layers.GRU(3))(embedded),
            k.layers.GlobalAveragePooling1D()(embedded),
            k.layers.LSTM(3)(k.layers.Masking(0.0)(steps)),
        ],
    )


@reference
def merges(k, tf):
    pair, made = [k.Input((4, 3)), k.Input((4, 3))], k.layers
    merged = (
        made.Add(), made.Subtract(), made.Multiply(), made.Average(), made.Maximum(),
        made.Minimum(), made.Concatenate(axis=1), made.Dot(axes=2),
        made.Dot(axes=(1, 1), normalize=True),
    )  # fmt: skip
    return k.Model(pair, [layer(pair) for layer in merged])


@reference
def norms(k, tf):
    inputs, made = k.Input((5, 6, 8)), k.layers
    layered = (
        made.BatchNormalization(axis=1, scale=False),
        made.BatchNormalization(center=False, epsilon=1e-5),
        made.LayerNormalization(axis=[1, 2, 3], epsilon=1e-6),
        made.LayerNormalization(axis=(2, 3)), made.GroupNormalization(4),
        made.GroupNormalization(-1, scale=False), made.UnitNormalization(axis=-1),
        made.experimental.SyncBatchNormalization(),
    )  # fmt: skip
    return k.Model(inputs, [layer(inputs) for layer in layered])


@reference
def attention(k, tf):
    query, value, made = k.Input((5, 8)), k.Input((6, 8)), k.layers
    return k.Model(
        [query, value],
        [
            made.MultiHeadAttention(2, 4, value_dim=5, output_shape=7)(query, value),
            made.MultiHeadAttention(2, 4)(query, query, use_causal_mask=True),
            made.Attention(use_scale=True)([query, value]),
            made.AdditiveAttention()([query, value, value]),
            made.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d")(query),
        ],
    )


@reference
def preprocessing(k, tf):
    inputs, made = k.Input((8, 8, 3)), k.layers
    adapted = made.Normalization()
    adapted.adapt(np.random.default_rng(0).normal(2, 3, (9, 8, 8, 3)))
    return k.Model(
        inputs,
        [
            adapted(inputs), made.Rescaling(1 / 255.0, offset=-1)(inputs),
            made.Normalization(mean=[1.0, 2, 3], variance=[1.0, 4, 9])(inputs),
            made.Resizing(4, 5)(inputs), made.CenterCrop(4, 4)(inputs),
            made.RandomCrop(4, 6)(inputs), made.RandomHeight(0.2)(inputs),
            made.RandomWidth(0.2)(inputs),
            made.RandomFlip()(inputs), made.RandomRotation(0.1)(inputs),
        ],
    )  # fmt: skip


@reference
def added_losses(k, tf):
    inputs = k.Input((4,))
    x = k.layers.Dense(3)(inputs)
    model = k.Model(inputs, k.layers.Dense(2, name="out")(x))
    model.add_loss(tf.reduce_mean(k.layers.Dense(2, name="aside")(x)))
    model.add_metric(tf.reduce_mean(x), name="mean")
    return model


@reference
def tensorflow_functions(k, tf):
    a, b = k.Input((4, 6)), k.Input((4, 6))
    # Names come out in Keras 2's spelling; each must keep its numbers.
    return k.Model(
        [a, b],
        [
            a + b, 2.0 - a, a / b, a**2.0, -a, abs(a), a @ tf.transpose(b, [0, 2, 1]),
            a[:, 0], a[:, 1:3, ::2], a[:, tf.newaxis], tf.reshape(a, [-1, 3, 8]),
            tf.concat([a, b], axis=-1), tf.stack([a, b], axis=1),
            tf.reduce_mean(a, axis=[1]), tf.reduce_sum(a, -1, keepdims=True),
            tf.math.reduce_max(a, axis=1), tf.nn.relu6(a), tf.nn.softmax(a, axis=1),
            tf.nn.leaky_relu(a), tf.nn.l2_normalize(a, axis=-1), tf.exp(a),
            tf.clip_by_value(a, -1.0, 1.0), tf.squeeze(tf.expand_dims(a, 1), axis=1),
            tf.where(a > 0, a, b), tf.maximum(a, 0.5), tf.tile(a, [1, 2, 1]),
            tf.pad(a, [[0, 0], [1, 1], [0, 2]]), tf.nn.gelu(a), tf.nn.silu(a),
            tf.math.reduce_std(a, axis=-1), tf.math.argmax(a, axis=-1),
            tf.gather(a, [0, 2], axis=1), a * tf.constant([1.0, 2, 3, 4, 5, 6]),
            *tf.split(a, 2, axis=1), *tf.split(a, [1, 3], axis=1),
            tf.unstack(a, axis=1)[0], tf.reverse(a, [1]), tf.stop_gradient(a),
            tf.matmul(a, b, transpose_b=True), tf.math.cumsum(a, axis=1),
            tf.identity(a), tf.math.reduce_logsumexp(a, 1), tf.repeat(a, 2, axis=1),
        ],
    )  # fmt: skip


@reference
def tensorflow_images(k, tf):
    x = k.Input((8, 8, 4))
    return k.Model(
        x,
        [
            tf.image.resize(x, (16, 12)), tf.image.resize(x, [4, 4], method="nearest"),
            tf.nn.depth_to_space(x, 2), tf.nn.max_pool2d(x, 2, 2, "SAME"),
            tf.nn.avg_pool2d(x, [1, 2, 2, 1], [1, 2, 2, 1], "VALID"),
        ],
    )  # fmt: skip


@reference
def nested(k, tf):
    made = k.layers
    a = k.Input((8,))
    x = made.BatchNormalization(name="bn0")(made.Dense(8, name="d0")(a))
    inner = k.Model(a, x, name="inner")
    inner.get_layer("d0").trainable = False
    b = k.Input((8,))
    x = made.Dense(8, name="d1", trainable=False)(inner(b))
    x = made.BatchNormalization(name="bn1", trainable=False)(inner(x))
    middle = k.Model(b, [x, made.Dense(3, name="d2")(x)], name="middle")
    stack = k.Sequential(
        [k.Input((8,)), made.Dense(8), k.Sequential([made.Dense(8), made.ReLU()])]
    )
    first, second = k.Input((8,)), k.Input((8,))
    p, q = middle(first)
    r, t = middle(second)
    return k.Model([first, second], [made.Add()([stack(p), stack(r)]), q, t])


@reference
def frozen(k, tf):
    a, made = k.Input((8,)), k.layers
    x = made.BatchNormalization()(made.Dense(8)(a))
    inner = k.Model(a, made.Dense(8)(x), name="inner")
    inner.trainable = False
    b = k.Input((8,))
    return k.Model(b, made.Dense(2)(inner(b, training=False)))


@reference
def shared_by_two_models(k, tf):
    shared = k.layers.Dense(4, name="shared")
    a, b, c = k.Input((4,)), k.Input((4,)), k.Input((4,))
    one = k.Model(a, shared(a), name="one")
    two = k.Model(b, k.layers.ReLU()(shared(b)), name="two")
    return k.Model(c, k.layers.Add()([one(c), two(c), shared(c)]))


@reference
def model_first(k, tf):
    a = k.Input((6, 6, 2))
    x = k.layers.BatchNormalization()(k.layers.Conv2D(3, 3)(a))
    base = k.Model(a, x, name="base")
    return k.Sequential([base, k.layers.Flatten(), k.layers.Dense(2)])


@reference
def built_late(k, tf):
    model = k.Sequential([k.layers.Dense(3), k.layers.BatchNormalization()])
    model.build((None, 5))
    return model


@reference
def dictionaries(k, tf):
    a, b = k.Input((3,), name="a"), k.Input((4,), name="b")
    x = k.layers.Concatenate()([a, b])
    y, z = k.layers.Dense(2, name="y")(x), k.layers.Dense(3, name="z")(x)
    return k.Model({"a": a, "b": b}, {"y": y, "z": z})


@reference
def slashes(k, tf):
    inputs = k.Input((3,))
    x = k.layers.Dense(2, name="block/dense")(inputs)
    return k.Model(inputs, k.layers.BatchNormalization(name="block/bn")(x))


@reference
def doubles(k, tf):
    inputs = k.Input((6,), dtype="float64")
    return k.Model(inputs, k.layers.Dense(3, dtype="float64")(inputs))


# Writing one takes seconds, with a recurrent layer a minute.
SAVED_MODELS = ("norms", "nested", "frozen", "preprocessing", "tensorflow_functions")


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Writes a reference once, in all formats: inputs, outputs, paths."""
    k = pytest.importorskip("tf_keras")
    import tensorflow as tf

    done = {}

    def get(name):
        if name not in done:
            rng = np.random.default_rng(0)
            k.backend.clear_session()
            model = REFERENCES[name](k, tf)
            for w in model.weights:
                if w.dtype.is_floating and w.name.split("/")[-1][:-2] not in (
                    "mean",
                    "variance",
                ):
                    value = rng.normal(size=w.shape) * 0.5
                    w.assign(np.abs(value) + 0.3 if "variance" in w.name else value)
            inputs = []
            for t in tf.nest.flatten(model.inputs):
                shape = (5, *(n or 7 for n in t.shape[1:]))
                words = any(isinstance(x, k.layers.Embedding) for x in model.layers)
                inputs.append(
                    rng.integers(0, 20, shape)
                    if words and len(shape) == 2
                    else rng.normal(size=shape).astype(t.dtype.as_numpy_dtype)
                )
            if isinstance(model.input, dict):
                inputs = dict(zip(sorted(model.input), inputs, strict=True))
            wanted = model(
                inputs if isinstance(inputs, dict) or len(inputs) > 1 else inputs[0],
                training=False,
            )
            folder = tmp_path_factory.mktemp(name)
            for suffix in (".h5", ".keras", *([""] if name in SAVED_MODELS else ())):
                model.save(folder / f"model{suffix}")
            save_as_keras_2_13(model, folder / "model.2.13.keras")
            flags = sorted(w.name.split(":")[0] for w in model.trainable_weights)
            wanted = [np.array(y) for y in tf.nest.flatten(wanted)]
            done[name] = inputs, wanted, folder, flags
        return done[name]

    return get


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        sometimes((n, s), n in ("activation_layers", "norms", "nested", "frozen"))
        for n in REFERENCES
        for s in (
            ".h5",
            ".keras",
            ".2.13.keras",
            *([""] if n in SAVED_MODELS else ()),
        )
    ],
)
def test_keras_2_computes_the_same(name, suffix, references, tmp_path):
    inputs, wanted, folder, flags = references(name)
    model = load(folder / f"model{suffix}")
    check(outputs(model, inputs), wanted)
    if name not in ("shared_by_two_models", "added_losses"):  # Keras 3 lacks these
        assert len(model.trainable_weights) == len(flags)
    again = resaved(model, tmp_path)
    check(outputs(again, inputs), wanted)
    names = [x.name for x in getattr(model, "operations", model.layers)]
    assert names == [x.name for x in getattr(again, "operations", again.layers)]


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="tensors of strings"
)
def test_an_archives_vocabularies_are_kept(tmp_path):
    k = pytest.importorskip("tf_keras")
    import tensorflow as tf

    words, numbers, made = k.Input((1,), dtype="string"), k.Input((1,)), k.layers
    text = made.TextVectorization(max_tokens=9, output_sequence_length=4)
    weighted = made.TextVectorization(
        max_tokens=9, output_mode="tf_idf", pad_to_max_tokens=True
    )
    look, count = made.StringLookup(output_mode="one_hot"), made.IntegerLookup()
    for layer in (text, weighted, look):
        layer.adapt(["a b", "b c b"])
    count.adapt([4, 4, 7])
    inner = k.Model(words, made.Dense(2)(look(words)))
    old = k.Model(
        [words, numbers], [inner(words), text(words), weighted(words), count(numbers)]
    )
    inputs = [tf.constant([["a b"], ["b x"]]), tf.constant([[7.0], [5.0]])]
    wanted = [np.array(y) for y in old(inputs)]
    for save in (k.Model.save, save_as_keras_2_13):
        save(old, tmp_path / "m.keras")
        check(outputs(load(tmp_path / "m.keras"), inputs), wanted)


def test_a_vocabulary_that_the_format_lacks_is_told(tmp_path):
    text = layers.TextVectorization(name="text")
    text.adapt(np.array(["a b"]))
    model = keras.Sequential([keras.Input((1,), dtype="string"), text])
    model.save(tmp_path / "m.h5")
    with pytest.warns(UserWarning, match="no vocabulary of text:"):
        load(tmp_path / "m.h5")


def test_parts_of_a_saved_model_that_are_missing(references, tmp_path):
    folder = shutil.copytree(references("nested")[2] / "model", tmp_path / "m")
    (folder / "variables/variables.index").write_bytes(b"version https://git-lfs...")
    with pytest.raises(RewriteError, match=r"pointer in variables\.index.*lfs pull"):
        load(folder)
    shutil.copytree(references("nested")[2] / "model", folder, dirs_exist_ok=True)
    (folder / "variables/.ipynb_checkpoints").mkdir()
    load(folder)
    (folder / "keras_metadata.pb").unlink()
    with pytest.raises(RewriteError, match=r"keras_metadata\.pb.* is missing"):
        load(folder)


def test_an_operation_keeps_its_layers_name(references):
    model = load(references("tensorflow_functions")[2] / "model.h5")
    assert "tf.math.reduce_std" in [x.name for x in model.operations]


def test_optimizer_and_its_state_survive(tmp_path):
    k = pytest.importorskip("tf_keras")
    old = k.Sequential([k.Input((3,)), k.layers.Dense(4), k.layers.Dense(2)])
    old.compile(k.optimizers.Adam(0.01, beta_1=0.8), "mse", metrics=["mae"])
    x, y = np.ones((4, 3), "float32"), np.ones((4, 2), "float32")
    old.fit(x, y, epochs=3, verbose=0)
    old.save(tmp_path / "m.h5")
    new = load(tmp_path / "m.h5")
    assert int(new.optimizer.iterations) == 3
    assert float(new.optimizer.beta_1) == pytest.approx(0.8)
    old.fit(x, y, epochs=2, verbose=0)
    new.fit(x, y, epochs=2, verbose=0)
    for a, b in zip(old.get_weights(), new.get_weights(), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)


def test_a_lost_loss_is_one_warning(tmp_path):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile("sgd", "mse")
    path = tmp_path / "m.h5"
    model.save(path)
    with h5py.File(path, "r+") as f:
        text = str(f.attrs["training_config"]).replace("mse", "my_loss")
        f.attrs.modify("training_config", text)
    with pytest.warns(UserWarning, match="without loss"):
        load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not load(path, compile=False).compiled


# Keras 3, both of its formats


@keras.saving.register_keras_serializable("test_formats")
class Doubled(layers.Layer):
    def __init__(self, inner=None, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner or layers.Dense(4)

    def call(self, x):
        return 2 * self.inner(x)

    def get_config(self):
        inner = keras.saving.serialize_keras_object(self.inner)
        return {**super().get_config(), "inner": inner}

    @classmethod
    def from_config(cls, config):
        inner = keras.saving.deserialize_keras_object(config.pop("inner"))
        return cls(inner=inner, **config)


def keras_3_models():
    image, steps, flat = keras.Input((8, 8, 3)), keras.Input((6, 4)), keras.Input((4,))
    trunk = keras.Sequential([layers.Dense(4), layers.BatchNormalization()], name="t")
    frozen = layers.BatchNormalization(trainable=False)
    half = layers.Conv2D(4, 3, dtype="mixed_float16")
    return {
        "convolutions": keras.Model(
            image,
            layers.Dense(2)(
                layers.Flatten()(frozen(layers.SeparableConv2D(4, 3)(half(image))))
            ),
        ),
        "recurrent": keras.Model(
            steps,
            [
                layers.Bidirectional(layers.GRU(3))(steps),
                layers.LSTM(3, recurrent_activation="hard_sigmoid")(steps),
                layers.TimeDistributed(layers.Dense(2))(steps),
                layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)])(steps),
            ],
        ),
        "attention": keras.Model(
            steps,
            layers.LayerNormalization()(
                steps + layers.MultiHeadAttention(2, 3)(steps, steps)
            ),
        ),
        "operations": keras.Model(
            flat, ops.concatenate([ops.relu(flat) * 2.0, flat[:, :1]], axis=-1)
        ),
        "shared": keras.Model(
            [flat, other := keras.Input((4,))], trunk(flat) - trunk(trunk(other))
        ),
        "nested end": keras.Model(
            (x := keras.Input((4,))),
            keras.Model(flat, layers.Dense(3)(flat), name="end")(x),
        ),
        "custom": keras.Sequential([keras.Input((4,)), Doubled(layers.Dense(3))]),
        "stateful": keras.Sequential(
            [keras.Input(batch_shape=(3, 6, 4)), layers.LSTM(3, stateful=True)]
        ),
        "grouped attention": keras.Model(
            steps, layers.GroupQueryAttention(2, 4, 2)(steps, steps)
        ),
        "quantized": keras.Model(
            flat,
            [layers.Dense(3, dtype=f"int{n}_from_float32")(flat) for n in (4, 8)],
        ),
    }


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("name", list(keras_3_models()))
def test_keras_3_computes_the_same(name, suffix, tmp_path):
    model = keras_3_models()[name]
    if (name, suffix) == ("custom", ".h5"):
        pytest.skip("Keras 3 writes no nested layer's class into this format")
    rng = np.random.default_rng(0)
    for w in model.weights:
        w.assign(np.abs(rng.normal(size=w.shape)) * 0.5 + 0.1)
    model.save(tmp_path / f"m{suffix}")
    inputs = [rng.normal(size=(3, *t.shape[1:])) for t in model.inputs]
    new = load(tmp_path / f"m{suffix}")
    check(outputs(new, inputs), outputs(model, inputs), 1e-6)
    assert [x.dtype_policy.name for x in new.layers] == [
        x.dtype_policy.name for x in model.layers
    ]
    assert len(new.trainable_weights) == len(model.trainable_weights)


def test_arguments_that_keras_3_dropped(tmp_path):
    model = keras.Sequential([keras.Input((4, 4, 3)), layers.RandomRotation(0.2)])
    model.save(tmp_path / "new.keras")
    with (
        zipfile.ZipFile(tmp_path / "new.keras") as new,
        zipfile.ZipFile(tmp_path / "old.keras", "w") as old,
    ):
        for name in new.namelist():  # as Keras 3.0 to 3.5 wrote it
            text = new.read(name)
            if name == "config.json":
                text = text.replace(b'"factor":', b'"value_range": [0, 255], "factor":')
                assert b"value_range" in text
            old.writestr(name, text)
    assert load(tmp_path / "old.keras").layers[0].factor == model.layers[0].factor


def test_arguments_of_a_class_of_the_same_name_stay(tmp_path):
    class RandomRotation(layers.RandomRotation):
        def __init__(self, *args, value_range=(0, 1), **kwargs):
            super().__init__(*args, **kwargs)
            self.value_range = value_range

        def get_config(self):
            return {**super().get_config(), "value_range": self.value_range}

    own = RandomRotation(0.2, value_range=(0, 9))
    keras.Sequential([keras.Input((4, 4, 3)), own]).save(tmp_path / "m.keras")
    new = load(tmp_path / "m.keras", custom_objects={"RandomRotation": RandomRotation})
    assert tuple(new.layers[0].value_range) == (0, 9)


def test_an_archive_that_was_not_zipped(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    model.save(tmp_path / "folder", zipped=False)
    data = [np.ones((2, 4), "float32")]
    check(outputs(load(tmp_path / "folder"), data), outputs(model, data), 1e-6)


def test_content_decides_not_the_name(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    model.save(tmp_path / "m.keras")
    (tmp_path / "m.keras").rename(tmp_path / "m.h5")
    assert load(tmp_path / "m.h5").count_params() == 15


def test_lambdas_are_named_and_replaced(tmp_path):
    inputs = keras.Input((4,))
    x = layers.Lambda(lambda t: t * 3, name="triple")(inputs)
    x = layers.Lambda(lambda t: t + 1, name="more")(x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    data = [np.random.default_rng(0).normal(size=(3, 4)).astype("float32")]
    for suffix in (".keras", ".h5"):
        path = tmp_path / f"m{suffix}"
        model.save(path)
        with pytest.raises(RewriteError, match="triple, more"):
            load(path)
        given = {"triple": lambda t: t * 3, "more": lambda t: t + 1}
        with pytest.raises(RewriteError, match=r"got less.*triple, more"):
            load(path, lambdas={**given, "less": lambda t: t - 1})
        check(outputs(load(path, lambdas=given), data), outputs(model, data), 1e-6)
    trusted = load(tmp_path / "m.keras", safe_mode=False)
    check(outputs(trusted, data), outputs(model, data), 1e-6)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_missing_classes_are_named_all_at_once(tmp_path, suffix):
    class One(layers.Layer):
        def call(self, x):
            return x

    class Two(One):
        pass

    inputs, inner = keras.Input((4,)), keras.Input((4,))
    nested = keras.Model(inner, Two()(inner), name="nested")
    path = tmp_path / f"m{suffix}"
    keras.Model(inputs, nested(One()(inputs))).save(path)
    with pytest.raises(RewriteError) as error:
        load(path)
    assert "One" in str(error.value) and "Two" in str(error.value)
    assert "custom_objects={" in str(error.value)
    assert load(path, custom_objects={"One": One, "Two": Two})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.h5", b"", "empty file"),
        ("text.keras", b"hello there", "starts with"),
        ("model.json", b'{"class_name": "Sequential"}', "starts with"),
        ("absent.h5", None, "no such file"),
        ("pointer.h5", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("folder", "folder", "without saved_model.pb"),
    ],
)
def test_what_is_no_model_says_so(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(RewriteError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_weights_alone_say_so(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    model.save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(RewriteError, match="weights without a model"):
        load(tmp_path / "m.weights.h5")


def test_a_huge_layer_is_refused_before_memory_is_taken(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    path = tmp_path / "m.h5"
    model.save(path)
    with h5py.File(path, "r+") as f:
        text = str(f.attrs["model_config"]).replace('"units": 3', '"units": 1000000000')
        f.attrs.modify("model_config", text)
    with pytest.raises(RewriteError, match="another shape"):
        load(path)


# What nobody can write any more: files made by hand


def write_h5(path, entries, weights, version="2.2.4", backend="tensorflow", kind=None):
    """A Sequential model's file from its layers' entries and named arrays."""
    config = entries if kind is None else kind
    if kind is None:
        config = {"class_name": "Sequential", "config": entries}
    with h5py.File(path, "w") as f:
        f.attrs["model_config"] = json.dumps(config).encode()
        group = f.create_group("model_weights")
        group.attrs["keras_version"] = version.encode()
        group.attrs["backend"] = backend.encode()
        group.attrs["layer_names"] = [n.encode() for n in weights]
        for layer, arrays in weights.items():
            inner = group.create_group(layer)
            inner.attrs["weight_names"] = [n.encode() for n in arrays]
            for name, value in arrays.items():
                inner[name] = value


def entry(kind, name, **config):
    return {"class_name": kind, "config": {"name": name, "trainable": True, **config}}


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype("float32")


@pytest.mark.parametrize("order", ["tf", "th"])
@pytest.mark.parametrize("backend", ["tensorflow", "theano"])
def test_keras_1_convolution(tmp_path, order, backend):
    kernel, bias = normal(3, 3, 3, 3), normal(3)  # a shape that hides its order
    stored = kernel[::-1, ::-1] if backend == "theano" else kernel
    stored = stored.transpose(3, 2, 0, 1) if order == "th" else stored
    write_h5(
        tmp_path / "m.h5",
        [
            entry(
                "Convolution2D", "c", nb_filter=3, nb_row=3, nb_col=3, subsample=[1, 1],
                border_mode="valid", dim_ordering=order, activation="relu", bias=True,
                init="glorot_uniform", W_regularizer={"name": "WeightRegularizer",
                "l1": 0.0, "l2": 0.1}, W_constraint=None, input_dtype="float32",
                batch_input_shape=[None, 5, 5, 3] if order == "tf" else [None, 3, 5, 5],
            )
        ],
        {"c": {"c_W": stored, "c_b": bias}},
        "1.2.2",
        backend,
    )  # fmt: skip
    model = load(tmp_path / "m.h5")
    (layer,) = model.layers
    np.testing.assert_array_equal(np.array(layer.kernel), kernel)
    np.testing.assert_array_equal(np.array(layer.bias), bias)
    assert layer.padding == "valid" and layer.kernel_regularizer is not None
    assert (layer.data_format == "channels_first") == (order == "th")


def test_keras_1_gates_dense_norm_and_1d_convolution(tmp_path):
    gates = {g: (normal(4, 3) + i, normal(3, 3) - i, normal(3) + i)
             for i, g in enumerate("icfo")}  # fmt: skip
    stored = {f"l_{w}_{g}": v for g in "icfo" for w, v in zip("WUb", gates[g],
              strict=True)}  # fmt: skip
    write_h5(
        tmp_path / "m.h5",
        [
            entry(
                "Convolution1D", "c", nb_filter=4, filter_length=2, subsample_length=1,
                border_mode="same", batch_input_shape=[None, 6, 5], activation="linear",
            ),
            entry("BatchNormalization", "n", mode=0, axis=-1, epsilon=1e-3,
                  momentum=0.9, gamma_regularizer=None),
            entry("LSTM", "l", output_dim=3, inner_activation="hard_sigmoid",
                  activation="tanh", return_sequences=False, consume_less="cpu"),
            entry("Dense", "d", output_dim=2, activation="linear", bias=True),
        ],
        {
            "c": {"c_W": normal(2, 1, 5, 4), "c_b": normal(4)},
            "n": {"n_gamma": normal(4), "n_beta": normal(4) + 1,
                  "n_running_mean": normal(4) + 2, "n_running_std": normal(4) ** 2},
            "l": stored,
            "d": {"d_W": normal(3, 2), "d_b": normal(2)},
        },
        "1.1.0",
    )  # fmt: skip
    model = load(tmp_path / "m.h5")
    merged = np.concatenate([gates[g][0] for g in "ifco"], axis=-1)
    np.testing.assert_array_equal(np.array(model.get_layer("l").cell.kernel), merged)
    norm = model.get_layer("n")
    np.testing.assert_array_equal(np.array(norm.moving_variance), normal(4) ** 2)
    np.testing.assert_array_equal(np.array(norm.moving_mean), normal(4) + 2)
    assert model.get_layer("l").recurrent_activation is hard_sigmoid_2
    np.testing.assert_array_equal(
        np.array(model.get_layer("c").kernel), normal(2, 1, 5, 4)[:, 0]
    )


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_cudnn_weights_are_laid_out_anew(tmp_path, kind):
    converter = pytest.importorskip("tf_keras.src.saving.legacy.hdf5_format")
    gates = {"LSTM": 4, "GRU": 3}[kind]
    plain = [normal(5, 3 * gates), normal(3, 3 * gates)]
    plain.append(normal(3 * gates) if kind == "LSTM" else normal(2, 3 * gates))
    target = type(f"CuDNN{kind}", (), {})()
    cudnn = converter._convert_rnn_weights(target, [w.copy() for w in plain])
    names = ("kernel:0", "recurrent_kernel:0", "bias:0")
    write_h5(
        tmp_path / "m.h5",
        [
            entry(f"CuDNN{kind}", "r", units=3, return_sequences=True, stateful=False,
                  batch_input_shape=[None, 6, 5], go_backwards=False)
        ],
        {"r": {f"r/{n}": w for n, w in zip(names, cudnn, strict=True)}},
    )  # fmt: skip
    model = load(tmp_path / "m.h5")
    assert isinstance(model.layers[0], getattr(layers, kind))
    for ours, wanted in zip(model.get_weights(), plain, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [
                entry("LocallyConnected1D", "local", filters=2, kernel_size=[2],
                      batch_input_shape=[None, 6, 5]),
                entry("LSTM", "time", units=3, time_major=True),
            ],
            "LocallyConnected1D.*time: time_major",
        ),
        (
            [entry("BatchNormalization", "n", mode=1, batch_input_shape=[None, 6])],
            "n: mode='1, within each sample'",
        ),
        (
            [entry("Merge", "m", mode="sum", layers=[entry("Dense", "d")])],
            "got a Merge of models",
        ),
    ],
)  # fmt: skip
def test_what_keras_3_lacks_is_named(tmp_path, entries, message):
    write_h5(tmp_path / "m.h5", entries, {}, "1.2.2")
    with pytest.raises(RewriteError, match=message):
        load(tmp_path / "m.h5")


def test_keras_1_padding_of_each_side(tmp_path):
    shape = [None, 5, 5, 2]
    write_h5(
        tmp_path / "m.h5",
        [entry("ZeroPadding2D", "z", padding=[1, 2, 0, 3], batch_input_shape=shape)],
        {},
        "1.2.2",
    )
    assert load(tmp_path / "m.h5").output_shape == (None, 8, 8, 2)


def triple(x):
    return x * 3


def test_a_given_activation_stands_before_keras_own(tmp_path):
    write_h5(
        tmp_path / "m.h5",
        [
            entry("Dense", "d", units=4, activation="Pkg>triple",
                  batch_input_shape=[None, 4]),
            entry("Activation", "a", activation={"class_name": "function",
                  "config": "gelu"}),
        ],
        {"d": {"d/kernel:0": np.eye(4), "d/bias:0": np.zeros(4)}},
    )  # fmt: skip
    with pytest.raises(RewriteError, match='"Pkg>triple": triple'):
        load(tmp_path / "m.h5")
    for name in ("Pkg>triple", "triple"):
        given = {name: triple, "gelu": triple}
        model = load(tmp_path / "m.h5", custom_objects=given)
        x = normal(2, 4)
        check(outputs(model, [x]), [9 * x], 1e-6)
        check(outputs(edit(model, {}).model, [x]), [9 * x], 1e-6)


def test_graph_nodes_of_early_tensorflow_2(tmp_path):
    def node(name, op, inbound, constants=None, **attributes):
        config = {"node_def": {"name": op, "op": op, "attr": attributes},
                  "constants": constants or {}}  # fmt: skip
        made = entry("TensorFlowOpLayer", name, **config)
        return {**made, "name": name, "inbound_nodes": [inbound]}

    layers_ = [
        {**entry("InputLayer", "x", batch_input_shape=[None, 4, 6], dtype="float32"),
         "name": "x", "inbound_nodes": []},
        node("half", "Mul", [["x", 0, 0, {}]], {"1": 0.5}),
        node("from_one", "Sub", [["half", 0, 0, {}]], {"0": 1.0}),
        node("slice", "StridedSlice", [["from_one", 0, 0, {}]],
             {"1": [0, 1], "2": [0, 3], "3": [1, 1]},
             begin_mask={"i": "1"}, end_mask={"i": "1"}),
        node("mean", "Mean", [["slice", 0, 0, {}]], {"1": 2}, keep_dims={"b": True}),
        node("join", "ConcatV2", [["slice", 0, 0, {}], ["mean", 0, 0, {}]], {"2": 2}),
    ]  # fmt: skip
    config = {"name": "m", "layers": layers_, "input_layers": [["x", 0, 0]],
              "output_layers": [["join", 0, 0]]}  # fmt: skip
    model = {"class_name": "Model", "config": config}
    write_h5(tmp_path / "m.h5", None, {}, "2.2.4-tf", kind=model)
    x = normal(2, 4, 6)
    kept = (1.0 - x * 0.5)[:, 1:3]
    wanted = np.concatenate([kept, kept.mean(2, keepdims=True)], axis=2)
    check(outputs(load(tmp_path / "m.h5"), [x]), [wanted], 1e-6)


def test_twins_are_told_apart_by_their_config(tmp_path):
    write_h5(
        tmp_path / "m.h5",
        [
            entry("InstanceNormalization", "addons", groups=3, axis=-1, epsilon=1e-3,
                  batch_input_shape=[None, 5, 5, 3]),
            entry("InstanceNormalization", "contrib", axis=None, epsilon=1e-3),
        ],
        {
            "addons": {"addons/gamma:0": normal(3), "addons/beta:0": normal(3)},
            "contrib": {"contrib/gamma:0": normal(1), "contrib/beta:0": normal(1)},
        },
    )  # fmt: skip
    model = load(tmp_path / "m.h5")
    addons, contrib = model.layers
    assert isinstance(addons, layers.GroupNormalization) and addons.groups == 3
    assert isinstance(contrib, StdInstanceNormalization)
    x = normal(2, 5, 5, 3).astype("float64")
    mean, std = x.mean((1, 2, 3), keepdims=True), x.std((1, 2, 3), keepdims=True)
    wanted = normal(1) * (x - mean) / (std + 1e-3) + normal(1)
    check([np.array(contrib(x.astype("float32")))], [wanted], 1e-5)
