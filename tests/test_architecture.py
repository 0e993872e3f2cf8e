"""Import layers: what may import what, what importing costs, and that public names are documented."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for package in ("lit_adapters", "vision", "language") for p in (ROOT / package).rglob("*.py"))

# The layers of a package: each may import itself and those before it.
LIBRARY = ["errors", "renamed", "class_paths", "console", "values", "ops", "activations", "schedules", "methods"]
LIBRARY += ["model", "optimizers", "files", "learned", "assets", "training", "huggingface", "lightning", "study", "cli"]
LANGUAGE = ["meaning", "gguf_files", "models", "measured", "loss", "means", "generate", "reference", "module", "data"]
LANGUAGE += ["prompt", "cli", "evaluate", "dpo", "grpo", "draft", "__main__", "demo"]
LAYERS = {"lit_adapters": LIBRARY, "language": LANGUAGE}
FOREIGN = {"timm", "transformers", "torchvision", "vision", "language"}
EXTRAS = {"peft", "bitsandbytes", "ray", "submitit"}  # imported where they are needed, never with the library


def imported(path, anywhere=True):
    """Absolute names of the modules that a file imports, anywhere or as it is imported itself."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name for name in submodules if name in MODULES]
            yield from found
            if len(found) < len(submodules):
                yield node.module


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


@pytest.mark.parametrize("package", LAYERS)
def test_the_list_of_layers_is_whole(package):
    present = {name.split(".")[1] for name in MODULES if name.startswith(f"{package}.")}
    assert present == set(LAYERS[package])


def test_imports_run_one_way():
    for module in (m for m in MODULES if m.split(".")[0] in LAYERS and "." in m):
        package, layer, *_ = module.split(".")
        order = LAYERS[package]
        for name in imported(MODULES[module]):
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1:
                assert order.index(parts[1]) <= order.index(layer), f"{module}: {layer} may not import {name}"


def test_transformers_comes_with_the_huggingface_part_alone():
    for module in (m for m in MODULES if not m.startswith("lit_adapters.huggingface")):
        found = imported(MODULES[module], anywhere=False)
        assert not any(name.startswith("lit_adapters.huggingface") for name in found), module


def test_no_file_imports_itself_in_a_circle():
    graph = {module: {n for n in imported(path) if n in MODULES} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_library_needs_torch_alone():
    for module in (m for m in MODULES if m.startswith("lit_adapters")):
        foreign = {name.split(".")[0] for name in imported(MODULES[module])}
        allowed = {"transformers", "peft"} if module.startswith("lit_adapters.huggingface") else set()
        assert not foreign & (FOREIGN - allowed), module
        at_import = {name.split(".")[0] for name in imported(MODULES[module], anywhere=False)}
        assert not at_import & (EXTRAS - allowed), module
        if module.split(".")[1:2] not in (["lightning"], []):
            assert "lightning" not in foreign, module


@pytest.mark.parametrize(("application", "other"), [("vision", "language"), ("language", "vision")])
def test_applications_do_not_know_each_other(application, other):
    files = list((ROOT / application).rglob("*.py"))
    assert files
    for path in files:
        assert not any(name.split(".")[0] == other for name in imported(path))


def test_import_is_light():
    heavy = ["lightning", "timm", "transformers", "matplotlib"]
    code = f"import sys, lit_adapters; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_definitions_are_documented():
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"
