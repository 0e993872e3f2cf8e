"""The command line `lit-adapters`."""

from __future__ import annotations

from lit_adapters.cli.commands import main

__all__ = ["main"]
