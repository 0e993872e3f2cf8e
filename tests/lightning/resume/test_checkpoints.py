"""Checkpoints hold what changed and nothing else, load strictly, and resume a run bit for bit."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lit_adapters as la
from lit_adapters import AdapterCallback, AdapterError
from tests.lightning.tiny_task import Task, assert_equal_bits, fit, loader, nora, state, trainer


def saver(folder, **changes):
    return ModelCheckpoint(folder / "kept", save_last=True, **changes)


@pytest.fixture
def fitted(tmp_path):
    task = Task()
    fit(tmp_path, task, AdapterCallback(), saver(tmp_path))
    return task, tmp_path / "kept" / "last.ckpt"


def keys(path):
    return set(torch.load(path, weights_only=True)["state_dict"])


def test_holds_adapters_trained_modules_and_buffers_only(fitted):
    task, path = fitted
    own = {f"{n}.{key}" for n, a in la.adapters(task) for key in a.adapter_tensors()}
    buffers = {f"net.norm.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")}
    assert keys(path) == own | buffers | {"net.head.weight", "net.head.bias"}
    frozen = {n for n, p in task.named_parameters() if not p.requires_grad}
    assert frozen
    assert not keys(path) & frozen


def test_everything_on_request(tmp_path):
    task = Task()
    fit(tmp_path, task, AdapterCallback(save_adapters_only=False), saver(tmp_path))
    assert keys(tmp_path / "kept" / "last.ckpt") == set(task.state_dict())


def test_loads_strictly_with_default_arguments(fitted):
    task, path = fitted
    loaded = Task.load_from_checkpoint(path)
    assert_equal_bits(state(loaded), state(task))


@pytest.mark.parametrize("key", ["net.blocks.0.act.numerator_B", "net.blocks.1.fc1.lora_A", "net.head.bias"])
def test_a_missing_key_of_what_trained_raises(fitted, tmp_path, key):
    checkpoint = torch.load(fitted[1], weights_only=True)
    del checkpoint["state_dict"][key]
    torch.save(checkpoint, tmp_path / "less.ckpt")
    with pytest.raises(RuntimeError, match=rf"Missing key\(s\) in state_dict: \"{key}\""):
        Task.load_from_checkpoint(tmp_path / "less.ckpt")


def test_a_frozen_network_that_is_not_adapted_is_kept(tmp_path):
    """Strict loading forgives keys of adapted models only, so a teacher beside them has to be in the checkpoint."""

    class Distilled(Task):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Linear(8, 3).requires_grad_(False)

    task = Distilled()
    fit(tmp_path, task, AdapterCallback(), saver(tmp_path))
    loaded = Distilled.load_from_checkpoint(tmp_path / "kept" / "last.ckpt")
    assert torch.equal(loaded.teacher.weight, task.teacher.weight)


def test_two_adapted_models(tmp_path):
    class Pair(Task):
        def __init__(self):
            super().__init__(methods=nora())
            self.other = Task(methods=la.LoRA(rank=2)).net

        def loss(self, batch):
            return super().loss(batch) + self.other(batch[0]).square().mean()

    task = Pair()
    fit(tmp_path, task, AdapterCallback(), saver(tmp_path))
    path = tmp_path / "kept" / "last.ckpt"
    assert not [k for k in keys(path) if k.endswith("fc1.weight")]
    assert_equal_bits(state(Pair.load_from_checkpoint(path)), state(task))


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_weights_only_checkpoints_are_refused(tmp_path, stage):
    callbacks = AdapterCallback(), saver(tmp_path, save_weights_only=True)
    running = trainer(tmp_path, *callbacks)
    with pytest.raises(AdapterError, match=r"save_weights_only=True\) bypasses callbacks"):
        running.fit(Task(), loader()) if stage == "fit" else running.validate(Task(), loader())
    whole = AdapterCallback(save_adapters_only=False), saver(tmp_path, save_weights_only=True)
    fit(tmp_path, Task(), *whole)


@pytest.mark.parametrize(("accumulate", "monitor"), [(1, None), (4, None), (1, "val/loss")])
def test_resuming_at_the_end_of_an_epoch_changes_nothing(tmp_path, accumulate, monitor):
    """With calibration in the first run, which must not run again, and a schedule over both."""

    class Scheduled(Task):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            steps = self.trainer.estimated_stepping_batches
            rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=int(steps))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    def task():
        return Scheduled([nora(base="anchored", fit_range="calibrate"), la.LoRA(rank=2)])

    settings = {"max_epochs": 4, "accumulate_grad_batches": accumulate}
    whole, resumed = task(), task()
    checkpoints = ModelCheckpoint(tmp_path / "whole", monitor=monitor, save_top_k=-1)
    fit(tmp_path, whole, AdapterCallback(), checkpoints, **settings)
    path = next((tmp_path / "whole").glob("epoch=1-*.ckpt"))
    running = fit(tmp_path, resumed, AdapterCallback(), saver(tmp_path), ckpt=path, **settings)
    assert running.global_step == 4 * -(-6 // accumulate)
    assert_equal_bits(state(resumed), state(whole))
    last = next((tmp_path / "whole").glob("epoch=3-*.ckpt"))
    first, second = (torch.load(p, weights_only=True) for p in (last, tmp_path / "kept" / "last.ckpt"))
    moments = [c["optimizer_states"][0]["state"] for c in (first, second)]
    assert all(torch.equal(moments[0][i][k], moments[1][i][k]) for i in moments[0] for k in moments[0][i])
    assert first["lr_schedulers"] == second["lr_schedulers"]


def test_two_callbacks_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AdapterCallback`"):
        trainer(tmp_path, AdapterCallback(), AdapterCallback(log_every_n_steps=1))


def test_fast_dev_run_and_a_second_fit(tmp_path):
    task, callback = Task(), AdapterCallback()
    assert fit(tmp_path, task, callback, fast_dev_run=True).global_step == 1
    assert fit(tmp_path, task, callback).global_step == 6


def test_a_checkpoint_after_validate_still_has_the_state_of_the_fit(tmp_path):
    callback = AdapterCallback(figures=False)
    running = fit(tmp_path, Task(), callback, logger=CSVLogger(tmp_path))
    before = callback.state_dict()
    running.validate(running.lightning_module, loader(8), verbose=False)
    assert callback.state_dict()["recorded"]["step"] == before["recorded"]["step"] == 6
    running.save_checkpoint(tmp_path / "after.ckpt")
    assert torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"]
