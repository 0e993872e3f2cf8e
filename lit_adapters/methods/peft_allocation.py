"""AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512) driven: peft's own allocator on layers that `attach` made.

peft's model calls its allocator after every optimiser step, and adds a penalty to the loss; neither happens to layers
outside of that model. The allocator only asks for named parameters, so it works on ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.errors import AdapterError, shown
from lit_adapters.methods.allocation import Allocation, Allocator
from lit_adapters.methods.peft_adapter import PeftAdapter
from lit_adapters.values import check_number, check_whole

_ADAPTER = "default"
_E = f"lora_E.{_ADAPTER}"


class AdaLoRAAllocation(Allocation):
    """The schedule of AdaLoRA's layers.

    Attributes:
        config: Peft's configuration as plain values; with `total_step` None, the training tells it.
        orthogonality: Peft's `orth_reg_weight`.
    """

    needs_whole = "AdaLoRA's ranks cannot be allocated with FSDP2: use the strategy ddp, or la.LoRA"

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.orthogonality = config["orth_reg_weight"]

    def allocator(self, layers: Mapping[str, Any]) -> AdaLoRAAllocator:
        """As for any method.

        Raises:
            AdapterError: `target_r` is not below `init_r`, or the layers are sharded.
        """
        return AdaLoRAAllocator(self.config, layers)

    def kept(self, name: str) -> list[bool] | None:
        """The directions of a layer that the configuration's `rank_pattern` keeps; None if it has no entry for it.

        Args:
            name: The layer's name in the model.

        Raises:
            AdapterError: The entry is not one boolean for each of the `init_r` directions.
        """
        pattern = self.config.get("rank_pattern") or {}
        kept = pattern.get(f"{name}.lora_E") if isinstance(pattern, Mapping) else pattern
        if kept is None:
            return None
        rank = self.config["init_r"]
        if not isinstance(kept, list) or len(kept) != rank or not all(isinstance(k, bool) for k in kept):
            raise AdapterError(
                f"rank_pattern of ADALORA has {shown(kept)} for {name!r}, and must have {rank} times true or false: "
                "leave it out, the training finds it"
            )
        return kept


class AsaAllocation(Allocation):
    """The subspaces that AdaMSS drops with `use_asa`, which cannot be done here."""

    orthogonality = 0.0

    def allocator(self, layers: Mapping[str, Any]) -> Allocator:
        """Refuse.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(
            "use_asa=True of ADAMSS freezes subspaces while it trains, which optimisers and DDP of this run would not "
            "follow; set use_asa=false, which trains all subspaces, or train with peft's get_peft_model"
        )


class _Layers:
    """What peft's allocator sees of a model: the trained parameters of AdaLoRA's layers."""

    def __init__(self, layers: Mapping[str, PeftAdapter]) -> None:
        self._layers = layers

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, adapter in self._layers.items():
            for key, parameter in adapter.adapter_parameters().items():
                yield f"{name}.{key}", parameter


