"""`plan` and `rewrite` on every kind of model, for every method."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import zoo
from conftest import MAIN_METHODS
from keras import layers

import kerasnorm
import rewriters
from kerasnorm.method.registry import Fidelity, Source, get, read
from kerasnorm.rewriting.verify import verify
from rewriters.compare import outputs


CUSTOM = {
    c.__name__: c
    for c in (zoo.Block, zoo.LazyBlock, zoo.Subclassed, zoo.FunctionalSubclass)
}
METHODS = sorted(kerasnorm.methods())
MAIN = {get(m).name for m in MAIN_METHODS}
# The other methods go through the same code: these have something a layer must handle.
FEW = {"masked", "mixed_float16", "shared_norm"}


def pair(animal, method):
    """A test case, and when it runs."""
    if method in MAIN:
        return pytest.param(animal, method)
    mark = pytest.mark.ci if animal in FEW else pytest.mark.slow
    return pytest.param(animal, method, marks=mark)


@functools.lru_cache(maxsize=2)
def animal_of(name):
    model = zoo.ZOO[name]()
    return model, [np.array(w) for w in model.get_weights()]


@pytest.mark.parametrize(
    ("animal", "method"), [pair(a, m) for a in sorted(zoo.ZOO) for m in METHODS]
)
def test_every_norm_is_a_step_or_a_refusal(animal, method, tmp_path):
    name, (animal, before) = animal, animal_of(animal)
    norms = [s.path for s in rewriters.sites(animal) if read(s.layer) is not None]
    new, report = kerasnorm.rewrite(animal, method, return_report=True)
    plan = report.plan
    found = [s.path for s in plan.steps] + [r.path for r in plan.refused]
    assert sorted(found) == sorted(norms)
    assert kerasnorm.Plan.from_json(plan.to_json()) == plan
    for a, b in zip(before, animal.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)

    x = rewriters.random_inputs(animal)
    result = rewriters.compare(animal, new, x)
    assert result.finite
    if not plan.steps:
        assert result.max_abs == 0
    elif plan.exact:
        half = any("16" in x.compute_dtype for x in animal._flatten_layers())
        assert result.relative <= (1e-2 if half else 1e-4)

    refused = {r.path for r in plan.refused}
    for site in rewriters.sites(new):
        source = read(site.layer)
        if isinstance(source, Source) and site.path not in refused:
            # Keras has layer and instance normalization of images as groups.
            assert source.method in (method, "group")

    if name not in zoo.UNSAVEABLE:
        new.save(tmp_path / "new.keras")
        again = keras.saving.load_model(tmp_path / "new.keras", custom_objects=CUSTOM)
        assert rewriters.compare(new, again, x).max_abs == 0


def test_group_normalization_of_batch_normalization_keeps_its_affine():
    model = zoo.ZOO["plain_functional"]()
    new = kerasnorm.rewrite(model, "gn", groups=4)
    for name in ("bn0", "bn1"):
        old, gn = model.get_layer(name), new.get_layer(name)
        assert type(gn) is layers.GroupNormalization and gn.groups == 4
        np.testing.assert_array_equal(gn.gamma, old.gamma)
        np.testing.assert_array_equal(gn.beta, old.beta)
        assert gn.epsilon == old.epsilon


def test_folding_removes_batch_normalization():
    model = zoo.ZOO["plain_functional"]()
    new, report = kerasnorm.rewrite(model, "none", return_report=True)
    names = [x.name for x in new.layers]
    assert "bn0" not in names and "bn1" not in names
    assert report.plan.fidelity is Fidelity.AT_INFERENCE
    assert report.comparison.relative < 1e-5


def test_where_limits_the_swap():
    model = zoo.ZOO["plain_functional"]()
    plan = kerasnorm.plan(model, "gn", where="*1")
    assert [s.path for s in plan.steps] == ["bn1"]
    plan = kerasnorm.plan(model, "gn", where=lambda s: s.path == "bn0")
    assert [s.path for s in plan.steps] == ["bn0"]
    for swap in kerasnorm.plan, kerasnorm.rewrite:
        with pytest.raises(kerasnorm.KerasNormError, match="Expected some of bn0, bn1"):
            swap(model, "gn", where="nowhere")


def test_layers_that_stay_are_one_warning_or_one_error():
    model = zoo.ZOO["plain_functional"]()
    stay = r"2 of 2 layers stay as they are: groups do not divide channels \(bn0, bn1"
    with pytest.warns(UserWarning, match=stay) as told:
        kerasnorm.rewrite(model, "gn", groups=3)
    told = [w for w in told if w.category is UserWarning]
    assert len(told) == 1 and told[0].filename == __file__
    with pytest.raises(kerasnorm.KerasNormError, match=stay):
        kerasnorm.rewrite(model, "gn", groups=3, strict=True)
    none = keras.Sequential([keras.Input((3,)), layers.Dense(2)], name="plain")
    with pytest.warns(UserWarning, match="'plain' has no layer to swap"):
        kerasnorm.rewrite(none, "gn")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kerasnorm.rewrite(model, "bn", strict=True)  # already as wanted
        kerasnorm.rewrite(model, "gn", groups=2, strict=True)


def test_a_masked_site_gets_a_layer_that_reads_masks():
    model = zoo.ZOO["masked"]()
    new = kerasnorm.rewrite(model, "gn", groups=2)
    bn = new.get_layer("bn")
    assert type(bn).__module__.startswith("kerasnorm.")
    tokens = np.array([[3, 5, 2, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7]], "int32")
    short = outputs(new, tokens)[0]
    embed = new.get_layer("embed").embeddings
    embed.assign(np.where(np.arange(11)[:, None] == 0, 99.0, np.asarray(embed)))
    np.testing.assert_allclose(outputs(new, tokens)[0], short, rtol=1e-5)


def test_a_plan_can_be_carried_out_later():
    model = zoo.ZOO["plain_functional"]()
    text = kerasnorm.plan(model, "gn", groups=2).to_json()
    plan = kerasnorm.Plan.from_json(text)
    new = kerasnorm.rewrite(model, plan)
    assert rewriters.compare(new, kerasnorm.rewrite(model, "gn", groups=2)).max_abs == 0
    with pytest.raises(kerasnorm.KerasNormError, match="another model"):
        kerasnorm.rewrite(zoo.ZOO["subclassed"](), plan)
    with pytest.raises(kerasnorm.KerasNormError, match="says already"):
        kerasnorm.rewrite(model, plan, where="nothing*")
    with pytest.raises(kerasnorm.KerasNormError, match="says already"):
        kerasnorm.rewrite(model, plan, epsilon=1.0)
    other = keras.Sequential([keras.Input((8, 8, 3))])
    for layer in model.layers[1:]:
        other.add(layers.Activation("linear", name=layer.name))
    with pytest.raises(kerasnorm.KerasNormError, match="another model"):
        kerasnorm.rewrite(other, plan)
    with pytest.raises(kerasnorm.KerasNormError, match="not a plan"):
        kerasnorm.Plan.from_json("{}")


def test_there_and_back_is_exact():
    model = zoo.ZOO["plain_functional"]()
    gn = kerasnorm.rewrite(model, "ln", axis=[1, 2, 3])
    back = kerasnorm.rewrite(gn, "gn", groups=1)
    assert rewriters.compare(gn, back).relative < 1e-5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "gm"}, "Did you mean 'gn'"),
        ({"method": "gn", "group": 3}, "Did you mean 'groups'"),
        ({"method": "gn", "groups": 0}, "no number of groups"),
        ({"method": "ln", "groups": 3}, "has no groups"),
        ({"method": "gn", "layers": "torch"}, "'auto' or 'keras' or 'kerasnorm'"),
        ({"method": "gn", "fit": "magic"}, "Expected 'affine' or"),
        ({"method": "gn", "fit": "affine"}, "needs data"),
        ({"method": "gn", "groups": "auto"}, "needs data"),
        ({"method": "gn", "groups": 2.0}, "groups=2.0. Expected"),
        ({"method": "gn", "axis": 1}, "axis follows from"),
        ({"method": "gn", "axis": 99}, "axis follows from"),
        ({"method": "gn", "axis": [[1], [2, 3]]}, "axis follows from"),
        ({"method": "gn", "epsilon": -1.0}, "no epsilon"),
        ({"method": "gn", "epsilon": "small"}, "no epsilon"),
        ({"method": "gn", "where": ["bn0"]}, "Expected a text or a function"),
        ({"method": "gn", "cells": 3}, "cells=3. Expected True or False or a dict"),
        ({"method": "gn", "fit_options": {"epochs": 3}}, "options of a fit and no fit"),
        ({"method": "gn", "fit_options": {"epoch": 3}}, "no options of a fit"),
        ({"method": "gn", "fit_options": {"groups": 3}}, "no options of a fit"),
        ({"method": "gn", "fit_options": ["epochs"]}, "Expected a dict"),
        ({"method": "gn", "fit_options": {"memory": "2GB"}}, "not a memory"),
        ({"method": "gn", "fit_options": {"augment": 3}}, "not a function"),
        ({"method": "gn", "fit_options": {"seed": -1}}, "not a seed"),
        ({"method": "none", "data": np.full((4, 8, 8, 3), np.nan)}, "NaN"),
    ],
)
def test_bad_arguments_are_one_clear_error(arguments, text):
    model = zoo.ZOO["plain_functional"]()
    with pytest.raises(kerasnorm.KerasNormError, match=text):
        kerasnorm.rewrite(model, **arguments)


@pytest.mark.parametrize("out", ["/no/such/folder/x.keras", "x.pb"])
def test_a_target_that_cannot_be_is_refused_before_any_work(out):
    def unread():
        raise AssertionError("the data was read")
        yield

    model = zoo.ZOO["plain_functional"]()
    with pytest.raises(rewriters.RewriteError, match=r"no such folder|tell its format"):
        kerasnorm.rewrite(model, "gn", data=unread(), out=out)
    with pytest.raises(rewriters.RewriteError, match=r"no such folder|tell its format"):
        kerasnorm.export(model, out=out)


def test_a_subclass_with_a_call_of_its_own_is_refused():
    class Odd(layers.BatchNormalization):
        def call(self, x, training=None, mask=None):
            return super().call(x, training=training) + 1

    model = keras.Sequential([keras.Input((4,)), Odd(name="odd")])
    plan = kerasnorm.plan(model, "gn")
    assert not plan.steps and "call" in plan.refused[0].detail


def test_rewriting_a_file_saves_a_file_that_needs_keras_only(tmp_path):
    source, out = tmp_path / "model.keras", tmp_path / "gn.keras"
    model = zoo.ZOO["residual"]()
    model.save(source)
    new = kerasnorm.rewrite(source, "gn", out=out)
    x = rewriters.random_inputs(model)
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, keras, numpy as np;"
        f"m = keras.saving.load_model({str(out)!r});"
        f"y = m(np.load({str(tmp_path / 'x.npy')!r}));"
        f"np.save({str(tmp_path / 'y.npy')!r}, y);"
        "assert not {'kerasnorm', 'rewriters'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    expected = outputs(new, x)[0]
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected)
    with pytest.raises(rewriters.RewriteError, match="file that was read"):
        kerasnorm.rewrite(source, "gn", out=source)


def test_report_in_all_its_forms(tmp_path):
    model = zoo.ZOO["plain_functional"]()
    x = rewriters.random_inputs(model, samples=64)
    _, report = kerasnorm.rewrite(
        model, "gn", data=x, fit="affine", return_report=True, verbose=False
    )
    assert set(report.rho_squared) == {"bn0", "bn1"}
    _, auto = kerasnorm.rewrite(
        model, "gn", groups="auto", data=x, return_report=True, verbose=False
    )
    assert f"groups={auto.fit.sites[0].groups}" in auto.to_markdown()
    _, plain = kerasnorm.rewrite(
        model, "bcn_qiao", data=x, return_report=True, verbose=False
    )
    assert "not fitted" in plain.to_markdown()
    assert "bn0" in report.table() and "of variance kept" in str(report)
    assert json.loads(report.to_json())["plan"]["method"] == "group"
    assert report.to_markdown().startswith("| layer |")
    for name in ("report.json", "report.md", "report.png"):
        report.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 100
        with pytest.raises(rewriters.RewriteError, match="no such folder"):
            report.save(tmp_path / "absent" / name)


def test_the_compiled_state_survives():
    model = zoo.ZOO["compiled_adam"]()
    new = kerasnorm.rewrite(model, "ln")
    assert new.compiled and int(new.optimizer.iterations) > 0
    x = np.zeros((8, 6), "float32")
    new.fit(x, x[:, :3], verbose=0)


def test_a_forced_training_mode_is_refused():
    inputs = keras.Input((6,))
    x = layers.BatchNormalization(name="bn")(layers.Dense(4)(inputs), training=True)
    plan = kerasnorm.plan(keras.Model(inputs, x), "none")
    assert not plan.steps and plan.refused


def twice(x):
    return 2 * x


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
@pytest.mark.parametrize("function", [twice, lambda x: 2 * x], ids=["named", "lambda"])
def test_functions_of_the_model_in_a_layer_that_is_made_anew(function):
    """They are neither registered nor given: the model holds them."""
    start = lambda shape, dtype: keras.ops.ones(shape, dtype)  # noqa: E731
    penalty = lambda w: keras.ops.sum(w * w)  # noqa: E731
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, activation=function, kernel_initializer=start),
            layers.BatchNormalization(name="bn", gamma_regularizer=penalty),
            layers.Dense(4, activation=function, kernel_regularizer=penalty),
        ]
    )
    for how in ({"method": "none"}, {"method": "wn"}, {"weights": "wn"}):
        new = kerasnorm.rewrite(model, **how)
        assert rewriters.compare(model, new).relative < 1e-5
    new = kerasnorm.rewrite(model, "ln")
    assert new.get_layer("bn").gamma_regularizer is penalty


def test_an_exact_step_that_overflows_is_an_error():
    """A kernel that float16 cannot hold: the original's outputs are finite."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Rescaling(1e-4),
            layers.Dense(4, kernel_initializer=keras.initializers.Constant(9.0)),
            layers.BatchNormalization(epsilon=1e-7, gamma_initializer="ones"),
        ]
    )
    norm = model.layers[-1]
    norm.set_weights([np.full(4, 10.0), np.zeros(4), np.zeros(4), np.full(4, 1e-7)])
    half = keras.Sequential.from_config(model.get_config())
    for layer in half.layers:
        layer.dtype_policy = "mixed_float16"
    half.set_weights(model.get_weights())
    with pytest.raises(kerasnorm.KerasNormError, match="should be exact"):
        kerasnorm.rewrite(half, "none")


