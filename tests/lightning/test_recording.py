"""What a logger receives is what the adapters say, under the names the contract gives."""

import csv
import re

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

import lit_adapters as la
from lit_adapters import AdapterCallback, AdapterError
from lit_adapters.learned.subspace import learned_subspace
from lit_adapters.ops.statistics import components, effective_rank, overlap, stable_rank
from lit_adapters.training.attached import adapter_layers
from lit_adapters.training.subspace_tracker import SubspaceTracker
from lit_adapters.training.tensorboard import PAGE, overview_layout
from tests.lightning.tiny_task import Task, assert_equal_bits, fit, loader, nora, state, tensorboard


def expected(task):
    """Tags and values of this moment, from the adapters themselves."""
    return {
        f"adapter/{a.method}/{name}/{key}": value
        for name, a in la.adapters(task.net)
        for key, value in a.statistics().items()
    }


def test_scalars_in_tensorboard_are_the_adapters_statistics(tmp_path):
    task = Task()
    start = expected(task)
    board = tensorboard(tmp_path, task, AdapterCallback(log_every_n_steps=4, figures=False), max_epochs=2)
    end = expected(task)
    assert {"adapter/nora/blocks.0.act/drift", "adapter/lora/blocks.1.fc2/relative_norm"} <= end.keys()
    for tag, value in end.items():
        records = board.Scalars(tag)
        assert [r.step for r in records] == [0, 4, 6, 8, 12]  # the start, every fourth step, and ends of epochs
        assert records[0].value == pytest.approx(start[tag])
        assert records[-1].value == pytest.approx(value)
    assert end["adapter/nora/blocks.0.act/drift"] > 2 * start["adapter/nora/blocks.0.act/drift"] > 0
    further = {t for t in board.Tags()["scalars"] if t.startswith(("adapter/nora", "adapter/lora"))} - end.keys()
    assert {t.split("/")[3] for t in further} == {
        "outside_range",
        "numerator_stable_rank",
        "denominator_stable_rank",
        "stable_rank",
        "effective_rank",
        "overlap",
    }


def test_the_summary_is_the_mean_over_layers(tmp_path):
    task = Task()
    board = tensorboard(tmp_path, task)
    for statistic in ("drift", "relative_drift", "sup_drift", "relative_norm"):
        values = [v for tag, v in expected(task).items() if tag.endswith(f"/{statistic}")]
        summary = board.Scalars(f"adapter/summary/{statistic}")[-1]
        assert summary.value == pytest.approx(sum(values) / len(values))


def test_inputs_are_observed_in_the_batches_of_recorded_steps(tmp_path):
    """Against the inputs of the layer, computed again with the weights of that step."""

    class Watching(Task):
        def training_step(self, batch, batch_idx):
            outside[self.global_step + 1] = inputs(self.net, batch[0])
            return super().training_step(batch, batch_idx)

    def inputs(net, x):
        with torch.no_grad():
            values = net.blocks[0].fc1(x)
        return ((values < -0.5) | (values > 0.5)).float().mean().item()

    outside = {}
    task = Watching(nora(fit_range=(-0.5, 0.5)))
    board = tensorboard(tmp_path, task, AdapterCallback(log_every_n_steps=4, figures=False))
    records = board.Scalars("adapter/nora/blocks.0.act/outside_range")
    assert [r.step for r in records] == [4, 6]
    assert [r.value for r in records] == pytest.approx([outside[4], outside[6]])
    assert 0 < outside[4] < 1


def test_what_was_observed_earlier_is_not_recorded_again(tmp_path):
    """A stop in mid-epoch has no observation of its own; max_steps is seen coming."""

    class Stop(Task):
        def on_train_batch_end(self, *args):
            self.trainer.should_stop = self.trainer.global_step >= 9

    tag = "adapter/nora/blocks.0.act/outside_range"
    callback = AdapterCallback(log_every_n_steps=4, figures=False)
    board = tensorboard(tmp_path / "stop", Stop(nora()), callback, max_epochs=2)
    assert [r.step for r in board.Scalars(tag)] == [4, 6, 8]
    assert board.Scalars("adapter/nora/blocks.0.act/drift")[-1].step == 9
    board = tensorboard(tmp_path / "max", Task(nora()), callback, max_steps=9, max_epochs=2)
    assert [r.step for r in board.Scalars(tag)] == [4, 6, 8, 9]


def test_hyperparameters_of_any_class_are_written_out(tmp_path):
    class Known(Task):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"rate": np.float64(1e-3), "roots": [tmp_path], "kind": {"dtype": torch.float32}})

    board = tensorboard(tmp_path, Known())
    text = board.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "torch.float32" in text


def test_nan_inputs_leave_the_diagnosis_to_the_loss(tmp_path):
    class Broken(Task):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                batch[0][0, 0] = float("nan")
            return super().training_step(batch, batch_idx)

    with pytest.raises(AdapterError, match="the batch itself holds values that are not finite"):
        fit(tmp_path, Broken(nora()), AdapterCallback(log_every_n_steps=1))


