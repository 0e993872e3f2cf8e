"""What the benchmarks that train SmolLM2-135M share."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import yaml
from lightning.pytorch import LightningModule, Trainer

from benchmarks.arms import recipe_of
from benchmarks.runner import Steps
from language.draft.module import DraftTuner
from language.evaluate.metrics import Estimate

RECIPES = Path(__file__).parents[1] / "configs/language/smollm2"


class EagerSteps(Steps):
    """Seconds of steps with eager attention, which is faster than sdpa under bf16 autocast on a CPU."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        models = [pl_module.model]
        if isinstance(pl_module, DraftTuner):
            models.append(pl_module.target)
        for model in models:
            model.set_attn_implementation("eager")  # type: ignore[union-attr, operator]


def adapters(arm: str) -> list[str]:
    """Options that put the adapters of an arm's own recipe, and the factors on their rates, into another recipe."""
    recipe = yaml.safe_load((RECIPES / f"{recipe_of(arm)}.yaml").read_text())
    scale = json.dumps(recipe.get("lr_scale", {}))
    return [f"--model.adapters={json.dumps(recipe['model']['adapters'])}", f"--lr_scale={scale}"]


def average(values: list[float]) -> Estimate:
    """Mean of independent values with its standard error."""
    return Estimate(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)), len(values))
