"""Adapters on the hub: pushed to and loaded from a local server, and everything that can be wrong."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from torch import nn

import lit_adapters as la
from lit_adapters.files.base_name import base_name
from lit_adapters.files.card import CARD
from tests.files.hub_server import TOKEN, hub_server
from tests.matrix import adapted, build

# In a process of its own, as huggingface_hub reads its settings when it is imported.
SCRIPT = """
import sys, torch, lit_adapters as la
from tests.matrix import MODELS, adapted, build
TOKEN = sys.argv[1]
model = adapted("llama", "nora++").eval()
run = MODELS["llama"].run

def refused(message, *args, **kwargs):
    other = build("llama")
    try:
        la.load_adapters(other, *args, **kwargs)
    except la.AssetError as error:
        assert message in str(error), error
        assert not list(la.adapters(other))
    else:
        raise AssertionError("not refused")

url = la.push(model, "user/first", token=TOKEN, license="mit", data="rows of | numbers\\nin two lines",
              metrics={"accuracy": 0.931}, private=True)
assert "/user/first/commit/" in url, url
loaded = build("llama")
report = la.load_adapters(loaded, "user/first", token=TOKEN)
assert torch.equal(run(loaded.eval()), run(model))
refused("check the name, the revision and the token", "user/second", token=TOKEN)

with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1)
la.push(model, "user/first", token=TOKEN, revision="more")
latest = build("llama")
la.load_adapters(latest, "user/first", revision="more", token=TOKEN)
assert torch.equal(run(latest.eval()), run(model))
again = build("llama")
la.load_adapters(again, "user/first", token=TOKEN)
assert torch.equal(run(again.eval()), run(loaded))
refused("at revision 'nowhere'", "user/first", revision="nowhere", token=TOKEN)

from huggingface_hub import HfApi
HfApi(token=TOKEN).upload_file(path_or_fileobj=b"my own words", path_in_repo="README.md", repo_id="user/first")
la.push(model, "user/first", token=TOKEN)

try:
    la.push(model, "user/third", token="hf_wrong")
except la.AssetError as error:
    assert "did not take the adapters for 'user/third'" in str(error), error
else:
    raise AssertionError("pushed with a wrong token")
print("done")
"""
OFFLINE = """
import torch, lit_adapters as la
from tests.matrix import build
model = build("llama")
la.load_adapters(model, "user/first")
try:
    la.load_adapters(build("llama"), "user/second")
except la.AssetError as error:
    assert "is not a directory here" in str(error)
else:
    raise AssertionError("loaded what was never fetched")
la.attach(model := build("llama"), la.LoRA(rank=2))
try:
    la.push(model, "user/first", token="hf_any")
except la.AssetError as error:
    assert "did not take the adapters" in str(error)
else:
    raise AssertionError("pushed without a network")
