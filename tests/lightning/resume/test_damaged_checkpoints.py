"""An edited checkpoint is resumed or refused with one error of ours, and makes the run delete nothing."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lit_adapters as la
from lit_adapters import AdapterCallback, AdapterError
from lit_adapters.files.checkpoint_schema import check_checkpoint
from lit_adapters.files.saved import read_saved
from lit_adapters.learned.summary import report, summarise
from lit_adapters.lightning.resume.state_forms import check_optimizers, check_states
from tests.lightning.tiny_task import Task, fit
from tests.mutations import json_edits

EDITS = 300


class Scheduled(Task):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-3)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=24)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


def task():
    return Scheduled([la.NoRA(groups=4, rank=2), la.AFALoRA(rank=2)])


def run(folder, **settings):
    saver = ModelCheckpoint(folder / "kept", save_last=True)
    return fit(folder, task(), AdapterCallback(figures=False), saver, **settings)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A trainer after one epoch, and its checkpoint."""
    folder = tmp_path_factory.mktemp("fitted")
    trainer = run(folder, max_epochs=1)
    return trainer, torch.load(folder / "kept" / "last.ckpt", weights_only=True)


def outcome(call, *arguments):
    """Whether something works or ends in an error of ours; anything else fails the test."""
    try:
        call(*arguments)
    except AdapterError:
        return "refused"
    return "works"


def check(trainer, checkpoint):
    check_checkpoint(checkpoint, "x.ckpt")
    check_states(trainer, checkpoint, "x.ckpt")
    check_optimizers(trainer, checkpoint["optimizer_states"], checkpoint["lr_schedulers"], "x.ckpt")


def test_the_checks_accept_what_a_run_writes(fitted):
    check(*fitted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rates_due": 3}, "lit_adapters/rates_due' in the checkpoint is 3, and must be true or false"),
        ({"pending": {"step": -1, "values": {}}}, "lit_adapters/pending' in the checkpoint is .* a step and numbers"),
        ({"pending": {"step": 1, "values": {"loss": "low"}}}, "lit_adapters/pending' in the checkpoint"),
        ({"metrics": {"train/loss": 1.0}}, "lit_adapters/processes' in the checkpoint"),
        ({"metrics": {"train/loss": torch.ones(2)}}, "lit_adapters/processes' in the checkpoint"),
    ],
)
def test_what_is_done_after_a_checkpoint(fitted, change, words):
    record = fitted[1]["lit_adapters"]
    if "metrics" in change:
        change = {"processes": [record["processes"][0] | change]}
    with pytest.raises(AdapterError, match=words):
        check_checkpoint(fitted[1] | {"lit_adapters": record | change}, "x.ckpt")


def test_edits_of_a_checkpoint(fitted):
    """Of its states and record; the weights are left alone, as most values of them are valid."""
    trainer, content = fitted
    found = [
        outcome(check, trainer, edited | {"state_dict": content["state_dict"]})
        for _, edited in json_edits({k: v for k, v in content.items() if k != "state_dict"}, EDITS)
        if isinstance(edited, dict)
    ]
    assert found.count("refused") > EDITS // 3


def test_edits_of_the_record_before_it_is_read(fitted, tmp_path):
    _, content = fitted
    for _, edited in json_edits(content["lit_adapters"]["models"], 40):
        record = content["lit_adapters"] | {"models": edited}
        torch.save({"state_dict": content["state_dict"], "lit_adapters": record}, tmp_path / "x.ckpt")
        outcome(lambda: report(saved := read_saved(tmp_path / "x.ckpt"), summarise(saved)))


@pytest.mark.slow
def test_edits_of_a_checkpoint_that_is_resumed(fitted, tmp_path):
    _, content = fitted
    parts = {k: v for k, v in content.items() if k != "state_dict"}
    for _, edited in json_edits(parts, 120, seed=1):
        if isinstance(edited, dict):
            torch.save(edited | {"state_dict": content["state_dict"]}, tmp_path / "x.ckpt")
            outcome(lambda: run(tmp_path / "resumed", ckpt=tmp_path / "x.ckpt", max_epochs=2))


def saver_of(checkpoint):
    return next(state for key, state in checkpoint["callbacks"].items() if key.startswith("ModelCheckpoint"))


@pytest.mark.parametrize("name", ["best_model_path", "kth_best_model_path", "last_model_path", "best_k_models"])
@pytest.mark.parametrize("path", ["{kept}/../thesis", "local://{folder}/thesis", "simplecache::file://{folder}/thesis"])
def test_no_file_outside_is_named_for_deletion(fitted, tmp_path, name, path):
    trainer, content = fitted
    edited = copy.deepcopy(content)
    value = path.format(kept=tmp_path / "kept", folder=tmp_path)
    saver_of(edited)[name] = {value: torch.tensor(0.0)} if name == "best_k_models" else value
    with pytest.raises(AdapterError, match="must be the path of a checkpoint of this run"):
        check_states(trainer, edited, "x.ckpt")


def test_resuming_deletes_no_file_that_the_checkpoint_names(fitted, tmp_path):
    """ModelCheckpoint would take the path for an earlier checkpoint of its own."""
    (tmp_path / "thesis").mkdir()
    edited = copy.deepcopy(fitted[1])
    saver_of(edited)["best_model_path"] = f"local://{tmp_path}/thesis"
    torch.save(edited, tmp_path / "x.ckpt")
    assert outcome(lambda: run(tmp_path, ckpt=tmp_path / "x.ckpt", max_epochs=2)) == "refused"
    assert os.path.isdir(tmp_path / "thesis")
