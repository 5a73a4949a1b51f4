"""What a fit chooses, what it says of itself, and how much memory it takes.

Expected values are computed in NumPy from the models' own outputs.
"""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
from keras import layers

import kerasnorm
from kerasnorm.common import data as reading
from kerasnorm.fitting import fit as fitting
from kerasnorm.fitting.judge import Judge, interval


def network(rng, norms=2, filters=16):
    """A small residual network with batch norms as after some training."""
    x = inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(filters, 3, padding="same", use_bias=False, name="stem")(x)
    x = layers.ReLU()(layers.BatchNormalization(name="bn")(x))
    for k in range(norms):
        y = layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"c{k}")(x)
        y = layers.BatchNormalization(name=f"bn{k}")(y)
        x = layers.ReLU()(layers.Add()([x, layers.Dropout(0.1)(y)]))
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, layers.Dense(5, name="head")(x))
    for layer in model.layers:
        if hasattr(layer, "kernel"):
            fan_in = np.prod(layer.kernel.shape[:-1])
            layer.kernel.assign(rng.normal(0, (2 / fan_in) ** 0.5, layer.kernel.shape))
        if isinstance(layer, layers.BatchNormalization):
            n = layer.gamma.shape[0]
            uniform = rng.uniform(0.3, 3, n), rng.normal(0, 0.5, n)
            layer.set_weights([*uniform, rng.normal(0, 0.3, n), rng.uniform(0.5, 2, n)])
    return model


def images(rng, n):
    contrast = rng.uniform(0.3, 2, (n, 1, 1, 1))
    return (rng.normal(size=(n, 12, 12, 3)) * contrast).astype("float32")


def answers(model, x):
    return model.predict(x, verbose=0)


def gap(model, new, x):
    wanted, given = answers(model, x), answers(new, x)
    return np.mean((wanted - given) ** 2) / np.mean(np.var(wanted, 0))


def swapped(model, method, data, fit="affine", **more):
    return kerasnorm.rewrite(
        model, method, data=data, fit=fit, return_report=True, verbose=False, **more
    )


# ------------------------------------------------------------------- choices


@pytest.mark.parametrize("method", ["gn", "ln", "rms", "frn", "in", "pixel"])
def test_epsilon_draws_the_variance_towards_its_mean(method, rng):
    model, x = network(rng), images(rng, 96)
    plain, _ = swapped(model, method, x, epsilon=1e-3)
    new, report = swapped(model, method, x)
    chosen = [s for s in report.fit.sites if s.epsilon is not None]
    assert chosen, report.table()
    assert gap(model, new, images(rng, 200)) < gap(model, plain, images(rng, 200))
    for site in chosen:
        layer = new.get_layer(site.path)
        assert layer.get_config()["epsilon"] == site.epsilon == layer.epsilon
        assert 1 / 5 <= site.normalizes < 1
    assert "of what it is divided by" in report.summary()
    assert "epsilon=" in report.table()


def test_epsilon_is_that_share_of_the_mean_variance(rng):
    model, x = network(rng, norms=0), images(rng, 60)
    _, report = swapped(model, "ln", x)
    (site,) = report.fit.sites
    u = np.float64(keras.Model(model.input, model.get_layer("stem").output)(x))
    mean = np.mean(np.var(u, (1, 2, 3)))
    shares = (site.epsilon - 1e-3) / mean
    assert min(abs(shares - s) for s in (0.5, 1, 2)) < 0.1


@pytest.mark.parametrize("method", ["lp", "l1", "dyt", "bn"])
def test_epsilon_stays_where_it_is_something_else(method, rng):
    model, x = network(rng, norms=1), images(rng, 40)
    if method == "bn":
        model = swapped(model, "gn", x)[0]
    _, report = swapped(model, method, x)
    assert all(s.epsilon is None for s in report.fit.sites), report.table()


