"""Several adapters in one model: trained in turn, chosen by name, mixed in one batch, and combined.

    python -m examples.several_adapters [--out DIR]

Needs `pip install -e ".[language]"`, no network and no GPU, and takes seconds on a CPU. The model has random weights
and the rows are generated; use `from_pretrained` and your own data instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import lit_adapters as la

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TASKS = {"up": 1, "down": -1}


def rows(step: int) -> Tensor:
    """32 rows of numbers from 0 to 29 that go up or down by one, (32, 12)."""
    return (torch.randint(30, (32, 1)) + step * torch.arange(12)) % 30


def train(model: LlamaForCausalLM, step: int) -> float:
    """Train the adapters in use on one task, and return the last loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(60):
        batch = rows(step)
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def main() -> None:
    """Train two adapters, and use them one by one, together in a batch, and combined."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the adapters")
    out = parser.parse_args().out
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=30, bos_token_id=None, eos_token_id=None))
    for name, step in TASKS.items():
        la.attach(model, la.NoRAPlusPlus(lora=la.LoRA(rank=8)), name=name)  # in use from now on
        print(f"{name}: loss {train(model, step):.2f}")
        la.save_adapters(model, out / name)

    model.eval()
    start = torch.tensor([[15], [15]])
    with torch.no_grad():
        for name in TASKS:
            la.use(model, name)
            print(f"{name}: {model.generate(start[:1], max_new_tokens=4)[0].tolist()}")
        with la.rows(model, ["up", "down"]):  # each row of a batch with adapters of its own
            print(f"one batch: {model.generate(start, max_new_tokens=4).tolist()}")
        print(la.combine(model, list(TASKS), [0.5, 0.5], name="both"))
        print(f"in use: {la.in_use(model)} of {la.adapter_names(model)}")
    la.detach(model, "both")


if __name__ == "__main__":
    main()
