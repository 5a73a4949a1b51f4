"""TensorFlow functions in graphs that Keras 2 saved, compared with what they gave."""

import json

import h5py
import keras
import numpy as np
import pytest

from rewriters import RewriteError
from rewriters.formats import load
from rewriters.formats.layers import TensorFlowFunction, TensorShape


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file"),
    pytest.mark.filterwarnings("ignore:.*unclosed.*:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64"),
]
tf_keras = pytest.importorskip("tf_keras")
tf = pytest.importorskip("tensorflow")
K, L = tf_keras.backend, tf_keras.layers
KERNEL = np.linspace(-1, 1, 3 * 3 * 4 * 2, dtype="float32").reshape(3, 3, 4, 2)

# Of images of 8 x 8 pixels and 4 channels. What a shape settles is settled when the
# model is loaded, and so needs no TensorFlow.
EVERYWHERE = {
    "resized_like": lambda x: tf.image.resize(L.MaxPooling2D()(x), tf.shape(x)[1:3]),
    "sizes": lambda x: x / tf.sqrt(tf.cast(tf.shape(x)[-1], tf.float32)),
    "tiled": lambda x: tf.tile(x[:, :1], [1, tf.shape(x)[1], 1, 1]),
    "cropped": lambda x: L.ZeroPadding2D()(x)[:, 1 : tf.shape(x)[1] + 1],
    "split": lambda x: tf.split(x, [1, tf.shape(x)[-1] - 1], axis=-1),
    "padded": lambda x: tf.pad(x, [[0, 0], [0, tf.shape(x)[2] // 4], [0, 0], [0, 0]]),
    "flat": lambda x: L.Dense(2)(tf.reshape(x, [-1, tf.shape(x)[1] * 8 * 4])),
    "flat_product": lambda x: L.Dense(2)(
        tf.reshape(x, [-1, tf.reduce_prod(tf.shape(x)[1:])])
    ),
    "flat_batch": lambda x: L.Dense(2)(tf.reshape(x, [tf.shape(x)[0], 256])),
    "flat_concat": lambda x: L.Dense(2)(
        tf.reshape(x, tf.concat([tf.shape(x)[:1], [64, 4]], 0))
    ),
    "flat_stack": lambda x: L.Dense(2)(
        tf.reshape(x, tf.stack([tf.shape(x)[0], 32, tf.shape(x)[3] * 2]))
    ),
    "batch_flatten": K.batch_flatten,
    "norm": lambda x: [tf.norm(x), tf.linalg.norm(x, axis=[1, 2], keepdims=True)],
    "floor_div": lambda x: x // 0.5,
    "sorted": lambda x: [tf.sort(x), tf.argsort(x, axis=1)],
    "constant_gathered": lambda x: tf.gather(
        tf.constant(KERNEL[0, 0]), tf.cast(x[..., 0] > 0, tf.int32)
    ),
    "where": lambda x: tf.where(x > 0, x, [1.0, 2.0, 3.0, 4.0]),
    "repeated": lambda x: tf.repeat(x, [1, 2, 1, 3], axis=3),
    "crossentropy": lambda x: [
        tf_keras.losses.binary_crossentropy(tf.sigmoid(x), tf.sigmoid(x)),
        K.categorical_crossentropy(tf.nn.softmax(x), tf.nn.softmax(x)),
    ],
    "added": lambda x: tf.add_n([x, tf.ones_like(x), tf.zeros_like(x)]),
}
TENSORFLOW_ALONE = {
    "resized_by": lambda x: tf.image.resize(
        x, tf.cast(tf.cast(tf.shape(x)[1:3], tf.float32) * 1.5, tf.int32)
    ),
    "class_token": lambda x: L.Dense(2)(
        tf.repeat(tf.constant(KERNEL[:1, 0]), tf.shape(x)[0], axis=0)
    ),
    "tiled_token": lambda x: L.Dense(2)(
        tf.tile(tf.constant(KERNEL[:1, 0]), [tf.shape(x)[0], 1, 1])
    ),
    "broadcast": lambda x: L.Dense(2)(tf.broadcast_to(x[:, :1], tf.shape(x))),
    "dynamic_index": lambda x: x[:, tf.shape(x)[0] - 3 :, ..., tf.newaxis, 0],
    "dynamic_split": lambda x: tf.split(x, [tf.shape(x)[0] - 4, 7], axis=1)[1],
    "batch_dot": lambda x: K.batch_dot(x, x, axes=[3, 3]),
    "switch": lambda x: K.switch(K.greater(x, 0), x, x * 0.1),
    "norm_1": lambda x: tf.norm(x, ord=1, axis=-1),
    "sorted_down": lambda x: tf.argsort(x, direction="DESCENDING"),
    "noise": lambda x: tf.random.normal(tf.shape(x)) * 0.0 + x,
    "latent": lambda x: K.random_normal((K.shape(x)[0], 4)) * 0.0 + x[:, 0, 0],
    "complex": lambda x: tf.math.real(tf.complex(x, x)),
    "conv2d": lambda x: tf.nn.conv2d(x, tf.constant(KERNEL), 1, "SAME"),
    "pool": lambda x: tf.nn.pool(x, (2, 2), "MAX", strides=(2, 2)),
    "fused": lambda x: K.batch_normalization(
        x, *(K.constant(KERNEL[0, i, :, 0] ** 2) for i in (0, 1, 2, 0))
    ),
    "old_bilinear": lambda x: tf.compat.v1.image.resize_bilinear(x, (5, 11)),
    "old_corners": lambda x: tf.compat.v1.image.resize_images(
        x, (12, 5), align_corners=True
    ),
    "space_to_batch": lambda x: tf.space_to_batch(x, [2, 2], [[0, 0], [0, 0]]),
}


def write(path, inputs, outputs):
    """Saves a model of Keras 2; returns arrays for its inputs, and what it gives."""
    model = tf_keras.Model(inputs, outputs)
    rng = np.random.default_rng(0)
    shapes = [(5, *(n or 8 for n in x.shape[1:])) for x in model.inputs]
    arrays = [rng.normal(size=shape).astype("float32") for shape in shapes]
    model.save(path)
    return arrays, [np.array(y) for y in tf.nest.flatten(model(arrays))]


def check(model, arrays, wanted, folder):
    """Compares `model`, and what Keras reads once it is saved again, with `wanted`."""
    model.save(folder / "again.keras")
    for found in (model, keras.saving.load_model(folder / "again.keras")):
        given = [keras.ops.convert_to_tensor(x) for x in arrays]
        outputs = keras.tree.flatten(found(given if len(given) > 1 else given[0]))
        assert len(outputs) == len(wanted)
        for y, golden in zip(outputs, wanted, strict=True):
            np.testing.assert_allclose(np.array(y), golden, rtol=1e-4, atol=1e-5)


@pytest.fixture
def path(tmp_path):
    tf_keras.backend.clear_session()
    return tmp_path / "model.h5"


@pytest.mark.parametrize("name", [*EVERYWHERE, *TENSORFLOW_ALONE])
def test_a_function_computes_the_same(name, path):
    x = L.Input((8, 8, 4))
    arrays, wanted = write(path, x, {**EVERYWHERE, **TENSORFLOW_ALONE}[name](x))
    if name in TENSORFLOW_ALONE and keras.backend.backend() != "tensorflow":
        with pytest.raises(RewriteError, match=r"TensorFlow operations tf.* lambdas="):
            load(path)
    else:
        check(load(path), arrays, wanted, path.parent)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="sizes are tensors in TensorFlow"
)
def test_sizes_that_no_file_holds_are_taken_from_the_call(path):
    x = L.Input((None, None, 4))
    y = L.Conv2D(3, 3, padding="same")(L.MaxPooling2D()(x))
    y = L.Concatenate()([tf.image.resize(y, tf.shape(x)[1:3]), x])
    y = L.Conv2D(2, 1)(L.ZeroPadding2D()(y)[:, 1 : tf.shape(x)[1] + 1])
    batch, height, width = (tf.shape(y)[i] for i in range(3))
    z = L.Dense(3)(tf.reshape(y, [batch, height * width, 2]))
    arrays, wanted = write(path, x, [y, z])
    check(load(path), arrays, wanted, path.parent)


def test_names_inside_an_operation_are_its_own(path):
    x, y = L.Input((4,)), L.Input((4,))
    outputs = [
        L.Subtract()([x, y]), tf.math.squared_difference(x, y), L.Maximum()([x, y]),
        tf.nn.l2_normalize(x, axis=1), tf.nn.l2_normalize(y, axis=1),
    ]  # fmt: skip
    arrays, wanted = write(path, [x, y], outputs)
    model = load(path)
    with h5py.File(path) as file:
        layers = json.loads(file.attrs["model_config"])["config"]["layers"]
    stored = {layer["name"] for layer in layers}
    names = [operation.name for operation in model.operations]
    assert stored <= set(names)
    # A number after the layer's name: no other name, stored or to come, has it.
    assert {name.rstrip("0123456789").rstrip(".") for name in names} - stored <= {
        name.rstrip("0123456789") for name in stored
    }
    check(model, arrays, wanted, path.parent)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, n: tf.einsum("bijc,ck->bijk", x, KERNEL[0, 0]),
        lambda x, n: x == x[:, :1],
        lambda x, n: tf.meshgrid(tf.linspace(0.0, 1.0, n), tf.linspace(0.0, 1.0, 8)),
    ],
)
def test_a_function_whose_tensors_the_file_lacks_is_refused(function, path):
    x = L.Input((8, 8, 4))
    write(path, x, function(x, tf.shape(x)[1]))
    with pytest.raises(RewriteError, match=r"operations tf.* lambdas=") as error:
        load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["math.add", "nn.conv2d", "__operators__.getitem"])
