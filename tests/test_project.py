"""The shape of the project: who imports whom, what is documented, what is heavy."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT


# One line a floor, one entry a room: a folder, or a module at the root of kerasnorm.
# Imports go strictly down.
FLOORS = (
    ("rewriters",),
    ("rewriters.formats", "kerasnorm.common", "kerasnorm.numerics"),
    ("kerasnorm.method", "kerasnorm.runtime"),
    ("kerasnorm.kernels", "kerasnorm.recurrent", "kerasnorm.layers"),
    ("kerasnorm.flow", "kerasnorm.adversarial"),
    ("kerasnorm.weights", "kerasnorm.sphere", "kerasnorm.fitting"),
    ("kerasnorm.rewriting",),
    ("kerasnorm.properties",),
    ("kerasnorm.callbacks", "kerasnorm_cli"),
    ("kerasnorm",),
)
# Tests compare with these or users migrate from them; nothing may need them.
NEVER_IMPORTED = {"tensorflow_addons", "keras_contrib", "sklearn", "PIL"}
# Loaded inside the function that needs them, so that `import kerasnorm` stays light.
IMPORTED_LATE = {"matplotlib", "tf_keras", "tensorflow", "jax", "rich.progress"}
# A longer file wants a reason, given here.
MAX_LINES = 450
LONGER = {
    "kerasnorm/layers/streaming.py": "statistics, their gradients, and both simulated",
    "kerasnorm/recurrent.py": "a cell and a layer for each kind of recurrence",
    "kerasnorm/fitting/walk.py": "two graphs walked in step, call by call",
    "kerasnorm/method/testing.py": "every law that every method is held to",
    "rewriters/formats/modernize.py": "a rule for each thing that Keras renamed",
    "rewriters/formats/tensorflow_ops.py": "an entry for each TensorFlow operation",
}

FILES = sorted(
    p
    for package in ("rewriters", "kerasnorm", "kerasnorm_cli")
    for p in ROOT.glob(f"{package}/**/*.py")
)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in FILES}
TREES = {name: ast.parse(p.read_text("utf-8")) for name, p in MODULES.items()}


def imports(name, *, at_import=False):
    """Absolute names that a module imports; `at_import` leaves functions out."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    pending = list(TREES[name].body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not (
            at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ):
            pending += ast.iter_child_nodes(node)


def component(name):
    """The part of the project a module belongs to; None for other packages."""
    parts = name.split(".")
    if name == "kerasnorm.__main__":  # `python -m kerasnorm` is the command line
        return "kerasnorm_cli"
    if parts[0] == "kerasnorm" or parts[:2] == ["rewriters", "formats"]:
        return ".".join(parts[:2])
    return parts[0] if parts[0] in ("rewriters", "kerasnorm_cli") else None


def rooms():
    """Each room, with those it imports from."""
    found = {}
    for name in MODULES:
        others = {component(other) for other in imports(name)}
        found.setdefault(component(name), set()).update(
            others - {None, component(name)}
        )
    return found


def floor(room):
    numbers = [n for n, floor in enumerate(FLOORS) if room in floor]
    assert numbers, f"{room} has no floor: add it to FLOORS"
    return numbers[0]


def test_imports_go_strictly_down():
    upward = [
        f"{room} imports {other}"
        for room, others in rooms().items()
        for other in others
        if floor(other) >= floor(room)
    ]
    assert not upward, "\n".join(upward)
    assert {room for floor in FLOORS for room in floor} == set(rooms())


def test_the_house_is_small():
    assert len(rooms()) <= 20 and len(FLOORS) <= 10
    modules = {p.name for p in (ROOT / "kerasnorm").glob("*.py")}
    assert len(modules) <= 4, modules


def test_modules_have_no_cycle_at_import():
    graph = {
        name: {o for o in imports(name, at_import=True) if o in MODULES and o != name}
        for name in MODULES
    }
    # A package's `__init__` gathers its modules; importing one runs it first, which
    # Python allows as long as the module itself does not ask the package for names.
    graphlib.TopologicalSorter(graph).prepare()


def test_nothing_forbidden_is_imported():
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imports(name)
        if other.split(".")[0] in NEVER_IMPORTED
    ]
    early = [
        f"{name} imports {other} at import"
        for name in MODULES
        for other in imports(name, at_import=True)
        if {other, other.split(".")[0]} & IMPORTED_LATE
    ]
    assert not wrong + early, "\n".join(wrong + early)


def test_importing_is_light():
    """On JAX, so that TensorFlow in memory would be ours and not the backend's."""
    pytest.importorskip("jax")
    late = NEVER_IMPORTED | IMPORTED_LATE
    code = (
        "import sys, keras; before = set(sys.modules); import kerasnorm\n"
        f"print(sorted({late} & (set(sys.modules) - before)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", MODULES)
def test_public_names_have_docstrings(name):
    """The functions of a method or a command are hooks, described in one place."""
    hooks = component(name) in (
        "kerasnorm.layers",
        "kerasnorm.weights",
        "kerasnorm_cli",
    )
    kinds = ast.ClassDef if hooks else (ast.FunctionDef, ast.ClassDef)
    body = TREES[name].body
    public = [n for n in body if isinstance(n, kinds) and not n.name.startswith("_")]
    missing = [
        n.name
        for n in public
        if not ast.get_docstring(n)
        and "overload" not in {ast.unparse(d) for d in n.decorator_list}
    ]
    if body and not ast.get_docstring(TREES[name]):
        missing.append("the module itself")
    assert not missing, f"no docstring in {name}: {', '.join(missing)}"


@pytest.mark.parametrize("name", MODULES)
def test_no_assert_no_print(name):
    nodes = list(ast.walk(TREES[name]))
    assert not [n.lineno for n in nodes if isinstance(n, ast.Assert)]
    if name not in ("kerasnorm_cli", "kerasnorm_cli._output"):
        calls = [n for n in nodes if isinstance(n, ast.Call)]
        assert not [n.lineno for n in calls if ast.unparse(n.func) == "print"]


def test_files_are_short():
    lengths = {
        str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in FILES
    }
    long = {p: n for p, n in lengths.items() if n > MAX_LINES}
    assert not set(long) - set(LONGER), f"over {MAX_LINES} lines: {long}"
    assert not set(LONGER) - set(lengths), "no such file any more"


def test_versions_agree():
    import kerasnorm

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    newest = re.search(
        r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M
    )
    assert newest, "CHANGELOG.md has no released version"
    assert project["version"] == kerasnorm.__version__ == newest.group(1)


def test_pins_lie_within_the_ranges():
    """What the tests run with is something a user's install may choose."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [
        Requirement(r)
        for r in (*project["dependencies"], *(r for e in extras for r in e))
    ]
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    for requirement in wanted:
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), requirement
