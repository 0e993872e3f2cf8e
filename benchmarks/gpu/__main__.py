"""What do the methods cost on a GPU, and are the kernels right there? Ten minutes on one GPU, without network.

    python -m benchmarks.gpu [--minutes 10] [--out benchmarks/results/gpu.json] [--questions "rational errors" ...]
    python -m benchmarks.gpu --device cpu --size tiny --out FILE      # the same code without a GPU; measures nothing

- rational errors: the Triton kernels of the rational function against the formula in float64.
- rational speed: the same kernels beside eager and compiled GELU and the time of copying, and FlashKAT's if installed.
- steps of the LLaMA, steps of the ViT: a training step of each method beside peft's, full fine-tuning and the frozen
  model, and its memory. The LLaMA has the shape of Llama-3.2-1B, the ViT is ViT-B/16; random weights.
- whole fine-tuning: `language` through Lightning's Trainer beside TRL's SFTTrainer with peft, on the same rows.
- generation: tokens a second with an adapter, merged and not, beside peft's.

Each question runs in a process of its own, so that its memory and its failure are its own. A question that takes more
than its share of the time is stopped; what does not fit is recorded as not run.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import torch

from benchmarks.gpu.asking import ask
from benchmarks.gpu.questions import QUESTIONS
from benchmarks.gpu.setting import Setting
from benchmarks.results_file import RESULTS


def main() -> None:
    """Ask the questions and append the answers to results/gpu.json.

    Raises:
        SystemExit: There is no GPU, or a question has not been answered.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [question.name for question in QUESTIONS]
    parser.add_argument("--minutes", type=float, default=10.0, help="for all questions together")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--questions", nargs="+", default=names, choices=names)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch finds no GPU; --device cpu --size tiny tries the script without one")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the process of a question ends as well
    chosen = [question for question in QUESTIONS if question.name in args.questions]
    records = ask(chosen, Setting(args.device, args.size), args.minutes, args.out)
    if missing := [f"{r['question']} ({r['status']})" for r in records if r["status"] != "answered"]:
        raise SystemExit(f"not answered: {', '.join(missing)}")


if __name__ == "__main__":
    main()