def test_no_hook_stays_behind(tmp_path):
    class Broken(Task):
        def training_step(self, batch, batch_idx):
            raise KeyError("broken")

    class Ended(Task):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    broken, ended = Broken(), Ended()
    with pytest.raises(KeyError):
        fit(tmp_path, broken, AdapterCallback(log_every_n_steps=1))
    fit(tmp_path, ended, AdapterCallback(log_every_n_steps=1))
    for task in (broken, ended):
        assert not any(a._forward_pre_hooks for _, a in la.adapters(task))
        assert not any(getattr(a, "on_read", None) for _, a in la.adapters(task))


def test_one_direction_does_not_turn(tmp_path):
    """Where there are fewer than three directions, the rest are rounding errors and count for nothing."""
    task = Task(nora(groups=1, rank=None))
    layers = adapter_layers(task)
    tracker, turned = SubspaceTracker(layers), []
    for size in (0.1, 0.2, 0.4):
        with torch.no_grad():
            for adapter in layers.values():
                adapter.numerator_delta[0, 2] = size
        turned.append(tracker.functions())
    assert "rotation" not in turned[0]
    assert [t["rotation"] for t in turned[1:]] == pytest.approx([0.0, 0.0], abs=1e-6)


def test_the_nonlinearity_of_afa_goes_with_beta(tmp_path):
    task = Task(la.AFALoRA(rank=2, activation="relu", schedule=la.schedules.Linear(end=0.5)), lr=1e-3)
    one_batch = {"data": loader(24, batch_size=24), "max_epochs": 12}
    board = tensorboard(tmp_path, task, AdapterCallback(log_every_n_steps=1, figures=False), **one_batch)
    residual = {r.step: r.value for r in board.Scalars("adapter/afa/blocks.0.fc1/nonlinearity")}
    # At first a ReLU on codes of both signs: it takes away the negative ones.
    assert 0.2 < residual[1] < 0.9
    assert residual[1] > residual[3] > residual[5] > 0
    assert residual[8] == residual[12] == 0


def test_the_functional_subspace_in_tensorboard(tmp_path):
    task = Task(nora(), lr=3e-2)
    board = tensorboard(tmp_path, task, AdapterCallback(log_every_n_steps=3, figures=False), max_epochs=2)
    space = learned_subspace(list(adapter_layers(task).values()))
    values = space.singular_values
    assert len(values) == 8  # two layers of four groups
    assert board.Scalars("adapter/subspace/effective_rank")[-1].value == pytest.approx(effective_rank(values))
    assert board.Scalars("adapter/subspace/components_90")[-1].value == components(values, 0.9)
    # Nothing has changed at step 0, and the first change has none before it to compare with.
    assert [r.step for r in board.Scalars("adapter/subspace/effective_rank")] == [3, 6, 9, 12]
    assert [r.step for r in board.Scalars("adapter/subspace/drift_cosine")] == [6, 9, 12]
    assert all(0.5 < r.value <= 1 for r in board.Scalars("adapter/subspace/drift_cosine"))
    assert all(0 <= r.value <= 1.571 for r in board.Scalars("adapter/subspace/rotation"))


def test_the_spectrum_of_a_layer_in_tensorboard(tmp_path):
    task = Task(la.LoRA(rank=2))
    board = tensorboard(tmp_path, task)
    layer = task.net.blocks[1].fc2
    values = torch.linalg.svdvals(layer.delta_weight(torch.float64))
    u, _, _ = torch.linalg.svd(layer.base.weight.double())
    column_space = torch.linalg.svd(layer.delta_weight(torch.float64)).U[:, :2]
    tag = "adapter/lora/blocks.1.fc2"
    assert board.Scalars(f"{tag}/stable_rank")[-1].value == pytest.approx(stable_rank(values), rel=1e-4)
    assert board.Scalars(f"{tag}/effective_rank")[-1].value == pytest.approx(effective_rank(values), rel=1e-4)
    assert board.Scalars(f"{tag}/overlap")[-1].value == pytest.approx(overlap(u[:, :2], column_space), rel=1e-3)


def test_recording_leaves_the_training_alone(tmp_path):
    """Everything that is recorded, at every step, against nothing at all: equal weights, bit for bit."""
    methods = [nora(), la.AFALoRA(rank=2, dropout=0.1, targets=["fc1"]), la.LoRAN(rank=2, targets=["fc2"])]
    watched, alone = Task(methods), Task(methods)
    alone.load_state_dict(watched.state_dict())
    tensorboard(tmp_path, watched, AdapterCallback(log_every_n_steps=1), max_epochs=2)
    fit(tmp_path, alone, AdapterCallback(log_every_n_steps=1000, statistics=[], figures=False), max_epochs=2)
    assert_equal_bits(state(watched), state(alone))


