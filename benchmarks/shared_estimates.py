"""How close does `lit-adapters estimate` come to the memory of a device that shares the work with another?

    python -m benchmarks.shared_estimates

Two processes of one thread take two steps of a recipe by DDP or FSDP2, with random weights and made-up batches. Memory
is what the tensors of the first process take at most: its share of the model, and what the allocator counts beyond it.
The copies of the weights by which DDP makes the processes alike before the first step are left out.
"""

from __future__ import annotations

import socket
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from benchmarks.estimates import LANGUAGE, VISION
from benchmarks.results_file import RESULTS, append, environment, load
from benchmarks.timing import allocated_mib
from lit_adapters.lightning.recipe_cost import read_recipe
from lit_adapters.model.sharding import shard
from lit_adapters.training.placement import Strategy, place

CASES: list[tuple[str, list[str]]] = [
    *((VISION.format(method), []) for method in ("lora", "nora", "full")),
    (VISION.format("full"), ["data.batch_size=8"]),
    (VISION.format("nested_lora"), ["model.adapters.init_args.init=svd"]),  # most of it is buffers
    *((LANGUAGE.format(method), ["data.batch_size=2"]) for method in ("lora", "nora", "full")),
    (LANGUAGE.format("full"), ["data.batch_size=1", "data.max_length=128"]),
]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp")


class _Loss(nn.Module):
    """A model whose forward is its loss, as DDP wants it."""

    def __init__(self, model: nn.Module, loss: Any) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self) -> Tensor:
        return cast("Tensor", self.loss(self.model))


def measured(file: str, settings: list[str], strategy: Strategy) -> float:
    """MiB of the first of two processes."""
    with closing(socket.socket()) as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(_measure, (port, file, settings, strategy, queue), nprocs=2)
    return cast("float", queue.get())


def _measure(rank: int, port: int, file: str, settings: list[str], strategy: Strategy, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    recipe = read_recipe(Path(file), settings)
    example = recipe.example
    model = shard(example.build, init_device_mesh("cpu", (2,))) if strategy == "fsdp" else example.build()
    optimizer = recipe.optimizer(model)

    @cache
    def run() -> nn.Module:
        """Made in the first step, so that the buckets of DDP are measured too."""
        loss = _Loss(model, example.loss)
        return DistributedDataParallel(loss, init_sync=False) if strategy == "ddp" else loss

    def step() -> None:
        loss = run()()
        optimizer.zero_grad()  # as Lightning does
        loss.backward()
        optimizer.step()

    held = sum(_local_bytes(tensor) for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    allocated = allocated_mib(step)
    if rank == 0:
        queue.put(held / 2**20 + allocated)
    dist.barrier()
    dist.destroy_process_group()


def _local_bytes(tensor: Tensor) -> int:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.nbytes


def main() -> None:
    """Measure what is missing in the result file."""
    path = RESULTS / "shared_estimates.json"
    cases = [(file, settings, strategy) for file, settings in CASES for strategy in STRATEGIES]
    for file, settings, strategy in tqdm(cases, desc="cases"):
        key = {"recipe": file, "settings": settings, "strategy": strategy}
        if any(key.items() <= record.items() for record in load(path)):
            continue
        estimated = place(read_recipe(Path(file), settings).cost(), 2, strategy).peak / 2**20
        found = {"allocated_mib": measured(file, settings, strategy), "estimated_mib": estimated}
        append(path, {**key, **found, "environment": environment() | {"threads": 1}})
        tqdm.write(f"{file} {settings} {strategy}: {estimated / found['allocated_mib']:.3f} of what was measured")


if __name__ == "__main__":
    main()
