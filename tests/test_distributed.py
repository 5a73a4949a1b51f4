"""Training and evaluation on several devices end at the numbers of one.

Devices are split, and workers started, before TensorFlow or JAX is used, so that every
test runs `distributed.py` in processes of its own, on whatever backend the other tests
run.
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

from kerasnorm.method.registry import methods


pytestmark = pytest.mark.ci
HERE = pathlib.Path(__file__).resolve().parent
TENSORFLOW = keras.backend.backend() == "tensorflow"
# Within the normal tests JAX has its turn here; within those on JAX, TensorFlow has had
# it already.
needs_tensorflow = pytest.mark.skipif(not TENSORFLOW, reason="TensorFlow's own")


def start(*arguments, backend="tensorflow", **more):
    """A process that runs a function of `distributed.py`."""
    env = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(HERE.parent)}
    return subprocess.Popen(
        [sys.executable, str(HERE / "distributed.py"), *map(str, arguments)],
        env={**env, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process):
    """What the process printed last."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-4000:]
    return json.loads(out.splitlines()[-1])


def cluster(folder, what):
    """Two workers that find each other on the loopback."""
    with socket.socket() as a, socket.socket() as b:
        for s in (a, b):
            s.bind(("127.0.0.1", 0))
        workers = [f"127.0.0.1:{s.getsockname()[1]}" for s in (a, b)]
    return [
        start(
            *("worker", folder, what),
            TF_CONFIG=json.dumps(
                {
                    "cluster": {"worker": workers},
                    "task": {"type": "worker", "index": index},
                }
            ),
        )
        for index in range(2)
    ]


def check(found, names):
    """Nothing differs by more than 1e-5, and nothing was left out."""
    assert not found["methods"]
    assert found["compared"] == len([m for m in methods().values() if m.layer])
    lives = found.get("lives", {})
    assert set(lives) >= set(names)
    assert {k: v for k, v in lives.items() if not v <= 1e-5} == {}


@needs_tensorflow
def test_mirrored(tmp_path):
    """Two devices: every method, a training with its callbacks, and fits."""
    check(
        result(start("mirrored", tmp_path)),
        "weights loss val_pgd_accuracy sphere/cosine gradient_norm affine refit "
        "distill".split(),
    )
    # Each epoch was evaluated and written once, on one device and on two.
    for file in tmp_path.glob("*.jsonl"):
        assert len(file.read_text("utf-8").splitlines()) == 3
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


@needs_tensorflow
def test_two_workers(tmp_path):
    """Two processes: every method, and a training that is interrupted."""
    for found in map(result, cluster(tmp_path, "whole")):
        check(found, ["weights", "loss", "val_pgd_accuracy", "sphere/cosine"])
    # The chief alone has written.
    lines = (tmp_path / "evaluations.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]

    first, second = cluster(tmp_path, "lost")
    second.communicate(timeout=600)
    assert second.returncode == -9
    # What manages a cluster ends the rest and starts anew.
    first.kill()
    first.communicate(timeout=600)
    assert not list(tmp_path.glob("lost-*.npz"))
    for process in cluster(tmp_path, "resumed"):
        assert result(process) == {"first epoch": 1}
    for worker in range(2):
        whole = np.load(tmp_path / f"whole-{worker}.npz")
        resumed = np.load(tmp_path / f"resumed-{worker}.npz")
        assert whole.files == resumed.files
        for name in whole.files:
            np.testing.assert_allclose(
                resumed[name], whole[name], rtol=1e-5, atol=1e-5, err_msg=name
            )


def test_data_parallel():
    """Four devices that JAX makes of the CPU."""
    flags = "--xla_force_host_platform_device_count=4"
    # Nothing here is timed, and compiling takes most of the time.
    process = start(
        "data_parallel",
        backend="jax",
        XLA_FLAGS=flags,
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    check(result(process), [])
