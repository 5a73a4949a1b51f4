"""Filter response normalization."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.method import adoption
from kerasnorm.method.normalization import Normalization
from kerasnorm.method.registry import Adoption, Case, Fidelity, Reason, Refusal, declare
from kerasnorm.numerics import moments, standardize


@keras.saving.register_keras_serializable("kerasnorm")
class FilterResponseNormalization(Normalization):
    r"""Divides each channel of each sample by its root mean square over positions.

    Neither batch statistics nor a mean; a learned threshold, the thresholded linear
    unit (TLU), takes the place of the ReLU that would follow.

        y = gamma * x / sqrt(mean_space(x**2) + epsilon) + beta
        y = max(y, tau)                               where threshold=True

    On a single position `x / |x|` is only a sign; there the paper learns epsilon:
    `epsilon + |learned|`, which starts at 1e-4.

    Paper: Singh and Krishnan, 2019, https://arxiv.org/abs/1911.09737

    Args:
        threshold: whether to apply the TLU; then put no ReLU behind. Default True.
        learn_epsilon: whether to learn an addition to epsilon. Default False.
        axis: integer, axis of the channels. Default -1.
        epsilon: added to the mean square. Default 1e-6.
        center, scale: whether to use `beta` and `gamma`, one value per channel.
        tau_initializer: default `"zeros"`, which makes the TLU a ReLU.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 3 or more; rank 2 with `learn_epsilon=True`.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: the input has no positions, and epsilon is not learned.
    """

    def __init__(
        self,
        threshold=True,
        learn_epsilon=False,
        axis=-1,
        epsilon=1e-6,
        center=True,
        scale=True,
        *,
        tau_initializer="zeros",
        **kwargs,
    ):
        super().__init__(axis, epsilon, center, scale, **kwargs)
        self.threshold = threshold
        self.learn_epsilon = learn_epsilon
        self.tau_initializer = keras.initializers.get(tau_initializer)

    def build(self, input_shape):
        if len(input_shape) == 2 and not self.learn_epsilon:
            raise KerasNormError(
                "filter response normalization of a single position is only a sign",
                got=f"input shape {tuple(input_shape)}",
                expected="a sequence, image or volume, or learn_epsilon=True",
            )
        super().build(input_shape)
        shape = (input_shape[self.axis],)
        self.tau = self.channel_weight("tau", shape) if self.threshold else None
        self.learned_epsilon = None
        if self.learn_epsilon:
            self.learned_epsilon = self.channel_weight(
                "learned_epsilon", (), initializer=keras.initializers.Constant(1e-4)
            )

    def statistics(self, x, mask, training):
        _, square = moments.moments(x, (1,), mask, center=False)
        epsilon = self.epsilon
        if self.learned_epsilon is not None:
            epsilon = epsilon + ops.abs(ops.cast(self.learned_epsilon, x.dtype))
        return None, moments.inverse_root(square, epsilon)

    def normalize(self, x, mask, training):
        if mask is None and self.learned_epsilon is None:
            affine = self.affine(x.dtype)
            y = standardize.samples(x, self.epsilon, *affine, center=False)
        else:
            y = super().normalize(x, mask, training)
        return y if self.tau is None else ops.maximum(y, ops.cast(self.tau, x.dtype))


def oracle(x, weights, config, training, mask):
    x = np.moveaxis(x, config.get("axis", -1), -1)
    epsilon = config.get("epsilon", 1e-6) + abs(weights.get("learned_epsilon", 0.0))
    y = np.empty_like(x)
    for sample in range(len(x)):
        valid = np.ones(x.shape[1:-1], bool) if mask is None else mask[sample]
        square = (
            np.mean(x[sample][valid] ** 2, axis=0) if x.ndim > 2 else x[sample] ** 2
        )
        y[sample] = x[sample] / np.sqrt(square + epsilon)
    y = y * weights.get("gamma", 1.0) + weights.get("beta", 0.0)
    y = np.maximum(y, weights.get("tau", -np.inf))
    return np.moveaxis(y, -1, config.get("axis", -1))


def adopt(source, site, options):
    refusal = adoption.forced_training(source, site)
    if refusal is not None:
        return refusal
    if source.method == "filter_response":
        return adoption.already("filter response normalization")
    learns = options.arguments.get("learn_epsilon", False)
    for shape in adoption.shapes(site):
        if len(shape) == 2 and not learns:
            return Refusal(
                Reason.UNDEFINED, f"no positions in input shape {shape}", "rms"
            )
    if not learns:
        refusal = adoption.one_element(
            site, options, lambda s: adoption.positions(source, s), "rms"
        )
        if refusal is not None:
            return refusal
    if options.layers == "keras":
        return Refusal(Reason.NO_RULE, "Keras has no layer for it", 'layers="auto"')
    # With tau = 0 the TLU is the ReLU that follows, which it then replaces. Without
    # one it would add a non-linearity, so it is left out unless asked for.
    threshold = options.arguments.get("threshold", False)
    layer = adoption.make(
        FilterResponseNormalization,
        source,
        site,
        options,
        axis=adoption.last_axis(source),
        threshold=threshold,
    )
    edits = [adoption.edit(site, layer)]
    note = ""
    relu = site.after() if threshold else None
    if relu is not None and adoption.is_relu(relu.layer) and not relu.shared:
        edits.append(adoption.edit(relu, None))
        note = f"the threshold takes the place of {relu.path}"
    return Adoption(tuple(edits), Fidelity.FRESH, note)


def read_own(layer):
    if layer.threshold:
        return Refusal(
            Reason.NO_RULE,
            f"{layer.name} has a threshold, a non-linearity that others have not",
        )
    return adoption.describe(layer, "filter_response")


def check_threshold_at_zero_is_relu():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 4)).astype("float32")
    plain = FilterResponseNormalization(threshold=False)(x)
    np.testing.assert_allclose(
        ops.convert_to_numpy(FilterResponseNormalization()(x)),
        np.maximum(ops.convert_to_numpy(plain), 0),
    )


declare(
    FilterResponseNormalization,
    name="filter_response",
    aliases=("frn",),
    family="sample",
    paper="Singh and Krishnan, 2019, arXiv:1911.09737",
    invariance="filter",
    oracle=oracle,
    reads={FilterResponseNormalization: read_own},
    adopt=adopt,
    carry=adoption.carry_affine,
    cases=(
        Case({"epsilon": 1e-5}, (3, 7, 4), masked=True),
        Case({"threshold": False, "center": False}, (2, 6, 5, 4)),
        Case({"scale": False, "axis": 1}, (2, 3, 4, 5)),
        Case({"threshold": False}, (2, 3, 2, 4, 3)),
        # A learned epsilon is large enough to be felt.
        Case({"learn_epsilon": True}, (3, 6), claims=False),
        Case({"learn_epsilon": True, "epsilon": 0.0}, (3, 2, 2, 4), claims=False),
    ),
    # Not sign equivariant: the threshold.
    claims={
        "batch_independent",
        "scale_invariant",
        "channel_scale_invariant",
        "train_equals_inference",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
)
