"""BitFit: train the biases alone (Ben Zaken et al., ACL 2022, arXiv 2106.10199).

    h = layer(x) with the bias b0 + d

b0 is the pretrained bias and stays frozen; d, of its shape, trains and starts at zero: the start is the pretrained
layer. Where a linear layer has no bias, as in LLaMA, `add_missing` gives it one: h = W0 x + d.

Every module outside the head with a parameter named `bias` has one: linear layers, convolutions, LayerNorm, BatchNorm,
and so on. Other names stay frozen. `nn.MultiheadAttention` reads its biases without calling a layer and is refused; so
is a bias that two modules share. Where LoRA or its kin adapts the weight of the layer, its adapter takes up d: see
`biased.py`. d stays in float32, so in a bfloat16 model steps that are small against b0 add up.
Weight decay draws d to zero, the pretrained bias.

In a merge an added bias becomes a bias of the layer. In a model of transformers the final merge turns on the switches
of its configuration (`attention_bias`, `mlp_bias`, `use_bias`, ...), so that `save_pretrained` and `from_pretrained`
keep it; other layers that a switch gives a bias get zeros. The switches are found by building the model on the meta
device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError, TargetsNotFound
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.bias_switches import add_biases, check_switches
from lit_adapters.methods.biased import BIAS, BiasedAdapter, with_bias
from lit_adapters.methods.channels import is_linear
from lit_adapters.methods.description import each_layer, mean_over_layers
from lit_adapters.methods.matrix_layers import LinearLayer, is_quantised, matrix_layer
from lit_adapters.methods.method import Factory, Method
from lit_adapters.methods.quantised import foreign_quantisation
from lit_adapters.methods.read_weights import reads_weight
from lit_adapters.methods.targets import KEYWORDS, Target, find_targets, head_modules, places
from lit_adapters.values import check_flag


@dataclass
class BitFit(Method):
    """Configuration of BitFit.

    Args:
        targets: "all-biases" (every module outside the head that holds a parameter named `bias`), a list of name
            suffixes, or a regular expression for whole names.
        add_missing: Whether linear layers without a bias get one, trained from zero.
        exclude: Name suffixes of modules to leave alone.

    Raises:
        AdapterError: `targets` is a keyword of other methods, or `add_missing` is no boolean.
    """

    name: ClassVar[str] = "bitfit"
    kind: ClassVar[str] = "linear"

    targets: str | Sequence[str] = "all-biases"
    add_missing: bool = False
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.normalise_targets()
        if isinstance(self.targets, str) and self.targets in KEYWORDS:
            raise AdapterError(
                f"targets {self.targets!r} selects weights; BitFit takes 'all-biases' or names of modules"
            )
        check_flag("add_missing", self.add_missing)

    def find(self, model: nn.Module, train: str | Sequence[str] = ()) -> list[tuple[Target, Factory]]:
        """The modules whose bias trains.

        Warns of biases that `add_missing` adds and a final merge will refuse.

        Args:
            model: Without adapters.
            train: As given to `attach`.

        Raises:
            TargetsNotFound: Nothing matches.
            AdapterError: The bias of a target belongs to another module too.
        """
        wanted = self._all_biases(model)
        if self.targets == "all-biases" and not any(wanted(t) for t in places(model)):
            fix = "it has no linear layer either" if self.add_missing else "add_missing=True gives linear layers a bias"
            raise TargetsNotFound(f"BitFit: no module of {type(model).__name__} outside its head has a bias; {fix}")
        found = find_targets(model, self, train, wanted if self.targets == "all-biases" else None)
        _refuse_shared(model, found)
        try:
            added = [t.name for t in found if is_linear(t.module) and _has_no_bias(t.module)]
            check_switches(model, added if self.add_missing else [])
        except AdapterError as error:  # training is worth it all the same
            warnings.warn(f"BitFit: {error}", stacklevel=4)
        return [(t, partial(self.wrap, t.module, t.name, t.parent)) for t in found]

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> BitFitAdapter:
        """The adapter around one layer.

        Raises:
            AdapterError: The layer has no bias of its own, or one that its parent reads without calling the layer.
        """
        attribute = qualified_name.rpartition(".")[2]
        leave_out = f"leave it out with exclude=[{qualified_name!r}]"
        if isinstance(base, nn.MultiheadAttention):
            raise AdapterError(
                f"{qualified_name!r} is an nn.MultiheadAttention, which reads its biases without calling a layer; "
                f"leave it out with exclude=[{attribute!r}]"
            )
        output = isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear)
        if output or reads_weight(parent, attribute):
            raise AdapterError(f"{type(parent).__name__} reads {qualified_name!r} without calling it; {leave_out}")
        quantised = foreign_quantisation(base)
        if quantised:
            raise AdapterError(
                f"BitFit cannot follow how {qualified_name!r} adds its bias: it is {quantised}; quantise to NF4 (4 "
                f"bit) with bitsandbytes instead, dequantise the model, or {leave_out}"
            )
        if _has_no_bias(base):
            if not self.add_missing:
                raise AdapterError(
                    f"{qualified_name!r} has no bias; add_missing=True gives linear layers one, or {leave_out}"
                )
            return BitFitAdapter(base, qualified_name, matrix_layer(base, qualified_name, "BitFit"))
        if base._parameters.get("bias") is None:
            raise AdapterError(f"the bias of {qualified_name!r} is not a parameter of its own; {leave_out}")
        if any(name.endswith("bias") for child in base.children() for name, _ in child.named_parameters()):
            raise AdapterError(f"{qualified_name!r} holds a bias beside layers with biases of their own; {leave_out}")
        return BitFitAdapter(base, qualified_name)

    def extend(self, adapter: AdapterModule) -> AdapterModule | None:
        """The adapter of a weight, with a change of the bias beside it."""
        return with_bias(adapter)

    def placeholder(
        self, qualified_name: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> BitFitAdapter:
        """An adapter around the bias alone: what is saved tells its size."""
        if BIAS not in tensors:
            raise AdapterError(f"{qualified_name!r}: the file holds no delta_bias")
        base = nn.Module()
        base.bias = nn.Parameter(torch.empty(tensors["delta_bias"].shape, device="meta"))
        return BitFitAdapter(base, qualified_name)

    def check_merge(self, model: nn.Module, merged: Sequence[str]) -> None:
        """Raise if the configuration of a model of transformers has no switch for a bias that merging would add.

        Raises:
            AdapterError: A saved model would lose these biases.
        """
        layers = {n: model.get_submodule(n) for n in merged}
        adapters = {n: a for n, a in layers.items() if isinstance(a, (BitFitAdapter, BiasedAdapter))}
        check_switches(model, [n for n, a in adapters.items() if a.adds_bias])

    def finish_merge(self, model: nn.Module, merged: Sequence[str]) -> None:
        """Turn on the configuration's switches for the added biases; other layers that a switch covers get zeros."""
        if self.add_missing:
            add_biases(model, merged)

    def _all_biases(self, model: nn.Module) -> Callable[[Target], bool]:
        heads = head_modules(model)
        head_parameters = {id(p) for head in heads for p in head.parameters()}
        linear = KEYWORDS["all-linear"](model)  # leaves heads out

        def wanted(t: Target) -> bool:
            if isinstance(t.module, nn.MultiheadAttention):
                return t.module.in_proj_bias is not None and id(t.module.in_proj_bias) not in head_parameters
            bias = t.module._parameters.get("bias")
            if bias is not None:
                return id(bias) not in head_parameters
            missing = self.add_missing and _has_no_bias(t.module) and linear(t)
            return missing and not reads_weight(t.parent, t.attribute)

        return wanted


