"""What needs Lightning: the callback that watches adapters while they train, and both applications' command line."""

from lit_adapters.callback.adapter_callback import AdapterCallback
from lit_adapters.callback.cli import AdapterCLI
from lit_adapters.callback.optimizers import build_optimizers
from lit_adapters.callback.resumable_loader import ResumableLoader

__all__ = ["AdapterCLI", "AdapterCallback", "ResumableLoader", "build_optimizers"]
