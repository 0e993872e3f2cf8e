"""The callback calibrates what asks for it: before the first step, on training batches, never again."""

from collections import namedtuple

import pytest
import torch
from torch.utils.data import DataLoader

import lit_adapters as la
from lit_adapters import AdapterCallback, AdapterError
from tests.lightning.tiny_task import Task, assert_equal_bits, fit, loader, nora, state, trainer

CALIBRATE = {"fit_range": "calibrate"}


def activations(task):
    return [a for _, a in la.adapters(task) if a.method == "nora"]


def test_equals_calibrating_by_hand_on_the_same_batches(tmp_path):
    by_hand, by_callback = Task(nora(**CALIBRATE)), Task(nora(**CALIBRATE))
    la.calibrate(by_hand.net, [x for x, _ in loader()][:2])
    fit(tmp_path, by_callback, AdapterCallback(calibration_batches=2))
    for mine, theirs in zip(activations(by_hand), activations(by_callback), strict=True):
        assert theirs.calibrated
        assert not theirs.awaits_calibration
        for name in ("fit_range", "density", "base_numerator", "base_denominator", "numerator_scale"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        assert mine.fit_range.tolist() != [-6.0, 6.0]


def test_nothing_is_calibrated_unasked(tmp_path):
    task = Task(nora())
    fit(tmp_path, task)
    assert not any(a.calibrated for a in activations(task))


def test_without_the_callback_training_refuses(tmp_path):
    with pytest.raises(AdapterError, match="was not calibrated"):
        trainer(tmp_path).fit(Task(nora(**CALIBRATE)), loader())


def test_the_state_of_the_run_is_left_alone(tmp_path):
    """Calibration runs in eval mode and without gradient: batch statistics and modes are as before."""

    class Watching(Task):
        def on_train_start(self):
            self.seen = self.net.norm.num_batches_tracked.item(), self.training, self.net.blocks[0].training

    task = Watching(nora(**CALIBRATE))
    fit(tmp_path, task)
    assert task.seen == (0, True, True)


def test_modules_whose_forward_takes_no_batch_need_a_predict_step(tmp_path):
    class Plain(Task):
        def forward(self, x):
            return self.net(x)

        def loss(self, batch):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    with pytest.raises(AdapterError, match=r"gives training batches to Plain\.predict_step, which failed .* give the"):
        fit(tmp_path, Plain(nora(**CALIBRATE)))

    class Predicting(Plain):
        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    task = Predicting(nora(**CALIBRATE))
    fit(tmp_path, task)
    assert all(a.calibrated for a in activations(task))


def test_a_forward_of_its_own_is_preferred_to_predict_step(tmp_path):
    class Hooked(Task):
        def forward_batch(self, batch):
            calls.append("forward_batch")
            self.net(batch[0])

        def predict_step(self, batch, batch_idx):
            raise AssertionError("for predicting alone")

    calls = []
    task = Hooked(nora(**CALIBRATE))
    fit(tmp_path, task, AdapterCallback(calibration_batches=3))
    assert calls == ["forward_batch"] * 3
    assert all(a.calibrated for a in activations(task))

    class Failing(Hooked):
        def forward_batch(self, batch):
            raise TypeError("no such batch")

    with pytest.raises(AdapterError, match=r"to Failing\.forward_batch, which failed \(TypeError: no such batch\)"):
        fit(tmp_path, Failing(nora(**CALIBRATE)))


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_the_order_of_the_training_is_left_alone(tmp_path, generator, workers):
    class Noting(Task):
        def training_step(self, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), batch[1].tolist()]
            return super().training_step(batch, batch_idx)

    def order(methods):
        torch.manual_seed(3)
        own = torch.Generator().manual_seed(4) if generator else None
        task, data = Noting(methods), loader(shuffle=True, num_workers=workers, generator=own)
        trainer(tmp_path, AdapterCallback(), max_epochs=2).fit(task, data)
        return task.seen

    assert order(nora(**CALIBRATE)) == order(nora())


