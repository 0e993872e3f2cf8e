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

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lit_adapters as la
from benchmarks.arms import adapted
from benchmarks.results_file import RESULTS, environment
from benchmarks.runner import QUIET, Runner, add_precision, metric_values, parser, rate_options
from benchmarks.smollm2 import RECIPES, EagerSteps, adapters
from benchmarks.timing import peak_memory_mib
from language.draft.__main__ import main as draft
from language.draft.decoding import DecodingSettings
from language.draft.module import merged_draft
from language.draft.speculative import first_turns, measure
from language.evaluate.results import as_plain
from language.prompt import prompt_tokens

RATES = (2e-3, 5e-3)
STEPS = {"rate": 25, "full": 150}
CONTEXT = 1024  # most tokens of a prompt; all prompts of MT-bench are shorter


def train(arm: str, rate: float, steps: int, precision: str, root: Path) -> tuple[Any, EagerSteps]:
    """Distil one arm through the command line of the application."""
    measured = EagerSteps()
    paths = [str(root / name / "train.jsonl") for name in ("alpaca_demo", "dolly_hhrlhf_small")]
    cli = draft(
        [
            "fit",
            f"--config={RECIPES / 'draft.yaml'}",
            *adapters(arm),
            f"--data.path={json.dumps(paths)}",
            "--data.format=alpaca",
            "--data.max_length=192",
            "--data.batch_size=4",
            "--data.val_subset=50",
            "--data.test_subset=100",
            *rate_options(rate),
            f"--trainer.precision={precision}",
            "--trainer.max_epochs=-1",
            f"--trainer.max_steps={steps}",
            "--trainer.check_val_every_n_epoch=1000",
            "--trainer.num_sanity_val_steps=0",
            *QUIET,
        ],
        trainer_defaults={"callbacks": [measured, la.AdapterCallback(statistics=[], figures=False)]},
        save_config_callback=None,
    )
    return cli, measured


def run(
    arm: str,
    protocol: str,
    rate: float,
    steps: int,
    precision: str,
    root: Path,
    settings: DecodingSettings,
    stride: int,
) -> dict[str, Any]:
    """Train one arm, and measure it."""
    peak_memory_mib(reset=True)
    start = time.perf_counter()
    cli, measured = train(arm, rate, steps, precision, root)
    seconds = time.perf_counter() - start
    memory = peak_memory_mib()
    tuner = cli.model
    evaluate = cli.trainer.validate if protocol == "rate" else cli.trainer.test
    (means,) = evaluate(tuner, datamodule=cli.datamodule, verbose=False)
    metrics = {name.split("/")[1]: {"value": value} for name, value in means.items()}
    record = {
        "arm": arm,
        "protocol": protocol,
        "rate": rate,
        "steps": steps,
        "precision": precision,
        "trainable": 0 if arm == "none" else tuner.report.trainable,
        "fit_seconds": round(seconds, 1),
        "seconds_per_step": round(measured.median(), 3) if len(measured.ends) > 1 else None,
        "peak_memory_mib": round(memory),
        "environment": environment(),
    }
    if protocol == "rate":
        return record | {"metrics": metrics}
    texts = first_turns(str(root / "mt_bench" / "mt_bench.jsonl"))[::stride]
    prompts = [prompt_tokens(tuner.tokenizer, text, None, True, CONTEXT) for text in texts]
    short, report = merged_draft(tuner)
    found = measure(tuner.target, short, prompts, settings)
    decoded = {f"{name}: {key}": as_plain(e) for name, values in found.items() for key, e in values.items()}
    how = {"prompts": len(prompts), "max_new_tokens": settings.max_new_tokens, "draft_tokens": settings.draft_tokens}
    return record | {**how, "merge_error": report.max_abs_error, "metrics": metrics | decoded}


def divergence(record: dict[str, Any]) -> float:
    """The KL of a record."""
    kl: float = record["metrics"]["kl"]["value"]
    return kl


def main() -> None:
    """Run what is missing in the result file."""
    options = parser(__doc__, ["none", *adapted("regimes")], default=["none", "lora", "afa"])
    options.add_argument("--root", required=True, type=Path, help="folder with the data sets")
    add_precision(options)
    options.add_argument(
        "--short", action="store_true", help="two steps and two prompts, kept nowhere, to see that it runs"
    )
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    folder = RESULTS
    steps = STEPS
    asked = partial(run, root=args.root, settings=DecodingSettings(max_new_tokens=48), stride=4)
    if args.short:
        folder = Path(tempfile.mkdtemp())
        steps = {"rate": 2, "full": 2}
        asked = partial(run, root=args.root, settings=DecodingSettings(max_new_tokens=8), stride=40)
    runner = Runner(folder / "speculative.json", asked, metric_values)
    for arm in args.arms:
        if arm == "none":
            runner.once(arm=arm, protocol="full", rate=RATES[0], steps=0, precision=args.precision)
            continue
        rate = runner.best_rate(RATES, divergence, arm=arm, steps=steps["rate"], precision=args.precision)
        runner.once(arm=arm, protocol="full", rate=rate, steps=steps["full"], precision=args.precision)


if __name__ == "__main__":
    main()
