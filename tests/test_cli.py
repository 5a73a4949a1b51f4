"""The command line: answers, exit codes, what is written and what never is."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import ROOT

import kerasnorm_cli as cli


COMMANDS = tuple(cli.commands())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, and inputs for it."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(8, 3, use_bias=False, name="conv"),
            keras.layers.BatchNormalization(name="bn1"),
            keras.layers.ReLU(),
            keras.layers.Conv2D(8, 3, use_bias=False, name="conv2"),
            keras.layers.BatchNormalization(name="bn2"),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(4),
        ],
        name="tiny",
    )
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, 8) for _ in range(4)])
    x = rng.normal(size=(64, 8, 8, 3)).astype("float32")
    path = tmp_path_factory.mktemp("cli")
    model.save(path / "model.keras")
    np.savez(path / "x.npz", x=x, y=np.zeros(64))
    np.save(path / "x.npy", x)
    np.savez(path / "scalar.npz", x=1.0, y=0)
    (path / "wrong_syntax.py").write_text("class A(:")
    np.savez(path / "nan.npz", x=x * np.nan)
    np.savez(path / "two.npz", a=x, b=x)
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    plain.save(path / "plain.keras")
    return path


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """The same files, in a folder of the test's own."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_json(capsys, *words):
    """Exit code and what --json printed, which must be JSON and nothing else."""
    capsys.readouterr()
    code = cli.main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def outputs(path, x):
    return keras.models.load_model(path).predict(x, verbose=0)


# ---------------------------------------------------------------- before any work


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*filter(None, [command]), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"examples:\n  kerasnorm {command}" in shown


def test_help_and_mistakes_answer_before_keras_is_imported():
    code = "import sys, kerasnorm_cli as c; c.parser(); print('keras' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert run.stdout.split() == [b"False"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "COMMAND"),
        (["swap"], "invalid choice"),
        (["rewrite", "model.keras"], "method"),
        (["rewrite", "model.keras", "gn"], "give -o OUT.keras"),
        (["rewrite", "model.keras", "gn", "-o", "model.keras"], "is an input"),
        (["rewrite", "model.keras", "gn", "-o", "./a/../model.keras"], "is an input"),
        (["rewrite", "model.keras", "gn", "-o", "gn.txt"], "must end in"),
        (["rewrite", "model.keras", "gn", "-o", "no/gn.keras"], "does not exist"),
        (["rewrite", "model.keras", "gn", "-o", "o.keras", "--groups", "0"], "groups"),
        (["rewrite", "model.keras", "gn", "-o", "o.keras", "--fit", "best"], "choice"),
        (["rewrite", "model.keras", "gn", "-o", "o.keras", "--fit", "refit"], "--data"),
        (["rewrite", "model.keras", "gn", "-o", "o.keras", "--set", "axis"], "NAME="),
        (
            ["rewrite", "model.keras", "gn", "-o", "o.keras", "--report", "r.txt"],
            ".json or .md",
        ),
        ("rewrite model.keras gn -o o.keras --report no/r.md".split(), "not exist"),
        ("rewrite model.keras gn -o o.keras --plot no/p.png".split(), "not exist"),
        ("rewrite model.keras gn -o o.keras --plot p.xyz".split(), "must end in"),
        ("rewrite model.keras gn -o o.keras --samples 4".split(), "needs --data"),
        ("rewrite model.keras gn -o o.keras --groups auto".split(), "needs --data"),
        (
            "rewrite model.keras gn -o o.keras --data x.npz --epochs 2".split(),
            "needs --fit distill",
        ),
        ("rewrite model.keras gn --dry-run --report r.md".split(), "not --dry-run"),
        ("rewrite model.keras gn --dry-run --plot p.png".split(), "not --dry-run"),
        ("attack model.keras --data x.npz --plot p.xyz".split(), "must end in"),
        ("attack model.keras --data x.npz --grid no/g.png".split(), "does not exist"),
        ("attack model.keras --data x.npz --keep a/../x.npz".split(), "is an input"),
        ("attack model.keras --data x.npz --keep link.npz".split(), "is an input"),
        ("measure model.keras --data x.npz --report link.md".split(), "is an input"),
        ("load link.keras -o model.keras".split(), "is an input"),
        (["load", "model.keras"], "-o"),
        (["load", "model.keras", "-o", "model.keras"], "is an input"),
        (["load", "model.keras", "-o", "a.keras", "--custom", "Layer"], "MODULE"),
    ],
)
def test_wrong_command_lines(words, says, here, capsys):
    (here / "a").mkdir()
    for name, target in ("npz", "x.npz"), ("md", "x.npz"), ("keras", "model.keras"):
        (here / f"link.{name}").symlink_to(target)
    before = {p.name: p.read_bytes() for p in here.iterdir() if p.is_file()}
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    shown = capsys.readouterr()
    assert stop.value.code == 2 and says in shown.err and not shown.out
    assert before == {p.name: p.read_bytes() for p in here.iterdir() if p.is_file()}


