"""Preference tuning: `python -m language.dpo fit` beside TRL's DPOTrainer with peft's LoRA."""

from __future__ import annotations

from pathlib import Path

from benchmarks.jobs.job import LINEAR, Data, Job, SizeName, Training, fit_side, script_side
from benchmarks.jobs.models import language_model
from benchmarks.jobs.text import alpaca_rows, write_rows
from language.dpo.data import PreferenceDataModule

TRAINING = {
    "tiny": Training(batch_size=2, rank=2, more={"pairs": 8, "max_length": 512, "beta": 0.1}),
    "real": Training(batch_size=4, rank=8, more={"pairs": 40, "max_length": 512, "beta": 0.1}),
}


def dpo(size: SizeName, data: Data, work: Path) -> Job:
    """Alpaca's answers are chosen, and rejected is the answer of the next row: what is learned does not matter here.

    Our batches hold pairs of similar length; the peer gets the pairs in the order of ours, and so the same batches.
    """
    training = TRAINING[size]
    settings = training.as_settings() | {"targets": LINEAR}
    model = language_model(size, work)
    rows = alpaca_rows(size, data, settings["pairs"])
    pairs = [
        {
            "prompt": f"{row['instruction']}\n{row['input']}".strip(),
            "chosen": row["output"],
            "rejected": after["output"],
        }
        for row, after in zip(rows, [*rows[1:], rows[0]], strict=True)
    ]
    ours = write_rows(work / "dpo.jsonl", pairs)
    lengths = {"max_length": settings["max_length"], "batch_size": settings["batch_size"]}
    module = PreferenceDataModule(str(ours), str(model), val_fraction=0.0, **lengths)
    module.setup("fit")
    order = [index for _, index in module.train_dataloader().sampler]
    # Our plain prompts end with a new line.
    theirs = [{**pairs[i], "prompt": f"{pairs[i]['prompt']}\n"} for i in order]
    options = [
        f"--model.model={model}",
        f"--model.beta={settings['beta']}",
        f"--data.path={ours}",
        "--data.use_chat_template=false",
        f"--data.max_length={settings['max_length']}",
        "--data.val_fraction=0",
        "--data.test_fraction=0",
    ]
    files = {"model": str(model), "rows": str(write_rows(work / "dpo_texts.jsonl", theirs))}
    return Job(
        "dpo",
        "TRL + peft",
        "tokens",
        settings,
        fit_side("language.dpo", "language/smollm2/dpo", training, work / "dpo_ours", options),
        script_side("peer_dpo", settings | files, work / "dpo_peer"),
        same_first_batch=True,
    )
