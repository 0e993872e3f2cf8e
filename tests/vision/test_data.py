"""The data module: what batches hold, which samples go where, and where images come from."""

from __future__ import annotations

import base64
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from timm.data import create_transform
from torchvision.datasets import CIFAR10

from lit_adapters.errors import DataError
from tests.vision.image_folders import batches, fitted, module, noise, pixels, png
from tests.vision.recorder import Recorder
from vision import images, sources
from vision.data import CIFARDataModule

# What batches hold


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(8, 8), (12, 7)], ids=["square", "wide"])
def test_equals_timm_transform(tmp_path, interpolation, size):
    for i in range(5):
        path = tmp_path / "test" / "bee" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(i, size).save(path)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    data = module(tmp_path, image_size=20, batch_size=2, interpolation=interpolation, mean=mean, std=std)
    data.setup("test")
    transform = create_transform(20, interpolation=interpolation, crop_pct=1.0, crop_mode="squash", mean=mean, std=std)
    got, labels = batches(data.test_dataloader())
    assert torch.equal(got, torch.stack([transform(noise(i, size)) for i in range(5)]))
    assert labels.dtype == torch.int64
    assert torch.equal(batches(data.predict_dataloader())[0], got)
    assert torch.equal(data.test_dataloader().dataset[3][0], got[3])


def test_images_of_mixed_sizes_and_modes_stay_encoded(tmp_path):
    (tmp_path / "test" / "bee").mkdir(parents=True)
    pictures = [noise(0), noise(1, (30, 10)), noise(2).convert("L")]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "test" / "bee" / f"{i}.png")
    data = module(tmp_path)
    data.setup("test")
    loader = data.test_dataloader()
    assert isinstance(loader.dataset.images, list)
    transform = create_transform(16, interpolation="bicubic", crop_pct=1.0, crop_mode="squash")
    assert torch.equal(batches(loader)[0], torch.stack([transform(p.convert("RGB")) for p in pictures]))


def test_many_bytes_stay_encoded(folder, monkeypatch):
    in_memory = fitted(folder)
    monkeypatch.setattr(images, "MAX_DECODED_BYTES", 1000)
    encoded = fitted(folder)
    assert isinstance(encoded.train_dataloader().dataset.images, list)
    for loader in ("train_dataloader", "val_dataloader"):
        expected = batches(getattr(in_memory, loader)())
        assert torch.equal(batches(getattr(encoded, loader)())[0], expected[0])


def test_training_images_are_plain_or_mirrored(folder):
    data = fitted(folder, val_fraction=0.2)
    x, y = batches(data.train_dataloader())
    dataset = data.train_dataloader().dataset
    plain = [dataset[i][0] for i in range(len(dataset))]
    by_image = {image.numpy().tobytes(): (i, False) for i, image in enumerate(plain)}
    by_image |= {image.flip(-1).numpy().tobytes(): (i, True) for i, image in enumerate(plain)}
    found = [by_image[image.numpy().tobytes()] for image in x]
    assert sorted(i for i, _ in found) == list(range(48))
    assert torch.equal(y, dataset.labels[[i for i, _ in found]])
    assert 12 <= sum(mirrored for _, mirrored in found) <= 36
    unflipped = batches(fitted(folder, val_fraction=0.2, hflip=False).train_dataloader())[0]
    assert torch.equal(unflipped, torch.stack([plain[i] for i, _ in found]))


# Which samples


def test_splits_are_disjoint_stratified_and_seeded(folder):
    data = fitted(folder, val_fraction=0.25)
    train, val = data.train_dataloader(), data.val_dataloader()
    everything = {Image.open(path).tobytes() for path in (folder / "train").rglob("*.png")}
    assert len(pixels(train)) == 45
    assert len(pixels(val)) == 15
    assert set(pixels(train)) | set(pixels(val)) == everything
    assert train.dataset.labels.bincount().tolist() == [15] * 3
    assert val.dataset.labels.bincount().tolist() == [5] * 3
    assert pixels(fitted(folder, val_fraction=0.25, order_seed=9).val_dataloader()) == pixels(val)
    assert pixels(fitted(folder, val_fraction=0.25, seed=9).val_dataloader()) != pixels(val)


