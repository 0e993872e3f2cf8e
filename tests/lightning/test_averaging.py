"""Callbacks that average weights, beside AdapterCallback and in either order."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging

import lit_adapters as la
from tests.lightning.resume.test_checkpoints import saver
from tests.lightning.tiny_task import Task, fit, nora

AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "ema without buffers": lambda: EMAWeightAveraging(decay=0.9, use_buffers=False),
    "mean": lambda: WeightAveraging(),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1),
}


def methods():
    return [la.AFALoRA(rank=2, schedule=la.schedules.Linear(end=0.9)), nora()]


def run(folder, average, first, **settings):
    task = Task(methods())
    callbacks = [la.AdapterCallback(), AVERAGES[average]()]
    fit(folder, task, *(callbacks if first else callbacks[::-1]), saver(folder, save_top_k=-1), **settings)
    return task


def frozen(task):
    return {name: p.clone() for name, p in task.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("average", AVERAGES)
def test_the_end_is_linear_and_the_base_exact(tmp_path, average, first):
    task, base = run(tmp_path, average, first, max_epochs=2), frozen(Task(methods()))
    assert {a.beta.item() for _, a in la.adapters(task) if a.schedule is not None} == {0.0}
    assert all(torch.equal(p, base[name]) for name, p in frozen(task).items())
    saved = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)["state_dict"]
    assert {value.item() for key, value in saved.items() if key.endswith(".beta")} == {0.0}
    la.merge(task.net)
