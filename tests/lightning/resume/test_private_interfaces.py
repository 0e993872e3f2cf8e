"""What we use of Lightning and torch without their promise: when a new version moves one, a test names it and our file.

Lightning has no public interface for where a fit loop goes on after a checkpoint, torch none for which batches of
indices a loader skips.
"""

import ast
from operator import attrgetter
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from tests.lightning.tiny_task import Task, fit, loader

ROOT = Path(__file__).parents[3]
LOOP_STATE = "lit_adapters/lightning/resume/loop_state.py"
STOPPING = "lit_adapters/lightning/resume/stopping.py"
ANNEALING = "lit_adapters/lightning/annealing.py"

# Where an attribute lies, seen from a Trainer after a training batch; the file of ours that uses it.
OF_A_TRAINER = {
    "_logger_connector.metrics": LOOP_STATE,
    "_logger_connector.should_update_logs": LOOP_STATE,
    "_logger_connector._first_loop_iter": LOOP_STATE,
    "fit_loop.epoch_loop._batches_that_stepped": LOOP_STATE,
    "fit_loop._should_accumulate": LOOP_STATE,
    "fit_loop._data_fetcher": LOOP_STATE,
    "fit_loop._data_fetcher.iterator": LOOP_STATE,
    "fit_loop._data_fetcher.batches": LOOP_STATE,
    "fit_loop.epoch_loop._update_learning_rates": LOOP_STATE,
    "fit_loop._combined_loader._mode": LOOP_STATE,
    "fit_loop._combined_loader_states_to_load": LOOP_STATE,
    "fit_loop._load_combined_loader_states": LOOP_STATE,
    "fit_loop._restarting": LOOP_STATE,
    "fit_loop._resuming_from_checkpoint": LOOP_STATE,
    "fit_loop.reset_restart_stage": LOOP_STATE,
    "fit_loop.epoch_progress.total.processed": LOOP_STATE,
    "fit_loop.epoch_progress.current.completed": LOOP_STATE,
    "fit_loop.epoch_loop.reset_restart_stage": LOOP_STATE,
    "fit_loop.epoch_loop._should_check_val_fx": LOOP_STATE,
    "fit_loop.epoch_loop._num_ready_batches_reached": LOOP_STATE,
    "fit_loop.epoch_loop._restarting": LOOP_STATE,
    "fit_loop.epoch_loop.val_loop._restarting": LOOP_STATE,
    "fit_loop.epoch_loop.val_loop.batch_progress.reset": LOOP_STATE,
    "fit_loop.epoch_loop.min_steps": ANNEALING,
    "fit_loop.epoch_loop._broadcast_sigterm_tensor": STOPPING,
    "_signal_connector.received_sigterm": STOPPING,
    "_signal_connector._original_handlers": STOPPING,
}
COUNTERS = {"ready", "started", "processed", "completed"}


class Looking(Callback):
    """Keeps which attributes a Trainer lacks while it trains, and the state of its loops."""

    def on_train_batch_end(self, trainer, *args):
        self.missing = [path for path in OF_A_TRAINER if not found(trainer, path)]
        self.state, self.loop = trainer.fit_loop.state_dict(), trainer.fit_loop


def found(trainer, path):
    try:
        attrgetter(path)(trainer)
    except AttributeError:
        return False
    return True


@pytest.fixture(scope="module")
def looking(tmp_path_factory):
    callback = Looking()
    fit(tmp_path_factory.mktemp("fit"), Task(), callback)
    return callback


@pytest.mark.parametrize("path", OF_A_TRAINER)
def test_a_trainer_has(looking, path):
    assert path not in looking.missing, f"Lightning's Trainer has no {path} any more; {OF_A_TRAINER[path]} uses it"


@pytest.mark.parametrize("progress", ["epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"])
def test_the_state_of_the_fit_loop_counts_batches(looking, progress):
    for part in ("total", "current"):
        counters = looking.state.get(progress, {}).get(part, {})
        assert counters.keys() >= COUNTERS, f"the fit loop's state has no {progress}/{part}; {LOOP_STATE} changes it"


