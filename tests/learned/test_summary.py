"""`lit-adapters inspect` and `diff`: printed numbers against brute force on the full matrices."""

import peft
import pytest
import torch
from PIL import Image
from torch import nn

import lit_adapters as la
from lit_adapters.files.saved import read_saved
from lit_adapters.learned.plots import learned_figure
from lit_adapters.learned.summary import learned_functions, learned_subspace, summarise
from lit_adapters.schedules import Hold
from tests.learned.saved_adapters import Deep, adapted_net, change_of, checkpoint, ranks, refuses, rows, saved_net
from tests.lightning.tiny_task import Net, Task
from tests.matrix import ALL

LORA = la.LoRA(rank=2, alpha=4.0)


def check_row(row, change, values, parameters):
    assert float(row["change"]) == pytest.approx(change, rel=1e-3)
    assert float(row["stable rank"]) == pytest.approx(ranks(values)[0], abs=0.006)
    assert float(row["effective rank"]) == pytest.approx(ranks(values)[1], abs=0.006)
    assert int(row["parameters"].replace(",", "")) == parameters


@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "loran", "loran-sine", "afa", "afa-rational"])
def test_inspect_weights_equals_brute_force(run, tmp_path, name):
    net = saved_net(tmp_path, ALL[name])
    printed = run("inspect", tmp_path)
    found = rows(printed)
    assert list(found) == [n for n, _ in la.adapters(net)]
    for layer, adapter in la.adapters(net):
        product = adapter.scaling * adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
        update = adapter.delta_weight(torch.float64).detach() if name.startswith("loran") else product
        parameters = sum(p.numel() for p in adapter.adapter_parameters().values())
        check_row(found[layer], update.norm().item(), torch.linalg.svdvals(product), parameters)
        assert found[layer]["size"] == f"{product.shape[0]} x {product.shape[1]}, r = {adapter.rank}"
        assert found[layer]["merges"] == "yes"
    total = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert f"total: {total:,} trained parameters" in printed
    assert "trained besides: 27 parameters in head.weight, head.bias" in printed


@pytest.mark.parametrize("name", ["nora", "nora-anchored", "nora-direct", "nora-published"])
def test_inspect_functions_equals_brute_force(run, tmp_path, name):
    net = saved_net(tmp_path, ALL[name])
    printed = run("inspect", tmp_path)
    # The density is the normal one with deviation 2 on [-10, 10], as assumed before any calibration.
    weighted, finely = ({n: _weighted(a, points) for n, a in la.adapters(net)} for points in (256, 4001))
    for layer, values in weighted.items():
        row = rows(printed)[layer]
        parameters = sum(p.numel() for p in dict(la.adapters(net))[layer].adapter_parameters().values())
        check_row(row, values.norm(dim=1).max().item(), torch.linalg.svdvals(values), parameters)
        assert row["merges"] == "no"
    values = torch.linalg.svdvals(torch.cat(list(finely.values())))
    energy = values.square().cumsum(0) / values.square().sum()
    needed = [int((energy < part).sum()) + 1 for part in (0.9, 0.99)]
    effective = float(printed.split("have effective rank ")[1].split(";")[0])
    assert effective == pytest.approx(ranks(values)[1], rel=0.01)
    assert f"{needed[0]} components hold 90% of their energy, {needed[1]} hold 99%" in printed


def _weighted(adapter, points):
    x = torch.linspace(-10, 10, points, dtype=torch.float64)
    share = torch.exp(-x.square() / 8)
    return change_of(adapter, x) * (share / share.sum()).sqrt()


def test_layers_of_very_different_ranges_share_one_functional_subspace(tmp_path):
    """The sum of all squared singular values is that of all squared changes, each under its own measured density."""
    net = Net()
    la.attach(net, la.NoRA(groups=4, fit_range="calibrate"))
    generator = torch.Generator().manual_seed(0)
    for (_, adapter), scale in zip(la.adapters(net), (0.05, 20.0), strict=True):
        adapter.calibrate(scale * torch.randn(20_000, generator=generator))
        adapter.numerator_B.data.normal_(std=0.3, generator=generator)
    la.save_adapters(net, tmp_path)
    expected = 0.0
    for _, adapter in la.adapters(net):
        weights = adapter.density.double() / adapter.density.sum()
        expected += (change_of(adapter, adapter.grid()).square() * weights).sum().item()
    space = learned_subspace(list(learned_functions(read_saved(tmp_path)).values()))
    assert space.singular_values.square().sum().item() == pytest.approx(expected, rel=0.02)


