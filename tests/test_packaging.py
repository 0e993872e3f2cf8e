"""What an installed copy holds."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_an_installed_copy_holds_every_file(monkeypatch):
    """Kernels are compiled from files that are no Python."""
    dist = pytest.importorskip("setuptools.dist")
    monkeypatch.chdir(ROOT)
    distribution = dist.Distribution({"script_name": "setup.py"})
    distribution.parse_config_files()
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    modules = {Path(path) for _, _, path in command.find_all_modules()}
    command.manifest_files = {}  # nothing but what package-data names
    folders = {package: package.replace(".", "/") for package in distribution.packages}
    data = {Path(path) for item in folders.items() for path in command.find_data_files(*item)}
    present = {p.relative_to(ROOT) for p in (ROOT / "lit_adapters").rglob("*") if p.is_file()}
    assert {p for p in present if "__pycache__" not in p.parts} == modules | data


def test_the_page_of_versions_names_the_lowest_ones():
    """Those of pyproject.toml, all of which `make lowest` installs."""
    declared = (ROOT / "pyproject.toml").read_text()
    declared = declared[declared.index("dependencies = [") : declared.index("cluster = [")]
    declared += "".join(re.findall(r"\nstudy = .*", (ROOT / "pyproject.toml").read_text()))
    lowest = dict(re.findall(r'"([A-Za-z0-9_]+)(?:\[\w+\])?>=([0-9.]+)', declared))
    shown = dict(re.findall(r"\n\| (\w+) \| ([0-9.]+) \|", (ROOT / "docs" / "versions.md").read_text()))
    assert shown == lowest
    assert {"torch", "transformers", "peft", "lm_eval", "scipy"} < lowest.keys()
