"""LoRA+: AdamW with a higher learning rate for B than for A (Hayou et al., arXiv 2402.12354).

    A: AdamW with lr        B: AdamW with ratio * lr

With one rate for both, A moves the output too little in wide layers. The paper uses a ratio of 16 and about half of
LoRA's rate. With ratio 1 this is AdamW. It serves every method with a pair, also one whose weight is not a function of
B A.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lit_adapters.optimizers.pair_optimizer import PairOptimizer
from lit_adapters.values import check_number


class LoRAPlus(PairOptimizer):
    """AdamW with a factor on the learning rate of every B.

    Args:
        params: Groups from `parameter_groups(model, lr, pairs=True)`.
        lr: The learning rate of A, and of parameters outside pairs.
        ratio: The rate of B over that of A. Weight decay of B grows with it, as AdamW's decay is lr * weight_decay.
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: AdamW's; that of groups wins, and `parameter_groups` gives each group one.

    Raises:
        AdapterError: A setting is out of range, or no group has pairs.
    """

    moves_product: ClassVar[bool] = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        ratio: float = 16.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        check_number("ratio", ratio, 0.0)
        check_number("eps", eps, 0.0)
        super().__init__(
            params, {"lr": lr, "ratio": ratio, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        )

    def update(self) -> None:
        """AdamW on all parameters."""
        for group in self.param_groups:
            rate, parameters = group["lr"], group["params"]
            if group["pairs"]:
                self.adamw(parameters[::2], group, rate, group["eps"])
                self.adamw(parameters[1::2], group, rate * group["ratio"], group["eps"])
            else:
                self.adamw(parameters, group, rate, group["eps"])
