"""Optimisers of pairs in a Trainer: from sections, with schedules, resumed, and without the Trainer's clipping."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lit_adapters as la
from lit_adapters import AdapterCallback, AdapterError
from lit_adapters.lightning import build_optimizers
from lit_adapters.optimizers import LoFT, LoRAPlus, LoRARITE
from tests.lightning.tiny_task import Task, assert_equal_bits, fit, loader, state, trainer

METHODS = [la.DoRA(rank=2, targets=["fc1"]), la.LoRA(rank=2, targets=["fc2"])]


class Sectioned(Task):
    """Its optimiser comes from a section, as the command line makes it."""

    def __init__(self, kind, methods=METHODS, **settings):
        super().__init__(methods)
        path = f"lit_adapters.optimizers.{kind.__name__}"
        self.section = {"class_path": path, "init_args": {"lr": 0.01, "weight_decay": 0.01, **settings}}

    def configure_optimizers(self):
        cycle = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.01}}
        return build_optimizers(self, self.section, cycle, {"head": 2.0})


@pytest.mark.parametrize("kind", [LoRARITE, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (LoRAPlus, LoFT))])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    whole, task = Sectioned(kind), Sectioned(kind)
    ended = fit(tmp_path, whole, AdapterCallback(figures=False), saver, accumulate_grad_batches=2, max_epochs=2)
    (optimizer,) = ended.optimizers
    assert type(optimizer) is kind
    assert {g["name"] for g in optimizer.param_groups} == {"dora/pairs", "lora/pairs", "dora", "head"}
    path = tmp_path / "step=3.ckpt"
    resumed = fit(tmp_path, task, AdapterCallback(figures=False), ckpt=path, accumulate_grad_batches=2, max_epochs=2)
    assert_equal_bits(state(task), state(whole))
    ours, theirs = (t.optimizers[0].state_dict()["state"] for t in (resumed, ended))
    assert ours.keys() == theirs.keys()
    for index, entry in ours.items():
        assert all(torch.equal(value, theirs[index][name]) for name, value in entry.items())


def test_a_damaged_state_is_named_before_the_run_goes_on(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(tmp_path, Sectioned(LoRARITE), AdapterCallback(figures=False), saver, max_epochs=2)
    path = tmp_path / "step=3.ckpt"
    content = torch.load(path, weights_only=True)
    del content["optimizer_states"][0]["state"][0]["basis"]
    torch.save(content, path)
    with pytest.raises(AdapterError, match=r"step=3\.ckpt.*optimizer_states/0: the state of LoRARITE for parameter 0"):
        fit(tmp_path, Sectioned(LoRARITE), AdapterCallback(figures=False), ckpt=path, max_epochs=2)


def test_the_trainers_clipping_is_refused_where_it_would_break_the_invariance(tmp_path):
    for kind in (LoRARITE, LoFT):
        with pytest.raises(
            AdapterError, match=rf"gradient_clip_val=1\.0 would clip .* before {kind.__name__} reads them"
        ):
            fit(tmp_path, Sectioned(kind), gradient_clip_val=1.0)
        with pytest.raises(AdapterError, match=r"gradient_clip_val=1\.0 would clip"):  # also without AdapterCallback
            trainer(tmp_path, gradient_clip_val=1.0).fit(Sectioned(kind), loader())
    fit(tmp_path, Sectioned(LoRAPlus), gradient_clip_val=1.0, max_steps=1)


def test_a_model_without_pairs_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="LoFT found no pair of A and B that trains"):
        fit(tmp_path, Sectioned(LoFT, [la.NoRA(groups=4, rank=2)]))
