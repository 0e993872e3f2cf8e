"""What a training step of SmolLM2-135M costs: the methods of benchmarks.language_tuning, and full fine-tuning.

    python -m benchmarks.language_step_time [--rows 4] [--tokens 128] [--rounds 7]

Under bf16 autocast, sdpa attention, a quarter of the tokens learned. All arms stand in one process and take turns;
ratios are medians over the rounds. LoRA at LoRAN's rank and targets stands beside LoRAN. Peak memory is that of three
steps of one arm in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import lit_adapters as la
from benchmarks.results_file import RESULTS, append, environment
from benchmarks.timing import alternate, memory_of, training_step
from language.loss import IGNORED, token_losses
from language.models import SMOLLM2, create_model

LORAN = {"rank": 64, "alpha": 16.0, "dropout": 0.2, "targets": ["q_proj", "v_proj"]}
ARMS: dict[str, tuple[la.Method | None, str]] = {
    "full": (None, ".*"),
    "lora": (la.LoRA(rank=8), ""),
    "afa": (la.AFALoRA(rank=8), ""),
    "nora_plus_plus": (la.NoRAPlusPlus(nora=la.NoRA(base="anchored"), lora=la.LoRA(rank=8)), ""),
    "dora": (la.DoRA(rank=8), ""),
    "loran": (la.LoRAN(**LORAN), ""),  # type: ignore[arg-type]
    "lora_like_loran": (la.LoRA(**LORAN), ""),  # type: ignore[arg-type]
}


def step_of(arm: str, rows: int, tokens: int) -> Callable[[], None]:
    """A closure that takes one training step."""
    method, train = ARMS[arm]
    model = create_model(SMOLLM2).train()
    la.attach(model, method, train=train)
    if method is not None:
        la.set_progress(model, 0.1)  # AFA-LoRA between its sigma and linear
    ids = torch.randint(0, 49152, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.where(torch.arange(tokens) >= tokens * 3 // 4, IGNORED)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return token_losses(model, {"input_ids": ids, "labels": labels})[0].mean()

    return training_step(model, loss)


def main() -> None:
    """Measure and append to results/language_step_time.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    size = (arguments.rows, arguments.tokens)
    memory = {arm: memory_of(step_of, arm, *size)[0] for arm in ARMS}
    torch.manual_seed(0)
    _, times = alternate({arm: step_of(arm, *size) for arm in ARMS}, arguments.rounds)
    for arm, seconds in times.items():
        quartiles = statistics.quantiles(seconds, n=4)
        ratio = statistics.median(a / b for a, b in zip(seconds, times["lora"], strict=True))
        record = {
            **{"arm": arm, "seconds": statistics.median(seconds), "quartiles": [quartiles[0], quartiles[2]]},
            **{"over_lora": ratio, "peak_memory_mib": memory[arm]},
            **vars(arguments),
            "environment": environment(),
        }
        append(RESULTS / "language_step_time.json", record)
        print(f"{arm:<16} {record['seconds']:.2f} s   / LoRA {ratio:.2f}   {record['peak_memory_mib']:,} MiB")


if __name__ == "__main__":
    main()
