"""What Lightning does to layers by their class or without `train`, where the layers are inside adapters."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import BitsandbytesPrecision

import lit_adapters as la
from lit_adapters import AdapterError
from lit_adapters.lightning.checks import Settings
from tests.lightning.tiny_task import Task, fit, loader, trainer


def test_a_batch_norm_with_an_adapter_keeps_its_statistics_after_a_validation(tmp_path):
    plain, adapted = Task(methods=False), Task(methods=la.BitFit())
    for task in (plain, adapted):
        fit(tmp_path, task, *([la.AdapterCallback()] if task is adapted else [Callback()]), max_epochs=2)
    counted = adapted.net.norm.num_batches_tracked
    assert counted.item() == plain.net.norm.num_batches_tracked.item() == 12
    assert adapted.net.norm.running_mean.abs().max() > 0


def test_averages_that_need_batch_norms_are_refused_where_adapters_hold_them(tmp_path):
    with pytest.raises(AdapterError, match=r"StochasticWeightAveraging does not find '.*norm', a batch norm"):
        fit(tmp_path, Task(methods=la.BitFit()), la.AdapterCallback(), StochasticWeightAveraging(1e-3))


def test_synchronised_batch_norms_are_refused_where_adapters_hold_them(tmp_path):
    running = trainer(tmp_path, la.AdapterCallback(), strategy="ddp", devices=1, sync_batchnorm=True, max_steps=1)
    with pytest.raises(AdapterError, match=r"sync_batchnorm does not find '.*norm', a batch norm"):
        running.fit(Task(methods=la.BitFit()), loader())


def test_a_precision_that_quantises_is_refused_where_layers_have_adapters(tmp_path):
    pytest.importorskip("bitsandbytes")
    running = trainer(tmp_path)
    running.strategy._precision_plugin = BitsandbytesPrecision("nf4", dtype=torch.float32)  # Trainer asks for a GPU
    with pytest.raises(AdapterError, match=r"BitsandbytesPrecision does not quantise '.*fc1'.*load the model in 4 bit"):
        Settings().on_fit_start(running, Task())
