"""GRPO on the tiny model: reward functions that random bytes can earn, tuners, data and runs."""

from __future__ import annotations

from typing import Any

import torch

import lit_adapters as la
from language.grpo.data import QuestionDataModule
from language.grpo.module import GRPOTuner
from lit_adapters.lightning import build_optimizers
from tests.language.tiny import CONFIGS

QUESTIONS = str(CONFIGS / "smoke" / "questions.jsonl")
METHODS = {
    "lora": la.LoRA(rank=2),
    "dora": la.DoRA(rank=2),
    "nora_plus_plus": la.NoRAPlusPlus(nora=la.NoRA(groups=4), lora=la.LoRA(rank=2)),
    "loran": la.LoRAN(rank=2),
    "afa": la.AFALoRA(rank=2, schedule=la.schedules.Linear(end=1.0)),
}
calls = {"falling": 0}


def letters(completion: str, answer: str) -> float:
    """The share of the first eight characters that are ASCII."""
    return sum(c.isascii() for c in completion[:8]) / 8


def constant(completion: str, answer: str) -> float:
    return 0.1


def falling(completion: str, answer: str) -> float:
    calls["falling"] += 1
    return -float(calls["falling"])


def not_a_number(completion: str, answer: str) -> float:
    return float("nan")


def broken(completion: str, answer: str) -> float:
    raise KeyError("no key")


def reward(completion: str, answer: str) -> float:
    return 0.0


NOT_A_FUNCTION = 3


def term(name: str, weight: float = 1.0) -> dict[str, Any]:
    return {"function": f"tests.language.grpo.rewarding.{name}", "weight": weight}


def tuner(lr: float = 1e-2, **changes: Any) -> GRPOTuner:
    """The tiny LLaMA with LoRA, ready for a Trainer."""
    settings = {"model": "tiny_llama", "adapters": la.LoRA(rank=2), "rewards": [term("letters")], "group_size": 4}
    module = GRPOTuner(**settings | {"max_new_tokens": 6, "init_seed": 1} | changes)
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr, "weight_decay": 0.0}}
    module.configure_optimizers = lambda: build_optimizers(module, optimizer)
    return module


def built(**changes: Any) -> GRPOTuner:
    """The same with its model."""
    module = tuner(**changes)
    module.configure_model()
    return module


def questions(**changes: Any) -> QuestionDataModule:
    """The smoke rows."""
    settings = {"path": QUESTIONS, "tokenizer": "tiny_llama", "batch_size": 2, "max_length": 128}
    return QuestionDataModule(**settings | {"val_fraction": 0.25} | changes)


def batch(rows: int = 2, **changes: Any) -> dict[str, Any]:
    """The first training batch."""
    data = questions(batch_size=rows, **changes)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def log_softmax(module: GRPOTuner, rollout: dict[str, torch.Tensor]) -> torch.Tensor:
    """log p of each label of a rollout, from the logits of all positions, in the precision of the model."""
    labels = rollout["labels"]
    with torch.no_grad():
        logits = module.model(input_ids=rollout["input_ids"], attention_mask=rollout["attention_mask"]).logits
    logp = (logits / module.hparams["temperature"]).log_softmax(-1)
    found = logp[:, :-1].gather(2, labels[:, 1:].clamp_min(0)[..., None])[..., 0]
    return found[labels[:, 1:] != -100]