# ---------------------------------------------------------------- the commands


def test_methods(capsys):
    code, result = run_json(capsys, "methods")
    by_name = {m["name"]: m for m in result["methods"]}
    assert code == 0
    assert "gn" in by_name["group"]["aliases"]
    assert cli.main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in by_name)
    code, result = run_json(capsys, "methods", "gn")
    assert code == 0 and result == by_name["group"]
    assert cli.main(["methods", "gn"]) == 0
    assert result["paper"] in capsys.readouterr().out
    assert cli.main(["methods", "goup"]) == 1


def test_inspect(here, capsys):
    code, result = run_json(capsys, "inspect", "model.keras")
    assert code == 0
    assert [s["path"] for s in result["sites"]] == ["bn1", "bn2"]
    assert {s["method"] for s in result["sites"]} == {"batch"}
    assert result["inputs"] == [[None, 8, 8, 3]]
    assert result["parameters"] == keras.models.load_model("model.keras").count_params()
    assert sum(result["methods"]["group"]["possible"].values()) == 2
    assert result["methods"]["batch"]["refused"] == {"already this method": 2}
    assert cli.main(["inspect", "model.keras"]) == 0
    shown = capsys.readouterr().out
    assert "bn1" in shown and "group" in shown


def test_inspect_model_without_norms(here, capsys):
    assert cli.main(["inspect", "plain.keras"]) == 0
    assert "No normalization layer" in capsys.readouterr().out


def test_load_writes_the_same_model(here, capsys):
    code, result = run_json(capsys, "load", "model.keras", "-o", "new.keras")
    assert code == 0 and result["out"] == "new.keras"
    x = np.load("x.npy")
    np.testing.assert_array_equal(outputs("new.keras", x), outputs("model.keras", x))


def test_rewrite(here, capsys, tolerance):
    before = (here / "model.keras").read_bytes()
    code, result = run_json(capsys, "rewrite", "model.keras", "none", "-o", "new.keras")
    assert code == 0 and result["out"] == "new.keras"
    x = np.load("x.npy")
    np.testing.assert_allclose(
        outputs("new.keras", x), outputs("model.keras", x), **tolerance("float32")
    )
    new = keras.models.load_model("new.keras")
    assert not [w for w in new.weights if "moving" in w.path]
    assert (here / "model.keras").read_bytes() == before


def test_rewrite_options_reach_the_layers(here):
    words = ["-o", "new.keras", "--groups", "4", "--set", "epsilon=0.25"]
    assert cli.main(["rewrite", "model.keras", "gn", "--where", "bn1", *words]) == 0
    new = keras.models.load_model("new.keras")
    config = new.get_layer("bn1").get_config()
    assert (config["groups"], config["epsilon"]) == (4, 0.25)
    assert isinstance(new.get_layer("bn2"), keras.layers.BatchNormalization)


def test_rewrite_fits_and_reports(here, capsys):
    pytest.importorskip("matplotlib")
    words = ["rewrite", "model.keras", "gn", "--groups", "4", "-o", "new.keras"]
    words += ["--data", "x.npz", "--fit", "affine"]
    for report in ("r.json", "r.md"):
        assert cli.main([*words, "--report", report, "--plot", "p.png"]) == 0
    assert json.loads((here / "r.json").read_text())
    assert "| " in (here / "r.md").read_text()
    assert (here / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "bn1" in capsys.readouterr().out


def test_dry_run_writes_nothing(here, capsys):
    names = sorted(here.iterdir())
    code, result = run_json(capsys, "rewrite", "model.keras", "gn", "--dry-run")
    assert code == 0 and result["out"] is None
    assert sorted(here.iterdir()) == names
    assert "bn1" in json.dumps(result["plan"])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "words", ["plain.keras gn", "model.keras bn", "model.keras gn --groups 3"]
)
def test_nothing_to_do(words, here, capsys):
    assert cli.main(["rewrite", *words.split(), "-o", "new.keras"]) == 1
    assert not (here / "new.keras").exists()
    shown = capsys.readouterr()
    assert "nothing was written" in shown.err and ("nothing to do" in shown.out)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["inspect", "absent.keras"], "absent.keras"),
        (["inspect", "x.npy"], "x.npy"),
        (["rewrite", "model.keras", "goup", "-o", "o.keras"], "Did you mean"),
        (
            ["rewrite", "model.keras", "gn", "-o", "o.keras", "--data", "two.npz"],
            "named x",
        ),
        (
            ["rewrite", "model.keras", "gn", "-o", "o.keras", "--data", "no.npz"],
            "no.npz",
        ),
        (
            ["rewrite", "model.keras", "gn", "-o", "o.keras", "--data", "model.keras"],
            "model.keras",
        ),
        (
            "rewrite model.keras gn -o o.keras --data nan.npz --fit affine".split(),
            "NaN",
        ),
        (["load", "model.keras", "-o", "o.keras", "--custom", "no_such:C"], "no_such"),
        ("rewrite model.keras gn -o o.keras --set groups=4".split(), "Give --groups"),
        ("rewrite model.keras gn -o o.keras --set model=4".split(), "--help` shows"),
        ("attack model.keras --data x.npy".split(), "no classes"),
        ("attack model.keras --data scalar.npz".split(), "single numbers"),
        ("inspect model.keras --custom wrong_syntax:A".split(), "SyntaxError"),
        (["inspect", "loop"], "loop"),
        (["inspect", "x" * 300], "too long"),
        (["load", "model.keras", "-o", "x" * 300 + ".keras"], "too long"),
        ("rewrite model.keras gn -o o.keras --where zz*".split(), "is selected"),
    ],
)
def test_errors_are_one_message(words, says, here, capsys):
    if not (here / "loop").is_symlink():
        (here / "loop").symlink_to("loop")
    assert cli.main(words) == 1
    shown = capsys.readouterr()
    assert says.lower() in shown.err.lower()
    assert "Traceback" not in shown.err and "should not happen" not in shown.err
    assert not (here / "o.keras").exists()
    code, result = run_json(capsys, *words)
    assert code == 1 and set(result) == {"error"} and result["error"]["what"]


