"""Sample normalization."""

from __future__ import annotations

import keras

from kerasnorm.common.errors import KerasNormError
from kerasnorm.layers import group
from kerasnorm.layers.general_batch import GeneralBatchNormalization, pool_oracle
from kerasnorm.method import adoption, moving_statistics
from kerasnorm.method.normalization import Normalization
from kerasnorm.method.registry import Adoption, Case, Fidelity, Reason, Refusal, declare


@keras.saving.register_keras_serializable("kerasnorm")
class SampleNormalization(GeneralBatchNormalization):
    r"""Normalizes each unit by a set of reference units in its own sample.

    The set is the axes in `over` times a group of channels:

        y = gamma * (x - mean(set)) / sqrt(var(set) + epsilon) + beta

    By default all positions and all channels: layer normalization. `groups=-1` leaves
    each channel alone (instance normalization), other numbers make group
    normalization, `over=()` normalizes each position by itself.

    Paper: Liao, Kawaguchi and Poggio, 2016, https://arxiv.org/abs/1610.06160

    Args:
        over: axes of the input to pool over, without the batch and the channels; None
            for all others. Default None.
        groups: number of groups of channels that are pooled; -1 leaves each channel
            alone. Default 1.
        axis: integer, axis of the channels. Default -1.
        epsilon: added to the variance. Default 1e-3.
        center, scale: whether to use `beta` and `gamma`, one value per channel.
        **kwargs: see `kerasnorm.Normalization`.

    Call arguments:
        inputs: any shape of rank 2 or more.
        mask: boolean, the leading axes of the input; masked positions do not count.

    Raises:
        KerasNormError: `groups` does not divide the channels, or `over` holds the batch
            or the channels.
    """

    def __init__(
        self,
        over=None,
        groups=1,
        axis=-1,
        epsilon=1e-3,
        center=True,
        scale=True,
        **kwargs,
    ):
        if kwargs.pop("momentum", 0.0):  # the config of the base names it
            raise KerasNormError(
                "sample normalization has no momentum", expected="no such argument"
            )
        super().__init__(over, groups, axis, 0.0, epsilon, center, scale, **kwargs)

    def build(self, input_shape):
        Normalization.build(self, input_shape)
        # No statistics to keep, so no size needs to be known.
        self._check(tuple(1 if n is None else n for n in input_shape))

    def references(self, x, mask, over, training):
        return self.pooled(x, mask, tuple(over))


def oracle(x, weights, config, training, mask):
    return pool_oracle(x, weights, {"groups": 1, **config}, mask, ())


def adopt(source, site, options):
    channels = adoption.channels(source, site)
    if channels is None:
        return Refusal(Reason.NO_GRAPH, "the number of channels is not known")
    groups = options.arguments.get("groups", 1)
    groups = channels if groups == -1 else groups
    if groups < 1 or channels % groups:
        return Refusal(
            Reason.GROUPS,
            f"{groups} groups for {channels} channels",
            f"groups={group.nearest(groups, channels)}",
        )
    over = options.arguments.get("over")

    def elements(shape):
        axis = adoption.channel_axis(source, len(shape))
        axes = range(1, len(shape)) if over is None else over
        sizes = [shape[a] for a in axes if a % len(shape) != axis]
        positions = adoption.size(sizes)
        return None if positions is None else positions * (channels // groups)

    refusal = adoption.one_element(site, options, elements, "none")
    if refusal is not None:
        return refusal
    answer = moving_statistics.adopt_running(
        SampleNormalization, source, site, options, exact=False, alone=True, note=" "
    )
    if isinstance(answer, Refusal):
        return answer
    same = over is None and group.same_groups(source, site, groups, options)
    fidelity = Fidelity.EXACT if same else Fidelity.FRESH
    return Adoption(answer.edits, fidelity)


declare(
    SampleNormalization,
    name="sample",
    family="sample",
    paper="Liao, Kawaguchi and Poggio, 2016, arXiv:1610.06160",
    invariance="layer",
    oracle=oracle,
    reads={SampleNormalization: adoption.reader("sample")},
    adopt=adopt,
    carry=adoption.carry_affine,
    cases=(
        Case({}, (4, 6)),
        Case({"groups": 2, "epsilon": 1e-5}, (3, 7, 4), masked=True),
        Case({"over": [], "groups": 1}, (3, 5, 8)),
        Case({"over": [3], "axis": 1, "center": False}, (2, 4, 3, 5)),
        Case({"groups": -1, "over": [1, 2], "scale": False}, (2, 4, 3, 2, 3)),
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
)
