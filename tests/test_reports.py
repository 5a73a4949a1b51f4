"""Files of the kinds that public bug reports are about, with what `predict` gave."""

import keras
import numpy as np
import pytest
from conftest import SHARED, require_shared

import kerasnorm


pytestmark = [
    pytest.mark.filterwarnings("ignore:Training differs"),
    pytest.mark.filterwarnings("ignore:.*structure of `inputs`"),
]

FOLDER = SHARED / "reports"
FILES = sorted(
    str(p.relative_to(FOLDER))
    for p in FOLDER.glob("*/*")
    if p.suffix in (".h5", ".keras") or p.is_dir()
)


@pytest.mark.parametrize("name", FILES or ["no/files"])
def test_a_reported_file_computes_what_it_did(name, tmp_path):
    path = require_shared("reports") / name
    model = kerasnorm.load(path)
    with np.load(path.parent / "golden.npz") as data:
        x = next(data[k] for k in data.files if k.startswith("x"))
        wanted = next(data[k] for k in sorted(data.files) if k.startswith("y"))
    model.save(tmp_path / "again.keras")
    for new in (model, keras.saving.load_model(tmp_path / "again.keras")):
        y = new.predict(x, verbose=0)
        if "dropout_training_true" in name:
            assert not np.allclose(y, new.predict(x, verbose=0))
        else:
            np.testing.assert_allclose(y, wanted, 1e-4, 1e-4)
    if "base_training_false" in name:
        norms = [v for v in model.non_trainable_variables if "moving" in v.name]
        before = [np.array(keras.ops.copy(v.value)) for v in norms]
        model.compile("sgd", "mse")
        model.fit(x, 0 * wanted, verbose=0)
        assert norms
        np.testing.assert_equal(
            before, [np.array(keras.ops.copy(v.value)) for v in norms]
        )
