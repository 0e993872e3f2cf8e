"""What two processes do with DDP, for tests/scale/test_two_processes.py; see run.py."""

from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from torch import nn

from lit_adapters.errors import AdapterError
from tests.scale import applications, ddp_resumed
from tests.scale.tasks import CASES, METHODS, Task, fit, loader, trainer


def stopped(folder: Path, task: Task) -> str:
    """What stops the training of `task`, in this process."""
    seed_everything(0, verbose=False)
    try:
        trainer(folder, 2).fit(task, loader("vit", 2))
    except AdapterError as error:
        return str(error)
    return "nothing"


class Broken(Task):
    """The second batch of the second process holds an inf."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.global_rank == 1 and batch_idx == 1 else loss


class Bypassing(Task):
    """In the second process the first layer's adapter is gone round."""

    def configure_model(self) -> None:
        super().configure_model()
        if self.trainer.global_rank == 1:
            first: Any = self.net.blocks[0].mlp
            first.__dict__["forward"] = lambda x: first.fc2(nn.functional.gelu(first.fc1(x)))


class Uncallable(Task):
    """Calibration cannot run in the first process."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 0:
            raise RuntimeError("no such column")
        return self(batch)


def main(folder: Path) -> dict[str, Any]:
    """Train all cases and stop three runs; what this process saw."""
    results: dict[str, Any] = {f"{name}-{method}": fit(folder, name, method, 2) for name, method in CASES}
    results |= {name: applications.fit(folder, name, 2) for name in applications.APPLICATIONS}
    results["resumed"] = ddp_resumed.main(folder / "resumed")
    results["stopped"] = {
        "inf": stopped(folder / "inf", Broken("vit", METHODS["lora"])),
        "bypassed": stopped(folder / "bypassed", Bypassing("vit", METHODS["nora"])),
        "uncalibrated": stopped(folder / "uncalibrated", Uncallable("vit", METHODS["calibrated"])),
    }
    return results
