"""Tiny models, one for each way a layer can be held; weights from a fixed seed.

`ZOO` maps a name to a function that makes a fresh model. Every model has at least one
batch normalization whose statistics are not the initial ones.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
from keras import layers


ZOO: dict[str, Callable[[], keras.Model]] = {}
UNSAVEABLE = {"subclassed_plain", "subclassed_without_config"}  # by Keras itself


def animal(make: Callable[[], keras.Model]) -> Callable[[], keras.Model]:
    def fresh() -> keras.Model:
        keras.backend.clear_session(free_memory=False)
        keras.utils.set_random_seed(7)
        return randomize(make())

    fresh.__name__ = make.__name__
    ZOO[make.__name__] = fresh
    return fresh


def randomize(model: keras.Model, seed: int = 3) -> keras.Model:
    """Gives every normalization layer statistics and an affine worth keeping."""
    rng = np.random.default_rng(seed)
    for v in model.variables:
        shape, name = tuple(v.shape), v.name
        if name in ("gamma", "moving_variance"):
            v.assign(rng.uniform(0.5, 1.5, shape))
        elif name in ("beta", "moving_mean", "bias"):
            v.assign(rng.normal(0, 0.3, shape))
    return model


def images(size: int = 8, channels: int = 3) -> keras.KerasTensor:
    return keras.Input((size, size, channels), name="image")


@animal
def plain_functional():
    x = inputs = images()
    for k, filters in enumerate((8, 16)):
        x = layers.Conv2D(filters, 3, padding="same", name=f"conv{k}")(x)
        x = layers.BatchNormalization(name=f"bn{k}")(x)
        x = layers.ReLU(name=f"relu{k}")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(5, name="head")(x), name="plain")


@animal
def sequential():
    return keras.Sequential(
        [
            images(),
            layers.Conv2D(8, 3, use_bias=False, name="conv"),
            layers.BatchNormalization(name="bn"),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(6, name="fc"),
            layers.BatchNormalization(name="bn_dense"),
            layers.Dense(3, activation="softmax"),
        ],
        name="seq",
    )


@animal
def sequential_built_by_call():
    model = keras.Sequential([layers.Dense(8), layers.BatchNormalization()])
    model(np.zeros((2, 4), "float32"))
    return model


@animal
def residual():
    inputs = images()
    x = layers.Conv2D(8, 3, padding="same", name="stem")(inputs)
    y = layers.BatchNormalization(name="bn_in")(x)
    y = layers.ReLU()(y)
    y = layers.Conv2D(8, 3, padding="same", name="conv")(y)
    y = layers.BatchNormalization(name="bn_out")(y)
    x = layers.Add(name="add")([x, y])
    return keras.Model(inputs, layers.Flatten()(x), name="residual")


@animal
def shared_norm():
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    bn = layers.BatchNormalization(name="shared_bn")
    dense = layers.Dense(8, name="shared_dense")
    out = layers.Concatenate()([bn(dense(a)), bn(dense(b))])
    return keras.Model([a, b], out, name="shared")


def _trunk(name="trunk"):
    x = inputs = images(channels=4)
    x = layers.Conv2D(8, 3, padding="same", name="conv")(x)
    x = layers.BatchNormalization(name="bn")(x)
    return keras.Model(inputs, layers.ReLU()(x), name=name)


@animal
def nested_twice():
    inputs = images(channels=4)
    inner = _trunk("inner")
    mid_in = images(channels=4)
    mid = keras.Model(mid_in, layers.MaxPooling2D()(inner(mid_in)), name="middle")
    x = layers.Flatten()(mid(inputs))
    return keras.Model(inputs, layers.Dense(3)(x), name="nested")


@animal
def nested_called_twice():
    a, b = images(channels=4), keras.Input((8, 8, 4), name="other")
    trunk = _trunk()
    out = layers.Subtract()([trunk(a), trunk(b)])
    return keras.Model([a, b], layers.Flatten()(out), name="siamese")


@animal
def nested_sequential_frozen():
    inputs = images()
    base = keras.Sequential(
        [layers.Conv2D(8, 3, name="c"), layers.BatchNormalization(name="b")],
        name="base",
    )
    base.build((None, 8, 8, 3))
    base.trainable = False
    x = base(inputs, training=False)
    return keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)), name="tuned")


@animal
def time_distributed():
    inputs = keras.Input((5, 8, 8, 2), name="frames")
    x = layers.TimeDistributed(layers.Conv2D(4, 3, name="conv"), name="td_conv")(inputs)
    x = layers.TimeDistributed(layers.BatchNormalization(name="bn"), name="td_bn")(x)
    x = layers.TimeDistributed(layers.Flatten())(x)
    x = layers.Bidirectional(layers.SimpleRNN(3, name="rnn"), name="both")(x)
    return keras.Model(inputs, layers.BatchNormalization(name="last")(x), name="video")


@animal
def masked():
    tokens = keras.Input((7,), dtype="int32", name="tokens")
    x = layers.Embedding(11, 8, mask_zero=True, name="embed")(tokens)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.LSTM(4, name="lstm")(x)
    return keras.Model(tokens, layers.Dense(2)(x), name="masked")


class Block(layers.Layer):
    """A custom layer with an inner norm, registered nowhere."""

    def __init__(self, units=8, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = layers.Dense(units, name="dense")
        self.norm = layers.BatchNormalization(name="norm")

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.norm.build((*input_shape[:-1], self.units))

    def call(self, x, training=None):
        return keras.ops.relu(self.norm(self.dense(x), training=training))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class LazyBlock(layers.Layer):
    """Makes its inner layers in build, as some do."""

    def build(self, input_shape):
        self.inner = [
            layers.Dense(8, name="dense"),
            layers.BatchNormalization(name="norm"),
        ]
        for layer in self.inner:
            layer.build((*input_shape[:-1], input_shape[-1]))
            input_shape = (*input_shape[:-1], 8)

    def call(self, x):
        for layer in self.inner:
            x = layer(x)
        return x

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 8)


@animal
def custom_layer():
    inputs = keras.Input((6,), name="x")
    x = Block(8, name="block")(inputs)
    x = LazyBlock(name="lazy")(x)
    return keras.Model(inputs, layers.Dense(3)(x), name="custom")


class Subclassed(keras.Model):
    """Attributes, a list, a dict and a nested model."""

    def __init__(self, width=8, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.stem = layers.Dense(width)
        self.norms = [layers.BatchNormalization(), layers.BatchNormalization()]
        self.parts = {"dense": layers.Dense(width), "block": Block(width)}
        self.head = keras.Sequential([layers.Dense(3), layers.BatchNormalization()])

    def call(self, x, training=None):
        x = self.norms[0](self.stem(x), training=training)
        x = self.norms[1](self.parts["dense"](x), training=training)
        return self.head(self.parts["block"](x, training=training), training=training)


@animal
def subclassed():
    model = Subclassed(8)
    model(np.zeros((2, 5), "float32"))
    return model


class FunctionalSubclass(keras.Model):
    """A graph of its own making behind a constructor of its own."""

    def __init__(self, classes=3, **kwargs):
        inputs = keras.Input((6,), name="x")
        x = layers.Dense(8, name="dense")(inputs)
        x = layers.BatchNormalization(name="bn")(x)
        super().__init__(inputs, layers.Dense(classes, name="out")(x), **kwargs)
        self.classes = classes

    def get_config(self):
        return {"classes": self.classes, "name": self.name}


@animal
def functional_subclass():
    return FunctionalSubclass(4)


class NoConfig(keras.Model):
    """Made from layers, which no config of Keras's own making can hold."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts
        self.norm = layers.BatchNormalization(name="norm")

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return self.norm(x)


