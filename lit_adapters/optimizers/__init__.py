"""Parameter groups for optimisers, and optimisers beside torch's."""

from lit_adapters.optimizers.groups import parameter_groups
from lit_adapters.optimizers.loft import LoFT
from lit_adapters.optimizers.lora_plus import LoRAPlus
from lit_adapters.optimizers.lora_pre import LoRAPre
from lit_adapters.optimizers.lora_rite import LoRARITE
from lit_adapters.optimizers.pairs import LowRankPair, low_rank_pairs

__all__ = ["LoFT", "LoRAPlus", "LoRAPre", "LoRARITE", "LowRankPair", "low_rank_pairs", "parameter_groups"]
