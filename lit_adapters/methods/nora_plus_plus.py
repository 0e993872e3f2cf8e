"""NoRA++: NoRA on the activations together with LoRA on the weights (arXiv 2509.13240)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lit_adapters.errors import AdapterError
from lit_adapters.methods.base import Method, to_methods
from lit_adapters.methods.lora import LoRA
from lit_adapters.methods.nora import NoRA


@dataclass
class NoRAPlusPlus(Method):
    """Configuration of NoRA++: both parts attach to their own targets and train together.

    Args:
        nora: what happens to the activations; default `NoRA()`.
        lora: what happens to the weights; default `LoRA()`.

    Raises:
        AdapterError: a part is of another kind.
    """

    name: ClassVar[str] = "nora++"
    kind: ClassVar[str] = "composition"

    # Declared as Method so that YAML may choose a subclass by class_path, and without an object for a default, which
    # would make jsonargparse accept anything.
    nora: Method | None = None
    lora: Method | None = None

    def __post_init__(self) -> None:
        self.nora, self.lora = self.parts()
        if not isinstance(self.nora, NoRA) or not isinstance(self.lora, LoRA):
            raise AdapterError(
                f"NoRA++ is made of a NoRA and a LoRA, not {type(self.nora).__name__} and {type(self.lora).__name__}"
            )

    def parts(self) -> list[Method]:
        return to_methods([self.nora or NoRA(), self.lora or LoRA()])
