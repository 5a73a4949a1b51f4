"""Fits of swapped layers: exact where the student can be, refused where data is bad.

Expected gammas, betas and kernels come from NumPy in float64 (`lstsq` and explicit
loops), not from the package's own solvers.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import kerasnorm
from kerasnorm.common import data as reading
from kerasnorm.common.errors import KerasNormError
from kerasnorm.fitting import linear, solve
from kerasnorm.fitting.distill import Pupil
from kerasnorm.fitting.fit import apart, fit
from kerasnorm.fitting.judge import is_linear, kind


def randomize(model, rng):
    """Weights that do not depend on the backend; norms as after some training."""
    for layer in model._flatten_layers():
        if hasattr(layer, "kernel"):
            fan_in = np.prod(layer.kernel.shape[:-1])
            layer.kernel.assign(rng.normal(0, (2 / fan_in) ** 0.5, layer.kernel.shape))
        if type(layer) is layers.BatchNormalization:
            n = layer.gamma.shape[0]
            layer.set_weights(
                [
                    rng.uniform(0.5, 1.5, n),
                    rng.normal(0, 0.5, n),
                    rng.normal(0, 0.3, n),
                    rng.uniform(0.5, 2, n),
                ]
            )
    return model


def swap(model, make):
    """A copy of a graph model with `make(layer)` in place of each batch norm."""
    pairs = []

    def clone(layer):
        if type(layer) is layers.BatchNormalization:
            new = make(layer)
            pairs.append((layer.name, layer, new))
            return new
        return type(layer).from_config(layer.get_config())

    def call(layer, *args, **kwargs):
        kwargs.pop("mask", None)
        return layer(*args, **kwargs)

    student = keras.models.clone_model(model, clone_function=clone, call_function=call)
    for old, new in zip(model.layers, student.layers, strict=True):
        weights = old.get_weights()
        new.set_weights(weights[: len(new.get_weights())])
    return student, pairs


def group_norm(groups=2, **kwargs):
    return lambda old: layers.GroupNormalization(groups, name=old.name, **kwargs)


def small_cnn(norms=2, **head):
    x = inputs = keras.Input((8, 8, 3))
    for k in range(norms):
        x = layers.Conv2D(8, 3, padding="same", use_bias=False, name=f"conv{k}")(x)
        x = layers.BatchNormalization(name=f"bn{k}")(x)
        x = layers.ReLU(name=f"relu{k}")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(4, name="head", **head)(x))


def images(rng, n=64):
    # Samples of unlike contrast, without which group norm would be batch norm.
    return (rng.normal(size=(n, 8, 8, 3)) * rng.uniform(0.5, 2, (n, 1, 1, 1))).astype(
        "float32"
    )


def error(teacher, student, x):
    y, z = (m.predict(x, verbose=0) for m in (teacher, student))
    return float(np.mean((y - z) ** 2) / np.var(y))


# ------------------------------------------------------------------ solvers


def test_affine_is_the_regression_of_each_column(rng):
    z = rng.normal(size=(200, 5)) + 3
    y = z * rng.normal(size=5) + rng.normal(size=(200, 5))
    gamma, beta = solve.affine(solve.Sums(z, y))
    for c in range(5):
        design = np.stack([z[:, c], np.ones(200)], 1)
        expected = np.linalg.lstsq(design, y[:, c], rcond=None)[0]
        np.testing.assert_allclose([gamma[c], beta[c]], expected, rtol=1e-9)


def test_affine_without_center_scale_or_with_one_gamma(rng):
    z, y = rng.normal(size=(2, 100, 3)) + 1
    gamma, beta = solve.affine(solve.Sums(z, y), center=False, default=(1.0, 0.5))
    expected = [
        np.linalg.lstsq(z[:, [c]], y[:, c] - 0.5, rcond=None)[0] for c in (0, 1, 2)
    ]
    np.testing.assert_allclose(gamma, np.ravel(expected), rtol=1e-9)
    np.testing.assert_array_equal(beta, 0.5)
    gamma, beta = solve.affine(solve.Sums(z, y), scale=False, default=(2.0, 0.0))
    np.testing.assert_array_equal(gamma, 2.0)
    np.testing.assert_allclose(beta, (y - 2 * z).mean(0), rtol=1e-9)
    gamma, _ = solve.affine(solve.Sums(z, y), tied=True)
    centred = z - z.mean(0), y - y.mean(0)
    expected = np.linalg.lstsq(
        centred[0].reshape(-1, 1), centred[1].ravel(), rcond=None
    )
    np.testing.assert_allclose(gamma, expected[0][0], rtol=1e-9)


def test_affine_keeps_gamma_where_the_input_is_constant(rng):
    z = np.full((50, 2), 0.1, "float32")
    y = rng.normal(size=(50, 2))
    gamma, beta = solve.affine(solve.Sums(z, y), default=(1.5, 0.0))
    np.testing.assert_array_equal(gamma, 1.5)
    np.testing.assert_allclose(beta + 1.5 * z[0], y.mean(0), rtol=1e-6)


def test_sums_judge_a_solution_as_rows_do(rng):
    z, y = rng.normal(size=(2, 100, 3)) * 5 + 300
    sums = solve.Sums()
    for part in np.split(np.arange(100), 4):
        sums.add(z[part].astype("float32"), y[part].astype("float32"))
    gamma, beta = rng.normal(size=(2, 3))
    z, y = (v.astype("float32").astype("float64") for v in (z, y))
    error = np.mean(np.sum((gamma * z + beta - y) ** 2, 1))
    np.testing.assert_allclose(sums.error(gamma, beta), error, rtol=1e-9)
    gamma, beta = solve.affine(sums)
    left = np.sum((gamma * z + beta - y) ** 2) / np.sum((y - y.mean(0)) ** 2)
    np.testing.assert_allclose(sums.kept(gamma, beta), 1 - left, rtol=1e-9)


@pytest.mark.parametrize("intercept", [False, True])
def test_ridge_minimizes_its_objective(intercept, rng):
    x, r = rng.normal(size=(60, 2, 7)) + 0.5, rng.normal(size=(60, 2, 3))
    normal = solve.Normal(intercept)
    for part in np.split(np.arange(60), 3):
        normal.add(x[part], r[part], np.zeros(len(part), bool))
    change, shift = normal.solve(0.1)
    for g in range(2):
        a, b = (v[:, g] - v[:, g].mean(0) * intercept for v in (x, r))
        strength = np.sqrt(0.1 * np.sum(a**2) / 7)
        stacked = np.vstack([a, strength * np.eye(7)])
        expected = np.linalg.lstsq(
            stacked, np.vstack([b, np.zeros((7, 3))]), rcond=None
        )
        # The normal equations are formed in float32.
        np.testing.assert_allclose(change[g], expected[0], atol=1e-5)
        wanted = (r[:, g].mean(0) - x[:, g].mean(0) @ expected[0]) * intercept
        np.testing.assert_allclose(shift[g], wanted, atol=1e-5)


def test_the_pull_is_the_one_that_holds_on_rows_held_out(rng):
    # More inputs than rows: without a pull the residual is noise learnt by heart.
    x, truth = rng.normal(size=(90, 1, 60)), rng.normal(size=(60, 2)) * 0.1
    r = x @ truth + rng.normal(size=(90, 1, 2))
    normal = solve.Normal(False)
    normal.add(x, r, np.arange(90) >= 50)
    change, _ = normal.best()
    errors = [
        np.sum((r[50:, 0] - x[50:, 0] @ normal.solve(p)[0][0]) ** 2)
        for p in solve.PULLS
    ]
    error = np.sum((r[50:, 0] - x[50:, 0] @ change[0]) ** 2)
    np.testing.assert_allclose(error, min(errors), rtol=1e-5)
    assert error < errors[-1] / 1.5


def test_nothing_is_changed_that_does_not_hold_on_rows_held_out(rng):
    x, r = rng.normal(size=(50, 1, 60)), rng.normal(size=(50, 1, 2))
    normal = solve.Normal(False)
    r[40:] *= 1e-3  # where there is nothing to make up for
    normal.add(x, r, np.arange(50) >= 40)
    assert normal.best() is None


# ------------------------------------------------------------------- affine


def test_affine_matches_float64_on_every_position(rng):
    model = randomize(small_cnn(norms=1), rng)
    student, pairs = swap(model, group_norm())
    x = images(rng)
    result = fit(model, student, pairs, x, verbose=0)
    u = keras.Model(model.input, model.get_layer("conv0").output).predict(x, verbose=0)
    y = keras.Model(model.input, model.get_layer("bn0").output).predict(x, verbose=0)
    g = np.float64(u).reshape(64, 64, 2, 4)
    mean, var = g.mean((1, 3), keepdims=True), g.var((1, 3), keepdims=True)
    z, y = ((g - mean) / np.sqrt(var + 1e-3)).reshape(64, -1, 8), np.float64(y)
    solved, held = apart(64, 0, 1)
    assert len(held) == 12 and set(solved) | set(held) == set(range(64))
    out = [v.reshape(64, -1, 8)[held].reshape(-1, 8) for v in (z, y)]
    z, y = (v.reshape(64, -1, 8)[solved].reshape(-1, 8) for v in (z, y))
    rho = [np.corrcoef(z[:, c], y[:, c])[0, 1] for c in range(8)]
    gamma = rho * y.std(0) / z.std(0)
    new = student.get_layer("bn0")
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(new.gamma), gamma, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(new.beta),
        y.mean(0) - gamma * z.mean(0),
        rtol=1e-4,
        atol=1e-5,
    )
    beta = y.mean(0) - gamma * z.mean(0)
    lost = np.sum((gamma * out[0] + beta - out[1]) ** 2)
    lost /= np.sum((out[1] - out[1].mean(0)) ** 2)
    (site,) = result.sites
    assert site.after == pytest.approx(1 - lost, abs=1e-4)
    assert site.before < site.after
    assert site.rows == 52 * 64


def test_affine_is_exact_where_the_student_can_be(rng):
    model = randomize(small_cnn(), rng)

    def frozen(old):
        new = layers.BatchNormalization(name=old.name)
        return new

    student, pairs = swap(model, frozen)
    for _, old, new in pairs:
        # The same function of the input but for gamma and beta.
        weights = old.get_weights()
        new.set_weights([np.ones(8), np.zeros(8), weights[2] + 0.3, weights[3] * 2])
    x = images(rng)
    assert error(model, student, x) > 0.1
    result = fit(model, student, pairs, x, verbose=0)
    assert error(model, student, x) < 1e-8
    assert all(s.after > 1 - 1e-6 for s in result.sites)


def test_each_fit_is_better_than_the_one_before(rng):
    model = randomize(small_cnn(norms=3), rng)
    x, unseen = (
        (rng.normal(size=(n, 8, 8, 3)) + rng.normal(size=(n, 1, 1, 3))).astype(
            "float32"
        )
        for n in (512, 256)
    )
    for k in range(3):
        # Filters of unlike norm, which batch norm hides and group norm does not.
        conv, norm = model.get_layer(f"conv{k}"), model.get_layer(f"bn{k}")
        kernel = keras.ops.convert_to_numpy(conv.kernel)
        conv.kernel.assign(kernel * np.exp(rng.normal(0, 1, 8)))
        u = keras.Model(model.input, conv.output).predict(x, verbose=0)
        gamma, beta, _, _ = norm.get_weights()
        norm.set_weights([gamma, beta, u.mean((0, 1, 2)), u.var((0, 1, 2))])
    errors = {}
    for method in (None, "affine", "refit", "distill"):
        student, pairs = swap(model, group_norm())
        if method:
            options = {"epochs": 10, "learning_rate": 3e-3, "verbose": 0}
            result = fit(model, student, pairs, x, method, **options)
            assert result.method == method
        errors[method] = error(model, student, unseen)
    # Measured with this seed: 1.6, 0.47, 0.16, 0.08.
    assert errors["affine"] < errors[None] / 2, errors
    assert errors["refit"] < errors["affine"] / 2, errors
    assert errors["distill"] < errors["refit"] / 1.5, errors
    assert len(result.history["loss"]) == 10
    assert result.refitted == ("conv1", "conv2", "head")  # conv0 sees the same input


def test_groups_auto_keeps_most_variance(rng):
    model = randomize(small_cnn(norms=1), rng)
    x = images(rng)
    shares = {}
    for groups in (1, 2):  # of 8 channels: none smaller than four
        student, pairs = swap(model, group_norm(groups))
        shares[groups] = fit(model, student, pairs, x, verbose=0).sites[0].after
    student, pairs = swap(model, group_norm(4))
    (site,) = fit(model, student, pairs, x, choose=["groups"], verbose=0).sites
    assert student.get_layer("bn0").get_config()["groups"] == site.groups
    assert site.after == pytest.approx(shares[site.groups], abs=1e-6)
    # The choice is made on some of the positions.
    assert site.after == pytest.approx(max(shares.values()), abs=2e-3)


def test_fewer_rows_than_positions_still_agree(rng):
    model = randomize(small_cnn(norms=1), rng)
    x = images(rng, 512)
    gammas = []
    for seed in (0, 1):
        student, pairs = swap(model, group_norm())
        (site,) = fit(model, student, pairs, x, seed=seed, verbose=0).sites
        gammas.append(keras.ops.convert_to_numpy(student.get_layer("bn0").gamma))
        assert site.rows == 410 * 16  # of 512 samples, those not held out
    # Other positions, the same problem: the estimate's standard error is about 1/80.
    np.testing.assert_allclose(*gammas, rtol=0.05)
    assert not np.array_equal(*gammas)


def test_little_memory_means_fewer_samples(rng):
    model = randomize(small_cnn(norms=1), rng)
    student, pairs = swap(model, group_norm())
    x = images(rng, 1024)
    # Input, convolution and norm take about 2 to 4 kB per sample and model.
    result = fit(model, student, pairs, x, "refit", memory=4e6, verbose=0)
    used = int(result.notes[0].split()[0])
    assert 30 <= used < 500 and "widest layers" in result.notes[0]
    assert result.sites[0].after > result.sites[0].before
    # All of them came back for the dense layer behind the pooling.
    assert result.samples == 1024


def test_fresh_running_statistics_are_those_of_the_inputs(rng):
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(5), layers.LayerNormalization(name="norm")]
    )
    student = keras.Sequential(
        [keras.Input((6,)), layers.Dense(5), layers.BatchNormalization(name="norm")]
    )
    student.layers[0].set_weights(model.layers[0].get_weights())
    x = rng.normal(2, 3, (500, 6)).astype("float32")
    pairs = [("norm", model.layers[1], student.layers[1])]
    fit(model, student, pairs, x, verbose=0)
    u = keras.ops.convert_to_numpy(student.layers[0](x))
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(student.layers[1].moving_mean), u.mean(0), rtol=1e-4
    )


# ------------------------------------------------------------ kinds of model


def test_padded_positions_do_not_count(rng):
    inputs = keras.Input((10, 4))
    x = layers.Masking()(inputs)
    x = layers.BatchNormalization(name="bn")(x)
    model = randomize(keras.Model(inputs, x), rng)
    student, pairs = swap(
        model, lambda old: layers.LayerNormalization(name=old.name, epsilon=1e-3)
    )
    x = rng.normal(size=(50, 10, 4)).astype("float32") * [1, 2, 1, 3]
    lengths = rng.integers(1, 11, 50)
    for k, n in enumerate(lengths):
        x[k, n:] = 0
    result = fit(model, student, pairs, x, verbose=0)
    solved, _ = apart(50, 0, 1)
    assert result.sites[0].rows == lengths[solved].sum()
    valid = np.arange(10) < lengths[:, None]
    valid &= np.isin(np.arange(50), solved)[:, None]
    u = np.float64(x[valid])
    z = (u - u.mean(1, keepdims=True)) / np.sqrt(u.var(1, keepdims=True) + 1e-3)
    y = model.predict(x, verbose=0)[valid]
    expected = [np.polyfit(z[:, c], y[:, c], 1)[0] for c in range(4)]
    gamma = keras.ops.convert_to_numpy(student.get_layer("bn").gamma)
    np.testing.assert_allclose(gamma, expected, rtol=1e-4)


def test_a_shared_layer_is_solved_on_all_its_calls(rng):
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    shared = layers.BatchNormalization(name="bn")
    model = keras.Model({"a": a, "b": b}, [shared(a), shared(b)])
    randomize(model, rng)
    student, pairs = swap(model, lambda old: layers.LayerNormalization(name=old.name))
    x = {
        k: rng.normal(m, 2, (80, 6)).astype("float32") for k, m in (("a", 0), ("b", 3))
    }
    (site,) = fit(model, student, pairs, x, verbose=0).sites
    solved, _ = apart(80, 0, 1)
    assert site.rows == 2 * len(solved)
    u = np.float64(np.concatenate([x["a"][solved], x["b"][solved]]))
    z = (u - u.mean(1, keepdims=True)) / np.sqrt(u.var(1, keepdims=True) + 1e-3)
    y = np.concatenate([v[solved] for v in model.predict(x, verbose=0)])
    expected = [np.polyfit(z[:, c], y[:, c], 1)[0] for c in range(6)]
    gamma = keras.ops.convert_to_numpy(student.get_layer("bn").gamma)
    np.testing.assert_allclose(gamma, expected, rtol=1e-4)


def test_nested_models_and_residuals(rng):
    def block(name):
        x = inputs = keras.Input((8, 8, 4))
        x = layers.Conv2D(4, 3, padding="same", name=f"{name}_conv")(x)
        x = layers.BatchNormalization(name=f"{name}_bn")(x)
        return keras.Model(inputs, layers.Add()([inputs, layers.ReLU()(x)]), name=name)

    def build(make):
        x = inputs = keras.Input((8, 8, 3))
        x = layers.Conv2D(4, 1, name="stem")(x)
        for name in ("one", "two"):
            x = block(name)(x)
        return keras.Model(inputs, layers.GlobalAveragePooling2D()(x) * 2.0)

    model = randomize(build(None), rng)
    student = build(None)
    student.set_weights(model.get_weights())
    pairs = []
    replacements = {}
    for name in ("one", "two"):
        old, inner = model.get_layer(name), student.get_layer(name)
        new, (pair,) = swap(inner, group_norm())
        new.get_layer(pair[0]).set_weights(old.get_layer(pair[0]).get_weights()[:2])
        replacements[name] = new
        pairs.append((f"{name}/{pair[0]}", old.get_layer(pair[0]), pair[2]))
    inputs = keras.Input((8, 8, 3))
    x = student.get_layer("stem")(inputs)
    for name in ("one", "two"):
        replacements[name]._name = name
        x = replacements[name](x)
    student = keras.Model(inputs, layers.GlobalAveragePooling2D()(x) * 2.0)
    x = images(rng)
    before = error(model, student, x)
    result = fit(model, student, pairs, x, "refit", verbose=0)
    assert error(model, student, x) < before / 2
    assert [s.path for s in result.sites] == ["one/one_bn", "two/two_bn"]
    assert all(s.after > s.before for s in result.sites)


class Net(keras.Model):
    """Norms in a list, one of them called twice; a graph nobody recorded."""

    def __init__(self, make):
        super().__init__()
        self.dense = [layers.Dense(6, name=f"dense{k}") for k in range(2)]
        self.norms = [make(k) for k in range(2)]

    def call(self, inputs, training=None):
        x = self.dense[0](inputs["x"])
        x = keras.ops.relu(self.norms[0](x))
        x = self.norms[1](self.dense[1](x))
        return keras.ops.tanh(self.norms[1](x + inputs["y"]))


def test_a_subclassed_model_is_fitted_from_its_own_call(rng):
    x = {k: rng.normal(size=(300, 6)).astype("float32") for k in "xy"}
    model = Net(lambda k: layers.BatchNormalization(name=f"bn{k}"))
    student = Net(lambda k: layers.LayerNormalization(name=f"ln{k}"))
    model(x), student(x)
    randomize(model, rng)
    for a, b in zip(model.dense, student.dense, strict=True):
        b.set_weights(a.get_weights())
    pairs = [
        (f"norms/{k}", a, b)
        for k, (a, b) in enumerate(zip(model.norms, student.norms, strict=True))
    ]
    before = error(model, student, x)
    result = fit(model, student, pairs, x, "refit", verbose=0)
    assert error(model, student, x) < 0.6 * before
    # The first dense layer's inputs are the teacher's; what comes after differs.
    assert [path.split("/")[-1] for path in result.refitted] == ["dense1"]
    assert [s.rows for s in result.sites] == [240, 480]
    assert all(s.after > s.before and not s.note for s in result.sites)
    assert "call" not in vars(model.norms[0])  # no trace of the listening is left


def test_time_distributed_norm(rng):
    def build(norm):
        inputs = keras.Input((5, 6))
        return keras.Model(inputs, layers.TimeDistributed(norm, name="td")(inputs))

    model = randomize(build(layers.BatchNormalization(name="bn")), rng)
    student = build(layers.LayerNormalization(name="ln"))
    pairs = [("td/layer", model.layers[1].layer, student.layers[1].layer)]
    x = rng.normal(size=(64, 5, 6)).astype("float32")
    before = error(model, student, x)
    (site,) = fit(model, student, pairs, x, verbose=0).sites
    assert site.rows == 52 * 5
    assert error(model, student, x) < before


# ------------------------------------------------------------------ distill


def test_distill_leaves_frozen_layers_and_compile_state_alone(rng):
    model = randomize(small_cnn(activation="softmax"), rng)
    student, pairs = swap(model, group_norm())
    student.get_layer("conv1").trainable = False
    student.compile("sgd", "mse")
    optimizer = student.optimizer
    before = [np.copy(w) for w in student.get_layer("conv1").get_weights()]
    x = images(rng, 256)
    result = fit(model, student, pairs, x, "distill", epochs=6, verbose=0)
    after = student.get_layer("conv1").get_weights()
    np.testing.assert_array_equal(before[0], after[0])
    assert student.optimizer is optimizer
    assert int(optimizer.iterations) == 0
    assert result.history["loss"][-1] < result.history["loss"][0]
    # The outputs came nearer, so nothing else is said.
    assert result.notes == ("not solved, frozen: conv1",)
    assert not student.get_layer("conv1").trainable


def test_distill_that_takes_the_outputs_further_away_is_undone(rng):
    model = randomize(small_cnn(), rng)
    x = images(rng, 48)
    found = []
    for method, more in (("refit", {}), ("distill", {"learning_rate": 1.0})):
        student, pairs = swap(model, group_norm())
        result = fit(model, student, pairs, x, method, verbose=0, **more)
        found.append(student.get_weights())
    assert any("those of 'refit'" in note for note in result.notes)
    for refit, undone in zip(*found, strict=True):
        np.testing.assert_array_equal(refit, undone)


def test_layers_count_for_less_from_step_to_step(rng):
    model = randomize(small_cnn(), rng)
    student, pairs = swap(model, group_norm())
    x = images(rng, 8)

    def gap(y, p):
        return keras.ops.mean(keras.ops.square(y - p), -1)

    whole = Pupil(model, student, pairs, [gap])(x)
    outputs = Pupil(model, student, (), [gap])(x)
    sites = np.asarray(whole) - np.asarray(outputs)
    assert sites.min() > 1e-3
    pupil = Pupil(model, student, pairs, [gap], steps=4)
    for share in (1, 0.75, 0.5, 0.25, 0, 0):
        np.testing.assert_allclose(pupil(x), outputs + share * sites, rtol=1e-4)
        pupil(x, training=True)
    # In what a backend makes of `fit` as well.
    pupil = Pupil(model, student, pairs, [gap], steps=8)
    pupil.compile("sgd", loss=lambda _, p: p)
    pupil.fit(x, np.zeros(8, "float32"), batch_size=2, verbose=0)
    assert float(keras.ops.convert_to_numpy(pupil.share)) == 0.5


def test_kinds_of_output_are_told_apart_by_their_values(rng):
    logits = rng.normal(size=(20, 5))
    assert kind(logits) == "linear"
    assert kind(1 / (1 + np.exp(-logits))) == "sigmoid"
    e = np.exp(logits)
    assert kind(e / e.sum(1, keepdims=True)) == "softmax"


def test_values_of_a_linear_layer_are_no_probabilities(rng, monkeypatch):
    inputs = keras.Input((6,))
    hidden = layers.BatchNormalization()(layers.Dense(8)(inputs))
    kinds = ("linear", "sigmoid", "softmax")
    heads = [layers.Dense(2, name=n, activation=n) for n in kinds]
    within = keras.Model(hidden, [head(hidden) for head in heads])
    all_of_them = keras.Model(inputs, within(hidden))
    assert [is_linear(all_of_them, k) for k in range(3)] == [True, False, False]

    class Squashed(keras.Model):
        def call(self, x):
            return keras.ops.sigmoid(super().call(x))

    assert not is_linear(Squashed(inputs, heads[0](hidden)), 0)

    model = keras.Model(inputs, heads[0](hidden))
    heads[0].set_weights([np.full((8, 2), 1e-3), np.full(2, 0.5)])
    x = rng.normal(size=(64, 6)).astype("float32")
    assert kind(keras.ops.convert_to_numpy(model(x))) == "sigmoid"
    gaps = []
    start = Pupil.fit

    def noted(self, *args, **kwargs):
        gaps.extend(self.gaps)
        return start(self, *args, **kwargs)

    monkeypatch.setattr(Pupil, "fit", noted)
    kerasnorm.rewrite(model, "ln", data=x, fit="distill", verbose=False)
    (gap,) = gaps
    y = model(x)
    # No gap to itself, which the cross-entropy has, and one that grows beyond [0, 1].
    assert keras.ops.max(gap(y, y)) == 0
    assert keras.ops.min(gap(y, y + 2)) > keras.ops.max(gap(y, y + 1)) > 0


@pytest.mark.ci
def test_distill_of_several_outputs_is_reproducible(rng):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, name="conv")(inputs)
    x = layers.GlobalAveragePooling2D()(layers.BatchNormalization(name="bn")(x))
    outputs = {
        "class": layers.Dense(3, activation="softmax", name="class")(x),
        "score": layers.Dense(1, activation="sigmoid", name="score")(x),
        "place": layers.Dense(2, name="place")(x),
    }
    model = randomize(keras.Model(inputs, outputs), rng)
    x = images(rng, 128)
    losses = []
    for _ in range(2):
        student, pairs = swap(model, group_norm())
        result = fit(model, student, pairs, x, "distill", epochs=3, verbose=0)
        losses.append(result.history["loss"])
        assert not result.notes  # the outputs came nearer
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert losses[0][-1] < losses[0][0]


def mirrored(x):
    return x[:, :, ::-1]


def test_views_are_answered_as_the_original_answers_them_on_average(rng):
    model = randomize(small_cnn(norms=1), rng)
    student, _ = swap(model, group_norm())
    x = images(rng, 6)
    wanted, given = (
        [keras.ops.convert_to_numpy(m(v)) for v in (x, mirrored(x))]
        for m in (model, student)
    )
    target = (wanted[0] + wanted[1]) / 2
    assert np.abs(wanted[0] - target).max() > 1e-3  # it is not symmetric itself
    expected = np.mean([np.square(target - p).mean(1) for p in given], 0)

    def gap(y, p):
        return keras.ops.mean(keras.ops.square(y - p), -1)

    pupil = Pupil(model, student, (), [gap], views=(mirrored,))
    np.testing.assert_allclose(pupil(x), expected, rtol=1e-4, atol=1e-6)


def test_distill_with_views_trains(rng):
    model = randomize(small_cnn(activation="softmax"), rng)
    student, pairs = swap(model, group_norm())
    x = images(rng, 128)
    options = {"epochs": 2, "views": mirrored, "verbose": 0}
    result = fit(model, student, pairs, x, "distill", **options)
    losses = result.history["loss"]
    assert losses[1] < losses[0]
    assert not result.notes  # the outputs came nearer


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (lambda x: x[:, :7], "gives inputs like those it gets"),
        (lambda x: x[:1], "gives inputs like those it gets"),
        (lambda x: None, "gives inputs like those it gets"),
        (["flip"], "gives inputs like those it gets"),
    ],
)
def test_views_unlike_the_inputs_are_refused(views, message, rng):
    model = randomize(small_cnn(norms=1), rng)
    student, pairs = swap(model, group_norm())
    before = [np.copy(w) for w in student.get_weights()]
    with pytest.raises(KerasNormError, match=message):
        fit(model, student, pairs, images(rng), "distill", views=views, verbose=0)
    for old, new in zip(before, student.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_views_of_outputs_that_have_positions_are_refused(rng):
    inputs = keras.Input((8, 8, 3))
    x = layers.BatchNormalization(name="bn")(layers.Conv2D(4, 3, name="conv")(inputs))
    model = randomize(keras.Model(inputs, x), rng)
    student, pairs = swap(model, group_norm())
    with pytest.raises(KerasNormError, match="may move with the inputs"):
        fit(model, student, pairs, images(rng), "distill", views=mirrored, verbose=0)


# --------------------------------------------------------------------- data


def bad_data(x):
    nan, inf = np.copy(x), np.copy(x)
    nan[3, 2, 2, 1], inf[-1, 0, 0, 0] = np.nan, np.inf
    return {
        "nan": (nan, "NaN"),
        "inf": (inf, "NaN or infinite"),
        "empty": (x[:0], "no data"),
        "no batches": (iter([]), "no data"),
        "shape": (x[:, :7], "does not fit"),
        "rank": (x[0], "does not fit"),
        "scalar": (np.float32(3), "number"),
        "strings": (np.full(x.shape, "a"), "no numbers"),
        "objects": (x.astype(object), "no numbers"),
        "uneven": ([x.tolist(), x[:2].tolist()], "no array"),
        "two inputs": ([x, x], "number of inputs"),
        "keys": ({"picture": x}, "lacks inputs"),
        "kind": (object(), "cannot read"),
    }


@pytest.mark.parametrize("case", list(bad_data(np.zeros((5, 8, 8, 3)))))
@pytest.mark.parametrize("method", ["affine", "distill"])
def test_bad_data_is_refused_and_nothing_changed(case, method, rng):
    model = randomize(small_cnn(norms=1), rng)
    student, pairs = swap(model, group_norm())
    before = [np.copy(w) for m in (model, student) for w in m.get_weights()]
    bad, message = bad_data(images(rng))[case]
    with pytest.raises(KerasNormError, match=message):
        fit(model, student, pairs, bad, method, verbose=0)
    after = [w for m in (model, student) for w in m.get_weights()]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "option",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"batch_size": 0},
        {"samples": 0},
        {"samples": -8},
        {"samples": True},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"learning_rate": "fast"},
        {"memory": 0},
        {"seed": 1.5},
        {"augment": "flip"},
    ],
    ids=str,
)
def test_options_that_train_nothing_are_refused_and_nothing_changed(option, rng):
    model = randomize(small_cnn(norms=1), rng)
    student, pairs = swap(model, group_norm())
    before = [np.copy(w) for w in student.get_weights()]
    (name,) = option
    with pytest.raises(KerasNormError, match=f"{name}="):
        fit(model, student, pairs, images(rng), "distill", verbose=0, **option)
    for old, new in zip(before, student.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_an_unknown_fit_is_refused(rng):
    with pytest.raises(KerasNormError, match=r"affine, refit, distill"):
        fit(None, None, [], None, "magic")


def test_every_kind_of_source_gives_the_same_inputs(rng):
    model = small_cnn(norms=1)
    x = images(rng, 20)
    y = np.zeros(20)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 4

        def __getitem__(self, k):
            return x[5 * k : 5 * k + 5], y[5 * k : 5 * k + 5]

    def generator():
        while True:  # endless, as Keras generators are
            yield from ((x[k : k + 5], y[k : k + 5]) for k in range(0, 20, 5))

    name = model.inputs[0].name
    sources = [x, [x], (x, y), {name: x}, Batches(), generator()]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        sources.append(tf.data.Dataset.from_tensor_slices((x, y)).batch(7))
    for source in sources:
        found = reading.collect(model, source, 20)
        np.testing.assert_array_equal(found.arrays[0], x)
    found = reading.collect(model, iter([x]), 7)
    np.testing.assert_array_equal(found.arrays[0], x[:7])


def test_few_samples_of_arrays_come_from_all_of_them():
    """They may be sorted by class."""
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    x = np.arange(100.0)[:, None]
    for data in (x, [x], (x, x)):
        found = reading.collect(model, data, 4)
        np.testing.assert_array_equal(found.arrays[0][:, 0], [0, 33, 66, 99])


def test_a_stream_larger_than_memory_is_cut(rng):
    x = images(rng, 10)
    found = reading.collect(small_cnn(), iter([x] * 100), None, memory=5 * x.nbytes)
    assert found.cut
    assert 50 <= len(found) <= 60


def test_inputs_by_name_reach_the_right_place(rng):
    a, b = keras.Input((2,), name="a"), keras.Input((3,), name="b")
    model = keras.Model([b, a], layers.Concatenate()([a, b]))
    x = {"a": rng.normal(size=(4, 2)), "b": rng.normal(size=(4, 3)), "c": np.zeros(4)}
    found = reading.collect(model, x)
    np.testing.assert_array_equal(found.arrays[0], x["b"])
    np.testing.assert_array_equal(model(found.pack(found.arrays)).shape, (4, 5))


def test_batches_of_unlike_lengths_are_refused(rng):
    model = keras.Sequential([keras.Input((None, 3)), layers.Dense(2)])
    batches = (rng.normal(size=(4, n, 3)) for n in (5, 6))
    with pytest.raises(KerasNormError, match="differ in more than"):
        reading.collect(model, batches, 8)


def test_a_source_without_batches_is_empty_and_not_endless():
    class Nothing(keras.utils.PyDataset):
        def __len__(self):
            return 0

        def __getitem__(self, k):
            raise AssertionError("there is none")

    with pytest.raises(KerasNormError, match="no data"):
        reading.collect(small_cnn(), Nothing())


def test_an_endless_source_is_cut_and_said_so(rng):
    x = images(rng, 16)

    class Endless(keras.utils.PyDataset):
        @property
        def num_batches(self):
            return None

        def __getitem__(self, k):
            return (x,)

    model = randomize(small_cnn(norms=1), rng)
    student, pairs = swap(model, group_norm())
    memory = 16 * x.nbytes
    done = fit(
        model, student, pairs, Endless(), "distill", memory=memory, epochs=1, verbose=0
    )
    assert any("samples were used" in note for note in done.notes)


def test_integers_are_seen_as_the_model_sees_them(rng):
    """Plain operators on bytes would wrap around."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv")((inputs * 2 - 255) / 128)
    model = randomize(keras.Model(inputs, layers.BatchNormalization(name="bn")(x)), rng)
    bytes_ = rng.integers(0, 256, (32, 8, 8, 3)).astype("uint8")
    gammas = []
    for data in (bytes_, bytes_.astype("float32")):
        student, pairs = swap(model, group_norm())
        fit(model, student, pairs, data, verbose=0)
        gammas.append(keras.ops.convert_to_numpy(student.get_layer("bn").gamma))
    np.testing.assert_array_equal(*gammas)


