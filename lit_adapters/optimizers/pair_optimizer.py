"""The base of optimisers that know which parameters are the A and B of one product."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from torch import Tensor

from lit_adapters.errors import AdapterError
from lit_adapters.optimizers.base import AdapterOptimizer


class PairOptimizer(AdapterOptimizer):
    """An optimiser of low-rank pairs, which gives all other parameters to AdamW.

    Its pairs are in groups with `pairs=True`, whose "params" are A1, B1, A2, B2 and so on, and whose "scales" hold the
    factor on each product (1 by default). `parameter_groups(model, lr, pairs=True)` makes such groups; `AdapterCLI` and
    `build_optimizers` do so by themselves.

    Args:
        params: Groups, at least one of them with pairs.
        defaults: As for `AdapterOptimizer`.

    Raises:
        AdapterError: No group has pairs; the parameters of such a group are not pairs; or, for an optimiser that moves
            the product B A, the weight of a layer is not a function of it.
    """

    moves_product: ClassVar[bool] = True  # False if each factor is changed by itself

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults | {"pairs": False, "scales": None})
        if not any(group["pairs"] for group in self.param_groups):
            raise AdapterError(
                f"{type(self).__name__} found no pair of A and B that trains: attach LoRA or one of its kin and give "
                "the groups of parameter_groups(model, lr, pairs=True), or use torch.optim.AdamW"
            )

    @property
    def needs_whole(self) -> str:
        """As for every optimiser; one that moves the product needs both factors."""
        if not self.moves_product:
            return super().needs_whole
        return f"{type(self).__name__} needs whole matrices: use the strategy ddp, torch.optim.AdamW or LoRAPlus"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does.

        Raises:
            AdapterError: It says that it has pairs, and its parameters cannot be pairs.
        """
        if param_group.get("pairs"):
            self._check_pairs(param_group)
        super().add_param_group(param_group)

    def _check_pairs(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        obstacle = group.pop("obstacle", "")
        if obstacle and self.moves_product:
            raise AdapterError(f"{name} moves the product B A, and {obstacle}; use torch.optim.AdamW or LoRAPlus")
        parameters = group["params"] = list(group["params"])
        if self.moves_product:
            self.refuse_shards(parameters)
        sizes = [tuple(parameter.shape) for parameter in parameters]
        for a, b in zip(sizes[::2], sizes[1::2], strict=False):
            matrices = len(a) == len(b) == 2 or (not self.moves_product and len(a) == len(b) == 3)
            if not matrices or a[-2] != b[-1] or a[:-2] != b[:-2]:
                raise AdapterError(
                    f"{name}: sizes {a} and {b} are not those of A (r, in) and B (out, r); make the groups with "
                    "parameter_groups(model, lr, pairs=True)"
                )
        scales = group.get("scales") or [1.0] * (len(sizes) // 2)
        if len(sizes) % 2 or len(scales) * 2 != len(sizes):
            raise AdapterError(
                f"{name}: {len(sizes)} parameters and {len(scales)} scales are not whole pairs; make the groups with "
                "parameter_groups(model, lr, pairs=True)"
            )
        group["scales"] = [float(scale) for scale in scales]


def pairs_of(group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The pairs of a group: A, B and the factor on their product."""
    parameters = group["params"]
    yield from zip(parameters[::2], parameters[1::2], group["scales"], strict=True)


def check_clipping(clip: float | None, setting: str, optimizers: Iterable[Any]) -> None:
    """Check that a trainer leaves the gradients of A and B alone where an optimiser moves their product.

    Args:
        clip: The largest norm that the trainer lets through; None or 0 for no clipping.
        setting: What the trainer calls it.
        optimizers: Those of the trainer.

    Raises:
        AdapterError: It clips them.
    """
    own = [type(o).__name__ for o in optimizers if isinstance(o, PairOptimizer) and o.moves_product]
    if clip and own:
        raise AdapterError(
            f"{setting}={clip!r} would clip the gradients of A and B before {own[0]} reads them, and its steps would "
            f"depend on how B A is factored: set {setting} to 0, and clip in the arguments of {own[0]}"
        )
