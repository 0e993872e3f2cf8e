"""What do the methods learn from preferences? DPO of SmolLM2-135M by the recipe in configs/language/smollm2/dpo.yaml.

    python -m benchmarks.preferences --root DATA [--arms lora afa ...] [--threads 1] [--precision bf16-mixed]

DATA holds the folder hh_helpful: jsonl files of prompt, chosen, rejected, the helpful part of Anthropic's HH-RLHF (its
two test splits, which are divided into training, validation and test pairs here, equal prompts together).

Protocol: the learning rate of each arm is chosen among two by the loss on validation pairs, after a shorter one-cycle
schedule of its own. Then one run at that rate, which is asked on 200 held-out pairs. AdamW, one seed, equal data and
order; prompts and answers keep at most 48 tokens each where they do not fit into 96 together; weights in float32,
computed under bf16 autocast (or --precision 32-true, where a processor has no bf16); eager attention. "untouched" is
the model at its start, where every reward is 0 and the accuracy one half by definition; how often it finds the chosen
answer likelier is "reference likelihood accuracy". Finished runs are kept in results/preferences.json and skipped.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lit_adapters as la
from benchmarks.arms import adapted
from benchmarks.results_file import RESULTS, environment
from benchmarks.runner import QUIET, Runner, add_precision, loss_of, metric_values, parser, rate_options
from benchmarks.smollm2 import RECIPES, EagerSteps, adapters, average
from benchmarks.timing import peak_memory_mib
from language.dpo.__main__ import main as dpo
from language.dpo.module import DPOTuner, preference_loss, wins
from language.evaluate.metrics import Estimate, RowLosses, held_out_loss
from language.loss import learned_tokens

ARMS = ["untouched", *adapted("regimes")]
RATES = (2e-4, 1e-3)
STEPS = {"rate": 12, "full": 50}  # optimiser steps to compare two rates by, and of the run that is asked
DATA = [
    "--data.max_length=96",
    "--data.max_answer_length=48",
    "--data.batch_size=8",
    "--data.val_fraction=0.1",
    "--data.val_subset=48",
    "--data.test_fraction=0.1",
    "--data.test_subset=200",
]


def ask(module: DPOTuner, batches: DataLoader) -> tuple[dict[str, Estimate], dict[str, list[float]]]:
    """Estimates on held-out pairs, and what they average: one value a pair, for paired comparison."""
    rows: dict[str, list[Tensor]] = {"policy": [], "reference": []}
    sums: list[float] = []
    counts: list[int] = []
    module.eval()
    for batch in batches:
        policy, reference, divergence = module.compare(batch)
        of_pair = learned_tokens(batch).sum(1)[: len(policy) // 2].tolist()
        sums += [tokens.double().sum().item() for tokens in divergence.split(of_pair)]
        counts += of_pair
        for name, values in (("policy", policy), ("reference", reference)):
            rows[name].append(values.double().view(2, -1))
    ours, theirs = (torch.cat(rows[name], 1) for name in ("policy", "reference"))
    rewards = module.hparams["beta"] * (ours - theirs)
    margins = rewards[0] - rewards[1]

    items = {
        "loss": preference_loss(margins, module.hparams["label_smoothing"]).tolist(),
        "reward accuracy": wins(margins).tolist(),
        "reward margin": margins.tolist(),
        "chosen reward": rewards[0].tolist(),
        "likelihood accuracy": wins(ours[0] - ours[1]).tolist(),
        "reference likelihood accuracy": wins(theirs[0] - theirs[1]).tolist(),
    }
    estimates = {name: average(values) for name, values in items.items()}
    estimates["kl"] = held_out_loss(RowLosses(sums, counts))["loss"]
    return estimates, items | {"kl": sums, "tokens": [float(n) for n in counts]}


def run(arm: str, protocol: str, rate: float, steps: int, precision: str, root: Path) -> dict[str, Any]:
    """Train one arm through the command line of the application, and measure it."""
    peak_memory_mib(reset=True)
    start = time.perf_counter()
    measured = EagerSteps()
    own = [] if arm in ("untouched", "afa") else adapters(arm)  # the recipe is that of AFA-LoRA
    cli = dpo(
        [
            "fit",
            f"--config={RECIPES}/dpo.yaml",
            f"--data.path={root}/hh_helpful",
            *DATA,
            *own,
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
    data = cli.datamodule
    record = {
        "arm": arm,
        "protocol": protocol,
        "rate": rate,
        "steps": steps,
        "precision": precision,
        "pairs_per_step": data.batch_size,
        "trainable": 0 if arm == "untouched" else cli.model.report.trainable,
        "fit_seconds": round(seconds, 1),
        "seconds_per_step": round(measured.median(), 3) if len(measured.ends) > 1 else None,
        "peak_memory_mib": round(memory),
        "environment": environment(),
    }
    data.setup("test")
    batches = data.val_dataloader() if protocol == "rate" else data.test_dataloader()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        estimates, items = ask(cli.model, batches)
    record["metrics"] = {name: asdict(estimate) for name, estimate in estimates.items()}
    if protocol == "full":
        record["items"] = {name: " ".join(f"{value:.5g}" for value in values) for name, values in items.items()}
    return record


def main() -> None:
    """Run what is missing in the result file."""
    options = parser(__doc__, ARMS)
    options.add_argument("--root", required=True, type=Path, help="folder with hh_helpful")
    add_precision(options)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    runner = Runner(RESULTS / "preferences.json", partial(run, root=args.root), metric_values)
    for arm in args.arms:
        if arm == "untouched":
            runner.once(arm=arm, protocol="full", rate=RATES[0], steps=0, precision=args.precision)
            continue
        rate = runner.best_rate(RATES, loss_of, arm=arm, steps=STEPS["rate"], precision=args.precision)
        runner.once(arm=arm, protocol="full", rate=rate, steps=STEPS["full"], precision=args.precision)


if __name__ == "__main__":
    main()