def test_what_is_left_out_for_memory_is_not_the_end_of_sorted_data(rng):
    """Half of the samples are dark, and come last."""
    x = images(rng, 400)
    x[200:] += 20
    model = randomize(small_cnn(norms=1), rng)
    student, pairs = swap(model, group_norm())
    largest = 4 * 8 * 8 * 8
    done = fit(model, student, pairs, x, memory=100 * 6 * largest, verbose=0)
    assert int(done.notes[0].split()[0]) < 200
    shuffled, pairs = swap(model, group_norm())
    fit(model, shuffled, pairs, rng.permutation(x), verbose=0)
    assert error(model, student, x) < 2 * error(model, shuffled, x)


def test_constraints_hold_after_a_fit(rng):
    inputs = keras.Input((6,))
    x = layers.Dense(8, kernel_constraint="non_neg", name="dense")(inputs)
    x = layers.BatchNormalization(gamma_constraint="non_neg", name="bn")(x)
    model = randomize(keras.Model(inputs, x), rng)
    kernel = model.get_layer("dense").kernel
    kernel.assign(keras.ops.abs(kernel))
    student, pairs = swap(
        model,
        lambda old: layers.LayerNormalization(
            name=old.name, gamma_constraint="non_neg"
        ),
    )
    fit(model, student, pairs, rng.normal(size=(64, 6)), "refit", verbose=0)
    for v in (student.get_layer("dense").kernel, student.get_layer("bn").gamma):
        assert keras.ops.convert_to_numpy(v).min() >= 0


