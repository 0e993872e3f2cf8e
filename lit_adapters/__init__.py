"""Nonlinear parameter-efficient fine-tuning for any PyTorch model.

import timm, lit_adapters as la
model = timm.create_model("vit_tiny_patch16_224", pretrained=True, num_classes=100)
print(la.attach(model, la.NoRA(groups=8, rank=3), train=["head"]))
"""

from typing import TYPE_CHECKING, Any

import lit_adapters.renamed  # noqa: F401  old names of modules can be imported from here on
from lit_adapters import schedules
from lit_adapters.activations import RationalActivation
from lit_adapters.assets.publish import push, write_card
from lit_adapters.errors import AdapterError, AssetError, DataError, TargetsNotFound
from lit_adapters.files.adapters import load_adapters, save_adapters
from lit_adapters.files.diffusers import export_diffusers
from lit_adapters.files.peft import export_peft, import_peft
from lit_adapters.methods import (
    AdapterModule,
    AFALoRA,
    BitFit,
    DenseLoRA,
    DoRA,
    GroupAffine,
    LoRA,
    LoRA2,
    LoRAN,
    Method,
    NestedLoRA,
    NoRA,
    NoRAPlusPlus,
    Peft,
    PointLoRA,
    VeRA,
)
from lit_adapters.model.as_lora import LoRAReport, to_lora
from lit_adapters.model.attach import attach, detach
from lit_adapters.model.combine import CombineReport, combine
from lit_adapters.model.linearise import LinearisationReport, linearise
from lit_adapters.model.merge import MergeReport, merge, unmerge
from lit_adapters.model.modes import calibrate, disabled, set_progress, verify
from lit_adapters.model.named import adapter_names, in_use, rows, use, using
from lit_adapters.model.record import adapters
from lit_adapters.model.report import AdapterReport

if TYPE_CHECKING:
    from lit_adapters.lightning import AdapterCallback, ResumableLoader
    from lit_adapters.training.snapshot import figures, statistics

__all__ = [
    "AFALoRA",
    "AdapterCallback",
    "AdapterError",
    "AdapterModule",
    "AdapterReport",
    "AssetError",
    "BitFit",
    "CombineReport",
    "DataError",
    "DenseLoRA",
    "DoRA",
    "GroupAffine",
    "LinearisationReport",
    "LoRA",
    "LoRA2",
    "LoRAN",
    "LoRAReport",
    "MergeReport",
    "Method",
    "NestedLoRA",
    "NoRA",
    "NoRAPlusPlus",
    "Peft",
    "PointLoRA",
    "RationalActivation",
    "ResumableLoader",
    "TargetsNotFound",
    "VeRA",
    "adapter_names",
    "adapters",
    "attach",
    "calibrate",
    "combine",
    "detach",
    "disabled",
    "export_diffusers",
    "export_peft",
    "figures",
    "import_peft",
    "in_use",
    "linearise",
    "load_adapters",
    "merge",
    "push",
    "rows",
    "save_adapters",
    "schedules",
    "set_progress",
    "statistics",
    "to_lora",
    "unmerge",
    "use",
    "using",
    "verify",
    "write_card",
]


def __getattr__(name: str) -> Any:
    """Import what needs Lightning or matplotlib, and these with it, only when asked for."""
    if name in ("figures", "statistics"):
        from lit_adapters.training import snapshot

        return getattr(snapshot, name)
    if name in ("AdapterCallback", "ResumableLoader"):
        from lit_adapters import lightning

        return getattr(lightning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