def test_what_is_given_is_not_chosen(rng):
    model, x = network(rng), images(rng, 40)
    new, report = swapped(model, "gn", x, groups=4, epsilon=1e-4)
    for site in report.fit.sites:
        assert site.groups is site.epsilon is None
        config = new.get_layer(site.path).get_config()
        assert (config["groups"], config["epsilon"]) == (4, 1e-4)
    new, report = swapped(model, "gn", x, groups="paper")
    assert {new.get_layer(s.path).groups for s in report.fit.sites} == {2}
    _, report = swapped(model, "in", x)
    assert all(s.groups is None for s in report.fit.sites)


def test_auto_needs_data(rng):
    model = network(rng)
    for name in ("groups", "epsilon"):
        with pytest.raises(kerasnorm.KerasNormError, match=f"chooses {name}"):
            kerasnorm.rewrite(model, "gn", **{name: "auto"})


def test_what_was_chosen_survives_saving(rng, tmp_path):
    model, x = network(rng), images(rng, 64)
    new, _ = swapped(model, "gn", x, fit="refit")
    new.save(tmp_path / "new.keras")
    again = keras.saving.load_model(tmp_path / "new.keras")
    np.testing.assert_allclose(answers(again, x), answers(new, x), rtol=1e-6)


# ------------------------------------------------------------------ held out


@pytest.mark.parametrize("samples", [50, 200])
@pytest.mark.parametrize("method", ["ln", "frn"])
def test_more_fit_is_never_worse_on_samples_held_out(method, samples, rng):
    model, x = network(rng), images(rng, samples)
    _, held = fitting.apart(samples, 0, 1)
    judge = Judge(model, reading.collect(model, x[held]))
    steps = [kerasnorm.rewrite(model, method, verbose=False, epsilon=1e-3)]
    for fit in ("affine", "refit", "distill"):
        more = {"fit_options": {"epochs": 1}} if fit == "distill" else {}
        steps.append(swapped(model, method, x, fit, epsilon=1e-3, **more)[0])
    gaps = [judge.gap(m) for m in steps]
    assert all(b <= a * 1.001 + 1e-6 for a, b in itertools.pairwise(gaps)), gaps


def test_a_step_that_does_not_hold_is_undone_and_said(rng, monkeypatch):
    """A refit that spoils the kernels on the samples that it sees."""
    model, x = network(rng), images(rng, 60)
    affine, _ = swapped(model, "ln", x)
    walk = fitting.Walk.run

    def spoil(self):
        walk(self)
        if self.refit:
            head = self.student.program.instructions[-1].operation
            head.kernel.assign(head.kernel * 3)

    monkeypatch.setattr(fitting.Walk, "run", spoil)
    new, report = swapped(model, "ln", x, "refit")
    np.testing.assert_allclose(
        answers(new, x), answers(affine, x), rtol=1e-5, atol=1e-6
    )
    assert "those of 'affine'" in report.summary()
    assert report.fit.refitted == ()


def test_nothing_is_solved_on_samples_held_out(rng):
    """Whatever they are, the solution is the same; what is chosen may not be."""
    model, x = network(rng, norms=0), images(rng, 100)
    _, held = fitting.apart(100, 0, 1)
    gammas = []
    for scale in (1.0, 1.001):
        other = x.copy()
        other[held] *= scale
        new, _ = swapped(model, "ln", other, epsilon=1e-3)
        gammas.append(keras.ops.convert_to_numpy(new.get_layer("bn").gamma))
    np.testing.assert_allclose(*gammas, rtol=1e-6)


def test_few_samples_are_all_solved_on(rng):
    model = network(rng, norms=0)
    _, report = swapped(model, "ln", images(rng, 9), epsilon=1e-3)
    assert report.fit.agreement == () and report.fit.sites[0].rows == 9 * 144


# ----------------------------------------------------------------- agreement


def test_agreement_is_what_the_outputs_say(rng):
    model, x = network(rng), images(rng, 150)
    new, report = swapped(model, "frn", x)
    _, held = fitting.apart(150, 0, 1)
    same = answers(model, x[held]).argmax(1) == answers(new, x[held]).argmax(1)
    (told,) = report.fit.agreement
    assert told.samples == len(held) == 30
    assert told.rate == pytest.approx(same.mean())
    assert f"of {len(held)} samples held out" in report.summary()


