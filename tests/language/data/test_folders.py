"""Which files of a folder are read: exact names, an error in doubt, and a line that names what is not used."""

from __future__ import annotations

import os

import pytest

from language.data.module import InstructionDataModule
from language.data.sources import has_split, read_dev_rows, read_rows
from lit_adapters.errors import DataError

ROW = '{"prompt": "a", "response": "b"}'


@pytest.fixture
def folder(tmp_path):
    """Make a folder with files of one row each: its name is the row's prompt."""

    def make(*names):
        for name in names:
            file = tmp_path / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(f'{{"prompt": "{name}", "response": "x"}}\n')
        return str(tmp_path)

    return make


def read(path, split="train"):
    return [row.values["prompt"] for row in read_rows(path, split)]


@pytest.mark.parametrize(
    ("names", "train"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"]),
        (["Train.jsonl", "dev.jsonl"], ["Train.jsonl"]),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], None),
        (
            ["train-00000-of-00001-0123456789abcdef.jsonl", "test.jsonl"],
            ["train-00000-of-00001-0123456789abcdef.jsonl"],
        ),
        (["train_1.jsonl", "train_2.jsonl", "validation.jsonl"], ["train_1.jsonl", "train_2.jsonl"]),
        (["a.jsonl", "latest.jsonl"], None),
        (["train.jsonl", "my_test.jsonl", "notes.jsonl"], ["train.jsonl"]),
    ],
)
def test_exact_names(folder, names, train):
    assert read(folder(*names)) == (names if train is None else train)


@pytest.mark.parametrize(
    "names",
    [
        ["my_train.jsonl", "my_test.jsonl"],
        ["training.jsonl", "evaluation.jsonl"],
        ["data-train.jsonl", "data-valid.jsonl"],
        ["train.jsonl", "train2.jsonl", "test.jsonl"],
        ["myTest.jsonl", "a.jsonl"],
        ["mytest.jsonl", "a.jsonl"],
        ["testset.jsonl", "a.jsonl"],
        ["held_out.jsonl", "a.jsonl"],
        ["a.jsonl", "devel.jsonl"],
        ["train.jsonl", "train_old.jsonl"],
        ["train.jsonl", "train-00000-of-00001.jsonl"],
        ["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"],
        ["TRAINDATA.jsonl"],
        ["2024-eval.jsonl", "b.jsonl"],
        ["old/train.jsonl", "test.jsonl"],
    ],
)
def test_in_doubt_nothing_is_read_and_the_files_are_listed(folder, names):
    with pytest.raises(DataError) as error:
        read(folder(*names))
    assert any(name in str(error.value) for name in names)


def test_one_name_in_two_kinds_or_two_names_of_a_split_are_refused(folder, tmp_path):
    path = folder("train.jsonl")
    (tmp_path / "train.json").write_text(f"[{ROW}]")
    with pytest.raises(DataError, match=r"train\.json, train\.jsonl may hold the same rows twice"):
        read(path)
    folder("dev.jsonl", "val.jsonl")
    with pytest.raises(DataError, match=r"dev\.jsonl, val\.jsonl may hold the same rows twice"):
        read(path, "val")
    assert [row.values["prompt"] for row in read_dev_rows(path)] == ["dev.jsonl"]


def test_a_validation_file_of_another_name_is_not_left_out_silently(folder, tokenizer):
    path = folder("train.jsonl", "my_val.jsonl")
    with pytest.raises(DataError, match=r"my_val\.jsonl may be val data or not"):
        has_split(path, "val")
    with pytest.raises(DataError, match=r"my_val\.jsonl may be val data or not"):
        InstructionDataModule(path, tokenizer, format="pairs").setup("fit")


def test_files_that_are_not_used_are_counted_and_named(folder, tmp_path, caplog):
    path = folder(
        "train.jsonl", "test.jsonl", "more/train.jsonl", "notes.xml", "old.jsonl.bz2", "README.md", ".x.jsonl"
    )
    with caplog.at_level("INFO"):
        assert read(path) == ["train.jsonl"]
    (line,) = [r.getMessage() for r in caplog.records if "not used" in r.getMessage()]
    assert "1 not of this split (test.jsonl)" in line
    assert "2 of another kind (notes.xml, old.jsonl.bz2)" in line
    assert "1 in a folder further down (more/train.jsonl)" in line
    assert "README" not in line


def test_pipes_devices_and_folders_are_refused_at_once(tmp_path, folder):
    os.mkfifo(tmp_path / "train.jsonl")
    (tmp_path / "val.jsonl").symlink_to("/dev/zero")
    (tmp_path / "test.jsonl").symlink_to(tmp_path / "nothing")
    (tmp_path / "a.json").mkdir()
    for path, split in ((tmp_path, "train"), (tmp_path, "val"), (tmp_path / "train.jsonl", "train")):
        with pytest.raises(DataError, match="pipe, socket or device"):
            read(str(path), split)
    with pytest.raises(DataError, match=r"cannot read .*test\.jsonl"):
        read(str(tmp_path), "test")
    for path in ("x" * 300, "a\0b", "", " "):
        with pytest.raises(DataError, match=r"cannot look for data|is empty|does not exist"):
            read(path)
        assert not has_split(path, "val")
