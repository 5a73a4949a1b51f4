"""Synchronized batch normalization."""

from __future__ import annotations

import keras
import numpy as np

from kerasnorm.layers.batch import BatchNormalization
from kerasnorm.method import adoption, moving_statistics, oracles
from kerasnorm.method.registry import Case, declare


@keras.saving.register_keras_serializable("kerasnorm")
class SynchronizedBatchNormalization(BatchNormalization):
    r"""Batch normalization with statistics over the batches of all replicas.

    `BatchNormalization(synchronized=True)` under the name it has elsewhere: the same
    function as batch normalization of the whole batch, however many devices
    it is spread over:

        n, sum(x)                     summed over replicas:  mean
        sum((x - mean)**2)            summed over replicas:  variance

    On TensorFlow the replicas are those of a `tf.distribute` strategy. On JAX a
    program sees the whole batch whatever its sharding, so that every batch
    normalization is synchronized, and this one is as the others. On one device it is
    batch normalization.

    Papers: Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167; synchronized:
    Peng et al., 2017, https://arxiv.org/abs/1711.07240

    Args:
        axis, momentum, epsilon, center, scale: as for `BatchNormalization`.
        synchronized: False leaves each replica its own statistics. Default True.
        **kwargs: those of `BatchNormalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        training: batch statistics (True) or moving ones.
        mask: boolean, the leading axes of the input; masked positions do not count.
    """

    def __init__(
        self,
        axis=-1,
        momentum=0.99,
        epsilon=1e-3,
        center=True,
        scale=True,
        *,
        synchronized=True,
        **kwargs,
    ):
        kwargs["synchronized"] = synchronized
        super().__init__(axis, momentum, epsilon, center, scale, **kwargs)


@oracles.flat
def oracle(x, keep, weights, config, training):
    mean, var = weights["moving_mean"], weights["moving_variance"]
    if training:
        mean, var = oracles.moments(x, keep, (0, 1))
    y = (x - mean) / np.sqrt(var + config.get("epsilon", 1e-3))
    return oracles.affine(y, weights)


def adopt(source, site, options):
    return moving_statistics.adopt_running(
        SynchronizedBatchNormalization, source, site, options
    )


declare(
    SynchronizedBatchNormalization,
    name="sync",
    title="Synchronized batch normalization",
    aliases=("sbn", "synchronized"),
    family="batch",
    paper="Peng et al., 2017, arXiv:1711.07240",
    invariance="filter",
    oracle=oracle,
    reads={
        SynchronizedBatchNormalization: adoption.reader(
            "sync", "momentum", mean="moving_mean", variance="moving_variance"
        )
    },
    adopt=adopt,
    carry=moving_statistics.carry_running,
    cases=(
        Case({}, (16, 6)),
        Case({"epsilon": 1e-5}, (5, 7, 4), masked=True),
        Case({"scale": False, "axis": 1}, (4, 3, 5, 6)),
        Case({"center": False}, (3, 2, 4, 3, 5)),
    ),
    claims={
        "scale_invariant",
        "channel_scale_invariant",
        "shift_invariant",
        "sign_equivariant",
        "unit_output_scale",
        "zero_output_mean",
        "idempotent",
        "weight_scale_invariant",
        "gradient_orthogonal_to_input",
    },
)
