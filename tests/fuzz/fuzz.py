"""Loads changed model files by the thousand and prints what came of them.

    python tests/fuzz/fuzz.py [--inputs N | --minutes M] [--seed S] [--keep FOLDER]
    python tests/fuzz/fuzz.py --seed S --only I     # one input again, with its answer

Input I of seed S is always the same file. An input fails that breaks a promise of
`kerasnorm.load`: see `tests/hostile.py`, whose processes load and watch. Failures are
written to the folder of `--keep`; a small one belongs into `tests/fuzz/corpus`, which
the tests load.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import sys
import tempfile
import threading
import time
import zipfile
import zlib


HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import conftest  # noqa: E402, F401 - the backend, before Keras is imported
import containers  # noqa: E402
import hostile  # noqa: E402
import numpy as np  # noqa: E402
import seeds  # noqa: E402

from rewriters.errors import RewriteError  # noqa: E402


# Files whose next sound file is loaded together; if it fails, each is tried alone.
BATCH = 20


def write(files, path):
    """The file, or the folder of files, at a path."""
    if list(files) == [""]:
        path.write_bytes(files[""])
        return path
    for name, data in files.items():
        place = path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return path


def remove(path):
    if path.is_dir():
        for place in sorted(path.rglob("*"), reverse=True):
            place.rmdir() if place.is_dir() else place.unlink()
        path.rmdir()
    else:
        path.unlink()


def make(sound, seed, index):
    """(name of the sound file, what was done, the files) of an input."""
    rng = np.random.default_rng([seed, index])
    name = containers.pick(rng, sorted(sound))
    done, files = [], sound[name]
    for _ in range(containers.pick(rng, (1, 1, 1, 1, 2))):
        # A second change may meet what the first one left unreadable.
        with contextlib.suppress(
            zipfile.BadZipFile, zlib.error, NotImplementedError, ValueError, EOFError,
            RuntimeError, OSError, KeyError, RewriteError,
        ):  # fmt: skip
            what, files = containers.mutate(name, files, rng)
            done.append(what)
    return name, " + ".join(done) or "nothing", files


class Run:
    """Threads that make inputs, each with a process that loads them."""

    def __init__(self, folder, sound, seed, keep):
        self.folder, self.sound, self.seed, self.keep = folder, sound, seed, keep
        self.lock = threading.Lock()
        self.next, self.last, self.until = 0, None, None
        self.counts = collections.Counter()
        self.by_format = collections.defaultdict(collections.Counter)
        self.by_change = collections.defaultdict(collections.Counter)
        self.failures = []
        self.slowest = (0.0, 0)
        self.largest = (0, 0)

    def take(self):
        with self.lock:
            late = self.until is not None and time.monotonic() > self.until
            if late or (self.last is not None and self.next >= self.last):
                return None
            self.next += 1
            return self.next - 1

    def work(self, number):
        place = self.folder / str(number)
        with hostile.Process(place, every=BATCH) as process:
            batch = []
            while (index := self.take()) is not None:
                batch.append(index)
                answer = self.one(process, place, index)
                if any(p.startswith("the next sound") for p in answer.problems):
                    self.pin(place, batch)
                if len(batch) == BATCH or process.fresh:
                    batch = []

    def pin(self, place, batch):
        """Each of the files after which a sound one fails, in a process of its own."""
        for index in batch:
            with hostile.Process(place / "pin") as process:
                self.one(process, place / "pin", index, count=False)

    def one(self, process, place, index, count=True):
        with self.lock:  # libhdf5 is one for all threads
            name, done, files = make(self.sound, self.seed, index)
        kind = pathlib.Path(name).suffix or "folder"
        path = write(files, place / f"{index}_{name}")
        answer = process.load(path)
        remove(path)
        with self.lock:
            if count:
                for counter in (
                    self.counts,
                    self.by_format[f"{name[:2]} {kind}"],
                    self.by_change[done.split(" + ")[0]],
                ):
                    counter[answer.kind] += 1
                self.slowest = max(self.slowest, (answer.seconds, index))
                self.largest = max(self.largest, (answer.grown, index))
            found = answer.against("either")
            if found and not all(p.startswith("the next sound") for p in found):
                self.fail(index, name, done, files, answer, found)
        return answer

    def fail(self, index, name, done, files, answer, found):
        self.failures.append(index)
        print(f"\n{index} {name}, {done}: {found}\n{answer.text[-600:]}", flush=True)
        if self.keep:
            self.keep.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256(b"".join(files.values())).hexdigest()[:10]
            write(files, self.keep / f"{digest}_{name}")
            note = {"seed": self.seed, "input": index, "change": done, "found": found}
            (self.keep / f"{digest}.json").write_text(
                json.dumps({**note, "text": answer.text}, indent=1)
            )

    def go(self, inputs, minutes, workers):
        start = time.monotonic()
        self.last = inputs
        self.until = start + 60 * minutes if minutes else None
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(self.work, i) for i in range(workers)]:
                done.result()  # a fault of the fuzzer itself is no quiet end
        return time.monotonic() - start

    def report(self, seconds):
        total = sum(self.counts.values())
        kinds = ("refused", "sound", "raw", "dead", "late")
        print(f"\n{total} inputs of seed {self.seed} in {seconds / 60:.1f} minutes")
        for title, table in (
            ("all", {"all": self.counts}),
            ("by format", self.by_format),
            ("by change", self.by_change),
        ):
            print(f"\n{title:34}" + "".join(f"{k:>9}" for k in kinds))
            for name in sorted(table):
                print(f"{name:34}" + "".join(f"{table[name][k]:9}" for k in kinds))
        print(f"\nmost CPU {self.slowest[0]:.1f} s (input {self.slowest[1]})")
        print(f"most memory {self.largest[0] / 1e6:.0f} MB (input {self.largest[1]})")
        print(f"failures: {len(self.failures)} {self.failures[:50]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, help="how many; 1000 if no minutes")
    parser.add_argument("--minutes", type=float, help="for how long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one input")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--keep", type=pathlib.Path, help="folder of the failures")
    arguments = parser.parse_args()
    inputs = arguments.inputs
    if inputs is None and arguments.minutes is None:
        inputs = 1000
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "seeds").mkdir()
        sound = seeds.write(folder / "seeds")
        run = Run(folder, sound, arguments.seed, arguments.keep)
        if arguments.only is not None:
            with hostile.Process(folder / "0") as process:
                print(run.one(process, folder / "0", arguments.only))
            return bool(run.failures)
        run.report(run.go(inputs, arguments.minutes, arguments.workers))
        return bool(run.failures)


if __name__ == "__main__":
    sys.exit(main())