def test_arguments_that_do_not_fit_are_one_clear_error(name, path):
    renamed(path, name)
    with pytest.raises(RewriteError, match=rf"operations tf.*{name}.* lambdas="):
        load(path)


@pytest.mark.parametrize(
    "name", ["math._sys.exit", "math.__loader__.get_data", "io.read_file", "math.no"]
)
def test_a_file_names_pure_functions_alone(name, path):
    renamed(path, name)
    with pytest.raises(RewriteError, match=rf"operations tf.*{name}.* lambdas="):
        load(path)
    with pytest.raises(ValueError, match="may not be called"):
        TensorFlowFunction(name)


def renamed(path, name):
    """Saves a model whose one function the file calls `name`."""
    x = L.Input((8, 8, 4))
    write(path, x, tf.math.rint(x))
    with h5py.File(path, "r+") as file:
        text = file.attrs["model_config"]
        file.attrs["model_config"] = text.replace('"math.rint"', f'"{name}"')


def test_a_shape_is_a_tensor_of_any_backend():
    x = keras.Input((3, None))
    model = keras.Model(x, TensorShape()(x))
    assert model.output_shape == (3,)
    assert np.array(model(np.zeros((2, 3, 5)))).tolist() == [2, 3, 5]


def test_nodes_that_older_keras_2_stored_know_their_sizes(path):
    from tf_keras.src.engine.base_layer import TensorFlowOpLayer

    with tf.Graph().as_default():  # as up to TensorFlow 2.3, where this was recorded
        image = tf.compat.v1.placeholder("float32", (None, 8, 8, 4))
        shape = tf.shape(image)
        size = shape[1:3]
        resized = tf.image.resize(image, size)
        nodes = [y.op.node_def.SerializeToString() for y in (shape, size, resized)]
    bounds = {i + 1: np.array([n], "int32") for i, n in enumerate((1, 3, 1))}
    x = L.Input((8, 8, 4))
    size = TensorFlowOpLayer(nodes[0], "shape")(x)
    size = TensorFlowOpLayer(nodes[1], "size", constants=bounds)(size)
    y = TensorFlowOpLayer(nodes[2], "resize")([L.MaxPooling2D()(x), size])
    arrays, wanted = write(path, x, y)
    check(load(path), arrays, wanted, path.parent)
