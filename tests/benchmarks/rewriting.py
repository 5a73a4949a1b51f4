"""How long a rewrite takes, what `import kerasnorm` costs, and what folding saves.

    python tests/benchmarks/rewriting.py [--repeats 5] [--model ResNet50]

Prints ratios within one run: the sides of each comparison take turns.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import time

import keras
import numpy as np

import kerasnorm


def turns(repeats, **sides):
    """Least seconds of each side; they take turns, after one run each.

    The least, because whatever else the machine does can only add.
    """
    seconds = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: min(s) for name, s in seconds.items()}


def clone_and_copy(model):
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def import_seconds(repeats):
    """Median seconds that `import kerasnorm` adds to `import keras`.

    From bytecode, which an installation writes and the first of these runs does here.
    """
    code = (
        "import time, keras; t = time.perf_counter(); import kerasnorm;"
        "print(time.perf_counter() - t)"
    )
    run = functools.partial(
        subprocess.run,
        [sys.executable, "-c", code],
        env={k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"},
        capture_output=True,
        text=True,
        check=True,
    )
    return statistics.median([float(run().stdout) for _ in range(repeats + 1)][1:])


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
    for batch in (1, 8, 32):
        images = max(batch, 8)
        x = np.random.default_rng(0).normal(size=(images, *shape)).astype("float32")
        t = turns(
            3 * args.repeats,
            original=functools.partial(model.predict, x, batch, verbose=0),
            folded=functools.partial(folded.predict, x, batch, verbose=0),
        )
        print(
            f"predict, {images} images, batch {batch}: original {t['original']:.2f} s,"
            f" folded {t['folded']:.2f} s,"
            f" {t['original'] / t['folded']:.2f} times faster"
        )


if __name__ == "__main__":
    main()
