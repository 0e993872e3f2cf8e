"""Command line: python -m vision fit|validate|test|predict --config FILE.yaml [--key=value ...]"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage, and looking for it takes a second; `run` enables it

from pathlib import Path
from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from lit_adapters.files.adapters import read_checkpoint_file
from lit_adapters.files.meaning import read_meaning, saved_meanings
from lit_adapters.lightning import AdapterCLI
from lit_adapters.lightning.cli import run
from vision.data import DEFAULTS, CIFARDataModule
from vision.module import ViTClassifier


class VisionCLI(AdapterCLI):
    """The command line; the model takes its image size from the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what data and model share."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments("data.image_size", "model.image_size")

    def before_instantiate_classes(self) -> None:
        """Give data and model the same image size where the user and the checkpoint have none."""
        section = self.config.get(self.config.get("subcommand") or "", self.config)
        if section.data.image_size is not None:
            return
        size = section.model.image_size
        if size is None:
            trained = _trained_with(section.get("ckpt_path"), section.model.pretrained)
            size = trained.get("image_size", DEFAULTS["image_size"])
        section.data.image_size = section.model.image_size = size


def _trained_with(checkpoint: Any, pretrained: Any) -> dict[str, Any]:
    """The meaning that a checkpoint file holds, or else the one beside a base's weights."""
    if checkpoint is not None and Path(checkpoint).is_file():
        meanings = saved_meanings(read_checkpoint_file(checkpoint), str(checkpoint))
        return meanings.get("model", {})
    return read_meaning(Path(pretrained).parent) if isinstance(pretrained, str) else {}


def main(args: ArgsType = None, **kwargs: Any) -> VisionCLI:
    """Run a subcommand and return the finished command line; further arguments are those of LightningCLI."""
    return VisionCLI(ViTClassifier, CIFARDataModule, args=args, **kwargs)


if __name__ == "__main__":
    run(main)
