"""What the user typed wins over the checkpoint, or the contradiction is an error; the checkpoint fills what is open."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

import lit_adapters as la
from language.__main__ import main as language_main
from language.dpo import DPOTuner
from language.draft import DraftTuner
from language.grpo import GRPOTuner
from language.grpo.__main__ import main as grpo_main
from language.module import CausalLMTuner
from lit_adapters.files.adapters import read_checkpoint_file
from lit_adapters.lightning import AdapterCLI
from lit_adapters.lightning.checkpoint_arguments import arguments_of_checkpoint, check_base
from vision import ViTClassifier
from vision.__main__ import main as vision_main

FOLDER = Path(__file__).parents[1] / "fixtures" / "version_0_1"
CLASSES = {"sft": CausalLMTuner, "dpo": DPOTuner, "grpo": GRPOTuner, "draft": DraftTuner, "vision": ViTClassifier}
REWARDS = [{"function": "language.grpo.rewards.number_only", "weight": 1.0}]


def taken(kind, **typed):
    """The arguments that are taken from a checkpoint beside those typed."""
    path = FOLDER / f"{kind}.ckpt"
    return arguments_of_checkpoint(CLASSES[kind], read_checkpoint_file(path), path, typed, typed)


@pytest.mark.parametrize(
    ("kind", "typed"),
    [
        ("sft", {"max_new_tokens": 3}),
        ("sft", {"dtype": "bfloat16"}),
        ("sft", {"gradient_checkpointing": True}),
        ("dpo", {"beta": 0.7}),
        ("dpo", {"label_smoothing": 0.1}),
        ("grpo", {"kl_weight": 0.5}),
        ("grpo", {"rewards": REWARDS}),
        ("grpo", {"temperature": 0.5, "group_size": 3}),
        ("draft", {"target": "other"}),
        ("sft", {"model": "tiny_llama"}),  # the same as there
    ],
)
def test_typed_values_win(kind, typed):
    found = taken(kind, **typed)
    assert not found.keys() & typed.keys()
    assert found.keys() | typed.keys() == taken(kind).keys()


@pytest.mark.parametrize(
    ("kind", "typed", "message"),
    [
        ("sft", {"model": "gpt2"}, "with model 'tiny_llama', and 'gpt2' is given"),
        ("sft", {"train": ["lm_head"]}, r"with train \[\], and \['lm_head'\] is given"),
        ("sft", {"init_seed": 7}, "with init_seed 1, and 7 is given"),
        ("dpo", {"model": "gpt2"}, "with model"),
        ("grpo", {"init_seed": 7}, "with init_seed"),
        ("draft", {"keep_layers": [0, 1]}, "with keep_layers"),
        ("vision", {"backbone": "vit_tiny_patch16_224"}, "with backbone 'test_vit'"),
        ("vision", {"num_classes": 11}, "with num_classes 10, and 11 is given"),
        ("vision", {"pretrained": True}, "with pretrained False, and True is given"),
        ("vision", {"image_size": 64}, "with image_size 32, and 64 is given"),
    ],
)
def test_what_cannot_go_with_the_weights_is_an_error(kind, typed, message):
    with pytest.raises(la.AdapterError, match=message):
        taken(kind, **typed)


def test_other_methods_without_a_record():
    path = FOLDER / "sft.ckpt"
    content = {key: value for key, value in read_checkpoint_file(path).items() if key != "lit_adapters"}
    typed = {"adapters": la.LoRA(rank=3).to_config()}
    with pytest.raises(la.AdapterError, match="was trained with DoRA and LoRAN, the model has LoRA"):
        arguments_of_checkpoint(CausalLMTuner, content, path, typed, typed)


def test_null_stands_for_a_seed_that_is_not_known_yet():
    assert taken("sft", init_seed=None)["init_seed"] == 1


def test_a_base_that_has_moved(tmp_path):
    """A path in place of one that is gone may be the same model; the run says that it is used."""
    path = FOLDER / "sft.ckpt"
    content = read_checkpoint_file(path)
    content["hyper_parameters"]["model"] = str(tmp_path / "gone")
    typed = {"model": str(tmp_path)}
    with pytest.warns(UserWarning, match="is used in its place, as it was given"):
        found = arguments_of_checkpoint(CausalLMTuner, content, path, typed, typed)
    assert "model" not in found


@pytest.mark.parametrize("name", ["model", "max_new_tokens"])
def test_in_python_a_trainer_refuses_a_checkpoint_of_another_base(name):
    path = FOLDER / "sft.ckpt"
    content = read_checkpoint_file(path)
    check_base(CausalLMTuner("tiny_llama"), content, path)
    content["hyper_parameters"][name] = "gpt2" if name == "model" else 3
    if name == "model":
        with pytest.raises(la.AdapterError, match="with model 'gpt2', and 'tiny_llama' is given"):
            check_base(CausalLMTuner("tiny_llama"), content, path)
    else:
        check_base(CausalLMTuner("tiny_llama"), content, path)


class Parsed(Exception):
    """Raised once the command line has been parsed."""


def parsed(monkeypatch, main, *arguments):
    """The section of a subcommand, as it would run and be saved."""
    used = {name: skip for name, skip in LightningCLI.subcommands().items() if name == arguments[0]}
    found = []

    def stop(cli):
        found.append(cli.config[arguments[0]])
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(LightningCLI, "subcommands", staticmethod(lambda: used))
        patch.setattr(AdapterCLI, "_set_seed", stop)
        patch.setattr("sys.argv", ["program"])
        with pytest.raises(Parsed):
            main(list(arguments))
    return found[0]


def test_the_command_line_of_grpo(monkeypatch):
    options = [f"--config={FOLDER}/grpo.yaml", f"--ckpt_path={FOLDER}/grpo.ckpt", "--model.kl_weight=0.5"]
    section = parsed(monkeypatch, grpo_main, "fit", *options, "--model.temperature=0.9", "--model.init_seed=null")
    assert (section.model.kl_weight, section.model.temperature) == (0.5, 0.9)
    assert (section.model.init_seed, section.model.clip_low) == (1, 0.2)  # of the checkpoint
    assert section.data.tokenizer == "tiny_llama"


def test_the_command_line_of_vision_takes_the_size_of_images_from_the_checkpoint(monkeypatch):
    section = parsed(monkeypatch, vision_main, "test", f"--ckpt_path={FOLDER}/vision.ckpt")
    assert (section.model.backbone, section.model.image_size, section.data.image_size) == ("test_vit", 32, 32)


@pytest.mark.parametrize("subcommand", ["test", "predict"])
def test_a_recipe_of_another_method_is_refused(monkeypatch, subcommand):
    options = [f"--config={FOLDER}/sft.yaml", f"--ckpt_path={FOLDER}/sft.ckpt"]
    with pytest.raises(la.AdapterError, match="was trained with DoRA and LoRAN, the model has LoRA"):
        parsed(monkeypatch, language_main, subcommand, *options, "--model.adapters=lit_adapters.LoRA")


class Own(torch.nn.Module):
    """The constructor of a user's own module."""

    def __init__(self, methods: la.Method = None, act: torch.nn.Module = None, anything=None) -> None:
        super().__init__()


def own(typed=(), **written):
    return arguments_of_checkpoint(Own, {"hyper_parameters": written}, Path("x.ckpt"), dict(typed), dict(typed))


def test_a_module_of_the_users_own():
    """Plain values, methods and null are taken; any other class must be typed."""
    form = la.LoRA(rank=2).to_config()
    assert own(methods=form, act=None, anything=[1]) == {"methods": form, "act": None, "anything": [1]}
    assert own(methods=None, _instantiator="lightning.pytorch.cli.instantiate_module") == {"methods": None}
    tanh = {"class_path": "torch.nn.Tanh"}
    assert own({"act": tanh}.items(), methods=None, act=tanh) == {"methods": None}
    for written in (
        {"act": tanh},
        {"act": "torch.nn.Tanh"},
        {"anything": "{class_path: torch.nn.Tanh}"},
        {"anything": ['"{\\x63lass_path: torch.nn.Tanh}"']},
    ):
        with pytest.raises(la.AdapterError, match=r"give (its|the) value yourself"):
            own(**written)
