"""Files to text: every kind of file and format, and every way that a row can be bad."""

from __future__ import annotations

import csv
import gzip
import json
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from language.data.formats import parse
from language.data.module import InstructionDataModule
from language.data.sources import Row, has_split, read_rows
from lit_adapters.errors import DataError
from tests.language.conftest import CHAT, make_tokenizer

ALPACA = {"instruction": "Name a capital.", "input": "", "output": "Paris."}
ORCA = {"system_prompt": "Be brief.", "question": "What is it?", "response": "A fox."}
SUMMARY = {"dialogue": "Hannah: Hi\r\nAmanda: Hi", "summary": "They greet."}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]


def examples(path, tokenizer, **settings):
    settings = {"format": "alpaca"} | settings
    return InstructionDataModule(path, tokenizer, val_fraction=0, **settings).examples("train")


# Kinds of files


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [{"prompt": f"Say {i}", "response": f"{i}: yes"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n" + "\n\n".join(json.dumps(row) for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    turns = "\n".join(f"- - Say {i}\n  - '{i}: yes'" for i in range(3))
    (tmp_path / "a.yml").write_text(f"categories:\n- x\nconversations:\n{turns}\n")
    origins = []
    for name in ("a.jsonl", "a.json", "a.parquet", "a.yml"):
        read = read_rows(str(tmp_path / name), "train")
        assert [row.values for row in read] == rows
        origins.append(read[1].origin.removeprefix(str(tmp_path)))
    assert origins == ["/a.jsonl line 4", "/a.json row 2", "/a.parquet row 2", "/a.yml line 7"]


def test_yaml_turns_answer_each_other_and_stay_text(tmp_path):
    (tmp_path / "a.yml").write_text("conversations:\n- - Yes\n  - 12\n  - 'null'\n")
    rows = [tuple(row.values.values()) for row in read_rows(str(tmp_path / "a.yml"), "train")]
    assert rows == [("Yes", "12"), ("12", "null")]


def test_parquet_class_names(tmp_path):
    described = {"info": {"features": {"label": {"names": ["bad", "good"]}}}}
    table = pa.table({"text": ["x", "y"], "label": [1, 0]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(described)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [row.values["label"] for row in read_rows(str(tmp_path / "a.parquet"), "train")] == ["good", "bad"]


def test_folder_of_splits(tmp_path, write):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation", "notes.of.mine"):
        write([{"name": name}], f"{name}.jsonl")
    folder = str(tmp_path)
    assert [row.values["name"][-1] for row in read_rows(folder, "train")] == ["2", "2"]
    assert [row.values["name"] for row in read_rows(folder, "val")] == ["validation"]
    assert (has_split(folder, "val"), has_split(folder, "test")) == (True, False)
    with pytest.raises(DataError, match="holds no test data"):
        read_rows(folder, "test")


def test_list_of_files_and_folder_without_splits(tmp_path, write):
    paths = [write([{"name": name}], f"{name}.jsonl") for name in ("b", "a")]
    assert [row.values["name"] for row in read_rows(paths, "train")] == ["b", "a"]
    assert [row.values["name"] for row in read_rows(str(tmp_path), "train")] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl line 2: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl line 2: expected an object"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.json", '[{"a": 1},\n{]', r"a\.json line 2: not valid JSON"),
        ("a.json", '{"a": 1}', "does not hold a list"),
        ("a.parquet", "PAR1", r"a\.parquet is truncated or not parquet"),
        ("a.yml", "conversations:\n- - a\n  - 'b\n", r"a\.yml line \d: not valid YAML"),
        ("a.yml", "conversations:\n- - a\n  - b\n- - c\n", r"a\.yml line 4: .* needs a prompt and a response"),
        ("a.yml", "conversations:\n- a\n", r"a\.yml line 2: .* must be a list of strings"),
        ("a.yml", "talks: []\n", "no list `conversations`"),
        ("a.xml", "<a/>", "unknown kind"),
        ("a.csv", "a,b\n1,2,3\n", r"a\.csv line 2 has 3 values for 2 columns"),
        ("a.csv", 'a,b\n1,2\n"x\ny",3\n4\n', r"a\.csv line 5 has 1 values for 2 columns"),
        ("a.csv", "a,a\n1,2\n", r"a\.csv line 1: columns need different names"),
        ("a.csv", 'a,b\n"1"x,2\n', r"a\.csv line 2: not valid csv"),
        ("a.tsv", "a\tb\n1\n", r"a\.tsv line 2 has 1 values for 2 columns"),
        ("a.jsonl.gz", "{}", r"cannot read .*a\.jsonl\.gz: Not a gzipped file"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / name), "train")


def test_not_utf8_and_missing_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(DataError, match="as UTF-8"):
        read_rows(str(tmp_path / "a.jsonl"), "train")
    with pytest.raises(DataError, match="does not exist"):
        read_rows(str(tmp_path / "b.jsonl"), "train")


def test_hub_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"hub:some/name needs the package `datasets`"):
        read_rows("hub:some/name", "train")


def test_hub_data_through_datasets(tmp_path, monkeypatch):
    """A folder stands for a name on the hub: the package itself reads both alike; its cache is temporary."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "repository").mkdir()
    for split, count in (("train", 3), ("validation", 2)):
        rows = [ALPACA | {"instruction": f"{split} {i}"} for i in range(count)]
        file = tmp_path / "repository" / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    address = f"hub:{tmp_path / 'repository'}"
    assert [row.values["instruction"] for row in read_rows(address, "train")] == [f"train {i}" for i in range(3)]
    assert has_split(address, "val")
    assert not has_split(address, "test")
    assert read_rows(address, "val")[1].origin == f"{address} validation row 2"
    with pytest.raises(DataError, match="has no test split: give its file in val_path or test_path, a fraction"):
        read_rows(address, "test")
    with pytest.raises(DataError, match=r"cannot reach hub:.*nothing.*Check the name and the network"):
        read_rows(f"hub:{tmp_path / 'nothing'}", "train")


def test_a_configuration_and_a_split_of_hub_data(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "repository"
    for config in ("short", "long"):
        (root / config).mkdir(parents=True)
        row = json.dumps(ALPACA | {"instruction": config})
        for split in ("train_sft", "test_sft"):
            (root / config / f"{split}.jsonl").write_text(f"{row}\n")
    files = [
        {
            "config_name": config,
            "data_files": [{"split": s, "path": f"{config}/{s}.jsonl"} for s in ("train_sft", "test_sft")],
        }
        for config in ("short", "long")
    ]
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps(files)}\n---\n")
    address = f"hub:{root}?config=long&split=train_sft"
    assert [row.values["instruction"] for row in read_rows(address, "train")] == ["long"]
    assert [row.values["instruction"] for row in read_rows(address, "test")] == ["long"]  # like a file
    assert not has_split(address, "val")
    for wrong, message in (
        (f"hub:{root}", r"has several configurations: choose one of (short, long|long, short), as in hub:.*\?config="),
        (f"hub:{root}?config=long", r"has no train split.*\?split=.*found (test_sft, train_sft|train_sft, test_sft)"),
        (f"hub:{root}?config=long&split=train", "has no split 'train'; it has"),
        (f"hub:{root}?name=long", "must be hub:NAME, or hub:NAME"),
        ("hub:?config=long", "must be hub:NAME"),
        (f"hub:{root}?config=", "must be hub:NAME"),
    ):
        with pytest.raises(DataError, match=message):
            read_rows(wrong, "train")


def test_csv_and_packed_files(tmp_path):
    rows = [{"prompt": 'Say "a", b', "response": "two\nlines"}, {"prompt": "Ü", "response": "1"}]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "a.tsv").write_text("prompt\tresponse\nx\ty\n")
    for name in ("a.csv", "a.tsv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    for name in ("a.csv", "a.csv.gz", "b.jsonl.gz", "b.json.gz"):
        read = read_rows(str(tmp_path / name), "train")
        assert [row.values for row in read] == rows
    assert [row.origin.rpartition("/")[2] for row in read_rows(str(tmp_path / "a.csv.gz"), "train")] == [
        "a.csv.gz line 2",
        "a.csv.gz line 4",
    ]
    assert read_rows(str(tmp_path / "a.tsv.gz"), "train")[0].values == {"prompt": "x", "response": "y"}
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.csv.gz").write_bytes((tmp_path / "a.csv.gz").read_bytes())
    (folder / "test.tsv").write_bytes((tmp_path / "a.tsv").read_bytes())
    assert [row.values for row in read_rows(str(folder), "train")] == rows
    assert has_split(str(folder), "test")


def test_a_packed_file_that_fills_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("language.data.readers._UNPACKED", 1000)
    monkeypatch.setattr("language.data.readers._RATIO", 10)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": "b"}\n' * 100_000))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz unpacks to more than \d"):
        read_rows(str(tmp_path / "a.jsonl.gz"), "train")
    torn = gzip.compress(json.dumps([ALPACA] * 100).encode())[:-20]
    (tmp_path / "torn.json.gz").write_bytes(torn)
    with pytest.raises(DataError, match=r"cannot read .*torn\.json\.gz"):
        read_rows(str(tmp_path / "torn.json.gz"), "train")


# Formats


TOOLS = (
    "{% for t in tools or [] %}<tool>{{ t | tojson }}</tool>{% endfor %}"
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.get('tool_calls') or [] %}<call>{{ c['function'] | tojson }}</call>{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = {"name": "weather", "arguments": {"city": "Paris </s>"}}


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "How is "}, {"type": "text", "text": "Paris?"}]},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": CALL}]},
                {"role": "tool", "content": "sun", "tool_call_id": "1", "name": "weather"},
                {"role": "assistant", "content": "Sunny."},
            ],
            "tools": [{"type": "function", "function": WEATHER}],
        },
        {
            "conversations": [
                {"from": "human", "value": "How is Paris?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "sun"},
                {"from": "gpt", "value": "Sunny."},
            ],
            "tools": json.dumps([WEATHER]),
        },
        {
            "messages": [
                {"role": "user", "content": "How is Paris?"},
                {
                    "role": "assistant",
                    "content": "",
                    "function_call": CALL | {"arguments": json.dumps(CALL["arguments"])},
                },
                {"role": "tool", "content": "sun"},
                {"role": "assistant", "content": "Sunny."},
            ],
            "functions": [WEATHER],
        },
    ],
    ids=["messages", "sharegpt", "functions"],
)
def test_tools_reach_the_chat_template(row, write, tokenizer):
    path = write([row])
    module = InstructionDataModule(path, tokenizer, format="chat", val_fraction=0, chat_template=TOOLS, max_length=4096)
    module.setup("fit")
    (batch,) = module.train_dataloader()
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    text = tokenizer.decode(ids)
    learned = tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label != -100])
    call = '<call>{"name": "weather", "arguments": {"city": "Paris </s>"}}</call></s>'
    assert text.startswith('<tool>{"type": "function", "function": {"name": "weather"')
    assert learned == f"{call}Sunny.</s>"
    assert f"<|turn|>user\nHow is Paris?</s>\n<|turn|>assistant\n{call}\n<|turn|>tool\nsun</s>" in text
    assert ids.count(tokenizer.eos_token_id) == 4  # the text of the row spells one, and stays text
    with pytest.raises(DataError, match="does not write the function 'weather': give a chat_template for tools"):
        InstructionDataModule(path, tokenizer, format="chat", val_fraction=0, max_length=4096).setup("fit")


def test_sharegpt_and_a_system_prompt_beside_the_messages():
    talk = [{"from": "human", "value": " Hi "}, {"from": "gpt", "value": "Hello", "weight": 1}]
    ((record,), _) = parse([Row({"conversations": talk, "system": "Be brief."}, "x")], "chat")
    assert record.messages == (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))
    ((other,), _) = parse([Row({"messages": TALK[1:3], "system_prompt": "Be brief."}, "x")], "chat")
    assert other.messages == record.messages


def test_alpaca_prompts(write, tokenizer):
    path = write([ALPACA, ALPACA | {"input": "Of France", "instruction": "Use {input}"}])
    short, long = examples(path, tokenizer)
    assert short.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a capital.\n\n### Response:\n"
    )
    assert "further context" in long.prompt
    assert "### Instruction:\nUse {input}\n\n### Input:\nOf France\n\n### Response:\n" in long.prompt
    assert (short.response, short.origin) == ("Paris.", f"{path} line 1")
    (own, _) = examples(path, tokenizer, prompt_template="Q: {instruction} {{x}}\nA: ")
    assert own.prompt == "Q: Name a capital. {x}\nA: "
    (chat, _) = examples(path, tokenizer, use_chat_template=True)
    assert chat.prompt == "<|turn|>user\nName a capital.</s>\n<|turn|>assistant\n"


@pytest.mark.parametrize("missing", [{"system_prompt": ""}, {"system_prompt": None}, {}])
def test_openorca_prompts(write, tokenizer, missing):
    without = {k: v for k, v in ORCA.items() if k != "system_prompt"} | missing
    path = write([ORCA, without])
    full, short = examples(path, tokenizer, format="openorca")
    assert full.prompt == "### System:\nBe brief.\n\n### User:\nWhat is it?\n\n### Response:\n"
    assert short.prompt == "### User:\nWhat is it?\n\n### Response:\n"
    full, short = examples(path, tokenizer, format="openorca", use_chat_template=True)
    assert full.prompt.startswith("<|turn|>system\nBe brief.</s>\n<|turn|>user\nWhat is it?</s>")
    assert short.prompt.startswith("<|turn|>user\nWhat is it?")


def test_summarisation_classification_pairs(write, tokenizer):
    (summary,) = examples(write([SUMMARY]), tokenizer, format="summarisation")
    assert summary.prompt == "Summarize this dialogue.\n\nHannah: Hi\nAmanda: Hi\n\nSummary:\n"
    assert summary.body == "Hannah: Hi\nAmanda: Hi"
    path = write([{"text": "x", "label": 3}, {"text": "y", "label": 1}])
    data = InstructionDataModule(path, tokenizer, format="classification", val_fraction=0)
    assert [(e.prompt, e.response) for e in data.examples("train")] == [("x\n\nLabel:\n", "3"), ("y\n\nLabel:\n", "1")]
    assert data.classes == ["1", "3"]
    path = write([{"text": "x", "label": 3, "name": "three"}])
    (named,) = examples(path, tokenizer, format="classification", columns={"label": "name"})
    assert named.response == "three"
    (pair,) = examples(write([{"prompt": " a ", "response": "b"}]), tokenizer, format="pairs")
    assert (pair.prompt, pair.response) == ("a\n", "b")


def test_chat_example_is_the_last_answer(write, tokenizer):
    (example,) = examples(write([{"messages": TALK}]), tokenizer, format="chat")
    assert example.prompt.endswith("Hello</s>\n<|turn|>user\nBye</s>\n<|turn|>assistant\n")
    assert example.prompt.startswith("<|turn|>system\nBe brief.")
    assert example.response == "See you"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("alpaca", {"instruction": "x"}, r"line 2: field 'output' is missing \(the row has instruction\)"),
        ("alpaca", ALPACA | {"output": 3}, "line 2: field 'output' must be text, got 3"),
        ("alpaca", ALPACA | {"output": " \n"}, "line 2: field 'output' is empty.*drop_empty"),
        ("alpaca", ALPACA | {"instruction": ""}, "line 2: field 'instruction' is empty"),
        ("alpaca", ALPACA | {"output": None}, "line 2: field 'output' is empty"),
        ("classification", {"text": "x", "label": True}, "line 2: field 'label' must be text"),
        ("chat", {"text": "x"}, r"line 2: field 'messages' must be a list .*the row has text"),
        ("chat", {"messages": TALK[:4]}, "line 2: .* does not end with an assistant"),
        ("chat", {"messages": []}, "line 2: .* does not end with an assistant"),
        ("chat", {"messages": [TALK[2]]}, "line 2: the assistant speaks before any user"),
        ("chat", {"messages": [{"role": "bot", "content": "x"}]}, "line 2, message 1: role 'bot' is unknown"),
        ("chat", {"messages": [{"role": "user"}, TALK[2]]}, "line 2, message 1: field 'content' is missing"),
        ("chat", {"messages": [TALK[1], TALK[0], TALK[2]]}, "line 2, message 2: a system message must come first"),
    ],
)
def test_bad_rows_name_file_line_and_field(write, tokenizer, name, row, message):
    good = {"chat": {"messages": TALK}, "classification": {"text": "x", "label": 1}, "alpaca": ALPACA}[name]
    path = write([good, row])
    with pytest.raises(DataError, match=r"rows\.jsonl " + message):
        examples(path, tokenizer, format=name)


def test_drop_empty(write, tokenizer):
    path = write([ALPACA, ALPACA | {"output": ""}, ALPACA | {"instruction": ""}])
    assert len(examples(path, tokenizer, drop_empty=True)) == 1
    rows = [Row({"messages": TALK}, "a"), Row({"messages": TALK[:4]}, "b")]
    records, dropped = parse(rows, "chat", drop_empty=True)
    assert (len(records), dropped) == (1, 1)
    with pytest.raises(DataError, match="all 1 rows"):
        parse(rows[1:], "chat", drop_empty=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question}{instruction}", r"unknown fields \['question'\]"),
        ("{input}", r"leaves out \['instruction'\]"),
        ("{instruction", "malformed"),
    ],
)
def test_bad_prompt_templates(tokenizer, template, message):
    with pytest.raises(DataError, match=message):
        InstructionDataModule("x", tokenizer, prompt_template=template)


# Chat templates

DROPS_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}</s>{% endif %}{% endfor %}"
)
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + DROPS_SYSTEM


@pytest.mark.parametrize("template", [DROPS_SYSTEM, REFUSES_SYSTEM], ids=["drops", "refuses"])
def test_lost_system_message_is_refused_and_folded_in(write, tokenizer, template):
    path = write([{"messages": TALK}])
    with pytest.raises(DataError, match="drops or refuses system messages: set system_in_user"):
        examples(path, tokenizer, format="chat", chat_template=template)
    (example,) = examples(path, tokenizer, format="chat", chat_template=template, system_in_user=True)
    assert example.prompt.startswith("[user]Be brief.\n\nHi</s>[assistant]Hello</s>")
    without = write([{"messages": TALK[1:]}])
    assert examples(without, tokenizer, format="chat", chat_template=template)


def test_tokenizer_without_chat_template(write):
    with pytest.raises(DataError, match="has no chat template"):
        examples(write([{"messages": TALK}]), make_tokenizer(chat_template=None), format="chat")


def test_template_that_refuses_a_conversation(write, tokenizer):
    template = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + DROPS_SYSTEM
    with pytest.raises(DataError, match=r"rows\.jsonl line 1: the chat template refuses .*too long"):
        examples(write([{"messages": TALK[1:]}]), tokenizer, format="chat", chat_template=template)


@pytest.mark.parametrize("end", ["{{ 1 // 0 }}", "{{ messages + 3 }}", "{% include 'x' %}", "{{ ().__class__.mro() }}"])
def test_template_that_fails(write, tokenizer, end):
    """A chat template may come with a model from elsewhere; transformers runs it in jinja's sandbox."""
    with pytest.raises(DataError, match=r"rows\.jsonl line 1: the chat template refuses"):
        examples(write([{"messages": TALK[1:]}]), tokenizer, format="chat", chat_template=DROPS_SYSTEM + end)


def test_template_that_rewrites_earlier_turns(write, tokenizer):
    rewriting = "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}</s>{% endfor %}"
    data = InstructionDataModule(
        write([{"messages": TALK[1:]}]), tokenizer, format="chat", chat_template=rewriting, val_fraction=0
    )
    with pytest.raises(DataError, match="line 1: the chat template writes message 2 differently"):
        data.setup("fit")


# White space and what is not learned

SPACED = "\n    return x\n\n"


@pytest.mark.parametrize("name", ["alpaca", "openorca", "pairs", "summarisation", "chat"])
def test_answers_keep_their_white_space_unless_asked(write, tokenizer, name):
    rows = {
        "alpaca": ALPACA | {"output": SPACED},
        "openorca": ORCA | {"response": SPACED},
        "pairs": {"prompt": " a ", "response": SPACED},
        "summarisation": SUMMARY | {"summary": SPACED},
        "chat": {"messages": [*TALK[:4], {"role": "assistant", "content": SPACED}]},
    }
    path = write([rows[name]])
    (kept,) = examples(path, tokenizer, format=name)
    assert kept.response == SPACED
    (stripped,) = examples(path, tokenizer, format=name, strip_answers=True)
    assert stripped.response == SPACED.strip()
    assert kept.prompt == stripped.prompt


def flagged(**fields):
    return {"messages": [*TALK[:2], TALK[2] | fields, *TALK[3:]]}


@pytest.mark.parametrize(
    ("fields", "unlearned"),
    [
        ({"weight": 0}, (2,)),
        ({"weight": 0.0}, (2,)),
        ({"weight": 1}, ()),
        ({"weight": None}, ()),
        ({"train": False}, (2,)),
        ({"train": True}, ()),
        ({"loss": False}, (2,)),
        ({"mask": True}, (2,)),
        ({"masked": 1}, (2,)),
        ({"mask": False}, ()),
        ({"weight": 1, "train": False}, (2,)),
        ({"name": "Ann", "id": 3, "tool_calls": None, "refusal": "", "annotations": []}, ()),
    ],
)
def test_fields_that_say_whether_a_message_is_learned(fields, unlearned):
    ((record,), _) = parse([Row(flagged(**fields), "line 1")], "chat")
    assert record.unlearned == unlearned


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (flagged(weight=0.5), "message 3: field 'weight' must be true, false, 0 or 1, got 0.5"),
        (flagged(train="no"), "message 3: field 'train' must be true, false, 0 or 1"),
        (flagged(wieght=0), "message 3: field 'wieght' of a message is unknown"),
        (flagged(tool_calls={"name": "f"}), "message 3: field 'tool_calls' must be a list"),
        (flagged(tool_calls=[{"nme": "f"}]), "message 3: a call of a tool needs a function with a name"),
        (flagged(tool_calls=[{"name": "f"}], function_call={"name": "f"}), "message 3 has both tool_calls and"),
        (flagged(content=[{"type": "image"}]), "message 3: a part of 'content' is"),
        (flagged(reasoning_content="Hm."), "message 3: field 'reasoning_content' of a message is unknown"),
        ({"messages": [TALK[1] | {"weight": 1}, TALK[2]]}, "message 1: field 'weight' asks to learn a message of role"),
        ({"messages": [TALK[1], TALK[2] | {"weight": 0}]}, "no message of the assistant is to be learned"),
        (
            {"messages": [TALK[1] | {"tool_calls": [{"name": "f"}]}, TALK[2]]},
            "message 1: field 'tool_calls' belongs to",
        ),
        ({"messages": TALK, "tools": [{"nme": "f"}]}, "a function in 'tools' has no name"),
        ({"messages": TALK, "tools": "none"}, "field 'tools' must be the only list of descriptions"),
        ({"messages": TALK, "documents": ["x"]}, "field 'documents' beside the messages would be lost"),
        ({"messages": TALK, "system": "Be rude."}, "field 'system' beside the messages must be the only system prompt"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "message 1: field 'from' is 'alien'"),
        ({"conversations": [{"from": "human"}]}, "message 1: field 'value' is missing"),
    ],
)
def test_fields_of_messages_that_cannot_be_honoured_are_named(row, message):
    with pytest.raises(DataError, match=f"^line 1(, |: ){message}"):
        parse([Row(row, "line 1")], "chat")


