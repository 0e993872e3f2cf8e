"""Learn from preferences with TRL's DPOTrainer, with NoRA as its `peft_config`.

    python -m examples.dpo_peft [--out DIR]

Needs `pip install -e ".[language,peft]" trl`, no network and no GPU, and takes seconds on a CPU. The model has random
weights; use `AutoModelForCausalLM.from_pretrained`, its tokenizer and your own pairs instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import peft
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from language.models import create_model, create_tokenizer
from lit_adapters.huggingface import AdapterTrainerCallback, peft_tuners

PAIRS = [
    {"prompt": f"{a} + {b} =", "chosen": f" {a + b}", "rejected": f" {a - b}"} for a in range(8) for b in range(1, 8)
]


def main() -> None:
    """Train, and load the adapter with peft."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for checkpoints")
    out = parser.parse_args().out
    torch.manual_seed(0)
    tokenizer = create_tokenizer("tiny_llama")
    config = peft_tuners.NoRAConfig(groups=8, base="anchored", task_type="CAUSAL_LM")
    args = DPOConfig(
        output_dir=str(out),
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        logging_steps=10,
        save_steps=30,
        max_length=32,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    # The reference is this model with the adapter disabled: no second model is in memory.
    trainer = DPOTrainer(
        create_model("tiny_llama"),
        args=args,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.add_callback(AdapterTrainerCallback(trainer))
    trainer.train()

    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(create_model("tiny_llama"), out / "checkpoint-30")
    ids = tokenizer("3 + 4 =", return_tensors="pt").input_ids
    difference = (loaded.eval()(ids).logits - trainer.model.eval()(ids).logits).abs().max()
    margin = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    print(f"reward margin {margin[0]:.3f} at first, {margin[-1]:.3f} at the end")
    print(f"largest difference of the logits after loading: {difference:.1e}")


if __name__ == "__main__":
    main()
