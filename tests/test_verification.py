"""What an exact rewrite costs to verify, and that it says when it was not."""

import importlib

import keras
import numpy as np

import kerasnorm


compare = importlib.import_module("rewriters.compare")  # the package has a function


def network(*more):
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3),
            *more,
            keras.layers.BatchNormalization(),
            keras.layers.Dense(2),
        ]
    )


def test_large_graphs_run_sample_by_sample(monkeypatch):
    """In the memory of one sample, and with the same outputs."""
    rows = []

    @keras.saving.register_keras_serializable("test_verification")
    class Seen(keras.layers.Layer):
        def call(self, x):
            rows.append(x.shape[0])
            return x

    model = network(Seen())
    x = compare.random_inputs(model)
    whole = compare.outputs(model, x)[0]
    monkeypatch.setattr(compare, "LARGE", 0)
    rows.clear()
    parts = compare.outputs(model, x)[0]
    assert set(rows) == {1}
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)
    rows.clear()
    _, report = kerasnorm.rewrite(model, "none", return_report=True)
    assert report.comparison.samples == 4 and report.comparison.relative < 1e-5
    assert 4 not in rows


def test_an_exact_rewrite_that_was_not_verified_says_so(monkeypatch):
    def none_suits(model):
        raise ValueError("no random graphs")

    module = importlib.import_module("kerasnorm.rewriting.verify")
    monkeypatch.setattr(module, "random_inputs", none_suits)
    _, report = kerasnorm.rewrite(network(), "none", return_report=True)
    assert report.comparison is None
    assert "no random graphs" in report.unverified
    assert "not verified" in report.summary()
    assert report.to_dict()["unverified"] == report.unverified
