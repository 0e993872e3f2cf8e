"""NoRA++: NoRA on the activations together with LoRA on the weights (arXiv 2509.13240)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lit_adapters.methods.base import Method
from lit_adapters.methods.lora import LoRA
from lit_adapters.methods.nora import NoRA


@dataclass
class NoRAPlusPlus(Method):
    """Configuration of NoRA++: both parts attach to their own targets and train together.

    Args:
        nora: what happens to the activations.
        lora: what happens to the weights.
    """

    name: ClassVar[str] = "nora++"
    kind: ClassVar[str] = "composition"

    nora: NoRA = field(default_factory=NoRA)
    lora: LoRA = field(default_factory=LoRA)

    def parts(self) -> list[Method]:
        return [self.nora, self.lora]
