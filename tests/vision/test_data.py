"""The data module: what batches hold, which samples go where, in which order, and every way data can be bad."""

import base64
import io
import json
from pathlib import Path

import lightning
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from timm.data import create_transform
from torchvision.datasets import CIFAR10

from lit_adapters.errors import DataError
from lit_adapters.lightning.resume.sampler import EpochSampler
from vision import images, sources
from vision.data import CIFARDataModule
from vision.sampling import flips

CLASSES = ["bee", "cat", "dog"]


def noise(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    """A distinct image per seed, without mirror symmetry."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def contents(split: str, per_class: int) -> dict[str, bytes]:
    """Encoded images by ``class/file`` name; distinct over both splits."""
    start = {"train": 0, "test": 5000}[split]
    return {
        f"{name}/{i:04d}.png": png(noise(start + 100 * label + i))
        for label, name in enumerate(CLASSES)
        for i in range(per_class)
    }


def write_folder(root: Path, train: int = 20, test: int = 4) -> Path:
    for split, per_class in (("train", train), ("test", test)):
        for name, data in contents(split, per_class).items():
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


def module(root: Path, **changes) -> CIFARDataModule:
    return CIFARDataModule(**{"root": str(root), "source": "folder", "image_size": 16, "batch_size": 8} | changes)


def fitted(root: Path, **changes) -> CIFARDataModule:
    data = module(root, **changes)
    data.setup("fit")
    return data


def batches(loader) -> tuple[torch.Tensor, torch.Tensor]:
    """All images and labels of a loader, in order."""
    x, y = zip(*loader, strict=True)
    return torch.cat(x), torch.cat(y)


def pixels(loader) -> list[bytes]:
    """What identifies each stored image of a loader's data set."""
    return [image.tobytes() for image in loader.dataset.images]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


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


def test_validation_does_not_depend_on_the_training_subset(folder):
    assert pixels(fitted(folder, few_shot=2).val_dataloader()) == pixels(fitted(folder).val_dataloader())


# In which order


def epochs(data: CIFARDataModule, count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader = data.train_dataloader()
    result = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        result.append(batches(loader))
    return result


def test_order_and_flips_depend_on_seed_and_epoch_only(folder):
    torch.manual_seed(0)
    reference = epochs(fitted(folder))
    torch.manual_seed(1)
    for data in (fitted(folder), fitted(folder, num_workers=2), fitted(folder, seed=0, order_seed=0)):
        for (x, y), (expected_x, expected_y) in zip(epochs(data), reference, strict=True):
            assert torch.equal(x, expected_x)
            assert torch.equal(y, expected_y)
    assert not torch.equal(reference[0][0], reference[1][0])
    assert not torch.equal(epochs(fitted(folder, order_seed=1))[0][0], reference[0][0])


def test_every_seed_and_epoch_has_its_own_order_and_flips():
    keys = [(seed, epoch) for seed in range(2) for epoch in range(2)]
    orders, coins = set(), []
    for seed, epoch in keys:
        sampler = EpochSampler(range(2000), seed)
        sampler.set_epoch(epoch)
        pairs = list(sampler)
        assert {e for e, _ in pairs} == {epoch}
        assert sorted(index for _, index in pairs) == list(range(2000))
        orders.add(tuple(index for _, index in pairs))
        coins.append([flips(seed, epoch, index) for index in range(2000)])
    assert len(orders) == len(keys)
    # Fair and uncorrelated: 0.1 is 4.5 standard errors of a correlation of 2,000 coins.
    tossed = np.array(coins, dtype=float)
    assert np.abs(tossed.mean(1) - 0.5).max() < 0.05
    assert np.abs(np.corrcoef(tossed) - np.eye(len(keys))).max() < 0.1


def test_loading_leaves_the_global_random_state_alone(folder):
    data = fitted(folder)
    before = torch.get_rng_state()
    epochs(data)
    batches(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


class Recorder(lightning.LightningModule):
    """Keeps the training batches it is shown, one list per epoch; writes their labels to ``folder`` if given."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder = folder
        self.seen: list[list[torch.Tensor]] = []

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch, batch_index):
        self.seen[-1].append(batch[0].clone())
        return self.weight * batch[0].mean()

    def on_train_end(self) -> None:
        if self.folder:
            torch.save([torch.cat(epoch) for epoch in self.seen], self.folder / f"{self.global_rank}.pt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**changes) -> lightning.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(accelerator="cpu", max_epochs=2, **quiet, **changes)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_trainer_tells_the_sampler_the_epoch(folder, num_workers):
    model = Recorder()
    trainer(limit_val_batches=0).fit(model, datamodule=module(folder, num_workers=num_workers))
    for seen, (expected, _) in zip(model.seen, epochs(fitted(folder)), strict=True):
        assert torch.equal(torch.cat(seen), expected)


@pytest.mark.filterwarnings("ignore")
def test_overfit_batches_repeats_unmirrored_batches(folder):
    model = Recorder()
    trainer(overfit_batches=2).fit(model, datamodule=module(folder))
    assert torch.equal(torch.cat(model.seen[0]), torch.cat(model.seen[1]))


def test_replicas_share_an_epoch():
    samplers = [EpochSampler(range(10), seed=3, num_replicas=4, rank=rank) for rank in range(4)]
    whole = EpochSampler(range(10), seed=3)
    for sampler in [*samplers, whole]:
        sampler.set_epoch(7)
    shares = [list(sampler) for sampler in samplers]
    assert [len(share) for share in shares] == [3] * 4
    merged = [pair for row in zip(*shares, strict=True) for pair in row]
    assert merged[:10] == list(whole)
    assert merged[10:] == merged[:2]
    assert {epoch for epoch, _ in merged} == {7}


def test_train_loader_takes_this_process_share(folder):
    data = fitted(folder)
    data.trainer = trainer(strategy="ddp", devices=2)
    sampler = data.train_dataloader().sampler
    assert (sampler.num_replicas, sampler.rank) == (2, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_see_the_single_process_order(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    distributed = trainer(strategy="ddp_spawn", devices=2, limit_val_batches=0)
    distributed.fit(Recorder(out), datamodule=module(folder, batch_size=4))
    shares = [torch.load(out / f"{rank}.pt") for rank in range(2)]
    for epoch, (expected, _) in enumerate(epochs(fitted(folder))):
        assert torch.equal(torch.stack([share[epoch] for share in shares], 1).flatten(0, 1), expected)


# Bad settings and bad data


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
