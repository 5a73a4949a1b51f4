"""How long a rewrite takes, what `import kerasnorm` costs, and what folding saves.

    python tests/benchmarks/rewriting.py [--repeats 5] [--model ResNet50]

Prints ratios within one run: the sides of each comparison take turns.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import keras
import numpy as np

import kerasnorm


def turns(repeats, **sides):
    """Median seconds of each side; they take turns, after one run each."""
    seconds = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def clone_and_copy(model):
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def import_seconds(repeats):
    """Median seconds that `import kerasnorm` adds to `import keras`."""
    code = (
        "import time, keras; t = time.perf_counter(); import kerasnorm;"
        "print(time.perf_counter() - t)"
    )
    runs = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(repeats)
    ]
    return statistics.median(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="ResNet50")
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    shape = (args.size, args.size, 3)
    model = getattr(keras.applications, args.model)(weights=None, input_shape=shape)

    t = turns(
        args.repeats,
        clone=lambda: clone_and_copy(model),
        rewrite=lambda: kerasnorm.rewrite(model, "gn"),
    )
    print(f"{args.model}, {keras.backend.backend()} backend")
    print(f"clone_model + copy of the weights  {t['clone']:.2f} s")
    print(
        f"rewrite(model, 'gn')               {t['rewrite']:.2f} s"
        f"   {t['rewrite'] / t['clone']:.2f} times"
    )
    print(f"import kerasnorm after keras       {import_seconds(args.repeats):.3f} s")

    folded = kerasnorm.rewrite(model, "none")
    x = np.random.default_rng(0).normal(size=(16, *shape)).astype("float32")
    t = turns(
        args.repeats,
        original=lambda: model.predict(x, batch_size=8, verbose=0),
        folded=lambda: folded.predict(x, batch_size=8, verbose=0),
    )
    print(
        f"predict, 16 images: original {t['original']:.2f} s, folded"
        f" {t['folded']:.2f} s, {t['original'] / t['folded']:.2f} times faster"
    )


if __name__ == "__main__":
    main()
