"""`spheres="joint"`: one sphere of all weights together, whose step is known only when
all are made."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from keras import ops

from kerasnorm.common.errors import KerasNormError
from kerasnorm.numerics import backend, replicas
from kerasnorm.numerics.backend import tensor
from kerasnorm.sphere import geometry
from kerasnorm.sphere.spheres import inverse, unless_moved
from rewriters import private


if TYPE_CHECKING:
    from kerasnorm.sphere.optimizers import OnSphere

Tensor = Any


def update(
    outer: OnSphere, plain: Any, grads: Any, variables: Any, rate: Tensor
) -> None:
    """One step of all weights.

    Args:
        outer: the optimizer that holds the weights on the sphere.
        plain: the wrapped optimizer's own way to do it.
        grads, variables, rate: what that takes.
    """
    inner = outer.inner_optimizer
    if replicas.count() > 1:
        raise KerasNormError(
            'spheres="joint" needs all weights at once',
            got=f"{replicas.count()} replicas",
            fix='Use spheres="unit" or "layer" there.',
        )
    places = [private.get_variable_index(inner, v) for v in variables]
    held = [n for n, i in enumerate(places) if i in outer._held]
    if not held:
        return plain(grads, variables, rate)
    w = [tensor(variables[n]) for n in held]
    square = sum(ops.sum(ops.square(outer._radii[i])) for i in outer._held)
    for i in set(outer._held) - set(places):  # without a gradient they stay
        still = tensor(private.trainable_variables(inner)[i])
        square = square - ops.sum(geometry.inner(still, still))
    # The radii are those of the start, and single ones move.
    actual = ops.sqrt(sum(ops.sum(geometry.inner(a, a)) for a in w))
    length = unless_moved(ops.sqrt(square), actual, variables[held[0]].dtype)
    square = ops.square(length)

    def along(us: list[Tensor]) -> list[Tensor]:
        part = sum(ops.sum(geometry.inner(a, u)) for a, u in zip(w, us, strict=True))
        return [u - a * (part / square) for a, u in zip(w, us, strict=True)]

    grads = list(grads)
    g = along(
        [
            ops.cast(backend.value(grads[n]), a.dtype)
            for n, a in zip(held, w, strict=True)
        ]
    )
    for n, value in zip(held, g, strict=True):
        grads[n] = value * length if outer.effective else value
    slots = [outer._slots[places[n]] for n in held]
    for row in zip(*slots, strict=True):
        for m, value in zip(row, along([tensor(m) for m in row]), strict=True):
            outer._assign(m, value)
    plain(grads, variables, rate)
    u = along([tensor(variables[n]) - a for n, a in zip(held, w, strict=True)])
    far = ops.sqrt(sum(ops.sum(geometry.inner(x, x)) for x in u))
    scale = length if outer.effective else 1.0
    if outer.max_angle is not None:
        most = math.tan(outer.max_angle) if outer.step == "retract" else outer.max_angle
        scale = ops.minimum(scale, most * length * inverse(far))
    angle = far * scale / length
    if outer.step == "geodesic":
        ahead, aside = ops.cos(angle), scale * ops.sin(angle) * inverse(angle)
    else:
        ahead, aside = 1.0, scale
    new = [ahead * a + aside * x for a, x in zip(w, u, strict=True)]
    now = ops.sqrt(sum(ops.sum(geometry.inner(x, x)) for x in new))
    for n, value in zip(held, new, strict=True):
        outer._assign(variables[n], value * (length / now))