print("done")
"""


def python(code, tmp_path, *args, **settings):
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **settings}
    environment.pop("HF_TOKEN", None)
    result = subprocess.run([sys.executable, "-c", code, *args], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().endswith("done")


@pytest.mark.slow
def test_pushed_loaded_and_loaded_again_without_a_network(tmp_path):
    with hub_server() as (address, hub):
        python(SCRIPT, tmp_path, TOKEN, HF_ENDPOINT=address)
    assert hub.repositories["user/first"]["private"]
    assert hub.repositories["user/first"]["branches"]["main"][-1][1][CARD] == b"my own words"
    _, files = hub.repositories["user/first"]["branches"]["main"][1]
    assert sorted(files) == [CARD, "learned.png", "lit_adapter.json", "lit_adapter.safetensors"]
    text = files[CARD].decode()
    head = yaml.safe_load(text.split("---")[1])
    assert head == {"library_name": "lit-adapters", "license": "mit", "tags": ["lit-adapters", "lora", "nora"]}
    assert "rows of \\| numbers in two lines" in text
    assert "| accuracy | 0.931 |" in text
    assert "](learned.png)" in text
    assert "la.load_adapters(model, 'user/first')" in text
    python(OFFLINE, tmp_path, HF_HUB_OFFLINE="1")


def test_every_directory_has_a_card_unless_the_user_has_written_one(tmp_path):
    model = adapted("llama", "lora")
    model.config._name_or_path, model.config._commit_hash = "some/base", "0123abc"
    la.save_adapters(model, tmp_path)
    text = (tmp_path / CARD).read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "some/base"
    assert head["base_model_relation"] == "adapter"
    assert "AutoModelForCausalLM.from_pretrained('some/base', revision='0123abc')" in text
    settings = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert settings["methods"][0]["class_path"] == "lit_adapters.LoRA"
    header = json.loads((tmp_path / "lit_adapter.json").read_text())
    assert {k: header["base"][k] for k in ("name", "revision", "task")} == {
        "name": "some/base",
        "revision": "0123abc",
        "task": "CAUSAL_LM",
    }
    la.save_adapters(model, tmp_path)
    (tmp_path / CARD).write_text("my own words")
    la.save_adapters(model, tmp_path)
    assert (tmp_path / CARD).read_text() == "my own words"


def test_a_card_with_picture_data_and_metrics(tmp_path):
    la.save_adapters(adapted("llama", "nora"), tmp_path)
    assert "learned.png" not in (tmp_path / CARD).read_text()
    la.write_card(tmp_path, license="mit", data="rows of numbers", metrics={"loss": 0.25})
    text = (tmp_path / CARD).read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "mit"
    assert "rows of numbers" in text
    assert "| loss | 0.25 |" in text
    assert "](learned.png)" in text
    assert (tmp_path / "learned.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / CARD).write_text("my own words")
    with pytest.raises(la.AdapterError, match="was written or changed by you"):
        la.write_card(tmp_path)
    assert (tmp_path / CARD).read_text() == "my own words"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("some/base", {"name": "some/base"}),
        ("/home/me/base", {}),
        ("./base", {}),
        ("../a/b", {}),
        ("a b/c", {}),
        ("", {}),
    ],
)
def test_names_of_this_machine_stay_on_it(name, expected):
    model = build("bert")
    model.config._name_or_path = name
    assert base_name(model) == expected | {"task": "SEQ_CLS"}
    assert base_name(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize(
    ("kind", "task"), [("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"), ("WhisperForConditionalGeneration", None)]
)
def test_only_models_of_text_in_and_out_are_sequence_to_sequence(kind, task):
    model = type(kind, (nn.Module,), {})()
    model.config = object()
    assert base_name(model).get("task") == task


def test_a_local_directory_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    la.save_adapters(adapted("llama", "lora"), "user/name")
    la.load_adapters(build("llama"), "user/name")
    with pytest.raises(la.AdapterError, match="revision and token are for repositories of the hub"):
        la.load_adapters(build("llama"), "user/name", revision="main")


def test_what_is_refused(tmp_path, monkeypatch):
    model = adapted("llama", "lora")
    with pytest.raises(la.AdapterError, match="must be the name of one of the hub"):
        la.push(model, "name alone")
    with pytest.raises(la.AdapterError, match="must be an identifier of the hub"):
        la.push(model, "user/name", license="do what you want")
    with pytest.raises(la.AdapterError, match="has no adapters"):
        la.push(build("llama"), "user/name")
    with pytest.raises(la.AdapterError, match="does not exist"):
        la.load_adapters(build("llama"), tmp_path / "user" / "name")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(la.AdapterError, match=r"runs/adaptrs/\S+ does not exist"):
        la.load_adapters(build("llama"), "runs/adaptrs")


def test_a_name_in_a_file_that_is_none_is_refused(tmp_path):
    from lit_adapters.files.header import header_text

    header = {
        "format": 1,
        "lit_adapters": "0.1.0",
        "methods": [],
        "train": [],
        "adapters": {},
        "base": {"shapes": {}, "weights": None, "name": "../../etc"},
    }
    with pytest.raises(la.AdapterError, match="base/name in its header"):
        header_text(header, {"a": torch.zeros(1)})
