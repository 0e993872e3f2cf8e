"""Reinforcement learning: `python -m language.grpo fit` beside TRL's GRPOTrainer with peft's LoRA."""

from __future__ import annotations

from pathlib import Path

from benchmarks.jobs.job import LINEAR, Data, Job, SizeName, Training, fit_side, script_side
from benchmarks.jobs.models import endless_model
from benchmarks.jobs.text import write_rows
from language.grpo.data import QuestionDataModule

TRAINING = {
    "tiny": Training(batch_size=2, rank=2, more={"questions": 8, "group_size": 2, "max_new_tokens": 6}),
    "real": Training(batch_size=4, rank=8, more={"questions": 40, "group_size": 8, "max_new_tokens": 32}),
}


def grpo(size: SizeName, data: Data, work: Path) -> Job:
    """Questions on sums, one reward, no distance to the model before training.

    The end token is one that the model does not write: all completions have `max_new_tokens` tokens, on both sides.
    """
    training = TRAINING[size]
    settings = training.as_settings() | {"targets": LINEAR}
    model = endless_model(size, work)
    rows = [
        {"question": f"What is {number} plus {3 * number % 17}?", "answer": str(number + 3 * number % 17)}
        for number in range(settings["questions"])
    ]
    ours = write_rows(work / "grpo.jsonl", rows)
    module = QuestionDataModule(str(ours), str(model), batch_size=settings["batch_size"], val_fraction=0.0)
    module.setup("fit")
    order = [index for _, index in module.train_dataloader().sampler]
    # Our plain prompts end with a new line.
    theirs = [{"prompt": f"{rows[i]['question']}\n", "answer": rows[i]["answer"]} for i in order]
    options = [
        f"--model.model={model}",
        "--model.rewards=[{function: language.grpo.rewards.exact_number, weight: 1.0}]",
        f"--model.group_size={settings['group_size']}",
        f"--model.max_new_tokens={settings['max_new_tokens']}",
        "--model.kl_weight=0",
        f"--data.path={ours}",
        "--data.prompt_template=null",
        "--data.val_fraction=0",
        "--data.test_fraction=0",
        "--trainer.max_steps=-1",
        "--trainer.val_check_interval=null",
        "--trainer.check_val_every_n_epoch=1",
    ]
    files = {"model": str(model), "rows": str(write_rows(work / "grpo_texts.jsonl", theirs))}
    return Job(
        "grpo",
        "TRL + peft",
        "tokens",
        settings,
        fit_side("language.grpo", "language/smollm2/grpo", training, work / "grpo_ours", options),
        script_side("peer_grpo", settings | files, work / "grpo_peer"),
    )