@pytest.mark.parametrize(("rate", "n"), [(0.95, 120), (0.6, 40), (0.99, 400)])
def test_the_interval_covers_the_true_rate(rate, n, rng):
    found = [interval(k / n, n) for k in rng.binomial(n, rate, 2000)]
    covered = np.mean([low <= rate <= high for low, high in found])
    assert 0.92 <= covered <= 0.99


def test_each_output_has_its_own(rng):
    model = network(rng)
    features = model.layers[-2].output
    outputs = {
        "classes": layers.Dense(3, activation="softmax", name="classes")(features),
        "value": layers.Dense(1, name="value")(features),
        "flags": layers.Dense(2, activation="sigmoid", name="flags")(features),
    }
    model = keras.Model(model.input, outputs)
    _, report = swapped(model, "ln", images(rng, 80))
    told = {a.output: a for a in report.fit.agreement}
    assert set(told) == set(outputs)
    assert told["value"].rate is None and 0 <= told["value"].kept <= 1
    assert told["classes"].low <= told["classes"].rate <= told["classes"].high
    assert "value: keeps" in report.summary()


def test_a_low_agreement_warns_with_what_to_try(rng):
    """The mean that a pooling takes is what instance normalization takes away."""
    model = network(rng, norms=0)
    pooled = layers.GlobalAveragePooling2D()(model.get_layer("bn").output)
    head = layers.Dense(5, use_bias=False)
    model = keras.Model(model.input, head(pooled))
    x = images(rng, 100)
    means = np.float64(keras.Model(model.input, pooled)(x))
    # One class for each of five directions, seen from the middle.
    head.kernel.assign(np.linalg.svd(means - means.mean(0))[2][:5].T)
    head.kernel.assign(
        head.kernel
        - np.outer(means.mean(0), means.mean(0) @ head.kernel)
        / np.sum(means.mean(0) ** 2)
    )
    with pytest.warns(UserWarning, match='answers as the original.*Try fit="refit"'):
        swapped(model, "in", x, epsilon=1e-3, force=True)


# -------------------------------------------------------------------- memory


def test_late_layers_see_all_samples_whatever_the_memory(rng):
    """The kernel behind the pooling is solved on all, though few fit further up."""
    model, x = network(rng), images(rng, 400)
    results = [
        swapped(model, "ln", x, "refit", fit_options={"memory": memory})[1].fit
        for memory in (2e9, 1e7)
    ]
    assert [r.samples for r in results] == [400, 400]
    assert not results[0].notes
    assert "for the widest layers" in results[1].notes[0]
    assert "head" in results[1].refitted


def test_samples_that_come_back_are_those_that_left(rng):
    """What the last layer sees is what it would see with memory for all."""
    model, x = network(rng, norms=1), images(rng, 300)
    seen = []

    class Walk(fitting.Walk):
        def run(self):
            super().run()
            seen.append([np.concatenate(v) for v in self.student.env.values()])

    for memory in (2e9, 1e7):
        student = kerasnorm.rewrite(model, "ln", verbose=False)
        pairs = [(p, model.get_layer(p), student.get_layer(p)) for p in ("bn", "bn0")]
        inputs = reading.collect(model, x)
        out = np.arange(300) % 5 == 0
        walk = Walk(model, student, pairs, inputs, out, memory=memory)
        walk.run()
        (last,) = [v for v in seen[-1] if v.shape == (300, 5)]
        np.testing.assert_allclose(
            last, answers(student, x), rtol=1e-3, atol=1e-3 * np.abs(last).max()
        )


def test_sums_of_a_residual_block_are_made_up_for(rng):
    """The last norm of a block also corrects what the shortcut lacks."""
    from kerasnorm.fitting.beside import sums
    from kerasnorm.fitting.execution import twins
    from rewriters.program import Program

    model = network(rng)
    student = kerasnorm.rewrite(model, "ln", verbose=False)
    programs = Program(model), Program(student)
    found = sums(*programs, twins(*programs))
    assert {i.path for i in found} >= {"bn0", "bn1"}  # through the dropout
    assert all(i.path != "bn" for i in found)