def test_a_list_of_inputs_is_distilled(rng):
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    x = layers.Dense(8, name="dense")(layers.Concatenate()([a, b]))
    model = randomize(keras.Model([a, b], layers.BatchNormalization(name="bn")(x)), rng)
    student, pairs = swap(model, lambda old: layers.LayerNormalization(name=old.name))
    data = list(rng.normal(size=(2, 64, 4)))
    done = fit(model, student, pairs, data, "distill", epochs=1, verbose=0)
    assert len(done.history["loss"]) == 1


def test_probabilities_without_an_axis_are_distilled(rng):
    inputs = keras.Input((4,))
    x = layers.BatchNormalization(name="bn")(layers.Dense(8, name="dense")(inputs))
    x = layers.Dense(1, activation="sigmoid", name="head")(x)
    model = randomize(keras.Model(inputs, layers.Reshape(())(x)), rng)
    student, pairs = swap(model, lambda old: layers.LayerNormalization(name=old.name))
    data = rng.normal(size=(64, 4))
    done = fit(model, student, pairs, data, "distill", epochs=1, verbose=0)
    assert np.isfinite(done.history["loss"]).all()


def test_gamma_and_beta_that_are_not_the_last_are_left_alone(rng):
    """Batch normalization with its gamma and beta, then group normalization."""
    inputs = keras.Input((8, 8, 3))
    x = layers.BatchNormalization(name="bn")(layers.Conv2D(8, 3, name="conv")(inputs))
    model = randomize(keras.Model(inputs, x), rng)
    new, report = kerasnorm.rewrite(
        model,
        "batch_then_group",
        data=images(rng),
        fit="affine",
        return_report=True,
        verbose=False,
    )
    (site,) = report.fit.sites
    assert "not fitted" in site.note
    old = model.get_layer("bn").gamma
    np.testing.assert_array_equal(new.get_layer("bn").gamma, old)


