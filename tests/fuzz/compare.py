"""What stock Keras does with each hostile file, beside what kerasnorm does.

    python tests/fuzz/compare.py [--write] [GROUP ...]

Prints a table. `--write` puts it into docs/security.md. Each loader runs in a process
of its own that watches itself (`tests/hostile.py`); the payloads read a file that the
program made, or would write an empty one. No case reaches the network.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
import tempfile


TESTS = pathlib.Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "security.md"
MARK = "<!-- cases: python tests/fuzz/compare.py --write -->\n"
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import conftest  # noqa: E402, F401 - the backend, before Keras is imported
import hostile  # noqa: E402
import keras  # noqa: E402
from test_hostile_files import CASES, prepare  # noqa: E402


# A problem's words, and what they mean to a reader; the first that fits.
MEANINGS = (
    (r"ended the process", "**ends the process**"),
    (r"no answer", "**no answer in 30 s**"),
    (r"opened a secret|^open |^os\.|^shutil", "**touches a file outside**"),
    (r"^socket|^urllib|^http", "**connects**"),
    (r"^code\.__new__|^marshal|^exec", "**runs the file's code**"),
    (r"^subprocess", "**starts a program**"),
    (r"^changed (.*?):", r"**changes \1**"),
    (r"^took [\d.]+ GB", "**takes gigabytes**"),
    (r"^took [\d.]+ s", "**takes over 10 s**"),
    (r"^left temporary", "leaves temporary files"),
    (r"^imported (\S+)", r"imports \1"),
    (r"next sound file", "**later loads fail**"),
    (r"message", "an unreadable message"),
)


def said(answer):
    words = {"sound": "loads", "refused": "refuses", "raw": "another exception"}
    found = [words[answer.kind]] if answer.kind in words else []
    for problem in answer.problems:
        for pattern, meaning in MEANINGS:
            match = re.search(pattern, problem)
            if match:
                found.append(match.expand(meaning))
                break
    return ", ".join(dict.fromkeys(found))


def answers(loader, groups):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        with hostile.Process(folder / "process", loader, patience=30) as process:
            for group, name, path in prepare(folder, process, groups):
                yield (group, name), said(process.load(path))
                print(".", end="", file=sys.stderr, flush=True)


def table(groups):
    """Cases that differ in the format alone, and not in the answers, are one row."""
    rows = {}
    ours = dict(answers("kerasnorm", groups))
    for key, stock in answers("keras", groups):
        group, name = key
        case, _, kind = name.partition(", ")
        rows.setdefault((group, case, stock, ours[key]), []).append(kind)
    version = keras.__version__
    yield f"| case | files | `keras.saving.load_model` {version} | `kerasnorm.load` |"
    yield "|---|---|---|---|"
    for (_, case, stock, our), kinds in rows.items():
        case = re.sub("[_|]", " ", case)
        yield f"| {case} | {', '.join(filter(None, kinds))} | {stock} | {our} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", default=list(CASES))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    text = "\n".join(table(arguments.groups)) + "\n"
    print(text)
    if arguments.write:
        before, mark, _ = PAGE.read_text().partition(MARK)
        PAGE.write_text(before + (mark or MARK) + "\n" + text)


if __name__ == "__main__":
    main()
