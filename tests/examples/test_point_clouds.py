"""The example of point clouds: its geometry and shapes, the model, the count of parameters, and the program."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

import lit_adapters as la
from examples.point_clouds.__main__ import ARMS, PARTS, main
from examples.point_clouds.geometry import farthest_points, group, nearest_points
from examples.point_clouds.model import PatchEncoder, PointTransformer
from examples.point_clouds.shapes import ADAPTATION, PRETRAINING, clouds
from lit_adapters.methods.token_selection import take


def cloud(count: int = 40, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_farthest_points_against_brute_force():
    points = cloud()
    for positions, found in zip(points, farthest_points(points, 12), strict=True):
        mean = positions.mean(dim=0)
        chosen = [max(range(40), key=lambda i: (positions[i] - mean).norm())]
        while len(chosen) < 12:
            chosen.append(max(range(40), key=lambda i: min((positions[i] - positions[j]).norm() for j in chosen)))
        assert found.tolist() == chosen


def test_nearest_points_against_a_sort():
    points, centres = cloud(), cloud(5) + 0.1
    found = nearest_points(points, centres, 7)
    for b, c in itertools.product(range(2), range(5)):
        distance = (points[b] - centres[b, c]).norm(dim=-1).tolist()
        assert found[b, c].tolist() == sorted(range(40), key=distance.__getitem__)[:7]


def test_patches_are_relative_to_their_centre():
    points = cloud()
    centres, patches = group(points, 4, 6)
    assert torch.equal(centres, take(points, farthest_points(points, 4)))
    assert torch.equal(patches[:, :, 0], torch.zeros(2, 4, 3, dtype=torch.float64))  # the centre is its nearest point
    known = {tuple(p) for p in points[1].tolist()}
    assert all(tuple(p) in known for p in centres[1].tolist())


def test_the_order_of_points_does_not_matter():
    torch.manual_seed(0)
    points, shuffled = cloud(64), cloud(64)[:, torch.randperm(64)]
    model = PointTransformer(3, width=16, depth=2, heads=2, scales=((8, 6), (4, 9)), keep=(3, 2)).double().eval()
    model.select_tokens()
    model.double()
    (one, loss), (other, other_loss) = model(points), model(shuffled)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, other_loss, rtol=1e-10, atol=1e-12)
    moved = points.clone()
    moved[:, 0] += 0.5
    assert (model(moved)[0] - one).abs().max() > 1e-6  # but points do
    encoder = PatchEncoder(8, 4).double().eval()
    patches = group(points, 8, 6)[1]
    torch.testing.assert_close(encoder(patches), encoder(patches.flip(2)), rtol=1e-12, atol=1e-12)


def test_the_selected_tokens_stand_at_the_end_with_their_codes():
    torch.manual_seed(0)
    points = cloud(64).float()
    model = PointTransformer(3, width=16, depth=1, heads=2, scales=((8, 6), (4, 9)), keep=(3, 2)).eval()
    plain, plain_codes, none = model.embed(points)
    assert none == 0
    assert model.select_tokens() == 5
    tokens, codes, _ = model.embed(points)
    assert torch.equal(tokens[:, :9], plain)
    assert torch.equal(codes[:, :9], plain_codes)
    indices = model.selector([plain[:, 1:], model.encoder(group(points, 4, 9)[1])])[0]
    assert torch.equal(tokens[:, 9:12], take(plain[:, 1:], indices[0]))
    assert torch.equal(codes[:, 9:12], take(plain_codes[:, 1:], indices[0]))
    assert tokens.shape == (2, 14, 16)


def test_the_count_of_parameters_at_the_sizes_of_point_mae():
    with torch.device("meta"):
        model = PointTransformer(15, 384, 12, 6, ((128, 32), (64, 64)), (32, 8), hidden=128, head_hidden=256)
        selected = model.select_tokens()
    report = la.attach(model, la.PointLoRA(selected=selected), train=["selector", *PARTS])
    assert selected == 40
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 772_752
    assert report.adapter_parameters == 221_184 + 125_312
    assert report.shared == {"point_lora": 125_312}
    assert sum(report.head.values()) == 267_535


@pytest.mark.parametrize("shapes", [PRETRAINING, ADAPTATION])
def test_clouds_are_centred_finite_and_follow_their_seed(shapes):
    surfaces = list(shapes.values())
    positions, labels = clouds(surfaces, 3, 60, seed=1, noise=0.01, rotated=True).tensors
    assert positions.shape == (18, 60, 3)
    assert labels.tolist() == [i for i in range(6) for _ in range(3)]
    torch.testing.assert_close(positions.mean(dim=1), torch.zeros(18, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(positions.norm(dim=-1).amax(dim=1), torch.ones(18))
    again, other = (clouds(surfaces, 3, 60, seed=s, noise=0.01, rotated=True).tensors[0] for s in (1, 2))
    assert torch.equal(again, positions)
    assert not torch.equal(other, positions)


def test_points_lie_on_their_surfaces():
    u = torch.rand(600, 3, generator=torch.Generator().manual_seed(0))
    on = {name: surface(u) for name, surface in (PRETRAINING | ADAPTATION).items()}
    ones = torch.ones(600)
    torch.testing.assert_close(on["sphere"].norm(dim=1), ones)
    torch.testing.assert_close(on["bowl"].norm(dim=1), ones)
    torch.testing.assert_close(on["box"].abs().amax(dim=1), ones)
    torch.testing.assert_close(on["tube"][:, :2].norm(dim=1), 0.7 * ones)
    torch.testing.assert_close(((on["torus"][:, :2].norm(dim=1) - 1) ** 2 + on["torus"][:, 2] ** 2).sqrt(), 0.35 * ones)
    torch.testing.assert_close(on["cone"][:, :2].norm(dim=1), (1 - on["cone"][:, 2]) / 2)
    torch.testing.assert_close(on["hourglass"][:, :2].norm(dim=1), on["hourglass"][:, 2].abs())
    assert on["bowl"][:, 2].max() <= 0
    assert all(torch.isfinite(points).all() for points in on.values())


@pytest.mark.slow
def test_the_program_adapts_and_prints_every_arm(capsys):
    main(["--short"])
    text = capsys.readouterr().out
    for name in ARMS:
        assert re.search(rf"^{name} +[\d,]+ +[01]\.\d+", text, re.MULTILINE), text
    pretrained = re.search(r"accuracy (\d\.\d+)", text).group(1)
    assert float(pretrained) > 0.3  # a sixth by chance
