"""Splits have exact names; what is not used is counted and named; ambiguous or too large archives are refused."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from lit_adapters.assets.archives import LIMIT_VARIABLE
from lit_adapters.errors import DataError
from tests.assets.archive_files import write_huge_header, write_tar
from tests.mutations import byte_edits, json_edits
from tests.vision.image_folders import noise, png, write_folder
from vision import sources
from vision.sources import read_folder, read_package, read_parquet

IMAGE = png(noise(0))
MEMBERS = [(f"{name}/{i}.png", png(noise(i))) for name in ("bee", "cat") for i in range(3)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path, train=2, test=1)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("train/bee/photo.heic", r"of .*train are not used: 1 whose names do not end in \.bmp.*\(bee/photo\.heic\)"),
        ("train/bee/more/x.png", r"1 in folders inside a class folder \(bee/more/x\.png\)"),
        ("train/x.png", r"1 outside the class folders \(x\.png\)"),
        ("val/bee/x.png", r"1 in val/, which is neither train nor test \(val/bee/x\.png\)"),
        ("Train/bee/x.png", r"1 in Train/, which is neither train nor test"),
        ("validation.tar.gz", r"1 named neither train\.tar\.gz nor test\.tar\.gz \(validation\.tar\.gz\)"),
        ("train.tar.gz", r"1 beside a folder of the same split \(train\.tar\.gz\)"),
    ],
)
def test_a_file_that_is_not_used_is_counted_and_named(root, path, message):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(IMAGE)
    with pytest.warns(UserWarning, match=message):
        assert len(read_folder(root, "train").labels) == 6


def test_many_are_counted_and_the_first_named(root):
    for i in range(12):
        (root / "train" / "cat" / f"{i:02}.gz").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"12 whose names .*\(cat/00\.gz, .*cat/04\.gz, \.\.\.\)"):
        read_folder(root, "train")


def test_nothing_is_said_where_all_is_used(root):
    (root / "train" / ".DS_Store").write_bytes(b"")
    (root / "README.md").write_text("about")
    with warnings.catch_warnings(action="error"):
        read_folder(root, "train")


def test_other_names_of_splits_are_listed(tmp_path):
    for name in ("training", "Test"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"under exactly this name\. In .* there is Test/, training/"):
        read_folder(tmp_path, "train")


def test_an_archive_names_what_it_does_not_use(tmp_path):
    members = [*MEMBERS, ("bee/notes.txt", b""), ("labels.csv", b"")]
    write_tar(tmp_path / "train.tar.gz", members, links={"cat/link.png": "0.png"})
    message = r"2 whose names .*\(bee/notes\.txt, labels\.csv\); 1 that are links inside an archive \(cat/link\.png\)"
    with pytest.warns(UserWarning, match=message):
        assert len(read_folder(tmp_path, "train").labels) == 6


def test_a_member_that_stands_twice_is_refused(tmp_path):
    for twice in ("bee/1.png", "./bee/1.png", "bee//1.png"):
        write_tar(tmp_path / "train.tar.gz", [*MEMBERS, (twice, IMAGE)])
        with pytest.raises(DataError, match=r"1\.png' stands twice in .*train\.tar\.gz"):
            read_folder(tmp_path, "train")


def sparse(path: Path) -> None:
    """A member of 1 TB that takes no space."""
    header = tarfile.TarInfo("bee/0.png")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 0
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:398] = b"%011o\0" % 0
    block[398:410] = b"%011o\0" % 0
    block[483:495] = b"%011o\0" % (1 << 32)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path.write_bytes(gzip.compress(bytes(block) + bytes(10240 - 512)))


@pytest.mark.parametrize("kind", ["image", "other file", "header", "sparse", "behind the end"])
def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch, kind):
    archive, zeros = tmp_path / "train.tar.gz", bytes(3_000_000)
    if kind == "header":
        write_huge_header(archive, 3_000_000)
    elif kind == "sparse":
        sparse(archive)
    else:
        name = {"image": "bee/big.png", "other file": "bee/big.txt"}.get(kind)
        write_tar(archive, [*MEMBERS, (name, zeros)] if name else MEMBERS)
        if name is None:
            archive.write_bytes(archive.read_bytes() + gzip.compress(zeros))
    monkeypatch.setenv(LIMIT_VARIABLE, "0.001")
    with pytest.raises(DataError, match=rf"unpacks to .* or more, and 1,000,000 are allowed.*{LIMIT_VARIABLE}"):
        read_folder(tmp_path, "train")


def test_joined_archives_are_refused(tmp_path):
    first = write_tar(tmp_path / "a", MEMBERS, "w").read_bytes()
    second = write_tar(tmp_path / "b", [("dog/0.png", IMAGE)], "w").read_bytes()
    (tmp_path / "train.tar.gz").write_bytes(gzip.compress(first + second))
    with pytest.raises(DataError, match="goes on after its end"):
        read_folder(tmp_path, "train")


def test_damaged_archives_end_in_one_error(tmp_path):
    """120 damages of the packed bytes, and 120 of the tar inside."""
    whole = write_tar(tmp_path / "whole", MEMBERS).read_bytes()
    damages = [(what, damaged) for what, damaged in byte_edits(whole, 120)]
    damages += [(what, gzip.compress(inner, 1)) for what, inner in byte_edits(gzip.decompress(whole), 120)]
    for number, (what, damaged) in enumerate(damages):
        (tmp_path / "train.tar.gz").write_bytes(damaged)
        with warnings.catch_warnings(action="ignore"):
            try:
                split = read_folder(tmp_path, "train")
            except DataError:
                continue
        contents = [image.data for image in split.images]
        assert number >= 120 or contents == [data for _, data in MEMBERS], what


# Parquet


def table(names=None, metadata: bytes | None = None) -> pa.Table:
    found = pa.table({"img": [{"bytes": IMAGE}] * 3, "label": [0, 1, 2]})
    if names is not None:
        metadata = json.dumps({"info": {"features": {"label": {"names": names}}}}).encode()
    return found if metadata is None else found.replace_schema_metadata({"huggingface": metadata})


def write(root: Path, *names: str, **settings) -> None:
    for name in names:
        pyarrow.parquet.write_table(table(**settings), root / name)


def test_other_files_are_no_part_of_the_split(tmp_path):
    write(tmp_path, "train-00000-of-00001.parquet", "train-extra-00000-of-00001.parquet", "validation-0.parquet")
    with pytest.warns(UserWarning, match=r"2 not named train-NUMBER .*\(train-extra-00000-of-00001.*validation-0\.par"):
        assert len(read_parquet(tmp_path, "cifar10", "train").labels) == 3
    with pytest.raises(DataError, match=r"test-\*\.parquet.* found nowhere.* There is train-00000-of-00001\.parquet"):
        read_parquet(tmp_path, "cifar10", "test")


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"],
        ["train-00001-of-00002.parquet"],
        ["train-0.parquet", "train-00000.parquet"],
        ["train-00000-of-00001.parquet", "train-00001-of-00002.parquet"],
        ["train-0.parquet", "train-2.parquet"],
    ],
)
def test_parts_that_are_missing_or_there_twice(tmp_path, names):
    write(tmp_path, *names)
    with pytest.raises(DataError, match=r"has parts \[.*\] of \d of train: each must be there once"):
        read_parquet(tmp_path, "cifar10", "train")


def test_parts_are_read_in_the_order_of_their_numbers(tmp_path):
    for number in range(11):
        rows = pa.table({"img": [{"bytes": IMAGE}], "label": [number % 10]})
        pyarrow.parquet.write_table(rows, tmp_path / f"train-{number}.parquet")
    assert read_parquet(tmp_path, "cifar10", "train").labels.tolist() == [*range(10), 0]


def test_parts_with_other_names_of_classes(tmp_path):
    write(tmp_path, "train-0.parquet", names=["a", "b", "c"])
    write(tmp_path, "train-1.parquet", names=["b", "a", "c"])
    with pytest.raises(DataError, match=r"train-1\.parquet and .*train-0\.parquet have different names of classes"):
        read_parquet(tmp_path, "cifar10", "train")


def test_damaged_metadata_end_in_one_error(tmp_path):
    """100 edits of the entry, and some that are no object."""
    document = {"info": {"features": {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}}}
    entries = [json.dumps(edited).encode() for _, edited in json_edits(document, 100)]
    for entry in [*entries, b"\xff", b"[" * 100_000, b"[]", b"3", b'{"info": 3}', b'{"info": {"features": []}}']:
        write(tmp_path, "train-0.parquet", metadata=entry)
        try:
            assert len(read_parquet(tmp_path, "cifar10", "train").labels) == 3
        except DataError as error:
            assert "train" in str(error)  # noqa: PT017 - reading may also succeed


@pytest.mark.parametrize("label", [2**63, -1, 10, 1.5, True, "bee", None])
def test_labels_that_are_none(tmp_path, label):
    column = pa.array([label], pa.uint64() if label == 2**63 else None)
    pyarrow.parquet.write_table(pa.table({"img": [{"bytes": IMAGE}], "label": column}), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=r"row 0: image bytes or integer label missing|sample 0 has label"):
        read_parquet(tmp_path, "cifar10", "train")


def test_parquet_that_unpacks_to_too_much(tmp_path, monkeypatch):
    rows = {"img": [{"bytes": bytes(100_000)}] * 30, "label": [0] * 30}
    pyarrow.parquet.write_table(pa.table(rows), tmp_path / "train-0.parquet")
    assert (tmp_path / "train-0.parquet").stat().st_size < 20_000
    monkeypatch.setenv(LIMIT_VARIABLE, "0.001")
    with pytest.raises(DataError, match=rf"train-0\.parquet unpacks to 1,1.*{LIMIT_VARIABLE}"):
        read_parquet(tmp_path, "cifar10", "train")


def test_damaged_parquet_ends_in_one_error(tmp_path):
    """150 damages."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table(names=["a", "b", "c"]), buffer)
    for what, damaged in byte_edits(buffer.getvalue(), 150):
        (tmp_path / "train-0.parquet").write_bytes(damaged)
        try:
            read_parquet(tmp_path, "cifar10", "train")
        except DataError as error:
            assert "train" in str(error), what  # noqa: PT017 - reading may also succeed


# Package


def test_damaged_task_files_end_in_one_error(tmp_path):
    """100 edits; a folder or a device in the place of the file."""
    names = sources.CIFAR10_CLASSES[:2]
    examples = [
        {"input": "iVBORw0KGgo=", "target_scores": {name: int(name == names[i % 2]) for name in names}}
        for i in range(10)
    ]
    path = tmp_path / "task.json"
    for what, edited in json_edits({"examples": examples}, 100):
        path.write_text(json.dumps(edited))
        try:
            read_package(path, "train")
        except DataError as error:
            assert "task.json" in str(error) or "package" in str(error) or "holding out" in str(error), what  # noqa: PT017
    path.write_text('{"examples": ' + "[" * 100_000)
    for bad in (path, tmp_path, Path("/dev/zero")):
        with pytest.raises(DataError, match=r"is not a BIG-bench task file|is no file"):
            read_package(bad, "train")