def test_a_checkpoint_is_inspected_as_its_directory(run, tmp_path):
    task, path = checkpoint(tmp_path / "run")
    la.save_adapters(task.net, tmp_path / "adapter")
    from_file, from_directory = run("inspect", path), run("inspect", tmp_path / "adapter")
    assert rows(from_file) == rows(from_directory)
    assert rows(from_file)
    assert from_file.splitlines()[2:] == from_directory.splitlines()[2:]
    assert "written by tests.lightning.tiny_task.Task" in from_file
    assert f"{path.stat().st_size / 2**20:.2f} MiB" in from_file


def test_layers_of_two_models_in_one_checkpoint_are_told_apart(run, tmp_path):
    class Pair(Task):
        def __init__(self):
            super().__init__(methods=la.LoRA(rank=2))
            self.other = Task(methods=la.LoRA(rank=3)).net

        def loss(self, batch):
            return super().loss(batch) + self.other(batch[0]).square().mean()

    _, path = checkpoint(tmp_path, Pair())
    found = rows(run("inspect", path))
    assert found["net.blocks.0.fc1"]["size"].endswith("r = 2")
    assert found["other.blocks.0.fc1"]["size"].endswith("r = 3")
    assert "several adapted models ('net', 'other')" in refuses("merge", path, "--out", tmp_path / "out")


def test_each_layer_is_read_with_the_settings_of_its_own_method(run, tmp_path):
    methods = la.LoRA(rank=2, alpha=2.0, targets=["fc1"]), la.LoRA(rank=2, alpha=64.0, targets=r".*1\.fc2")
    net = saved_net(tmp_path, *methods)
    for layer, adapter in la.adapters(net):
        assert float(rows(run("inspect", tmp_path))[layer]["change"]) == pytest.approx(
            adapter.delta_weight().norm().item(), rel=1e-3
        )


def test_inspect_tells_beta_and_why_nothing_merges(run, tmp_path):
    net = adapted_net(la.AFALoRA(rank=2, schedule=la.schedules.Linear(end=0.5)))
    la.set_progress(net, 0.25)
    la.save_adapters(net, tmp_path)
    printed = run("inspect", tmp_path)
    assert {row["merges"] for row in rows(printed).values()} == {"no"}
    assert {row["note"] for row in rows(printed).values()} == {"beta 0.5"}
    assert "no merging into weights, 4 layers:" in printed
    assert "nonlinear at beta = 0.5" in printed
    assert "schedule Linear(start=0.0, end=0.5)" in printed


def test_inspect_counts_a_method_of_peft(run, tmp_path):
    net = Net()
    la.attach(net, la.Peft(peft.LoHaConfig(r=2, target_modules=["fc1"])))
    la.save_adapters(net, tmp_path)
    found = rows(run("inspect", tmp_path))
    assert found["blocks.0.fc1"]["parameters"] == str(2 * (16 * 2 + 2 * 8))
    assert found["blocks.0.fc1"]["change"] == "-"


def test_plot(run, tmp_path):
    saved_net(tmp_path / "adapter", *(la.NoRA(groups=4), LORA))
    run("inspect", tmp_path / "adapter", "--plot", tmp_path / "learned.png")
    with Image.open(tmp_path / "learned.png") as image:
        pixels = torch.tensor(list(image.convert("L").tobytes()))
        assert image.width > 1500
        assert 0.01 < (pixels < 200).float().mean() < 0.5
    assert "not supported" in refuses("inspect", tmp_path / "adapter", "--plot", tmp_path / "learned.xyz")


