"""NoRA++: NoRA on the activations together with LoRA on the weights (arXiv 2509.13240)."""

# Annotations are not postponed here: jsonargparse would not resolve them, and accept anything for a part.
from dataclasses import dataclass, field
from typing import ClassVar

from lit_adapters.errors import AdapterError
from lit_adapters.methods.base import Method, to_methods
from lit_adapters.methods.lora import LoRA
from lit_adapters.methods.nora import NoRA


@dataclass
class NoRAPlusPlus(Method):
    """Configuration of NoRA++: both parts attach to their own targets and train together.

    Args:
        nora: what happens to the activations.
        lora: what happens to the weights.

    Raises:
        AdapterError: a part is of another kind.
    """

    name: ClassVar[str] = "nora++"
    kind: ClassVar[str] = "composition"

    # Declared as Method so that YAML may choose a subclass by class_path.
    nora: Method = field(default_factory=NoRA)
    lora: Method = field(default_factory=LoRA)

    def __post_init__(self) -> None:
        self.nora, self.lora = to_methods([self.nora, self.lora])
        if not isinstance(self.nora, NoRA) or not isinstance(self.lora, LoRA):
            raise AdapterError(
                f"NoRA++ is made of a NoRA and a LoRA, not {type(self.nora).__name__} and {type(self.lora).__name__}"
            )

    def parts(self) -> list[Method]:
        return [self.nora, self.lora]
