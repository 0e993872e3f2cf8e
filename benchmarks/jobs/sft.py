"""Supervised fine-tuning, padded or packed: `python -m language fit` beside TRL's SFTTrainer with peft's LoRA."""

from __future__ import annotations

from pathlib import Path

from benchmarks.jobs.job import LINEAR, Data, Job, SizeName, Training, fit_side, script_side
from benchmarks.jobs.models import language_model
from benchmarks.jobs.text import alpaca_rows, write_rows
from language.data.module import InstructionDataModule

PADDED = {
    "tiny": Training(batch_size=2, rank=2, more={"rows": 8, "max_length": 512}),
    "real": Training(batch_size=4, rank=8, more={"rows": 80, "max_length": 512}),
}
PACKED = {
    "tiny": Training(batch_size=2, rank=2, more={"rows": 16, "max_length": 1024}),
    "real": Training(batch_size=4, rank=8, more={"rows": 240, "max_length": 512}),
}


def padded(size: SizeName, data: Data, work: Path) -> Job:
    """Rows side by side; the peer's batches hold the same rows as ours, in the same order."""
    return _job("sft_padded", "none", size, data, work)


def packed(size: SizeName, data: Data, work: Path) -> Job:
    """Several documents in a row, kept apart; each side packs them by its own rule (TRL: `bfd`).

    TRL joins the rows of a batch to one. Without FlashAttention transformers then computes the attention to other
    documents and masks it. So that this costs no more than in ours, the peer reads one row at a time and accumulates
    gradients.
    """
    return _job("sft_packed", "packed", size, data, work)


def _job(name: str, packing: str, size: SizeName, data: Data, work: Path) -> Job:
    training = (PACKED if packing == "packed" else PADDED)[size]
    settings = training.as_settings() | {"targets": LINEAR}
    model = language_model(size, work)
    rows = write_rows(work / f"{name}.jsonl", alpaca_rows(size, data, settings["rows"]))
    module = InstructionDataModule(
        str(rows), str(model), format="alpaca", max_length=settings["max_length"], batch_size=1, val_fraction=0.0
    )
    module.setup("fit")
    examples = module.examples("train")
    order = [index for _, index in module.train_dataloader().sampler]  # with `packing: none`, one document a row
    texts = [{"prompt": examples[i].prompt, "completion": examples[i].response} for i in order]
    options = [
        f"--model.model={model}",
        f"--data.path={rows}",
        "--data.format=alpaca",
        "--data.use_chat_template=false",
        f"--data.packing={packing}",
        f"--data.max_length={settings['max_length']}",
        "--data.val_fraction=0",
        "--data.test_fraction=0",
    ]
    theirs = {
        "model": str(model),
        "rows": str(write_rows(work / f"{name}_texts.jsonl", texts)),
        "packing": packing == "packed",
    }
    return Job(
        name,
        "TRL + peft",
        "tokens",
        settings,
        fit_side("language", "language/smollm2/lora", training, work / f"{name}_ours", options),
        script_side("peer_sft", settings | theirs, work / f"{name}_peer"),
        same_first_batch=packing == "none",
    )
