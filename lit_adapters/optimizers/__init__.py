"""Parameter groups for optimisers."""

from lit_adapters.optimizers.groups import parameter_groups

__all__ = ["parameter_groups"]
