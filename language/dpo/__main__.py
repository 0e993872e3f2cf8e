"""Command line: python -m language.dpo fit|validate|test --config FILE.yaml [--key=value ...]."""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage, and looking for it takes a second; `run` enables it

from typing import Any

from lightning.pytorch.cli import ArgsType

from language.cli import LanguageCLI
from language.dpo.data import PreferenceDataModule
from language.dpo.module import DPOTuner
from lit_adapters.lightning.cli import run


def main(args: ArgsType = None, **kwargs: Any) -> LanguageCLI:
    """Run a subcommand and return the finished CLI; further arguments are those of LightningCLI."""
    return LanguageCLI(DPOTuner, PreferenceDataModule, args=args, **kwargs)


if __name__ == "__main__":
    run(main)
