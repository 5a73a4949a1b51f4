"""Switchable normalization."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from kerasnorm.layers.batch import BatchNormalization
from kerasnorm.method import adoption, moving_statistics, oracles
from kerasnorm.method.normalization import Normalization
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import moments


# A softmax of (0, 0, LOGIT) is (0, 0, 1) in float32: exp(-LOGIT) is below its rounding
# by 36 orders of magnitude.
LOGIT = 100.0


@keras.saving.register_keras_serializable("kerasnorm")
class SwitchableNormalization(BatchNormalization):
    r"""Learns to mix the statistics of instance, layer and batch normalization.

        mean = sum_k w_k mean_k,     w = softmax(mean_logits)
        var  = sum_k u_k var_k,      u = softmax(variance_logits)
        y = gamma * (x - mean) / sqrt(var + epsilon) + beta

    k runs over instance (each channel of each sample), layer (each sample) and batch;
    on vectors over layer and batch alone. All variances are biased. At inference the
    part of batch normalization is that of the moving statistics.

    Paper: Luo et al., 2019, https://arxiv.org/abs/1806.10779

    Args:
        axis: integer, axis of the channels. Default -1.
        momentum: weight of the old moving statistics, 0 to 1. Default 0.9.
        epsilon: added to the variance. Default 1e-5.
        center, scale: whether to use `beta` and `gamma`.
        logits_initializer: of the logits, one for each k, in the order of the list
            above. Default `"ones"`: equal weights.
        **kwargs: those of `BatchNormalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: batch statistics (True) or moving ones.
        mask: boolean, the leading axes of the input; masked positions do not count.
    """

    def __init__(
        self,
        axis=-1,
        momentum=0.9,
        epsilon=1e-5,
        center=True,
        scale=True,
        *,
        logits_initializer="ones",
        **kwargs,
    ):
        super().__init__(axis, momentum, epsilon, center, scale, **kwargs)
        self.logits_initializer = keras.initializers.get(logits_initializer)

    def build(self, input_shape):
        super().build(input_shape)
        shape = (3 if len(input_shape) > 2 else 2,)
        start = {"initializer": self.logits_initializer}
        self.mean_logits = self.channel_weight("mean_logits", shape, **start)
        self.variance_logits = self.channel_weight("variance_logits", shape, **start)

    def statistics(self, x, mask, training):
        instance, layer, count = parts(x, mask)
        batch = self.pooled(instance, count, mask, training)
        mixed = []
        for k, logits in enumerate((self.mean_logits, self.variance_logits)):
            weights = ops.softmax(ops.cast(logits, x.dtype))
            of = [instance[k], layer[k], batch[k]][-weights.shape[0] :]
            mixed.append(sum(weights[i] * v for i, v in enumerate(of)))
        return mixed[0], moments.inverse_root(mixed[1], self.epsilon)

    normalize = Normalization.normalize


def parts(x, mask):
    """Moments of each channel of each sample, of each sample, and the number of
    positions behind each of the former."""
    instance = moments.moments(x, (1,), mask)
    count = 1.0
    if mask is not None:
        count = ops.sum(ops.cast(mask, x.dtype), 1, keepdims=True)
    return instance, moments.pool(*instance, (2,), count), count


@oracles.flat
def oracle(x, keep, weights, config, training):
    found = [oracles.moments(x, keep, (1,)), oracles.moments(x, keep, (1, 2))]
    if training:
        found.append(oracles.moments(x, keep, (0, 1)))
    else:
        found.append((weights["moving_mean"], weights["moving_variance"]))
    mixed = []
    for k, name in enumerate(("mean_logits", "variance_logits")):
        w = np.exp(weights[name])
        w = w / w.sum()
        mixed.append(sum(a * b[k] for a, b in zip(w, found[-len(w) :], strict=True)))
    y = (x - mixed[0]) / np.sqrt(mixed[1] + config.get("epsilon", 1e-5))
    return oracles.affine(y, weights)


def adopt(source, site, options):
    note = "the weights start wholly on batch: reset the logits to 0 to learn them"
    note = note if moving_statistics.is_running(source) else ""
    return moving_statistics.adopt_running(
        SwitchableNormalization, source, site, options, note=note
    )


def carry(source, layers):
    moving_statistics.carry_running(source, layers)
    for _, new in layers.values():
        if moving_statistics.is_running(source):
            for logits in (new.mean_logits, new.variance_logits):
                adoption.assign(logits, LOGIT * np.eye(logits.shape[0])[-1])


declare(
    SwitchableNormalization,
    name="switchable",
    aliases=("switch",),
    family="batch",
    paper="Luo et al., 2019, arXiv:1806.10779",
    invariance="layer",
    oracle=oracle,
    reads={SwitchableNormalization: adoption.reader("switchable", "momentum")},
    adopt=adopt,
    carry=carry,
    cases=(
        Case({}, (16, 6)),
        Case({"momentum": 0.8}, (5, 7, 4), masked=True),
        Case({"center": False, "axis": 1}, (4, 3, 5, 6)),
        Case({"epsilon": 1e-3, "scale": False}, (3, 2, 4, 3, 5)),
    ),
    claims={
        "scale_invariant",
        "shift_invariant",
        "sign_equivariant",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
)
