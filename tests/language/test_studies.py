"""The studies of language models: each arm runs, and logs and returns what the study compares."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback

from lit_adapters.study.planning import Plan
from lit_adapters.study.reading import read_study
from tests.language.tiny import QUIET, ROWS, quick_main

STUDIES = Path(__file__).parents[2] / "configs" / "studies"
NAMES = ["language_gap", "language_smoke", "newsgroups_loran", "rewards"]
ARMS = [(name, arm) for name in NAMES for arm in read_study(STUDIES / f"{name}.yaml").arms]
QUICK = {("language_gap", "full"), ("newsgroups_loran", "tanh")}  # the others are in the slow tier


class Items(Callback):
    """The names of what `test_step` returns and callbacks before this one add."""

    def on_test_batch_end(self, trainer, pl_module, outputs, *rest):
        self.names = set(outputs)


@pytest.mark.parametrize(
    ("name", "arm"), [a if a in QUICK else pytest.param(*a, marks=pytest.mark.slow) for a in ARMS], ids=str
)
def test_an_arm_on_the_tiny_model(tmp_path, write, monkeypatch, name, arm):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["language"])
    study = read_study(STUDIES / f"{name}.yaml")
    rates = dict.fromkeys(study.arms[arm].rates, 1e-3)
    recipe = dict(next(Plan(study).final_runs(arm, rates)).recipe)
    recipe["model"]["model"] = "tiny_llama"
    adapters = recipe["model"]["adapters"]
    if adapters is not None and "rank" in adapters["init_args"]:
        adapters["init_args"]["rank"] = 2  # 64 is more than the tiny model has
    data = recipe["data"]
    data |= {"batch_size": 4, "val_fraction": 0.2} | {f"{split}_subset": 4 for split in ("train", "val", "test")}
    data |= {"max_length": 400, "use_chat_template": False}
    if name == "newsgroups_loran":
        data["path"] = write([{"text": f"text {i}", "label_name": "ab"[i % 2]} for i in range(20)])
        data["test_path"] = data["path"]
    elif name != "rewards":
        data["path"] = str(ROWS)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    items = Items()
    words = [f"--config={tmp_path / 'recipe.yaml'}", "--trainer.accelerator=cpu", "--trainer.fast_dev_run=true"]
    entry = import_module(f"{study.program}.__main__").main
    cli = quick_main(["fit", *words, *QUIET], entry, trainer_defaults={"callbacks": [items]})
    measured = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)[0]
    compared = [study.metric, *study.also]
    assert {metric.name for metric in compared} <= measured.keys()
    assert {metric.items for metric in compared if metric.items} <= items.names
    searched = study.search.metric.name
    assert searched in cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)[0]
