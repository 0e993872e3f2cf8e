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


def run(name, out):
    """What an example prints."""
    line = [sys.executable, "-m", f"examples.{Path(name).stem}", "--out", out]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(line, cwd=EXAMPLES.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_plain_loop_learns_and_what_it_saved_loads(tmp_path):
    trained, loaded = re.findall(r"(\d\.\d+) after", run("plain_pytorch.py", tmp_path / "out"))
    assert float(trained) > 0.8  # 0.5 by chance
    assert trained == loaded


@pytest.mark.slow
def test_the_trainer_anneals_saves_and_merges(tmp_path):
    found = re.search(r"loss (\S+) adapted, (\S+) loaded, (\S+) merged", run("trainer.py", tmp_path)).groups()
    adapted, loaded, merged = map(float, found)
    assert adapted < 2.6  # 3.5 before the training
    assert adapted == loaded == pytest.approx(merged, abs=2e-4)


@pytest.mark.slow
def test_each_of_several_adapters_does_its_task(tmp_path):
    printed = run("several_adapters.py", tmp_path)
    assert "up: [15, 16, 17, 18, 19]" in printed
    assert "down: [15, 14, 13, 12, 11]" in printed
    assert "one batch: [[15, 16, 17, 18, 19], [15, 14, 13, 12, 11]]" in printed
    assert "in use: ['both'] of ['up', 'down', 'both']" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft.py", "dpo_peft.py", "onnx_export.py"])
def test_what_leaves_pytorch_or_is_loaded_by_others_is_equal(tmp_path, name):
    printed = run(name, tmp_path)
    assert float(re.search(r"largest difference of the \w+ .*: (\S+)", printed)[1]) < 1e-4
    if name == "dpo_peft.py":
        first, last = map(float, re.search(r"margin (\S+) at first, (\S+) at the end", printed).groups())
        assert last > 2 * first


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
