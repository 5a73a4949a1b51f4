"""What every test may rely on: the backend, quiet logs, seeds, tolerances, `shared`."""

from __future__ import annotations

import os
import pathlib
import tempfile


# Read by the libraries when they are first imported, so set before any of them is.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
# A user's keras.json may name another float type or image layout.
os.environ.setdefault("KERAS_HOME", tempfile.mkdtemp(prefix="keras_home_"))
if "PYTEST_XDIST_WORKER" in os.environ:
    # One process per core already: more threads would only take turns.
    for variable in (
        "OMP_NUM_THREADS",
        "TF_NUM_INTRAOP_THREADS",
        "TF_NUM_INTEROP_THREADS",
    ):
        os.environ.setdefault(variable, "1")

import numpy as np
import pytest


ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = pathlib.Path(os.environ.get("KERASNORM_SHARED", ROOT.parent / "shared"))

# Largest difference accepted against float64, relative to the largest value and to
# each value. A test that loosens one says why.
TOLERANCES = {
    "float64": {"rtol": 1e-9, "atol": 1e-9},
    "float32": {"rtol": 1e-4, "atol": 1e-5},
    "float16": {"rtol": 1e-2, "atol": 5e-3},
    "bfloat16": {"rtol": 4e-2, "atol": 2e-2},
}


# What the main job promises on every model. The other methods go through the same code
# and take turns: all their cases and models run with `-m slow`.
MAIN_METHODS = ("bn", "frn", "gn", "in", "ln", "none", "rms", "wn")


# Published models that take longer than all others together.
LARGE = ("fast_srgan_v2", "mltk_kws_mobilenetv2")


def large(name: str) -> bool:
    """Whether a model's name, or the path of its file, names one of these."""
    return any(part in name for part in LARGE)


def mostly_ci(values, always=()):
    """Values of a parameter, all but `always` in CI alone."""
    return [
        pytest.param(v, marks=() if v in always else pytest.mark.ci) for v in values
    ]


def sometimes(name, always):
    """A test case, a tuple, that runs in CI alone where it names a large model; one
    that JAX, which compiles each operation and shape, runs when slow."""
    import keras

    if keras.backend.backend() == "jax" and not always:
        return pytest.param(*name, marks=pytest.mark.slow)
    return pytest.param(*name, marks=pytest.mark.ci if large(name[0]) else ())


def in_turn(names, default=None, ci=large):
    """`(name, methods)` of tests that rewrite many large models.

    One of the methods that promise to be exact and one of the others, which take turns;
    on the names in `default` alone, where it is given, and in CI alone where `ci` says
    so. All with `-m slow`.
    """
    exact = ("none", "wn")
    rest = [m for m in MAIN_METHODS if m not in exact]
    for k, name in enumerate(names if default is None else default):
        two = exact[k % len(exact)], rest[k % len(rest)]
        marks = pytest.mark.ci if ci(name) else ()
        yield pytest.param(name, two, id=name, marks=marks)
    for name in names:
        slow = pytest.mark.slow
        yield pytest.param(name, MAIN_METHODS, id=f"{name}-all", marks=slow)


def require_shared(path: str = "") -> pathlib.Path:
    """The folder of published models and data; skips, or fails where CI requires it."""
    found = SHARED / path
    if not found.exists():
        reason = f"{found} is absent: the published models and data are not here"
        if os.environ.get("KERASNORM_REQUIRE_SHARED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of published models and data that lies beside the checkout."""
    return require_shared()


@pytest.fixture(scope="session")
def tolerance():
    """`tolerance("float16")` gives the keywords of `np.testing.assert_allclose`."""
    return lambda dtype="float32": dict(TOLERANCES[dtype])


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state, in whatever order they run."""
    import keras

    keras.utils.set_random_seed(0)
