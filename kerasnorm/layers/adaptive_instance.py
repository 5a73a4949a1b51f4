"""Adaptive instance normalization."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.method.normalization import Normalization
from kerasnorm.method.registry import Case, Reason, Refusal, declare
from kerasnorm.numerics import backend, moments


@keras.saving.register_keras_serializable("kerasnorm")
class AdaptiveInstanceNormalization(Normalization):
    r"""Gives each channel of one input the mean and deviation it has in another.

    The method of arbitrary style transfer; nothing is learned.

        y = std_space(style) * (x - mean_space(x)) / std_space(x) + mean_space(style)

    with `std = sqrt(var + epsilon)` and the biased variance for both (the well-known
    PyTorch code takes the unbiased one). Called without a style it gives the
    normalized content alone.

        y = AdaptiveInstanceNormalization()(content, style)

    Paper: Huang and Belongie, 2017, https://arxiv.org/abs/1703.06868

    Args:
        axis: integer, axis of the channels. Default -1.
        epsilon: added to both variances. Default 1e-5.
        center, scale: whether a learned `beta` and `gamma` follow. Default False.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: the content, of rank 3 or more.
        style: as many samples, axes and channels; positions of its own.
        mask: boolean, the leading axes of the content; masked positions do not count.
        style_mask: the same for the style.

    Raises:
        KerasNormError: the input has no positions, or the style does not fit it.
    """

    def __init__(self, axis=-1, epsilon=1e-5, center=False, scale=False, **kwargs):
        super().__init__(axis, epsilon, center, scale, **kwargs)

    def build(self, inputs_shape):
        if len(inputs_shape) == 2:
            raise KerasNormError(
                "instance normalization needs positions to normalize over",
                got=f"input shape {tuple(inputs_shape)}",
                expected="a sequence, image or volume",
            )
        super().build(inputs_shape)

    def call(
        self,
        inputs,
        style=None,
        training=None,
        mask=None,
        inputs_mask=None,
        style_mask=None,
    ):
        # Keras names the masks after the arguments as soon as there are two.
        mask = inputs_mask if mask is None else mask
        x = ops.cast(inputs, self.statistics_dtype)
        (axis,) = self._axes(x.shape)
        mean, variance = self._moments(x, axis, mask)
        inverse = moments.inverse_root(variance, self.epsilon)
        std = offset = None
        if style is not None:
            self._check(style.shape, x.shape, axis)
            style = ops.cast(style, x.dtype)
            offset, variance = self._moments(style, axis, style_mask)
            std = ops.sqrt(variance + self.epsilon)
        y = moments.scale_shift(x, mean, inverse, std, offset)
        shape = [1] * len(x.shape)
        shape[axis] = x.shape[axis]
        gamma, beta = self.affine(x.dtype)
        y = y if gamma is None else y * ops.reshape(gamma, shape)
        y = y if beta is None else y + ops.reshape(beta, shape)
        return ops.cast(y, self.compute_dtype)

    def _moments(self, x, axis, mask):
        rank = len(x.shape)
        if mask is not None:
            mask = moments.align_mask(mask, rank, (axis,))
        return moments.moments(x, [a for a in range(1, rank) if a != axis], mask)

    def _check(self, style, content, axis):
        if len(style) != len(content) or style[axis] != content[axis]:
            raise KerasNormError(
                f"the style does not fit the content of {self.name!r}",
                got=f"style {tuple(style)} for content {tuple(content)}",
                expected="as many axes and channels",
            )

    def compute_output_shape(self, inputs_shape, style_shape=None):
        return tuple(inputs_shape)


def oracle(x, weights, config, training, mask, style=None):
    def stats(v, valid):
        v = v[valid] if valid is not None else v.reshape(-1, v.shape[-1])
        return v.mean(0), np.sqrt(v.var(0) + config.get("epsilon", 1e-5))

    x = np.moveaxis(x, config.get("axis", -1), -1)
    y = np.empty_like(x)
    for sample in range(len(x)):
        mean, std = stats(x[sample], None if mask is None else mask[sample])
        to_mean, to_std = 0.0, 1.0
        if style is not None:
            to_mean, to_std = stats(style[sample], None)
        y[sample] = to_std * (x[sample] - mean) / std + to_mean
    y = y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)
    return np.moveaxis(y, -1, config.get("axis", -1))


def adopt(source, site, options):
    return Refusal(
        Reason.UNDEFINED,
        "it needs a second input, the style, which no other layer is called with",
        "instance",
    )


def check_takes_on_the_style():
    rng = np.random.default_rng(0)
    x, style = rng.normal(size=(3, 4, 5, 2)), rng.normal(3, 2, size=(3, 6, 2, 2))
    layer = AdaptiveInstanceNormalization()
    expected = oracle(x, {}, {}, False, None, style)
    for dtype, tolerance in (("float32", 1e-5), ("float16", 1e-2)):
        layer = AdaptiveInstanceNormalization(
            dtype=f"mixed_{dtype}" if dtype == "float16" else dtype
        )
        y = layer(ops.cast(x, dtype), ops.cast(style, dtype))
        y = ops.convert_to_numpy(ops.cast(y, "float32"))
        np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)


def check_gradients_reach_the_style():
    with backend.double_precision():
        rng = np.random.default_rng(1)
        x, style, dy = (rng.normal(size=(2, 5, 3)) for _ in range(3))
        layer = AdaptiveInstanceNormalization(dtype="float64")
        layer.build(x.shape)
        _, (_, found) = backend.vjp(layer.call, [x, style], ops.convert_to_tensor(dy))
        step = 1e-6 * rng.normal(size=style.shape)
        ends = [
            np.vdot(oracle(x, {}, {}, False, None, style + sign * step), dy)
            for sign in (1, -1)
        ]
        expected = (ends[0] - ends[1]) / 2
        np.testing.assert_allclose(
            np.vdot(ops.convert_to_numpy(found), step), expected, rtol=1e-5
        )


def check_in_a_model_with_masks():
    inputs = [keras.Input((None, 4)), keras.Input((None, 4))]
    masked = [keras.layers.Masking()(v) for v in inputs]
    y = AdaptiveInstanceNormalization()(*masked)
    model = keras.Model(inputs, y)
    model = keras.Model.from_config(model.get_config())
    rng = np.random.default_rng(2)
    x, style = rng.normal(size=(2, 6, 4)), rng.normal(size=(2, 9, 4))
    x[:, 4:], style[:, 5:] = 0, 0
    expected = oracle(x[:, :4], {}, {}, False, None, style[:, :5])
    y = ops.convert_to_numpy(model([x.astype("float32"), style.astype("float32")]))
    np.testing.assert_allclose(y[:, :4], expected, rtol=1e-4, atol=1e-4)


def check_style_must_fit():
    layer = AdaptiveInstanceNormalization()
    with np.testing.assert_raises_regex(KerasNormError, "does not fit"):
        layer(np.ones((2, 3, 4), "float32"), np.ones((2, 3, 5), "float32"))


declare(
    AdaptiveInstanceNormalization,
    name="adaptive_instance",
    aliases=("adain",),
    family="sample",
    paper="Huang and Belongie, 2017, arXiv:1703.06868",
    invariance="filter",
    oracle=oracle,
    adopt=adopt,
    cases=(
        Case({}, (3, 7, 4), masked=True),
        Case({"center": True}, (2, 6, 5, 4)),
        Case({"scale": True, "axis": 1}, (2, 3, 4, 5)),
        Case({"epsilon": 1e-3}, (2, 3, 2, 4, 3)),
    ),
    claims={
        "batch_independent",
        "scale_invariant",
        "channel_scale_invariant",
        "shift_invariant",
        "sign_equivariant",
        "unit_output_scale",
        "zero_output_mean",
        "train_equals_inference",
        "idempotent",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
    checks=(
        check_takes_on_the_style,
        check_gradients_reach_the_style,
        check_in_a_model_with_masks,
        check_style_must_fit,
    ),
)
