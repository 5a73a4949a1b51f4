"""Spheres and products of spheres: points, tangents, geodesics.

Every function takes `axes`: what lies along them makes one point on one sphere, the
other axes count the spheres. `axes=None` is one sphere of the whole tensor; a kernel
`(3, 3, 16, 32)` with `axes=(0, 1, 2)` is one sphere for each of its 32 filters. Groups
of filters follow from a reshape. Tangent vectors have the shape of the point, radii
that of `norm(w, axes)`: the same rank, with size 1 along `axes`.

The functions are pure and made of `keras.ops`, in the dtype of their arguments. The
radius is that of the point where it is not given.

Books: Absil, Mahony and Sepulchre, 2008, "Optimization Algorithms on Matrix Manifolds",
sections 3.6, 4.1 and 8.1; Boumal, 2023, "An Introduction to Optimization on Smooth
Manifolds", sections 7.2 and 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops


Tensor = Any
Axes = int | Sequence[int] | None

# Longest run of numbers that are added one after the other: the rounding of longer
# sums would show in radii that are to be held to 1e-6 for thousands of steps.
RUN = 1024


def inner(u: Tensor, v: Tensor, axes: Axes = None) -> Tensor:
    """Inner product `<u, v>` per sphere, kept with size 1 along `axes`."""
    return _sum(u * v, axes)


def norm(w: Tensor, axes: Axes = None) -> Tensor:
    """Length per sphere, kept with size 1 along `axes`."""
    return ops.sqrt(inner(w, w, axes))


def project(w: Tensor, radius: Tensor | float = 1.0, axes: Axes = None) -> Tensor:
    """The nearest point on the sphere, `radius w / |w|`; 0 stays where it is."""
    return w * _ratio(radius, norm(w, axes))


def tangent(
    w: Tensor, u: Tensor, axes: Axes = None, radius: Tensor | None = None
) -> Tensor:
    """The part of `u` along the sphere at `w`: `u - w <w, u> / |w|**2`.

    Of a Euclidean gradient this is the Riemannian one.
    """
    square = inner(w, w, axes) if radius is None else ops.square(radius)
    return u - w * _ratio(inner(w, u, axes), square)


def retract(
    w: Tensor, u: Tensor, axes: Axes = None, radius: Tensor | None = None
) -> Tensor:
    """The point reached from `w` along the tangent `u` and then straight back:
    `|w| (w + u) / |w + u|`; equals `exp` to second order in `u`."""
    radius = norm(w, axes) if radius is None else radius
    return project(w + u, radius, axes)


def exp(
    w: Tensor, u: Tensor, axes: Axes = None, radius: Tensor | None = None
) -> Tensor:
    """The end of the geodesic that leaves `w` with the tangent `u`, after time 1:
    `w cos t + |w| u / |u| sin t` with the angle `t = |u| / |w|`."""
    radius = norm(w, axes) if radius is None else radius
    angle = norm(u, axes) * _ratio(1.0, radius)
    return w * ops.cos(angle) + u * _sinc(angle)


def log(w: Tensor, v: Tensor, axes: Axes = None) -> Tensor:
    """The tangent at `w` whose geodesic ends in `v`, the inverse of `exp` for points
    that are not opposite: there every direction is one, and the result is 0."""
    along = tangent(w, v, axes)
    return along * _ratio(distance(w, v, axes), norm(along, axes))


def transport(w: Tensor, v: Tensor, u: Tensor, axes: Axes = None) -> Tensor:
    """The tangent `u` at `w`, moved in parallel along the geodesic to `v`.

    `u - (w + v) <v, u> / (|w|**2 + <w, v>)`: keeps lengths and angles. Points must not
    be opposite.
    """
    bottom = inner(w, w, axes) + inner(w, v, axes)
    return u - (w + v) * _ratio(inner(v, u, axes), bottom)


def distance(w: Tensor, v: Tensor, axes: Axes = None) -> Tensor:
    """Length of the shorter geodesic between two points of one sphere, from 0 to
    `pi |w|`, kept with size 1 along `axes`.

    The angle is `2 atan2(|a - b|, |a + b|)` of the unit vectors, exact at small angles
    as at large ones, where the arc cosine loses half of the digits.
    """
    a, b = project(w, 1.0, axes), project(v, 1.0, axes)
    return 2 * norm(w, axes) * ops.arctan2(norm(a - b, axes), norm(a + b, axes))


def random(shape: Sequence[int], axes: Axes = None, seed: Any = None) -> Tensor:
    """Points drawn evenly from unit spheres."""
    return project(keras.random.normal(shape, seed=seed), 1.0, axes)


def _ratio(a: Tensor | float, b: Tensor) -> Tensor:
    """`a / b`, 0 where `b` is 0."""
    zero = b == 0
    return ops.where(zero, ops.zeros_like(b), a / ops.where(zero, 1.0, b))


def _sinc(angle: Tensor) -> Tensor:
    """`sin t / t`, and 1 at 0."""
    zero = angle == 0
    return ops.where(zero, 1.0, ops.sin(angle) / ops.where(zero, 1.0, angle))


def _sum(x: Tensor, axes: Axes) -> Tensor:
    """Sum over `axes`, in two stages where many numbers meet."""
    rank = len(x.shape)
    given = range(rank) if axes is None else [axes] if isinstance(axes, int) else axes
    axes = sorted(a % rank for a in given)
    sizes = [x.shape[a] for a in axes]
    if None in sizes or math.prod(sizes) <= RUN:
        return ops.sum(x, tuple(axes), keepdims=True)
    kept = [1 if a in axes else n for a, n in enumerate(x.shape)]
    longest = max(axes, key=lambda a: x.shape[a])
    n = x.shape[longest]
    first = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    shape = [*x.shape[:longest], first, n // first, *x.shape[longest + 1 :]]
    rest = tuple(a + (a > longest) for a in axes)
    x = ops.sum(ops.reshape(x, shape), longest + 1, keepdims=True)
    return ops.reshape(ops.sum(x, (*rest, longest + 1)), kept)