def test_rows_that_say_so_are_not_learned(caplog):
    rows = [Row(ALPACA | more, "x") for more in ({}, {"weight": 0}, {"train": False}, {"mask": 1}, {"weight": 3.5})]
    with caplog.at_level("INFO"):
        records, dropped = parse(rows, "alpaca")
    assert (len(records), dropped) == (2, 0)
    assert "3 of 5 rows say that they are not to be learned" in caplog.text
    assert "field 'weight' has values beside 0 and 1, which are ignored" in caplog.text
    # As csv has them, and texts that say nothing.
    rows = [
        Row(ALPACA | more, "x")
        for more in ({"weight": "0"}, {"train": "False"}, {"mask": "true"}, {"weight": " 0.0"}, {"mask": "N95"})
    ]
    assert len(parse(rows, "alpaca")[0]) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"columns": {"outptu": "x"}}, r"unknown fields \['outptu'\]: did you mean 'output'"),
        ({"columns": {"messages": "x"}}, r"unknown fields \['messages'\]"),
        ({"columns": {"output": ""}}, "gives field 'output' the name ''"),
        ({"columns": {"output": "input"}}, "gives two fields the column 'input'"),
        ({"columns": {"prompt": "x"}, "format": "chat"}, r"unknown fields \['prompt'\]: format chat has messages"),
        ({"end_token": ""}, "end_token is empty"),
        ({"val_path": ""}, "val_path is empty"),
        ({"path": ["x", ""]}, "path is empty"),
        ({"chat_template": CHAT}, "chat_template has no meaning for format=alpaca"),
        ({"system_in_user": True}, "system_in_user has no meaning for format=alpaca"),
        ({"val_fraction": float("nan")}, "val_fraction=nan"),
        ({"seed": 10**30}, "seed=.* must be below"),
    ],
)
def test_settings_that_no_one_can_mean(tokenizer, setting, message):
    with pytest.raises(DataError, match=message):
        InstructionDataModule(**{"path": "x", "tokenizer": tokenizer} | setting)
