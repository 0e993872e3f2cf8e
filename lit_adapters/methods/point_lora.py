"""PointLoRA: LoRA and prompts that blocks share, for transformers of point clouds (CVPR 2025, arXiv 2504.16023).

    layer    h = W0 x + bias + s B A x + P(x)        s = alpha / r; one P for each kind of layer
    block    x + [0, P_patch(x), P_sel(x)]           before the block; 0 for the class token, P_sel for selected tokens

    P(x) = U gelu(V x + v) + u                       V (b, in), U (out, b), b = `bottleneck`

All blocks share each P, and each has its own A and B. A starts Kaiming-uniform(a = sqrt 5), V truncated-normal with
standard deviation 0.02; B, U and the biases start at zero, so that every layer and every block starts as the
pretrained one. (In the published code U starts as V does.)

The third part of the method, tokens that are selected at several scales, changes the sequence of the model, which an
adapter cannot do: `lit_adapters.methods.token_selection` has the scores and the loss, and examples/point_clouds a
transformer that appends the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.errors import AdapterError, TargetsNotFound
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.channels import is_linear
from lit_adapters.methods.description import AdapterSummary, each_layer
from lit_adapters.methods.low_rank import LowRank, LowRankAdapter
from lit_adapters.methods.matrix_layers import matrix_layer
from lit_adapters.methods.method import Factory
from lit_adapters.methods.shared_parameters import (
    SharingAdapter,
    SharingGroup,
    join_layers_of_a_file,
    without_numbers,
)
from lit_adapters.methods.targets import Target, matches, near_misses, places, within
from lit_adapters.methods.weight_adapter import read_error
from lit_adapters.values import check_pattern, check_whole, list_of_names

_PARTS = ("down", "down_bias", "up", "up_bias")  # V, v, U, u
_STD = 0.02
_WIDEST = 1 << 20  # number of channels of a token, in a file


@dataclass
class PointLoRA(LowRank):
    """Configuration of PointLoRA; the settings that are not listed here are those of `LowRank`.

    The defaults are the published settings for Point-MAE.

    Args:
        bottleneck: b, the width of the prompts.
        blocks: The blocks whose input tokens get prompts, as a list of name suffixes or a regular expression for whole
            names; an empty list for none. A block takes tokens (batch, tokens, channels) as its first argument: one
            class token, those of the patches, and the selected ones.
        selected: The number of selected tokens at the end of the sequence; 0 if the model appends none.

    Raises:
        AdapterError: A value is out of range.
    """

    name: ClassVar[str] = "point_lora"
    merges: ClassVar[str] = "no"

    alpha: float = 8.0
    targets: str | Sequence[str] = ("attn.qkv", "attn.proj")
    bottleneck: int = 32
    blocks: str | Sequence[str] = r"(.*\.)?blocks\.\d+"
    selected: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("bottleneck", self.bottleneck)
        check_whole("selected", self.selected, low=0)
        if isinstance(self.blocks, str):
            check_pattern("blocks", self.blocks)
        else:
            self.blocks = list_of_names("blocks", self.blocks)

    def find(self, model: nn.Module, train: str | Sequence[str] = ()) -> list[tuple[Target, Factory]]:
        """The layers as for LoRA, and the blocks.

        Raises:
            AdapterError: A layer is a convolution.
            TargetsNotFound: No layer or no block matches.
        """
        groups: dict[str, SharingGroup] = {}
        found: list[tuple[Target, Factory]] = []
        for block in self._find_blocks(model):
            build = partial(TokenPromptAdapter, block.module, block.name, self, groups.setdefault("", SharingGroup()))
            found.append((block, build))
        for target, _ in super().find(model, train):
            sharing = groups.setdefault(self._kind(target.name, target.module), SharingGroup())
            found.append((target, partial(PointLoRAAdapter, target.module, target.name, self, sharing)))
        return found

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> PointLoRAAdapter:
        """The adapter around one layer by itself, with a prompt of its own."""
        return PointLoRAAdapter(base, qualified_name, self, SharingGroup())

    def placeholder(
        self, qualified_name: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> AdapterModule | None:
        """See `Method.placeholder`. The tensors tell the sizes, and who holds the shared parameters.

        Raises:
            AdapterError: A tensor is missing or damaged.
        """
        if "token_width" not in tensors:
            layer = super().placeholder(qualified_name, tensors, shapes)
            if layer is None or "prompt_down" in tensors:
                return layer
            return PointLoRAAdapter(layer.base, qualified_name, self, SharingGroup(), holder=False)
        width = tensors["token_width"]
        if width.shape != () or width.dtype != torch.int64 or not 0 < width.item() <= _WIDEST:
            raise AdapterError(f"{qualified_name}.token_width is damaged; take an undamaged copy")
        block = nn.Sequential(nn.Linear(int(width.item()), 1, device="meta"))
        return TokenPromptAdapter(block, qualified_name, self, SharingGroup(), holder="patch_down" in tensors)

    def join(self, adapters: Mapping[str, AdapterModule]) -> None:
        """Give the layers of each group the prompts that one of them holds.

        Raises:
            AdapterError: No layer of a group holds them.
        """
        own = {name: adapter for name, adapter in adapters.items() if isinstance(adapter, SharingAdapter)}
        join_layers_of_a_file(
            ("" if isinstance(a, TokenPromptAdapter) else self._kind(n, a.base), a) for n, a in own.items()
        )

    def _find_blocks(self, model: nn.Module) -> list[Target]:
        if not self.blocks:
            return []
        candidates = list(places(model))
        found = [t for t in candidates if matches(t.name, self.blocks) and not within(t.name, tuple(self.exclude))]
        if not found:
            raise TargetsNotFound(
                f"PointLoRA: blocks {self.blocks!r} match no module of {type(model).__name__}."
                f"{near_misses(self.blocks, [t.name for t in candidates])} Set blocks=[] for prompts in layers alone."
            )
        return found

    def _kind(self, qualified_name: str, layer: nn.Module) -> str:
        """What layers that share a prompt have in common: the name in its block, and the size."""
        outputs, inputs = matrix_layer(layer, qualified_name, "PointLoRA").size(layer)
        return f"{without_numbers(qualified_name)} {outputs} x {inputs}"


def _nonlinear(name: str) -> AdapterError:
    return AdapterError(
        f"{name!r}: PointLoRA is nonlinear, and no weight is equal to it; keep the adapter, or use LoRA or DoRA "
        f"there (exclude=[{name!r}])"
    )


def _names(prompt: str) -> list[str]:
    return [f"{prompt}_{part}" for part in _PARTS]


class _Prompting(SharingAdapter):
    """An adapter with prompts P(x) = U gelu(V x + v) + u that its group shares."""

    prompts: Sequence[str] = ()

    def share_prompts(
        self, sharing: SharingGroup, size: tuple[int, int], bottleneck: int, device: Any, holder: bool | None
    ) -> None:
        """Join a group with the prompts `self.prompts`, of `size` (out, in); they are uninitialised."""
        outputs, inputs = size
        shapes = ((bottleneck, inputs), (bottleneck,), (outputs, bottleneck), (outputs,))
        self.shared_names = [name for prompt in self.prompts for name in _names(prompt)]

        def make() -> dict[str, Tensor]:
            new = zip(self.shared_names, shapes * len(self.prompts), strict=True)
            return {name: torch.empty(shape, device=device) for name, shape in new}

        self.join_group(sharing, make, holder)

    def reset_prompts(self) -> None:
        """V truncated-normal, all else zero."""
        for name in self.shared_names if self.is_holder else ():
            if name.endswith("_down"):
                nn.init.trunc_normal_(self.get_parameter(name), std=_STD)
            else:
                nn.init.zeros_(self.get_parameter(name))

    def prompt(self, prompt: str, x: Tensor) -> Tensor:
        """P(x); (..., in) -> (..., out)."""
        down, down_bias, up, up_bias = self.shared_tensors(_names(prompt), like=x)
        return F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias)

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """The biases."""
        return [p for name, p in self.adapter_parameters().items() if name.endswith("_bias")]

    def check_linear(self) -> NoReturn:
        """As for any adapter.

        Raises:
            AdapterError: Always.
        """
        raise _nonlinear(self.qualified_name)

    def weight_to_read(self) -> NoReturn:
        """As for any weight adapter.

        Raises:
            AdapterError: Always.
        """
        raise read_error(self.qualified_name, "prompt")


class PointLoRAAdapter(_Prompting, LowRankAdapter):
    """h = W0 x + bias + s B A x + P(x) for one layer; (..., in) -> (..., out).

    Raises:
        AdapterError: The layer is not a linear layer, or is smaller than the rank.
    """

    method = "point_lora"
    prompts = ("prompt",)

    def __init__(
        self,
        base: nn.Module,
        qualified_name: str,
        config: PointLoRA,
        sharing: SharingGroup,
        holder: bool | None = None,
    ) -> None:
        """See the class.

        Args:
            base: The layer that is adapted.
            qualified_name: Its name in the model.
            config: The settings.
            sharing: The layers that it shares P with.
            holder: Whether this layer holds P; by default if it is the first one.
        """
        super().__init__(base, qualified_name, config)
        if self.layer.channel_dim != -1:
            raise AdapterError(
                f"{qualified_name!r} is a convolution, and prompts are made for tokens; set "
                f"exclude=[{qualified_name!r}]"
            )
        size = self.layer.size(self.base)
        self.share_prompts(sharing, size, config.bottleneck, self.base.weight.device, holder)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As for LoRA, and U zero: the start is the pretrained layer."""
        super().reset_parameters()
        self.reset_prompts()

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_effect:
            return self.unadapted(x)
        if self.can_fuse(x):  # LoRA as LoRA computes it
            y = self.fused(x)
        else:
            y = self.base(x)  # W0 x + bias
            y = y + (self.scaling * self.up(self.down(x))).to(y.dtype)  # s B A x
        return y + self.prompt("prompt", x).to(y.dtype)

    @torch.no_grad()
    def observe(self, x: Tensor) -> dict[str, float]:
        """relative_prompt: ||P(x)|| / ||W0 x + bias|| over the first item of the batch."""
        first = x[:1]
        y, prompt = self.base(first).float(), self.prompt("prompt", first).float()
        return {"relative_prompt": (prompt.norm() / y.norm().clamp_min(torch.finfo(y.dtype).tiny)).item()}

    def summary(self) -> AdapterSummary:
        """That of s B A, as no matrix is equal to the prompt."""
        return replace(super().summary(), note="without the prompt")

    def charts(self) -> dict[str, str]:
        """Those of LoRA, and the size of the prompt beside the layer's output."""
        return super().charts() | {"PointLoRA: ||P(x)|| / ||output||, each layer": each_layer("relative_prompt")}


