"""Models and tokenizers by name: what is built, and what is said when it cannot be."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from huggingface_hub import constants as hub_constants
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_adapters as la
from language.gguf_files import converted
from language.models import (
    SMOLLM2,
    SMOLLM2_ADDRESS,
    TINY_LLAMA,
    context_length,
    create_model,
    create_tokenizer,
    vocabulary_size,
)
from lit_adapters.assets.package_index import resolve

TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture
def directory(tmp_path):
    create_model(TINY_LLAMA).save_pretrained(tmp_path / "tiny")
    create_tokenizer(TINY_LLAMA).save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def test_a_tiny_model_and_its_tokenizer_fit():
    model, tokenizer = create_model(TINY_LLAMA), create_tokenizer(TINY_LLAMA)
    assert len(tokenizer) == vocabulary_size(model) == 259
    assert context_length(model) == 512
    assert not model.training
    config = model.config
    assert tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<pad>"]) == [256, 257, 258]
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 257, 258)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


@pytest.mark.parametrize(
    "text", ["plain words", " two  spaces\n\ttab ", "Größe ☃ 日本", "".join(map(chr, range(1, 256)))]
)
def test_bytes_go_in_and_out(text):
    tokenizer = create_tokenizer(TINY_LLAMA)
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text


def test_special_tokens_in_a_conversation():
    tokenizer = create_tokenizer(TINY_LLAMA)
    turns = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<s>user\nhi</s>\n<s>assistant\n"
    assert [t for t in tokenizer(text)["input_ids"] if t > 255] == [256, 257, 256]


def test_the_seed_decides_a_tiny_model():
    def weight(seed):
        torch.manual_seed(seed)
        return create_model(TINY_LLAMA).lm_head.weight

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_directory(directory, dtype):
    model = create_model(directory, dtype=dtype)
    expected = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert len(create_tokenizer(directory)) == 259


def test_a_tokenizer_without_padding_pads_with_the_end(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(directory)
    assert create_tokenizer(directory).pad_token == "</s>"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_4_bit_weights_of_all_linear_layers_but_the_head(directory, dtype):
    for name in (TINY_LLAMA, directory):
        model = create_model(name, quantization="nf4", dtype=dtype)
        packed = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
        assert len(packed) == 14
        assert {(m.weight.quant_state.quant_type, m.weight.quant_state.nested) for m in packed} == {("nf4", True)}
        assert {m.compute_dtype for m in packed} == {getattr(torch, dtype)}
        assert type(model.lm_head) is nn.Linear
        assert model.lm_head.weight.dtype == getattr(torch, dtype)
    with torch.no_grad():
        whole, approximate = create_model(directory, dtype=dtype)(TOKENS).logits, model(TOKENS).logits
    assert 1e-3 < (approximate - whole).norm() / whole.norm() < 0.3


def test_checkpointing_does_not_reenter():
    model = create_model(TINY_LLAMA, gradient_checkpointing=True)
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert len(checkpointed) >= 2
    assert all(m._gradient_checkpointing_func.keywords == {"use_reentrant": False} for m in checkpointed)
    assert not model.get_input_embeddings().requires_grad_(False)(TOKENS).requires_grad
    assert not any(getattr(m, "gradient_checkpointing", False) for m in create_model(TINY_LLAMA).modules())


# What cannot be built


@pytest.mark.parametrize("create", [create_model, create_tokenizer])
def test_a_name_that_the_hub_does_not_give(create, monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(la.AssetError, match=r"'nobody/nothing' could not be fetched.*'smollm2-135m-instruct'"):
        create("nobody/nothing")
    assert hub_constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("create", [create_model, create_tokenizer])
def test_files_that_are_not_there(create, tmp_path):
    with pytest.raises(la.AssetError, match=r"no model file '.*nothing\.gguf'"):
        create(str(tmp_path / "nothing.gguf"))
    with pytest.raises(la.AssetError, match="malformed package address"):
        create("package://nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(la.AdapterError, match=r"cannot load the model '.*empty'"):
        create(str(tmp_path / "empty"))


def test_torn_files(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_ADAPTERS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(la.AssetError, match=r"torn\.gguf' is not a GGUF language model"):
        create_model(str(tmp_path / "torn.gguf"))
    assert [p.name for p in (tmp_path / "cache" / "gguf").iterdir() if p.is_dir()] == []
    with open(f"{directory}/model.safetensors", "rb+") as file:
        file.truncate(2000)
    with pytest.raises(la.AdapterError, match="cannot load the model"):
        create_model(directory)


def test_the_implementation_of_attention():
    assert create_model(TINY_LLAMA, attention="eager").config._attn_implementation == "eager"
    assert create_model(TINY_LLAMA).config._attn_implementation == "sdpa"
    with pytest.raises(la.AdapterError, match="attention 'eagre' cannot be used: "):
        create_model(TINY_LLAMA, attention="eagre")


def test_values_out_of_range():
    with pytest.raises(la.AdapterError, match="dtype 'float8' is unknown: use float32"):
        create_model(TINY_LLAMA, dtype="float8")
    with pytest.raises(la.AdapterError, match="quantization 'int3' is unknown: use 'nf4'"):
        create_model(TINY_LLAMA, quantization="int3")


def test_a_converted_model_of_somebody_else_is_not_used(tmp_path, monkeypatch):
    """Who knows the file's time and size knows the folder's name, and a shared cache lets him make it first."""
    monkeypatch.setenv("LIT_ADAPTERS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    root = tmp_path / "cache" / "gguf"
    root.mkdir(parents=True, mode=0o777)
    root.chmod(0o777)
    with pytest.raises(la.AssetError, match="is not a GGUF language model"):
        converted(tmp_path / "model.gguf")
    assert root.stat().st_mode & 0o777 == 0o700
    (planted,) = (root / path.name.removesuffix(".lock") for path in root.iterdir())
    planted.symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(la.AssetError, match="is no folder of this user"):
        converted(tmp_path / "model.gguf")
    planted.unlink()
    planted.mkdir()
    assert converted(tmp_path / "model.gguf") == planted
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr("language.gguf_files.private_folder", lambda path: path)
    if planted.stat().st_uid:  # what root has made is trusted
        with pytest.raises(la.AssetError, match="is no folder of this user"):
            converted(tmp_path / "model.gguf")


@pytest.mark.parametrize("package", ["gguf", "accelerate", "bitsandbytes"])
def test_packages_that_are_not_installed(package, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    monkeypatch.setenv("LIT_ADAPTERS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    name = TINY_LLAMA if package == "bitsandbytes" else str(tmp_path / "model.gguf")
    with pytest.raises(la.AdapterError, match=rf"'{package}': run pip install 'lit-adapters\["):
        create_model(name, quantization="nf4" if name == TINY_LLAMA else None)


# The model of the package index


@pytest.mark.slow
def test_smollm2_is_what_its_file_holds(tmp_path):
    """Logits bit-identical to those of transformers' own reading, which cannot be saved; the same tokens."""
    file = resolve(SMOLLM2_ADDRESS)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    model, tokenizer = create_model(SMOLLM2), create_tokenizer(SMOLLM2)
    with pytest.raises(ValueError, match=r"quantized|GGUF|save"):
        theirs.save_pretrained(tmp_path / "theirs")
    text = "The capital of France is"
    tokens = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**tokens).logits, theirs(**tokens).logits)
        assert tokenizer.decode(model(**tokens).logits[0, -1].argmax()) == " Paris"
    assert len(tokenizer) == vocabulary_size(model) == 49152
    original = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    long = " ".join(str(n) for n in range(50)) + " naïve ☃ <|im_start|>user\n"
    assert tokenizer(long)["input_ids"] == original(long)["input_ids"]
    assert tokenizer.chat_template == original.chat_template
    model.save_pretrained(tmp_path / "ours")
    assert converted(file) == converted(file)
