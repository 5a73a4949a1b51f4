"""Wrong arguments: every public function, each of its arguments, many wrong values.

A call either works or raises one `RewriteError`, before any work.
"""

from __future__ import annotations

import functools
import inspect
import pathlib
import warnings

import keras
import numpy as np
import pytest
from conftest import mostly_ci

import kerasnorm
from kerasnorm import adversarial, callbacks, properties, sphere


def small() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(4, name="first"),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.ReLU(),
            keras.layers.Dense(2, name="last"),
        ],
        name="small",
    )


@functools.cache
def data() -> dict:
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(8, 4)).astype("float32")
    return {"model": small(), "x": x, "y": np.arange(8) % 2}


# What is not a keyword of its own is given to a call that works.
ATTACK = {"attacks": "fgsm", "eps": 0.1, "verbose": False}
CALLS = {
    kerasnorm.rewrite: ("model", {"method": "gn", "groups": 2, "verbose": False}),
    kerasnorm.plan: ("model", {"method": "gn", "groups": 2}),
    kerasnorm.export: ("model", {}),
    kerasnorm.compass: ("model x y", {"methods": ["bn"], "samples": 8}),
    kerasnorm.jit: ("", {"mode": "auto"}),
    kerasnorm.load: ("", {"path": "model.keras"}),
    adversarial.evaluate: ("model x y", ATTACK),
    adversarial.Evaluator: ("model", ATTACK),
    adversarial.adversarial_training: ("model", {}),
    adversarial.transfer: ("model", {"attack": "fgsm"}),
    adversarial.apgd: ("", {}),
    adversarial.bim: ("", {}),
    adversarial.carlini_wagner: ("", {}),
    adversarial.deepfool: ("", {}),
    adversarial.fab: ("", {}),
    adversarial.fgsm: ("", {}),
    adversarial.mi_fgsm: ("", {}),
    adversarial.noise: ("", {}),
    adversarial.pgd: ("", {}),
    adversarial.square: ("", {}),
    callbacks.AdversarialEvaluation: ("x y", {"attacks": "fgsm"}),
    callbacks.PropertyMonitor: ("x y", {}),
    callbacks.SphereMonitor: ("", {}),
    properties.measure: ("model x y", {}),
    properties.Measurer: ("model x y", {}),
    sphere.scale_invariant_weights: ("model", {}),
}
WRONG = {
    "None": None,
    "text": "x",
    "-1": -1,
    "nan": float("nan"),
    "inf": float("inf"),
    "[]": [],
    "{}": {},
    "object": object(),
    "no rows": np.zeros((0, 4), "float32"),
    "a shape": np.zeros((3, 7, 2), "float32"),
    "one sample": np.zeros((1, 4), "float32"),
    "a scalar": np.float32(0.5),
    "texts": np.array(["a", "b"]),
    "uneven": [[1, 2], [3]],
    "bytes": b"x",
    "complex": 1j,
    "True": True,
    "a path": pathlib.Path("no/such.keras"),
    "a folder": pathlib.Path(),
    "1e30": 1e30,
    "2**70": 2**70,
    "9 digits": 999_999_999_999,
}


def arguments(function, value):
    """Every argument of a call that works, with one of them exchanged."""
    names, more = CALLS[function]
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        many = parameter.kind is parameter.VAR_KEYWORD
        name = "no_argument" if many else parameter.name
        yield name, {**{n: data()[n] for n in names.split()}, **more, name: value}


def complaint(function, given):
    """What a call raised, unless it worked or raised a clear error."""
    keras.utils.set_random_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**given)
    except kerasnorm.RewriteError as error:
        assert str(error)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small().save("model.keras")


# These take milliseconds; a call of the others that works trains or attacks.
QUICK = [
    f
    for f in CALLS
    if getattr(f, "__module__", "").startswith("kerasnorm.adversarial")
    and not CALLS[f][0]
]


@pytest.mark.parametrize("function", mostly_ci(CALLS, QUICK), ids=lambda f: f.__name__)
def test_wrong_values_are_clear_errors(function, folder):
    found = []
    for label, value in WRONG.items():
        for name, given in arguments(function, value):
            if (raised := complaint(function, given)) is not None:
                found.append(f"{name}={label}: {raised}")
    assert not found, "\n".join(found)


