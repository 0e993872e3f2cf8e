"""Silence is the usual failure: what does not run, does not learn or is not finite stops the run with its name."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import LambdaLR

import lit_adapters as la
from lit_adapters import AdapterCallback, AdapterError
from tests.lightning.tiny_task import Block, Net, Task, assert_equal_bits, both, fit, loader, nora, state


class Bypassing(Block):
    """Reads a weight without calling its layer, as fused MLPs do."""

    def forward(self, x):
        return x + self.fc2(torch.nn.functional.gelu(x @ self.fc1.weight.T))


def test_an_adapter_that_does_not_run(tmp_path):
    task = Task(methods=False)
    task.net.blocks[1] = Bypassing()
    la.attach(task.net, both(), train=["head"])
    with pytest.raises(AdapterError, match=r"2 of 6 adapters did not run: blocks\.1\.fc1, blocks\.1\.act"):
        fit(tmp_path, task)


def test_running_in_validation_alone_does_not_count(tmp_path):
    class Skips(Net):
        def forward(self, x):
            if not self.training:
                return super().forward(x)
            return self.head(self.norm(self.blocks[0](x)))

    task = Task(methods=False)
    task.net = Skips()
    la.attach(task.net, nora(), train=["head"])
    with pytest.raises(AdapterError, match=r"1 of 2 adapters did not run: blocks\.1\.act"):
        fit(tmp_path, task, num_sanity_val_steps=2)


def test_what_may_be_unused(tmp_path):
    task = Task(methods=False)
    task.net.blocks[1] = Bypassing()
    la.attach(task.net, nora(), train=["head"])
    assert fit(tmp_path, task, AdapterCallback(allow_unused=[r".*\.blocks\.1\.act\..*"])).global_step == 6
    with pytest.raises(AdapterError, match="'\\(' is not a regular expression"):
        fit(tmp_path, task, AdapterCallback(allow_unused=["("]))


def test_a_parameter_without_gradient(tmp_path):
    task = Task()
    task.net.extra = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(AdapterError, match=r"'net\.extra' trains but received no gradient"):
        fit(tmp_path, task)
    assert fit(tmp_path, task, AdapterCallback(allow_unused=[r"net\.extra"])).global_step == 6


class Muted(Task):
    """The second block's effect is multiplied by zero: gradients arrive, and are zero."""

    def forward(self, batch):
        x = self.net.blocks[0](batch[0])
        return self.net.head(self.net.norm(x + 0 * self.net.blocks[1](x)))


def test_a_gradient_of_exactly_zero(tmp_path):
    with pytest.raises(AdapterError, match=r"'net\.blocks\.1\..*' still has a gradient of exactly zero"):
        fit(tmp_path, Muted())
    assert fit(tmp_path, Muted(), AdapterCallback(allow_unused=[r"net\.blocks\.1\..*"])).global_step == 6


def test_a_layer_without_any_direction_left_may_sleep(tmp_path):
    """A rank allocation can give up a whole layer in the first steps."""

    class GivenUp(Muted):
        def on_train_batch_start(self, batch, batch_idx):
            for name, adapter in la.adapters(self):
                adapter.kept = [not name.startswith("net.blocks.1.")] * 4

    method = la.LoRA2(width=3, rank=4, target_rank=2, prune_from=0.9, prune_until=1.0)
    assert fit(tmp_path, GivenUp([method])).global_step == 6
    with pytest.raises(AdapterError, match="exactly zero"):
        fit(tmp_path, Muted([method]))


def test_a_parameter_that_the_optimiser_does_not_have(tmp_path):
    class Forgetful(Task):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.head.parameters(), lr=0.1)

    with pytest.raises(AdapterError, match="Give all trainable parameters to the optimiser"):
        fit(tmp_path, Forgetful())


def test_a_head_that_starts_at_zero_wakes_its_adapters_step_by_step(tmp_path):
    task = Task()
    torch.nn.init.zeros_(task.net.head.weight)
    assert fit(tmp_path, task).global_step == 6


