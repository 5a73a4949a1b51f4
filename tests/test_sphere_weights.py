"""`weights="sphere"`: the same function, weights on spheres, and back again."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import zoo
from conftest import mostly_ci, require_shared
from keras import layers, ops
from test_architectures import ALL, make
from test_published import files
from zoo import UNSAVEABLE, ZOO, images, randomize

import kerasnorm
import rewriters
from kerasnorm.kernels.kernel import kernels_of
from kerasnorm.method.registry import Fidelity
from kerasnorm.sphere import scale_invariant_weights
from kerasnorm.weights.sphere import SphereNormalization
from rewriters.compare import nudged, outputs, relative
from rewriters.graph import SiteMap


def trained(model, x):
    """Outputs in training mode, from the same seeds."""
    values = [ops.convert_to_numpy(v).copy() for v in model.variables]
    made = outputs(model, x, training=True)
    for v, value in zip(model.variables, values, strict=True):
        v.assign(value)
    return made


def spheres(model):
    return [m for m in model._flatten_layers() if isinstance(m, SphereNormalization)]


@pytest.mark.parametrize("radius", mostly_ci(["own", "learned", 1.0], ["own"]))
@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("masked",)])
def test_zoo(name, radius, tmp_path):
    model = ZOO[name]()
    x = rewriters.random_inputs(model)
    given = {} if radius == "own" else {"radius": radius}
    new, report = kerasnorm.rewrite(
        model, weights="sphere", return_report=True, **given
    )
    half = any("16" in m.compute_dtype for m in model._flatten_layers())
    limit = 5e-3 if half else 1e-5
    assert rewriters.compare(model, new, x).relative <= limit
    if report.plan.fidelity is Fidelity.EXACT and name != "time_distributed":
        for a, b in zip(trained(model, x), trained(new, x), strict=True):
            np.testing.assert_allclose(a, b, rtol=10 * limit, atol=limit)
    for layer in spheres(new):
        for kernel in layer.kernels:
            v = ops.cast(ops.convert_to_tensor(kernel.variable), "float32")
            length = ops.convert_to_numpy(layer.lengths(kernel.columns(v)))
            np.testing.assert_allclose(length, 1, rtol=1e-5)
    back = kerasnorm.export(new)
    assert not spheres(back)
    assert rewriters.compare(model, back, x).relative <= limit
    if spheres(new) and name not in UNSAVEABLE and radius != "learned":
        new.save(tmp_path / "new.keras")
        classes = {n: c for n, c in vars(zoo).items() if isinstance(c, type)}
        again = keras.saving.load_model(tmp_path / "new.keras", classes)
        assert rewriters.compare(new, again, x).max_abs == 0


def others():
    """Published models, the small ones by default, and all of `keras.applications`."""
    for name in sorted(files()) or ["k215_none"]:
        marks = () if name.startswith("k215_") else pytest.mark.slow
        yield pytest.param(name, id=name, marks=marks)
    for name in ALL:
        yield pytest.param(name, id=name, marks=pytest.mark.slow)


@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")
@pytest.mark.parametrize("name", list(others()))
def test_other_models(name):
    if name in ALL:
        model = make(name)
    else:
        require_shared("models")
        model = kerasnorm.load(files()[name], compile=False)
    x = rewriters.random_inputs(model, samples=2)
    new, report = kerasnorm.rewrite(model, weights="sphere", return_report=True)
    half = any("16" in m.compute_dtype for m in model._flatten_layers())
    limit = max(5e-3 if half else 1e-5, 10 * rewriters.rounding(model, x, draws=1))
    assert rewriters.compare(model, new, x).relative <= limit
    if report.plan.fidelity is Fidelity.EXACT:
        # Statistics of a small batch amplify rounding, layer by layer: some of these
        # models move by 1e-4 where the last place of the inputs does.
        y, moved = trained(model, x), trained(model, nudged(x))
        for a, b, c in zip(y, trained(new, x), moved, strict=True):
            assert relative([a], [b]) <= max(limit, 10 * relative([a], [c]))


def test_radii_follow_the_proof():
    model = ZOO["residual"]()
    new, report = kerasnorm.rewrite(model, weights="sphere", return_report=True)
    stem, conv = new.get_layer("stem"), new.get_layer("conv")
    assert (stem.radius, stem.per) == ("learned", "filter")
    assert (conv.radius, conv.per) == ("own", "filter")
    assert report.plan.fidelity is Fidelity.EXACT
    assert len(stem.trainable_weights) == 3  # kernel, bias, radius
    assert len(conv.trainable_weights) == 2


def test_beside_another_method():
    """Under group normalization filters of one group share their sphere."""
    model = ZOO["plain_functional"]()
    new = kerasnorm.rewrite(model, "gn", weights="sphere", groups=2)
    assert [new.get_layer(n).per for n in ("conv0", "conv1")] == [2, 2]
    plain = kerasnorm.rewrite(model, "gn", groups=2)
    assert rewriters.compare(plain, new).relative <= 1e-5
    new = kerasnorm.rewrite(model, "none", weights="sphere")
    assert "conv0" in {m.name for m in new.layers}


def test_radius_one_where_epsilon_matters():
    """Tiny filters: the epsilon has to shrink with them for inference to be exact."""

    def net(scale, norm):
        inputs = images()
        conv = layers.Conv2D(6, 3, name="conv")
        model = keras.Model(inputs, norm(conv(inputs)))
        randomize(model)
        kernel = model.get_layer("conv").kernel
        kernel.assign(kernel * scale)
        return model

    for scale in (1e-3, 30.0):
        model = net(scale, layers.BatchNormalization(name="norm"))
        model.get_layer("norm").moving_variance.assign(1e-6 * np.ones(6))
        new = kerasnorm.rewrite(model, weights="sphere", radius=1)
        assert rewriters.compare(model, new).relative <= 1e-5
        kernel = kernels_of(new.get_layer("conv").layer)[0]
        value = ops.convert_to_numpy(kernel.variable).reshape(-1, 6)
        np.testing.assert_allclose(np.linalg.norm(value, axis=0), 1, rtol=1e-5)
        epsilon = new.get_layer("norm").epsilon
        assert epsilon < 1e-3 if scale > 1 else epsilon == 1e-3
        # One group: one radius, one epsilon, exact in training too.
        model = net(scale, layers.GroupNormalization(1, name="norm"))
        new, report = kerasnorm.rewrite(
            model, weights="sphere", radius=1, return_report=True
        )
        assert report.plan.fidelity is Fidelity.EXACT
        assert rewriters.compare(model, new).relative <= 1e-5
    model = net(1.0, layers.GroupNormalization(2, name="norm"))
    refused = kerasnorm.plan(model, weights="sphere", radius=1).refused
    assert "radii from" in refused[0].detail
    assert refused[0].instead == 'radius="own"'


def test_spheres_of_spheres():
    """The rewritten model is scale invariant in v, by its own making."""
    new = kerasnorm.rewrite(ZOO["residual"](), weights="sphere")
    found = scale_invariant_weights(new, verify=rewriters.random_inputs(new))
    assert [f.granularity for f in found] == ["filter", "filter"]
    model = ZOO["plain_functional"]()
    new = kerasnorm.rewrite(model, "gn", weights="sphere", groups=2)
    kinds = {f.granularity for f in scale_invariant_weights(new)}
    assert kinds == {"group", "filter"}


@pytest.mark.parametrize("radius", [0, -1.0, "one", None])
def test_bad_radius(radius):
    with pytest.raises(kerasnorm.KerasNormError, match="radius"):
        kerasnorm.rewrite(ZOO["residual"](), weights="sphere", radius=radius)


def test_plans_of_one_map_do_not_share_what_follows_from_their_layers():
    """Batch normalization is blind to a filter's length, a dynamic tanh is not."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, name="conv"),
            keras.layers.BatchNormalization(name="norm"),
        ]
    )
    site_map = SiteMap(model)

    def note(method):
        plan = kerasnorm.plan(model, method, weights="sphere", site_map=site_map)
        return next(s.note for s in plan.steps if s.path == "conv")

    assert "learned radius" not in note("gn")
    assert "learned radius" in note("dyt")
