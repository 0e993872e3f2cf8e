"""An optimiser step is the same however its rows fall into micro-batches and processes: every term counts once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader

import lit_adapters as la
from language.data.packing import PaddedCollator
from language.dpo.module import DPOTuner
from language.draft.module import DraftTuner
from language.grpo.module import GRPOTuner
from language.module import CausalLMTuner
from lit_adapters.lightning import StepMeanModule
from tests.language import tiny
from tests.language.grpo.rewarding import term
from tests.scale.processes import run_in_two

LENGTHS = (3, 90, 12, 60, 31, 4, 47)
SPLITS = {"4 rows": (4, 1), "4 x 1 row": (1, 4), "2 x 2 rows": (2, 2)}  # rows of a batch, batches of a step
REGIMES = {
    "sft": (CausalLMTuner, {}),
    "train": (CausalLMTuner, {"train": ["lm_head"], "adapters": la.NoRA(groups=4)}),
    "dpo": (DPOTuner, {"beta": 0.5}),
    "draft": (DraftTuner, {"keep_layers": [1]}),
    "grpo": (GRPOTuner, {"rewards": [term("letters")], "group_size": 2, "kl_weight": 0.1}),
}


class Updates(Callback):
    """What trains, as one vector after each optimiser step, and the loss as it was logged then."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > len(self.values):
            self.values.append(torch.cat([p.detach().flatten() for p in pl_module.parameters() if p.requires_grad]))
            self.losses.append(trainer.callback_metrics["train/loss"].item())


def documents() -> list[tuple[Tensor, Tensor]]:
    rows = tiny.batch(*LENGTHS)
    return [(rows["input_ids"][i, :n], rows["labels"][i, :n]) for i, n in enumerate(LENGTHS)]


def batches(name: str, size: int, rows_in_all: int = 7) -> list[Any]:
    """The same rows, pairs or completions, `size` in a batch."""
    collate = PaddedCollator(258)
    rows = documents()
    chunks = [range(i, min(i + size, rows_in_all)) for i in range(0, rows_in_all, size)]
    if name == "dpo":  # the chosen answer of a pair is the rejected one of the next
        return [collate([[rows[(i + k) % 7]] for k in (0, 1) for i in chunk]) for chunk in chunks]
    return [collate([[rows[i]] for i in chunk]) for chunk in chunks]


def with_rollouts(module: GRPOTuner) -> GRPOTuner:
    """GRPO on completions that are given: the rows of the batch, with an advantage for each row."""

    def sample(batch: Any, batch_idx: int) -> dict[str, Tensor]:
        learned = batch["labels"][:, 1:] != -100
        ids = batch["input_ids"]
        advantage = ids[:, :1].double().sin().float().expand_as(learned)[learned]
        old = -5.5 + 0.3 * ids[:, 1:][learned].double().sin().float()
        values = {"old": old, "reference": old + 0.1, "advantages": advantage, "reward": advantage.mean()}
        return {**batch, **values, "prompts": ids}

    module._sample = sample
    return module


def run(name: str, folder: Path, size: int, accumulate: int, rows_in_all: int = 7, **settings: Any) -> Updates:
    kind, changes = REGIMES[name]
    module = tiny.tuner(kind, **{"adapters": la.LoRA(rank=2)} | changes | {"init_seed": 1})
    if name == "grpo":
        with_rollouts(module)
    rate = 30.0 if name == "draft" else 0.1  # random layers agree: their gradients are small
    module.configure_optimizers = lambda: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], rate)
    seen = Updates()
    trainer = tiny.trainer(folder, callbacks=[seen], accumulate_grad_batches=accumulate, **settings)
    trainer.fit(module, DataLoader(batches(name, size, rows_in_all), batch_size=None))
    return seen


