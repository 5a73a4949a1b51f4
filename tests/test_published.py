"""Every method on real saved models that other people trained."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import in_turn

import kerasnorm
import rewriters
from kerasnorm.method.registry import read


HERE = Path(__file__).parent
MODELS = HERE.parents[1] / "shared" / "models"
NEED_CLASSES = {
    "dtln_savedmodel_instantln",
    "mltk_fingerprint_siamese",
    "mltk_kws_tenet_alexa",
    "mmsplice_exon",
    "mtsplice0",
}


def files():
    """One file a folder: formats are compared with each other elsewhere."""
    found = {}
    for folder in sorted(MODELS.glob("*/*")) if MODELS.is_dir() else ():
        saved = [p for p in folder.rglob("*") if p.suffix in (".h5", ".hdf5", ".keras")]
        saved += [p.parent for p in folder.rglob("saved_model.pb")]
        if folder.name not in NEED_CLASSES and saved:
            found[folder.name] = sorted(saved)[0]
    return found


NAMES = sorted(files()) or ["none"]
# JAX compiles every operation of every shape; the small files stand for all there.
JAX = keras.backend.backend() == "jax"
DEFAULT = [n for n in NAMES if not JAX or n.startswith("k215_")]


# Some of these models lose their mask at a convolution, as Keras says.
@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")
@pytest.mark.parametrize(("name", "methods"), list(in_turn(NAMES, DEFAULT)))
def test_every_method_rewrites_or_refuses(name, methods, shared, tmp_path):
    model = kerasnorm.load(files()[name], compile=False)
    x = rewriters.random_inputs(model, samples=2)
    norms = sorted(s.path for s in rewriters.sites(model) if read(s.layer) is not None)
    assert norms or name.startswith("tfa_")
    half = any("16" in layer.compute_dtype for layer in model._flatten_layers())
    before = [np.array(w) for w in model.get_weights()]
    for method in methods:
        new, report = kerasnorm.rewrite(model, method, return_report=True)
        plan = report.plan
        found = [s.path for s in plan.steps] + [r.path for r in plan.refused]
        assert sorted(found) == norms
        if plan.exact:
            gap = rewriters.compare(model, new, x).relative
            assert gap <= (1e-2 if half else 1e-4), method
        if plan.steps:
            new.save(tmp_path / "new.keras")
            again = keras.saving.load_model(tmp_path / "new.keras")
            assert rewriters.compare(new, again, x).max_abs == 0, method
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
