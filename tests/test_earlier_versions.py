"""Files that earlier versions wrote load, with the outputs that they had there.

`saved/` was written before the modules moved into folders, when `kerasnorm.layers` and
its neighbours lay flat: the layers' places are in the files.
"""

import importlib
import pathlib

import keras
import numpy as np
import pytest

import kerasnorm


SAVED = pathlib.Path(__file__).parent / "saved"
FILES = sorted(p for p in SAVED.iterdir() if p.suffix in (".keras", ".h5"))


@pytest.mark.parametrize("read", [kerasnorm.load, keras.saving.load_model])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_of_an_earlier_version_loads(path, read):
    golden = np.load(SAVED / "golden.npz")
    model = read(path)
    y = model.predict(golden[f"{path.stem}_x"], verbose=0)
    np.testing.assert_allclose(y, golden[f"{path.stem}_y"], rtol=1e-5, atol=1e-5)


def test_an_optimizer_of_an_earlier_version_loads():
    model = kerasnorm.load(SAVED / "compiled.keras")
    assert isinstance(model.optimizer, kerasnorm.sphere.OnSphere)
    assert int(model.optimizer.iterations) == 1


def test_a_plan_of_an_earlier_version_is_carried_out():
    plan = kerasnorm.Plan.from_json((SAVED / "plan.json").read_text("utf-8"))
    new = kerasnorm.rewrite(kerasnorm.load(SAVED / "compiled.keras"), plan)
    assert any(isinstance(x, keras.layers.LayerNormalization) for x in new.layers)


@pytest.mark.parametrize(
    "name", ["adoption", "claims", "method", "normalization", "testing"]
)
def test_where_other_packages_found_what_methods_need(name):
    module = importlib.import_module(f"kerasnorm.{name}")
    own = kerasnorm.method if name == "method" else None
    found = own or importlib.import_module(f"kerasnorm.method.{name}")
    assert module is found
