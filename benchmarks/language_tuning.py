"""What do the methods learn on a language model? SmolLM2-135M by the recipes in configs/language/smollm2.

    python -m benchmarks.language_tuning --root DATA --task alpaca [--arms lora afa ...] [--threads 1]

Tasks: `alpaca` (75 steps of 4 rows; loss on 100 held-out rows, and MMLU zero-shot, 5 questions a subject), `newsgroups`
(125 steps of 16 texts, 2,000 of 20 Newsgroups; the share of 500 test texts whose class is written out), `samsum` (75
steps of 4 dialogues; ROUGE of greedy summaries of 100 test dialogues). DATA holds the folders alpaca_demo,
mmlu, newsgroups20 and samsum.

Protocol: the learning rate of each arm is chosen among two by the loss on validation rows, after 25 or 20 steps of a
one-cycle schedule of their own. Then one run at that rate, which is measured on the test rows. AdamW, one
seed, equal data and order; weights in float32, computed under bf16 autocast (or --precision 32-true, where a processor
has no bf16); eager attention, which is faster here. Finished runs are kept in results/language_TASK.json and skipped.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lit_adapters as la
from benchmarks.arms import ARMS, names, recipe_of
from benchmarks.results_file import RESULTS, environment
from benchmarks.runner import QUIET, Runner, add_precision, loss_of, metric_values, parser, rate_options
from benchmarks.smollm2 import RECIPES, EagerSteps
from benchmarks.timing import peak_memory_mib
from language.__main__ import main as language
from language.cli import LanguageCLI
from language.evaluate.likelihood import score_tokens
from language.evaluate.metrics import held_out_loss, normalised, proportion, rouge, rouge_of_texts, row_losses
from language.evaluate.run import evaluate
from language.evaluate.tasks import EvalSettings
from language.evaluate.validation import choice_questions

RATES = (5e-4, 2e-3)
# Optimiser steps to compare two rates by, and of the run that is asked.
STEPS = {"alpaca": (25, 75), "newsgroups": (20, 125), "samsum": (20, 75)}
DATA = {
    "alpaca": [
        "--data.path={root}/alpaca_demo/train.jsonl",
        "--data.format=alpaca",
        "--data.max_length=192",
        "--data.batch_size=4",
        "--data.val_fraction=0.1",
        "--data.val_subset=50",
        "--data.test_fraction=0.1",
        "--data.test_subset=100",
    ],
    "newsgroups": [
        "--data.path={root}/newsgroups20",
        "--data.format=classification",
        "--data.columns.label=label_name",
        "--data.max_length=64",
        "--data.max_answer_length=16",
        "--data.use_chat_template=false",  # its frame would fill half of max_length
        "--data.batch_size=16",
        "--data.train_subset=2000",
        "--data.val_fraction=0.1",
        "--data.val_subset=100",
        "--data.test_subset=500",
        "--model.max_new_tokens=16",
    ],
    "samsum": [
        "--data.path={root}/samsum",
        "--data.format=summarisation",
        "--data.max_length=192",
        "--data.max_answer_length=48",
        "--data.drop_empty=true",
        "--data.batch_size=4",
        "--data.train_subset=2000",
        "--data.val_subset=30",
        "--data.test_subset=100",
        "--model.max_new_tokens=48",
    ],
}


def ask(cli: LanguageCLI, task: str, arm: str, root: Path) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Estimates on the test split, and what they average: one value a row, question or text, for paired comparison."""
    module = cli.model
    data = cli.datamodule
    if task == "alpaca":
        data.setup("test")
        rows = row_losses(module.model, data.test_dataloader())
        settings = EvalSettings(shots=0, per_subject=5, batch_size=16)
        mmlu = evaluate(module.model, module.tokenizer, "mmlu", root, settings)
        answers = mmlu["results"]["mmlu"]
        estimates = {"loss": held_out_loss(rows)["loss"], "mmlu": answers["metrics"]["micro"]}
        estimates |= {f"mmlu {name}": averages["micro"] for name, averages in answers["categories"].items()}
        right = [float(p == a) for p, a in zip(answers["predictions"], answers["answers"], strict=True)]
        losses = [s / n for s, n in zip(rows.sums, rows.counts, strict=True)]
        return estimates, {"loss": losses, "tokens": [float(n) for n in rows.counts], "mmlu": right}
    references = [example.response for example in data.examples("test")]
    data.setup("test")
    if len(data.test_dataloader().dataset) != len(references):
        raise la.DataError("test rows were dropped, as nothing of their texts is left: raise data.max_length")
    texts = [text.strip() for batch in cli.trainer.predict(module, datamodule=data) for text in batch]
    if task == "samsum":
        return rouge(texts, references), rouge_of_texts(texts, references)
    right = [normalised(text) == normalised(reference) for text, reference in zip(texts, references, strict=True)]
    estimates = {"accuracy": proportion(right)}
    if arm == "untouched":  # it does not know the names to write, but may find them likely
        questions, answers = choice_questions(data, "test")
        scores = score_tokens(module.model, questions, batch_size=16, description=task)
        chosen = [row.index(max(row)) for row in scores]
        estimates["accuracy by likelihood"] = proportion([c == a for c, a in zip(chosen, answers, strict=True)])
    return estimates, {"accuracy": [float(r) for r in right]}