@pytest.mark.parametrize(
    "name", ["sft", "grpo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("train", "dpo", "draft"))]
)
def test_a_step_does_not_depend_on_its_micro_batches(tmp_path, name):
    """Two steps, of four rows and of three: the second is a window that does not get full.

    Two losses are rounded more: DPO's sums a hundred tokens before the sigmoid, and a draft's is a small difference.
    """
    tolerance = 1e-5 if name in ("dpo", "draft") else 1e-6
    seen = {split: run(name, tmp_path, *sizes, enable_checkpointing=False) for split, sizes in SPLITS.items()}
    whole = seen.pop("4 rows")
    assert len(whole.values) == 2
    assert not torch.equal(*whole.values)
    start = tiny.built(REGIMES[name][0], **{"adapters": la.LoRA(rank=2)} | REGIMES[name][1] | {"init_seed": 1})
    first = torch.cat([p.detach().flatten() for p in start.parameters() if p.requires_grad])
    for split in seen.values():
        assert split.losses == pytest.approx(whole.losses, rel=1e-4)
        for before, expected, found in zip([first, whole.values[0]], whole.values, split.values, strict=True):
            assert (found - expected).norm() / (expected - before).norm() < tolerance


def test_clipping_sees_the_gradient_of_the_whole_step(tmp_path):
    settings = {"enable_checkpointing": False, "gradient_clip_val": 1e-3}
    whole, split = (run("sft", tmp_path, *SPLITS[s], **settings).values for s in ("4 rows", "4 x 1 row"))
    free = run("sft", tmp_path, 4, 1, enable_checkpointing=False).values
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-9)
    assert not torch.allclose(whole[0], free[0], rtol=1e-3)


def test_a_hook_that_forgets_the_base_class_is_noticed(tmp_path):
    class Tuner(CausalLMTuner):
        def on_before_optimizer_step(self, optimizer):
            pass

    module = tiny.tuner(Tuner)
    trainer = tiny.trainer(tmp_path, callbacks=[], accumulate_grad_batches=2, enable_checkpointing=False)
    with pytest.raises(la.AdapterError, match=r"add super\(\)\.on_before_optimizer_step\(optimizer\)"):
        trainer.fit(module, DataLoader(batches("sft", 1), batch_size=None))


def test_an_open_step_is_kept_and_begins_anew_without_its_gradient(tmp_path):
    module = tiny.built()
    module._trainer = tiny.trainer(tmp_path, accumulate_grad_batches=3)
    mean = StepMeanModule.mean_over_step
    mean(module, torch.tensor(6.0), 2, 0)
    loss, so_far = mean(module, torch.tensor(3.0), 4, 1)
    assert (loss, so_far) == (1.5, 1.5)
    kept: dict[str, Any] = {}
    module.on_save_checkpoint(kept)
    for gradient, expected in ((None, (1.0, 1.0)), (torch.zeros(()), (0.5, 10 / 7))):
        other = tiny.built()
        other._trainer = module._trainer
        other.on_load_checkpoint(kept)
        next(other.parameters()).grad = None if gradient is None else torch.zeros_like(next(other.parameters()))
        found = mean(other, torch.tensor(1.0), 1, 2)
        assert [value.item() for value in found] == pytest.approx(expected)


@pytest.mark.parametrize("kept", [{}, [1.0], [1.0, "2", 0.0, 3], [0.0, 1.0, 1.0, 1], [1.0, math.nan, 1.0, 1], "x", 7])
def test_a_damaged_open_step_is_refused(kept):
    with pytest.raises(la.AdapterError, match="open_step of the checkpoint is"):
        StepMeanModule().on_load_checkpoint({"open_step": kept})


@pytest.mark.slow
def test_two_processes_and_micro_batches(tmp_path):
    """DDP, two micro-batches of one row in each process and at last only one, against batches of four and two rows."""
    first, second = run_in_two("tests.scale.accumulated", tmp_path)
    whole = run("sft", tmp_path, 4, 1, 6, enable_checkpointing=False)
    for seen in (first, second):
        assert seen["losses"] == pytest.approx(whole.losses, rel=1e-5)
        for expected, found in zip(whole.values, seen["values"], strict=True):
            assert (found - expected).norm() / expected.norm() < 1e-6
