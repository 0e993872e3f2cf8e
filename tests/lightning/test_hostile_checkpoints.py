"""Hyperparameters of a hostile checkpoint build, import and call nothing, on any route, and end in one error."""

from __future__ import annotations

import builtins
import importlib
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import lit_adapters as la
from language.dpo import DPOTuner
from language.draft import DraftTuner
from language.evaluate.run import load
from language.grpo import GRPOTuner
from language.module import CausalLMTuner, load_tuner
from lit_adapters.cli.commands import main
from lit_adapters.files.adapters import read_checkpoint_file
from lit_adapters.lightning.checkpoint_arguments import arguments_of_checkpoint
from tests.tiers import fast_only
from vision import ViTClassifier

FOLDER = Path(__file__).parents[1] / "fixtures" / "version_0_1"
CLASSES = {"sft": CausalLMTuner, "dpo": DPOTuner, "grpo": GRPOTuner, "draft": DraftTuner, "vision": ViTClassifier}
EVIL = {"class_path": "subprocess.Popen", "init_args": {"args": "false"}}
PLANTED = {"class_path": "planted.Evil"}
LORA = {"class_path": "lit_adapters.LoRA", "init_args": {"rank": 2}}
DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]


def peft(**config):
    return {"class_path": "lit_adapters.Peft", "init_args": {"config": {"peft_type": "LORA", **config}}}


# What stands in place of any hyperparameter, or under a name of its own.
VALUES = [
    EVIL,
    PLANTED,
    [EVIL],
    {"x": [EVIL]},
    {"class_path": "os.system", "init_args": {"command": "false"}},
    {"class_path": "builtins.exec", "init_args": {"source": "1"}},
    {"class_path": "importlib.import_module", "init_args": {"name": "planted"}},
    {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "x", "model": "y"}},
    {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}},
    {"class_path": None},
    {"class_path": "lit_adapters.LoRA", "init_args": {"rank": 2, "targets": EVIL}},
    torch._utils._rebuild_tensor_v2,  # a function that weights_only lets through
    DEEP,
]
ADAPTERS = [
    "planted.Evil",
    "planted.yaml",
    ["planted.Evil"],
    "{class_path: subprocess.Popen, init_args: {args: 'false'}}",
    [LORA, PLANTED],
    {"class_path": "lit_adapters.Peft", "init_args": {"config": EVIL}},
    {"class_path": "lit_adapters.Peft", "init_args": {"config": "{class_path: planted.Evil}"}},
    peft(rank_pattern=EVIL),
    peft(target_modules=PLANTED),
    peft(megatron_config={"x": 1}, megatron_core="planted"),
    {"class_path": "lit_adapters.AFALoRA", "init_args": {"schedule": EVIL}},
    {"class_path": "lit_adapters.AFALoRA", "init_args": {"schedule": "planted.Evil"}},
    {"class_path": "lit_adapters.NoRAPlusPlus", "init_args": {"nora": PLANTED}},
    {"class_path": "lit_adapters.NoRAPlusPlus", "init_args": {"nora": "planted.Evil"}},
    {"class_path": "lit_adapters.schedules.Linear"},
    {"class_path": "lit_adapters.LoRA", "init_args": "planted.yaml"},
    {"class_path": "lit_adapters.LoRA", "init_args": {"rnak": 2}},
    {"class_path": "lit_adapters.AdapterCallback"},
    {"class_path": "vision.module.ViTClassifier"},
    3,
]
REWARDS = [
    *({"function": name} for name in ("planted.reward", "os.system", "builtins.exec", "subprocess.call")),
    *({"function": name} for name in ("importlib.import_module", "torch.hub.load", "shutil.rmtree", "os.rename")),
    *({"function": name} for name in ("language.grpo.rewards.final_number", "language.grpo.rewards.re.sub")),
    {"function": EVIL},
    {"function": "language.grpo.rewards.brevity", "weight": EVIL},
    {"function": "language.grpo.rewards.brevity", "more": 1},
    {"weight": 1.0},
    "planted.reward",
    "planted.yaml",
    EVIL,
]
NAMES = ["unknown", "config", "cfg", "__default_config__", "__path__", "class_path", "dict_kwargs", "model.adapters"]
WHOLE = [
    {"hyper_parameters": [EVIL]},
    {"hyper_parameters": "planted.yaml"},
    {"hyper_parameters": {1: 2}},
    {"hparams": {"adapters": [PLANTED]}},
    {"module_arguments": {"adapters": [PLANTED]}},
    {"hparams_name": "adapters"},
    {"hparams_type": "planted.Evil"},
    {"hparams_type": torch._utils._rebuild_tensor_v2},
]


