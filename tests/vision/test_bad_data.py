"""Settings and data that the data module refuses, each with a message that names what is bad."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from lit_adapters.errors import DataError
from tests.vision.image_folders import fitted, module, noise, pixels, write_folder
from vision.data import CIFARDataModule


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_fraction": 0.0}, "val_fraction=0.0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"train_subset": -1}, "train_subset=-1"),
        ({"few_shot": 0}, "few_shot=0"),
        ({"val_subset": -3}, "val_subset=-3"),
        ({"test_subset": -3}, "test_subset=-3"),
        ({"image_size": 0}, "image_size=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"few_shot": 1, "train_subset": 3}, "few_shot=1.*train_subset=3.*set one"),
        ({"few_shot": 1, "subset_index": -1}, "subset_index=-1 must be at least 0"),
        ({"subset_index": 1}, "subset_index=1 needs few_shot or train_subset"),
        ({"std": (0.1, 0.0, 0.1)}, "std="),
        ({"interpolation": "cubist"}, "cubist.*bicubic"),
        ({"source": "package", "dataset": "cifar100"}, "CIFAR-10 images only"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(DataError, match=message):
        CIFARDataModule(**settings)


def test_subset_larger_than_a_class(folder):
    with pytest.raises(DataError, match=r"few_shot=19 needs 19 images of class 'bee', but only 18"):
        fitted(folder, few_shot=19)
    with pytest.raises(DataError, match=r"train_subset=55 needs 19 images of class"):
        fitted(folder, train_subset=55)


def test_class_with_a_single_image(tmp_path):
    with pytest.raises(DataError, match=r"'bee' \(1 images\) leaves none"):
        fitted(write_folder(tmp_path, train=1))


def test_missing_folders(tmp_path):
    with pytest.raises(DataError, match=r"root .*/nowhere does not exist"):
        fitted(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"neither .*/train/ nor .*/train\.tar\.gz exists"):
        fitted(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        fitted(tmp_path)


def test_corrupt_image_is_named(folder):
    path = folder / "train" / "cat" / "0003.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"cannot decode image .*/train/cat/0003\.png"):
        fitted(folder)


def test_foreign_file_among_images_of_mixed_sizes_is_named_at_setup(folder):
    noise(0, (9, 9)).save(folder / "test" / "bee" / "0000.png")
    (folder / "test" / "dog" / "0002.png").write_text("not an image")
    with pytest.raises(DataError, match=r"cannot decode image .*/test/dog/0002\.png"):
        module(folder).setup("test")


@pytest.mark.parametrize("fit_first", [True, False])
def test_different_classes_in_train_and_test(folder, fit_first):
    (folder / "test" / "bee").rename(folder / "test" / "eel")
    data = module(folder)
    if fit_first:
        data.setup("fit")
    with pytest.raises(DataError, match=r"only in train \['bee'\], only in test \['eel'\]"):
        data.setup("test")


def test_fit_and_validate_do_not_read_the_test_split(folder):
    for path in (folder / "test").rglob("*.png"):
        path.write_text("torn")
    data = module(folder)
    data.setup("validate")
    data.setup("fit")
    assert len(pixels(data.train_dataloader())) == 54
    with pytest.raises(DataError, match=r"/test/bee/0000\.png"):
        data.setup("test")


def test_before_setup(folder):
    data = module(folder)
    with pytest.raises(DataError, match=r"setup\(\)"):
        _ = data.num_classes
    for stage, loader in (
        ("fit", data.train_dataloader),
        ("validate", data.val_dataloader),
        ("test", data.test_dataloader),
    ):
        with pytest.raises(DataError, match=rf"setup\('{stage}'\)"):
            loader()


@pytest.mark.parametrize("root", ["x" * 5000, "~nobody-of-this-name/data"])
def test_a_root_that_no_folder_can_be(root):
    with pytest.raises(DataError, match=r"root '.* cannot be read"):
        CIFARDataModule(root, source="folder").setup("fit")


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        with pytest.raises(DataError, match=r"/train cannot be listed: Permission denied"):
            fitted(folder)
