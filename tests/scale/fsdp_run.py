"""What two processes do with sharded parameters, for tests/scale/test_two_processes.py; see run.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

import lit_adapters as la
from lit_adapters.errors import AdapterError
from tests.scale import applications
from tests.scale.ddp_run import Broken
from tests.scale.tasks import METHODS, Task, loader, trainer

CASES = [("llama", name) for name in ("lora", "dora", "vera", "lora2-pruned", "loran", "afa", "nora++")]
CASES += [("vit", name) for name in ("nora", "nora++-dora", "loran-calibrated", "afa-rational", "calibrated")]
CASES += [("vit", name) for name in ("dense_lora-apart", "nested_lora", "dora-pissa")]


def strategy(**changes: Any) -> ModelParallelStrategy:
    """As a recipe's trainer section has it, for the CPU."""
    settings = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
    return ModelParallelStrategy(**settings | changes, process_group_backend="gloo")


def fit(folder: Path, name: str, method: str) -> tuple[Task, dict[str, Any]]:
    """Train, save the adapters, and say what came out in this process."""
    seed_everything(0, verbose=False)
    task = Task(name, METHODS[method])
    callback = la.AdapterCallback(log_every_n_steps=1, figures=method == "calibrated", calibration_batches=2)
    callbacks = [callback, ModelCheckpoint(folder / name / method, filename="last")]
    settings = {"strategy": strategy(), "callbacks": callbacks, "enable_checkpointing": True}
    trainer(folder / name / method, 2, **settings).fit(task, loader(name, 2))
    la.save_adapters(task.net, folder / name / method / "adapters")
    sizes = {n: (p.to_local().numel(), p.numel()) for n, p in task.net.named_parameters()}
    return task, {"losses": task.losses, "sizes": sizes}


def resumed(folder: Path) -> list[float]:
    """The losses of a second epoch, from the checkpoint of the first."""
    seed_everything(0, verbose=False)
    task = Task("llama", METHODS["nora++"])
    running = trainer(folder / "resumed", 2, strategy=strategy(), max_epochs=2)
    running.fit(task, loader("llama", 2), ckpt_path=folder / "llama" / "nora++" / "last.ckpt")
    return task.losses


def in_bfloat16(folder: Path) -> dict[str, Any]:
    """Types of the parameters and the losses under bf16-true, where adapters stay in float32."""
    seed_everything(0, verbose=False)
    task = Task("llama", METHODS["lora"])
    trainer(folder / "bf16", 2, strategy=strategy(), precision="bf16-true").fit(task, loader("llama", 2))
    return {"losses": task.losses, "dtypes": {n: str(p.dtype) for n, p in task.net.named_parameters()}}


class Unbuildable(Task):
    """Fails in the first process, the only one that builds."""

    def build(self) -> Any:
        raise ValueError("no such weights")


def refused(action: Any) -> str:
    """The message of the error that `action` raises."""
    try:
        action()
    except AdapterError as error:
        return str(error)
    return "nothing"


def stopped(folder: Path, task: Task, **changes: Any) -> str:
    """What stops the training of `task`."""
    settings = {"strategy": strategy()} | changes
    return refused(lambda: trainer(folder / "stopped", 2, **settings).fit(task, loader("vit", 2)))


def other_adapters(folder: Path) -> str:
    """What is said of a checkpoint of LoRA for a model with LoRAN, which has further buffers."""
    running = trainer(folder / "other", 2, strategy=strategy(), max_epochs=2)
    ckpt = folder / "llama" / "lora" / "last.ckpt"
    return refused(lambda: running.fit(Task("llama", METHODS["loran"]), loader("llama", 2), ckpt_path=ckpt))


def main(folder: Path) -> dict[str, Any]:
    """Train all cases and provoke what is refused; what this process saw."""
    results: dict[str, Any] = {}
    for name, method in CASES:
        task, results[f"{name}-{method}"] = fit(folder, name, method)
    results["resumed"] = resumed(folder)
    results["bf16"] = in_bfloat16(folder)
    results |= {name: applications.fit(folder, name, 2, strategy=strategy()) for name in applications.SHARDED}
    lora = METHODS["lora"]
    results["stopped"] = {
        "inf": stopped(folder, Broken("vit", lora)),
        "build": stopped(folder, Unbuildable("vit", lora)),
        "scalar": stopped(folder, Task("vit", METHODS["loran-sine"])),
        "shared": stopped(folder, Task("vit", METHODS["dense_lora"])),
        "ranks": stopped(folder, Task("vit", METHODS["adalora"])),
        "measured": stopped(folder, Task("vit", METHODS["lora-ga"])),
        "cache": stopped(folder, Task("vit", la.LoRAN(rank=2, cache_weight=True))),
        "tensor_parallel": stopped(
            folder, Task("vit", lora), strategy=strategy(data_parallel_size=1, tensor_parallel_size=2)
        ),
        "distributed_checkpoint": stopped(
            folder, Task("vit", lora), strategy=strategy(save_distributed_checkpoint=True), enable_checkpointing=True
        ),
        "other_adapters": other_adapters(folder),
        "merge": refused(lambda: la.merge(task.net)),
        "export": refused(lambda: la.export_peft(task.net, folder / "peft")),
    }
    return results
