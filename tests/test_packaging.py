"""What an installed copy holds."""

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
