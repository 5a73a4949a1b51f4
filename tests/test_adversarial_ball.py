"""The laws of the balls, by every norm, with and without bounds that cut them off."""

from __future__ import annotations

import adversarial_models as zoo
import numpy as np
import pytest
from keras import ops

from kerasnorm.adversarial import Ball
from kerasnorm.adversarial.attack import Stream
from kerasnorm.adversarial.ball import canonical
from kerasnorm.common.errors import KerasNormError


BOUNDS = [(0.0, 1.0), (-100.0, 100.0)]
EPS = {"linf": 0.1, "l2": 0.7, "l1": 3.0}
ROWS = 40


def points(rng):
    x = rng.random((ROWS, 4, 5)).astype("float32")
    x[0, 0], x[1, 1] = 0.0, 1.0  # on the bounds
    return x


def ball(norm, factor=1.0):
    radii = EPS[norm] * factor * np.linspace(0.5, 1.5, ROWS).astype("float32")
    return Ball(norm, ops.convert_to_tensor(radii)), radii


def host(x):
    return np.asarray(ops.convert_to_numpy(x))


def seeds():
    return Stream(ops.convert_to_tensor(3, "int32"), ops.convert_to_tensor(0, "int32"))


@pytest.fixture(params=zoo.NORMS)
def norm(request):
    return request.param


@pytest.mark.parametrize("bounds", BOUNDS)
def test_start_is_inside_and_spread_out(norm, bounds, rng):
    x = points(rng)
    b, radii = ball(norm)
    got = host(b.start(ops.convert_to_tensor(x), bounds, seeds()))
    d = zoo.norm_of(norm, got - x)
    assert (d <= radii * (1 + 1e-5)).all()
    assert (got >= bounds[0]).all() and (got <= bounds[1]).all()
    if bounds[0] < 0:
        # Uniform in twenty dimensions: nearly all of the volume is far out.
        assert np.median(d / radii) > 0.85
        signs = np.sign(got - x)
        assert abs(signs.mean()) < 0.15


@pytest.mark.parametrize("bounds", BOUNDS)
def test_projection_is_feasible_and_keeps_what_is_inside(norm, bounds, rng):
    x = points(rng)
    b, radii = ball(norm)
    centre = ops.convert_to_tensor(x)
    far = np.clip(x + rng.normal(0, 3, x.shape), -9, 9).astype("float32")
    once = b.project(centre, ops.convert_to_tensor(far), bounds)
    d = zoo.norm_of(norm, host(once) - x)
    assert (d <= radii * (1 + 1e-4) + 1e-5).all()
    assert (host(once) >= bounds[0]).all() and (host(once) <= bounds[1]).all()
    twice = host(b.project(centre, once, bounds))
    np.testing.assert_allclose(twice, host(once), atol=2e-5)
    inside = host(b.start(centre, bounds, seeds()))
    kept = host(b.project(centre, ops.convert_to_tensor(inside), bounds))
    np.testing.assert_allclose(kept, inside, atol=2e-5)


def test_projection_is_the_nearest_point(norm, rng):
    """Without bounds, in the Euclidean sense: no point of the ball is nearer."""
    x = points(rng)
    b, _ = ball(norm)
    centre = ops.convert_to_tensor(x)
    far = (x + rng.normal(0, 1, x.shape)).astype("float32")
    got = host(b.project(centre, ops.convert_to_tensor(far), BOUNDS[1]))
    # The plane through the projection, across the way to it, has the ball behind it.
    out = (far - got).reshape(ROWS, -1).astype("float64")
    other = host(b.start(centre, BOUNDS[1], seeds()))
    behind = ((other - got).reshape(ROWS, -1) * out).sum(1)
    assert (behind <= 1e-3).all()


