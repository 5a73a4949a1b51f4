"""Fits and evaluations of data that never has to be in memory at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
import weakref

import conftest
import keras
import numpy as np
import pytest
from keras import layers

import kerasnorm
from kerasnorm.adversarial import Evaluator, evaluate
from kerasnorm.common.data import collect
from kerasnorm.common.errors import KerasNormError


class Drawn(keras.utils.PyDataset):
    """Images made when they are asked for; knows how many were, and how many bytes of
    them are held by anybody."""

    def __init__(self, batches, rows=16, bad=None):
        super().__init__()
        self.batches, self.rows, self.bad = batches, rows, bad
        self.read, self.held, self.most = 0, 0, 0
        self.labels = None

    def __len__(self):
        return self.batches

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        y = rng.integers(0, 3, self.rows)
        x = rng.random((self.rows, 6, 6, 2), "float32") / 2
        x[..., 0] += y[:, None, None] / 6
        if index == self.bad:
            x[0, 0, 0, 0] = np.nan
        if self.labels is not None:
            y = self.labels[index]
        self.read += 1
        self.held += x.nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(x, self._gone, x.nbytes)
        return x, y

    def _gone(self, size):
        self.held -= size

    def arrays(self):
        batches = [self[k] for k in range(len(self))]
        return [np.concatenate(a) for a in zip(*batches, strict=True)]


@pytest.fixture
def model():
    made = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(8, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    rng = np.random.default_rng(0)
    for v in made.variables:
        low = 0.3 if "variance" in v.path else -1
        v.assign(rng.uniform(low, 1, v.shape))
    return made


def distilled(model, data, memory, epochs=2):
    return kerasnorm.rewrite(
        *(model, "gn"),
        groups=2,
        data=data,
        fit="distill",
        fit_options={"epochs": epochs, "batch_size": 32, "memory": memory},
        verbose=False,
        return_report=True,
    )


SAMPLE = 6 * 6 * 2 * 4  # bytes


def test_distillation_streams(model):
    """What does not fit is read anew in each epoch, and little of it is held."""
    held = 4 * 64 * SAMPLE  # a quarter, 64 samples, may be held
    for batches in (20, 40):
        data = Drawn(batches)
        new, report = distilled(model, data, held)
        # Once until a quarter is full, then two epochs: time grows with the data.
        assert 2 * batches <= data.read <= 2 * batches + 16
        assert data.most <= 64 * SAMPLE + 4 * 16 * SAMPLE
        assert not any("the first" in note for note in report.fit.notes)
    x, _ = data.arrays()
    plain = kerasnorm.rewrite(model, "gn", groups=2)
    wanted = model.predict(x, verbose=0)

    def gap(other):
        return np.abs(other.predict(x, verbose=0) - wanted).mean()

    assert gap(new) < gap(plain) / 2
    loss = report.fit.history["loss"]
    assert len(loss) == 2
    assert np.isfinite(loss).all()


def test_what_fits_is_held(model):
    data = Drawn(8)
    distilled(model, data, 2e9)
    assert data.read == 8


def test_every_sample_comes_once_a_reading(model):
    data = Drawn(5, rows=14)
    inputs = collect(model, data, memory=20 * SAMPLE)
    assert inputs.cut
    assert len(inputs.stream) == 70
    batches = inputs.stream.shuffled(10, 0, memory=30 * SAMPLE)
    got = np.concatenate([next(batches)[0] for _ in range(7)]).reshape(70, -1)
    x = data.arrays()[0].reshape(70, -1)
    assert not np.array_equal(got, x)
    np.testing.assert_array_equal(np.sort(got[:, 0]), np.sort(x[:, 0]))


def test_a_generator_gives_its_batches_once(model):
    data = Drawn(20)
    _, report = distilled(model, (data[k] for k in range(20)), 4 * 64 * SAMPLE)
    assert any("to save memory" in note for note in report.fit.notes)
    assert data.read < 20


def test_a_source_that_cannot_be_read_again(model):
    data = Drawn(20)

    class Once:
        def __init__(self):
            self.left = iter([data[k] for k in range(20)])

        def __iter__(self):
            return self.left

    with pytest.raises(KerasNormError, match="read only once"):
        distilled(model, Once(), 4 * 64 * SAMPLE, epochs=3)


def test_bad_values_are_found_on_the_way(model):
    with pytest.raises(KerasNormError, match="NaN or infinite"):
        distilled(model, Drawn(20, bad=17), 4 * 64 * SAMPLE)


def dataset(data):
    tf = pytest.importorskip("tensorflow")
    x, y = data.arrays()
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(24)


SOURCES = {
    "PyDataset": lambda data: data,
    "tf.data": dataset,
    "generator": lambda data: (data[k] for k in range(len(data))),
}


@pytest.mark.parametrize("source", SOURCES)
def test_robust_accuracy_of_a_source(model, source):
    data = Drawn(9)
    x, y = data.arrays()
    y = (model.predict(x, verbose=0).argmax(1) + (y == 2)) % 3  # a third is wrong
    data.labels = y.reshape(9, -1)
    whole = evaluate(model, x, y, attacks=["fgsm", "bim"], eps=0.03)
    assert 0 < whole.robust_accuracy < whole.clean_accuracy
    evaluator = Evaluator(model, ["fgsm", "bim"], eps=0.03, batch_size=8)
    found = evaluator(SOURCES[source](data))
    assert evaluator.traces == {"fgsm": 1, "bim": 1}
    assert found.robust == whole.robust
    assert found.clean_accuracy == whole.clean_accuracy
    np.testing.assert_array_equal(found.y, whole.y)
    np.testing.assert_array_equal(found.predicted, whole.predicted)
    np.testing.assert_allclose(found.distance, whole.distance, rtol=1e-5)
    for a, b in zip(found.attacks, whole.attacks, strict=True):
        assert (a.name, a.tried, a.fallen, a.steps) == (
            *(b.name, b.tried, b.fallen, b.steps),
        )
        assert a.accuracy == b.accuracy


def test_an_evaluation_holds_a_few_batches(model):
    data = Drawn(40, rows=8)
    evaluate(model, data, attacks="fgsm", eps=0.03, batch_size=8)
    assert data.most <= 2 * 4 * 8 * SAMPLE


def test_what_is_no_source(model):
    x, y = Drawn(2).arrays()
    with pytest.raises(KerasNormError, match="without classes"):
        evaluate(model, x, attacks="fgsm")
    with pytest.raises(KerasNormError, match="batches without classes"):
        evaluate(model, iter([x]), attacks="fgsm")
    with pytest.raises(KerasNormError, match="nothing to attack"):
        evaluate(model, iter([]), attacks="fgsm")
    with pytest.raises(KerasNormError, match="bounds of a source"):
        evaluate(model, iter([(x, y)]), attacks="fgsm", bounds=None)


@pytest.mark.parametrize("source", SOURCES)
def test_a_measurement_reads_what_it_needs(model, source):
    data = Drawn(9)
    x, _ = data.arrays()
    data.read = 0
    whole = kerasnorm.properties.measure(model, x[:48], batch_size=16, samples=48)
    found = kerasnorm.properties.measure(
        model, SOURCES[source](data), batch_size=16, samples=48
    )
    one, other = ({**m.to_dict(), "seconds": 0} for m in (found, whole))
    assert one == other
    assert source == "tf.data" or data.read == 3


def test_memory_of_a_long_reading():
    """2000 images of 64 by 64 take 98 MB, of which 4 MB may be held."""
    model = keras.Sequential([keras.Input((64, 64, 3)), layers.Flatten()])
    batches = [k % 7 for k in range(100)]

    class Images(keras.utils.PyDataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, index):
            return np.random.default_rng(batches[index]).random((20, 64, 64, 3), "f4")

    tracemalloc.start()
    inputs = collect(model, Images(), memory=4e6)
    rows = inputs.stream.shuffled(32, 0, memory=4e6)
    for _ in range(2 * 2000 // 32):
        next(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 25e6


@pytest.mark.ci
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_benchmark_of_memory():
    """A small part of it; with 100 000 images it took 1.1 GB above the models."""
    script = conftest.ROOT / "tests" / "benchmarks" / "streaming.py"
    run = subprocess.run(
        [sys.executable, script, "--one", "affine", "300"],
        env={**os.environ, "PYTHONPATH": str(conftest.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert 0 < json.loads(run.stdout.splitlines()[-1])["peak"] < 500