@pytest.mark.parametrize("method", ["batch_layer", "time_specific"])
def test_statistics_of_several_steps_begin_with_those_of_all(method, rng):
    inputs = keras.Input((7, 4))
    x = layers.LayerNormalization(name="ln")(layers.Dense(8, name="dense")(inputs))
    model = keras.Model(inputs, x)
    new = kerasnorm.rewrite(
        model, method, data=rng.normal(3, 1, (32, 7, 4)), fit="affine", verbose=False
    )
    assert np.any(keras.ops.convert_to_numpy(new.get_layer("ln").moving_mean))


def test_convolutions_with_channels_first_are_the_same_problem(rng):
    """By its numbers alone: TensorFlow runs such convolutions on a GPU only."""
    last, first = (
        layers.Conv2D(5, 3, 2, "same", data_format=f"channels_{where}")
        for where in ("last", "first")
    )
    x = rng.normal(size=(2, 7, 8, 4)).astype("float32")
    y = keras.ops.convert_to_numpy(last(x))
    first.build((None, 4, 7, 8))
    first.set_weights(last.get_weights())
    problem = linear.problem(first)
    given, wanted = (np.moveaxis(v, -1, 1) for v in (x, y))
    wanted = problem.channels_last(wanted)
    picked = np.array([[0, 5, 9], [3, 3, 15]])
    rows = problem.rows(given, wanted.shape, picked)
    targets = problem.targets(first, given, wanted, picked)
    np.testing.assert_allclose(problem.forward(rows), targets, rtol=1e-4, atol=1e-5)
    expected = np.take_along_axis(y.reshape(2, -1, 5), picked[..., None], 1)
    np.testing.assert_array_equal(targets, expected.reshape(-1, 5))