class TokenPromptAdapter(_Prompting):
    """Prompts on the tokens (batch, tokens, D) that enter a block: P_patch on patches, P_sel on selected tokens.

    Raises:
        AdapterError: The block has no linear layer, which tells the width D of its tokens.
    """

    method = "point_lora"
    token_width: Tensor  # D: a file alone tells the sizes

    def __init__(
        self,
        base: nn.Module,
        qualified_name: str,
        config: PointLoRA,
        sharing: SharingGroup,
        holder: bool | None = None,
    ) -> None:
        """See the class.

        Args:
            base: The block.
            qualified_name: Its name in the model.
            config: The settings.
            sharing: The blocks that it shares the prompts with.
            holder: Whether this block holds them; by default if it is the first one.
        """
        super().__init__(base, qualified_name)
        first = next((m for m in base.modules() if is_linear(m)), None)
        if first is None:
            raise AdapterError(f"{qualified_name!r} has no linear layer; name the blocks of a transformer in `blocks`")
        _, self.width = matrix_layer(first, qualified_name, "PointLoRA").size(first)
        self.selected = config.selected
        self.prompts = ("patch", "selected") if self.selected else ("patch",)
        device = first.get_parameter("weight").device
        self.share_prompts(sharing, (self.width, self.width), config.bottleneck, device, holder)
        self.add_buffer("token_width", torch.empty((), dtype=torch.int64, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U zero: the start is the pretrained block."""
        self.reset_prompts()
        self.token_width.fill_(self.width)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.in_effect:
            return self.unadapted(x, *args, **kwargs)
        return self.base(self.prompted(x), *args, **kwargs)

    def prompted(self, x: Tensor) -> Tensor:
        """The tokens with their prompts, (batch, tokens, D).

        Raises:
            AdapterError: The input has another shape, or too few tokens.
        """
        if x.dim() != 3 or x.shape[2] != self.width or x.shape[1] < 1 + self.selected:
            raise AdapterError(
                f"{self.qualified_name!r} got an input {tuple(x.shape)}, and PointLoRA needs (batch, tokens, "
                f"{self.width}) with a class token and {self.selected} selected tokens; set selected, or blocks=[]"
            )
        cls, patches, selected = x.split([1, x.shape[1] - 1 - self.selected, self.selected], dim=1)
        parts = [cls, patches + self.prompt("patch", patches).to(x.dtype)]
        if self.selected:
            parts.append(selected + self.prompt("selected", selected).to(x.dtype))
        return torch.cat(parts, dim=1)

    def summary(self) -> AdapterSummary:
        """The width of the tokens; the prompts are those of the first block."""
        return AdapterSummary(f"tokens of width {self.width}", note=f"{', '.join(self.prompts)}: shared by all blocks")

    def extra_repr(self) -> str:
        return f"prompts of width {self.width}, shared by {len(self.sharing.layers)} blocks"
