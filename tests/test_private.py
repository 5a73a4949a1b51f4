"""Keras's private parts are behind one door, and what is behind it exists."""

import ast
import functools
import pathlib
import re

import keras
import pytest
from conftest import ROOT


DOOR = ROOT / "rewriters" / "private.py"
FILES = sorted(
    p
    for package in ("rewriters", "kerasnorm", "kerasnorm_cli")
    for p in ROOT.glob(f"{package}/**/*.py")
    if p != DOOR
)


@functools.cache
def names_in_keras():
    """Attributes with an underscore that Keras's own code reads or defines."""
    source = pathlib.Path(keras.__file__).parent / "src"
    text = "\n".join(
        p.read_text("utf-8")
        for folder in ("layers", "models", "ops", "optimizers", "trainers", "backend")
        for p in (source / folder).glob("**/*.py")
        if not p.name.endswith("_test.py")
    )
    return frozenset(re.findall(r"(?:\bself\.|\bdef )(_[a-z]\w*)", text))


@functools.cache
def own_names():
    """Attributes with an underscore that a class or module of the project defines."""
    found = set()
    for p in FILES:
        for node in ast.walk(ast.parse(p.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if ast.unparse(node.value) in ("self", "cls"):
                    found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)  # a field of a dataclass, a name in a module
    return found


def attributes(tree):
    """Attributes that code reads or sets, by `x.name` or by `getattr(x, "name")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        ):
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant):
                yield str(name.value), node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_parts_stay_behind_the_door(path):
    text = path.read_text("utf-8")
    assert "keras.src" not in text, "import it in rewriters/private.py"
    wrong = [
        f"line {line}: {name}"
        for name, line in attributes(ast.parse(text))
        if name in names_in_keras() and name not in own_names()
    ]
    assert not wrong, f"add a function to rewriters/private.py: {wrong}"


def test_what_is_behind_the_door_exists():
    """A name that Keras drops is found here, and not by a user."""
    tree = ast.parse(DOOR.read_text("utf-8"))
    used = {name for name, _ in attributes(tree) if re.match(r"_[a-z]", name)}
    used |= {
        str(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and re.match(r"_[a-z]\w+$", str(node.value))
    }
    source = pathlib.Path(keras.__file__).parent / "src"
    text = "\n".join(p.read_text("utf-8") for p in source.glob("**/*.py"))
    gone = [name for name in sorted(used) if not re.search(rf"\b{name}\b", text)]
    assert used and not gone, f"Keras {keras.__version__} has no {gone}"


def test_nothing_behind_the_door_is_unused():
    text = "\n".join(p.read_text("utf-8") for p in FILES)
    text += DOOR.read_text("utf-8").split("\n\n\n", 1)[1]
    tree = ast.parse(DOOR.read_text("utf-8"))
    public = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    unused = [n for n in public if f"private.{n}" not in text]
    assert not unused
