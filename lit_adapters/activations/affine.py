"""An activation with a shift and a gain before and after it, as a plain module; merging a GroupAffine leaves one."""

from __future__ import annotations

from torch import Tensor, nn

from lit_adapters.errors import AdapterError
from lit_adapters.ops._context import refuse_symbols, unscriptable
from lit_adapters.ops.affine import group_affine


class AffineActivation(nn.Module):
    """y = (1 + s) act((1 + u) x + v) + t, with one (u, v, s, t) for each group of channels.

    Args:
        activation: The fixed activation act.
        before: The gain u and the shift v of each group, (G, 2).
        after: The gain s and the shift t of each group, (G, 2).
        channel_dim: The dimension of the input that holds the channels.
    """

    def __init__(self, activation: nn.Module, before: Tensor, after: Tensor, channel_dim: int = -1) -> None:
        super().__init__()
        self.activation = activation
        self.before = nn.Parameter(before.detach().clone())
        self.after = nn.Parameter(after.detach().clone())
        self.channel_dim = channel_dim

    def forward(self, x: Tensor) -> Tensor:
        refuse_symbols(type(self).__name__)
        (u, v), (s, t) = self.before.float().unbind(1), self.after.float().unbind(1)
        y = self.activation(group_affine(x, u, v, self.channel_dim))
        return group_affine(y, s, t, self.channel_dim)

    def __prepare_scriptable__(self) -> AffineActivation:
        """Called by torch.jit.script, which would fail at the first annotation.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(unscriptable(type(self).__name__))

    def extra_repr(self) -> str:
        return f"groups={len(self.before)}, channel_dim={self.channel_dim}"
