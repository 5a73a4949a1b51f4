"""Exemplar normalization."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from kerasnorm.layers.batch import BatchNormalization
from kerasnorm.layers.switchable import LOGIT, parts
from kerasnorm.method import adoption, moving_statistics, oracles
from kerasnorm.method.registry import Case, declare
from kerasnorm.numerics import moments


@keras.saving.register_keras_serializable("kerasnorm")
class ExemplarNormalization(BatchNormalization):
    r"""Mixes instance, layer and batch normalization by weights of each sample's own.

        h_k = (x - mean_k) / sqrt(var_k + epsilon)
        y = sum_k gamma_k * w_k(x) * h_k + beta,     sum_k w_k(x) = 1

    k runs over instance, layer and batch; on vectors over layer and batch alone. At
    inference the batch takes moving statistics. The weights of a sample come from how
    its pooled features agree under the normalizers:

        z_k = V mean_space(x - mean_k) / sqrt(var_k + epsilon)
        w = softmax(A tanh(B vec(z_j . z_k) + b) + a)

    The paper gives each k a beta of its own; only their sum is seen, and is `beta`. Its
    network for w is not public, and this one follows its description.

    Paper: Zhang et al., 2020, https://arxiv.org/abs/2003.08761

    Args:
        units: size of z; None for an eighth of the channels. Default None.
        axis: integer, axis of the channels. Default -1.
        momentum: weight of the old moving statistics, 0 to 1. Default 0.9.
        epsilon: added to the variances. Default 1e-5.
        center, scale: whether to use `beta`, one value per channel, and `gammas`, one
            per k and channel.
        **kwargs: those of `BatchNormalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: batch statistics (True) or moving ones.
        mask: boolean, the leading axes of the input; masked positions do not count.
    """

    def __init__(
        self,
        units=None,
        axis=-1,
        momentum=0.9,
        epsilon=1e-5,
        center=True,
        scale=True,
        **kwargs,
    ):
        super().__init__(axis, momentum, epsilon, center, scale, **kwargs)
        self.units = units

    def build(self, input_shape):
        super().build(input_shape)
        channels = input_shape[self.axis]
        k = 3 if len(input_shape) > 2 else 2
        if self.scale:
            self.gammas = self.channel_weight(
                "gammas",
                (k, channels),
                initializer=self.gamma_initializer,
                regularizer=self.gamma_regularizer,
                constraint=self.gamma_constraint,
            )
        units = self.units or max(1, channels // 8)
        glorot = {"initializer": "glorot_uniform"}
        zeros = {"initializer": "zeros"}
        self.projection = self.channel_weight("projection", (channels, units), **glorot)
        self.hidden = self.channel_weight("hidden", (k * k, k), **glorot)
        self.hidden_bias = self.channel_weight("hidden_bias", (k,), **zeros)
        self.logits = self.channel_weight("logits", (k, k), **glorot)
        self.logits_bias = self.channel_weight("logits_bias", (k,), **zeros)

    def channel_weight(self, name, shape, **kwargs):
        # One gamma for each k takes the place of the single one.
        return (
            None if name == "gamma" else super().channel_weight(name, shape, **kwargs)
        )

    def normalize(self, x, mask, training):
        instance, layer, count = parts(x, mask)
        batch = self.pooled(instance, count, mask, training)
        bias: Any = self.logits_bias
        pairs = [instance, layer, batch][-bias.shape[0] :]
        inverses = [moments.inverse_root(v, self.epsilon) for _, v in pairs]
        weights = self._gate(instance[0], pairs, inverses)
        slope, offset = 0.0, 0.0
        for k, (mean, _) in enumerate(pairs):
            factor = inverses[k] * weights[:, k, None, None]
            if self.scale:
                factor = factor * ops.cast(self.gammas, x.dtype)[k]
            slope, offset = slope + factor, offset + factor * (mean - batch[0])
        beta = 0.0 if self.beta is None else ops.cast(self.beta, x.dtype)
        return moments.scale_shift(x, batch[0], slope, beta=beta - offset)

    def _gate(self, pooled, pairs, inverses):
        """Weights `(batch, k)`; `pooled` is `(batch, 1, channels)`."""
        dtype = pooled.dtype
        z = ops.concatenate(
            [(pooled - pairs[k][0]) * inverses[k] for k in range(len(pairs))], axis=1
        )
        z = ops.matmul(z, ops.cast(self.projection, dtype))
        agree = ops.matmul(z, ops.transpose(z, (0, 2, 1)))
        agree = ops.reshape(agree, (-1, len(pairs) ** 2))
        hidden = ops.matmul(agree, ops.cast(self.hidden, dtype))
        hidden = ops.tanh(hidden + ops.cast(self.hidden_bias, dtype))
        logits = ops.matmul(hidden, ops.cast(self.logits, dtype))
        return ops.softmax(logits + ops.cast(self.logits_bias, dtype))


@oracles.flat
def oracle(x, keep, weights, config, training):
    epsilon, count = config.get("epsilon", 1e-5), len(weights["logits_bias"])
    found = [oracles.moments(x, keep, (1,)), oracles.moments(x, keep, (1, 2))]
    if training:
        found.append(oracles.moments(x, keep, (0, 1)))
    else:
        shape = (1, 1, -1)
        found.append(
            tuple(weights[f"moving_{n}"].reshape(shape) for n in ("mean", "variance"))
        )
    found = found[-count:]
    y = np.zeros_like(x)
    for n in range(len(x)):
        heights, z = [], []
        pooled = np.mean(x[n], 0, where=keep[n])
        for mean, var in found:
            mean, var = mean[n % len(mean)], var[n % len(var)]
            heights.append((x[n] - mean) / np.sqrt(var + epsilon))
            z.append(
                ((pooled - mean[0]) / np.sqrt(var[0] + epsilon)) @ weights["projection"]
            )
        agree = np.array([a @ b for a in z for b in z])
        hidden = np.tanh(agree @ weights["hidden"] + weights["hidden_bias"])
        w = np.exp(hidden @ weights["logits"] + weights["logits_bias"])
        gammas = weights.get("gammas", np.ones(count))
        y[n] = sum(
            g * a * h for g, a, h in zip(gammas, w / w.sum(), heights, strict=True)
        )
    return y + weights.get("beta", 0.0)


def adopt(source, site, options):
    note = "the weights start wholly on batch: reset logits_bias to 0 to learn them"
    note = note if moving_statistics.is_running(source) else ""
    return moving_statistics.adopt_running(
        ExemplarNormalization, source, site, options, note=note
    )


def carry(source, layers):
    moving_statistics.carry_running(source, layers)
    for _, new in layers.values():
        gamma = source.weights.get("gamma")
        if new is None:
            continue
        if new.scale and gamma is not None and gamma.ndim == 1:
            adoption.assign(new.gammas, np.broadcast_to(gamma, new.gammas.shape))
        if moving_statistics.is_running(source):
            count = new.logits_bias.shape[0]
            adoption.assign(new.logits, np.zeros((count, count)))
            adoption.assign(new.logits_bias, LOGIT * np.eye(count)[-1])


declare(
    ExemplarNormalization,
    name="exemplar",
    aliases=("en",),
    family="batch",
    paper="Zhang et al., 2020, arXiv:2003.08761",
    invariance="layer",
    oracle=oracle,
    reads={ExemplarNormalization: adoption.reader("exemplar", "momentum")},
    adopt=adopt,
    carry=carry,
    cases=(
        Case({}, (16, 6)),
        Case({"momentum": 0.8}, (5, 7, 4), masked=True),
        Case({"center": False, "axis": 1, "units": 2}, (4, 3, 5, 6)),
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
