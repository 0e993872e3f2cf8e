"""What needs Lightning: the callback that watches adapters while they train, and both applications' command line."""

from lit_adapters.lightning.adapter_callback import AdapterCallback
from lit_adapters.lightning.cli import AdapterCLI
from lit_adapters.lightning.optimizers import build_optimizers
from lit_adapters.lightning.resume.loader import ResumableLoader
from lit_adapters.lightning.step_mean import StepMeanModule

__all__ = ["AdapterCLI", "AdapterCallback", "ResumableLoader", "StepMeanModule", "build_optimizers"]
