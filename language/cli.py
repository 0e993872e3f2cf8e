"""The LightningCLI of all language tuners."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser

from lit_adapters.lightning import AdapterCLI


class LanguageCLI(AdapterCLI):
    """AdapterCLI whose data use the model's own tokenizer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what data and model share."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments("model.model", "data.tokenizer")
