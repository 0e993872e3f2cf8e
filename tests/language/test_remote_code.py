"""Models that come with Python code of their own: run if the user says so, and never because a file does."""

import json
import sys

import pytest
import torch

import lit_adapters as la
from language import models
from language.module import CausalLMTuner
from lit_adapters.lightning.checkpoint_arguments import arguments_of_checkpoint

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(__file__).parent.joinpath("ran").touch()
Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnLlama(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A directory with a model of a class of its own, and the file that its code writes when it runs."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_trusted", set())
    monkeypatch.setattr(sys, "stdin", None)  # a question would fail
    folder, marker = tmp_path / "model", tmp_path / "ran"
    models.create_model(models.TINY_LLAMA).save_pretrained(folder)
    models.create_tokenizer(models.TINY_LLAMA).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own_llama",
        "architectures": ["OwnLlama"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLlama"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    return str(folder), marker


def test_code_runs_only_if_the_user_says_so(own):
    folder, marker = own
    with pytest.raises(la.AdapterError, match=r"comes with Python code of its own.*trust_remote_code: true"):
        models.create_model(folder)
    assert not marker.exists()
    models.trust_code_of(folder)
    assert type(models.create_model(folder)).__name__ == "OwnLlama"
    assert marker.exists()


def test_the_setting_of_a_recipe_is_in_no_checkpoint(own):
    folder, marker = own
    module = CausalLMTuner(folder, la.LoRA(rank=2), trust_remote_code=True)
    assert "trust_remote_code" not in module.hparams
    assert not marker.exists()
    module.configure_model()
    assert marker.exists()


def test_a_checkpoint_cannot_trust(own, tmp_path):
    folder, marker = own
    settings = dict(CausalLMTuner(folder, la.LoRA(rank=2)).hparams)
    hostile = {"hyper_parameters": settings | {"trust_remote_code": True}, "state_dict": {}}
    torch.save(hostile, tmp_path / "hostile.ckpt")
    with pytest.raises(la.AdapterError, match="only you can say"):
        CausalLMTuner.load_from_checkpoint(tmp_path / "hostile.ckpt")
    with pytest.raises(la.AdapterError, match="only you can say"):
        arguments_of_checkpoint(CausalLMTuner, hostile, tmp_path / "hostile.ckpt", {}, {})
    named = {"hyper_parameters": settings, "state_dict": {}}
    torch.save(named, tmp_path / "named.ckpt")
    with pytest.raises(la.AdapterError, match="goes with the name of the model that you trust"):
        CausalLMTuner.load_from_checkpoint(tmp_path / "named.ckpt", trust_remote_code=True)
    typed = {"trust_remote_code": True}
    with pytest.raises(la.AdapterError, match="goes with the name of the model that you trust"):
        arguments_of_checkpoint(CausalLMTuner, named, tmp_path / "named.ckpt", typed, typed)
    assert not marker.exists()