class WarmUp(Task):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        rates = LambdaLR(optimizer, lambda step: 0.0 if step < 3 else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


def test_steps_at_rate_zero_prove_nothing(tmp_path):
    task = WarmUp()
    assert fit(tmp_path, task).global_step == 6
    assert all(p.any() for _, a in la.adapters(task) for p in a.adapter_parameters().values())


def test_accumulated_gradients(tmp_path):
    assert fit(tmp_path, Task(), accumulate_grad_batches=3).global_step == 2
    with pytest.raises(AdapterError, match="exactly zero"):
        fit(tmp_path, Muted(), accumulate_grad_batches=2)


def test_two_optimisers_are_probed_each_at_its_own_step(tmp_path):
    class Two(Task):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
                for other in self.parameters():
                    other.grad = None

        def configure_optimizers(self):
            head = {id(p) for p in self.net.head.parameters()}
            trained = [p for p in self.parameters() if p.requires_grad]
            return [
                torch.optim.SGD([p for p in trained if id(p) in head], lr=0.1),
                torch.optim.AdamW([p for p in trained if id(p) not in head], lr=0.01),
            ]

    assert fit(tmp_path, Two()).global_step == 12


def test_nothing_attached(tmp_path):
    with pytest.raises(AdapterError, match=r"Task has no adapters: call lit_adapters\.attach"):
        fit(tmp_path, Task(methods=False))


class Poisoned(Task):
    """At step 4 of an epoch of 6: infinite weights of a layer, a NaN in the batch, or a NaN from the loss itself."""

    where = "layer"

    def training_step(self, batch, batch_idx):
        if self.global_step == 8:
            if self.where == "layer":
                self.net.blocks[1].fc2.bias.requires_grad_(False).fill_(3e38).mul_(2)
            elif self.where == "overflow":
                self.net.blocks[1].fc2.weight.data.fill_(3e38)
            elif self.where == "batch":
                batch[0][0, 0] = float("nan")
            else:
                return super().training_step(batch, batch_idx) * float("inf")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("layer", r"the parameter 'net\.blocks\.1\.fc2\.bias' is no longer finite"),
        ("overflow", r"it came up in layer 'net\.blocks\.1\.fc2'"),
        ("batch", "the batch itself holds values that are not finite"),
        ("loss", "every layer's output is finite, so it came up in the loss"),
    ],
)
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, where, message):
    task = Poisoned()
    task.where = where
    saver = ModelCheckpoint(tmp_path / "kept", save_last=True)
    with pytest.raises(AdapterError, match=rf"the loss is (nan|inf|-inf) at step 8: {message}"):
        fit(tmp_path, task, AdapterCallback(), saver, max_epochs=2)
    assert [p.name for p in (tmp_path / "kept").iterdir() if "last" in p.name] == ["last.ckpt"]
    kept = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in kept["state_dict"].values() if v.is_floating_point())


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path):
    """The loss was finite; the parameters are still those of the step before."""

    class Broken(Task):
        def on_after_backward(self):
            if self.global_step == 2:
                self.net.blocks[1].fc2.lora_B.grad[0, 0] = float("inf")
                self.before = state(self)

    task = Broken()
    with pytest.raises(AdapterError, match=r"the gradient of 'net.blocks.1.fc2.lora_B' is not finite at step 2"):
        fit(tmp_path, task)
    assert_equal_bits(state(task), task.before)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    """The last step of an epoch may break them after a good loss, right before the checkpoint."""

    class BreaksAtTheEnd(Task):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.global_step == 12:
                self.net.head.weight.data[0, 0] = float("nan")

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", 0.0)

    saver = ModelCheckpoint(tmp_path / "kept", save_last=True)
    with pytest.raises(AdapterError, match=r"'net\.head\.weight' is not finite at step 12: no checkpoint was written"):
        fit(tmp_path, BreaksAtTheEnd(), AdapterCallback(), saver, max_epochs=2)
    assert torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)["global_step"] == 6


def test_a_checkpoint_on_exception_does_not_keep_broken_buffers(tmp_path):
    task = Poisoned()
    task.where = "batch"
    saver = ModelCheckpoint(tmp_path / "kept", save_last=True, save_on_exception=True)
    with pytest.raises(AdapterError, match=r"'net\.norm\.running_mean' is not finite at step 8"):
        fit(tmp_path, task, AdapterCallback(), saver, max_epochs=2)
    assert {p.name for p in (tmp_path / "kept").iterdir()} == {"last.ckpt", "epoch=0-step=6.ckpt"}


@pytest.mark.parametrize(
    "arguments",
    [{"log_every_n_steps": 0}, {"calibration_batches": 0}, {"statistics": ["functions", "histograms"]}],
)
def test_arguments_out_of_range(arguments):
    with pytest.raises(AdapterError, match=next(iter(arguments))):
        AdapterCallback(**arguments)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_precisions(tmp_path, precision):
    task = Task()
    before = {n: p.detach().clone() for n, p in task.named_parameters() if p.requires_grad}
    changes = {"data": loader(), "precision": precision}
    fit(tmp_path, task, **changes)
    assert {p.dtype for _, a in la.adapters(task) for p in a.adapter_parameters().values()} == {torch.float32}
    assert task.net.blocks[0].fc1.weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert all(not torch.equal(before[n], p.to(before[n].dtype)) for n, p in task.named_parameters() if n in before)
