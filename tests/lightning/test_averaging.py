"""Callbacks that average weights, beside AdapterCallback and in either order."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import SWALR

import lit_adapters as la
from lit_adapters.training.left_out import LEFT_OUT, put_copies_back
from tests.lightning.resume.test_checkpoints import saver
from tests.lightning.test_rank_allocation import LAYERS, TARGET, adalora, directions, lora2
from tests.lightning.tiny_task import Task, assert_equal_bits, fit, nora, state

AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "ema without buffers": lambda: EMAWeightAveraging(decay=0.9, use_buffers=False),
    "mean": lambda: WeightAveraging(),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1),
}
rate = SWALR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0), swa_lr=1.0)
PLAIN = pytest.mark.skipif(
    any(map(callable, rate.state_dict().values())),
    reason="before torch 2.10 the state of SWALR has a function, which a file of plain values cannot hold",
)


def plain(averages):
    return [pytest.param(name, marks=PLAIN) if name == "swa" else name for name in averages]


def methods():
    return [la.AFALoRA(rank=2, schedule=la.schedules.Linear(end=0.9)), nora()]


def run(folder, average, first, **settings):
    task = Task(methods())
    callbacks = [la.AdapterCallback(), AVERAGES[average]()]
    fit(folder, task, *(callbacks if first else callbacks[::-1]), saver(folder, save_top_k=-1), **settings)
    return task


def frozen(task):
    return {name: p.clone() for name, p in task.named_parameters() if not p.requires_grad}


class Wide(LightningModule):
    """A base of 128 KiB with 4 KiB of adapters."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 2048), nn.GELU(), nn.Linear(2048, 8))
        la.attach(self.net, [la.LoRA(rank=1, targets=["0"]), nora()])

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Copies(Callback):
    """A user's own callback, with the whole model in its state, under keys of its own."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["mine"] = [{"deep": {"net": dict(pl_module.net.state_dict())}}]

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        held, net = checkpoint["mine"][0]["deep"]["net"], pl_module.net.state_dict()
        assert list(held) == list(net)
        self.equal = [key for key in net if torch.equal(held[key], net[key])]


SIZES = AVERAGES | {"a callback of one's own": Copies}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("average", plain(SIZES))
def test_checkpoints_stay_small_and_resume(tmp_path, average, first):
    def run(folder, *more, **settings):
        task, other = Wide(), SIZES[average]()
        callbacks = [la.AdapterCallback(), other, *more]
        fit(folder, task, *(callbacks if first else callbacks[::-1]), limit_val_batches=0, max_epochs=3, **settings)
        return task, other

    whole, _ = run(tmp_path, saver(tmp_path, save_top_k=-1, filename="{epoch}"))
    for path in (tmp_path / "kept").glob("*.ckpt"):
        assert path.stat().st_size < 110_000, path
    resumed, other = run(tmp_path / "again", ckpt=tmp_path / "kept" / "epoch=1.ckpt")
    if average == "a callback of one's own":
        assert {"0.weight", "2.weight"} <= set(other.equal)
    assert_equal_bits(state(resumed), state(whole))


@pytest.mark.parametrize(
    "places",
    [
        7,
        [7],
        [{}],
        [{"path": ["nowhere"], "keys": [], "of": {}}],
        [{"path": ["callbacks"], "keys": ["a"], "of": {"a": "net.no.such"}}],
        [{"path": ["callbacks"], "keys": ["a"], "of": {"a": "net.0.lora_A"}}],
        [{"path": ["callbacks"], "keys": ["a"], "of": {"a": "net.0.weight"}}],
        [{"path": "abc", "keys": None, "of": None}],
        [{"path": [0], "keys": [], "of": []}],
        [{"path": [[]], "keys": [[]], "of": {}}],
    ],
)
def test_a_damaged_note_of_what_was_left_out(places):
    checkpoint = {"callbacks": {"other": 1}, LEFT_OUT: places}
    with pytest.raises(la.AdapterError, match=r"entry 'lit_adapters_left_out' of 'x\.ckpt' does not fit"):
        put_copies_back(checkpoint, Wide(), "x.ckpt")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("average", plain(AVERAGES))
def test_the_end_is_linear_and_the_base_exact(tmp_path, average, first):
    task, base = run(tmp_path, average, first, max_epochs=2), frozen(Task(methods()))
    assert {a.beta.item() for _, a in la.adapters(task) if a.schedule is not None} == {0.0}
    assert all(torch.equal(p, base[name]) for name, p in frozen(task).items())
    saved = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)["state_dict"]
    assert {value.item() for key, value in saved.items() if key.endswith(".beta")} == {0.0}
    la.merge(task.net)


@pytest.mark.parametrize("method", [adalora, lora2])
@pytest.mark.parametrize("first", [True, False])
def test_directions_that_were_given_up_are_zero_in_the_average(tmp_path, method, first):
    task = Task(method(), train=())
    callbacks = [la.AdapterCallback(statistics=(), figures=False), EMAWeightAveraging(decay=0.9)]
    fit(tmp_path, task, *(callbacks if first else callbacks[::-1]), max_epochs=2)
    assert directions(task.net) == LAYERS * TARGET
    assert sum(sum(adapter.kept_directions()) for _, adapter in la.adapters(task.net)) == LAYERS * TARGET