class AdaLoRAAllocator(Allocator):
    """Peft's allocator, called as peft's model calls it.

    Args:
        config: Peft's configuration as plain values.
        layers: AdaLoRA's layers by name.

    Raises:
        AdapterError: `target_r` is not below `init_r`, another setting is out of range, or the layers are sharded.
    """

    def __init__(self, config: Mapping[str, Any], layers: Mapping[str, PeftAdapter]) -> None:
        from peft import AdaLoraConfig
        from peft.tuners.adalora.layer import RankAllocator

        if config["target_r"] >= config["init_r"]:
            raise AdapterError(
                f"target_r={config['target_r']} of ADALORA is not below init_r={config['init_r']}, so that no rank "
                "could be given up: raise init_r (half as much again is usual), or use la.LoRA for a fixed rank"
            )
        check_whole("deltaT of ADALORA", config["deltaT"])
        for name in ("tinit", "tfinal"):
            check_whole(f"{name} of ADALORA", config[name], low=0)
        for name in ("beta1", "beta2"):
            check_number(f"{name} of ADALORA", config[name], low=1e-6, high=1 - 1e-6)
        self._layers = layers
        self._model = _Layers(layers)
        for name, parameter in self._model.named_parameters():
            if hasattr(parameter, "full_tensor"):
                raise AdapterError(f"{name!r} is sharded, and {AdaLoRAAllocation.needs_whole}")
        schedule = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2")
        self._given: int | None = config["total_step"]
        self._config = AdaLoraConfig(**{k: config[k] for k in schedule}, total_step=self._given or 2**31)
        self._allocator = RankAllocator(self._model, self._config, _ADAPTER)
        self._end = 0  # the step at which the ranks become final
        self._pattern: dict[str, list[bool]] = {}

    def start(self, total_steps: float) -> None:
        known = math.isfinite(total_steps) and total_steps >= 0
        if self._given is None and not known:
            raise AdapterError(
                "AdaLoRA allocates ranks as a function of training progress, and this training has no end that is "
                "known; set max_steps, max_epochs where the data have a length, or total_step"
            )
        if self._given is not None and known and self._given > total_steps:
            raise AdapterError(
                f"total_step={self._given} of ADALORA is more than the {int(total_steps)} optimiser steps of this "
                "training, so that the ranks would never be final: leave it out to take the training's own"
            )
        total = int(total_steps) if self._given is None else self._given
        first, end = self._config.tinit, total - self._config.tfinal
        if max(first, 1) >= end:
            raise AdapterError(
                f"tinit={first} and tfinal={self._config.tfinal} of ADALORA leave no step of {total} in which ranks "
                "are allocated; lower them, or train longer"
            )
        self._config.total_step, self._end = total, end
        for adapter in self._layers.values():
            adapter.kept = None  # of an earlier training

    def update(self, step: int) -> None:
        for name, parameter in self._model.named_parameters():
            if parameter.grad is None:
                raise AdapterError(
                    f"{name!r} received no gradient at step {step}, so that AdaLoRA cannot tell its importance; "
                    "exclude its module from target_modules"
                )
        # The three cases of AdaLoraModel.update_and_allocate. The second also comes late, if a scaler skipped its step.
        if self.finished:
            self._allocator.mask_using_rank_pattern(self._model, self._pattern)
        elif step < self._end:
            _, pattern = self._allocator.update_and_allocate(self._model, step)
            self._keep(pattern or {})
        else:
            _, pattern = self._allocator.update_and_allocate(self._model, self._end, force_mask=True)
            self._allocator.reset_ipt()
            self._keep(pattern)
            self.finished = True

    def _keep(self, pattern: dict[str, list[bool]]) -> None:
        self._pattern = pattern or self._pattern
        for name, adapter in self._layers.items() if pattern else ():
            adapter.kept = pattern[f"{name}.{_E}"]

    def state_dict(self) -> dict[str, Any]:
        """Running means of the sensitivity and of its deviation by parameter, and the directions that are kept."""
        return {
            "sensitivity": {name: t.cpu() for name, t in self._allocator.exp_avg_ipt.items()},
            "uncertainty": {name: t.cpu() for name, t in self._allocator.exp_avg_unc.items()},
            "pattern": dict(self._pattern),
            "finished": self.finished,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        parameters = dict(self._model.named_parameters())
        directions = {name: len(p) for name, p in parameters.items() if name.endswith(_E)}
        pattern = state["pattern"]
        if pattern.keys() not in (set(), directions.keys()) or any(
            len(kept) != directions[name] or not all(isinstance(k, bool) for k in kept)
            for name, kept in pattern.items()
        ):
            raise AdapterError("the checkpoint's ranks of AdaLoRA belong to other layers; resume with the run's own")
        for means in (state["sensitivity"], state["uncertainty"]):
            shapes = {name: tensor.shape for name, tensor in means.items()}
            if shapes and shapes != {name: p.shape for name, p in parameters.items()}:
                raise AdapterError(
                    "the checkpoint's sensitivities of AdaLoRA belong to other layers; resume with the run's own"
                )

        def placed(means: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(parameters[name]) for name, tensor in means.items()}

        self._allocator.exp_avg_ipt = placed(state["sensitivity"])
        self._allocator.exp_avg_unc = placed(state["uncertainty"])
        # The allocator takes a parameter that is not in `ipt` for a new one, and computes `ipt` anew at every step.
        self._allocator.ipt = {name: torch.zeros_like(p) for name, p in self._allocator.exp_avg_ipt.items()}
        self._keep({name: list(kept) for name, kept in pattern.items()})
        self.finished = state["finished"]
