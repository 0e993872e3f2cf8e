"""A training of AFA-LoRA and NoRA in one or several processes: `torchrun --nproc-per-node 2 ddp_run.py OUT ROWS`."""

import sys
from pathlib import Path

import torch
from torch import distributed

import lit_adapters as la
from lit_adapters.huggingface import AdapterTrainerCallback
from tests.huggingface.tiny_trainer import adapted, trainer, values


def main(out: Path, rows: int) -> None:
    """Train 6 steps with `rows` in each process, and save what the first one has."""
    methods = [
        la.AFALoRA(rank=2, schedule=la.schedules.Linear(end=0.5), targets=["q_proj", "v_proj"]),
        la.NoRA(groups=4, base="anchored"),
    ]
    model = adapted(methods)
    made = trainer(out, model, per_device_train_batch_size=rows, max_steps=6, save_steps=3, logging_steps=1)
    made.add_callback(AdapterTrainerCallback(made, figures=False))
    made.train()
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        history = [{k: v for k, v in e.items() if "adapter" in k or k == "step"} for e in made.state.log_history]
        torch.save({"values": values(model), "history": history}, out / "result.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
