"""What do the methods learn from preferences? DPO of SmolLM2-135M by the recipe in configs/language/smollm2/dpo.yaml.

    python -m benchmarks.preferences --root DATA [--arms lora afa ...] [--threads 1] [--precision bf16-mixed]

DATA holds the folder hh_helpful: jsonl files of prompt, chosen, rejected, the helpful part of Anthropic's HH-RLHF (its
two test splits, of which training, validation and test pairs are held out here, equal prompts together).

Protocol: the learning rate of each arm is chosen among two by the loss on validation pairs, after a shorter one-cycle
schedule of its own. Then one run at that rate, which is asked on 200 held-out pairs. AdamW, one seed, equal data and
order; prompts and answers keep at most 48 tokens each where they do not fit into 96 together; weights in float32,
computed under bf16 autocast (or --precision 32-true, where a processor has no bf16); eager attention. "untouched" is
the model at its start, where every reward is 0 and the accuracy one half by definition; how often it finds the chosen
answer likelier is "reference likelihood accuracy". Finished runs are kept in results/preferences.json and skipped.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import lit_adapters as la
from benchmarks.results_file import RESULTS, append, environment, load
from benchmarks.smollm2 import RECIPES, EagerSteps, adapters, average
from benchmarks.timing import peak_memory_mib
from language.dpo.module import DPOTuner, preference_loss, wins
from language.dpo.module import main as dpo
from language.evaluate.metrics import Estimate, RowLosses, held_out_loss
from language.loss import learned_tokens

PATH = RESULTS / "preferences.json"
ARMS = ("untouched", "lora", "afa", "dora", "nora_plus_plus", "loran")
RATES = (2e-4, 1e-3)
STEPS = {"rate": 12, "full": 50}  # optimiser steps to compare two rates by, and of the run that is asked
DATA = [
    *("--data.max_length=96", "--data.max_answer_length=48", "--data.batch_size=8"),
    *("--data.val_fraction=0.1", "--data.val_subset=48", "--data.test_fraction=0.1", "--data.test_subset=200"),
]


def ask(module: DPOTuner, batches: DataLoader) -> tuple[dict[str, Estimate], dict[str, list[float]]]:
    """Estimates on held-out pairs, and what they average: one value a pair, for paired comparison."""
    beta, rows = module.hparams["beta"], {"policy": [], "reference": []}  # type: ignore[var-annotated]
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
    rewards = beta * (ours - theirs)
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


def run(arm: str, rate: float, protocol: str, steps: int, precision: str, root: Path) -> dict[str, Any]:
    """Train one arm through the command line of the application, and measure it."""
    peak_memory_mib(reset=True)
    start, measured = time.perf_counter(), EagerSteps()
    own = [] if arm in ("untouched", "afa") else adapters(arm)  # the recipe is that of AFA-LoRA
    cli = dpo(
        [
            *("fit", f"--config={RECIPES}/dpo.yaml", f"--data.path={root}/hh_helpful", *DATA, *own),
            *(f"--optimizer.lr={rate}", f"--lr_scheduler.max_lr={rate}", f"--trainer.precision={precision}"),
            *("--trainer.max_epochs=-1", f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0"),
            *("--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.callbacks=null"),
            *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        ],
        trainer_defaults={"callbacks": [measured, la.AdapterCallback(statistics=[], figures=False)]},
        save_config_callback=None,
    )
    seconds, memory = time.perf_counter() - start, peak_memory_mib()
    data = cli.datamodule
    record = {
        **{"arm": arm, "protocol": protocol, "rate": rate, "steps": steps, "precision": precision},
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="folder with hh_helpful")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--precision", default="bf16-mixed", choices=["bf16-mixed", "32-true"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    def once(arm: str, rate: float, protocol: str, steps: int) -> dict[str, Any]:
        key = {"arm": arm, "rate": rate, "protocol": protocol, "steps": steps, "precision": arguments.precision}
        known = [r for r in load(PATH) if key.items() <= r.items()]
        if not known:
            append(PATH, run(arm, rate, protocol, steps, arguments.precision, arguments.root))
            known = [r for r in load(PATH) if key.items() <= r.items()]
        shown = ", ".join(f"{n} {m['value']:.4f}" for n, m in known[0]["metrics"].items())
        print(f"{arm:<16} {protocol:<5} lr {rate:g}: {shown}", flush=True)
        return known[0]

    for arm in arguments.arms:
        if arm == "untouched":
            once(arm, RATES[0], "full", 0)
            continue
        tried = [once(arm, rate, "rate", STEPS["rate"]) for rate in RATES]
        once(arm, min(tried, key=lambda r: r["metrics"]["loss"]["value"])["rate"], "full", STEPS["full"])


if __name__ == "__main__":
    main()
