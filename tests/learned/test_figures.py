"""When figures are drawn, and what they show."""

import pytest
import torch

import lit_adapters as la
from lit_adapters import AdapterCallback
from lit_adapters.learned.figures import functions_figure
from lit_adapters.training import recording
from lit_adapters.training.attached import adapter_layers
from tests.lightning.tiny_task import Task, both, nora, tensorboard


@pytest.mark.slow
def test_figures_at_ends_of_epochs_where_drawing_is_cheap(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "_MAX_DRAWING_SHARE", 1e9)
    board = tensorboard(tmp_path, Task(), AdapterCallback(), max_epochs=2)
    names = ("functions", "changes", "slopes", "drift_map", "functional_subspace", "norm_map", "weight_spectra")
    assert set(board.Tags()["images"]) == {f"adapter/{name}" for name in names}
    for name in names:
        images = board.Images(f"adapter/{name}")
        assert [image.step for image in images] == [6, 12]
        assert images[0].encoded_image_string != images[1].encoded_image_string


def test_figures_at_the_end_where_drawing_takes_longer_than_training(tmp_path):
    board = tensorboard(tmp_path, Task(), AdapterCallback(), max_epochs=3)
    assert [image.step for image in board.Images("adapter/functions")] == [18]


@pytest.mark.parametrize(
    ("methods", "callback"),
    [(both(), AdapterCallback(figures=False)), (both(), AdapterCallback(statistics=[])), ([], AdapterCallback())],
)
def test_no_figures_unasked_or_without_adapters(tmp_path, methods, callback):
    board = tensorboard(tmp_path, Task(methods), callback)
    assert board.Tags()["images"] == []
    assert "train/loss" in board.Tags()["scalars"]


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
    panel = functions_figure(layers, "changes").axes[0]
    group, pretrained = [line for line in panel.lines if len(line.get_xdata()) > 2]
    assert not pretrained.get_ydata().any()
    _, initial, current = layers["blocks.0.act"].functions()
    assert max(abs(group.get_ydata())) <= (current - initial).abs().max()
    assert abs(group.get_ydata()).any()
