"""Command line: python -m language.grpo fit|validate|test --config FILE.yaml [--key=value ...]."""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage, and looking for it takes a second; `run` enables it

from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from language.cli import LanguageCLI
from language.grpo.data import QuestionDataModule
from language.grpo.module import GRPOTuner
from lit_adapters.lightning.cli import run


class GRPOCLI(LanguageCLI):
    """LanguageCLI with one option for the iterations of data and model."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the iterations."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments("model.iterations", "data.iterations")


def main(args: ArgsType = None, **kwargs: Any) -> GRPOCLI:
    """Run a subcommand; returns the finished CLI. Further arguments are those of LightningCLI."""
    return GRPOCLI(GRPOTuner, QuestionDataModule, args=args, **kwargs)


if __name__ == "__main__":
    run(main)