def linear_layers():
    """Layers with a least-squares problem, over what changes which inputs meet."""
    for stride, dilation in ((1, 1), (2, 1), (4, 1), (1, 2)):
        for padding in ("same", "valid"):
            given = {"strides": stride, "dilation_rate": dilation, "padding": padding}
            yield layers.Conv2D(6, (2, 3), **given)
            yield layers.Conv2D(6, 3, groups=2, **given)
            yield layers.DepthwiseConv2D(3, depth_multiplier=2, **given)
            yield layers.SeparableConv2D(5, 3, depth_multiplier=2, **given)
            yield layers.Conv2DTranspose(5, (3, 2), **given)
            yield layers.Conv1DTranspose(5, 3, **given)
    yield layers.Conv1D(4, 3, padding="causal", dilation_rate=2)
    yield layers.DepthwiseConv1D(3)
    yield layers.SeparableConv1D(4, 3, 2)
    yield layers.Conv3D(4, 2, 2, groups=2)
    yield layers.Conv3DTranspose(3, 3, 2, "same")
    yield layers.Dense(5)


def test_linear_layers_are_rows_times_matrices(rng):
    for layer in linear_layers():
        rank = getattr(layer, "rank", 2)
        x = rng.normal(size=(2, *(6, 7, 5)[:rank], 4)).astype("float32")
        layer.build(x.shape)
        for v in layer.variables:
            v.assign(rng.normal(size=v.shape))
        y = keras.ops.convert_to_numpy(layer(x))
        problem = linear.problem(layer)
        picked = np.tile(np.arange(np.prod(y.shape[1:-1])), (len(x), 1))
        rows = problem.rows(x, y.shape, picked)
        wanted = y.reshape(-1, y.shape[-1])
        message = str(layer.get_config())
        np.testing.assert_allclose(
            problem.forward(rows), wanted, rtol=1e-4, atol=1e-4, err_msg=message
        )
        # Without a pull, what the layer gave is found again from another start.
        kernel = keras.ops.convert_to_numpy(problem.kernel)
        problem.kernel.assign(kernel + 0.1 * rng.normal(size=kernel.shape))
        normal = solve.Normal(layer.use_bias)
        residual = problem.residual(rows, wanted)
        normal.add(rows, residual, np.zeros(len(rows), bool))
        assert problem.update(*normal.solve(0.0))
        np.testing.assert_allclose(
            layer(x), y, rtol=2e-3, atol=2e-3 * np.abs(y).max(), err_msg=message
        )


