"""Adapters of experts that are stored together: one parameter (E, out, in) holds the weights of E layers.

Mixtures of experts in transformers are modules such as `MixtralExperts`, with the parameters `gate_up_proj` and
`down_proj`. Their adapter has a pair A (E, r, in), B (E, out, r) for each such parameter, and calls the module with

    W'_e = W_e + dW_e        for each expert e

dW_e is the update of LoRA, DoRA or LoRAN; the formula stands in their files. All experts' weights are formed at each
call, also of experts without a token; in eval mode without gradients they are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.description import AdapterSummary, each_layer, mean_over_layers
from lit_adapters.methods.targets import Target, matches, places, within
from lit_adapters.ops._context import without_autocast
from lit_adapters.ops.cache import Cache


class PairSettings(Protocol):
    """The settings of a pair A, B; `lit_adapters.methods.low_rank.LowRank` explains them."""

    dropout: float

    def rank_for(self, qualified_name: str) -> int:
        """The rank of one parameter."""

    def scaling(self, rank: int) -> float:
        """s, the factor on B A."""


def stacked_weights(module: nn.Module) -> list[str]:
    """The names of the parameters (E, ., .) of a module that hold one weight for each of its E experts."""
    found = [n for n, p in module._parameters.items() if p is not None and p.dim() == 3 and p.is_floating_point()]
    count = getattr(module, "num_experts", None)
    if type(module).__name__.endswith("Experts"):
        return found
    return [n for n in found if module._parameters[n].shape[0] == count]  # type: ignore[union-attr]


def find_experts(
    model: nn.Module, targets: str | Sequence[str], exclude: Sequence[str], train: str | Sequence[str]
) -> list[tuple[Target, list[str]]]:
    """The modules that hold experts' weights, each with the names of those that a method adapts.

    Args:
        model: Without adapters.
        targets: "all-linear", or what the full names of the parameters are matched with.
        exclude: Name suffixes of modules to leave alone.
        train: As given to `attach`; "all-linear" leaves out modules in this list.
    """
    named = () if isinstance(train, str) else tuple(train)
    found = []
    for target in places(model):
        names = [n for n in stacked_weights(target.module) if not within(f"{target.name}.{n}", tuple(exclude))]
        if targets == "all-linear":
            names = [n for n in names if not within(f"{target.name}.{n}", named)]
        else:
            names = [n for n in names if matches(f"{target.name}.{n}", targets)]
        if names:
            found.append((target, names))
    return found


class ExpertsAdapter(AdapterModule):
    """The adapter of a module with the weights (E, out, in) of E experts.

    Raises:
        AdapterError: There is dropout, whose input only the module knows, or a weight is smaller than the rank.
    """

    def __init__(self, base: nn.Module, qualified_name: str, config: PairSettings, stacks: Sequence[str]) -> None:
        super().__init__(base, qualified_name)
        if config.dropout:
            raise AdapterError(
                f"dropout {config.dropout} acts on the inputs of single layers, and {qualified_name!r} holds the "
                f"weights of all its experts; set dropout=0 or exclude=[{qualified_name!r}]"
            )
        self.transposed = bool(getattr(base, "is_transposed", False))  # stored as (E, in, out)
        self.merges_into = list(stacks)
        self.scaling: dict[str, float] = {}
        self._formed: dict[str, Cache[Tensor]] = {}
        for stack in stacks:
            count, outputs, inputs = self.matrices(stack).shape
            rank = config.rank_for(f"{qualified_name}.{stack}")
            if rank > min(outputs, inputs):
                raise AdapterError(
                    f"rank {rank} exceeds the size of '{qualified_name}.{stack}' ({outputs} x {inputs}); "
                    "lower rank, or give it its own in rank_pattern"
                )
            device = base._parameters[stack].device  # type: ignore[union-attr]
            self.scaling[stack] = config.scaling(rank)
            self.add_parameter(f"{stack}_lora_A", torch.empty(count, rank, inputs, device=device))
            self.add_parameter(f"{stack}_lora_B", torch.empty(count, outputs, rank, device=device))
            self._formed[stack] = Cache()

    # Subclasses end their `__init__` with `self.reset_parameters()`.

    def reset_parameters(self) -> None:
        """For each expert A Kaiming-uniform(a = sqrt 5), B zero: the start is the pretrained module."""
        for stack in self.merges_into:
            a, b = self.pair(stack)
            for one in a:
                nn.init.kaiming_uniform_(one, a=math.sqrt(5))
            nn.init.zeros_(b)

    def adapts(self) -> list[nn.Parameter]:
        """All parameters of the module but weights of experts that are left alone."""
        left = {id(self.base._parameters[n]) for n in stacked_weights(self.base) if n not in self.merges_into}
        return [p for p in super().adapts() if id(p) not in left]

    def pair(self, stack: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A (E, r, in) and B (E, out, r) of one parameter."""
        return self.get_parameter(f"{stack}_lora_A"), self.get_parameter(f"{stack}_lora_B")

    def product(self, stack: str, dtype: torch.dtype) -> Tensor:
        """B_e A_e of each expert, (E, out, in)."""
        a, b = self.pair(stack)
        return b.to(dtype) @ a.to(dtype)

    def matrices(self, stack: str) -> Tensor:
        """The pretrained W_e (E, out, in) of one parameter."""
        weight: Tensor = self.base._parameters[stack]
        return weight.mT if self.transposed else weight

    def adapted(self, stack: str, dtype: torch.dtype) -> Tensor:
        """W'_e (E, out, in) of one parameter, computed in `dtype`."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.in_effect:
            return self.unadapted(*args, **kwargs)
        return self.call_base_with({stack: self._weight(stack) for stack in self.merges_into}, args, kwargs)

    def _weight(self, stack: str) -> Tensor:
        """The adapted parameter, in the layout and dtype of the pretrained one."""
        if not self.may_cache():
            return self._form(stack)
        own = [t for name, t in self.adapter_tensors().items() if name.startswith(stack)]
        return self._formed[stack].get([self.base._parameters[stack], *own], lambda: self._form(stack))

    def _form(self, stack: str) -> Tensor:
        stored: Tensor = self.base._parameters[stack]
        with without_autocast(stored):
            weight = self.adapted(stack, torch.promote_types(stored.dtype, torch.float32)).to(stored.dtype)
        return weight.mT if self.transposed else weight

    def clear_caches(self) -> None:
        super().clear_caches()
        for cache in self._formed.values():
            cache.clear()

    def merged_parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """W'_e of each parameter, as the module stores them."""
        adapted = {stack: self.adapted(stack, dtype) for stack in self.merges_into}
        return {stack: weight.mT if self.transposed else weight for stack, weight in adapted.items()}

    @torch.no_grad()
    def _norms(self) -> tuple[float, float]:
        """||dW||_F and ||W||_F over all experts and parameters."""
        change = size = 0.0
        for stack in self.merges_into:
            before = self.matrices(stack).float()
            change += (self.adapted(stack, torch.float32) - before).square().sum(dtype=torch.float64).item()
            size += before.square().sum(dtype=torch.float64).item()
        return math.sqrt(change), math.sqrt(size)

    def statistics(self) -> dict[str, float]:
        """relative_norm: ||dW||_F / ||W||_F over all experts."""
        change, size = self._norms()
        return {"relative_norm": change / max(size, torch.finfo(torch.float32).tiny)}

    def summary(self) -> AdapterSummary:
        """The sizes of the pairs."""
        sizes = {}
        for stack in self.merges_into:
            a, b = self.pair(stack)
            sizes[stack] = f"{stack} {len(a)} x {b.shape[1]} x {a.shape[2]}, r = {a.shape[1]}"
        return AdapterSummary("; ".join(sizes.values()))

    def charts(self) -> dict[str, str]:
        """The size of the update, relative to the pretrained weights."""
        return {
            "weights: ||dW|| / ||W||, mean over layers": mean_over_layers("relative_norm"),
            "weights: ||dW|| / ||W||, each layer": each_layer("relative_norm"),
        }
