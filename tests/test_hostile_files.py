"""What a file from elsewhere names is never imported, called or built, unless it is known already."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lit_adapters as la
from lit_adapters.cli.commands import main
from lit_adapters.files.saved import read_saved
from tests.learned.saved_adapters import NET, adapted_net, saved_net
from tests.lightning.tiny_task import Net

# Class paths that a file may hold in place of one of ours.
PATHS = [
    "planted.Evil",
    "planted",
    "planted.Evil.inner",
    "planted.sub.Evil",
    "planted:Evil",
    ".planted.Evil",
    "planted..Evil",
    "lit_adapters.planted.Evil",
    "vision.planted.Evil",
    "subprocess.Popen",
    "os.system",
    "builtins.exec",
    "builtins.eval",
    "importlib.import_module",
    "torch.hub.load",
    "torch.nn.Linear",
    "lit_adapters.class_paths.sys.modules",
    "lit_adapters.methods.method.Method",
    "lit_adapters.errors.AdapterError",
    "x" * 100_000,
    "\ud83d",
    "",
    None,
    3,
    ["planted.Evil"],
    {"class_path": "planted.Evil"},
]


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A working directory whose module leaves a trace when it is imported, and functions that must not be called."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "planted.py").write_text(f"open({str(folder / 'trace')!r}, 'w').close()\nclass Evil: pass\n")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))  # as `python -m` does
    called = []
    for owner, name in ((subprocess, "Popen"), (os, "system"), (torch.hub, "load")):
        monkeypatch.setattr(owner, name, lambda *args, **more: called.append(args))
    yield
    assert not called
    assert not (folder / "trace").exists()
    assert "planted" not in sys.modules


def edited_directory(folder, edit):
    """An adapter directory whose header `edit` has changed, without checksums, as version 0.1 wrote it."""
    file = folder / "lit_adapter.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["lit_adapter"])
    header.pop("checksums", None)
    header["base"].pop("fingerprint", None)
    edit(header)
    text = json.dumps(header)
    save_file(load_file(file), file, metadata={"lit_adapter": text})
    (folder / "lit_adapter.json").write_text(text)
    return folder


def forms(path):
    """Forms of methods that hold a hostile class path, at the top and inside."""
    evil = {"class_path": path, "init_args": {"args": "false"}}
    yield evil
    yield {"class_path": "lit_adapters.AFALoRA", "init_args": {"rank": 2, "schedule": evil}}
    yield {"class_path": "lit_adapters.NoRAPlusPlus", "init_args": {"nora": evil}}
    yield {"class_path": "lit_adapters.Peft", "init_args": {"config": evil}}
    yield {"class_path": "lit_adapters.Peft", "init_args": {"config": {"peft_type": path, "r": 2}}}


def refused(*arguments):
    """Whether a command ends with one error of ours."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return str(end.value.code).startswith("error: ") and len(str(end.value.code)) < 2000


@pytest.mark.parametrize("path", PATHS, ids=lambda path: repr(path)[:30])
def test_class_paths_in_an_adapter_directory(tmp_path, canary, path):
    saved_net(tmp_path / "adapter", la.LoRA(rank=2))
    net = Net()
    for form in forms(path):
        folder = edited_directory(tmp_path / "adapter", lambda header, form=form: header.update(methods=[form]))
        with pytest.raises(la.AdapterError):
            la.load_adapters(net, folder)
        assert not list(la.adapters(net))
        with pytest.raises(la.AdapterError):
            read_saved(folder)


@pytest.mark.parametrize("path", PATHS[:12], ids=repr)
def test_class_paths_in_an_adapter_directory_of_a_command(tmp_path, canary, path):
    saved_net(tmp_path / "adapter", la.LoRA(rank=2))
    form = {"class_path": path, "init_args": {"args": "false"}}
    folder = edited_directory(tmp_path / "adapter", lambda header: header.update(methods=[form]))
    assert refused("inspect", folder)
    assert refused("diff", folder, folder)
    assert refused("merge", folder, "--out", tmp_path / "out", "--base", NET)
    assert refused("export-peft", folder, "--out", tmp_path / "out", "--base", NET)


def test_megatron_of_peft_is_not_imported(canary):
    config = {"peft_type": "LORA", "target_modules": ["fc1"], "megatron_config": {"x": 1}}
    for core in ("megatron.planted", "planted"):
        with pytest.raises(la.AdapterError, match="megatron_config"):
            la.attach(
                Net(), {"class_path": "lit_adapters.Peft", "init_args": {"config": config | {"megatron_core": core}}}
            )


def test_a_method_of_the_users_own_package(run, tmp_path, monkeypatch):
    """It is known once it has been imported, by an option or by the program."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_methods", raising=False)
    (tmp_path / "own_methods.py").write_text("import lit_adapters as la\nclass Mine(la.LoRA): pass\n")
    saved_net(tmp_path / "adapter", la.LoRA(rank=2))
    edited_directory(tmp_path / "adapter", lambda header: header["methods"][0].update(class_path="own_methods.Mine"))
    assert refused("inspect", tmp_path / "adapter")
    assert "own_methods" not in sys.modules
    assert "blocks.0.fc1" in run("inspect", tmp_path / "adapter", "--import", "own_methods")
    la.load_adapters(Net(), tmp_path / "adapter")
    monkeypatch.delitem(sys.modules, "own_methods")
    assert refused("inspect", tmp_path / "adapter", "--import", "nowhere_at_all")


def test_the_working_directory_is_not_searched_for_a_files_sake(tmp_path, monkeypatch):
    """What the user typed may be there; where Python finds it elsewhere, the path stays as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    before = list(sys.path)
    la.save_adapters(adapted_net(la.LoRA(rank=2)), tmp_path / "adapter")
    main(["inspect", str(tmp_path / "adapter"), "--import", "json"])
    main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--base", NET])
    assert sys.path == before
