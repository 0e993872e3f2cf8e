"""What LoRA and its kin share: the settings of a pair B A of rank r, and the adapter that holds the pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.errors import AdapterError, shown
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.description import LowRankUpdate, each_layer, mean_over_layers
from lit_adapters.methods.experts import ExpertsAdapter, find_experts
from lit_adapters.methods.matrix_layers import LinearLayer
from lit_adapters.methods.method import Factory, Method
from lit_adapters.methods.patterns import fullmatch
from lit_adapters.methods.short_call import ShortCall, is_short
from lit_adapters.methods.targets import Target, find_targets
from lit_adapters.methods.weight_adapter import WeightAdapter
from lit_adapters.ops._context import autocast_dtype, transformed
from lit_adapters.ops.cache import Cache
from lit_adapters.ops.low_rank import low_rank_linear
from lit_adapters.values import check_factor, check_flag, check_pattern, check_probability, check_whole


@dataclass
class LowRank(Method):
    """Settings of a low-rank method.

    Args:
        rank: r, the rank of the pair; at most the smaller side of every target.
        alpha: The update is multiplied by alpha / rank.
        dropout: Probability of zeroing an input of the update while training.
        targets: "all-linear", a list of name suffixes, or a regular expression for whole names; convolutions and heads
            are reached by name. "all-linear" takes every plain linear layer but those named in the list `train` and
            the head, which is what `get_classifier()` (timm) or `get_output_embeddings()` (transformers) returns. LoRA,
            DoRA and LoRAN take experts that are stored in one parameter, too; names of such parameters reach them.
        exclude: Name suffixes of modules to leave alone, with all that is inside them.
        rank_pattern: Rank by regular expression on the whole name, where it differs from `rank`.
        rslora: Divide alpha by sqrt(rank) instead of rank (arXiv 2312.03732).

    Raises:
        AdapterError: a value is out of range.
    """

    kind: ClassVar[str] = "linear"
    multiplies_in_turn: ClassVar[bool] = (
        True  # B (A x); False if the matrix is formed first, as for grouped convolutions
    )
    adapts_experts: ClassVar[bool] = False  # also those that are stored in one parameter

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    exclude: Sequence[str] = ()
    rank_pattern: Mapping[str, int] | None = None
    rslora: bool = False

    def __post_init__(self) -> None:
        self.normalise_targets()
        if not isinstance(self.rank_pattern, (Mapping, type(None))):
            raise AdapterError(f"rank_pattern {shown(self.rank_pattern)} must map regular expressions to ranks")
        for rank in (self.rank, *(self.rank_pattern or {}).values()):
            check_whole("rank", rank)
        for pattern in self.rank_pattern or {}:
            check_pattern("rank_pattern", pattern)
        check_factor("alpha", self.alpha)
        check_probability("dropout", self.dropout)
        check_flag("rslora", self.rslora)

    def rank_for(self, qualified_name: str) -> int:
        """The rank of one target."""
        for pattern, rank in (self.rank_pattern or {}).items():
            if fullmatch(pattern, qualified_name):
                return rank
        return self.rank

    def scaling(self, rank: int) -> float:
        """s, the factor on B A."""
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def find(self, model: nn.Module, train: str | Sequence[str] = ()) -> list[tuple[Target, Factory]]:
        """See `Method.find`; experts that are stored together are among the places, if the method adapts them."""
        experts = self.find_experts(model, train)
        holders = {id(target.module) for target, _ in experts}
        names = [f"{target.name}.{stack}" for target, stacks in experts for stack in stacks]
        found = [t for t in find_targets(model, self, train, also=names) if id(t.module) not in holders]
        layers = [(t, partial(self.wrap, t.module, t.name, t.parent)) for t in found]
        return [*layers, *((t, partial(self.wrap_experts, t.module, t.name, stacks)) for t, stacks in experts)]

    def find_experts(self, model: nn.Module, train: str | Sequence[str]) -> list[tuple[Target, list[str]]]:
        """The modules with weights of experts that this method adapts, each with the names of these weights."""
        return [] if not self.adapts_experts else find_experts(model, self.targets, self.exclude, train)

    def follow_file(self, model: nn.Module, adapted: Collection[str]) -> None:
        """As for every method; earlier versions did not adapt experts that are stored together."""
        super().follow_file(model, adapted)
        left = [target.name for target, _ in self.find_experts(model, ()) if target.name not in adapted]
        self.exclude = [*self.exclude, *left]

    def wrap_experts(self, base: nn.Module, qualified_name: str, stacks: Sequence[str]) -> ExpertsAdapter:
        """The adapter of a module with weights of experts.

        Args:
            base: The module.
            qualified_name: Its name in the model.
            stacks: The names of the parameters to adapt.

        Raises:
            AdapterError: This module cannot carry the method.
        """
        raise AdapterError(f"{type(self).__name__} does not adapt the experts of {qualified_name!r}")

    def placeholder(
        self, qualified_name: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> AdapterModule | None:
        """See `Method.placeholder`. The saved pair tells the sizes: lora_A is (r, in), lora_B (out, r).

        Raises:
            AdapterError: One of the pair is missing.
        """
        stacks = [name.removesuffix("_lora_A") for name in tensors if name.endswith("_lora_A")]
        if stacks and self.adapts_experts:
            return self._experts_placeholder(qualified_name, tensors, stacks)
        pair = {"lora_A", "lora_B"}
        if not pair & tensors.keys():
            return super().placeholder(qualified_name, tensors, shapes)
        if not pair <= tensors.keys():
            raise AdapterError(f"{qualified_name!r} lacks lora_A or lora_B")
        for name in sorted(pair):
            if tensors[name].dim() != 2 or not tensors[name].numel():
                raise AdapterError(f"{qualified_name}.{name} is {tuple(tensors[name].shape)}, and must be a matrix")
        layer = nn.Linear(tensors["lora_A"].shape[1], tensors["lora_B"].shape[0], bias=False, device="meta")
        return self.wrap(layer, qualified_name, nn.Module())

    def _experts_placeholder(
        self, qualified_name: str, tensors: Mapping[str, Tensor], stacks: Sequence[str]
    ) -> ExpertsAdapter:
        base = nn.Module()
        base.is_transposed = False  # type: ignore[assignment]
        for stack in stacks:
            a, b = tensors[f"{stack}_lora_A"], tensors.get(f"{stack}_lora_B")
            if b is None or a.dim() != 3 or b.dim() != 3 or not a.numel() or len(a) != len(b):
                raise AdapterError(f"{qualified_name}: {stack}_lora_A and {stack}_lora_B are no pairs of experts")
            weight = torch.empty(len(a), b.shape[1], a.shape[2], device="meta")
            base.register_parameter(stack, nn.Parameter(weight, requires_grad=False))
        return self.wrap_experts(base, qualified_name, stacks)


def _is_constant(tensor: Tensor) -> bool:
    return type(tensor) in (nn.Parameter, Tensor) and not tensor.requires_grad


class LowRankAdapter(WeightAdapter):
    """A pair A (r, in), B (out, r) beside a weight matrix W0 (out, in), and the factor s on their product.

    Raises:
        AdapterError: The layer has no weight matrix, is a convolution in groups, or is smaller than the rank.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    start_A: Tensor  # A0 (r, in); after `add_start` only
    start_B: Tensor  # B0 (out, r); after `add_start` only

    def __init__(self, base: nn.Module, qualified_name: str, config: LowRank) -> None:
        super().__init__(base, qualified_name)
        if config.multiplies_in_turn and not self.layer.low_rank:
            raise AdapterError(
                f"{qualified_name!r} is a convolution in groups, which no pair of convolutions of rank r can follow; "
                f"use LoRAN, which works on the weight, or set exclude=[{qualified_name!r}]"
            )
        rank, (outputs, inputs) = config.rank_for(qualified_name), self.layer.size(base)
        if rank > min(outputs, inputs):
            raise AdapterError(
                f"rank {rank} exceeds the size of {qualified_name!r} ({outputs} x {inputs}); "
                f"lower rank, or give this layer its own in rank_pattern"
            )
        self.rank = rank
        self.scaling = config.scaling(rank)
        self.dropout = config.dropout
        device = self.layer.device(self.base)
        self.add_parameter("lora_A", torch.empty(rank, inputs, device=device))
        self.add_parameter("lora_B", torch.empty(outputs, rank, device=device))
        self._short_call: ShortCall | None = None
        self._cast_weight: Cache[Tensor] = Cache()  # W0 in the dtype in which W0 x is computed

    # lora_A and lora_B are uninitialised here: subclasses end their `__init__` with `self.reset_parameters()`.

    def reset_parameters(self) -> None:
        """A Kaiming-uniform(a = sqrt 5), B zero: the start is the pretrained layer."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def add_start(self) -> None:
        """Register the buffers A0 and B0, for an adapter that subtracts what its pair does at the start."""
        self.add_buffer("start_A", torch.empty_like(self.lora_A))
        self.add_buffer("start_B", torch.empty_like(self.lora_B))

    @torch.no_grad()
    def keep_start(self) -> None:
        """Make the present pair A0 and B0."""
        self.start_A.copy_(self.lora_A)
        self.start_B.copy_(self.lora_B)

    # ---- the formula

    @property
    def update_rank(self) -> int:
        """The rank of the factors of the update."""
        return self.rank

    def left_factor(self, dtype: torch.dtype) -> Tensor:
        """B (out, r) in `dtype`: what the update multiplies by last."""
        return self.lora_B.to(dtype)

    def right_factor(self, dtype: torch.dtype) -> Tensor:
        """A (r, in) in `dtype`: what the update multiplies by first."""
        return self.lora_A.to(dtype)

    def down(self, x: Tensor) -> Tensor:
        """A x, after dropout while training; (..., in) -> (..., r)."""
        return self.layer.down(self.base, F.dropout(x, self.dropout, self.training), self.right_factor(x.dtype))

    def up(self, z: Tensor) -> Tensor:
        """B z; (..., r) -> (..., out)."""
        return self.layer.up(self.base, z, self.left_factor(z.dtype))

    def product(self, dtype: torch.dtype) -> Tensor:
        """B A (out, in) in `dtype`."""
        return self.left_factor(dtype) @ self.right_factor(dtype)

    def product_obstacle(self) -> str:
        """Why the layer's weight is not a function of B A alone; empty if it is one. Optimisers of pairs ask this."""
        return ""

    # ---- the fast path

    def can_fuse(self, x: Tensor) -> bool:
        """Whether `fused` may take the place of the formula.

        False if the layer is not a plain nn.Linear, or its forward is replaced or hooked; under torch.compile, which
        fuses by itself; under torch.func, which needs plain operations; if x is not contiguous; with active dropout,
        which acts on the input of A but not on that of W0; if W0 or the bias trains; for a nested tensor; or if x has
        another dtype than W0 and there is no autocast.
        """
        base = self.base
        if type(self.layer) is not LinearLayer or type(base).forward is not nn.Linear.forward:
            return False
        if torch.compiler.is_compiling() or transformed() or x.is_nested or not x.is_contiguous():
            return False
        if self.dropout and self.training:
            return False
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            return False  # of whoever reached the base itself; `adopt` took over those it had
        if "forward" in vars(base):  # accelerate puts one there
            return False
        weight, bias = base.weight, base.bias
        if not _is_constant(weight) or not (bias is None or _is_constant(bias)):
            return False
        return x.dtype == weight.dtype or autocast_dtype(x) is not None

    def fused(self, x: Tensor, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """W0 x + bias + s B phi(A x) in fused operations; (..., in) -> (..., out). Only if `can_fuse(x)`.

        phi is `activation`, or the identity.
        """
        dtype, base = self._compute_dtype(x), self.base
        weight, bias = self._weight_in(dtype), None if base.bias is None else base.bias.to(dtype)
        a, b = self.right_factor(self.lora_A.dtype), self.left_factor(self.lora_B.dtype)
        return low_rank_linear(x.to(dtype), weight, bias, a, b, activation, self.scaling)

    def short(self, x: Tensor, gain_minus_one: Callable[[], Tensor] | None = None) -> Tensor | None:
        """The output of `fused` for few rows; None for more. `again` computes the next such call in the same way.

        Args:
            x: The input; only if `can_fuse(x)`.
            gain_minus_one: Gives g (out,) for an output h + g (h - bias), where h is that of `fused`.
        """
        weight = self.base.weight
        if not is_short(x, weight) or not self.may_cache():
            return None
        gain = None if gain_minus_one is None else gain_minus_one()
        if gain is not None and gain.dtype != x.dtype:
            return None
        with torch.inference_mode(False), torch.no_grad():
            pair = self.right_factor(x.dtype), self.left_factor(x.dtype)
        return self._keep_short(x, ShortCall(self, weight, pair, gain))

    def _keep_short(self, x: Tensor, call: ShortCall) -> Tensor | None:
        self._short_call = call if call.can_be_kept else None
        return self.again(x)

    def again(self, x: Tensor) -> Tensor | None:
        """The output as the last `short` call computed it, where nothing has changed; else None."""
        if torch.compiler.is_compiling() or self._short_call is None or self._short_call.state is not self.__dict__:
            return None  # nothing is kept, or a shallow copy shares what its original keeps
        return self._short_call(x)

    def clear_caches(self) -> None:
        super().clear_caches()
        self._short_call = None

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        """What the base layer computes in, for this input."""
        dtype = autocast_dtype(x)
        if dtype is not None and x.dtype != torch.float64:  # autocast does not change float64
            return dtype
        return self.layer.compute_dtype(self.base, x)

    def _weight_in(self, dtype: torch.dtype) -> Tensor:
        """W0 in the dtype in which W0 x is computed; under autocast it is cast once and kept."""
        weight: Tensor = self.base.weight
        if weight.dtype == dtype or self.sharded:
            return weight.to(dtype)
        return self._cast_weight.get([weight], lambda: weight.detach().to(dtype), key=dtype)

    # ---- the update as a matrix, and what was learned

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s B A, (out, in)."""
        return self.scaling * self.product(dtype)

    def statistics(self) -> dict[str, float]:
        """relative_norm: ||s B A||_F / ||W0||_F, from the r x r products alone (the d x d update is never formed)."""
        a, b = self.right_factor(torch.float64).detach(), self.left_factor(torch.float64).detach()
        squared = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0)
        return self.relative_norm(abs(self.scaling) * squared.sqrt().item())

    def extra_repr(self) -> str:
        return f"{self.base.extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"

    held_by_update = ("lora_A", "lora_B")

    def low_rank_update(self) -> LowRankUpdate:
        """s B A."""
        left, right = self.left_factor(self.lora_B.dtype), self.right_factor(self.lora_A.dtype)
        return LowRankUpdate(left.detach(), right.detach(), self.scaling)

    def charts(self) -> dict[str, str]:
        """The size of the update, relative to the pretrained weight."""
        return {
            "weights: ||dW|| / ||W||, mean over layers": mean_over_layers("relative_norm"),
            "weights: ||dW|| / ||W||, each layer": each_layer("relative_norm"),
        }