def test_what_is_not_solved_is_told(rng):
    inputs = x = keras.Input((8, 4))
    x = layers.BatchNormalization(name="bn")(layers.Conv1D(8, 3, name="first")(x))
    shared = layers.Dense(8, name="shared")
    x = shared(shared(x))
    x = layers.Dense(8, name="frozen", trainable=False)(x)
    x = layers.GRU(4, name="gru")(layers.DepthwiseConv1D(3, name="depthwise")(x))
    model = randomize(keras.Model(inputs, layers.Dense(2, name="head")(x)), rng)
    data = rng.normal(size=(512, 8, 4)) * rng.uniform(0.3, 3, (512, 1, 1))
    _, report = kerasnorm.rewrite(
        model, "ln", data=data, fit="refit", return_report=True, verbose=False
    )
    assert report.fit.refitted == ("depthwise", "head")
    for told in (
        "called several times: shared",
        "frozen: frozen",
        "no problem of least squares: GRU: gru",
    ):
        assert told in report.summary()


def test_values_too_large_to_solve_with_are_left(rng):
    inputs = keras.Input((6,))
    x = layers.BatchNormalization(name="bn")(layers.Dense(5, name="first")(inputs))
    model = randomize(keras.Model(inputs, layers.Dense(2, name="head")(x)), rng)
    model.get_layer("bn").gamma.assign(np.full(5, 1e25))
    data = rng.normal(size=(64, 6)).astype("float32")
    new, report = kerasnorm.rewrite(
        model, "ln", data=data, fit="refit", return_report=True, verbose=False
    )
    assert "values too large: head" in report.summary()
    assert all(np.isfinite(w).all() for w in new.get_weights())


