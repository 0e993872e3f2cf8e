"""What a logger receives is what the adapters say, under the names the contract gives."""

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import lit_adapters as la
from lit_adapters import AdapterCallback
from lit_adapters.callback.attached import adapter_layers
from lit_adapters.callback.figures import functions_figure
from tests.callback.tiny_task import Task, both, events, fit, nora


def expected(task):
    """Tags and values of this moment, from the adapters themselves."""
    return {
        f"adapter/{a.method}/{name}/{key}": value
        for name, a in la.adapters(task.net)
        for key, value in a.statistics().items()
    }


def tensorboard(tmp_path, task, *callbacks, **changes):
    logger = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
    fit(tmp_path, task, *(callbacks or [AdapterCallback(figures=False)]), logger=logger, **changes)
    return events(tmp_path)


def test_scalars_in_tensorboard_are_the_adapters_statistics(tmp_path):
    task = Task()
    start = expected(task)
    board = tensorboard(tmp_path, task, AdapterCallback(log_every_n_steps=4, figures=False), max_epochs=2)
    end = expected(task)
    tags = {t for t in board.Tags()["scalars"] if t.startswith("adapter/") and not t.startswith("adapter/summary/")}
    assert tags == end.keys()
    assert {"adapter/nora/blocks.0.act/drift", "adapter/lora/blocks.1.fc2/relative_norm"} <= tags
    for tag in tags:
        records = board.Scalars(tag)
        assert [r.step for r in records] == [0, 4, 6, 8, 12]  # the start, every fourth step, and ends of epochs
        assert records[0].value == pytest.approx(start[tag])
        assert records[-1].value == pytest.approx(end[tag])
    assert end["adapter/nora/blocks.0.act/drift"] > 2 * start["adapter/nora/blocks.0.act/drift"] > 0


def test_the_summary_is_the_mean_over_layers(tmp_path):
    task = Task()
    board = tensorboard(tmp_path, task)
    for statistic in ("drift", "relative_drift", "sup_drift", "relative_norm"):
        values = [v for tag, v in expected(task).items() if tag.endswith(f"/{statistic}")]
        summary = board.Scalars(f"adapter/summary/{statistic}")[-1]
        assert summary.value == pytest.approx(sum(values) / len(values))


@pytest.mark.parametrize(("statistics", "method"), [(["functions"], "nora"), (["weights"], "lora")])
def test_statistics_by_choice(tmp_path, statistics, method):
    board = tensorboard(tmp_path, Task(), AdapterCallback(statistics=statistics, figures=False))
    tags = [t for t in board.Tags()["scalars"] if t.startswith("adapter/") and "summary" not in t]
    assert {t.split("/")[1] for t in tags} == {method}


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


def test_figures_at_every_end_of_an_epoch(tmp_path):
    board = tensorboard(tmp_path, Task(), AdapterCallback(), max_epochs=2)
    for tag in ("adapter/functions", "adapter/changes"):
        assert [image.step for image in board.Images(tag)] == [6, 12]
    images = [image.encoded_image_string for image in board.Images("adapter/changes")]
    assert len(set(images)) == 2


@pytest.mark.parametrize(
    ("methods", "callback"),
    [(both(), AdapterCallback(figures=False)), (la.LoRA(rank=2), AdapterCallback()), ([], AdapterCallback())],
)
def test_no_figures_unasked_or_without_functions(tmp_path, methods, callback):
    board = tensorboard(tmp_path, Task(methods), callback)
    assert board.Tags()["images"] == []
    assert "train/loss" in board.Tags()["scalars"]


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


def moved_layers(method, groups=4):
    """Activations whose functions were moved, by name."""
    task = Task(nora(base=method, groups=groups))
    with torch.no_grad():
        for _, adapter in la.adapters(task):
            for name, parameter in adapter.adapter_parameters().items():
                parameter.fill_(0.5) if name.endswith("_B") else None
    return adapter_layers(task)


@pytest.mark.parametrize("base", ["rational", "anchored"])
def test_a_figure_shows_the_functions_within_the_range_of_the_inputs(base):
    layers = moved_layers(base)
    figure = functions_figure(layers)
    assert [a.get_title().split()[0] for a in figure.axes] == ["blocks.0.act", "blocks.1.act"]
    grid, initial, current = layers["blocks.1.act"].functions()
    *groups, pretrained = [line for line in figure.axes[1].lines if len(line.get_xdata()) > 2]
    assert len(groups) == 4
    x = torch.tensor(pretrained.get_xdata())
    shown = torch.isin(grid, x)
    assert torch.equal(torch.tensor(pretrained.get_ydata()), initial[shown])
    assert all(torch.equal(torch.tensor(g.get_ydata()), c[shown]) for g, c in zip(groups, current, strict=True))
    # N(0, 2^2) is assumed: its density falls to a thousandth at 3.7 standard deviations
    assert x[-1] == pytest.approx(7.43, abs=0.1)
    assert x[0] == pytest.approx(-x[-1])


def test_a_figure_of_changes_has_the_pretrained_function_at_zero():
    layers = moved_layers("anchored", groups=1)
    panel = functions_figure(layers, changes=True).axes[0]
    group, pretrained = [line for line in panel.lines if len(line.get_xdata()) > 2]
    assert not pretrained.get_ydata().any()
    _, initial, current = layers["blocks.0.act"].functions()
    assert max(abs(group.get_ydata())) <= (current - initial).abs().max()
    assert abs(group.get_ydata()).any()