def test_the_state_of_the_fit_loop_counts_steps(looking):
    counts = looking.state.get("epoch_loop.state_dict", {})
    assert "_batches_that_stepped" in counts, (
        f"the fit loop's state has no epoch_loop.state_dict/_batches_that_stepped; {LOOP_STATE} changes it"
    )


@pytest.mark.parametrize("name", ["restarting", "is_resuming"])
def test_what_we_set_is_read(looking, name):
    """A name that Lightning no longer reads would be set in vain."""
    loop = looking.loop
    loop._restarting = loop._resuming_from_checkpoint = True
    assert getattr(loop, name) is True, f"Lightning's loops do not read what {LOOP_STATE} sets for {name}"
    loop._restarting = loop._resuming_from_checkpoint = False
    assert getattr(loop, name) is False, f"Lightning's loops do not read what {LOOP_STATE} sets for {name}"


def private_attributes(path):
    tree = ast.parse((ROOT / path).read_text())
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_the_list_is_whole():
    assert private_attributes(LOOP_STATE) <= {part for path in OF_A_TRAINER for part in path.split(".")}


def test_a_loader_asks_its_index_sampler():
    """`ResumableLoader` puts one that skips in its place."""

    class Half(DataLoader):
        @property
        def _index_sampler(self):
            return list(super()._index_sampler)[:3]

    batches = list(Half(loader().dataset, batch_size=4))
    assert len(batches) == 3, "torch's DataLoader does not read _index_sampler; lit_adapters/.../loader.py overrides it"


def test_a_loader_keeps_the_iterator_of_persistent_workers():
    kept = loader(num_workers=1, persistent_workers=True)
    iter(kept)
    assert getattr(kept, "_iterator", None) is not None, (
        "DataLoader keeps no _iterator; lit_adapters/lightning/calibration.py clears it"
    )


def test_a_sharded_strategy_says_how_it_saves():
    strategy = ModelParallelStrategy(save_distributed_checkpoint=False)
    assert vars(strategy).get("_save_distributed_checkpoint") is False, (
        "ModelParallelStrategy has no _save_distributed_checkpoint; "
        "lit_adapters/lightning/resume/adapters_only.py asks for it"
    )


def test_the_command_line_knows_its_model_class():
    cli = LightningCLI(BoringModel, run=False, args=[], save_config_callback=None)
    assert getattr(cli, "_model_class", None) is BoringModel, (
        "LightningCLI has no _model_class; lit_adapters/lightning/cli.py asks for it"
    )


OF_TORCH = {
    "_C._has_storage": "lit_adapters/ops/_native.py",
    "_C._len_torch_dispatch_stack": "lit_adapters/ops/",
    "_C._is_tracing": "lit_adapters/ops/_context.py",
    "fx._symbolic_trace.is_fx_tracing": "lit_adapters/ops/_context.py",
    "_C._functorch.peek_interpreter_stack": "lit_adapters/ops/_context.py",
    "autograd.forward_ad._current_level": "lit_adapters/ops/_context.py",
    "utils._pytree.tree_leaves": "lit_adapters/training/nonfinite.py",
    "utils._pytree.tree_map": "lit_adapters/lightning/calibration.py",
}


@pytest.mark.parametrize("path", OF_TORCH)
def test_torch_has(path):
    import torch.autograd.forward_ad
    import torch.utils._pytree

    assert found(torch, path), f"torch has no {path} any more; {OF_TORCH[path]} uses it"


def test_the_list_of_torch_is_whole():
    used = set()
    for path in (ROOT / "lit_adapters").rglob("*.py"):
        names = (ast.unparse(n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute))
        used |= {name.removeprefix("torch.") for name in names if name.startswith("torch._C.")}
    assert {name for name in used if name != "_C._functorch"} <= OF_TORCH.keys()
