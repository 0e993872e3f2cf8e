"""Studies for tests: a program of a user, and files that compare its settings."""

from __future__ import annotations

import textwrap

import yaml

from lit_adapters.study.planning import Plan
from lit_adapters.study.reading import read_study
from lit_adapters.study.records import Record, Results

# A LightningCLI of a user's own: it learns y = 2 x, knows no lit_adapters, and takes about a second.
PROGRAM = textwrap.dedent(
    """
    import os, signal
    import torch
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningCLI
    from torch.utils.data import DataLoader, TensorDataset


    class Line(LightningModule):
        def __init__(self, width: int = 1, stop_at: int = -1, broken: bool = False):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(1, width)

        def errors(self, batch):
            x, y = batch
            return (self.layer(x) - y).square().mean(1)

        def training_step(self, batch, index):
            if self.hparams.broken:
                raise ValueError("broken on purpose")
            loss = self.errors(batch).mean()
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch, index):
            self.log("val/loss", self.errors(batch).mean())

        def test_step(self, batch, index):
            errors = self.errors(batch)
            self.log("test/loss", errors.mean())
            return {"error": errors}


    class Numbers(LightningDataModule):
        def __init__(self, subset: int = 0):
            super().__init__()
            self.subset = subset

        def loader(self, seed):
            x = torch.randn(8, 1, generator=torch.Generator().manual_seed(seed))
            return DataLoader(TensorDataset(x, 2 * x), batch_size=4)

        def train_dataloader(self):
            return self.loader(self.subset)

        def val_dataloader(self):
            return self.loader(10_000)

        def test_dataloader(self):
            return self.loader(20_000)


    if __name__ == "__main__":
        LightningCLI(Line, Numbers, save_config_callback=None)
    """
)

RECIPE = {
    "seed_everything": 0,
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
}

STUDY = {
    "question": "Is a wider line better?",
    "program": "line.py",
    "recipe": "recipe.yaml",
    "metric": {"name": "test/loss", "better": "lower", "items": "error"},
    "arms": {
        "narrow": {"rates": {"optimizer.init_args.lr": "search"}},
        "wide": {"set": {"model.width": 3}, "rates": {"optimizer.init_args.lr": 0.1}},
    },
    "search": {"metric": {"name": "val/loss", "better": "lower"}, "grid": [0.01, 0.1], "extensions": 1, "sets": [7]},
    "repeat": {"sets": [0, 1], "set_keys": ["data.subset"]},
    "contrasts": [["wide", "narrow"]],
}


def write_study(folder, program=PROGRAM, base=RECIPE, **changes):
    """Write a study with its program and recipe into a folder, and read it. A value of None leaves a section out."""
    (folder / "line.py").write_text(program)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(base))
    document = {**STUDY, "program": str(folder / "line.py"), **changes}
    path = folder / "lines.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not None}, sort_keys=False))
    return read_study(path)


def finish(plan: Plan, results: Results, metrics, rounds=100):
    """Pretend to run what is due until nothing is: `metrics(run)` gives a run's metrics, or None if it diverges."""
    carried_out = []
    for _ in range(rounds):
        due = plan.due(results)
        if not due:
            return carried_out
        for run in due:
            values = metrics(run)
            status = "diverged" if values is None else "done"
            results.add(
                Record(run.id, run.arm, run.stage, run.set, run.seed, dict(run.rates), status, metrics=values or {})
            )
        carried_out += due
    raise AssertionError("the study does not end")
