"""Tune a language model with TRL's SFTTrainer and NoRA++, and save it for `from_pretrained`.

    python -m examples.sft [--out DIR]

Needs `pip install -e ".[language]" trl`, no network and no GPU, and takes seconds on a CPU. The model has random
weights; use `AutoModelForCausalLM.from_pretrained`, its tokenizer and your own rows instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import lit_adapters as la
from language.models import create_model, create_tokenizer
from lit_adapters.huggingface import AdapterTrainerCallback, save_with_functions

ROWS = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(8) for b in range(8)]


def main() -> None:
    """Train, merge, save, and load with transformers alone."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for checkpoints and the merged model")
    out = parser.parse_args().out
    torch.manual_seed(0)
    model, tokenizer = create_model("tiny_llama"), create_tokenizer("tiny_llama")
    method = la.NoRAPlusPlus(nora=la.NoRA(groups=8, base="anchored", fit_range="calibrate"), lora=la.LoRA(rank=8))
    print(la.attach(model, method))
    args = SFTConfig(
        output_dir=str(out / "checkpoints"),
        max_steps=40,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        logging_steps=10,
        max_length=32,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    trainer.add_callback(AdapterTrainerCallback(trainer))  # measures the inputs of the activations first
    trainer.train()

    la.merge(model)  # LoRA goes into the weights; the learned activations stay
    save_with_functions(model, out / "merged")
    tokenizer.save_pretrained(out / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(out / "merged", trust_remote_code=True)
    ids = tokenizer("3 + 4 =", return_tensors="pt").input_ids
    difference = (loaded.eval()(ids).logits - model.eval()(ids).logits).abs().max()
    print(f"largest difference of the logits after loading: {difference:.1e}")


if __name__ == "__main__":
    main()
