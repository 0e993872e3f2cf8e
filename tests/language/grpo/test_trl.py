"""Loss and gradient of GRPO against trl's on the same batch; needs trl."""

from __future__ import annotations

import importlib
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from language.grpo.module import clipped_objective
from language.grpo.rollouts import log_probabilities
from tests.language.grpo.rewarding import METHODS, batch, built
from tests.language.tiny import moved

trl = pytest.importorskip("trl")


def theirs(module, rollout):
    """trl's loss on a rollout: prompts padded on the left, completions on the right."""
    h, rows = module.hparams, []
    for ids, mask, labels in zip(rollout["input_ids"], rollout["attention_mask"], rollout["labels"], strict=True):
        learned = labels != -100
        rows.append((ids[mask.bool() & ~learned], ids[learned]))
    width = [max(len(row[part]) for row in rows) for part in (0, 1)]

    def padded(values, fill, part):
        wide = torch.full((len(values), width[part]), fill, dtype=values[0].dtype)
        for i, v in enumerate(values):
            wide[i, slice(width[0] - len(v), None) if part == 0 else slice(len(v))] = v
        return wide

    counts = [len(completion) for _, completion in rows]
    inputs = {
        "prompt_ids": padded([p for p, _ in rows], 258, 0),
        "prompt_mask": padded([torch.ones_like(p) for p, _ in rows], 0, 0),
        "completion_ids": padded([c for _, c in rows], 258, 1),
        "completion_mask": padded([torch.ones_like(c) for _, c in rows], 0, 1),
        "advantages": torch.stack([a[0] for a in rollout["advantages"].split(counts)]),
        "old_per_token_logps": padded(rollout["old"].split(counts), 0.0, 1),
        "ref_per_token_logps": padded(rollout["reference"].split(counts), 0.0, 1),
        "num_items_in_batch": torch.tensor(float(sum(counts))),
    }
    add_head = importlib.import_module("trl.trainer.utils").add_fused_lm_head
    add_head(module.model, temperature=h["temperature"], outputs=("log_probs", "entropy"))
    trainer = object.__new__(trl.GRPOTrainer)  # its constructor wants a data set and a folder
    vars(trainer).update(
        model=module.model,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1, report_to=[]),
        accelerator=Accelerator(cpu=True),
        temperature=h["temperature"],
        beta=h["kl_weight"],
        epsilon_low=h["clip_low"],
        epsilon_high=h["clip_high"],
        loss_type="dapo",
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        model_kwarg_keys={"logits_to_keep"},
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )
    return trainer._compute_loss(module.model, inputs)


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_those_of_trl(name):
    rows = batch(3)
    settings = {"kl_weight": 0.3, "clip_low": 0.02, "clip_high": 0.03, "temperature": 0.7, "iterations": 2}
    module = moved(built(adapters=METHODS[name], **settings)).train()
    rollout = module._sample(rows, 0)
    moved(module)
    h = module.hparams
    new = log_probabilities(module, rollout, h["temperature"])
    reference = rollout["reference"]
    terms = clipped_objective(
        new, rollout["old"], rollout["advantages"], reference, h["clip_low"], h["clip_high"], h["kl_weight"]
    )
    assert terms.clipped > 0
    losses = [terms.loss / len(new), theirs(module, rollout)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    trained = [p for p in module.parameters() if p.requires_grad]
    ours, found = (torch.autograd.grad(loss, trained) for loss in losses)
    for one, other in zip(ours, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
