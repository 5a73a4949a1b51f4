"""Time and memory of exact rewrites of a large model, beside a clone with its weights.

python tests/benchmarks/verification.py EfficientNetB7 none sphere bn
"""

from __future__ import annotations

import gc
import os
import pathlib
import sys
import threading
import time

import keras

import kerasnorm


def resident() -> float:
    """Memory of this process in GB (Linux)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def main(name: str, *kinds: str) -> None:
    model = getattr(keras.applications, name)(weights=None)
    started = time.perf_counter()
    keras.models.clone_model(model).set_weights(model.get_weights())
    clone = time.perf_counter() - started
    size = 4 * model.count_params() / 2**30
    for kind in kinds:
        gc.collect()
        before, done = resident(), threading.Event()
        peak = [before]

        def watch(peak=peak, done=done) -> None:
            while not done.wait(0.02):
                peak.append(resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        if kind == "sphere":
            kerasnorm.rewrite(model, weights=kind)
        else:
            kerasnorm.rewrite(model, kind)
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
        print(
            f"{name} {kind}: {seconds:.1f} s, {seconds / clone:.1f} times a clone"
            f" ({clone:.1f} s); {max(peak) - before - size:.2f} GB above both models",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
