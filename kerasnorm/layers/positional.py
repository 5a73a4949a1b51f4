"""Positional normalization and the moment shortcut."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.layers.layer import LayerNormalization
from kerasnorm.method import adoption
from kerasnorm.method.registry import Case, Fidelity, Reason, Refusal, declare
from kerasnorm.numerics import moments
from rewriters import private


@keras.saving.register_keras_serializable("kerasnorm")
class PositionalNormalization(LayerNormalization):
    r"""Normalizes each position over its channels, and hands the moments on.

    The moments of an image's positions hold its structure; a `MomentShortcut` puts
    them back at the far end of a generator.

        y = gamma * (x - mean_channels(x)) / sqrt(var_channels(x) + epsilon) + beta

    Layer normalization over the channels alone; the variance is the biased one, as in
    the authors' TensorFlow code (their PyTorch code has the unbiased one).

    Paper: Li, Wu, Weinberger and Belongie, 2019, https://arxiv.org/abs/1907.04312

    Args:
        return_moments: whether the output is `(y, mean, std)`; both moments have size
            1 along `axis`, and `std` includes epsilon. Default False.
        axis: integer, axis of the channels. Default -1.
        epsilon: added to the variance. Default 1e-5.
        center, scale: whether to use `beta` and `gamma`. Default False.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.

    Raises:
        KerasNormError: the axis is outside the input or of unknown size.
    """

    several_axes = False

    def __init__(
        self,
        return_moments=False,
        axis=-1,
        epsilon=1e-5,
        center=False,
        scale=False,
        **kwargs,
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        self.return_moments = return_moments

    def call(self, inputs, training=None, mask=None):
        y = super().call(inputs, training=training, mask=mask)
        if not self.return_moments:
            return y
        x = ops.cast(inputs, self.statistics_dtype)
        mean, variance = moments.moments(x, self._axes(x.shape))
        std = moments.root(variance, self.epsilon)
        return y, *(ops.cast(v, self.compute_dtype) for v in (mean, std))

    def compute_output_shape(self, input_shape):
        if not self.return_moments:
            return tuple(input_shape)
        (axis,) = self._axes(input_shape)
        moment = (*input_shape[:axis], 1, *input_shape[axis + 1 :])
        return tuple(input_shape), moment, moment


@keras.saving.register_keras_serializable("kerasnorm")
class MomentShortcut(keras.layers.Layer):
    r"""Puts moments taken by positional normalization into other features.

        y = x * std + mean

    Paper: Li, Wu, Weinberger and Belongie, 2019, https://arxiv.org/abs/1907.04312

    Call arguments:
        inputs: `(batch, ..., channels)`.
        mean, std: as returned by `PositionalNormalization(return_moments=True)` on
            features of the same size; they may have other channels in front of them.

    Raises:
        KerasNormError: the positions of the moments are not those of the input.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, inputs_shape, mean_shape, std_shape):
        for shape in (mean_shape, std_shape):
            pairs = zip(inputs_shape, shape, strict=False)
            if len(shape) != len(inputs_shape) or any(
                a != b for a, b in pairs if b not in (None, 1) and a is not None
            ):
                raise KerasNormError(
                    f"the moments do not fit the input of {self.name!r}",
                    got=f"moments {tuple(shape)} and input {tuple(inputs_shape)}",
                    expected="the same positions, and one channel",
                )
        self.built = True

    def call(self, inputs, mean, std):
        return inputs * std + mean

    def compute_output_shape(self, inputs_shape, mean_shape=None, std_shape=None):
        return tuple(inputs_shape)


def oracle(x, weights, config, training, mask):
    x = np.moveaxis(x, config.get("axis", -1), -1)
    y = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        v = x[index]
        y[index] = (v - v.mean()) / np.sqrt(v.var() + config.get("epsilon", 1e-5))
    y = y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)
    return np.moveaxis(y, -1, config.get("axis", -1))


def adopt(source, site, options):
    if source.method == "positional":
        return adoption.already("positional normalization")
    if options.arguments.get("return_moments"):
        return Refusal(
            Reason.CALL, "the layers behind take one tensor, not its moments as well"
        )
    refusal = adoption.one_element(
        site, options, lambda s: s[adoption.channel_axis(source, len(s))], "none"
    )
    if refusal is not None:
        return refusal
    exact = (
        source.method == "layer"
        and isinstance(source.axis, int)
        and not options.arguments
    )
    return adoption.adopt_fresh(
        PositionalNormalization,
        source,
        site,
        options,
        fidelity=Fidelity.EXACT if exact else Fidelity.FRESH,
        note="each position is normalized by itself"
        if adoption.on_images(site)
        else "",
    )


def read_own(layer):
    if layer.return_moments:
        return Refusal(
            Reason.NO_RULE, f"{layer.name} returns its moments, as no other method does"
        )
    return adoption.describe(layer, "positional")


def check_moment_shortcut_undoes_the_normalization():
    rng = np.random.default_rng(0)
    for axis, shape in ((-1, (2, 4, 3, 6)), (1, (2, 5, 4, 3))):
        inputs = keras.Input(shape[1:])
        made = PositionalNormalization(return_moments=True, axis=axis)(inputs)
        if [tuple(m.shape) for m in made] != [
            tuple(m.shape) for m in private.keras_history(made[0]).operation(inputs)
        ]:
            raise AssertionError("output shapes")
        model = keras.Model(inputs, MomentShortcut()(*made))
        model = keras.Model.from_config(model.get_config())
        x = rng.normal(3, 2, shape).astype("float32")
        y = ops.convert_to_numpy(model(x))
        np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5)


def check_moments_must_fit():
    with np.testing.assert_raises_regex(KerasNormError, "do not fit"):
        MomentShortcut()(*(np.ones(s) for s in ((2, 4, 4, 3), (2, 2, 2, 1), (2,) * 4)))


declare(
    PositionalNormalization,
    name="positional",
    aliases=("pono",),
    family="sample",
    paper="Li, Wu, Weinberger and Belongie, 2019, arXiv:1907.04312",
    invariance="layer",
    oracle=oracle,
    reads={PositionalNormalization: read_own},
    adopt=adopt,
    carry=adoption.carry_affine,
    cases=(
        Case({}, (4, 6)),
        Case({"center": True}, (3, 7, 4), masked=True),
        Case({"epsilon": 1e-3, "scale": True}, (2, 4, 3, 6)),
        Case({"axis": 1}, (2, 6, 4, 5)),
        Case({}, (2, 3, 2, 2, 8)),  # fewer channels may lie close together
    ),
    claims={
        "batch_independent",
        "scale_invariant",
        "shift_invariant",
        "sign_equivariant",
        "unit_output_scale",
        "zero_output_mean",
        "train_equals_inference",
        "idempotent",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
    checks=(check_moment_shortcut_undoes_the_normalization, check_moments_must_fit),
)
