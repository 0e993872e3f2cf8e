"""VeRA: vectors around one frozen random pair that all layers share (Kopiczko et al., ICLR 2024, arXiv 2310.11454).

         x ──── W0 (frozen) ──────────────────────────────┐
         │                                                + ── h
         └── A (r, in) ── * d (r,) ── B (out, r) ── * b (out,)

    h = W0 x + Lambda_b B Lambda_d A x        Lambda_d = diag(d), Lambda_b = diag(b)

A and B are frozen and Kaiming-uniform. They are drawn once, from the seed, for the largest layer: A (r, largest in),
B (largest out, r); each layer takes the leading columns of A and rows of B. d starts from `d_initial`, b from zero: the
start is the pretrained layer. r + out parameters a layer.

The pair is in no file, as it follows from the seed and the sizes of the largest layer, which files hold; it is the same
on every machine. With the same seed and the same layers it is that of peft up to one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.errors import AdapterError, shown
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.description import LowRankUpdate, each_layer, mean_over_layers
from lit_adapters.methods.matrix_layers import matrix_layer
from lit_adapters.methods.method import Factory, Method
from lit_adapters.methods.targets import Target, find_targets
from lit_adapters.methods.weight_adapter import WeightAdapter
from lit_adapters.ops._context import autocast_dtype, transformed
from lit_adapters.ops.cache import may_represent_others
from lit_adapters.values import check_factor, check_probability, check_whole

_MOST_RANK = 1 << 16
_MOST_ELEMENTS = 1 << 28  # of a frozen matrix


@dataclass
class VeRA(Method):
    """Configuration of VeRA.

    Args:
        rank: The rank r of the frozen pair; it may exceed the sizes of the layers.
        d_initial: The value that d starts from.
        seed: The seed that the frozen pair is drawn from. Files hold the seed in place of the pair.
        dropout: The probability of zeroing an input of the update while training.
        targets: The keyword "all-linear" (every plain linear layer but the head), a list of name suffixes, or a
            regular expression for whole names; convolutions and heads are reached by name.
        exclude: Name suffixes of modules to leave alone.

    Raises:
        AdapterError: A value is out of range.
    """

    name: ClassVar[str] = "vera"
    kind: ClassVar[str] = "linear"

    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.normalise_targets()
        check_whole("rank", self.rank, high=_MOST_RANK)
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise AdapterError(f"seed {shown(self.seed)} must be a whole number, at least 0 and below 2^63")
        check_factor("d_initial", self.d_initial)
        check_probability("dropout", self.dropout)

    def find(self, model: nn.Module, train: str | Sequence[str] = ()) -> list[tuple[Target, Factory]]:
        """As for any method; the pair is drawn for the largest of the layers found.

        Raises:
            AdapterError: A layer holds no weight matrix.
            TargetsNotFound: Nothing matches.
        """
        targets = find_targets(model, self, train)
        sizes = [matrix_layer(t.module, t.name, "VeRA", needs_weight=False).size(t.module) for t in targets]
        pair = FrozenPair(self.seed, self.rank, max(outs for outs, _ in sizes), max(ins for _, ins in sizes))
        return [(t, partial(VeRAAdapter, t.module, t.name, self, pair)) for t in targets]

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> VeRAAdapter:
        """The adapter around one layer by itself, with a pair that is drawn for its sizes."""
        return VeRAAdapter(base, qualified_name, self)

    def placeholder(
        self, qualified_name: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> AdapterModule:
        """As for any method; the file holds the sizes of the layer.

        Raises:
            AdapterError: The sizes are missing.
        """
        if "vera_sizes" not in tensors:
            raise AdapterError(f"{qualified_name!r} lacks vera_sizes")
        _check_sizes(qualified_name, tensors["vera_sizes"], self.rank)
        outputs, inputs = tensors["vera_sizes"][1].tolist()
        layer = nn.Linear(inputs, outputs, bias=False, device="meta")
        return self.wrap(layer, qualified_name, nn.Module())


def _check_sizes(name: str, sizes: Tensor, rank: int) -> None:
    """Check the sizes that a file holds for a layer, before a pair is drawn for them.

    Raises:
        AdapterError: They are no two pairs of sizes, the layer is larger than the largest, or the pair would be huge.
    """
    valid = sizes.shape == (2, 2) and sizes.dtype == torch.int64
    if not valid or not ((sizes > 0) & (sizes[1] <= sizes[0]) & (sizes <= _MOST_ELEMENTS // rank)).all():
        raise AdapterError(
            f"{name}.vera_sizes is {shown(sizes.tolist())}, and must hold the sizes of the largest layer and of this "
            "one; take an undamaged copy"
        )


class FrozenPair:
    """The pair A (r, in), B (out, r) of a seed, and what the layers of a model take of it.

    It is drawn on the CPU, where the numbers are the same on every machine. All layers of a model share one pair in
    float32 on each device that they have been on, the CPU included, and one copy in the dtype that they compute in.
    Each takes memory for r (largest in + largest out) numbers, whatever the number of layers: 22 MB in float32 for
    r = 256 and LLaMA-2 7B (11008 x 4096 and 4096 x 11008). A copy of a model draws its own pair.

    Args:
        seed: What the generator starts from.
        rank: The rank r.
        outputs: The largest number of outputs of a layer.
        inputs: The largest number of inputs of a layer.
    """

    def __init__(self, seed: int, rank: int, outputs: int, inputs: int) -> None:
        self.seed, self.rank, self.size = seed, rank, (outputs, inputs)
        self._pairs: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._slices: dict[tuple[int, int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._others: dict[tuple[int, int], FrozenPair] = {}

    def __reduce__(self) -> tuple[Callable[..., FrozenPair], tuple[int, ...]]:
        return FrozenPair, (self.seed, self.rank, *self.size)

    def of_size(self, outputs: int, inputs: int) -> FrozenPair:
        """The pair of the same seed and rank for other sizes."""
        if (outputs, inputs) == self.size:
            return self
        if (outputs, inputs) not in self._others:
            self._others[outputs, inputs] = FrozenPair(self.seed, self.rank, outputs, inputs)
        return self._others[outputs, inputs]

    def draw(self) -> tuple[Tensor, Tensor]:
        """A, B in float32 on the CPU: Kaiming-uniform for a ReLU, +-sqrt(6 / columns), as in the paper's code."""
        generator = torch.Generator().manual_seed(self.seed)
        outputs, inputs = self.size

        def kaiming(rows: int, columns: int) -> Tensor:
            u = torch.rand(rows, columns, generator=generator, dtype=torch.float32, device="cpu")
            return (2 * u - 1) * math.sqrt(6 / columns)  # 2 u - 1 is exact: one rounding, the same everywhere

        return kaiming(self.rank, inputs), kaiming(outputs, self.rank)

    def of_layer(
        self, size: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """A (r, in), B (out, r) of a layer (out, in): views, the same ones for all layers of this size."""
        key = (*size, device, dtype)
        if key not in self._slices:
            a, b = self._on(device, dtype)
            slices = a[:, : size[1]], b[: size[0]]
            if may_represent_others():
                return slices
            self._slices[key] = slices
        return self._slices[key]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if (device, dtype) not in self._pairs:
            if device.type == "meta":
                outputs, inputs = self.size
                a, b = torch.empty(self.rank, inputs, device="meta"), torch.empty(outputs, self.rank, device="meta")
            elif dtype != torch.float32:
                a, b = self._on(device, torch.float32)
            elif device.type != "cpu":
                a, b = self._on(torch.device("cpu"), torch.float32)
            else:
                a, b = self.draw()
            pair = a.to(device, dtype), b.to(device, dtype)
            if may_represent_others():
                return pair
            self._pairs[device, dtype] = pair
        return self._pairs[device, dtype]


class VeRAAdapter(WeightAdapter):
    """h = W0 x + Lambda_b B Lambda_d A x for one layer; (..., in) -> (..., out).

    Raises:
        AdapterError: The layer has no weight matrix, or is a convolution in groups.
    """

    method = "vera"
    needs_weight = False
    vera_lambda_d: nn.Parameter
    vera_lambda_b: nn.Parameter
    vera_A: Tensor
    vera_B: Tensor
    vera_sizes: Tensor  # [[largest out, largest in], [out, in]]: the pair can be drawn again from a file alone

    def __init__(self, base: nn.Module, qualified_name: str, config: VeRA, pair: FrozenPair | None = None) -> None:
        super().__init__(base, qualified_name)
        if not self.layer.low_rank:
            raise AdapterError(
                f"{qualified_name!r} is a convolution in groups, which no pair of convolutions of rank r can follow; "
                f"use LoRAN, which works on the weight, or set exclude=[{qualified_name!r}]"
            )
        self.rank, self.d_initial, self.dropout = config.rank, config.d_initial, config.dropout
        self.size = self.layer.size(self.base)
        self.pair = pair or FrozenPair(config.seed, config.rank, *self.size)
        device = self.layer.device(self.base)
        self.add_parameter("vera_lambda_d", torch.empty(config.rank, device=device))
        self.add_parameter("vera_lambda_b", torch.empty(self.size[0], device=device))
        self.add_buffer("vera_sizes", torch.empty(2, 2, dtype=torch.int64, device=device))
        a, b = self.pair.of_layer(self.size, device)
        self.add_buffer("vera_A", a, persistent=False)
        self.add_buffer("vera_B", b, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """d = d_initial, b = 0: the start is the pretrained layer."""
        nn.init.constant_(self.vera_lambda_d, self.d_initial)
        nn.init.zeros_(self.vera_lambda_b)
        self.vera_sizes.copy_(torch.tensor([self.pair.size, self.size]))
        self.recompute_buffers()

    def recompute_buffers(self) -> None:
        """A and B, those that all layers share."""
        self.vera_A, self.vera_B = self.pair.of_layer(self.size, self.vera_lambda_d.device)

    # ---- the formula

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_effect:
            return self.unadapted(x)
        y = self.base(x)  # W0 x + bias
        a, b = self.frozen(x)
        z = self.layer.down(self.base, F.dropout(x, self.dropout, self.training), a)  # A x
        z = self.layer.per_channel(self.base, self.vera_lambda_d.to(z.dtype)) * z
        update = self.layer.up(self.base, z, b)
        update = self.layer.per_channel(self.base, self.vera_lambda_b.to(update.dtype)) * update
        return y + update.to(y.dtype)

    def frozen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A (r, in), B (out, r) in the dtype that products with x have; all layers share what is cast.

        Otherwise each layer would keep a cast pair of its own from the forward to the backward.
        """
        dtype = x.dtype if x.dtype == torch.float64 else autocast_dtype(x) or x.dtype
        if dtype == self.vera_A.dtype or torch.compiler.is_compiling() or transformed():
            return self.vera_A.to(dtype), self.vera_B.to(dtype)
        return self.pair.of_layer(self.size, self.vera_A.device, dtype)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Lambda_b B (out, r) and Lambda_d A (r, in) in `dtype`."""
        left = self.vera_lambda_b.to(dtype)[:, None] * self.vera_B.to(dtype)
        return left, self.vera_lambda_d.to(dtype)[:, None] * self.vera_A.to(dtype)

    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Lambda_b B Lambda_d A, (out, in)."""
        left, right = self.factors(dtype)
        return left @ right

    # ---- the pair follows the layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterModule:
        """Take the shared pair of the new device: what was moved is this layer's own copy, or empty."""
        super()._apply(fn, recurse)
        self.recompute_buffers()
        return self

    def rejoin(self, device: torch.device | None) -> None:
        """Take the shared pair of the device."""
        super().rejoin(device)
        self.recompute_buffers()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the pair that the file was trained with, also where the largest layer of the model is another one."""
        sizes = state_dict.get(f"{prefix}vera_sizes")
        if sizes is not None and not sizes.is_meta:
            _check_sizes(self.qualified_name, sizes, self.pair.rank)
            largest, size = sizes.tolist()
            if tuple(size) != self.size:
                raise AdapterError(
                    f"{self.qualified_name!r} is {self.size[0]} x {self.size[1]}, and in the file {size[0]} x "
                    f"{size[1]}: load it into the model that it was trained with"
                )
            self.pair = self.pair.of_size(*largest)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.recompute_buffers()

    # ---- what was learned

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """relative_norm: ||Lambda_b B Lambda_d A||_F / ||W0||_F, from r x r products alone."""
        left, right = self.factors(torch.float64)
        squared = ((left.T @ left) * (right @ right.T)).sum().clamp(min=0)
        return self.relative_norm(squared.sqrt().item())

    held_by_update = ("vera_lambda_d", "vera_lambda_b")

    def low_rank_update(self) -> LowRankUpdate:
        """Lambda_b B Lambda_d A."""
        left, right = self.factors(torch.float32)
        return LowRankUpdate(left.detach(), right.detach(), 1.0)

    def charts(self) -> dict[str, str]:
        """The size of the update, relative to the pretrained weight."""
        return {
            "weights: ||dW|| / ||W||, mean over layers": mean_over_layers("relative_norm"),
            "weights: ||dW|| / ||W||, each layer": each_layer("relative_norm"),
        }

    def extra_repr(self) -> str:
        return f"{self.base.extra_repr()}, rank={self.rank}, seed={self.pair.seed}"