def test_a_plot_of_many_layers_has_one_curve_for_each_kind_of_layer(tmp_path):
    net = Deep(40)
    la.attach(net, LORA)
    la.save_adapters(net, tmp_path)
    summaries = summarise(read_saved(tmp_path))
    assert len(summaries) == 120
    panel = learned_figure(summaries, []).axes[0]
    assert panel.get_legend_handles_labels()[1] == ["layers.*.q", "layers.*.v", "layers.*.fc"]
    assert [len(line.get_xdata()) for line in panel.lines] == [40, 40, 40]


# diff


@pytest.mark.parametrize(("first", "second"), [("lora", "lora"), ("lora", "dora"), ("rslora", "loran")])
def test_diff_of_weights_equals_brute_force(run, tmp_path, first, second):
    nets = [saved_net(tmp_path / str(i), ALL[name], seed=i) for i, name in enumerate((first, second))]
    found = rows(run("diff", tmp_path / "0", tmp_path / "1"))
    for layer, adapter in la.adapters(nets[0]):
        other = dict(la.adapters(nets[1]))[layer]
        x, y = (a.scaling * a.lora_B.detach().double() @ a.lora_A.detach().double() for a in (adapter, other))
        row = found[layer]
        assert float(row["cosine"]) == pytest.approx((x * y).sum().item() / (x.norm() * y.norm()).item(), abs=6e-4)
        assert float(row["norm change"].rstrip("%")) / 100 == pytest.approx((y.norm() / x.norm()).item() - 1, abs=6e-4)
        bases = [torch.linalg.svd(z).U[:, : a.rank] for z, a in ((x, adapter), (y, other))]
        cosines = torch.linalg.svdvals(bases[0].T @ bases[1]).clamp(max=1)
        assert float(row["overlap"]) == pytest.approx(cosines.square().mean().item(), abs=6e-4)
        angles = [float(a) for a in row["angles"].rstrip("°").split(" to ")]
        assert angles == pytest.approx(torch.rad2deg(cosines.acos())[[0, -1]].tolist(), abs=0.51)
        chance = max(adapter.rank, other.rank) / x.shape[0]
        assert float(row["by chance"]) == pytest.approx(chance, abs=6e-4)


