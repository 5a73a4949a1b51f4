"""No normalization: a trained batch normalization, folded into its linear neighbour.

At inference a batch normalization is a scale and a shift per channel,

    s = gamma / sqrt(moving_variance + epsilon),    t = beta - moving_mean * s

and a linear layer next to it can hold both. After the linear layer (`y = s (W x + b)
+ t`) that is exact with any padding. Before it (`y = W (s x + t) + b`) it is exact
where no output reads padding, or t is zero. A layer with an activation of its own, or
one whose output or input is used elsewhere, blocks the way. What remains is left as it
is: an affine layer in its place would be a batch normalization by another name.

Paper: Jacob et al., 2018, https://arxiv.org/abs/1712.05877, section 3.2
"""

from __future__ import annotations

import keras

from kerasnorm.kernels import folding
from kerasnorm.method import adoption
from kerasnorm.method.registry import Adoption, Fidelity, Refusal, declare


def adopt(source, site, options):
    found = folding.find(source, site)
    if isinstance(found, Refusal):
        return found
    serialized = keras.saving.serialize_keras_object(found.site.layer)
    linear = found.kernel.with_bias(serialized, inputs=not found.after)
    note = folding.notes(found, linear["config"])
    return Adoption(folding.edits(found, site, linear), Fidelity.AT_INFERENCE, note)


def carry(source, layers):
    _, new, weights = folding.folded(source, layers)
    for name, value in weights.items():
        adoption.assign(getattr(new, name), value)


# No normalization is the identity, and that is what these claims are judged on.
declare(
    name="none",
    title="No normalization",
    family="none",
    paper="Jacob et al., 2018, arXiv:1712.05877",
    aliases=("fold",),
    adopt=adopt,
    carry=carry,
    claims={
        "batch_independent",
        "sign_equivariant",
        "train_equals_inference",
        "idempotent",
        "bounded_jacobian",
    },
)
