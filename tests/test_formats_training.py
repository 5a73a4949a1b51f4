"""Training goes on where Keras 2 left off: optimizer, schedule and slots."""

import warnings

import keras
import numpy as np
import pytest
from conftest import mostly_ci

from rewriters.formats import load


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file"),
    pytest.mark.filterwarnings("ignore:.*unclosed.*:ResourceWarning"),
]

DATA = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")


def trained(optimizer):
    """A model of two layers of one shape, whose slots shape alone cannot tell apart."""
    k = pytest.importorskip("tf_keras")
    model = k.Sequential([k.Input((4,)), *(k.layers.Dense(4) for _ in range(2))])
    model.compile(optimizer(k.optimizers), "mse")
    model.fit(DATA, DATA, epochs=3, verbose=0)
    return model


CASES = {
    "Adam": (lambda o: o.Adam(0.05, amsgrad=True), (".h5", ".keras", "")),
    "RMSprop": (lambda o: o.RMSprop(0.05, momentum=0.9, centered=True), (".keras",)),
    "Adadelta": (lambda o: o.Adadelta(1.0), (".keras",)),
    "SGD": (lambda o: o.SGD(0.05), (".h5", ".keras")),
    "averaged": (lambda o: o.SGD(0.05, momentum=0.9, use_ema=True), (".h5", ".keras")),
    "Ftrl": (lambda o: o.Ftrl(0.05), (".h5",)),
    "Lion": (lambda o: o.Lion(0.01), (".h5",)),
    "schedule": (
        lambda o: o.Adam(o.schedules.ExponentialDecay(0.05, 2, 0.5)),
        (".h5", ".keras"),
    ),
    "old Adam": (lambda o: o.legacy.Adam(0.05, amsgrad=True), (".h5",)),
    "old Adamax": (lambda o: o.legacy.Adamax(0.05), (".h5",)),
    "old Adadelta": (lambda o: o.legacy.Adadelta(1.0), (".h5",)),
    "old RMSprop": (lambda o: o.legacy.RMSprop(0.05, momentum=0.9), (".h5",)),
}


@pytest.mark.parametrize("name", mostly_ci(CASES, ["Adam", "schedule"]))
def test_training_goes_on(name, tmp_path):
    optimizer, suffixes = CASES[name]
    old = trained(optimizer)
    for suffix in suffixes:
        old.save(tmp_path / f"m{suffix}")
    new = [load(tmp_path / f"m{suffix}") for suffix in suffixes]
    old.fit(DATA, DATA, epochs=2, verbose=0)
    for model in new:
        assert int(model.optimizer.iterations) == 3
        model.fit(DATA, DATA, epochs=2, verbose=0)
        for a, b in zip(old.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5)


def test_each_slot_goes_to_its_variable(tmp_path):
    old = trained(lambda o: o.legacy.Nadam(0.05))
    old.save(tmp_path / "m.h5")
    found = load(tmp_path / "m.h5").optimizer
    wanted = [w for w in old.optimizer.get_weights() if w.shape]
    slots = [*found._momentums, *found._velocities]
    for slot, array in zip(slots, wanted[-len(slots) :], strict=True):
        np.testing.assert_array_equal(np.array(slot), array)


def test_a_lost_state_is_told_and_none_is_not(tmp_path):
    trained(lambda o: o.legacy.Adam(0.05)).save(tmp_path / "m")
    with pytest.warns(UserWarning, match="without the optimizer's state"):
        load(tmp_path / "m")
    k = pytest.importorskip("tf_keras")
    untrained = k.Sequential([k.Input((4,)), k.layers.Dense(4)])
    untrained.compile("adam", "mse")
    untrained.save(tmp_path / "m.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(load(tmp_path / "m.keras").optimizer, keras.optimizers.Adam)
