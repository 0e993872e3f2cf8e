"""What README.md and the pages of docs/ show is there: code runs, commands, recipes and linked files exist."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lit_adapters as la
from lit_adapters import errors
from lit_adapters.cli.commands import main
from tests.test_architecture import LAYERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def section(title):
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.slow
def test_the_first_program_trains_and_saves(tmp_path):
    code = re.search(r"```python\n(.*?)```", section("Train and save"), re.DOTALL)[1]
    assert len(code.splitlines()) <= 25
    assert "..." not in code
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", code]
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *report, loss = result.stdout.strip().splitlines()
    assert "\n".join(report) in README
    assert float(loss.removeprefix("loss ")) < 0.6  # log 2 without training
    saved = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert abs(saved / 1000 - int(re.search(r"(\d+) KB", code)[1])) < 3


COMMANDS = re.findall(r"^\| `(?:lit-adapters )?([\w-]+)", section("Command line"), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_lit_adapters_exist(command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0


@pytest.mark.parametrize("layer", [f"{package}/{layer}" for package, layers in LAYERS.items() for layer in layers])
def test_contributing_names_every_layer(layer):
    package, name = layer.split("/")
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition(f"layer of `{package}/`")[2]
    assert f"`{name}`" in table.partition("\n\n")[0]


@each_page
def test_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^    |`)make ([a-z][\w-]*)", text, re.MULTILINE):
        assert target in targets, f"make {target}"
    for module in re.findall(r"python -m ([\w.]+\w)", text):
        assert importlib.util.find_spec(module), f"python -m {module}"


@each_page
def test_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"(?:configs|benchmarks|tests|lit_adapters)/[\w/.*-]+\w", text):
        assert any(ROOT.glob(f"{path.replace('NAME', '*')}*")), path
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in link:
            assert (page.parent / link).exists() or page.parent.name == "api", link


@pytest.mark.parametrize("name", [name for name in la.__all__ if name != "renamed"])
def test_the_api_pages_show_every_public_name(name):
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    assert re.search(rf"^::: lit_adapters[\w.]*\.{name}$|members: \[{name}\]", pages, re.MULTILINE) or (
        hasattr(errors, name)
    ), f"add ::: lit_adapters.{name} to a page of docs/api"
