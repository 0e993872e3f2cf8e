"""What the optimisers of this package share: closures, AdamW for other parameters, loading, checks of settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from lit_adapters.errors import AdapterError, shown
from lit_adapters.values import check_number, check_probability

# AdamW's own, for the parameters that an optimiser with another default hands over to AdamW.
ADAMW_EPS = 1e-8
# The entries of a group that follow from the model, whatever a file says.
_OF_THE_MODEL = ("params", "pairs", "scales")


class AdapterOptimizer(Optimizer):
    """An optimiser that treats some parameters in its own way and gives the others to AdamW.

    Its whole state is tensors in `state`, so that a resumed run goes on as if it had not stopped.

    Args:
        params: Parameters, or groups of them.
        defaults: The settings of groups that have none of their own; among them "lr", "betas" and "weight_decay".

    Raises:
        AdapterError: A setting is out of range.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        check_settings(defaults)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step.

        Args:
            closure: Computes the loss and the gradients; it runs before any gradient is read.

        Returns:
            What the closure returns; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    def update(self) -> None:
        """Change the parameters by their gradients; gradients are off."""
        raise NotImplementedError

    def adamw(self, parameters: Sequence[Tensor], group: dict[str, Any], lr: float, eps: float) -> None:
        """One step of torch's AdamW on those parameters that have a gradient.

        Args:
            parameters: Parameters of the group.
            group: The group, for betas and weight decay.
            lr: The learning rate.
            eps: Added to the root of the second moment.
        """
        parameters = [p for p in parameters if p.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            list(parameters),
            [p.grad for p in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=lr,
            weight_decay=group["weight_decay"],
            eps=eps,
            maximize=False,
        )

    @property
    def needs_whole(self) -> str:
        """Why the parameters must not be sharded, with what to do instead; empty if they may be."""
        return ""

    def refuse_shards(self, parameters: Iterable[Tensor]) -> None:
        """Check that parameters are whole.

        Raises:
            AdapterError: One is sharded over processes.
        """
        if any(hasattr(parameter, "full_tensor") for parameter in parameters):
            raise AdapterError(f"the parameters are sharded over processes (FSDP2), and {self.needs_whole}")

    def state_shapes(self, group: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
        """What is kept of each parameter of a group that has made a step: shapes by name; by default AdamW's."""
        return [{"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape} for p in group["params"]]

    def check_state(self, state_dict: Mapping[str, Any]) -> None:
        """Check that a saved state has the tensors that this optimiser keeps.

        Raises:
            AdapterError: One is missing, too many, or of another shape.
        """
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            settings = {name: saved.get(name, value) for name, value in own.items() if name not in _OF_THE_MODEL}
            for index, expected in zip(saved["params"], self.state_shapes(own | settings), strict=False):
                entry = state_dict["state"].get(index) or {}
                found = {name: tuple(v.shape) if isinstance(v, Tensor) else v for name, v in dict(entry).items()}
                wanted = {name: tuple(shape) for name, shape in expected.items()}
                if found and found != wanted:
                    raise AdapterError(
                        f"the state of {type(self).__name__} for parameter {shown(index)} holds {shown(found, 200)}, "
                        f"and must hold tensors of sizes {shown(wanted, 200)}; take an undamaged one, or one of this "
                        "model"
                    )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state; tensors keep the dtype in which they were saved.

        torch would cast moments in float32 to the dtype of a parameter in bfloat16.

        Raises:
            AdapterError: A tensor is missing, or has another shape.
        """
        self.check_state(state_dict)
        super().load_state_dict(state_dict)
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved_ids, parameters, strict=True):
            for name, saved in state_dict["state"].get(index, {}).items():
                loaded = self.state[parameter][name]
                if isinstance(saved, Tensor) and loaded.dtype != saved.dtype:
                    self.state[parameter][name] = saved.detach().clone().to(loaded.device)


def check_settings(settings: dict[str, Any]) -> None:
    """Check the settings that all optimisers have.

    Raises:
        AdapterError: The learning rate or the weight decay is negative or not finite, or `betas` are not two numbers
            in [0, 1).
    """
    check_number("lr", settings["lr"], 0.0)
    check_number("weight_decay", settings["weight_decay"], 0.0)
    betas = settings["betas"]
    if not isinstance(betas, (list, tuple)) or len(betas) != 2:
        raise AdapterError(f"betas {shown(betas)} must be two numbers in [0, 1)")
    for beta in betas:
        check_probability("betas", beta)


def working_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of states and of r x r matrices: float32, or that of a parameter in float64."""
    return torch.promote_types(parameter.dtype, torch.float32)
