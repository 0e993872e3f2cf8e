"""NoRA++: NoRA on the activations together with LoRA or DoRA on the weights (arXiv 2509.13240)."""

# No `from __future__ import annotations` here: jsonargparse would not resolve a dataclass's annotations, and would
# accept anything for a part.
from dataclasses import dataclass, field
from typing import ClassVar

from lit_adapters.errors import AdapterError
from lit_adapters.methods.dora import DoRA
from lit_adapters.methods.lora import LoRA
from lit_adapters.methods.method import Method, to_methods
from lit_adapters.methods.nora import NoRA


@dataclass
class NoRAPlusPlus(Method):
    """Configuration of NoRA++: both parts attach to their own targets and train together.

    Args:
        nora: The NoRA on the activations.
        lora: The LoRA or DoRA on the weights.

    Raises:
        AdapterError: `nora` is not a NoRA, or `lora` is neither a LoRA nor a DoRA.
    """

    name: ClassVar[str] = "nora++"
    merges: ClassVar[str] = "its LoRA or DoRA"
    kind: ClassVar[str] = "composition"

    # Declared as Method so that YAML may choose a subclass by class_path.
    nora: Method = field(default_factory=NoRA)
    lora: Method = field(default_factory=LoRA)

    def __post_init__(self) -> None:
        self.nora, self.lora = to_methods([self.nora, self.lora])
        if not isinstance(self.nora, NoRA) or not isinstance(self.lora, (LoRA, DoRA)):
            raise AdapterError(
                f"NoRA++ is made of a NoRA and a LoRA or DoRA, not {type(self.nora).__name__} and "
                f"{type(self.lora).__name__}; attach accepts a list of any methods"
            )

    def parts(self) -> list[Method]:
        return [self.nora, self.lora]
