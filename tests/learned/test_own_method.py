"""A method that no file of the library knows: what it gets from the hooks of `Method` and `AdapterModule`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor, nn

import lit_adapters as la
from lit_adapters.files.saved import read_saved
from lit_adapters.learned.plots import learned_figure
from lit_adapters.learned.summary import summarise
from lit_adapters.methods.description import LowRankUpdate, each_layer
from tests.learned.saved_adapters import NET, adapted_net, checkpoint, rows, saved_net
from tests.lightning.tiny_task import Net, Task, tensorboard


@dataclass
class OutputScale(la.Method):
    """One trained factor for each output of a layer, as in IA3."""

    name: ClassVar[str] = "scale"
    kind: ClassVar[str] = "linear"

    targets: str | Sequence[str] = "all-linear"
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.normalise_targets()

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> la.AdapterModule:
        return OutputScaleAdapter(base, qualified_name)


class OutputScaleAdapter(la.AdapterModule):
    """h = (1 + c) * (W0 x + bias)."""

    method = "scale"
    merges_into = ("weight", "bias")
    change: nn.Parameter

    def __init__(self, base: nn.Module, qualified_name: str) -> None:
        super().__init__(base, qualified_name)
        weight = base.weight
        self.add_parameter("change", torch.zeros(len(weight), device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.unadapted(x)
        return y + self.change.to(y.dtype) * y if self.in_effect else y

    def merged_parameters(self, dtype: torch.dtype) -> dict[str, Tensor]:
        gain = 1 + self.change.to(dtype)
        return {"weight": gain[:, None] * self.base.weight.to(dtype), "bias": gain * self.base.bias.to(dtype)}


class TalkativeAdapter(OutputScaleAdapter):
    """The same, with what it can say of itself."""

    method = "talkative"

    def statistics(self) -> dict[str, float]:
        return {"scale_change": self.change.detach().square().mean().sqrt().item()}

    def learned_update(self) -> Tensor:
        return self.change.detach()

    def charts(self) -> dict[str, str]:
        return {"scales: rms of their change, each layer": each_layer("scale_change")}


@dataclass
class Talkative(OutputScale):
    """The configuration of `TalkativeAdapter`."""

    name: ClassVar[str] = "talkative"

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> la.AdapterModule:
        return TalkativeAdapter(base, qualified_name)


@pytest.mark.parametrize("method", [OutputScale(), Talkative()])
def test_saving_and_loading(tmp_path, method):
    net = saved_net(tmp_path, method)
    loaded = Net()
    la.load_adapters(loaded, tmp_path)
    x = torch.randn(5, 8)
    assert torch.equal(loaded.eval()(x), net(x))
    assert not torch.equal(Net().eval()(x), net(x))


def test_merging(run, tmp_path):
    net = saved_net(tmp_path / "adapter", OutputScale())
    printed = run("merge", tmp_path / "adapter", "--out", tmp_path / "out", "--base", NET)
    assert printed.startswith("merged 4 layers, error ")
    plain = Net().eval()
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    x = torch.randn(5, 8)
    torch.testing.assert_close(plain(x), net(x))


def test_inspect_shows_sizes_of_a_method_without_hooks(run, tmp_path):
    saved_net(tmp_path, OutputScale())
    printed = run("inspect", tmp_path)
    row = rows(printed)["blocks.0.fc1"]
    assert (row["method"], row["size"], row["parameters"], row["change"]) == ("scale", "change 16", "16", "-")
    assert row["merges"] == "yes"
    assert "no merging" not in printed


def test_inspect_and_plot_of_a_method_with_hooks(run, tmp_path):
    net = saved_net(tmp_path, Talkative())
    row = rows(run("inspect", tmp_path))["blocks.1.fc2"]
    assert float(row["change"]) == pytest.approx(net.blocks[1].fc2.change.norm().item(), rel=1e-3)
    assert row["stable rank"] == "-"
    figure = learned_figure(summarise(read_saved(tmp_path)), [])
    assert len(figure.axes[0].lines) > 0


def test_a_checkpoint_that_does_not_tell_the_sizes(run, tmp_path):
    _, path = checkpoint(tmp_path, Task(OutputScale()))
    row = rows(run("inspect", path))["blocks.0.fc1"]
    assert (row["parameters"], row["change"], row["merges"]) == ("16", "-", "yes")


def test_diff_compares_what_the_method_calls_its_update(run, tmp_path):
    nets = [saved_net(tmp_path / str(seed), Talkative(), seed=seed) for seed in (0, 1)]
    x, y = (net.blocks[0].fc1.change.detach() for net in nets)
    row = rows(run("diff", tmp_path / "0", tmp_path / "1"))["blocks.0.fc1"]
    assert float(row["cosine"]) == pytest.approx(torch.cosine_similarity(x, y, dim=0).item(), abs=6e-4)
    assert float(row["norm change"].rstrip("%")) / 100 == pytest.approx((y.norm() / x.norm()).item() - 1, abs=6e-4)


def test_diff_says_why_a_method_without_hooks_is_not_compared(run, tmp_path):
    saved_net(tmp_path / "a", OutputScale())
    saved_net(tmp_path / "b", Talkative())
    printed = run("diff", tmp_path / "a", tmp_path / "b")
    assert "not compared, blocks.0.fc1: scale and talkative: only two updates of a weight" in printed


def test_tensorboard_has_its_scalars_chart_and_histograms(tmp_path):
    task = Task([Talkative()])
    board = tensorboard(tmp_path, task, la.AdapterCallback(log_every_n_steps=2))
    tag = "adapter/talkative/blocks.0.fc1"
    assert board.Scalars(f"{tag}/scale_change")[-1].value == pytest.approx(
        task.net.blocks[0].fc1.statistics()["scale_change"]
    )
    assert board.Histograms(f"{tag}/change")[-1].histogram_value.num == 16
    written = layout_pb2.Layout.FromString(board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    titles = [chart.title for chart in written.category[0].chart]
    assert titles == ["does it learn? train/loss and val/loss", "scales: rms of their change, each layer"]


def test_a_run_with_a_method_without_hooks(tmp_path):
    board = tensorboard(tmp_path, Task([OutputScale()]), la.AdapterCallback(log_every_n_steps=2))
    assert "train/loss" in board.Tags()["scalars"]
    assert "adapter/scale/blocks.0.fc1/change" in board.Tags()["histograms"]


class PairAdapter(OutputScaleAdapter):
    """A weight update by factors under names of its own; it does not merge."""

    method = "pair"
    merges_into = ()

    def __init__(self, base: nn.Module, qualified_name: str) -> None:
        super().__init__(base, qualified_name)
        outputs, inputs = base.weight.shape
        self.add_parameter("left", torch.zeros(outputs, 2, device=base.weight.device))
        self.add_parameter("right", torch.ones(2, inputs, device=base.weight.device))

    def low_rank_update(self) -> LowRankUpdate:
        return LowRankUpdate(self.left.detach(), self.right.detach(), 3.0)


@dataclass
class Pair(OutputScale):
    """The configuration of `PairAdapter`."""

    name: ClassVar[str] = "pair"

    def wrap(self, base: nn.Module, qualified_name: str, parent: nn.Module) -> la.AdapterModule:
        return PairAdapter(base, qualified_name)


def test_factors_alone_give_spectra_ranks_and_a_comparison(run, tmp_path):
    net = saved_net(tmp_path / "a", Pair())
    saved_net(tmp_path / "b", la.LoRA(rank=3))
    layer = net.blocks[0].fc1
    update = 3.0 * (layer.left @ layer.right).detach()
    row = rows(run("inspect", tmp_path / "a"))["blocks.0.fc1"]
    assert (row["size"], row["merges"]) == ("16 x 8, r = 2", "no")
    assert float(row["change"]) == pytest.approx(update.norm().item(), rel=1e-3)
    row = rows(run("diff", tmp_path / "a", tmp_path / "b"))["blocks.0.fc1"]
    other = adapted_net(la.LoRA(rank=3)).blocks[0].fc1.delta_weight().detach()
    cosine = torch.cosine_similarity(update.flatten(), other.flatten(), dim=0).item()
    assert float(row["cosine"]) == pytest.approx(cosine, abs=6e-4)
    assert row["overlap"]
    assert layer.singular_values()["update"].norm().item() == pytest.approx(update.norm().item(), rel=1e-5)
