"""What needs Lightning: the callback that watches adapters while they train, and both applications' command line."""

from lit_adapters.callback.adapter_callback import AdapterCallback
from lit_adapters.callback.cli import AdapterCLI
from lit_adapters.callback.optimizers import build_optimizers

__all__ = ["AdapterCLI", "AdapterCallback", "build_optimizers"]
