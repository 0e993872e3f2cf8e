"""A callback for studies: is what NoRA has learned lower-dimensional than a random update of the same size?"""

from __future__ import annotations

import statistics

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_adapters.errors import AdapterError
from lit_adapters.learned.null import ranks_against_random
from lit_adapters.methods.nora import NoRAActivation
from lit_adapters.training.attached import adapter_layers


class SubspaceAgainstRandom(Callback):
    """Logs at the end of a test the effective rank of NoRA's learned changes, beside that of random updates.

    `test/subspace_rank` is the effective rank (exponential of the entropy of the energies) of the changes of all groups
    of all layers, each weighted by the root of its layer's density. `test/subspace_rank_random` is the mean of random
    updates that keep the rank and each group's norm, see `lit_adapters.learned.null`, and `test/subspace_rank_excess`
    the first minus the second.

    Args:
        draws: Number of random updates.

    Raises:
        AdapterError: `draws` is below 1, or the model has no NoRA.
    """

    def __init__(self, draws: int = 20) -> None:
        if draws < 1:
            raise AdapterError(f"draws {draws} must be at least 1")
        self.draws = draws

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, and log."""
        layers = [layer for layer in adapter_layers(pl_module).values() if isinstance(layer, NoRAActivation)]
        if not layers:
            raise AdapterError("SubspaceAgainstRandom compares functions of NoRA, and the model has none")
        learned, random = ranks_against_random(layers, self.draws)
        mean = statistics.fmean(random)
        for name, value in (("", learned), ("_random", mean), ("_excess", learned - mean)):
            pl_module.log(f"test/subspace_rank{name}", value, rank_zero_only=True)