def run(arm: str, protocol: str, rate: float, steps: int, precision: str, task: str, root: Path) -> dict[str, Any]:
    """Train one arm through the command line of the application, and measure it."""
    peak_memory_mib(reset=True)
    start = time.perf_counter()
    measured = EagerSteps()
    cli = language(
        [
            "fit",
            f"--config={RECIPES / recipe_of(arm)}.yaml",
            *ARMS[arm].changes,
            *(option.format(root=root) for option in DATA[task]),
            *rate_options(rate),
            f"--trainer.precision={precision}",
            "--trainer.max_epochs=-1",
            f"--trainer.max_steps={steps}",
            "--trainer.limit_val_batches=0",
            *QUIET,
        ],
        trainer_defaults={"callbacks": [measured, la.AdapterCallback(statistics=[], figures=False)]},
        save_config_callback=None,
    )
    seconds = time.perf_counter() - start
    memory = peak_memory_mib()
    record = {
        "task": task,
        "arm": arm,
        "protocol": protocol,
        "rate": rate,
        "steps": steps,
        "precision": precision,
        "trainable": 0 if arm == "untouched" else cli.model.report.trainable,
        "fit_seconds": round(seconds, 1),
        "seconds_per_step": round(measured.median(), 3) if len(measured.ends) > 1 else None,
        "peak_memory_mib": round(memory),
        "environment": environment(),
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        if protocol == "rate":
            loss = held_out_loss(row_losses(cli.model.model, cli.datamodule.val_dataloader()))["loss"]
            return record | {"metrics": {"loss": asdict(loss)}}
        estimates, items = ask(cli, task, arm, root)
    compact = {name: " ".join(f"{value:.5g}" for value in values) for name, values in items.items()}
    return record | {"metrics": {name: asdict(e) for name, e in estimates.items()}, "items": compact}


def main() -> None:
    """Run what is missing in the result file."""
    options = parser(__doc__, names("language"))
    options.add_argument("--root", required=True, type=Path, help="folder with the data sets")
    options.add_argument("--task", required=True, choices=list(DATA))
    add_precision(options)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    train = partial(run, task=args.task, root=args.root)
    runner = Runner(RESULTS / f"language_{args.task}.json", train, metric_values)
    short, full = STEPS[args.task]
    for arm in args.arms:
        if arm == "untouched":
            runner.once(arm=arm, protocol="full", rate=RATES[0], steps=0, precision=args.precision)
            continue
        rate = runner.best_rate(RATES, loss_of, arm=arm, steps=short, precision=args.precision)
        runner.once(arm=arm, protocol="full", rate=rate, steps=full, precision=args.precision)


if __name__ == "__main__":
    main()