@pytest.mark.parametrize(("statistics", "method"), [(["functions"], "nora"), (["weights"], "lora")])
def test_statistics_by_choice(tmp_path, statistics, method):
    board = tensorboard(tmp_path, Task(), AdapterCallback(statistics=statistics, figures=False))
    tags = [t for t in board.Tags()["scalars"] if t.startswith("adapter/") and "summary" not in t]
    assert {t.split("/")[1] for t in tags} == {method}
    assert not [t for t in tags if "rank" in t]


def test_subspaces_alone(tmp_path):
    """Ranks of all layers and of all functions, and nothing else of them."""
    board = tensorboard(tmp_path, Task(), AdapterCallback(statistics=["subspace"], figures=False))
    tags = [t.split("/") for t in board.Tags()["scalars"] if t.startswith("adapter/") and "summary" not in t]
    assert {t[1] for t in tags} == {"nora", "lora", "subspace"}
    per_layer = {t[3] for t in tags if t[1] in ("nora", "lora")}
    ranks = {"numerator_stable_rank", "denominator_stable_rank", "stable_rank", "effective_rank", "overlap"}
    assert per_layer == ranks


def test_several_adapted_models_keep_their_names_apart(tmp_path):
    class Pair(Task):
        def __init__(self):
            super().__init__(methods=nora())
            self.other = Task(methods=nora()).net

        def loss(self, batch):
            return super().loss(batch) + self.other(batch[0]).square().mean()

    board = tensorboard(tmp_path, Pair())
    layers = {t.split("/")[2] for t in board.Tags()["scalars"] if t.startswith("adapter/nora/")}
    assert layers == {"net.blocks.0.act", "net.blocks.1.act", "other.blocks.0.act", "other.blocks.1.act"}


def test_histograms_of_inputs_and_parameters(tmp_path):
    task = Task()
    board = tensorboard(tmp_path, task, AdapterCallback(log_every_n_steps=2))
    counts = board.Histograms("adapter/nora/blocks.0.act/inputs")[-1].histogram_value
    assert counts.num == sum(counts.bucket) == 3 * 4 * 16  # three recorded batches of 4 rows, 16 channels
    factor = board.Histograms("adapter/lora/blocks.1.fc2/lora_B")[-1].histogram_value
    assert factor.num == task.net.blocks[1].fc2.lora_B.numel()
    assert factor.sum == pytest.approx(task.net.blocks[1].fc2.lora_B.sum().item(), rel=1e-3, abs=1e-5)


def test_the_page_of_charts_matches_tags_that_are_there(tmp_path):
    methods = [nora(), la.AFALoRA(rank=2)]
    board = tensorboard(
        tmp_path, Task(methods), AdapterCallback(log_every_n_steps=2, figures=False), log_every_n_steps=1
    )
    written = layout_pb2.Layout.FromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (page,) = written.category
    tags = board.Tags()["scalars"]
    for chart in page.chart:
        patterns = chart.multiline.tag
        assert [t for t in tags if any(re.fullmatch(p, t) for p in patterns)], chart.title
    titles = [chart.title for chart in page.chart]
    assert any(t.startswith("functions:") for t in titles)
    assert any(t.startswith("AFA:") for t in titles)
    without = overview_layout(dict(la.adapters(Task(la.LoRA(rank=2)))), subspace=False)[PAGE]
    assert any(t.startswith("weights:") for t in without)
    assert not any(t.startswith(("functions:", "AFA", "weights: stable")) for t in without)


def test_final_metrics_stand_beside_the_hyperparameters(tmp_path):
    class Known(Task):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"width": 8})

    board = tensorboard(tmp_path, Known(), max_epochs=2)
    data = plugin_data_pb2.HParamsPluginData.FromString(
        board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    assert data.session_start_info.hparams["width"].number_value == 8
    assert board.Scalars("final/val/loss")[-1].value == board.Scalars("val/loss")[-1].value
    experiment = plugin_data_pb2.HParamsPluginData.FromString(
        board.SummaryMetadata("_hparams_/experiment").plugin_data.content
    )
    assert "final/val/loss" in [m.name.tag for m in experiment.experiment.metric_infos]


def test_the_recipe_as_text(tmp_path):
    board = tensorboard(tmp_path, Task(nora(groups=2)))
    text = board.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "class_path: lit_adapters.NoRA" in text
    assert "groups: 2" in text


def test_csv(tmp_path):
    task = Task()
    logger = CSVLogger(tmp_path, name="", version="")
    fit(tmp_path, task, AdapterCallback(log_every_n_steps=2), logger=logger)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for tag, value in expected(task).items():
        records = {int(row["step"]): float(row[tag]) for row in rows if row[tag]}
        assert sorted(records) == [0, 2, 4, 6]
        assert records[6] == pytest.approx(value)
