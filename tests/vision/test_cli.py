"""Bad input to `python -m vision` ends with one line that names it, before any training time is spent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lit_adapters import AdapterError
from lit_adapters.lightning.cli import run
from tests.vision.smoke import CONFIGS, QUIET, checkpoint, command, quick_main
from vision.__main__ import main

NORA = str(CONFIGS / "smoke/nora.yaml")
LORA = str(CONFIGS / "smoke/lora.yaml")


def error_line(arguments) -> str:
    """What `run(main)` would print before it exits with status 1."""
    with pytest.raises(SystemExit) as end:
        run(lambda: quick_main([*arguments, *QUIET, "--trainer.fast_dev_run=true"]))
    assert isinstance(end.value.code, str)  # Python prints a string and exits with 1
    assert end.value.code.startswith("error: ")
    assert "\n" not in end.value.code
    return end.value.code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.adapters.targets=[blokcs]"], ["targets ['blokcs'] match no module", "Near misses: blocks"]),
        (["--model.adapters.groups=5"], ["5 groups do not divide the 192 channels of 'blocks.0.mlp.act'", "divisors"]),
        (["--model.adapters.groups=0"], ["groups 0 must be a whole number, at least 1"]),
        (["--model.adapters.grups=4"], ["model.adapters", "'grups' is not accepted", "--help"]),
        (["--model.adapters=lit_adapters.Nora"], ["lit_adapters.Nora"]),
        (["--model.train=[haed]"], ["train=['haed'] matches no parameter"]),
        (["--model.backbone=test_vitt"], ["no backbone 'test_vitt'", "did you mean test_vit"]),
        (["--model.num_classes=7"], ["the data have 10 classes, the model 7", "set model.num_classes to 10"]),
        (["--data.source=folder", "--data.root=nowhere"], ["root nowhere does not exist", "source=folder"]),
        (["--data.image_size=40"], ["image_size 40 is not a multiple of the patch size 16", "use 32 or 48"]),
        (["--data.train_subset=1000"], ["train_subset=1000 needs", "lower it"]),
        (["--data.sourse=random"], ["data.sourse", "--help"]),
        (["--optimizer.lr=fast"], ["optimizer", '"lr"', "fast"]),
        (["--optimizer.lr=-1"], ["lr -1.0 must be a finite number above 0", "init_args"]),
        (["--optimizer=null"], ["no optimiser: add an `optimizer:` section"]),
        (["--lr_scale.lorra=2"], ["lr_scale names 'lorra'", "head, nora"]),
        (["--trainer.max_epochs=many"], ["trainer.max_epochs", "many"]),
        (["--config=nowhere.yaml"], ["nowhere.yaml"]),
        (["--ckpt_path=nowhere.ckpt"], ["'nowhere.ckpt' does not exist"]),
    ],
)
def test_bad_arguments(arguments, words):
    line = error_line(["fit", f"--config={NORA}", *arguments])
    assert [word for word in words if word not in line] == [], line


def test_annealing_without_a_callback():
    line = error_line(["fit", f"--config={CONFIGS / 'smoke/afa.yaml'}", "--trainer.callbacks=null"])
    assert "AFALoRA is annealed and the recipe has nothing that does it: add `- class_path: lit_adapters.Adapt" in line


def test_a_rank_too_large():
    line = error_line(["fit", f"--config={LORA}", "--model.adapters.rank=1000"])
    assert "rank 1000 exceeds the size of 'blocks.0.attn.qkv' (192 x 64)" in line


def test_no_subcommand_and_an_unknown_one():
    with pytest.raises(AdapterError, match="subcommand"):
        main([])
    with pytest.raises(AdapterError, match="fitt"):
        main(["fitt"])


@pytest.mark.parametrize("section", ["data", "model", "trainer"])
def test_a_misspelt_key_in_the_file(tmp_path, section):
    content = yaml.safe_load(Path(NORA).read_text())
    content[section]["mispelt"] = 1
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(content))
    assert f"{section}.mispelt" in error_line(["fit", f"--config={tmp_path / 'bad.yaml'}"])


def test_a_file_that_is_no_yaml(tmp_path):
    (tmp_path / "bad.yaml").write_text("model: [")
    assert "line 2, column 1" in error_line(["fit", f"--config={tmp_path / 'bad.yaml'}"])


def test_a_torn_checkpoint(tmp_path):
    torch.save({"state_dict": {"x": torch.zeros(1000)}}, tmp_path / "torn.ckpt")
    with open(tmp_path / "torn.ckpt", "rb+") as file:
        file.truncate(1000)
    line = error_line(["test", f"--config={NORA}", f"--ckpt_path={tmp_path / 'torn.ckpt'}"])
    assert "torn.ckpt' is torn" in line


def test_a_checkpoint_of_other_adapters(tmp_path):
    path = checkpoint(command("fit", "smoke/lora", tmp_path))
    line = error_line(["fit", f"--config={LORA}", "--model.adapters.rank=3", f"--ckpt_path={path}"])
    assert line.endswith(
        "was trained with LoRA(rank=2), the model has LoRA(rank=3); resume with the settings it was trained with"
    )
    content = torch.load(path, weights_only=True)
    content["lit_adapters"]["module"] = "language.module.CausalLMTuner"
    torch.save(content, path)
    line = error_line(["fit", f"--config={LORA}", f"--ckpt_path={path}"])
    assert "is a checkpoint of language.module.CausalLMTuner, the model is a vision.module.ViTClassifier" in line
    del content["lit_adapters"]
    torch.save(content, path)
    assert "was not written by a run with" in error_line(["fit", f"--config={LORA}", f"--ckpt_path={path}"])


def test_help_is_still_there(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "--lr_scale" in shown
    assert "any other key is a regular expression" in " ".join(shown.lower().split())
    assert "--model.adapters" in shown
    assert "total_steps" not in shown


@pytest.mark.slow
def test_the_process_says_it_on_stderr_and_nothing_else():
    """One real process: no traceback, no usage text, no advertisement, a status that scripts see."""
    process = subprocess.run(
        [sys.executable, "-m", "vision", "fit", f"--config={NORA}", "--model.adapters.groups=5"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CONFIGS.parents[1])},
    )
    assert process.returncode == 1
    *chatter, last = process.stderr.strip().split("\n")
    assert last.startswith("error: 5 groups do not divide the 192 channels")
    assert process.stdout == ""
    assert [line.split(":")[0] for line in chatter] == ["Seed set to 0", "GPU available", "TPU available"]