@animal
def subclassed_without_config():
    model = NoConfig([layers.Dense(8), layers.BatchNormalization(), layers.ReLU()])
    model(np.zeros((2, 5), "float32"))
    return model


class Plain(keras.Model):
    """A constructor that takes nothing, as tutorials write it."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(8)
        self.norm = layers.BatchNormalization()
        self.blocks = ()
        for width in (8, 4):
            self.blocks += ([layers.Dense(width), layers.BatchNormalization()],)

    def call(self, x, training=False):
        x = self.norm(self.dense(x), training=training)
        for dense, norm in self.blocks:
            x = norm(dense(x), training=training)
        return x


@animal
def subclassed_plain():
    model = Plain()
    model(np.zeros((2, 5), "float32"))
    return model


@animal
def many_inputs_and_outputs():
    a, b = keras.Input((6,), name="a"), keras.Input((4,), name="b")
    x = layers.BatchNormalization(name="bn_a")(layers.Dense(8)(a))
    y = layers.BatchNormalization(name="bn_b")(layers.Dense(8)(b))
    both = layers.Add()([x, y])
    outputs = {"sum": layers.Dense(2, name="sum_out")(both), "norm": y}
    return keras.Model({"a": a, "b": b}, outputs, name="many")


@animal
def operators():
    inputs = images()
    x = layers.Conv2D(8, 3, name="conv")(inputs * 2.0)
    x = layers.BatchNormalization(name="bn")(x)
    x = keras.ops.relu(x) + keras.ops.mean(x, axis=(1, 2), keepdims=True)
    return keras.Model(inputs, x[:, ::2] / 3.0, name="operators")


@animal
def frozen_norm():
    inputs = keras.Input((6,), name="x")
    x = layers.Dense(8, name="dense")(inputs)
    x = layers.BatchNormalization(name="bn", trainable=False)(x)
    x = layers.BatchNormalization(name="bn2")(layers.Dense(8, name="dense2")(x))
    return keras.Model(inputs, x, name="frozen")


@animal
def mixed_float16():
    inputs = images()
    x = layers.Conv2D(8, 3, dtype="mixed_float16", name="conv")(inputs)
    x = layers.BatchNormalization(dtype="mixed_float16", name="bn")(x)
    x = layers.Flatten(dtype="mixed_float16")(x)
    return keras.Model(inputs, layers.Dense(3, dtype="float32")(x), name="mixed")


@animal
def compiled_adam():
    inputs = keras.Input((6,), name="x")
    x = layers.Dense(8, name="dense")(inputs)
    x = layers.BatchNormalization(name="bn")(x)
    model = keras.Model(inputs, layers.Dense(3, name="out")(x), name="compiled")
    model.compile(keras.optimizers.Adam(1e-2), "mse", metrics=["mae"])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 6)), rng.normal(size=(32, 3))
    model.fit(x.astype("float32"), y.astype("float32"), epochs=2, verbose=0)
    return model


@animal
def channels_first_and_3d():
    inputs = keras.Input((4, 6, 6, 3), name="volume")
    x = layers.Conv3D(8, 3, name="conv")(inputs)
    x = layers.BatchNormalization(name="bn", center=False)(x)
    x = layers.Permute((4, 1, 2, 3))(x)
    x = layers.BatchNormalization(axis=1, name="bn_first", scale=False)(x)
    return keras.Model(inputs, x, name="volume_model")