def test_subsets(folder):
    data = module(folder, train_subset=10, val_subset=4, test_subset=6)
    data.setup(None)
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    for loader, counts in zip(loaders, ([3, 3, 4], [1, 1, 2], [2, 2, 2]), strict=True):
        assert sorted(loader.dataset.labels.bincount().tolist()) == counts
    smaller = set(pixels(fitted(folder, train_subset=4).train_dataloader()))
    assert smaller < set(pixels(loaders[0]))
    few_shot = pixels(fitted(folder, few_shot=2).train_dataloader())
    assert few_shot == pixels(fitted(folder, train_subset=6).train_dataloader())
    assert few_shot != pixels(fitted(folder, few_shot=2, seed=1).train_dataloader())


@pytest.mark.parametrize("settings", [{"few_shot": 4}, {"train_subset": 10}, {"train_subset": 2}])
def test_subsets_with_different_indices_are_disjoint_and_balanced(folder, settings):
    """18 images of each of three classes: 4 subsets of 12 images, 5 of 10, 27 of 2."""
    size = settings.get("train_subset", 12)
    there = 54 // size
    subsets = [fitted(folder, subset_index=i, **settings).train_dataloader() for i in range(there)]
    assert pixels(subsets[0]) == pixels(fitted(folder, **settings).train_dataloader())
    assert len(set().union(*map(pixels, subsets))) == there * size
    together = torch.zeros(3)
    for loader in subsets:
        counts = loader.dataset.labels.bincount(minlength=3)
        assert counts.sum() == size
        assert counts.max() - counts.min() <= 1
        together += counts
    assert together.max() - together.min() <= 1
    with pytest.raises(DataError, match=rf"subset_index={there} is too large: there are {there} disjoint subsets of "):
        fitted(folder, subset_index=there, **settings)


def test_validation_does_not_depend_on_the_training_subset(folder):
    validation = pixels(fitted(folder).val_dataloader())
    for settings in ({"few_shot": 2}, {"few_shot": 2, "subset_index": 3}, {"train_subset": 5, "subset_index": 1}):
        assert pixels(fitted(folder, **settings).val_dataloader()) == validation


@pytest.mark.filterwarnings("ignore")
def test_command_line_reaches_every_setting(folder, capsys):
    options = {"run": False, "seed_everything_default": False}
    arguments = ["--data.source=folder", f"--data.root={folder}", "--data.mean=[0.5,0.5,0.5]", "--data.few_shot=2"]
    data = LightningCLI(Recorder, CIFARDataModule, **options, args=arguments).datamodule
    data.setup("fit")
    assert len(pixels(data.train_dataloader())) == 6
    with pytest.raises(SystemExit):
        LightningCLI(Recorder, CIFARDataModule, **options, args=["--help"])
    assert "Training images per class; instead of train_subset." in capsys.readouterr().out


# Sources through the module; test_sources.py covers the readers


def test_package_source_says_it_is_not_comparable(tmp_path, caplog):
    names = ["bee", "cat"]
    examples = [
        {
            "input": base64.b64encode(png(noise(i))).decode(),
            "target_scores": {name: int(name == names[i % 2]) for name in names},
        }
        for i in range(20)
    ]
    (tmp_path / "task.json").write_text(json.dumps({"examples": examples}))
    data = module(tmp_path / "task.json", source="package", val_fraction=0.25)
    with caplog.at_level("INFO"):
        data.setup()
    assert "NOT comparable" in caplog.text
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert [len(pixels(loader)) for loader in loaders] == [12, 4, 4]
    assert len(set().union(*map(pixels, loaders))) == 20
    # The test split is the same whatever the seed.
    other = module(tmp_path / "task.json", source="package", seed=5)
    other.setup("test")
    assert pixels(other.test_dataloader()) == pixels(loaders[2])


def test_package_has_a_default_address():
    assert CIFARDataModule(source="package").root == sources.PACKAGE_ADDRESS


def test_parquet_source(tmp_path):
    for split, rows in (("train", 20), ("test", 4)):
        column = [{"bytes": png(noise(i)), "path": None} for i in range(rows)]
        table = pa.table({"img": column, "fine_label": [i % 2 for i in range(rows)]})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    data = module(tmp_path, source="parquet", dataset="cifar100")
    data.setup()
    assert data.num_classes == 100
    assert batches(data.test_dataloader())[1].tolist() == [0, 1, 0, 1]
    assert pixels(data.test_dataloader())[3] == noise(3).tobytes()


def test_torchvision_source_without_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "cifar.tar.gz").as_uri())
    data = module(tmp_path, source="torchvision")
    with pytest.raises(DataError, match="cannot download cifar10"):
        data.prepare_data()
    with pytest.raises(DataError, match="no intact torchvision copy"):
        data.setup("fit")
