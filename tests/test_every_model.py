"""Properties and attacks on every way in which a model can hold its layers."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import zoo
from keras import ops, tree

import rewriters
from kerasnorm import adversarial
from kerasnorm.properties import measure
from rewriters.compare import outputs


EPS = 0.5


def given(name):
    """A model, its inputs, and a copy of its weights."""
    model = zoo.ZOO[name]()
    x = rewriters.random_inputs(model, samples=8)
    return model, x, [np.array(w) for w in model.get_weights()]


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_every_model_is_measured(name):
    model, x, before = given(name)
    found = measure(model, x, batch_size=8)
    norms = [s for s in found.sites if s.kind == "norm"]
    assert norms and found.sites[-1].kind == "output"
    for site in norms:
        assert np.isfinite([site.variance, site.gradient]).all(), site.path
        assert -1 <= site.cosine <= 1 and 1 <= site.stable_rank <= 8, site.path
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_every_classifier_is_attacked(name):
    model, x, before = given(name)
    scores, *others = outputs(model, x)
    tensors = tree.flatten(x)
    floating = all(t.dtype.kind == "f" for t in tensors)
    if others or scores.ndim != 2 or not floating:
        pytest.skip("not one output of classes, or an input without a gradient")
    y = scores.argmax(-1)
    several = len(tensors) > 1
    found = adversarial.evaluate(
        model,
        x if several else tensors[0],
        y,
        adversarial.pgd(10),
        eps=EPS,
        bounds=(-10, 10),
        attacked=0 if several else None,
        keep=True,
        verbose=0,
    )
    assert found.clean_accuracy == 1
    assert found.robust_accuracy < 1
    fallen = ~found.standing()
    moved = np.array(tensors[0])
    moved[fallen] = found.adversarial[fallen]
    assert np.abs(moved - tensors[0]).max() <= EPS * (1 + 1e-5)
    inputs = tree.pack_sequence_as(x, [moved, *tensors[1:]])
    again = np.argmax(
        ops.convert_to_numpy(tree.flatten(model(inputs, training=False))[0]), -1
    )
    np.testing.assert_array_equal(again != y, fallen)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_measured_in_mixed_precision_as_in_float32(policy):
    def made(dtype):
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [
                keras.Input((6, 6, 3)),
                keras.layers.Conv2D(8, 3, use_bias=False, dtype=dtype),
                keras.layers.BatchNormalization(dtype=dtype),
                keras.layers.ReLU(dtype=dtype),
                keras.layers.Flatten(dtype=dtype),
                keras.layers.Dense(4, dtype="float32"),
            ]
        )

    x = np.random.default_rng(0).normal(size=(16, 6, 6, 3)).astype("float32")
    whole, half = (measure(made(d), x, batch_size=16) for d in ("float32", policy))
    for a, b in zip(whole.sites, half.sites, strict=True):
        for figure in ("variance", "cosine", "gradient"):
            wanted, found = getattr(a, figure), getattr(b, figure)
            assert (wanted is None) == (found is None)
            if wanted is not None:  # bfloat16 has 8 bits
                assert found == pytest.approx(wanted, rel=0.03, abs=0.01)
