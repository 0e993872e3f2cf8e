"""Command line: python -m language.draft fit|validate|test --config FILE.yaml [--key=value ...]."""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage, and looking for it takes a second; `run` enables it

from typing import Any

from lightning.pytorch.cli import ArgsType

from language.cli import LanguageCLI
from language.data.module import InstructionDataModule
from language.draft.module import DraftTuner
from lit_adapters.lightning.cli import run


def main(args: ArgsType = None, **kwargs: Any) -> LanguageCLI:
    """Run a subcommand; returns the finished CLI. Further arguments are those of LightningCLI."""
    return LanguageCLI(DraftTuner, InstructionDataModule, args=args, **kwargs)


if __name__ == "__main__":
    run(main)
