"""The adapter methods, one file each."""

from lit_adapters.methods.base import AdapterModule, Method, WeightAdapter
from lit_adapters.methods.lora import LoRA
from lit_adapters.methods.nora import NoRA
from lit_adapters.methods.nora_plus_plus import NoRAPlusPlus

__all__ = ["AdapterModule", "LoRA", "Method", "NoRA", "NoRAPlusPlus", "WeightAdapter"]