@pytest.mark.parametrize("bounds", BOUNDS)
def test_steepest_has_its_length_and_nothing_beats_it(norm, bounds, rng):
    x = points(rng)
    g = rng.normal(size=x.shape).astype("float32")
    g[2] = 0.0
    b, radii = ball(norm)
    x_, g_ = map(ops.convert_to_tensor, (x, g))
    d = host(b.steepest(x_, g_, ops.convert_to_tensor(radii), bounds))
    assert np.isfinite(d).all() and (d[2] == 0).all()
    moved = np.arange(ROWS) != 2
    d, radii_, g = d[moved], radii[moved], g[moved]
    assert (zoo.norm_of(norm, d) <= radii_ * (1 + 1e-3)).all()
    reached = (d * g).reshape(len(d), -1).astype("float64").sum(1)
    if bounds[0] < 0:
        np.testing.assert_allclose(zoo.norm_of(norm, d), radii_, rtol=1e-3)
        best = [
            zoo.gain(norm, v.ravel().astype("float64"), 0 * v.ravel(), e, -1e3, 1e3)
            for v, e in zip(g, radii_, strict=True)
        ]
        np.testing.assert_allclose(reached, best, rtol=2e-3)
    elif norm == "l1":  # the one whose step looks at the bounds
        best = [
            zoo.gain(norm, v.ravel().astype("float64"), a.ravel(), e)
            for v, a, e in zip(g, x[moved], radii_, strict=True)
        ]
        np.testing.assert_allclose(reached, best, rtol=2e-3)


def test_steepest_of_tiny_gradients(norm, rng):
    """A gradient that is small is still a direction."""
    x = points(rng)
    g = rng.normal(size=x.shape).astype("float32")
    b, radii = ball(norm)
    args = ops.convert_to_tensor(x), ops.convert_to_tensor(radii), BOUNDS[1]
    large = host(b.steepest(args[0], ops.convert_to_tensor(g), *args[1:]))
    small = host(b.steepest(args[0], ops.convert_to_tensor(g * 1e-25), *args[1:]))
    assert (zoo.norm_of(norm, small) > 0.99 * radii).all()
    if norm != "l1":
        np.testing.assert_allclose(small, large, rtol=1e-3, atol=1e-5)


def test_distance_and_dual(norm, rng):
    x = points(rng)
    other = rng.random(x.shape).astype("float32")
    b, _ = ball(norm)
    got = host(b.distance(ops.convert_to_tensor(x), ops.convert_to_tensor(other)))
    np.testing.assert_allclose(got, zoo.norm_of(norm, other - x), rtol=1e-5)
    dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[norm]
    got = host(b.dual(ops.convert_to_tensor(x)))
    np.testing.assert_allclose(got, zoo.norm_of(dual, x), rtol=1e-5)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_plane_is_reached_by_the_shortest_way(norm, bounds, rng):
    x = points(rng)
    w = rng.normal(size=x.shape).astype("float32")
    at = (x * w).reshape(ROWS, -1).sum(1)
    b = (at + rng.normal(0, 1.0, ROWS)).astype("float32")
    d = host(
        Ball(norm).to_plane(*map(ops.convert_to_tensor, (x, w, b)), bounds)
    ).astype("float64")
    assert (x + d >= bounds[0] - 1e-5).all() and (x + d <= bounds[1] + 1e-5).all()
    for row in range(ROWS):
        gap = float(b[row]) - float((x[row].astype("float64") * w[row]).sum())
        v = np.sign(gap) * w[row].ravel().astype("float64")
        flat = x[row].ravel().astype("float64")
        most = zoo.gain(norm, v, flat, 1e4, *bounds)
        reached = float((v * d[row].ravel()).sum())
        assert reached == pytest.approx(min(abs(gap), most), abs=2e-3, rel=2e-3)
        if most > abs(gap) * 1.01:
            # No shorter displacement reaches it.
            size = zoo.norm_of(norm, d[row][None])[0]
            shorter = zoo.gain(norm, v, flat, 0.99 * size, *bounds)
            assert shorter <= abs(gap) * 1.001 + 1e-6


@pytest.mark.parametrize(
    "given, name",
    [(np.inf, "linf"), ("inf", "linf"), (2, "l2"), (1, "l1"), ("L2", "l2")],
)
def test_norms_have_other_names(given, name):
    assert canonical(given) == Ball(given).norm == name


def test_unknown_norm():
    with pytest.raises(KerasNormError, match="no such norm: got 3"):
        Ball(3)
