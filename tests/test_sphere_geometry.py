"""The laws of spheres, on one sphere, on products of them, and against closed forms."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from kerasnorm.numerics import backend
from kerasnorm.sphere import geometry as g


# Shape and axes: a vector, one sphere of a matrix, filters of a kernel, groups of
# filters, many numbers on one sphere.
CASES = {
    "vector": ((7,), None),
    "matrix": ((4, 3), None),
    "filters": ((3, 3, 4, 6), (0, 1, 2)),
    "last": ((5, 4), -1),
    "groups": ((3, 2, 4), (0, 2)),
    "large": ((1500, 2), (0,)),
}


@pytest.fixture(params=CASES)
def case(request, rng):
    """Points `w` and `v` of one radius, tangents `a` and `b` at `w`, in NumPy."""
    shape, axes = CASES[request.param]
    every = tuple(range(len(shape))) if axes is None else axes

    def total(x):
        return np.sum(x, axis=every, keepdims=True)

    radius = rng.uniform(0.5, 2, total(np.zeros(shape)).shape)
    w, v = (rng.normal(size=shape) for _ in range(2))
    w, v = (x * radius / np.sqrt(total(x**2)) for x in (w, v))
    a, b = (u - w * total(w * u) / radius**2 for u in rng.normal(size=(2, *shape)))
    with backend.double_precision():
        yield axes, radius, total, (w, v, a, b)


def check(found, expected, tolerance=1e-9):
    np.testing.assert_allclose(
        ops.convert_to_numpy(found), expected, rtol=tolerance, atol=tolerance
    )


def test_projection_is_the_nearest_point(case, rng):
    axes, radius, total, (w, _, a, _) = case
    x = 3 * w + a
    found = ops.convert_to_numpy(g.project(x, radius, axes))
    check(np.sqrt(total(found**2)), radius)
    check(g.project(found, radius, axes), found)
    for other in rng.normal(size=(5, *w.shape)):
        other = other * radius / np.sqrt(total(other**2))
        assert (total((x - found) ** 2) <= total((x - other) ** 2) + 1e-12).all()


def test_tangent_is_the_projection_of_vectors(case, rng):
    axes, _, total, (w, _, a, _) = case
    u = rng.normal(size=w.shape)
    found = ops.convert_to_numpy(g.tangent(w, u, axes))
    check(total(w * found), np.zeros_like(total(w)))
    check(g.tangent(w, found, axes), found)
    check(total((u - found) * a), np.zeros_like(total(w)), 1e-8)
    check(g.tangent(w, u, axes, g.norm(w, axes)), found)


def test_exp_and_log_are_inverse(case):
    axes, radius, total, (w, v, a, _) = case
    check(g.exp(w, g.log(w, v, axes), axes), v)
    short = a * 0.9 * np.pi * radius / np.sqrt(total(a**2))
    check(g.log(w, g.exp(w, short, axes), axes), short)
    check(np.sqrt(total(ops.convert_to_numpy(g.exp(w, 5 * a, axes)) ** 2)), radius)
    check(g.exp(w, 0 * a, axes), w)
    check(g.log(w, w, axes), 0 * w)


def test_distance_is_the_length_of_the_logarithm(case):
    axes, radius, total, (w, v, a, _) = case
    length = np.sqrt(total(ops.convert_to_numpy(g.log(w, v, axes)) ** 2))
    check(g.distance(w, v, axes), length)
    check(g.distance(w, v, axes), radius * np.arccos(total(w * v) / radius**2), 1e-7)
    check(g.distance(v, w, axes), length)
    check(g.distance(w, -w, axes), np.pi * radius)
    tiny = 1e-9 * a
    far = np.sqrt(total(tiny**2))
    found = g.distance(w, g.exp(w, tiny, axes), axes)
    check(ops.convert_to_numpy(found) / far, np.ones_like(far), 1e-5)


def test_retraction_agrees_with_exp_to_second_order(case):
    axes, _, total, (w, _, a, _) = case
    check(g.retract(w, 0 * a, axes), w)
    unit = a / np.sqrt(total(a**2))
    gaps = [
        np.abs(
            ops.convert_to_numpy(
                g.retract(w, h * unit, axes) - g.exp(w, h * unit, axes)
            )
        ).max()
        for h in (1e-2, 1e-3)
    ]
    assert gaps[1] < 2e-3 * gaps[0]  # of third order: a thousandth


def test_transport_is_an_isometry_to_the_other_tangent_space(case):
    axes, _, total, (w, v, a, b) = case
    p, q = (ops.convert_to_numpy(g.transport(w, v, u, axes)) for u in (a, b))
    check(total(v * p), np.zeros_like(total(v)))
    check(total(p * q), total(a * b))
    check(g.transport(v, w, p, axes), a, 1e-8)
    check(g.transport(w, w, a, axes), a)
    along = ops.convert_to_numpy(g.log(w, v, axes))
    back = ops.convert_to_numpy(g.log(v, w, axes))
    check(g.transport(w, v, along, axes), -back)  # a geodesic keeps its direction


def test_geodesics_have_constant_speed(case):
    axes, radius, total, (w, _, a, _) = case
    short = a * 0.5 * radius / np.sqrt(total(a**2))
    for t in (0.25, 0.5, 1.0):
        far = g.distance(w, g.exp(w, t * short, axes), axes)
        check(far, 0.5 * t * radius)


def test_products_are_their_factors(rng):
    shape, axes = CASES["filters"]
    w, u = rng.normal(size=(2, *shape)).astype("float32")
    for f in (g.tangent, g.retract, g.exp, g.log, g.distance):
        whole = ops.convert_to_numpy(f(w, u, axes))
        for k in range(shape[-1]):
            one = ops.convert_to_numpy(f(w[..., k], u[..., k]))
            np.testing.assert_allclose(
                whole[..., k].ravel(), one.ravel(), rtol=1e-4, atol=1e-5
            )


def test_zero_stays_zero():
    zero = np.zeros((3, 2), "float32")
    for found in (g.project(zero, 1.0, 0), g.tangent(zero, zero + 1, 0) - 1):
        np.testing.assert_array_equal(ops.convert_to_numpy(found), zero)


def test_random_points_lie_on_the_sphere():
    x = g.random((50, 4), 0, seed=keras.random.SeedGenerator(0))
    np.testing.assert_allclose(ops.convert_to_numpy(g.norm(x, 0)), 1, rtol=1e-5)


def test_long_sums_are_exact(rng):
    w = rng.uniform(0.5, 1.5, (25088, 3)).astype("float32")
    exact = np.linalg.norm(w.astype("float64"), axis=0)
    found = ops.convert_to_numpy(g.norm(w, 0))[0]
    np.testing.assert_allclose(found, exact, rtol=2e-7)