def test_unknown_arguments_name_the_nearest():
    more = data()
    for function, wrong, says in (
        (adversarial.evaluate, {"steps": 40}, "attacks=[pgd(steps=40)]"),
        (adversarial.evaluate, {"searches": 3}, "[carlini_wagner(searches=3)]"),
        (adversarial.evaluate, {"batchsize": 3}, "Did you mean batch_size=?"),
        (adversarial.evaluate, {"attacks": {"pgd": {"steps": 1}}}, "=[pgd(steps=1)]"),
        (properties.measure, {"sample": 16}, "Did you mean samples=?"),
        (properties.measure, {"learning_rate": np.nan}, "a finite number above 0"),
        (properties.measure, {"seed": "x"}, "seed='x'. Expected a whole number"),
        (kerasnorm.compass, {"method": ["bn"]}, "Did you mean methods=?"),
    ):
        with pytest.raises(kerasnorm.KerasNormError) as stop:
            function(**{**more, **wrong})
        assert says in str(stop.value)
    for make, wrong, says in (
        (kerasnorm.load, {"path": "x.h5", "safe": False}, "Did you mean safe_mode=?"),
        (adversarial.pgd, {"step": 3}, "Did you mean steps=?"),
        (callbacks.AdversarialEvaluation, {"x": 0, "steps": 3}, "pgd(steps=3)"),
        (callbacks.PropertyMonitor, {"x": 0, "everysteps": 3}, "every_steps=?"),
    ):
        with pytest.raises(kerasnorm.RewriteError) as stop:
            make(**wrong)
        assert says in str(stop.value)
    assert "attacked" in inspect.signature(adversarial.evaluate).parameters
    assert "memory" in inspect.signature(properties.measure).parameters


def test_models_of_tf_keras_say_how_to_get_on():
    class Model:
        pass

    Model.__module__ = "tf_keras.src.engine.training"
    x, y = data()["x"], data()["y"]
    for call in (
        lambda: kerasnorm.rewrite(Model(), "gn"),
        lambda: adversarial.evaluate(Model(), x, y),
        lambda: sphere.scale_invariant_weights(Model()),
        lambda: properties.measure(Model(), x),
    ):
        with pytest.raises(kerasnorm.KerasNormError, match=r"Save it with model\.save"):
            call()


# ------------------------------------------------------- outputs that are not finite


def broken(share):
    """The small model, whose outputs are NaN where the first input is below this."""
    inputs = keras.Input((4,))
    bad = keras.ops.where(inputs[:, :1] < share, np.nan, 0.0)
    return keras.Model(inputs, small()(inputs) + bad)


def test_outputs_that_are_nan_are_said():
    x, y = data()["x"], data()["y"]
    model, lost = broken(0.5), int((x[:, 0] < 0.5).sum())
    assert 0 < lost < 8
    found = adversarial.evaluate(model, x, y, **ATTACK)
    texts = [w.text for w in found.warnings if w.code == "not-finite"]
    assert f"the clean inputs: the outputs of {lost} are NaN or infinite" in texts
    for call in (
        lambda: adversarial.evaluate(broken(2.0), x, y, **ATTACK),
        lambda: properties.measure(broken(2.0), x, y),
    ):
        with pytest.raises(kerasnorm.KerasNormError, match="all outputs of the model"):
            call()
    notes = properties.measure(model, np.sort(x, 0), y, batch_size=2).notes
    assert any("batches give outputs that are NaN" in note for note in notes)
    with pytest.raises(kerasnorm.KerasNormError, match=f"got {lost} of 8 samples"):
        kerasnorm.rewrite(model, "gn", groups=2, data=x, verbose=False)


def test_a_training_that_diverged_goes_on():
    x, y = data()["x"], data()["y"]
    model = broken(2.0)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    robust = callbacks.AdversarialEvaluation(x, y, "fgsm", eps=0.1)
    logs = model.fit(x, y, epochs=2, verbose=0, callbacks=[robust]).history
    assert np.isnan(logs["val_fgsm_accuracy"]).all() and len(
        logs["val_robust_accuracy"]
    )


def test_one_sample_and_what_is_read():
    x, y = data()["x"], data()["y"]
    with pytest.warns(UserWarning, match="one sample"):
        kerasnorm.rewrite(small(), "gn", groups=2, data=x[:1], verbose=False)
    odd = np.concatenate([x, x])
    odd[1] = np.nan  # not among those that are used
    found = properties.measure(small(), odd, np.concatenate([y, y]), samples=4)
    assert found.samples == 4


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"attacked": ["a", "b"]}, "attacked=['a', 'b']. Expected a whole number"),
        ({"preprocessing": lambda x: np.asarray(x) / 2}, "made of keras.ops"),
        ({"preprocessing": lambda x: np.tanh(x.numpy())}, "made of keras.ops"),
        ({"preprocessing": {"scale": 2}}, "Expected a function or None"),
        ({"x": [[0.1] * 4] * 8}, "Pass np.asarray(x)"),
        ({"y": "pgd"}, "attacks='pgd'"),
        ({"x": iter([1])}, "a source of batches has its classes itself"),
    ],
)
def test_what_attacks_cannot_use(wrong, says):
    with pytest.raises(kerasnorm.KerasNormError) as stop:
        adversarial.evaluate(**{**data(), **ATTACK, **wrong})
    assert says in str(stop.value)
    if "y" in wrong or ("x" in wrong and not isinstance(wrong["x"], list)):
        with pytest.raises(kerasnorm.KerasNormError):
            callbacks.AdversarialEvaluation(wrong.get("x", data()["x"]), "pgd")


def test_evaluate_takes_a_path(folder):
    given = {**data(), **ATTACK}
    found = adversarial.evaluate(**{**given, "model": "model.keras"})
    loaded = adversarial.evaluate(**{**given, "model": kerasnorm.load("model.keras")})
    assert found.clean_accuracy == loaded.clean_accuracy
