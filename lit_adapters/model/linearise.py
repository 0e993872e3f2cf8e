"""Takes learned activations out of a model again, and lets low-rank corrections of matrices stand in for them.

A layer computes y = W f(h), with a learned activation f (NoRA, GroupAffine) before its matrix W. `linearise` puts the
pretrained activation g back, and fits a correction of rank r by least squares on data:

    min over A (r, in), B (out, r) of  sum ||y - W z - B A z||^2      z: the input of W once g is back

The solution is that of reduced-rank regression: with the ridge regression D (out, in) of y - W z on z, and V (out, r)
the leading eigenvectors of the covariance of its fitted values, B = V and A = V^T D. Layers are corrected in the order
in which the model calls them, and each z comes from the model that is corrected so far, so that a layer also makes up
for what the layers before it could not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from lit_adapters.console import text_table
from lit_adapters.errors import AdapterError
from lit_adapters.methods.adapter_module import AdapterModule
from lit_adapters.methods.biased import BiasedAdapter
from lit_adapters.methods.channels import is_linear
from lit_adapters.methods.lora import LoRAAdapter
from lit_adapters.methods.matrix_layers import matrix_layer
from lit_adapters.model.as_lora import install_lora
from lit_adapters.model.meta import require_loaded
from lit_adapters.model.modes import call, evaluating
from lit_adapters.model.record import adapters, inner
from lit_adapters.model.sharding import refuse_sharded
from lit_adapters.ops.statistics import regular_sample
from lit_adapters.values import check_whole

_RIDGE = 1e-4  # of the mean variance of the inputs
_SAMPLE = 4096  # values of an input that are compared
_HELD_OUT = 4  # every fourth batch


@dataclass(frozen=True)
class Correction:
    """What became of one learned activation; errors are relative root mean squares on batches outside the fit.

    Attributes:
        activation: Its name.
        matrix: The layer that is corrected.
        replaced: ||y - W z|| / ||y|| with the pretrained activation back, and no correction of this layer.
        corrected: The same with the correction.
    """

    activation: str
    matrix: str
    replaced: float
    corrected: float


@dataclass(frozen=True)
class LinearisationReport:
    """What `linearise` did; `print` shows a table.

    Attributes:
        corrections: One for each learned activation, in the order in which the model calls them.
        rank: Of the corrections.
        replaced: ||o - o'|| / ||o|| of the model's outputs, o with the learned activations and o' with the pretrained
            ones instead, on batches outside the fit.
        corrected: The same with all corrections.
    """

    corrections: list[Correction] = field(default_factory=list)
    rank: int = 0
    replaced: float = 0.0
    corrected: float = 0.0

    @property
    def recovered(self) -> float:
        """The share of the learned activations' effect on the outputs that the corrections have, by energy.

        1 minus the square of corrected / replaced. It is negative where corrections do harm.
        """
        return 1 - (self.corrected / self.replaced) ** 2 if self.replaced > 0 else 1.0

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("activation", "corrected matrix", "error, pretrained", "error, corrected")]
        rows += [(c.activation, c.matrix, f"{c.replaced:.2%}", f"{c.corrected:.2%}") for c in self.corrections]
        return (
            f"{text_table(rows)}\n"
            f"outputs: error {self.replaced:.2%} with the pretrained activations, {self.corrected:.2%} with "
            f"corrections of rank {self.rank}, which have {self.recovered:.0%} of the effect"
        )


def linearise(
    model: nn.Module, batches: Iterable[Any], rank: int, run: Callable[[Any], Any] | None = None
) -> LinearisationReport:
    """Replace the learned activations of a trained model by the pretrained ones and LoRA of the next matrices.

    The result has LoRA alone: it merges into weights, and `export_peft` writes it. A LoRA that is there (of NoRA++)
    becomes part of it, with the ranks added. A nonlinear change cannot be expressed by a matrix in general; the report
    says how much of it is lost. See the head of this module for the equations.

    Args:
        model: An adapted model after training; changed in place.
        batches: At least two, of training data. Every fourth, or the last of fewer, is for the errors of the report.
            They should hold several times as many inputs of a layer as this has channels.
        rank: r.
        run: As for `lit_adapters.calibrate`; it returns the model's output.

    Returns:
        The errors; `print` shows a table.

    Raises:
        AdapterError: The model has no learned activation, or adapters of matrices other than LoRA; there are fewer than
            two batches; no matrix follows an activation, or it is not a plain linear layer or is smaller than the rank;
            or the model is sharded, merged or on the meta device. The model is then as before.
    """
    check_whole("rank", rank)
    model = inner(model)
    refuse_sharded(model, "linearising")
    require_loaded(model, "linearising")
    found = dict(adapters(model))
    functions = {name: a for name, a in found.items() if a.learned_functions() is not None}
    if not functions:
        raise AdapterError(f"{type(model).__name__} has no learned activations; linearise is for NoRA and its kin")
    for name, adapter in found.items():
        if adapter.merged:
            raise AdapterError(f"{name!r} is merged; call lit_adapters.unmerge(model) first")
        is_lora = isinstance(adapter, LoRAAdapter) and not adapter.subtracts and not isinstance(adapter, BiasedAdapter)
        if name not in functions and not is_lora:
            beside = " and bitfit" if isinstance(adapter, BiasedAdapter) else ""
            raise AdapterError(
                f"{name!r} has {adapter.method}{beside}, to which no correction can be added; linearise takes NoRA and "
                "GroupAffine alone or with LoRA (start='zero')"
            )
    all_batches = list(batches)
    if len(all_batches) < 2:
        raise AdapterError("linearise needs at least two batches, one of them to measure errors with; give more")
    held = all_batches[_HELD_OUT - 1 :: _HELD_OUT] or all_batches[-1:]
    fitting = [b for i, b in enumerate(all_batches) if i % _HELD_OUT != _HELD_OUT - 1]
    fitting = fitting if len(all_batches) >= _HELD_OUT else all_batches[:-1]

    student = _Student(model, functions, run or partial(call, model))
    with evaluating(model), torch.no_grad():
        plan = student.plan(all_batches[0], rank)
        corrections = []
        for name, matrix in tqdm(plan, desc="linearising", unit="layer", leave=False, disable=None):
            statistics = _Statistics()
            for batch in fitting:
                statistics.add(*student.residual(name, matrix, batch))
            student.pairs[matrix] = statistics.solve(rank)
            corrections.append(student.measure(name, matrix, held))
            student.replaced.add(name)
        replaced, corrected = student.measure_outputs(held)
    _install(model, student.pairs)
    return LinearisationReport(corrections, rank, replaced, corrected)


class _Reached(Exception):
    """The layer that is looked at has been called; the rest of the pass is not needed."""


class _Student:
    """The model with some of its activations replaced and some of its matrices corrected.

    Args:
        model: With its adapters.
        functions: The learned activations by name.
        run: Passes a batch through the model.

    Attributes:
        replaced: The activations that are the pretrained ones by now.
        pairs: A (r, in) and B (out, r) by the name of the matrix.
    """

    def __init__(self, model: nn.Module, functions: Mapping[str, AdapterModule], run: Callable[[Any], Any]) -> None:
        self._functions = functions
        self._run = run
        self._layers = {n: m for n, m in model.named_modules() if is_linear(getattr(m, "base", m))}
        self.replaced: set[str] = set()
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}

    def plan(self, batch: Any, rank: int) -> list[tuple[str, str]]:
        """The activations in the order of their calls, each with the first matrix whose input depends on it.

        Raises:
            AdapterError: There is none, two activations have the same, the rank is above its size, or which layers are
            called depends on values.
        """
        order: list[str] = []
        handles = [a.register_forward_hook(lambda *_, n=n: order.append(n)) for n, a in self._functions.items()]
        try:
            usual = self._inputs(batch)
        finally:
            for handle in handles:
                handle.remove()
        called = Counter(layer for layer, _ in usual)
        if idle := [name for name in self._functions if name not in order]:
            raise AdapterError(f"{idle[0]!r} did not run; give batches that pass through every adapter")
        plan: dict[str, str] = {}
        for name in dict.fromkeys(order):
            handle = self._functions[name].register_forward_hook(lambda module, args, y: 1.01 * y + 0.01)
            try:
                moved = self._inputs(batch)
            finally:
                handle.remove()
            if [layer for layer, _ in usual] != [layer for layer, _ in moved]:
                raise AdapterError(
                    f"which layers the model calls depends on its values (on {name!r}), as with routed experts; "
                    "linearise needs models that call the same layers for every input"
                )
            changed = (layer for (layer, a), (_, b) in zip(usual, moved, strict=True) if not torch.equal(a, b))
            matrix = next(changed, None)
            if matrix is None or matrix in plan.values():
                raise AdapterError(
                    f"no linear layer of its own follows {name!r}, so that nothing could stand in for it; exclude it"
                )
            if called[matrix] > 1:
                raise AdapterError(f"the model calls {matrix!r} {called[matrix]} times in a pass, which no fit follows")
            plan[name] = matrix
            layer = self._layers[matrix]
            own = layer.rank if isinstance(layer, LoRAAdapter) else 0
            base = getattr(layer, "base", layer)
            outputs, inputs = matrix_layer(base, matrix, "linearise").size(base)
            if own + rank > min(outputs, inputs):
                beside = f", beside the {own} of its LoRA," if own else ""
                raise AdapterError(
                    f"rank {rank}{beside} exceeds the size of {matrix!r} ({outputs} x {inputs}); lower it"
                )
        return list(plan.items())

    def _inputs(self, batch: Any) -> list[tuple[str, Tensor]]:
        """A sample of the input of each call of a linear layer, in the order of the calls."""
        seen: list[tuple[str, Tensor]] = []

        def note(name: str) -> Any:
            return lambda module, args: seen.append((name, regular_sample(args[0], _SAMPLE).clone()))

        handles = [layer.register_forward_pre_hook(note(name)) for name, layer in self._layers.items()]
        try:
            self._run(batch)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    @contextmanager
    def _acting(self, replaced: Iterable[str], corrected: Iterable[str]) -> Iterator[None]:
        """Inside the block, the pretrained activation acts in some places, and corrections in some layers."""
        with ExitStack() as stack:
            for name in replaced:
                adapter = self._functions[name]
                stack.callback(setattr, adapter, "enabled", adapter.enabled)
                adapter.enabled = False
            for name in corrected:
                a, b = self.pairs[name]
                handle = self._layers[name].register_forward_hook(
                    lambda module, args, y, a=a, b=b: y + ((args[0].to(a) @ a.T) @ b.T).to(y)
                )
                stack.callback(handle.remove)
            yield

    def _at(self, matrix: str, batch: Any) -> tuple[Tensor, Tensor]:
        """The input (N, in) and the output (N, out) of a layer, in float64."""
        kept: list[tuple[Tensor, Tensor]] = []

        def keep(module: nn.Module, args: Any, y: Tensor) -> None:
            kept.append((args[0].flatten(0, -2).double(), y.flatten(0, -2).double()))
            raise _Reached

        handle = self._layers[matrix].register_forward_hook(keep)  # after that of a correction
        try:
            self._run(batch)
        except _Reached:
            pass
        finally:
            handle.remove()
        if not kept:
            raise AdapterError(f"a batch did not reach {matrix!r}; give batches that pass through every layer")
        return kept[0]

    def residual(self, name: str, matrix: str, batch: Any, corrected: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """z (N, in), what W z lacks (N, out), and y (N, out); with `corrected`, after this layer's own correction."""
        with self._acting((), ()):
            _, y = self._at(matrix, batch)
        others = [m for m in self.pairs if corrected or m != matrix]
        with self._acting([*self.replaced, name], others):
            z, own = self._at(matrix, batch)
        return z, y - own, y

    def measure(self, name: str, matrix: str, batches: Sequence[Any]) -> Correction:
        """The errors of one layer, before and after its correction."""
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            _, before, y = self.residual(name, matrix, batch)
            _, after, _ = self.residual(name, matrix, batch, corrected=True)
            sums += torch.stack([t.square().sum().cpu() for t in (before, after, y)])
        replaced, corrected = (sums[:2] / sums[2].clamp(min=torch.finfo(torch.float64).tiny)).sqrt().tolist()
        return Correction(name, matrix, replaced, corrected)

    def measure_outputs(self, batches: Sequence[Any]) -> tuple[float, float]:
        """The relative errors of the model's outputs, with all activations replaced, and with all corrections too."""
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            expected = _output(self._run(batch))
            with self._acting(self._functions, ()):
                replaced = _output(self._run(batch))
            with self._acting(self._functions, self.pairs):
                corrected = _output(self._run(batch))
            differences = (replaced - expected, corrected - expected, expected)
            sums += torch.stack([t.square().sum().cpu() for t in differences])
        first, second = (sums[:2] / sums[2].clamp(min=torch.finfo(torch.float64).tiny)).sqrt().tolist()
        return first, second


