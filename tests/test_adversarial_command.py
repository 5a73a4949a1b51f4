"""`kerasnorm attack`: answers, files, exit codes."""

from __future__ import annotations

import json

import adversarial_models as zoo
import numpy as np
import pytest

import kerasnorm_cli as cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("attack")
    model, w, b = zoo.linear()
    x = zoo.images(30)
    model.save(path / "model.keras")
    np.savez(path / "xy.npz", x=x, y=zoo.labels(w, b, x))
    np.savez(path / "x.npz", x=x)
    np.savez(path / "wrong.npz", x=x, y=np.full(30, 99))
    return path


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def test_json_figures_and_files(here, capsys):
    words = "attack model.keras --data xy.npz --attacks pgd,noise --eps 4/255,0.1"
    files = "--report r.md --plot p.png --grid g.png --keep k.npz --samples 20 --json"
    # Two channels are no image that can be drawn.
    assert cli.main([*words.split(), *files.replace("--grid g.png ", "").split()]) == 0
    out = json.loads(capsys.readouterr().out)["evaluation"]
    assert out["samples"] == 20 and out["eps"] == [4 / 255, 0.1]
    assert [a["name"] for a in out["attacks"]] == ["pgd", "noise"] * 2
    for name in ("r.md", "p.png", "k.npz"):
        assert (here / name).stat().st_size > 100


def test_table(here, capsys):
    assert cli.main("attack model.keras --data xy.npz --attacks fgsm".split()) == 0
    out = capsys.readouterr().out
    assert "fgsm" in out and "30 points" in out and "model.keras" in out


@pytest.mark.parametrize(
    "words",
    [
        "--data xy.npz --eps -1",
        "--data xy.npz --eps nan",
        "--data xy.npz --bounds 1,0",
        "--data xy.npz --report r.txt",
        "--data xy.npz --plot nowhere/p.png",
        "--data xy.npz --keep xy.npz",
        "",
    ],
)
def test_wrong_command_lines(words, here, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["attack", "model.keras", *words.split()])
    assert exit.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        ("--data x.npz", "no classes"),
        ("--data wrong.npz", "does not have"),
        ("--data xy.npz --attacks nonsense", "no such attack"),
        ("--data xy.npz --bounds 0,0.5", "out of bounds"),
        ("--data missing.npz", "cannot be read"),
    ],
)
def test_refusals(words, message, here, capsys):
    assert cli.main(["attack", "model.keras", *words.split()]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out
