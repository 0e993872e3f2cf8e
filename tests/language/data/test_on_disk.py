"""Data larger than memory: the batches of data in memory, read from a file, in memory that does not grow."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import re
import threading
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from language.data.module import InstructionDataModule
from lit_adapters.errors import DataError
from tests.language.conftest import make_tokenizer
from tests.language.data.test_module import epochs, pairs, same


def module(path, tokenizer, tmp_path, **changes):
    settings = {"format": "pairs", "batch_size": 4, "val_fraction": 0, "cache_dir": str(tmp_path / "cache")}
    return InstructionDataModule(path, tokenizer, on_disk=True, **settings | changes)


def in_memory(path, tokenizer, **changes):
    return InstructionDataModule(path, tokenizer, **{"format": "pairs", "batch_size": 4, "val_fraction": 0} | changes)


def fitted(data):
    data.setup("fit")
    return data


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", ["none", "packed", "buckets"])
def test_the_batches_of_data_in_memory(write, tokenizer, tmp_path, packing, workers):
    settings = {"packing": packing, "max_length": 30, "seed": 3, "num_workers": workers}
    path = write(pairs(61, words=lambda i: 1 + 10 * (i % 7)))
    expected = fitted(in_memory(path, tokenizer, **settings))
    assert expected._datasets["train"].documents.cut > 0
    for _ in ("tokenised", "taken from the file"):
        found = fitted(module(path, tokenizer, tmp_path, **settings))
        for one, other in zip(epochs(found), epochs(expected), strict=True):
            assert same(one, other)
        documents = found._datasets["train"].documents
        assert documents.cut == expected._datasets["train"].documents.cut
        assert documents.dropped == expected._datasets["train"].documents.dropped


@pytest.mark.parametrize("kind", ["parquet", "csv", "gz", "folder", "list"])
def test_rows_of_any_kind(write, tokenizer, tmp_path, kind):
    rows = pairs(23)
    path = str(tmp_path / "rows.parquet")
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=5)
    elif kind == "csv":
        path = str(tmp_path / "rows.csv")
        lines = [f"{row['prompt']},{row['response']}\n" for row in rows]
        Path(path).write_text("".join(["prompt,response\n", *lines]))
    elif kind == "gz":
        import gzip

        path = str(tmp_path / "rows.jsonl.gz")
        Path(path).write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        files = [write(rows[:9], "parts/train-0.jsonl"), write(rows[9:], "parts/train-1.jsonl")]
        path = files if kind == "list" else str(tmp_path / "parts")
    expected = epochs(fitted(in_memory(path, tokenizer)))
    assert all(map(same, epochs(fitted(module(path, tokenizer, tmp_path))), expected))


def test_a_run_goes_on_in_mid_epoch(write, tokenizer, tmp_path):
    path = write(pairs(40))
    whole = epochs(fitted(module(path, tokenizer, tmp_path)), 1)[0]
    first = fitted(module(path, tokenizer, tmp_path, num_workers=2)).train_dataloader()
    iterator = iter(first)
    read = [next(iterator) for _ in range(4)]
    second = fitted(module(path, tokenizer, tmp_path)).train_dataloader()
    second.load_state_dict(first.state_dict())
    assert same(read + list(second), whole)


def test_what_the_file_depends_on(write, tokenizer, tmp_path, monkeypatch):
    path = write(pairs(12))
    kept = lambda: len(list((tmp_path / "cache").glob("*.safetensors")))  # noqa: E731
    fitted(module(path, tokenizer, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("language.data.tokenise.Encoder.each_document", None)  # would raise if called
        fitted(module(path, tokenizer, tmp_path))
    changes = [{"max_length": 9}, {"mask_prompt": False}, {"strip_answers": True}, {"drop_empty": True}]
    for number, change in enumerate(changes, 2):
        fitted(module(path, tokenizer, tmp_path, **change))
        assert kept() == number, change
    write([*pairs(11), {"prompt": "What is 11?", "response": "another"}])
    data = fitted(module(path, tokenizer, tmp_path))
    assert kept() == len(changes) + 2
    texts = [tokenizer.decode(row) for batch in data.train_dataloader() for row in batch["input_ids"]]
    assert sum("another" in text for text in texts) == 1


def test_a_bad_row_is_named_and_leaves_nothing(write, tokenizer, tmp_path):
    path = write([*pairs(5), {"prompt": "x"}])
    with pytest.raises(DataError, match=r"rows\.jsonl line 6: field 'response' is missing"):
        fitted(module(path, tokenizer, tmp_path))
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def killed(*_):
    raise KeyboardInterrupt


def test_what_a_killed_run_left_is_removed(write, tokenizer, tmp_path, monkeypatch):
    path = write(pairs(12))
    expected = epochs(fitted(in_memory(path, tokenizer)))
    with monkeypatch.context() as patch:
        patch.setattr("language.data.token_files.shutil.rmtree", lambda *_, **__: None)  # as if killed: nothing tidies
        patch.setattr("language.data.token_files.write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            fitted(module(path, tokenizer, tmp_path))
    (left,) = [file for file in (tmp_path / "cache").iterdir() if file.is_dir()]
    assert {file.name for file in left.iterdir()} == {"input_ids", "learned", "lengths"}
    assert all(map(same, epochs(fitted(module(path, tokenizer, tmp_path))), expected))
    assert not left.exists()


def test_classes_are_found(write, tokenizer, tmp_path):
    rows = [{"text": f"text {i}", "label": "abc"[i % 3]} for i in range(9)]
    data = module(write(rows), tokenizer, tmp_path, format="classification")
    assert data.meaning()["classes"] == ["a", "b", "c"]


def test_own_validation_data(write, tokenizer, tmp_path):
    write(pairs(9), "parts/train.jsonl")
    write(pairs(4), "parts/val.jsonl")
    path = str(tmp_path / "parts")
    data, expected = fitted(module(path, tokenizer, tmp_path)), fitted(in_memory(path, tokenizer))
    assert same(list(data.val_dataloader()), list(expected.val_dataloader()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_dir": None}, "on_disk leaves tokens in cache_dir, which is not set"),
        ({"train_subset": 3}, "train_subset=3 would choose rows"),
        ({"val_fraction": 0.1}, "val_fraction=0.1 would hold rows out, which on_disk cannot do: set val_path"),
        ({"test_fraction": 0.2}, "test_fraction=0.2 would hold rows out"),
    ],
)
def test_refused(write, tokenizer, tmp_path, change, message):
    with pytest.raises(DataError, match=re.escape(message)):
        fitted(module(write(pairs(5)), tokenizer, tmp_path, **change))


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_rows_that_were_trained_are_held_out_in_no_stage(write, tokenizer, tmp_path, stage):
    data = module(write(pairs(20)), tokenizer, tmp_path, val_fraction=0.1, test_fraction=0.1)
    with pytest.raises(DataError, match="would hold rows out, which on_disk cannot do"):
        data.setup(stage)


def test_another_process_maps_the_file(write, tokenizer, tmp_path):
    documents = fitted(module(write(pairs(400)), tokenizer, tmp_path))._datasets["train"].documents
    sent = pickle.dumps(documents)
    assert len(sent) < 500
    (ids, labels), (other_ids, other_labels) = documents[7], pickle.loads(sent)[7]
    assert ids.tolist() == other_ids.tolist()
    assert labels.tolist() == other_labels.tolist()


def anonymous_memory(path: str, cache: str, on_disk: bool) -> int:
    """The most bytes that tokenising and an epoch take, beyond mapped files, which the system may drop at any time."""
    tokenizer = make_tokenizer()
    measured, ended = [], threading.Event()

    def measure() -> None:
        while not ended.wait(0.01):
            status = Path("/proc/self/status").read_text()
            measured.append(1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1]))

    settings = {"format": "pairs", "batch_size": 64, "val_fraction": 0, "cache_dir": cache}
    fitted(
        InstructionDataModule(path, tokenizer, on_disk=on_disk, **settings | {"max_length": 64})
    )  # imports, and cache
    watch = threading.Thread(target=measure)
    watch.start()
    data = fitted(InstructionDataModule(path, tokenizer, on_disk=on_disk, max_length=128, **settings))
    for _ in data.train_dataloader():
        pass
    ended.set()
    watch.join()
    return max(measured) - measured[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells the memory")
def test_memory_does_not_grow_with_the_data(write, tmp_path):
    grown = {}
    for on_disk in (True, False):
        for rows in (1_000, 8_000):
            path = write(pairs(rows, words=lambda i: 100))
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                grown[on_disk, rows] = pool.apply(anonymous_memory, (path, str(tmp_path / f"{on_disk}"), on_disk))
    assert grown[True, 8_000] - grown[True, 1_000] < 2**21, grown
    assert grown[False, 8_000] - grown[False, 1_000] > 2**22, grown