def test_a_nan_is_told_by_its_place_among_all_samples(rng):
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    data = rng.normal(size=(3000, 4))
    data[2001] = np.nan
    with pytest.raises(KerasNormError, match=r"1 of 3000 samples, the first .* 2001"):
        kerasnorm.rewrite(model, "ln", data=data, verbose=False)


def test_inputs_in_structures_within_structures(rng):
    a, b = keras.Input((5,)), keras.Input((5,), name="u")
    x = layers.Dense(4, name="dense")(layers.Concatenate()([a, b]))
    model = keras.Model([a, {"u": b}], layers.BatchNormalization(name="bn")(x))
    data = rng.normal(size=(40, 5)).astype("float32")
    given = [data, {"u": 2 * data}]
    _, report = kerasnorm.rewrite(
        randomize(model, rng), "ln", data=given, return_report=True, verbose=False
    )
    assert report.fit.samples == 40 and report.rho_squared["bn"] > 0.5
    with pytest.raises(KerasNormError, match="another structure"):
        kerasnorm.rewrite(model, "ln", data=[data, data], verbose=False)


@pytest.mark.parametrize("fit", ["affine", "refit", "distill"])
@pytest.mark.parametrize("kind", ["reshaped", "stateful"])
def test_models_that_take_batches_of_one_size(fit, kind, rng):
    size = 8
    inputs = keras.Input(batch_shape=(size, 6, 6))
    x = keras.layers.Dense(8, name="first")(inputs)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    if kind == "reshaped":
        x = keras.ops.reshape(x, (size, 48))
    else:
        x = keras.layers.LSTM(5, stateful=True)(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    data = rng.normal(size=(45, 6, 6)).astype("float32")
    options = {"epochs": 1} if fit == "distill" else {}
    new = kerasnorm.rewrite(model, "ln", data=data, fit=fit, fit_options=options)
    assert new.predict(data[:40], batch_size=size, verbose=0).shape == (40, 3)
    with pytest.raises(kerasnorm.KerasNormError, match="fewer samples"):
        kerasnorm.rewrite(model, "ln", data=data[:5], fit=fit)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="only TensorFlow has strings"
)
@pytest.mark.parametrize("source", ["arrays", "tensors", "dataset"])
@pytest.mark.parametrize("how", ["affine", "refit", "distill"])
def test_text_beside_numbers(how, source, rng):
    import tensorflow as tf

    text = np.array([f"{'ab'[k % 2]} {'cdefg'[k % 5]} {k % 7}" for k in range(200)])
    numbers = rng.normal(size=(200, 3)).astype("float32")
    vectorize = layers.TextVectorization(20, output_sequence_length=3)
    vectorize.adapt(text)
    inputs = keras.Input((1,), dtype="string", name="text"), keras.Input((3,))
    x = layers.Embedding(20, 8)(vectorize(inputs[0]))
    x = layers.Concatenate()([layers.Flatten()(x), inputs[1]])
    x = layers.BatchNormalization(name="bn")(layers.Dense(8)(x))
    model = keras.Model(list(inputs), layers.Dense(3)(layers.ReLU()(x)))
    randomize(model, rng)
    data = [text, numbers] if source == "arrays" else [tf.constant(text), numbers]
    if source == "dataset":
        rows = (tf.constant(text[:, None]), numbers)
        data = tf.data.Dataset.from_tensor_slices((rows,)).batch(64)
    options = {"epochs": 1, "batch_size": 64} if how == "distill" else {}
    new, report = kerasnorm.rewrite(
        model,
        "gn",
        groups=2,
        data=data,
        fit=how,
        fit_options=options,
        return_report=True,
        verbose=False,
    )
    bare = kerasnorm.rewrite(model, "gn", groups=2)
    x = [tf.constant(text[:, None]), tf.constant(numbers)]
    assert error(model, new, x) < 0.5 * error(model, bare, x)
    assert report.fit.samples == 200


def test_what_is_no_string_where_the_model_takes_strings():
    inputs = keras.Input((1,), dtype="string", name="text")
    model = keras.Model(inputs, layers.Identity()(inputs))
    for wrong in (np.zeros((4, 1)), np.array([["a"], [None], ["b"]], object)):
        with pytest.raises(KerasNormError, match="'text' holds no strings"):
            reading.collect(model, wrong)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1)])
def test_the_last_axis_of_inputs_as_keras_takes_it(shape, rng):
    inputs = keras.Input((1,))
    model = keras.Model(inputs, layers.Dense(2)(inputs))
    x = rng.normal(size=shape).astype("float32")
    (array,) = reading.collect(model, x).arrays
    np.testing.assert_array_equal(array, x.reshape(4, 1))
    model.predict(x, verbose=0)
