"""The house: who may import whom, what importing costs, and that public names are documented."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for room in ("lit_adapters", "vision", "language") for p in (ROOT / room).rglob("*.py"))

# Each room may import those before it.
ORDER = ["errors", "console", "ops", "activations", "schedules", "statistics", "layout", "methods"]
ORDER += ["targets", "report", "sharding", "attach", "control", "merge", "checkpoint", "peft_format"]
ORDER += ["subspace", "saved", "inspection", "comparison", "plots", "output"]
ORDER += ["optim", "callback", "assets", "loading", "cli"]
FOREIGN = {"timm", "transformers", "torchvision", "vision", "language"}
EXTRAS = {"peft", "bitsandbytes"}  # imported where they are needed, never with the library


def imported(path, anywhere=True):
    """Absolute names of the modules that a file imports, anywhere or as it is imported itself."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def room_of(path):
    return path.relative_to(ROOT / "lit_adapters").with_suffix("").parts[0]


@pytest.mark.parametrize("path", [p for p in FILES if "lit_adapters" in p.relative_to(ROOT).parts], ids=str)
def test_arrows(path):
    room = room_of(path)
    names = list(imported(path))
    foreign = {name.split(".")[0] for name in names}
    assert not foreign & FOREIGN
    assert not {name.split(".")[0] for name in imported(path, anywhere=False)} & EXTRAS
    if room != "callback" and room != "__init__":
        assert "lightning" not in foreign
    if room == "__init__":
        return
    for name in names:
        parts = name.split(".")
        if parts[0] == "lit_adapters" and len(parts) > 1:
            assert ORDER.index(parts[1]) <= ORDER.index(room), f"{room} may not import {name}"


@pytest.mark.parametrize(("room", "other"), [("vision", "language"), ("language", "vision")])
def test_applications_do_not_know_each_other(room, other):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        assert not any(name.split(".")[0] == other for name in imported(path))


def test_import_is_light():
    heavy = ["lightning", "timm", "transformers", "matplotlib"]
    code = f"import sys, lit_adapters; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_public_definitions_are_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= 300
