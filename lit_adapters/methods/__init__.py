"""The adapter methods, one file each."""

from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.afa import AFALoRA
from lit_adapters.methods.bitfit import BitFit
from lit_adapters.methods.dense_lora import DenseLoRA
from lit_adapters.methods.dora import DoRA
from lit_adapters.methods.group_affine import GroupAffine
from lit_adapters.methods.lora import LoRA
from lit_adapters.methods.lora2 import LoRA2
from lit_adapters.methods.loran import LoRAN
from lit_adapters.methods.method import Method
from lit_adapters.methods.nested_lora import NestedLoRA
from lit_adapters.methods.nora import NoRA
from lit_adapters.methods.nora_plus_plus import NoRAPlusPlus
from lit_adapters.methods.peft import Peft
from lit_adapters.methods.point_lora import PointLoRA
from lit_adapters.methods.vera import VeRA
from lit_adapters.methods.weight_adapter import WeightAdapter

__all__ = [
    "AFALoRA",
    "AdapterModule",
    "BitFit",
    "DenseLoRA",
    "DoRA",
    "GroupAffine",
    "LoRA",
    "LoRA2",
    "LoRAN",
    "Method",
    "NestedLoRA",
    "NoRA",
    "NoRAPlusPlus",
    "Peft",
    "PointLoRA",
    "VeRA",
    "WeightAdapter",
]
