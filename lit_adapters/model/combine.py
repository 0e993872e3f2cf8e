"""Makes one set of adapters of several: updates of weights become LoRA, learned functions NoRA."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lit_adapters.activations.coefficients import PARTS
from lit_adapters.activations.fitting import fit_rational
from lit_adapters.console import text_table
from lit_adapters.errors import AdapterError
from lit_adapters.methods.activation_adapter import ActivationAdapter
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.afa import AFAAdapter
from lit_adapters.methods.biased import BIAS, BiasedAdapter
from lit_adapters.methods.bitfit import BitFit, BitFitAdapter
from lit_adapters.methods.experts import ExpertsAdapter
from lit_adapters.methods.lora import LoRA, LoRAAdapter
from lit_adapters.methods.low_rank import LowRankAdapter
from lit_adapters.methods.method import Method
from lit_adapters.methods.nora import PRESET_RANGE, NoRA, NoRAActivation
from lit_adapters.methods.targets import exactly
from lit_adapters.methods.weight_adapter import WeightAdapter
from lit_adapters.model.adapter_sets import rejoin, sets_of
from lit_adapters.model.attach import attach, detach
from lit_adapters.model.named import in_use, use
from lit_adapters.model.record import adapters, inner
from lit_adapters.ops.rational import rational_reference
from lit_adapters.ops.statistics import drift
from lit_adapters.values import check_choice, check_number, check_whole

Rule = Literal["linear", "ties", "dare"]


@dataclass(frozen=True)
class CombineReport:
    """How far the combined adapters are from what was asked for; `print` shows a table.

    Attributes:
        weights: ||dW - s B A||_F / ||dW||_F by the name of the layer; 0 where there is no update.
        functions: The same for the change of the functions of an activation, weighted by the density of its inputs; of
            the group that fits worst.
        rank: The largest rank of the pairs; 0 if there are none.
    """

    weights: dict[str, float] = field(default_factory=dict)
    functions: dict[str, float] = field(default_factory=dict)
    rank: int = 0

    def __str__(self) -> str:
        rows = [("layer", "error"), *((n, f"{error:.2e}") for n, error in (self.weights | self.functions).items())]
        text = text_table(rows)
        if self.weights:
            text += f"\nLoRA of rank {self.rank}; the largest error of an update is {max(self.weights.values()):.2e}"
        if self.functions:
            text += f"\nthe largest error of a change of functions is {max(self.functions.values()):.2e}"
        return text


def combine(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    name: str,
    rule: Rule = "linear",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> CombineReport:
    """Make new adapters `name` of others, and use them; the others stay.

    With the update dW_i of a layer by the i-th adapter and its weight w_i, the new update is

        linear  sum_i w_i dW_i
        ties    of each w_i dW_i the largest entries, a share `density` of them; then for each entry the sign of their
                sum, and the mean of those that have it (Yadav et al., arXiv 2306.01708)
        dare    sum_i w_i dW_i with a share 1 - `density` of the entries of each dW_i set to zero, at random, and the
                others divided by `density` (Yu et al., arXiv 2311.03099)

    It is kept as LoRA, cut to `rank` by a singular value decomposition. Biases are combined by the same rule. Changes
    of learned functions add up, sum_i w_i (phi_i - phi_0), under every rule, as a function has no entries to leave out;
    NoRA with coefficients of its own (rank=None) is fitted to the sum on the inputs of the first adapter.

    Args:
        model: The module given to `attach`.
        names: The adapters to combine.
        weights: w_i, one for each; by default 1.
        name: The name of the new adapters.
        rule: How updates of weights are combined.
        rank: r of the new LoRA. By default that of a linear sum of LoRA or AFA-LoRA, which is then exact.
        density: For "ties" and "dare": the share of entries kept, in (0, 1].
        seed: For "dare".

    Returns:
        The errors; `print` shows a table.

    Raises:
        AdapterError: There are no adapters of a name, `name` is taken, an argument is out of range, `rank` is missing;
            or the adapters train base parameters, have a method whose effect is neither an update nor a function
            (DenseLoRA, peft's), adapt experts, or are nonlinear at present (AFA-LoRA before the end of its annealing).
            The model is then as before.
    """
    factors = [1.0] * len(names) if weights is None else list(weights)
    if isinstance(names, str) or not names or len(factors) != len(names):
        raise AdapterError(f"give a list of names, and one weight for each; {names!r} have {len(factors)} weights")
    for factor in factors:
        check_number("weights", factor)
    check_choice("rule", rule, get_args(Rule))
    check_number("density", density, low=0.0, high=1.0)
    if density == 0:
        raise AdapterError("density 0 would leave nothing; it must be above 0 and at most 1")
    if rank is not None:
        check_whole("rank", rank)
    model, sets = inner(model), sets_of(model)
    if name in sets.by_name:
        raise AdapterError(f"the model already has adapters called {name!r}; choose another name")
    places: dict[str, list[tuple[float, AdapterModule]]] = {}
    for factor, key in zip(factors, names, strict=True):
        chosen = sets.get(key)
        if chosen.state.trained_parameters:
            raise AdapterError(
                f"the adapters {key!r} train {chosen.state.trained_parameters[0]!r}, which has no pretrained value to "
                "add changes to; combine adapters without `train`"
            )
        for adapter in {id(a): a for _, a in chosen.placed}.values():
            places.setdefault(adapter.qualified_name, []).append((factor, adapter))
    before = in_use(model)
    use(model, [])
    try:
        for key in names:
            rejoin(model, sets.get(key).placed)  # on the device of the model
        return _combined(model, places, name, _Rules(rule, density, torch.Generator().manual_seed(seed)), rank)
    except BaseException:
        if name in sets.by_name:
            detach(model, name)
        use(model, before)
        raise


def _combined(
    model: nn.Module,
    places: Mapping[str, Sequence[tuple[float, AdapterModule]]],
    name: str,
    rules: _Rules,
    rank: int | None,
) -> CombineReport:
    """Attach the new adapters and give them their values."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    functions: dict[str, _Functions] = {}
    weight_errors: dict[str, float] = {}
    for place, parts in tqdm(places.items(), desc="combining", unit="layer", leave=False, disable=None):
        of_functions = [(w, a) for w, a in parts if isinstance(a, ActivationAdapter)]
        if len(of_functions) == len(parts):
            functions[place] = _Functions(of_functions)
            continue
        for _, adapter in parts:
            if isinstance(adapter, ExpertsAdapter):
                raise AdapterError(f"{place!r} holds weights of experts, which are not combined; exclude them")
            if not isinstance(adapter, (WeightAdapter, BitFitAdapter)):
                raise AdapterError(f"{place!r} has {adapter.method}, which is neither an update nor a function")
            adapter.check_linear()
        of_weight = [(w, a) for w, a in parts if isinstance(a, WeightAdapter)]
        if of_weight:
            pairs[place], weight_errors[place] = rules.pair(place, of_weight, rank)
        of_bias = [(w, a.get_parameter(BIAS)) for w, a in parts if isinstance(a, (BitFitAdapter, BiasedAdapter))]
        if of_bias:
            biases[place] = rules.combined([(w, d.detach().double()) for w, d in of_bias])
    attach(model, _methods(model, pairs, biases, functions), name=name)
    report = CombineReport(weight_errors, {}, max((len(a) for a, _ in pairs.values()), default=0))
    with torch.no_grad():
        for place, adapter in adapters(model):
            if place in pairs:
                a, b = pairs[place]
                adapter.lora_A.copy_(a)  # type: ignore[operator]
                adapter.lora_B.copy_(b / adapter.scaling)  # type: ignore[operator]
            if place in biases:
                adapter.get_parameter(BIAS).copy_(biases[place])
            if place in functions:
                assert isinstance(adapter, NoRAActivation)
                report.functions[place] = functions[place].write(adapter)
            adapter.clear_caches()
    return report


def _methods(
    model: nn.Module,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    biases: Mapping[str, Tensor],
    functions: Mapping[str, _Functions],
) -> list[Method]:
    """The methods of the new adapters, with their places as targets."""
    methods: list[Method] = []
    if pairs:
        ranks = {place: len(a) for place, (a, _) in pairs.items()}
        ((common, _),) = Counter(ranks.values()).most_common(1)
        pattern = {re.escape(place): r for place, r in ranks.items() if r != common}
        targets = exactly(list(pairs), model)
        methods.append(LoRA(common, float(common), targets=targets, rank_pattern=pattern or None))
    if biases:
        methods.append(BitFit(exactly(list(biases), model), add_missing=True))
    if functions:
        alike: dict[tuple[Any, ...], list[str]] = {}  # NoRA has one setting for all its places
        for place, function in functions.items():
            alike.setdefault(function.settings, []).append(place)
        for group in alike.values():
            methods.append(functions[group[0]].method(exactly(group, model)))
    return methods


@dataclass
class _Rules:
    """How updates are combined."""

    rule: Rule
    density: float
    generator: torch.Generator

    def combined(self, updates: Sequence[tuple[float, Tensor]]) -> Tensor:
        """One update of several of the same shape, each with its weight; float64."""
        weighted = [w * self._thinned(update) for w, update in updates]
        total = torch.stack(weighted).sum(0)
        if self.rule != "ties":
            return total
        agreeing = [torch.where(update.sign() == total.sign(), update, 0.0) for update in weighted]
        count = sum((update != 0).double() for update in agreeing)
        return sum(agreeing) / torch.as_tensor(count).clamp_min(1.0)  # type: ignore[no-any-return]

    def _thinned(self, update: Tensor) -> Tensor:
        if self.rule == "linear":
            return update
        if self.rule == "dare":
            chance = torch.rand(update.shape, generator=self.generator).to(update.device)
            return torch.where(chance < self.density, update / self.density, 0.0)
        kept = math.ceil(self.density * update.numel())
        smallest = update.abs().flatten().kthvalue(update.numel() - kept + 1).values
        return torch.where(update.abs() >= smallest, update, 0.0)

    @torch.no_grad()
    def pair(
        self, place: str, parts: Sequence[tuple[float, WeightAdapter]], rank: int | None
    ) -> tuple[tuple[Tensor, Tensor], float]:
        """A and B of the combined update of one layer, and the relative error of cutting it to the rank.

        Raises:
            AdapterError: `rank` is missing.
        """
        exact = self.rule == "linear" and all(isinstance(a, (LoRAAdapter, AFAAdapter)) for _, a in parts)
        if exact:
            left, right = _factors(parts)  # type: ignore[arg-type]
            (ql, rl), (qr, rr) = torch.linalg.qr(left), torch.linalg.qr(right.T)
            u, s, vh = torch.linalg.svd(rl @ rr.T, full_matrices=False)
            u, vh = ql @ u, vh @ qr.T
        elif rank is None:
            raise AdapterError(
                f"the combined update of {place!r} has no small rank of its own; give the rank of the new LoRA, such "
                "as rank=32 (the error of each layer is reported)"
            )
        else:
            update = self.combined([(w, a.delta_weight(torch.float64)) for w, a in parts])
            u, s, vh = torch.linalg.svd(update, full_matrices=False)
        kept = min(rank or len(s), len(s))
        root = s[:kept].sqrt()
        pair = (root[:, None] * vh[:kept]).float(), (u[:, :kept] * root).float()
        size = torch.linalg.vector_norm(s).item()
        return pair, torch.linalg.vector_norm(s[kept:]).item() / size if size > 0 else 0.0


def _factors(parts: Sequence[tuple[float, LowRankAdapter]]) -> tuple[Tensor, Tensor]:
    """Left (out, R) and right (R, in), whose product is sum_i w_i s_i B_i A_i; R is the sum of the ranks."""
    left = [w * a.scaling * a.left_factor(torch.float64) for w, a in parts]
    return torch.cat(left, 1), torch.cat([a.right_factor(torch.float64) for _, a in parts])


class _Functions:
    """The functions of one activation: the sum of what several adapters have changed.

    Args:
        parts: The adapters with their weights. The fit and the density of inputs of the first one are taken.

    Attributes:
        first: The first adapter.
        groups: The least number of functions that can hold the sum.
    """

    def __init__(self, parts: Sequence[tuple[float, ActivationAdapter]]) -> None:
        self._parts = parts
        self._values: dict[int, Tensor] = {}  # of the sum, by the number of points
        self.first = parts[0][1]
        self.groups = math.lcm(*(a.groups for _, a in parts))

    @property
    def _config(self) -> NoRA:
        return self.first.config if isinstance(self.first, NoRAActivation) else NoRA(base="anchored")

    @property
    def settings(self) -> tuple[Any, ...]:
        """What places must have in common to be of one method."""
        c = self._config
        return (self.groups, c.degrees, c.denominator, c.base, c.fit_range, c.scaling, c.scale, self.first.channel_dim)

    def method(self, targets: list[str] | str) -> NoRA:
        """NoRA that can hold the sum, for these places."""
        return replace(
            self._config,
            groups=self.groups,
            rank=None,
            fit_range=PRESET_RANGE if isinstance(self._config.fit_range, str) else self._config.fit_range,
            targets=targets,
            exclude=(),
            channel_dim=self.first.channel_dim,
        )

    def change(self, x: Tensor, groups: int) -> Tensor:
        """sum_i w_i (phi_i - phi_0) at x (D,): (groups, D)."""
        changes = [w * a.learned_change(x).repeat_interleave(groups // a.groups, 0) for w, a in self._parts]
        return torch.stack(changes).sum(0)

    @torch.no_grad()
    def write(self, adapter: NoRAActivation) -> float:
        """Fit the coefficients of `adapter` to the sum, and return the relative error of the worst group."""
        names = ["grid_range", "density"]
        if isinstance(self.first, NoRAActivation):
            names += ["fit_range", "base_numerator", "base_denominator", "numerator_scale", "denominator_scale"]
        for name in ("calibrated", *names):
            adapter.get_buffer(name).copy_(self.first.get_buffer(name))
        config = adapter.config
        a0, b0 = (c[:1].double().cpu() for c in adapter.base_coefficients())
        grid, density = adapter.grid(), adapter.density.double().cpu()

        def wanted(group: int, x: Tensor) -> Tensor:
            """One function at x; all are computed at once, as the points of the fit are the same for each."""
            if len(x) not in self._values:
                start = rational_reference(x[:, None], a0, b0, config.denominator)[:, 0]
                self._values[len(x)] = start + self.change(x, adapter.groups)
            return self._values[len(x)][group]

        change = self.change(grid, adapter.groups)
        for group in change.any(1).nonzero()[:, 0].tolist():
            fit = fit_rational(
                partial(wanted, group),
                (grid[0].item(), grid[-1].item()),
                config.degrees,
                config.denominator,
                density,
            )
            for part, values, start in zip(PARTS, (fit.numerator, fit.denominator), (a0, b0), strict=True):
                delta = adapter.get_parameter(f"{part}_delta")
                scale = adapter.get_buffer(f"{part}_scale")
                delta[group] = (torch.tensor(values, dtype=torch.float64) - start[0]).to(scale) / scale
        adapter.clear_caches()
        nothing = torch.zeros_like(grid)
        error = drift(adapter.learned_change(grid) - change, nothing, density).l2
        size = drift(change, nothing, density).l2
        return (error / size.clamp_min(torch.finfo(torch.float64).tiny)).max().item()
