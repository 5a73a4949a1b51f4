"""What `import kerasnorm` shows, to people and to their tools."""

from __future__ import annotations

import inspect
import json
import pathlib
import subprocess
import sys

import keras
import pytest
from conftest import ROOT
from test_docs import PAGES, blocks

import kerasnorm


def test_dir_is_the_public_face():
    imported = {
        name
        for name, value in vars(kerasnorm).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert dir(kerasnorm) == sorted(kerasnorm.__all__)
    assert imported <= set(kerasnorm.__all__)
    assert all(hasattr(kerasnorm, name) for name in kerasnorm.__all__)


@pytest.mark.ci
def test_a_type_checker_sees_what_the_docs_use(tmp_path):
    """Every Python block of the README and docs, as a user's file."""
    for page in PAGES:
        code = "\n".join(text for _, text in blocks(page, "python"))
        if code:
            head = "from typing import Any\nimport keras\nimport kerasnorm\n"
            head += "import numpy as np\nx: Any = np.zeros(1)\n"
            (tmp_path / f"{page.stem.replace('-', '_')}.py").write_text(head + code)
    settings = {
        "extraPaths": [str(ROOT)],
        "useLibraryCodeForTypes": False,
        "typeCheckingMode": "basic",
        "pythonVersion": "3.11",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    pyright = pathlib.Path(sys.executable).parent / "pyright"
    run = subprocess.run(
        [pyright, "--outputjson", "--pythonpath", sys.executable, "-p", tmp_path],
        capture_output=True,
        text=True,
    )
    found = json.loads(run.stdout)
    errors = [
        f"{pathlib.Path(d['file']).stem}:{d['range']['start']['line']}: {d['message']}"
        for d in found["generalDiagnostics"]
        if d["severity"] == "error"
    ]
    assert found["summary"]["filesAnalyzed"] > 10 and not errors, "\n".join(errors)


def test_what_weight_methods_offer_beside_layers_is_public():
    assert callable(kerasnorm.weights.rescale)
    assert callable(kerasnorm.weights.normalize_weights)
    assert issubclass(kerasnorm.callbacks.NodeRescaling, keras.callbacks.Callback)
