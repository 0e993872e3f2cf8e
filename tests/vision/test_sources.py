"""The readers: each layout gives the same samples, and bad files raise one error that names them."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import pickle
import socket
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from lit_adapters.errors import DataError
from vision import sources
from vision.images import open_image

CLASSES = ["bee", "cat", "dog"]


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def decoded(split: sources.Split) -> list[bytes]:
    return [open_image(image).tobytes() for image in split.images]


# Folders and archives

FILES = {f"{name}/{i:04d}.png": 10 * label + i for label, name in enumerate(CLASSES) for i in range(4)}


def write_archive(archive: Path, names: dict[str, int], directories: tuple[str, ...] = ()) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        for name in directories:
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE
            tar.addfile(member)
        for name, seed in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(png(seed))
            tar.addfile(member, io.BytesIO(png(seed)))


@pytest.mark.parametrize("prefix", ["", "./"])
def test_folder_and_archive_hold_the_same(tmp_path, prefix):
    for name, seed in FILES.items():
        path = tmp_path / "unpacked" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(seed))
        (path.parent / ".hidden.png").write_text("ignored")
    # Out of order, as packing programs leave them.
    shuffled = {f"{prefix}{name}": seed for name, seed in reversed(FILES.items())}
    write_archive(tmp_path / "train.tar.gz", shuffled, directories=(f"{prefix}dog", f"{prefix}bee"))
    (tmp_path / "packed").mkdir()
    (tmp_path / "train.tar.gz").rename(tmp_path / "packed" / "train.tar.gz")
    for root in (tmp_path / "unpacked", tmp_path / "packed"):
        split = sources.read_folder(root, "train")
        assert split.classes == CLASSES
        assert split.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
        assert decoded(split) == [noise(seed).tobytes() for seed in FILES.values()]


def test_empty_classes(tmp_path):
    (tmp_path / "train" / "eel").mkdir(parents=True)
    (tmp_path / "train" / "eel" / ".notes").write_text("not an image")
    with pytest.raises(DataError, match=r"class folder 'eel' of .*/train holds no images"):
        sources.read_folder(tmp_path, "train")
    write_archive(tmp_path / "test.tar.gz", FILES, directories=("eel",))
    with pytest.raises(DataError, match=r"class folder 'eel' of .*/test holds no images"):
        sources.read_folder(tmp_path, "test")


def test_truncated_and_corrupt_archives(tmp_path):
    archive = tmp_path / "train.tar.gz"
    write_archive(archive, FILES)
    whole = archive.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for damaged in (whole[:-5], whole[: len(whole) // 2], bytes(flipped), b"no archive", gzip.compress(b"no tar")):
        archive.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train\.tar\.gz is truncated or corrupt"):
            sources.read_folder(tmp_path, "train")


def test_archive_with_an_extra_folder(tmp_path):
    write_archive(tmp_path / "train.tar.gz", {"train/bee/0000.png": 0})
    with pytest.raises(DataError, match=r"'train/bee/0000\.png'.*not named class/file"):
        sources.read_folder(tmp_path, "train")


# Parquet


def write_parquet(path: Path, rows: list[tuple], image: str = "img", label: str = "label", names=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({image: [{"bytes": b, "path": None} for b, _ in rows], label: [y for _, y in rows]})
    if names:
        features = {label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path)


@pytest.mark.parametrize(
    ("dataset", "image", "label", "names", "classes"),
    [
        ("cifar10", "img", "label", CLASSES, CLASSES),
        ("cifar10", "image", "label", None, sources.CIFAR10_CLASSES),
        ("cifar100", "img", "fine_label", None, [str(i) for i in range(100)]),
    ],
)
def test_parquet(tmp_path, dataset, image, label, names, classes):
    rows = [(png(i), i % 3) for i in range(8)]
    folder = tmp_path / "plain_text"
    write_parquet(folder / "train-00000-of-00002.parquet", rows[:5], image, label, names)
    write_parquet(folder / "train-00001-of-00002.parquet", rows[5:], image, label, names)
    write_parquet(folder / "test-00000-of-00001.parquet", rows[:2], image, label, names)
    split = sources.read_parquet(tmp_path, dataset, "train")
    assert split.classes == classes
    assert split.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert decoded(split) == [noise(i).tobytes() for i in range(8)]
    assert len(sources.read_parquet(tmp_path, dataset, "test").labels) == 2


GOOD = [(png(i), i % 3) for i in range(3)]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (GOOD, ("picture", "label"), r"columns \['picture', 'label'\]; cifar10 needs `img` or `image`"),
        (GOOD, ("img", "fine_label"), r"columns \['img', 'fine_label'\].*and `label`"),
        ([*GOOD, (None, 1)], ("img", "label"), r"train-0\.parquet row 3: image bytes or integer label missing"),
        ([*GOOD, (png(3), None)], ("img", "label"), r"train-0\.parquet row 3: image bytes or integer label missing"),
        ([*GOOD, (png(3), 10)], ("img", "label"), r"sample 3 has label 10, outside 0\.\.9"),
        ([*GOOD, (png(3), -1)], ("img", "label"), r"sample 3 has label -1, outside 0\.\.9"),
        ([], ("img", "label"), "holds no images"),
    ],
)
def test_bad_parquet(tmp_path, rows, columns, message):
    write_parquet(tmp_path / "train-0.parquet", rows, *columns)
    with pytest.raises(DataError, match=message):
        sources.read_parquet(tmp_path, "cifar10", "train")


def test_missing_torn_and_ambiguous_parquet(tmp_path):
    with pytest.raises(DataError, match=r"train-\*\.parquet.* found nowhere under"):
        sources.read_parquet(tmp_path, "cifar10", "train")
    path = tmp_path / "train-0.parquet"
    write_parquet(path, GOOD)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"train-0\.parquet is truncated or not parquet"):
        sources.read_parquet(tmp_path, "cifar10", "train")
    path.write_bytes(whole)
    write_parquet(tmp_path / "other" / "train-0.parquet", GOOD)
    with pytest.raises(DataError, match="found in several folders"):
        sources.read_parquet(tmp_path, "cifar10", "train")


# Package


def write_task(path: Path, per_class: int) -> Path:
    names = sources.CIFAR10_CLASSES
    examples = [
        {
            "input": base64.b64encode(png(1000 * label + i)).decode(),
            "target_scores": {other: int(other == name) for other in names},
        }
        for label, name in enumerate(names)
        for i in range(per_class)
    ]
    path.write_text(json.dumps({"name": "base64", "examples": examples}))
    return path


def test_package_task(tmp_path):
    task = write_task(tmp_path / "task.json", per_class=10)
    train, test = (sources.read_package(task, split) for split in ("train", "test"))
    assert train.classes == test.classes == sources.CIFAR10_CLASSES
    assert train.labels.bincount().tolist() == [8] * 10
    assert test.labels.bincount().tolist() == [2] * 10
    assert len({*decoded(train), *decoded(test)}) == 100
    truth = {noise(1000 * label + i).tobytes(): label for label in range(10) for i in range(10)}
    assert [truth[image] for image in decoded(test)] == test.labels.tolist()


def test_bad_task_file(tmp_path):
    path = tmp_path / "task.json"
    for text in ("{}", '{"examples": []}', '{"exam'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"task\.json is not a BIG-bench task file"):
            sources.read_package(path, "train")
    for field, value in (("input", "@@"), ("target_scores", {"eel": 1})):
        task = json.loads(write_task(path, per_class=3).read_text())
        task["examples"][7][field] = value
        path.write_text(json.dumps(task))
        with pytest.raises(DataError, match=r"task\.json example 7"):
            sources.read_package(path, "train")


# torchvision


@pytest.mark.parametrize(("dataset", "cls"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_torchvision_files(tmp_path, monkeypatch, dataset, cls):
    key, count = ("labels", 10) if dataset == "cifar10" else ("fine_labels", 100)
    names = [f"name{i}" for i in range(count)]

    def write(name: str, content: dict) -> str:
        path = tmp_path / cls.base_folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return hashlib.md5(path.read_bytes()).hexdigest()

    def batch(n: int, seed: int) -> dict:
        data = np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)
        return {"data": data, key: [i % count for i in range(n)]}

    test = batch(count, 1)
    monkeypatch.setattr(cls, "train_list", [["train_part", write("train_part", batch(4 * count, 0))]])
    monkeypatch.setattr(cls, "test_list", [["test_part", write("test_part", test)]])
    meta = {"filename": "meta", "key": "names", "md5": write("meta", {"names": names})}
    monkeypatch.setattr(cls, "meta", meta)
    sources.download_torchvision(tmp_path, dataset)
    assert len(sources.read_torchvision(tmp_path, dataset, "train").labels) == 4 * count
    split = sources.read_torchvision(tmp_path, dataset, "test")
    assert split.classes == names
    assert split.labels.tolist() == list(range(count))
    assert np.array_equal(split.images[1], test["data"][1].reshape(3, 32, 32).transpose(1, 2, 0))
    (tmp_path / cls.base_folder / "test_part").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"no intact torchvision copy of cifar.*prepare_data\(\).*source=folder"):
        sources.read_torchvision(tmp_path, dataset, "test")


def test_unreachable_download_names_the_alternatives(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{port}/cifar.tar.gz")
    with pytest.raises(DataError, match=r"cannot download cifar10.*source=folder.*source=parquet.*source=package"):
        sources.download_torchvision(tmp_path, "cifar10")


def test_silent_download_server_times_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DOWNLOAD_TIMEOUT_S", 0.2)
    before = socket.getdefaulttimeout()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.getsockname()[1]}/cifar.tar.gz")
        with pytest.raises(DataError, match="timed out"):
            sources.download_torchvision(tmp_path, "cifar10")
    assert socket.getdefaulttimeout() == before
