"""Damaged and hostile data: a row is read, or one DataError says where it stands; nothing else comes out."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from language.data.formats import FORMATS, parse
from language.data.module import InstructionDataModule
from language.data.rows import Row, shown
from language.data.sources import read_rows
from language.dpo.formats import read_pairs
from language.evaluate.questions import read_classification
from lit_adapters.errors import DataError
from tests.language.data.test_formats import ALPACA, ORCA, SUMMARY, TALK
from tests.mutations import byte_edits, json_edits

ROWS = {
    "alpaca": ALPACA,
    "openorca": ORCA,
    "chat": {"messages": [*TALK[:2], TALK[2] | {"weight": 0}, *TALK[3:]]},
    "summarisation": SUMMARY,
    "classification": {"text": "x", "label": 1},
    "pairs": {"prompt": "a", "response": "b"},
}
HALF = "half \ud83d emoji"


def refused_or_read(action, *arguments):
    """Whether the action raised a DataError, whose text is short and can be written."""
    try:
        action(*arguments)
    except DataError as error:
        return len(str(error).encode()) < 3000 or pytest.fail(f"a message of {len(str(error))} characters")
    return False


@pytest.mark.parametrize("name", ROWS)
def test_edited_rows(name):
    refused = [
        refused_or_read(parse, [Row(row, "line 1")] if isinstance(row, dict) else [], name)
        for _, row in json_edits(ROWS[name], 60)
        if isinstance(row, dict)
    ]
    assert any(refused)
    assert not all(refused)


def test_edited_preferences():
    row = {"prompt": TALK[:2], "chosen": [TALK[2]], "rejected": "No."}
    refused = [refused_or_read(read_pairs, [Row(edited, "line 1")], True) for _, edited in json_edits(row, 60)]
    assert any(refused)


def damaged(file, tmp_path, count):
    content = file.read_bytes()
    refused = 0
    for number, (_, data) in enumerate(byte_edits(content, count)):
        copy = tmp_path / f"{number}{file.suffix}"
        copy.write_bytes(data)
        refused += refused_or_read(read_rows, str(copy), "train")
    assert refused


def test_damaged_files(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS.values()))
    damaged(tmp_path / "rows.jsonl", tmp_path, 60)
    (tmp_path / "rows.json").write_text(json.dumps(list(ROWS.values())))
    damaged(tmp_path / "rows.json", tmp_path, 40)
    (tmp_path / "rows.yml").write_text('conversations:\n- - "a \\u00e4"\n  - b\n- [c, d]\n')
    damaged(tmp_path / "rows.yml", tmp_path, 60)
    described = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["bad", "good"]}}}})}
    table = pa.table({"text": ["x", "y"] * 20, "label": [1, 0] * 20}).replace_schema_metadata(described)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    damaged(tmp_path / "rows.parquet", tmp_path, 80)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n' + "[" * 100_000, "line 2: lists or objects lie too deep"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}', "line 2: field 'c' stands twice"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "line 1: Exceeds the limit"),
        ("a.json", '[{"a": ' + "[" * 100_000, "lists or objects lie too deep"),
        ("a.json", '[{"a": 1, "a": 2}]', "field 'a' stands twice"),
        ("a.json", '[{"a": ' + "9" * 5000 + "}]", "Exceeds the limit"),
        ("a.yml", "conversations: " + "[" * 1_000, "lists lie too deep"),
        ("a.yml", "{" * 1_000, "lists lie too deep"),
        ("a.yml", 'conversations: [["\\UFFFFFFFF", b]]', "not valid YAML"),
        ("a.yml", "conversations: &a [*a]", "must be a list of strings"),
        ("a.yml", "? [a]\n: b\n", "no list `conversations`"),
    ],
)
def test_deep_and_odd_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / name), "train")


@pytest.mark.parametrize(
    "metadata", ["[1]", "3", "null", '{"info": 3}', '{"info": {"features": []}}', "{", "[" * 100_000, '"x"']
)
def test_parquet_metadata_that_describe_nothing(tmp_path, metadata):
    table = pa.table({"text": ["x"], "label": [1]}).replace_schema_metadata({"huggingface": metadata})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: its metadata 'huggingface' do not describe features"):
        read_rows(str(tmp_path / "a.parquet"), "train")


def test_parquet_features_of_other_kinds_and_classes_without_a_name(tmp_path):
    features = {"text": None, "turns": [{"role": {}}], "person": {"names": {"dtype": "string"}}}
    features["label"] = {"names": ["bad", "good"], "_type": "ClassLabel"}
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"text": ["x", "y", "z"], "label": [1, -1, 2]}).replace_schema_metadata(described)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = read_rows(str(tmp_path / "a.parquet"), "train")
    assert [row.values["label"] for row in rows] == ["good", None, None]
    with pytest.raises(DataError, match="row 2: field 'label' is empty"):
        parse(rows, "classification")


def test_a_parquet_file_that_unpacks_to_far_too_much_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("language.data.readers._UNPACKED", 1 << 16)
    monkeypatch.setattr("language.data.readers._RATIO", 10)
    pyarrow.parquet.write_table(pa.table({"text": ["x" * 1000] * 1000}), tmp_path / "a.parquet", use_dictionary=False)
    with pytest.raises(DataError, match="would unpack to"):
        read_rows(str(tmp_path / "a.parquet"), "train")


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("language.data.readers._LONGEST_LINE", 100)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' + " " * 1000)
    with pytest.raises(DataError, match="line 2 has more than 100 characters"):
        read_rows(str(tmp_path / "a.jsonl"), "train")


@pytest.mark.parametrize("name", ROWS)
def test_half_a_surrogate_pair_is_named_by_file_line_and_field(write, name):
    def halved(value):
        if isinstance(value, dict):
            return {
                key: HALF if key in ("content", FORMATS.get(name) and FORMATS[name].answer) else halved(v)
                for key, v in value.items()
            }
        return [halved(v) for v in value] if isinstance(value, list) else value

    path = write([ROWS[name], halved(ROWS[name])])
    with pytest.raises(DataError, match=r"rows\.jsonl line 2.*field '\w+' holds half of a surrogate pair, U\+D83D"):
        parse(read_rows(path, "train"), name)


def test_half_a_surrogate_pair_elsewhere(write, tokenizer):
    with pytest.raises(DataError, match="line 1: field 'chosen' holds half"):
        read_pairs(read_rows(write([{"prompt": "a", "chosen": HALF, "rejected": "b"}]), "train"))
    with pytest.raises(DataError, match="line 1: field 'text' holds half"):
        read_classification(write([{"text": HALF, "label": 1}, {"text": "x", "label": 2}]), tokenizer)
    for setting in ({"prompt_template": "{prompt}" + HALF}, {"end_token": HALF}, {"path": HALF}):
        with pytest.raises(DataError, match="holds half of a surrogate pair"):
            InstructionDataModule(**{"path": "x", "tokenizer": tokenizer, "format": "pairs"} | setting)
    with pytest.raises(DataError, match="which is no character"):
        parse([Row({"prompt": "\ufdd0", "response": "x"}, "line 1")], "pairs")


def test_values_are_shown_short_whatever_their_size():
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    for value in (deep, "x" * 10**6, 10**4000, {"a": deep}, list(range(10**5))):
        assert len(shown(value)) < 100
