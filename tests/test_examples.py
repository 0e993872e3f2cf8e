"""The examples run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = nbformat.read(EXAMPLES / "functions.ipynb", as_version=4)


@pytest.mark.slow
def test_the_plain_loop_learns_and_what_it_saved_loads(tmp_path):
    line = [sys.executable, EXAMPLES / "plain_pytorch.py", "--out", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    trained, loaded = re.findall(r"(\d\.\d+) after", result.stdout)
    assert float(trained) > 0.8  # 0.5 by chance
    assert trained == loaded


def test_the_notebook_is_committed_without_outputs():
    nbformat.validate(NOTEBOOK)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in NOTEBOOK.cells)


@pytest.mark.slow
def test_the_notebook_runs_and_draws(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    run = NotebookClient(NOTEBOOK.copy(), timeout=600, kernel_name="python3").execute(cwd=str(EXAMPLES))
    outputs = [output for cell in run.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    text = "".join(output.get("text", "") for output in outputs)
    learned, disabled = re.search(r"(\d\.\d+) with the functions, (\d\.\d+) with them disabled", text).groups()
    assert float(learned) > 0.7  # a third by chance
    assert float(learned) > float(disabled) + 0.1
