"""What do tensors take in a training step, ours beside peft's? The models of `against_peft`.

    python -m benchmarks.peft_memory [--models vit llama layer] [--methods lora dora] [--ranks 8] [--precisions fp32]
                                     [--checkpointing] [--threads 2]

Saved is what autograd keeps between forward and backward, parameters apart. Allocated is the most that tensors take at
a time in two steps, beyond the model, with the optimiser's state and what adapters keep. Neither depends on the
machine, nor on what else it does.
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from benchmarks.against_peft import arguments, combinations, model_and_loss
from benchmarks.results_file import RESULTS, append, environment
from benchmarks.timing import allocated_mib, alone, saved_for_backward, training_step


def of_library(name: str, library: str, *rest: Any) -> dict[str, int | float]:
    """What a step of one library takes, in MiB; for a process of its own, as the allocator counts from its start."""
    model, loss = model_and_loss(name, library, *rest)
    allocated = allocated_mib(training_step(model, loss))
    saved, largest = saved_for_backward(loss)
    return {"allocated_mib": allocated, "saved_mib": saved / 2**20, "largest_saved_mib": largest / 2**20}


def main() -> None:
    """Measure every combination asked for."""
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    for combination in tqdm(combinations(args), desc="combinations"):
        name, method, rank, precision, checkpointing = combination
        record = {
            "model": name,
            "method": method,
            "rank": rank,
            "precision": precision,
            "checkpointing": checkpointing,
            "ours": alone(of_library, name, "ours", *combination[1:]),
            "peft": alone(of_library, name, "peft", *combination[1:]),
            "environment": environment(),
        }
        append(RESULTS / "peft_memory.json", record)
        each = [f"{kind} {record['ours'][kind]:.0f} / {record['peft'][kind]:.0f}" for kind in record["ours"]]
        tqdm.write(f"{combination}: {', '.join(each)}")


if __name__ == "__main__":
    main()
