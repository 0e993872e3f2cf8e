"""DenseLoRA: one small dense matrix a layer, between an encoder and a decoder that layers share (arXiv 2505.23808).

    x ──┬── W0 (out, in), frozen ─────────────────────────────────────────────+── h
        └── E (r, in), shared ── phi ── M (r, r) ── D (out, r), shared ── phi ── * s ──┘

    h = W0 x + bias + s phi(D M phi(E x))        s = alpha / r, phi = GELU (exact)

All layers of one kind of projection (the queries of all blocks, say) share E and D; M is the layer's own. E and M start
Kaiming-uniform(a = sqrt 5), D at zero, so the layer starts as the pretrained one. K kinds of r (in + out) parameters,
and r^2 for each layer. Dropout acts on x, on phi(E x) and on the result of the branch.

With GELU after D no output of a layer can fall by more than 0.17 s, but it can rise without limit.
`output_activation=False` leaves D linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.description import AdapterSummary, LowRankUpdate, each_layer, mean_over_layers
from lit_adapters.methods.matrix_layers import matrix_layer
from lit_adapters.methods.method import Factory, Method
from lit_adapters.methods.shared_parameters import (
    SharingAdapter,
    SharingGroup,
    join_layers_of_a_file,
    without_numbers,
)
from lit_adapters.methods.targets import Target, find_targets
from lit_adapters.methods.weight_adapter import WeightAdapter, read_error
from lit_adapters.ops.statistics import regular_sample
from lit_adapters.values import check_choice, check_factor, check_flag, check_probability, check_whole

# At 0 each is 0, so that the start is exact, and has a slope, so that D trains.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
_SHARES = ("kind", "shape", "none")
_SHARED = ("dense_E", "dense_D")
_SAMPLE = 256  # inputs that `observe` takes
_LARGEST_SIDE = 1 << 28  # of a layer that a file describes


@dataclass
class DenseLoRA(Method):
    """Configuration of DenseLoRA.

    Args:
        rank: r, the width of encoder and decoder; at most the smaller side of every target.
        alpha: The update is multiplied by alpha / rank.
        dropout: Probability of zeroing an input, a code or an output of the update while training.
        activation: phi: "gelu", "silu" or "tanh".
        output_activation: Whether phi also follows the decoder, as published.
        share: Which layers share encoder and decoder: "kind" (those of one size whose names differ in numbers of
            blocks alone), "shape" (all of one size) or "none".
        targets: The keyword "all-linear" (every plain linear layer but the head), a list of name suffixes, or a
            regular expression for whole names; convolutions and heads are reached by name.
        exclude: Name suffixes of modules to leave alone.

    Raises:
        AdapterError: A value is out of range.
    """

    name: ClassVar[str] = "dense_lora"
    kind: ClassVar[str] = "linear"
    merges: ClassVar[str] = "no"

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    activation: str = "gelu"
    output_activation: bool = True
    share: str = "kind"
    targets: str | Sequence[str] = "all-linear"
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.normalise_targets()
        check_whole("rank", self.rank)
        check_factor("alpha", self.alpha)
        check_probability("dropout", self.dropout)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_flag("output_activation", self.output_activation)
        check_choice("share", self.share, _SHARES)

    def find(self, model: nn.Module, train: str | Sequence[str] = ()) -> list[tuple[Target, Factory]]:
        """As for any method; the first layer of each group holds what the group shares.

        Raises:
            AdapterError: A layer holds no weight matrix.
            TargetsNotFound: Nothing matches.
        """
        groups: dict[Hashable, SharingGroup] = {}
        found: list[tuple[Target, Factory]] = []
        for target in find_targets(model, self, train):
            size = matrix_layer(target.module, target.name, "DenseLoRA").size(target.module)
            sharing = groups.setdefault(self.group(target.name, size), SharingGroup())
            found.append((target, partial(DenseLoRAAdapter, target.module, target.name, self, sharing)))
        return found

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> DenseLoRAAdapter:
        """The adapter around one layer by itself, with an encoder and a decoder of its own."""
        return DenseLoRAAdapter(base, qualified_name, self, SharingGroup())

    def group(self, qualified_name: str, size: tuple[int, int]) -> Hashable:
        """What layers that share encoder and decoder have in common, for a layer of this name and size (out, in)."""
        if self.share == "none":
            return qualified_name
        return size if self.share == "shape" else (without_numbers(qualified_name), size)

    def placeholder(
        self, qualified_name: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> AdapterModule:
        """As for any method; the file holds the size of the layer.

        Raises:
            AdapterError: The size is missing or damaged.
        """
        size = tensors.get("dense_size")
        valid = size is not None and size.shape == (2,) and size.dtype == torch.int64
        if size is None or not valid or not ((size > 0) & (size <= _LARGEST_SIDE)).all():
            raise AdapterError(f"{qualified_name}.dense_size is missing or damaged; take an undamaged copy")
        outputs, inputs = size.tolist()
        layer = nn.Linear(inputs, outputs, bias=False, device="meta")
        return DenseLoRAAdapter(layer, qualified_name, self, SharingGroup(), holder=_SHARED[0] in tensors)

    def join(self, adapters: Mapping[str, AdapterModule]) -> None:
        """Give the layers of each group the encoder and the decoder that one of them holds.

        Raises:
            AdapterError: No layer of a group holds them.
        """
        own = {name: adapter for name, adapter in adapters.items() if isinstance(adapter, DenseLoRAAdapter)}
        join_layers_of_a_file((self.group(name, adapter.size), adapter) for name, adapter in own.items())


def _nonlinear(name: str) -> AdapterError:
    return AdapterError(
        f"{name!r}: DenseLoRA is nonlinear, and no weight is equal to it; keep the adapter, or use LoRA or DoRA "
        f"there (exclude=[{name!r}])"
    )


class DenseLoRAAdapter(SharingAdapter, WeightAdapter):
    """h = W0 x + bias + s phi(D M phi(E x)) for one layer; (..., in) -> (..., out).

    Raises:
        AdapterError: The layer has no weight matrix, is a convolution in groups, or is smaller than the rank.
    """

    method = "dense_lora"
    shared_names = _SHARED
    dense_E: nn.Parameter  # of the holder alone, as dense_D
    dense_D: nn.Parameter
    dense_M: nn.Parameter
    dense_size: Tensor  # [out, in]: a file alone tells who shares

    def __init__(
        self,
        base: nn.Module,
        qualified_name: str,
        config: DenseLoRA,
        sharing: SharingGroup,
        holder: bool | None = None,
    ) -> None:
        """See the class.

        Args:
            base: The layer that is adapted.
            qualified_name: Its name in the model.
            config: The settings.
            sharing: The layers that it shares E and D with.
            holder: Whether this layer holds E and D; by default if it is the first one.
        """
        super().__init__(base, qualified_name)
        self.size = outputs, inputs = self.layer.size(self.base)
        if not self.layer.low_rank:
            raise AdapterError(
                f"{qualified_name!r} is a convolution in groups, which no pair of convolutions of rank r can follow; "
                f"use LoRAN, which works on the weight, or set exclude=[{qualified_name!r}]"
            )
        if config.rank > min(self.size):
            raise AdapterError(
                f"rank {config.rank} exceeds the size of {qualified_name!r} ({outputs} x {inputs}); lower rank, or set "
                f"exclude=[{qualified_name!r}]"
            )
        self.rank, self.scaling, self.dropout = config.rank, config.alpha / config.rank, config.dropout
        self.activation, self.output_activation = config.activation, config.output_activation
        device = self.base.weight.device

        def make() -> dict[str, Tensor]:
            shapes = (self.rank, inputs), (outputs, self.rank)
            return {name: torch.empty(shape, device=device) for name, shape in zip(_SHARED, shapes, strict=True)}

        self.join_group(sharing, make, holder)
        self.add_parameter("dense_M", torch.empty(self.rank, self.rank, device=device))
        self.add_buffer("dense_size", torch.empty(2, dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """E and M Kaiming-uniform(a = sqrt 5), D zero: the start is the pretrained layer."""
        if self.is_holder:
            nn.init.kaiming_uniform_(self.dense_E, a=math.sqrt(5))
            nn.init.zeros_(self.dense_D)
        nn.init.kaiming_uniform_(self.dense_M, a=math.sqrt(5))
        self.dense_size.copy_(torch.tensor(self.size))

    # ---- the formula

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_effect:
            return self.unadapted(x)
        y = self.base(x)  # W0 x + bias
        return y + self.update(x, self.training).to(y.dtype)

    def update(self, x: Tensor, training: bool = False) -> Tensor:
        """s phi(D M phi(E x)), with dropout while `training`; (..., in) -> (..., out)."""
        phi = ACTIVATIONS[self.activation]
        drop = partial(F.dropout, p=self.dropout, training=training)
        e, d = (t.to(x.device) for t in self.pair())  # the holder may be on another device
        z = phi(self.layer.down(self.base, drop(x), e.to(x.dtype)))
        z = self.layer.up(self.base, drop(z), self.dense_M.to(z.dtype))
        u = self.layer.up(self.base, z, d.to(z.dtype))
        if self.output_activation:
            u = phi(u)
        return self.scaling * drop(u)

    def pair(self) -> tuple[Tensor, Tensor]:
        """E (r, in) and D (out, r), of the layer that holds them."""
        holder = self.sharing.layers[0]
        e, d = (getattr(holder, name) for name in _SHARED)
        return e, d

    # ---- no weight holds it

    def check_linear(self) -> NoReturn:
        """As for any weight adapter.

        Raises:
            AdapterError: Always.
        """
        raise _nonlinear(self.qualified_name)

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> NoReturn:
        """As for any weight adapter.

        Raises:
            AdapterError: Always.
        """
        raise _nonlinear(self.qualified_name)

    def weight_to_read(self) -> NoReturn:
        """As for any weight adapter.

        Raises:
            AdapterError: Always.
        """
        raise read_error(self.qualified_name, "activation")

    # ---- what was learned

    @torch.no_grad()
    def observe(self, x: Tensor) -> dict[str, float]:
        """relative_output: ||s phi(D M phi(E x))|| / ||W0 x + bias|| over a regular sample of the rows of x."""
        if self.layer.channel_dim != -1:
            x = x[:1]
        else:
            x = x.reshape(-1, x.shape[-1])
            x = x[regular_sample(torch.arange(len(x), device=x.device), _SAMPLE)]
        y, update = self.base(x).float(), self.update(x).float()
        return {"relative_output": (update.norm() / y.norm().clamp_min(torch.finfo(y.dtype).tiny)).item()}

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """relative_product: ||s D M E||_F / ||W0||_F, the size of the update if both phi were the identity."""
        e, d = (t.detach().double() for t in self.pair())
        left = d.to(self.dense_M.device) @ self.dense_M.double()
        e = e.to(left.device)
        squared = ((left.T @ left) * (e @ e.T)).sum().clamp(min=0)
        return {"relative_product": abs(self.scaling) * squared.sqrt().item() / self.base_norm()}

    held_by_update = ("dense_M", *_SHARED)

    @torch.no_grad()
    def low_rank_update(self) -> LowRankUpdate:
        """s D M E: the update if both phi were the identity."""
        e, d = self.pair()
        m = self.dense_M.detach()
        return LowRankUpdate(d.detach().to(m.device) @ m, e.detach().to(m.device), self.scaling)

    def summary(self) -> AdapterSummary:
        """That of s D M E."""
        return replace(super().summary(), note="as if linear")

    def charts(self) -> dict[str, str]:
        """The size of the update beside the layer's output, and of the product of its matrices beside the weight."""
        return {
            "DenseLoRA: ||update|| / ||output||, each layer": each_layer("relative_output"),
            "DenseLoRA: ||s D M E|| / ||W||, mean over layers": mean_over_layers("relative_product"),
        }

    def extra_repr(self) -> str:
        shared = f", E and D shared by {len(self.sharing.layers)} layers" if len(self.sharing.layers) > 1 else ""
        return f"{self.base.extra_repr()}, rank={self.rank}, scaling={self.scaling:g}{shared}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As for any adapter.

        Raises:
            AdapterError: The tensors belong to a layer of another size.
        """
        size = state_dict.get(f"{prefix}dense_size")
        if size is not None and not size.is_meta and size.tolist() != list(self.size):
            found, own = " x ".join(map(str, size.flatten().tolist())), " x ".join(map(str, self.size))
            raise AdapterError(
                f"{self.qualified_name!r} is {own}, and in the file {found}: load it into the model that it was "
                "trained with"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