def test_a_model_that_cannot_run_after_an_exact_step_is_an_error():
    model = zoo.ZOO["plain_functional"]()
    plan = kerasnorm.plan(model, "none")
    wrong = keras.Sequential([keras.Input((8, 8, 3)), layers.Flatten()])
    with pytest.raises(rewriters.RewriteError, match="other shapes"):
        verify(model, wrong, plan.method)


def test_the_states_of_a_recurrent_layer_are_left_alone():
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(4, 5, 3)),
            layers.LSTM(4, stateful=True, return_sequences=True),
            layers.Dense(3),
            layers.BatchNormalization(),
        ]
    )
    new = kerasnorm.rewrite(model, "none")
    for state in (*model.layers[0].states, *new.layers[0].states):
        assert not np.any(keras.ops.convert_to_numpy(state))


def test_penalties_that_see_something_else_are_told():
    dense = layers.Dense(
        4, kernel_regularizer="l2", activity_regularizer="l2", name="dense"
    )
    parts = [dense, layers.BatchNormalization(name="bn")]
    model = keras.Sequential([keras.Input((3,)), *parts])
    (step,) = kerasnorm.plan(model, weights="sphere").steps
    assert "kernel regularizer now sees what the kernel is computed from" in step.note
    (step,) = kerasnorm.plan(model, "none").steps
    assert "kernel regularizer of dense now sees folded weights" in step.note
    assert "activity regularizer of dense now sees what was normalized" in step.note


def test_targets_that_are_none():
    model = zoo.ZOO["sequential"]()
    for out in (7, b"x.keras"):
        with pytest.raises(rewriters.RewriteError, match="Expected a text or a path"):
            kerasnorm.rewrite(model, "none", out=out)
    _, report = kerasnorm.rewrite(model, "none", return_report=True)
    with pytest.raises(kerasnorm.KerasNormError, match=r"ends in \..*png"):
        report.plot("p.xyz")