def test_batches_pass_the_hooks_of_a_transfer(tmp_path):
    class Shifting(Task):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[0] + 100, batch[1]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] - 100, batch[1]

    plain, shifted = Task(nora(**CALIBRATE)), Shifting(nora(**CALIBRATE))
    fit(tmp_path, plain)
    fit(tmp_path, shifted)
    for one, other in zip(activations(plain), activations(shifted), strict=True):
        torch.testing.assert_close(one.fit_range, other.fit_range, rtol=1e-4, atol=1e-4)


Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize("kind", ["dict", "namedtuple", "single", "loaders"])
def test_batches_keep_their_type(tmp_path, kind):
    """What `predict_step` gets is what `training_step` gets."""
    kinds = {}

    class Typed(Task):
        def parts(self, batch):
            if kind == "dict":
                return batch["x"], batch["y"]
            if kind == "namedtuple":
                return batch.x, batch.y
            if kind == "single":
                return batch[0], torch.arange(len(batch[0])) % 3
            return batch["first"][0], batch["second"][1]

        def training_step(self, batch, batch_idx):
            kinds["train"] = type(batch)
            x, y = self.parts(batch)
            return torch.nn.functional.cross_entropy(self.net(x), y)

        def predict_step(self, batch, batch_idx):
            kinds["predict"] = type(batch)
            return self.net(self.parts(batch)[0])

    collate = {
        "dict": lambda rows: {"x": torch.stack([r[0] for r in rows]), "y": torch.stack([r[1] for r in rows])},
        "namedtuple": lambda rows: Pair(torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])),
        "single": lambda rows: (torch.stack([r[0] for r in rows]),),
    }
    if kind == "loaders":
        data = {"first": loader(), "second": loader()}
    else:
        data = DataLoader(loader().dataset, batch_size=4, collate_fn=collate[kind])
    task = Typed(nora(**CALIBRATE))
    trainer(tmp_path, AdapterCallback()).fit(task, data)
    assert all(a.calibrated for a in activations(task))
    assert kinds["train"] is kinds["predict"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_the_precision_of_the_run(tmp_path, precision):
    task = Task(nora(**CALIBRATE))
    fit(tmp_path, task, precision=precision)
    assert all(a.calibrated and a.base_numerator.dtype == torch.float32 for a in activations(task))


def test_workers_that_persist_give_all_batches_to_the_training(tmp_path):
    """Such a loader has one iterator: calibrating on it would take batches away from the first epoch."""
    data = loader(num_workers=1, persistent_workers=True)
    running = fit(tmp_path, Task(nora(fit_range="calibrate")), la.AdapterCallback(), data=data, max_epochs=2)
    assert running.global_step == 12


@pytest.mark.parametrize("start", ["lora_ga", "eva"])
def test_starts_that_are_measured_equal_those_by_hand(tmp_path, start):
    """What `training_step` logs in the calibration is not kept."""

    class Counting(Task):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train/seen", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
            return loss

    method = la.LoRA(rank=2, start=start)
    by_hand, by_callback = Task(method), Counting(method, lr=0.0)
    la.calibrate(by_hand, list(loader())[:2], run=by_hand, loss=by_hand.loss)
    running = fit(tmp_path, by_callback, AdapterCallback(calibration_batches=2))
    assert running.callback_metrics["train/seen"] == 6
    for (_, mine), (_, theirs) in zip(la.adapters(by_hand), la.adapters(by_callback), strict=True):
        assert bool(theirs.calibrated)
        for name, tensor in mine.calibrated_tensors().items():
            assert torch.equal(tensor, getattr(theirs, name)), name
    assert not [n for n, p in by_callback.named_parameters() if p.requires_grad and not ("lora" in n or "head" in n)]


@pytest.mark.slow
def test_a_resumed_run_keeps_its_start(tmp_path):
    method = la.LoRA(rank=2, start="lora_ga")
    whole = Task(method)
    fit(tmp_path / "whole", whole, max_epochs=2)
    first = fit(tmp_path / "first", Task(method))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Task(method)
    fit(tmp_path / "second", resumed, ckpt=tmp_path / "half.ckpt", max_epochs=2)
    assert_equal_bits(state(whole), state(resumed))


def test_a_loss_of_its_own_is_preferred_to_training_step(tmp_path):
    class Hooked(Task):
        def batch_loss(self, batch):
            calls.append("batch_loss")
            return self.loss(batch)

    class Failing(Task):
        def batch_loss(self, batch):
            raise TypeError("no such batch")

    class Silent(Task):
        def batch_loss(self, batch):
            return None

    calls, method = [], la.DoRA(rank=2, start="lora_ga")
    fit(tmp_path, Hooked(method), AdapterCallback(calibration_batches=3))
    assert calls == ["batch_loss"] * 3
    with pytest.raises(AdapterError, match=r"to Failing\.batch_loss, which failed \(TypeError: no such batch\)"):
        fit(tmp_path, Failing(method))
    with pytest.raises(AdapterError, match="the loss of Silent for a training batch is NoneType, and must be a tensor"):
        fit(tmp_path, Silent(method))


def test_a_step_that_optimises_by_itself_is_not_called_for_a_loss(tmp_path):
    class Manual(Task):
        def __init__(self, method):
            super().__init__(method)
            self.automatic_optimization = False

    with pytest.raises(AdapterError, match=r"Manual optimises by itself.*give the module a batch_loss"):
        fit(tmp_path, Manual(la.LoRA(rank=2, start="lora_ga")))
