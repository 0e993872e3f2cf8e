"""What needs Lightning: the callback that watches adapters while they train, and both applications' command line."""

from lit_adapters.callback.adapter_callback import AdapterCallback
from lit_adapters.callback.cli import AdapterCLI

__all__ = ["AdapterCLI", "AdapterCallback"]