def _has_no_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is None


def _refuse_shared(model: nn.Module, targets: Sequence[Target]) -> None:
    """Raise if the bias of a target also belongs to another module: two adapters would make two of it."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append((module, f"{name}.{key}" if name else key))
    for target in targets:
        bias = target.module._parameters.get("bias")
        twin = next((n for m, n in holders.get(id(bias), []) if bias is not None and m is not target.module), None)
        if twin is not None:
            raise AdapterError(
                f"'{target.name}.bias' and {twin!r} are one parameter; untie them, or leave both out with exclude"
            )


class BitFitAdapter(AdapterModule):
    """h = layer(x) with the bias b0 + d, for any module with a parameter `bias`; h = W0 x + d where there is none.

    Args:
        base: The module.
        qualified_name: Its name in the model.
        unbiased: How a linear layer without a bias stores its weight; None where there is a bias.
    """

    method = "bitfit"
    merges_into = ("bias",)
    delta_bias: Tensor

    def __init__(self, base: nn.Module, qualified_name: str, unbiased: LinearLayer | None = None) -> None:
        super().__init__(base, qualified_name)
        self.unbiased = unbiased
        if unbiased is None:
            d = torch.empty_like(self.base.bias, requires_grad=False)
        else:
            d = torch.empty(unbiased.size(base)[0], device=self.base.weight.device)
        self.add_parameter(BIAS, d)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.delta_bias)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.in_effect:
            return self.unadapted(*args, **kwargs)
        if self.adds_to_output():
            y = self.base(*args, **kwargs)  # W0 x, or W0 x + b0
            return y + self.delta_bias.to(y.dtype)
        b0: Tensor = self.base.bias
        bias = self.adapted_bias(torch.promote_types(b0.dtype, torch.float32)).to(b0.dtype)  # b0 + d
        return self.call_base_with({"bias": bias}, args, kwargs)

    @property
    def adds_bias(self) -> bool:
        """Whether the layer has no bias of its own."""
        return self.unbiased is not None

    def adds_to_output(self) -> bool:
        """Whether d is added to the output (..., out) of a linear layer, and not to its bias.

        A layer without a bias starts bit for bit so. bitsandbytes casts the bias of a 4-bit layer in place, which a
        computed bias would not survive.
        """
        return self.unbiased is not None or is_quantised(self.base)

    def adapted_bias(self, dtype: torch.dtype) -> Tensor:
        """b0 + d, or d alone, computed in `dtype`."""
        d = self.delta_bias.to(dtype)
        return d if self.unbiased is not None else self.base.bias.to(dtype) + d

    def merged_parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """b0 + d."""
        return {"bias": self.adapted_bias(dtype)}

    def merged_dtype(self, name: str) -> torch.dtype:
        """That of b0; of a new bias, that of the weight, dequantised."""
        return super().merged_dtype(name) if self.unbiased is None else self.unbiased.dtype(self.base)

    def learned_update(self) -> Tensor:
        """The change d of the bias."""
        return self.delta_bias

    def statistics(self) -> dict[str, float]:
        """bias_change: ||d||."""
        return {"bias_change": torch.linalg.vector_norm(self.delta_bias.detach().double()).item()}

    def charts(self) -> dict[str, str]:
        """How far the biases have moved."""
        return {
            "biases: ||d||, mean over layers": mean_over_layers("bias_change"),
            "biases: ||d||, each layer": each_layer("bias_change"),
        }