def cases(kind):
    """Edits of the top of a checkpoint of a class, each with a hostile value."""
    own = read_checkpoint_file(FOLDER / f"{kind}.ckpt")["hyper_parameters"]
    for name in own:
        yield from ({"hyper_parameters": {**own, name: value}} for value in VALUES)
    for name in NAMES:
        yield {"hyper_parameters": {**own, name: EVIL}}
    for name in ("_instantiator", "_class_path"):
        for value in ("lightning.pytorch.cli.instantiate_module", "planted.Evil", EVIL):
            yield {"hyper_parameters": {**own, name: value}}
    yield from ({"hyper_parameters": {**own, "adapters": value}} for value in ADAPTERS)
    if "rewards" in own:
        yield from ({"hyper_parameters": {**own, "rewards": [value]}} for value in REWARDS)
    yield from WHOLE


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module in the working directory that leaves a trace, and functions that no file may have called."""
    folder = tmp_path / "here"
    folder.mkdir()
    trace = f"open({str(folder / 'trace')!r}, 'w').close()\n"
    (folder / "planted.py").write_text(trace + "class Evil: pass\ndef reward(completion, answer): return 1.0\n")
    (folder / "planted.yaml").write_text("class_path: planted.Evil\n")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    called = []
    real = importlib.import_module

    def watched(name, *rest):
        if "planted" in name:
            called.append(name)
        return real(name, *rest)

    for owner, name in ((subprocess, "Popen"), (os, "system"), (torch.hub, "load")):
        monkeypatch.setattr(owner, name, lambda *args, **more: called.append(args))
    monkeypatch.setattr(importlib, "import_module", watched)
    yield folder
    assert not called
    assert not (folder / "trace").exists()
    assert "planted" not in sys.modules


@pytest.mark.parametrize("kind", fast_only(["sft", "vision"], CLASSES))
def test_hostile_hyperparameters(tmp_path, canary, kind):
    """In Python and on the command line, before a module is built; the state is left out, as nothing gets that far."""
    content = read_checkpoint_file(FOLDER / f"{kind}.ckpt") | {"state_dict": {}, "callbacks": {}, "lit_adapters": {}}
    cls, path, tried = CLASSES[kind], tmp_path / "x.ckpt", 0
    for tried, edit in enumerate(cases(kind), 1):
        edited = content | edit
        with pytest.raises(la.AdapterError):
            arguments_of_checkpoint(cls, edited, path, {}, {})
        if tried % 25 == 0:
            torch.save(edited, path)
            with pytest.raises(la.AdapterError):
                cls.load_from_checkpoint(path)
    assert tried > 100


@pytest.mark.parametrize("kind", CLASSES)
def test_valid_hyperparameters(kind):
    path = FOLDER / f"{kind}.ckpt"
    content = read_checkpoint_file(path)
    found = arguments_of_checkpoint(CLASSES[kind], content, path, {}, {})
    assert found.keys() == content["hyper_parameters"].keys()


def test_other_routes(tmp_path, canary):
    """The commands and functions that load a checkpoint."""
    content = read_checkpoint_file(FOLDER / "sft.ckpt")
    path = tmp_path / "x.ckpt"
    for value in (EVIL, [PLANTED], ADAPTERS[5]):
        torch.save(content | {"hyper_parameters": content["hyper_parameters"] | {"adapters": value}}, path)
        for load_it in (
            lambda: load_tuner(path, CausalLMTuner, "language"),
            lambda: load(None, ckpt=str(path)),
            lambda: CausalLMTuner.load_from_checkpoint(path.open("rb")),
            lambda: CausalLMTuner.load_from_checkpoint(path, weights_only=True, max_new_tokens=3),
        ):
            with pytest.raises(la.AdapterError, match="adapters"):
                load_it()
        with pytest.raises(SystemExit, match=r"^error: .*adapters"):
            main(["merge", str(path), "--out", str(tmp_path / "out")])


def test_the_record_names_nothing_that_is_imported(tmp_path, canary):
    content = read_checkpoint_file(FOLDER / "sft.ckpt")
    path = tmp_path / "x.ckpt"
    names = ["planted.Evil", "planted", "subprocess.Popen", "os.system", "torch.hub.load", "builtins.exec"]
    for name in [*names, "language.planted.Evil", "vision.planted.Evil", "language.module.os.system", "x" * 10_000]:
        torch.save(content | {"lit_adapters": content["lit_adapters"] | {"module": name}}, path)
        with pytest.raises(SystemExit, match=r"^error: ") as end:
            main(["merge", str(path), "--out", str(tmp_path / "out")])
        assert len(end.value.code) < 1000


def test_a_pickle_does_not_run(tmp_path, canary):
    class Evil:
        def __reduce__(self):
            return builtins.exec, ("import planted",)

    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"model": Evil()}}, path)
    again = tmp_path / "y.ckpt"
    again.write_bytes(pickle.dumps(Evil()))
    with zipfile.ZipFile(tmp_path / "z.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
    for file in (path, again, tmp_path / "z.ckpt"):
        with pytest.raises(la.AdapterError):
            CausalLMTuner.load_from_checkpoint(file)
        with pytest.raises(la.AdapterError):
            CausalLMTuner.load_from_checkpoint(file.open("rb"))


def test_what_the_user_gives_in_python_is_used_in_place_of_the_files():
    path = FOLDER / "grpo.ckpt"
    tuner = GRPOTuner.load_from_checkpoint(path, rewards=[{"function": "language.grpo.rewards.number_only"}])
    assert tuner.rewards.names == ["number_only"]


def test_a_reward_of_the_users_own_must_have_been_imported(tmp_path, monkeypatch):
    content = read_checkpoint_file(FOLDER / "grpo.ckpt")
    terms = [{"function": "own_rewards.short", "weight": 1.0}]
    torch.save(content | {"hyper_parameters": content["hyper_parameters"] | {"rewards": terms}}, tmp_path / "x.ckpt")
    (tmp_path / "own_rewards.py").write_text("def short(completion, answer): return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(la.AdapterError, match=r"reward function 'own_rewards\.short'"):
        GRPOTuner.load_from_checkpoint(tmp_path / "x.ckpt")
    importlib.import_module("own_rewards")
    assert GRPOTuner.load_from_checkpoint(tmp_path / "x.ckpt").rewards.names == ["short"]
    monkeypatch.delitem(sys.modules, "own_rewards")