class _Statistics:
    """Sums over inputs z (N, in) and residuals e (N, out): z^T z and z^T e."""

    def __init__(self) -> None:
        self._gram: Tensor | float = 0.0
        self._cross: Tensor | float = 0.0

    def add(self, z: Tensor, e: Tensor, _: Tensor) -> None:
        """Count further inputs."""
        self._gram = self._gram + z.T @ z
        self._cross = self._cross + z.T @ e

    def solve(self, rank: int) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) in float32, by reduced-rank ridge regression."""
        gram, cross = self._gram, self._cross
        assert isinstance(gram, Tensor)
        assert isinstance(cross, Tensor)
        ridge = _RIDGE * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
        d = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), cross)
        fitted = cross.T @ d  # (out, out)
        v = torch.linalg.eigh((fitted + fitted.T) / 2).eigenvectors[:, -rank:]
        return (d @ v).T.float().contiguous(), v.float().contiguous()


def _output(output: Any) -> Tensor:
    """The first floating tensor that a model returns, such as logits."""
    values = getattr(output, "logits", output)
    tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]
    if not tensors:
        raise AdapterError("the model returned no tensor; give linearise a `run` that returns the model's output")
    return tensors[0].double()


def _install(model: nn.Module, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Put LoRA in the place of all adapters: that which was there, and the corrections."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, adapter in adapters(model):
        if isinstance(adapter, LoRAAdapter):
            factors[name] = adapter.lora_A.detach().clone(), adapter.scaling * adapter.lora_B.detach()
    for name, (a, b) in pairs.items():
        if name in factors:
            a, b = torch.cat([factors[name][0], a.to(factors[name][0])]), torch.cat([factors[name][1], b.to(a)], dim=1)
        factors[name] = a, b
    install_lora(model, factors)
