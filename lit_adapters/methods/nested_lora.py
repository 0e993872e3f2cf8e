"""NestedLoRA: a trained low-rank pair inside a frozen one that comes from W0 (arXiv 2408.10280, there called NoRA).

    x ──┬── W0 (out, in), frozen ──────────────────────────────────────────────────────────────+── h
        └── A_o (r, in), frozen ── A_i (r_i, r) ── B_i (r, r_i) ── B_o (out, r), frozen ── * s ──┘

    h = W0 x + bias + s B_o B_i A_i A_o x        s = alpha / r

B_o A_o is the best approximation of W0 of rank r for inputs whose channels have the sizes d. With the r largest
singular values of W0 diag(d) = U S V^T and a share p in [0, 1],

    B_o = U S^p        A_o = S^(1-p) V^T diag(d)^-1 = S^-p U^T W0

The last form does not divide by d, so that a channel may be 0 in all batches. init="awsvd" measures
d_j = (mean |x_j|)^a on the first training batches; init="svd" takes d = 1 and needs no data.

A_i starts Kaiming-uniform(a = sqrt 5) and B_i at zero, so the layer starts as the pretrained one (ours: the authors'
code starts elsewhere). It has 2 r r_i trained parameters, whatever its size. The outer pair depends on data and on the
library of linear algebra, so files hold its r (in + out) numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.description import LowRankUpdate, each_layer, mean_over_layers
from lit_adapters.methods.method import Method
from lit_adapters.methods.starts import starts_left_out
from lit_adapters.methods.weight_adapter import WeightAdapter
from lit_adapters.ops._context import autocast_dtype, transformed
from lit_adapters.ops.cache import Cache
from lit_adapters.ops.decomposition import leading_svd
from lit_adapters.values import check_choice, check_factor, check_number, check_probability, check_whole

_FROM_DATA = "awsvd"
_OUTER = ("nested_outer_A", "nested_outer_B")


@dataclass
class NestedLoRA(Method):
    """Configuration of NestedLoRA.

    Args:
        rank: r, the width of the frozen outer pair; at most the smaller side of every target.
        inner_rank: r_i, the rank of the trained inner pair; at most `rank`.
        alpha: The update is multiplied by alpha / rank.
        init: The outer pair: "awsvd", from W0 and the sizes of its inputs, which `AdapterCallback` or
            `lit_adapters.calibrate` measures before training; or "svd", from W0 alone.
        activation_power: a, the power of the sizes of inputs in "awsvd"; 0 is "svd".
        split: p, the share of the singular values that B_o takes, from 0 to 1.
        dropout: Probability of zeroing an input of the update while training.
        targets: The keyword "all-linear" (every plain linear layer but the head), a list of name suffixes, or a
            regular expression for whole names; convolutions and heads are reached by name.
        exclude: Name suffixes of modules to leave alone.

    Raises:
        AdapterError: A value is out of range.
    """

    name: ClassVar[str] = "nested_lora"
    kind: ClassVar[str] = "linear"

    rank: int = 64
    inner_rank: int = 16
    alpha: float = 64.0
    init: str = _FROM_DATA
    activation_power: float = 0.5
    split: float = 0.5
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.normalise_targets()
        check_whole("rank", self.rank)
        check_whole("inner_rank", self.inner_rank, high=self.rank)
        check_factor("alpha", self.alpha)
        check_choice("init", self.init, (_FROM_DATA, "svd"))
        check_number("activation_power", self.activation_power, 0.0, 4.0)
        check_number("split", self.split, 0.0, 1.0)
        check_probability("dropout", self.dropout)

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> NestedLoRAAdapter:
        return NestedLoRAAdapter(base, qualified_name, self)

    def placeholder(
        self, qualified_name: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> AdapterModule:
        """See `Method.placeholder`. The outer pair tells the sizes: A_o is (r, in), B_o (out, r).

        Raises:
            AdapterError: One of the pair is missing, or is no matrix.
        """
        for name in _OUTER:
            if name not in tensors or tensors[name].dim() != 2 or not tensors[name].numel():
                raise AdapterError(f"{qualified_name}.{name} is missing or no matrix; take an undamaged copy")
        a, b = (tensors[name] for name in _OUTER)
        return self.wrap(nn.Linear(a.shape[1], b.shape[0], bias=False, device="meta"), qualified_name, nn.Module())


@torch.no_grad()
def outer_pair(weight: Tensor, sizes: Tensor, rank: int, split: float) -> tuple[Tensor, Tensor]:
    """A_o (r, in) and B_o (out, r), whose product is the best approximation of rank r for inputs of these sizes.

    Args:
        weight: W0 (out, in), float32 or float64.
        sizes: d (in,), at least 0.
        rank: r.
        split: p, the share of the singular values that B_o takes.
    """
    u, values, _ = leading_svd(weight * sizes, rank)
    least = torch.finfo(values.dtype).eps * max(weight.shape) * values[0]
    inverse = torch.where(values > least, values, math.inf).pow(-split)  # 0 for directions that are rounding errors
    return inverse[:, None] * (u.T @ weight), u * values.pow(split)


class NestedLoRAAdapter(WeightAdapter):
    """h = W0 x + bias + s B_o B_i A_i A_o x for one layer; (..., in) -> (..., out).

    Raises:
        AdapterError: The layer has no weight matrix, is a convolution in groups, or is smaller than the rank.
    """

    method = "nested_lora"
    nested_inner_A: nn.Parameter
    nested_inner_B: nn.Parameter
    nested_outer_A: Tensor
    nested_outer_B: Tensor
    nested_calibrated: Tensor  # 1 once the outer pair was computed from data, else 0; with "awsvd" only

    def __init__(self, base: nn.Module, qualified_name: str, config: NestedLoRA) -> None:
        super().__init__(base, qualified_name)
        outputs, inputs = self.layer.size(self.base)
        if not self.layer.low_rank:
            raise AdapterError(
                f"{qualified_name!r} is a convolution in groups, which no pair of convolutions of rank r can follow; "
                f"use LoRAN, which works on the weight, or set exclude=[{qualified_name!r}]"
            )
        if config.rank > min(outputs, inputs):
            raise AdapterError(
                f"rank {config.rank} exceeds the size of {qualified_name!r} ({outputs} x {inputs}); lower rank, or set "
                f"exclude=[{qualified_name!r}]"
            )
        self.config = config
        self.rank, self.inner_rank = config.rank, config.inner_rank
        self.scaling, self.dropout = config.alpha / config.rank, config.dropout
        device = self.base.weight.device
        self.add_parameter("nested_inner_A", torch.empty(self.inner_rank, self.rank, device=device))
        self.add_parameter("nested_inner_B", torch.empty(self.rank, self.inner_rank, device=device))
        self.add_buffer("nested_outer_A", torch.zeros(self.rank, inputs, device=device))
        self.add_buffer("nested_outer_B", torch.zeros(outputs, self.rank, device=device))
        if config.init == _FROM_DATA:
            self.add_buffer("nested_calibrated", torch.empty((), dtype=torch.int64, device=device))
        self._cast: Cache[tuple[Tensor, Tensor]] = Cache()  # the outer pair in the dtype of the products
        self._awaits_calibration = False
        self._sum: Tensor | None = None  # of |x|, by channel (in,), float64
        self._rows = 0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A_i Kaiming-uniform(a = sqrt 5), B_i zero, the outer pair from W0; with "awsvd" zero until calibrated."""
        nn.init.kaiming_uniform_(self.nested_inner_A, a=math.sqrt(5))
        nn.init.zeros_(self.nested_inner_B)
        if self.config.init == _FROM_DATA:
            nn.init.zeros_(self.nested_outer_A)
            nn.init.zeros_(self.nested_outer_B)
            self.nested_calibrated.fill_(0)
            self._awaits_calibration = True
        elif not self.base.weight.is_meta and not starts_left_out():
            self._set_outer_pair()

    @torch.no_grad()
    def _set_outer_pair(self, sizes: Tensor | None = None) -> None:
        """Compute the outer pair for inputs of these sizes d (in,), by default all 1.

        Raises:
            AdapterError: The weight is not finite.
        """
        matrix = self.base_matrix().detach()
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        if not matrix.isfinite().all():
            raise AdapterError(
                f"the weight of {self.qualified_name!r} has values that are not finite, from which no singular vectors "
                "can be computed; load an undamaged model"
            )
        sizes = torch.ones(matrix.shape[1]) if sizes is None else sizes
        a, b = outer_pair(matrix, sizes.to(matrix), self.rank, self.config.split)
        self.nested_outer_A.copy_(a)
        self.nested_outer_B.copy_(b)
        self.clear_caches()

    # ---- calibration

    @property
    def calibrates(self) -> bool:
        return self.config.init == _FROM_DATA

    @property
    def awaits_calibration(self) -> bool:
        return self._awaits_calibration

    @property
    def in_effect(self) -> bool:
        """As for every adapter.

        Raises:
            AdapterError: The adapter is about to train, and the sizes of its inputs have not been measured.
        """
        if self._awaits_calibration and self.training and torch.is_grad_enabled():
            raise AdapterError(
                f"{self.qualified_name!r} has init='awsvd' and was not calibrated; call "
                "lit_adapters.calibrate(model, batches) before training, train with AdapterCallback, which does, or "
                "use init='svd'"
            )
        return super().in_effect

    @property
    def needs_whole(self) -> str:
        if not self.calibrates:
            return super().needs_whole
        return "init='awsvd' needs whole weights: calibrate before sharding, use init='svd', or the strategy ddp"

    def begin_calibration(self) -> None:
        """Forget earlier measurements.

        Raises:
            AdapterError: Training has begun, or the model is sharded.
        """
        self._sum, self._rows = None, 0
        if self.sharded:
            raise AdapterError(f"{self.qualified_name!r} is sharded, and {self.needs_whole}")
        if self.nested_inner_B.any():
            raise AdapterError(
                f"{self.qualified_name!r} has been trained: calibrating now would change its function. Calibrate once, "
                "right after attach"
            )

    def measure_input(self, x: Tensor) -> None:
        """Take up the sizes of the channels of one input."""
        rows = x.detach().movedim(self.layer.channel_dim, -1).flatten(0, -2)
        total = rows.abs().float().sum(0).cpu().double()
        self._sum = total if self._sum is None else self._sum + total
        self._rows += len(rows)

    @torch.no_grad()
    def calibrate(self, values: Tensor) -> None:
        """Compute the outer pair from W0 and the measured sizes.

        Raises:
            AdapterError: The inputs are all zero, or not finite.
        """
        total, rows = self._sum, self._rows
        self._sum, self._rows = None, 0
        if total is None or not total.isfinite().all() or not total.any():
            raise AdapterError(
                f"the inputs seen by {self.qualified_name!r} are all zero or not finite, so that init='awsvd' has no "
                "sizes; give batches of real data, use init='svd', or exclude this layer"
            )
        means = total / rows
        sizes = (means / means.mean()) ** self.config.activation_power
        inputs = self.nested_outer_A.shape[1]
        self.stand_alone()
        self._set_outer_pair(sizes.repeat_interleave(inputs // len(sizes)))  # a channel has the columns of its kernel
        self.nested_calibrated.fill_(1)
        self._awaits_calibration = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.nested_outer_A.is_meta:
            return
        if self.config.init == _FROM_DATA:
            self._awaits_calibration = not bool(self.nested_calibrated.item())
            return
        other_base = f"{prefix}weight" in state_dict and f"{prefix}nested_outer_A" not in state_dict
        if other_base and not self.nested_inner_B.any():  # nothing has trained yet
            self._set_outer_pair()

    # ---- the formula

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_effect:
            return self.unadapted(x)
        y = self.base(x)  # W0 x + bias
        outer_a, outer_b = self._outer_in(x)
        z = self.layer.down(self.base, F.dropout(x, self.dropout, self.training), outer_a)  # A_o x
        z = self.layer.up(self.base, z, self.nested_inner_A.to(z.dtype))
        z = self.layer.up(self.base, z, self.nested_inner_B.to(z.dtype))
        update = self.scaling * self.layer.up(self.base, z, outer_b)
        return y + update.to(y.dtype)

    def _outer_in(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A_o and B_o in the dtype that products with x have; cast once, as they do not train."""
        a, b = self.nested_outer_A, self.nested_outer_B
        dtype = x.dtype if x.dtype == torch.float64 else autocast_dtype(x) or x.dtype
        if dtype == a.dtype or torch.compiler.is_compiling() or transformed():
            return a.to(dtype), b.to(dtype)
        return self._cast.get([a, b], lambda: (a.to(dtype), b.to(dtype)), key=dtype)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """B_o B_i (out, r_i) and A_i A_o (r_i, in) in `dtype`."""
        left = self.nested_outer_B.to(dtype) @ self.nested_inner_B.to(dtype)
        return left, self.nested_inner_A.to(dtype) @ self.nested_outer_A.to(dtype)

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s B_o B_i A_i A_o, (out, in)."""
        left, right = self.factors(dtype)
        return self.scaling * left @ right

    # ---- what was learned

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """relative_norm: ||s B_o B_i A_i A_o||_F / ||W0||_F, from products of width r_i."""
        left, right = self.factors(torch.float64)
        squared = ((left.T @ left) * (right @ right.T)).sum().clamp(min=0)
        return {"relative_norm": abs(self.scaling) * squared.sqrt().item() / self.base_norm()}

    held_by_update = ("nested_inner_A", "nested_inner_B")

    @torch.no_grad()
    def low_rank_update(self) -> LowRankUpdate:
        """s B_o B_i A_i A_o, of rank r_i."""
        left, right = self.factors(torch.float32)
        return LowRankUpdate(left.detach(), right.detach(), self.scaling)

    def charts(self) -> dict[str, str]:
        """The size of the update, relative to the pretrained weight."""
        return {
            "weights: ||dW|| / ||W||, mean over layers": mean_over_layers("relative_norm"),
            "weights: ||dW|| / ||W||, each layer": each_layer("relative_norm"),
        }

    def extra_repr(self) -> str:
        return (
            f"{self.base.extra_repr()}, rank={self.rank}, inner_rank={self.inner_rank}, init={self.config.init}, "
            f"scaling={self.scaling:g}"
        )
