"""Starts of A and B other than (Kaiming, zero): PiSSA, OLoRA, LoRA-GA and EVA, for LoRA and DoRA.

They start at a pair A0, B0. What B0 A0 does is subtracted, so that the layer starts as the pretrained one:

    W' = W0 + s (B A - B0 A0) = W0 + s [B - B0, B0] [A; A - A0]

The published forms write W0 - s B0 A0 into the model. Here W0 stays as it is (it may be in 4 bit), and A0 and B0 are
buffers. The right-hand form is a pair of rank 2 r: at the start its products are exactly 0 in every dtype, and small
changes of A and B are not lost by rounding, as they would be in the difference of two large products.

    pissa    s B0 A0 is the best approximation of W0 of rank r (arXiv 2404.02948):
             U S V^T = W0, A0 = sqrt(S / s) V^T, B0 = U sqrt(S / s), the r largest
    olora    the first r columns and rows of Q R = W0 (arXiv 2406.01775): B0 = Q, A0 = R
    lora_ga  from the gradient G of W0 on the first batches (arXiv 2407.05000): U S V^T = G,
             A0 = c V^T of the r largest, B0 = c U of the r that follow, c = out^(1/4) / sqrt(16)
    eva      A0 are the r principal directions of the layer's inputs (arXiv 2410.07170), B0 = 0; every layer has the
             rank of the settings, which is rho = 1 in the paper

LoRA-GA follows the authors' code; peft's scales B0 by S in addition, and A0 not at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.methods.low_rank import LowRank, LowRankAdapter
from lit_adapters.methods.matrix_layers import ConvolutionLayer, ForeignLayer, is_quantised
from lit_adapters.methods.quantised import foreign_quantisation
from lit_adapters.methods.targets import Target
from lit_adapters.ops.decomposition import PrincipalDirections, leading_svd
from lit_adapters.ops.statistics import regular_sample
from lit_adapters.values import check_choice

ZERO = "zero"
FROM_WEIGHT = ("pissa", "olora")
FROM_DATA = ("lora_ga", "eva")
STARTS = (ZERO, *FROM_WEIGHT, *FROM_DATA)
_GAMMA = 16  # of LoRA-GA
_ROWS_PER_CALL = 512  # inputs of a layer that EVA takes from one call


_left_out: ContextVar[bool] = ContextVar("_left_out", default=False)


@contextmanager
def without_starts() -> Iterator[None]:
    """Inside the block, new adapters do not decompose their weight, as a file is about to give them their tensors."""
    token = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(token)


def starts_left_out() -> bool:
    """Whether a block of `without_starts` is open."""
    return _left_out.get()


@dataclass
class StartedLowRank(LowRank):
    """Settings of a low-rank method whose pair may start elsewhere than at (Kaiming, zero).

    Args:
        start: Where A and B start: zero (A random, B zero); pissa or olora, from the pretrained weight; lora_ga, from
            its gradient, or eva, from the layer's inputs, both measured on the first training batches by
            `AdapterCallback` or `lit_adapters.calibrate`. What the pair does at the start is subtracted. All but zero
            and eva keep r (in + out) fixed numbers in the file, compute with twice the rank, and leave A and B out of
            weight decay, which would take a part of the pretrained weight away.

    Raises:
        AdapterError: A value is out of range.
    """

    start: str = ZERO

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("start", self.start, STARTS)

    def find_experts(self, model: nn.Module, train: str | Sequence[str]) -> list[tuple[Target, list[str]]]:
        """As for any low-rank method.

        Raises:
            AdapterError: There are some, and the pairs do not start at zero.
        """
        found = super().find_experts(model, train)
        if found and self.start != ZERO:
            name = found[0][0].name
            raise AdapterError(
                f"the experts of {name!r} cannot have start={self.start!r}; use start='zero', or exclude=[{name!r}]"
            )
        return found


class StartedAdapter(LowRankAdapter):
    """A low-rank adapter with the update s (B A - B0 A0).

    Raises:
        AdapterError: As for every low-rank adapter, or this layer cannot have this start.
    """

    calibrated: Tensor  # 1 once A0 and B0 were measured, else 0; with `lora_ga` and `eva` only

    def __init__(self, base: nn.Module, qualified_name: str, config: StartedLowRank) -> None:
        super().__init__(base, qualified_name, config)
        self.start = config.start
        self.subtracts = config.start not in (ZERO, "eva")
        self._check_layer()
        if self.subtracts:
            self.add_start()
        if self.start in FROM_DATA:
            self.add_buffer("calibrated", torch.empty((), dtype=torch.int64, device=self.lora_A.device))
        self._awaits_calibration = False
        self._measured_directions: PrincipalDirections | None = None
        self._gradient: Tensor | None = None

    def _check_layer(self) -> None:
        """Check that the layer can have this start.

        Raises:
            AdapterError: It cannot.
        """
        name = self.qualified_name
        outputs, inputs = self.layer.size(self.base)
        if self.start == "lora_ga" and 2 * self.rank > min(outputs, inputs):
            raise AdapterError(
                f"start='lora_ga' takes 2 * {self.rank} directions of the gradient, and {name!r} ({outputs} x "
                f"{inputs}) has {min(outputs, inputs)}; lower rank, or give this layer its own in rank_pattern"
            )
        if self.start in (*FROM_WEIGHT, "lora_ga") and isinstance(self.layer, ForeignLayer):
            raise AdapterError(
                f"start={self.start!r} needs the weight of {name!r}, {foreign_quantisation(self.base)}; use "
                f"start='zero' or 'eva', or exclude=[{name!r}]"
            )
        if self.start == "lora_ga" and is_quantised(self.base):
            raise AdapterError(
                f"start='lora_ga' needs the gradient of the weight of {name!r}, which is quantised; use start='pissa', "
                "'olora' or 'eva'"
            )
        if self.start == "eva" and isinstance(self.layer, ConvolutionLayer):
            raise AdapterError(
                f"start='eva' reads the inputs of linear layers, and {name!r} is a convolution; use start='pissa', or "
                f"exclude=[{name!r}]"
            )

    # ---- the start

    def reset_parameters(self) -> None:
        """A and B at their start; those of `lora_ga` and `eva` at (Kaiming, zero) until they are calibrated."""
        super().reset_parameters()
        with torch.no_grad():
            if self.start in FROM_WEIGHT and not self.base.weight.is_meta and not _left_out.get():
                self._start_from_weight()
            if self.start in FROM_DATA:
                self.calibrated.fill_(0)
        if self.subtracts:
            self.keep_start()
        self._awaits_calibration = self.start in FROM_DATA

    def _start_from_weight(self) -> None:
        matrix = self.base_matrix().detach()
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        if not matrix.isfinite().all():
            raise AdapterError(
                f"the weight of {self.qualified_name!r} has values that are not finite, from which "
                f"start={self.start!r} cannot be computed; load an undamaged model"
            )
        if self.start == "pissa":
            u, values, vh = leading_svd(matrix, self.rank)
            roots = (values / abs(self.scaling)).sqrt()
            self.set_pair(roots[:, None] * vh, math.copysign(1.0, self.scaling) * u * roots)
        else:
            q, r = torch.linalg.qr(matrix)
            self.set_pair(r[: self.rank], q[:, : self.rank])

    def set_pair(self, a: Tensor, b: Tensor) -> None:
        """Write the values A (r, in), B (out, r) into the parameters."""
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)

    def _has_trained(self) -> bool:
        """Whether the pair has left its start."""
        if not self.subtracts:
            return bool(self.lora_B.any())
        return not (torch.equal(self.lora_A, self.start_A) and torch.equal(self.lora_B, self.start_B))

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """A and B, if their decay towards 0 would take s B0 A0 away from the pretrained weight."""
        own = [self.lora_A, self.lora_B] if self.subtracts else []
        return [*super().undecayed_parameters(), *own]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.start in FROM_DATA and not self.calibrated.is_meta:
            self._awaits_calibration = not bool(self.calibrated.item())
        loaded = f"{prefix}weight" in state_dict and f"{prefix}lora_A" not in state_dict
        if loaded and self.start in FROM_WEIGHT and not self.lora_A.is_meta and not self._has_trained():
            with torch.no_grad():  # another base
                self._start_from_weight()
            self.keep_start()

    # ---- the factors

    @property
    def update_rank(self) -> int:
        """The rank of the factors of the update: r, or 2 r if a start is subtracted."""
        return 2 * self.rank if self.subtracts else self.rank

    def left_factor(self, dtype: torch.dtype) -> Tensor:
        """B (out, r), or [B - B0, B0] (out, 2 r)."""
        if not self.subtracts:
            return super().left_factor(dtype)
        wide = torch.promote_types(dtype, self.lora_B.dtype)
        start = self.start_B.to(wide)
        return torch.cat([self.lora_B.to(wide) - start, start], 1).to(dtype)

    def right_factor(self, dtype: torch.dtype) -> Tensor:
        """A (r, in), or [A; A - A0] (2 r, in)."""
        if not self.subtracts:
            return super().right_factor(dtype)
        wide = torch.promote_types(dtype, self.lora_A.dtype)
        a = self.lora_A.to(wide)
        return torch.cat([a, a - self.start_A.to(wide)]).to(dtype)

    def can_fuse(self, x: Tensor) -> bool:
        """As for any low-rank adapter; the fused operations take differences in float32, too coarse for float64."""
        return super().can_fuse(x) and not (self.subtracts and x.dtype == torch.float64)

    # ---- calibration

    @property
    def in_effect(self) -> bool:
        """As for every adapter.

        Raises:
            AdapterError: The adapter is about to train, and its start has not been measured.
        """
        if self._awaits_calibration and self.training and torch.is_grad_enabled():
            loss = ", loss=..." if self.needs_gradient else ""
            raise AdapterError(
                f"{self.qualified_name!r} has start={self.start!r} and was not calibrated; call "
                f"lit_adapters.calibrate(model, batches{loss}) before training, or train with AdapterCallback, which "
                "does"
            )
        return super().in_effect

    @property
    def calibrates(self) -> bool:
        return self.start in FROM_DATA

    @property
    def needs_gradient(self) -> bool:
        return self.start == "lora_ga"

    @property
    def needs_whole(self) -> str:
        if self.start not in FROM_DATA:
            return super().needs_whole
        return (
            f"start={self.start!r} needs whole matrices: calibrate before sharding, use start='pissa' or 'olora', or "
            "the strategy ddp"
        )

    @property
    def awaits_calibration(self) -> bool:
        return self._awaits_calibration

    def begin_calibration(self) -> None:
        """Forget earlier measurements.

        Raises:
            AdapterError: Training has begun, or the model is sharded.
        """
        self._measured_directions = self._gradient = None
        if self.sharded:
            raise AdapterError(f"{self.qualified_name!r} is sharded, and {self.needs_whole}")
        if self._has_trained():
            raise AdapterError(
                f"{self.qualified_name!r} has been trained: calibrating now would change its function. Calibrate once, "
                "right after attach"
            )

    def measure_input(self, x: Tensor) -> None:
        """Take up a sample of the rows of an input (..., in), for EVA.

        Raises:
            AdapterError: The input is not finite.
        """
        if self.start != "eva":
            return
        if self._measured_directions is None:
            self._measured_directions = PrincipalDirections(self.rank)
        rows = x.reshape(-1, x.shape[-1])
        rows = rows[regular_sample(torch.arange(len(rows), device=x.device), _ROWS_PER_CALL)].float()
        if not rows.isfinite().all():
            raise AdapterError(f"the inputs of {self.qualified_name!r} are not finite, so that EVA cannot start")
        self._measured_directions.add(rows)

    def measure_gradient(self, gradient: Tensor) -> None:
        """Take the gradient of W0 (out, in), for LoRA-GA."""
        self._gradient = gradient

    def calibrated_tensors(self) -> dict[str, Tensor]:
        """The buffers, and A and B."""
        return super().calibrated_tensors() | {"lora_A": self.lora_A, "lora_B": self.lora_B}

    @torch.no_grad()
    def calibrate(self, values: Tensor) -> None:
        """Start from what was measured.

        Raises:
            AdapterError: The gradient is zero or not finite, or the inputs vary in too few directions.
        """
        measured, gradient = self._measured_directions, self._gradient
        self._measured_directions = self._gradient = None
        self.stand_alone()
        if self.needs_gradient:
            self._start_from_gradient(gradient)
        else:
            self._start_from_inputs(measured)
        self.calibrated.fill_(1)
        self._awaits_calibration = False
        self.clear_caches()

    def _start_from_gradient(self, gradient: Tensor | None) -> None:
        if gradient is None or not gradient.isfinite().all() or not gradient.any():
            raise AdapterError(
                f"the gradient of the weight of {self.qualified_name!r} is zero or not finite on the batches of the "
                "calibration, so that start='lora_ga' finds no directions; exclude the layer, or use another start"
            )
        u, _, vh = leading_svd(gradient.to(self.lora_A.device), 2 * self.rank)
        factor = u.shape[0] ** 0.25 / math.sqrt(_GAMMA)
        self.set_pair(factor * vh[: self.rank], factor * u[:, self.rank :])
        self.keep_start()

    def _start_from_inputs(self, measured: PrincipalDirections | None) -> None:
        directions = None if measured is None else measured.directions()
        if directions is None:
            rows = 0 if measured is None else measured.rows
            raise AdapterError(
                f"start='eva' needs {self.rank} directions in which the inputs of {self.qualified_name!r} vary, and "
                f"{rows} rows of the calibration have fewer; give more batches "
                "(calibration_batches of AdapterCallback), or lower rank"
            )
        self.lora_A.copy_(directions)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", start={self.start}" if self.start != ZERO else "")
