"""What FeatureChange measures, on features of known change, and through a test of the application."""

import math

import pytest
import torch

from vision.feature_change import compare_features
from vision.module import ViTClassifier


@pytest.fixture
def before():
    torch.manual_seed(0)
    return torch.randn(400, 12, dtype=torch.float64)


def test_nothing_changed(before):
    values = compare_features(before, before.clone())
    assert values == pytest.approx(
        {"feature_change": 0, "feature_shift": 0, "feature_cosine": 1, "feature_rank": 0, "feature_alignment": 0}
    )


def test_a_shift_of_all_images(before):
    shift = torch.zeros(12, dtype=torch.float64)
    shift[0] = 2.0
    values = compare_features(before, before + shift)
    spread = (before - before.mean(0)).square().sum(1).mean().sqrt()
    assert values["feature_change"] == pytest.approx(float(2 / spread))
    assert values["feature_shift"] == pytest.approx(1.0)


def test_a_change_in_two_directions(before):
    directions = torch.linalg.qr(torch.randn(12, 2, dtype=torch.float64)).Q
    amounts = torch.randn(400, 2, dtype=torch.float64)
    values = compare_features(before, before + amounts @ directions.T)
    assert values["feature_rank"] == pytest.approx(2.0, abs=0.05)
    assert values["feature_shift"] < 0.1


def test_a_change_along_what_was_there():
    torch.manual_seed(0)
    before = torch.zeros(400, 12, dtype=torch.float64)
    before[:, :3] = torch.randn(400, 3, dtype=torch.float64)
    inside, outside = before.clone(), before.clone()
    inside[:, 0] *= 3
    outside[:, 11] += torch.randn(400, dtype=torch.float64)
    assert compare_features(before, inside)["feature_alignment"] == pytest.approx(1.0)
    assert compare_features(before, outside)["feature_alignment"] == pytest.approx(0.0, abs=1e-12)
    assert compare_features(before, 2 * before)["feature_cosine"] == pytest.approx(1.0)


def test_the_backbone_before_the_training_is_that_of_the_module():
    """Also where it starts at random; and building it again leaves the random state of the training alone."""
    module = ViTClassifier("test_vit", pretrained=False, image_size=32, attention="eager")
    module.configure_model()
    random_state, x = torch.get_rng_state(), torch.zeros(1, 3, 32, 32)
    before = module.create_pretrained()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(before.eval()(x), module.model.eval()(x))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_it_is_logged_by_validations_and_tests(tmp_path, monkeypatch, precision):
    from vision.__main__ import main

    monkeypatch.chdir(tmp_path)
    cli = main(
        [
            "fit",
            "--model.backbone=test_vit",
            "--model.pretrained=false",
            "--model.train=.*",
            "--data.source=random",
            "--data.batch_size=8",
            "--data.image_size=32",
            "--data.train_subset=16",
            "--data.val_subset=20",
            "--data.test_subset=20",
            "--optimizer=torch.optim.SGD",
            "--optimizer.lr=0.01",
            "--trainer.max_epochs=1",
            f"--trainer.precision={precision}",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.callbacks=vision.feature_change.FeatureChange",
            "--trainer.callbacks.images=15",
        ]
    )
    for split in ("val", "test"):
        if split == "test":
            cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
        logged = cli.trainer.callback_metrics
        names = ("change", "shift", "cosine", "rank")
        assert all(math.isfinite(logged[f"{split}/feature_{name}"]) for name in names)
        assert 0 < logged[f"{split}/feature_alignment"] <= 1
