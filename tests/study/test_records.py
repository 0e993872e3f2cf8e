"""The files of a study: what is written is read, packed or not, and damage is named."""

import numpy as np
import pytest

from lit_adapters.errors import AdapterError
from lit_adapters.files.arrays import write_arrays
from lit_adapters.study.records import ITEMS, RECORD, RESULTS, RUNS, Record, Results, write_record

RECORDS = [Record(f"a-final-{n}-0-x", "a", "final", n, 0, {"lora": 1e-3}, "done", {"loss": 0.5}) for n in range(3)]
VALUES = {"correct": np.array([True, False, True]), "loss": np.array([0.5, 2.0, 0.25], np.float16)}


def written(folder):
    """A study with two packed runs, and one that was finished later."""
    results = Results(folder)
    for record in RECORDS[:2]:
        results.add(record, VALUES)
    results.save()
    late = folder / RUNS / RECORDS[2].id
    late.mkdir(parents=True)
    write_arrays(late / ITEMS, VALUES)
    write_record(late, RECORDS[2])
    return folder


def test_records_and_items_are_read_as_they_were_written(tmp_path):
    results = Results.load(written(tmp_path))
    assert results.records == RECORDS
    for record in RECORDS:
        items = results.items(record)
        assert {name: (v.dtype, v.tolist()) for name, v in items.items()} == {
            name: (v.dtype, v.tolist()) for name, v in VALUES.items()
        }


def test_equal_results_are_equal_files(tmp_path):
    first, second = written(tmp_path / "a"), written(tmp_path / "b")
    for name in (RESULTS, ITEMS):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("name", [RESULTS, ITEMS, f"{RUNS}/{RECORDS[2].id}/{RECORD}"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"[{}]" + data[4:], lambda data: b""]
)
def test_damage_is_named(tmp_path, name, damage):
    path = written(tmp_path) / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(AdapterError, match=r"damaged|does not hold records"):
        Results.load(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"loss": 0.5', '"loss": "0.5"'),
        lambda text: text.replace('"status": "done"', '"status": "good"'),
        lambda text: text.replace('"arm": "a"', '"arm": "b"'),
        lambda text: text.replace('"set": 1', '"set": 2'),
        lambda text: "{}",
    ],
)
def test_edited_records_are_named(tmp_path, edit):
    path = written(tmp_path) / RESULTS
    path.write_text(edit(path.read_text()))
    with pytest.raises(AdapterError, match=r"results\.json (is damaged|does not hold records)"):
        Results.load(tmp_path)


def test_every_changed_byte_of_the_items_is_read_or_named(tmp_path):
    path = written(tmp_path) / ITEMS
    data = path.read_bytes()
    named = 0
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            Results.load(tmp_path)
        except AdapterError:
            named += 1
    assert named


def test_items_that_are_no_lists_of_numbers_are_named(tmp_path):
    path = written(tmp_path) / ITEMS
    write_arrays(path, {f"{RECORDS[0].id}|loss": np.zeros((2, 2))})
    with pytest.raises(AdapterError, match="is not a list of numbers"):
        Results.load(tmp_path)
