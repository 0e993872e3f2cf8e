"""Train AFA-LoRA with transformers' Trainer: annealed to plain LoRA, saved, resumed and merged.

    python -m examples.trainer [--out DIR]

Needs `pip install -e ".[language]"`, no network and no GPU, and takes seconds on a CPU. The model has random weights
and the rows are generated; use `from_pretrained` and your own data instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import lit_adapters as la
from lit_adapters.huggingface import AdapterTrainerCallback


def build() -> LlamaForCausalLM:
    """A small LLaMA; the same weights at each call."""
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32, bos_token_id=1, eos_token_id=2))


class Counting(Dataset[dict[str, Tensor]]):
    """Rows that count upwards from a random number, modulo 30."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = (torch.arange(12) + index) % 30 + 2
        return {"input_ids": row, "labels": row}


def main() -> None:
    """Train, and show that the merged model gives what the adapted one gives."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for checkpoints")
    out = parser.parse_args().out
    model = build()
    print(la.attach(model, la.AFALoRA(rank=8, schedule=la.schedules.Linear(end=0.5))))
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=2e-2,
        logging_steps=20,
        save_steps=30,
        report_to=[],  # or "tensorboard", "wandb": statistics of the adapters go there too
        use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=Counting())
    trainer.add_callback(AdapterTrainerCallback(trainer))
    trainer.train()  # with resume_from_checkpoint=True it goes on from the last checkpoint

    row = Counting()[5]["input_ids"][None].to(model.device)
    loaded = build()
    la.load_adapters(loaded, out / "checkpoint-60")  # a checkpoint is an adapter directory
    adapted = model.eval()(row, labels=row).loss
    print(la.merge(model))  # linear by now, so it merges as plain LoRA
    merged = model(row, labels=row).loss
    print(f"loss {adapted:.4f} adapted, {loaded.eval()(row, labels=row).loss:.4f} loaded, {merged:.4f} merged")


if __name__ == "__main__":
    main()