def test_diff_of_functions_with_other_groups(run, tmp_path):
    """Channel by channel: 2 groups against 4."""
    nets = [saved_net(tmp_path / str(g), la.NoRA(groups=g), seed=g) for g in (2, 4)]
    found = rows(run("diff", tmp_path / "2", tmp_path / "4"))
    x = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    share = torch.exp(-x.square() / 8)
    for layer, adapter in la.adapters(nets[0]):
        first, second = (
            change_of(a, x).repeat_interleave(16 // a.config.groups, 0) * share.sqrt()
            for a in (adapter, dict(la.adapters(nets[1]))[layer])
        )
        cosine = (first * second).sum() / (first.norm() * second.norm())
        assert float(found[layer]["cosine"]) == pytest.approx(cosine.item(), abs=6e-4)
        change = second.norm() / first.norm() - 1
        assert float(found[layer]["norm change"].rstrip("%")) / 100 == pytest.approx(change.item(), abs=6e-4)


def test_diff_with_itself_and_with_an_untrained_one(run, tmp_path):
    saved_net(tmp_path / "a", la.NoRA(groups=4), LORA)
    printed = run("diff", tmp_path / "a", tmp_path / "a")
    assert "6 layers in both: mean cosine +1.000, mean overlap of column spaces 1.000" in printed
    fresh = Net()
    la.attach(fresh, [la.NoRA(groups=4), LORA])
    la.save_adapters(fresh, tmp_path / "fresh")
    row = rows(run("diff", tmp_path / "a", tmp_path / "fresh"))["blocks.0.fc1"]
    assert (row["cosine"], row["norm change"]) == ("+0.000", "-100.0%")


def test_diff_of_what_is_no_update_of_low_rank(run, tmp_path):
    net = saved_net(tmp_path / "a", la.DoRA(rank=2, targets=["fc1"]))
    with torch.no_grad():
        net.blocks[0].fc1.magnitude.mul_(3)
    la.save_adapters(net, tmp_path / "b")
    printed = run("diff", tmp_path / "a", tmp_path / "b")
    assert "not in the table, blocks.0.fc1 differs in magnitude by 66.7% of its norm" in printed
    assert "blocks.1.fc1 differs" not in printed
    for i, method in enumerate((la.VeRA(rank=2), la.LoRA2(width=2, rank=2))):  # whose vectors are parts of the update
        for folder in "ab":
            saved_net(tmp_path / f"{i}{folder}", method, seed=ord(folder))
        assert "differs in" not in run("diff", tmp_path / f"{i}a", tmp_path / f"{i}b")


@pytest.mark.parametrize(
    ("method", "tensor"),
    [
        (la.AFALoRA(rank=2, activation="rational", groups=2, schedule=Hold(1.0)), "sigma_numerator"),
        (la.LoRAN(rank=2, function="sine", frequency=3.0), "frequency"),
    ],
)
def test_diff_names_whatever_an_update_does_not_show(run, tmp_path, method, tensor):
    net = saved_net(tmp_path / "a", method)
    with torch.no_grad():
        la.save_adapters(net, tmp_path / "a")
        getattr(dict(la.adapters(net))["blocks.0.fc1"], tensor).add_(1.0)
    la.save_adapters(net, tmp_path / "b")
    assert f"not in the table, blocks.0.fc1 differs in {tensor} " in run("diff", tmp_path / "a", tmp_path / "b")


def test_a_file_does_not_tell_what_group_affine_does_to_an_unknown_activation(run, tmp_path):
    for folder in "ab":
        net = saved_net(tmp_path / folder, la.GroupAffine(groups=4), seed=ord(folder))
    printed = run("inspect", tmp_path / "b")
    row = rows(printed)["blocks.0.act"]
    assert (row["size"], row["change"], row["effective rank"]) == ("4 groups", "-", "-")
    assert "its change depends on the activation" in row["note"]
    assert dict(la.adapters(net))["blocks.0.act"].summary().change > 0  # known beside the model
    printed = run("diff", tmp_path / "a", tmp_path / "b")
    assert -1 < float(rows(printed)["blocks.0.act"]["cosine"]) < 1


def test_diff_of_updates_with_a_start_of_their_own(run, tmp_path):
    """The random start is in both products B A, and does not count."""
    method = la.LoRAN(rank=2, function="identity", start_size=1.0, targets=["fc1"])
    net = Net()
    la.attach(net, method)
    for folder, sign in (("a", 1), ("b", -1)):
        with torch.no_grad():
            layer = net.blocks[0].fc1
            layer.lora_B.copy_(layer.start_B + sign * 0.01)
        la.save_adapters(net, tmp_path / folder)
    assert float(rows(run("diff", tmp_path / "a", tmp_path / "b"))["blocks.0.fc1"]["cosine"]) == -1.0
    update, whole = layer.low_rank_update(), layer.delta_weight(torch.float64)
    torch.testing.assert_close(update.scale * update.b.double() @ update.a.double(), whole, rtol=1e-4, atol=1e-7)


def test_diff_lists_what_it_does_not_compare(run, tmp_path):
    saved_net(tmp_path / "a", la.LoRA(rank=2, targets=["fc1"]))
    saved_net(tmp_path / "b", la.LoRA(rank=2, targets=["fc2"]))
    printed = run("diff", tmp_path / "a", tmp_path / "b")
    assert "only in the first, 2 layers: blocks.0.fc1, blocks.1.fc1" in printed
    assert "only in the second, 2 layers: blocks.0.fc2, blocks.1.fc2" in printed
    assert printed.endswith("no layer is in both\n")
    wide = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 6))
    for folder, net in zip("cd", wide, strict=True):
        la.attach(net, la.LoRA(rank=2))
        la.save_adapters(net, tmp_path / folder)
    assert "not compared, 0: lora: weights of 4 x 8 and 6 x 8" in run("diff", tmp_path / "c", tmp_path / "d")
