"""Does an adapter make a better draft? SmolLM2-135M and 14 of its 30 layers, by configs/language/smollm2/draft.yaml.

    python -m benchmarks.speculative --root DATA [--arms none lora afa ...] [--threads 1]

The draft is distilled on instructions, and the target then continues MT-bench prompts with its help. DATA holds the
folders alpaca_demo, dolly_hhrlhf_small and mt_bench.

Protocol: the learning rate of each arm is chosen among two by the KL on validation rows, after 25 steps of a one-cycle
schedule of their own. Then one run of 150 steps at that rate, of 4 rows of at most 192 tokens; AdamW, one seed, equal
data and order; weights in float32, computed under bf16 autocast (or --precision 32-true), eager attention. KL,
agreement and expected acceptance are those on 100 held-out rows. The draft is then merged, and 20 first turns, every
fourth of MT-bench, are continued by 48 tokens in float32, with K = 5 proposals a pass: with the draft and without it,
in turns, at temperatures 0 and 1. Finished runs are kept in results/speculative.json and skipped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import lit_adapters as la
from benchmarks.results_file import RESULTS, append, environment, load
from benchmarks.smollm2 import RECIPES, EagerSteps, adapters
from benchmarks.timing import peak_memory_mib
from language.draft.decoding import Settings
from language.draft.module import main as draft
from language.draft.module import merged_draft
from language.draft.speculative import first_turns, measure
from language.evaluate.results import as_plain
from language.prompt import prompt_tokens

RATES = (2e-3, 5e-3)
STEPS = {"rate": 25, "full": 150}
# Whose block of adapters an arm takes, of configs/language/smollm2.
ARMS = {
    "none": "lora",  # at its start, where it is the untouched draft
    "lora": "lora",
    "afa": "afa",
    "dora": "dora",
    "nora_plus_plus": "nora_plus_plus",
    "loran": "loran",
}
CONTEXT = 1024  # most tokens of a prompt; none of MT-bench's has as many


def train(arm: str, rate: float, steps: int, precision: str, root: Path) -> tuple[Any, EagerSteps]:
    """Distil one arm through the command line of the application."""
    measured = EagerSteps()
    paths = [str(root / name / "train.jsonl") for name in ("alpaca_demo", "dolly_hhrlhf_small")]
    cli = draft(
        [
            *("fit", f"--config={RECIPES / 'draft.yaml'}", *adapters(ARMS[arm])),
            *(f"--data.path={json.dumps(paths)}", "--data.format=alpaca", "--data.max_length=192"),
            *("--data.batch_size=4", "--data.val_subset=50", "--data.test_subset=100"),
            *(f"--optimizer.lr={rate}", f"--lr_scheduler.max_lr={rate}", f"--trainer.precision={precision}"),
            *("--trainer.max_epochs=-1", f"--trainer.max_steps={steps}", "--trainer.check_val_every_n_epoch=1000"),
            *("--trainer.num_sanity_val_steps=0", "--trainer.logger=false", "--trainer.enable_checkpointing=false"),
            *("--trainer.callbacks=null", "--trainer.enable_progress_bar=false"),
        ],
        trainer_defaults={"callbacks": [measured, la.AdapterCallback(statistics=[], figures=False)]},
        save_config_callback=None,
    )
    return cli, measured


def run(
    arm: str, rate: float, protocol: str, steps: int, settings: Settings, stride: int, given: Any
) -> dict[str, Any]:
    """Train one arm, and measure it."""
    peak_memory_mib(reset=True)
    start = time.perf_counter()
    cli, measured = train(arm, rate, steps, given.precision, given.root)
    seconds, memory, tuner = time.perf_counter() - start, peak_memory_mib(), cli.model
    evaluate = cli.trainer.validate if protocol == "rate" else cli.trainer.test
    (means,) = evaluate(tuner, datamodule=cli.datamodule, verbose=False)
    metrics = {name.split("/")[1]: {"value": value} for name, value in means.items()}
    record = {
        **{"arm": arm, "protocol": protocol, "rate": rate, "steps": steps, "precision": given.precision},
        "trainable": 0 if arm == "none" else tuner.report.trainable,
        "fit_seconds": round(seconds, 1),
        "seconds_per_step": round(measured.median(), 3) if len(measured.ends) > 1 else None,
        "peak_memory_mib": round(memory),
        "environment": environment(),
    }
    if protocol == "rate":
        return record | {"metrics": metrics}
    texts = first_turns(str(given.root / "mt_bench" / "mt_bench.jsonl"))[::stride]
    prompts = [prompt_tokens(tuner.tokenizer, text, None, True, CONTEXT) for text in texts]
    short, report = merged_draft(tuner)
    found = measure(tuner.target, short, prompts, settings)
    decoded = {f"{name}: {key}": as_plain(e) for name, values in found.items() for key, e in values.items()}
    how = {"prompts": len(prompts), "max_new_tokens": settings.max_new_tokens, "draft_tokens": settings.draft_tokens}
    return record | {**how, "merge_error": report.max_abs_error, "metrics": metrics | decoded}


def main() -> None:
    """Run what is missing in the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="folder with the data sets")
    parser.add_argument("--arms", nargs="+", default=["none", "lora", "afa"], choices=list(ARMS))
    parser.add_argument("--precision", default="bf16-mixed", choices=["bf16-mixed", "32-true"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--short", action="store_true", help="two steps and two prompts, kept nowhere, to see that it runs"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    path = (Path(tempfile.mkdtemp()) if given.short else RESULTS) / "speculative.json"
    settings, stride = (Settings(max_new_tokens=8), 40) if given.short else (Settings(max_new_tokens=48), 4)

    def once(arm: str, protocol: str, rate: float) -> dict[str, Any]:
        steps = 0 if arm == "none" else 2 if given.short else STEPS[protocol]
        key = {"arm": arm, "protocol": protocol, "rate": rate, "steps": steps, "precision": given.precision}
        known = [r for r in load(path) if key.items() <= r.items()]
        if not known:
            append(path, run(arm, rate, protocol, steps, settings, stride, given))
            known = [r for r in load(path) if key.items() <= r.items()]
        shown = ", ".join(f"{name} {m['value']:.4f}" for name, m in known[0]["metrics"].items())
        print(f"{arm:<15} {protocol:<5} lr {rate:g}: {shown}", flush=True)
        return known[0]

    for arm in given.arms:
        if arm == "none":
            once(arm, "full", RATES[0])
            continue
        tried = [once(arm, "rate", rate) for rate in RATES]
        once(arm, "full", min(tried, key=lambda r: r["metrics"]["kl"]["value"])["rate"])


if __name__ == "__main__":
    main()
