"""Laws: the tests that every method's declaration generates."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
from conftest import MAIN_METHODS, ROOT

from kerasnorm.method import testing
from kerasnorm.method.claims import claims
from kerasnorm.method.registry import get, methods


# Which compiles every operation of every shape: most of the time goes there.
JAX = keras.backend.backend() == "jax"


def is_main(method) -> bool:
    return method.name in {get(name).name for name in MAIN_METHODS}


def cases_run(method) -> int:
    """How many of a method's cases run by default."""
    if is_main(method):
        return 2 if JAX else len(method.cases)
    return 1


def generated():
    for method in methods().values():
        count = cases_run(method)
        rest = tuple(f"case{n}-" for n in range(count, len(method.cases)))
        # XLA takes longer than all the other checks of a case together.
        rest += tuple(f"case{n}-compiles" for n in range((count + 1) // 2, count))
        # What a method claims of its formula is judged on the other backend.
        rest += ("claim-",) if JAX and not is_main(method) else ()
        long = () if is_main(method) else ("case0-compiles",)
        for check in testing.checks(method):
            marks = ()
            if check.name.startswith(rest):
                marks = pytest.mark.slow
            elif check.name.startswith(long):
                marks = pytest.mark.ci
            yield pytest.param(check.run, id=f"{method.name}-{check.name}", marks=marks)


@pytest.mark.parametrize("run", list(generated()))
def test_law(run):
    run()


def test_every_file_declares_one_method():
    files = [
        path
        for package in ("layers", "weights")
        for path in (ROOT / "kerasnorm" / package).glob("*.py")
        if path.name != "__init__.py"
    ]
    modules = [method.module for method in methods().values()]
    assert len(set(modules)) == len(modules) == len(files)


@pytest.mark.parametrize("name", list(claims()))
def test_every_claim_discriminates(name):
    positions = {method.claims.get(name) for method in methods().values()}
    assert {True, False} <= positions


def test_every_activation_method_has_vectors_images_and_masks():
    for method in methods().values():
        if method.family in ("batch", "sample"):
            ranks = {len(case.shape) for case in method.cases}
            assert {3, 4} <= ranks, method.name
            assert any(case.masked for case in method.cases), method.name


def test_a_false_claim_is_found_out():
    method = methods()["batch"]
    claimed = {**method.claims, "batch_independent": True}
    lying = dataclasses.replace(method, claims=claimed, cases=method.cases[:1])
    with pytest.raises(AssertionError, match="is violated: worst violation"):
        testing.check_method(lying)


@pytest.mark.parametrize(
    "name", ["batch", "group", "instance", "layer", "rms", "scale"]
)
def test_sequences_of_no_length(name):
    """As Keras's own layers take them; a filter may leave nothing of a batch."""
    layer = get(name).layer(**({"groups": 2} if name == "group" else {}))
    for training in (False, True):
        assert layer(np.zeros((3, 0, 8), "float32"), training=training).shape == (
            3,
            0,
            8,
        )


@pytest.mark.filterwarnings("ignore:.*native_serialization")  # of Keras, to JAX
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="sizes are symbols there")
@pytest.mark.parametrize("name", ["group", "instance", "layer", "filter_response"])
def test_export_with_sizes_that_are_symbols(name, tmp_path):
    tf = pytest.importorskip("tensorflow")
    layer = get(name).layer(**({"groups": 2} if name == "group" else {}))
    model = keras.Sequential([keras.Input((None, 8)), layer])
    model.export(tmp_path, verbose=False)
    served = tf.saved_model.load(str(tmp_path))
    for shape in ((2, 5, 8), (3, 40, 8)):
        x = np.random.default_rng(0).normal(size=shape).astype("float32")
        expected = model.predict(x, verbose=0)
        np.testing.assert_allclose(served.serve(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's")
@pytest.mark.parametrize("name", ["batch_layer", "instance", "layer", "rms", "scale"])
def test_an_exported_graph_has_operations_that_other_programs_know(name, tmp_path):
    """TensorFlow Lite lacks the one that is fastest on a CPU."""
    import tensorflow as tf

    layer = get(name).layer()
    model = keras.Sequential([keras.Input((6, 4, 8)), layer])
    model.export(tmp_path, verbose=False)
    served = tf.saved_model.load(str(tmp_path))
    graph = served.signatures["serving_default"].graph.as_graph_def()
    kinds = {n.op for f in graph.library.function for n in f.node_def}
    assert "Rsqrt" in kinds or "Sqrt" in kinds
    assert "EuclideanNorm" not in kinds
    x = np.random.default_rng(0).normal(size=(2, 6, 4, 8)).astype("float32")
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(served.serve(x), expected, rtol=1e-5, atol=1e-6)
