"""What the README and docs show runs: python blocks, and kerasnorm commands."""

from __future__ import annotations

import re
import shlex

import keras
import numpy as np
import pytest
from conftest import ROOT

import kerasnorm
import kerasnorm_cli as cli
from kerasnorm.method import registry


PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
LINK = re.compile(r"\]\((?!https?://)([^)#]+)")


def blocks(page, language):
    """(line number, text) of the fenced blocks of one language."""
    text = page.read_text("utf-8")
    for match in FENCE.finditer(text):
        if match[1] == language:
            yield text.count("\n", 0, match.start()) + 2, match[2]


def commands(page):
    """The kerasnorm commands of a page, continuation lines joined, comments gone."""
    for line, text in blocks(page, "sh"):
        for command in text.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            if words[:1] == ["kerasnorm"]:
                yield line, words[1:]


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """The small model that the pages call model.h5, with the inputs they call x."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input((8, 8, 3))]
    for block in ("block1", "block2"):
        layers += [
            keras.layers.Conv2D(8, 3, use_bias=False, name=f"{block}_conv"),
            keras.layers.BatchNormalization(name=f"{block}_bn"),
            keras.layers.ReLU(name=f"{block}_relu"),
        ]
    layers += [
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(4, name="dense"),
    ]
    model = keras.Sequential(layers)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).normal(size=(64, 8, 8, 3)).astype("float32")
    model.fit(x, np.arange(64) % 4, epochs=2, verbose=0)
    folder = tmp_path_factory.mktemp("saved")
    # The page shows a file of another age; saving one is not what is tested.
    keras.src.legacy.saving.legacy_h5_format.save_model_to_hdf5(
        model, str(folder / "model.h5")
    )
    model.save(folder / "model.keras")
    np.savez(folder / "images.npz", x=x)
    np.savez(folder / "xy.npz", x=x, y=np.arange(64) % 4)
    return folder


@pytest.fixture
def workplace(saved_model, tmp_path, monkeypatch):
    for file in saved_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    return np.load("images.npz")["x"]


@pytest.mark.parametrize(
    "page", [p for p in PAGES if list(blocks(p, "python"))], ids=lambda p: p.name
)
def test_python_blocks_run(page, workplace, monkeypatch):
    """Top to bottom in one namespace, as a reader would."""
    kerasnorm.methods()  # all are found before a page adds its own, for itself alone
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    names = {"__name__": page.stem, "kerasnorm": kerasnorm, "keras": keras}
    names |= {"np": np, "x": workplace}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if list(commands(p))], ids=lambda p: p.name
)
def test_commands_run(page, workplace):
    for line, words in commands(page):
        assert cli.main(words) == 0, f"{page.name}:{line}: kerasnorm {words}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M)
    broken = [t for t in LINK.findall(text) if not (page.parent / t).exists()]
    assert not broken


def test_every_option_is_documented():
    page = (ROOT / "docs/command-line.md").read_text("utf-8")
    top = cli.parser()
    commands = next(a for a in top._actions if isinstance(a.choices, dict)).choices
    options = {
        option
        for parser in (top, *commands.values())
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    assert len(options) > 10
    assert not {o for o in options - {"--help"} if f"`{o}" not in page}


def test_every_reason_is_documented():
    page = (ROOT / "docs/refusals.md").read_text("utf-8")
    assert not [r for r in registry.Reason if f"| {r.value} |" not in page]
    assert not [f for f in registry.Fidelity if f"| {f.value} |" not in page]
