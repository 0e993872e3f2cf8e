"""The command line `lit-adapters`."""

from lit_adapters.cli.commands import main

__all__ = ["main"]
