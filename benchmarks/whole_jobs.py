"""How long does a whole job take, from the start of the process to the saved adapter, ours over a peer's?

    python -m benchmarks.whole_jobs --rows FILE --images DIR --mmlu DIR [--jobs sft_padded dpo] [--rounds 7]
                                    [--threads 2] [--profile]
    python -m benchmarks.whole_jobs --size tiny --rounds 2    # tiny random models, no data; nothing is kept

`sft_padded`, `sft_packed`, `dpo`, `grpo`: SmolLM2-135M beside TRL's trainers with peft; `vit`, `vit_trainer`: a
ViT-S/14 at 56 px with random weights beside a plain loop of timm and peft and beside transformers' Trainer; `mmlu`:
beside lm-evaluation-harness; `generation`, `generation_merged`: with an adapter, beside peft. Float32.

Ours is our command line (in `generation` a script) on a recipe of configs/. Both sides get the same weights (the ViT's
are random, each side's own), rows, batches, LoRA, AdamW (fused in TRL and Trainer, as is their default), rate and
threads; neither validates. Logs, figures and checkpoints are what each side makes by itself, but the peers save the
adapter alone. A run of each side is a process of its own; they take turns. Memory is the peak of what is resident.
"Steady" is the mean of a step with what is done between steps, the first two left out.

Peers import wandb, torchao and bitsandbytes where these are installed, which takes seconds, and need none of them here.
So real sizes run in an environment without: pip install -e ".[vision,language,peft,eval]" "trl>=1.16,<1.17"
Modules are compiled there already (pip does so, uv with --compile-bytecode).
"""

from __future__ import annotations

import argparse
import pstats
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.jobs import dpo, generation, grpo, mmlu, sft, vit
from benchmarks.jobs.comparison import in_turns, summary
from benchmarks.jobs.job import Data, Job, SizeName
from benchmarks.jobs.process import run
from benchmarks.results_file import RESULTS, append, environment
from benchmarks.timing import other_load

JOBS: dict[str, Callable[[SizeName, Data, Path], Job]] = {
    "sft_padded": sft.padded,
    "sft_packed": sft.packed,
    "dpo": dpo.dpo,
    "grpo": grpo.grpo,
    "vit": vit.loop,
    "vit_trainer": vit.trainer,
    "mmlu": mmlu.mmlu,
    "generation": generation.unmerged,
    "generation_merged": generation.merged,
}
PEERS = ("trl", "peft", "timm", "transformers", "accelerate", "lm_eval")
NOT_NEEDED = ("wandb", "torchao", "bitsandbytes")
_SHOWN = 25  # functions of a profile


def show(record: dict[str, Any]) -> None:
    """Print the ratios of a job, and the stages of both sides."""
    over = {name: f"{ratio['median']:.2f}" for name, ratio in record["over_peer"].items()}
    print(f"{record['job']} over {record['peer']}: {over}")
    for side in ("ours", "theirs"):
        stages = ", ".join(f"{name} {seconds['median']:.1f}" for name, seconds in record[side]["stages"].items())
        print(f"  {side}: {record[side]['seconds']['median']:.1f} s ({stages})", flush=True)


def show_profile(job: Job, threads: int, file: Path) -> None:
    """Run our side once more under cProfile, and print the functions that take longest."""
    run(job.ours, threads, file)
    print(f"{job.name}, functions by their own time:")
    pstats.Stats(str(file)).sort_stats("tottime").print_stats(_SHOWN)


def main() -> None:
    """Measure and append to results/whole_jobs.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--size", default="real", choices=["tiny", "real"])
    parser.add_argument("--rows", type=Path, help="Alpaca rows, jsonl")
    parser.add_argument("--images", type=Path, help="folder with ten classes in train/ or train.tar.gz")
    parser.add_argument("--mmlu", type=Path, help="folder with MMLU's dev.jsonl and test.jsonl")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true", help="one more run of ours under cProfile")
    args = parser.parse_args()
    if args.size == "real" and (found := [name for name in NOT_NEEDED if find_spec(name) is not None]):
        raise SystemExit(f"error: {', '.join(found)} installed: peers would import them, see --help for an environment")
    torch.set_num_threads(args.threads)
    data = Data(args.rows, args.images, args.mmlu)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        jobs = [JOBS[name](args.size, data, work) for name in args.jobs]  # all before the first: data may be missing
        for job in jobs:
            runs = in_turns(job, args.rounds, lambda side: run(side, args.threads))
            record = {
                **summary(job, runs),
                "precision": "fp32",
                "rounds": args.rounds,
                "versions": {name: version(name) for name in PEERS},
                "system_load": other_load(),
                "environment": environment(),
            }
            show(record)
            if args.size == "real":
                append(RESULTS / "whole_jobs.json", record)
            if args.profile:
                show_profile(job, args.threads, work / f"{job.name}.prof")


if __name__ == "__main__":
    main()
