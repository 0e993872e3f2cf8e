"""Command line: python -m vision fit|validate|test|predict --config FILE.yaml [--key=value ...]"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from lit_adapters.lightning import AdapterCLI
from lit_adapters.lightning.cli import run
from vision.data import CIFARDataModule
from vision.module import ViTClassifier


class VisionCLI(AdapterCLI):
    """The command line; the model takes its image size from the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what data and model share."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments("data.image_size", "model.image_size")


def main(args: ArgsType = None, **kwargs: Any) -> VisionCLI:
    """Run a subcommand and return the finished command line; further arguments are those of LightningCLI."""
    return VisionCLI(ViTClassifier, CIFARDataModule, args=args, **kwargs)


if __name__ == "__main__":
    run(main)