def test_compass_without_a_method_left(here, capsys, monkeypatch):
    monkeypatch.setattr("kerasnorm.properties.Compass.best", None)
    words = "compass model.keras --data x.npy --samples 8 --methods in --report c.json"
    assert cli.main(words.split()) == 1
    shown = capsys.readouterr()
    assert "no method is left" in shown.err and "nothing was written" not in shown.err
    assert "saved c.json" in shown.out and (here / "c.json").exists()


def test_a_report_appears_whole_or_not_at_all(here, monkeypatch):
    def broken(self, text, **more):
        self.write_bytes(b"half")
        raise OSError("no space left")

    words = "rewrite model.keras gn --groups 4 -o o.keras --report r.md".split()
    assert cli.main(words) == 0
    before = (here / "r.md").read_bytes()
    monkeypatch.setattr("kerasnorm.common.results.Path.write_text", broken)
    assert cli.main(words) == 1
    assert (here / "r.md").read_bytes() == before and not [*here.glob(".saving_*")]


def test_debug_shows_where_it_came_from(here):
    with pytest.raises(ValueError, match=r"absent\.keras"):
        cli.main(["inspect", "absent.keras", "--debug"])


def test_custom_objects_are_imported_from_here(here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (here / "own_layers.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable('own')\n"
        "class Twice(keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return x * 2.0\n"
    )
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import keras, own_layers\n"
        "keras.Sequential([keras.Input((3,)), own_layers.Twice()]).save('own.keras')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert cli.main(["inspect", "own.keras"]) == 1
    assert "Twice" in capsys.readouterr().err
    assert cli.main(["inspect", "own.keras", "--custom", "own_layers:Twice"]) == 0


def test_as_a_program(here):
    """In a process of its own: exit code, and stdout that a program can read."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-m", "kerasnorm", "inspect", "model.keras", "--json"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["name"] == "tiny"


# ------------------------------------------------------------ what reaches the terminal


def program(here, words, more=None, **run):
    start = "import sys, kerasnorm_cli as c; sys.exit(c.main(sys.argv[1:]))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(more or {})}
    return subprocess.run(
        [sys.executable, "-c", start, *words], env=env, stderr=-1, **run
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_terminals_without_the_letters(encoding):
    import io

    from kerasnorm_cli._output import show

    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    show("a ───│ μ \x1b[2J\rb\u202e", stream)
    seen = stream.buffer.getvalue().decode(encoding)
    assert "---|" in seen and "\\x1b[2J\\rb\\u202e" in seen
    assert "\x1b" not in seen and "\r" not in seen


@pytest.mark.ci
def test_no_traceback_wherever_it_runs(here):
    """A reader that left, a wrong backend, a folder that is gone, narrow terminals."""
    gone = here / "gone"
    gone.mkdir()
    code = (
        f"import os, sys; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r});"
        "import kerasnorm_cli as c; sys.exit(c.main(['load', 'a.h5', '-o', 'b.keras']))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], env=env, stderr=-1)
    assert found.returncode == 1 and b"Traceback" not in found.stderr
    for words in ["methods", "--json"], ["methods"]:
        read, write = os.pipe()
        os.close(read)
        found = program(here, words, stdout=write)
        os.close(write)
        assert found.returncode == 1
        assert b"Traceback" not in found.stderr and b"Broken" not in found.stderr
    found = program(here, ["methods", "--json"], {"KERAS_BACKEND": "no"}, stdout=-1)
    assert found.returncode == 1 and b"cannot start on 'no'" in found.stderr
    assert b"Traceback" not in found.stderr
    for encoding in "ascii", "cp1252":
        more = {"PYTHONIOENCODING": encoding}
        found = program(here, ["inspect", "model.keras"], more, stdout=-1)
        assert found.returncode == 0 and b"bn1" in found.stdout
