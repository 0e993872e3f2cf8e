"""`python -m language.grpo` and its recipes: they run, what they write is found again, bad input ends with one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import yaml

from language.cli import LanguageCLI
from language.grpo.__main__ import main
from language.grpo.module import GRPOTuner
from lit_adapters.lightning.cli import run
from tests.language.grpo.rewarding import QUESTIONS
from tests.language.tiny import CONFIGS, QUIET, batch, events, log_dir


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch, tmp_path):
    """LightningCLI warns when it is given arguments and the process has some too; what is written is temporary."""
    monkeypatch.setattr("sys.argv", ["language.grpo"])
    monkeypatch.chdir(tmp_path)


def command(subcommand, config, root, *overrides):
    used = {name: skip for name, skip in LanguageCLI.subcommands().items() if name == subcommand}
    save = f"--trainer.logger.init_args.save_dir={root}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageCLI, "subcommands", staticmethod(lambda: used))
        return main([subcommand, f"--config={CONFIGS / config}.yaml", save, *QUIET, *overrides])


@pytest.mark.slow
def test_the_smoke_recipe_fits_and_is_tested(tmp_path):
    path = f"--data.path={QUESTIONS}"
    fitted = command("fit", "smoke/grpo", tmp_path, path)
    assert fitted.trainer.global_step == 4
    assert fitted.datamodule.iterations == fitted.model.hparams["iterations"] == 2
    scalars = set(events(log_dir(fitted)).Tags()["scalars"])
    assert {"train/reward", "train/exact_number", "train/kl", "val/reward", "adapter/beta"} <= scalars
    checkpoint = log_dir(fitted) / "checkpoints" / "last.ckpt"
    with torch.no_grad():
        loaded, rows = GRPOTuner.load_from_checkpoint(checkpoint).eval(), batch(9, 14)
        assert torch.equal(loaded(rows), fitted.model.eval()(rows))
    tested = command("test", "smoke/grpo", tmp_path, path, f"--ckpt_path={checkpoint}")
    assert set(tested.trainer.callback_metrics) == {
        f"test/{name}" for name in ("reward", "exact_number", "marked_number", "brevity")
    }
    rows = [json.loads(line) for line in (log_dir(tested) / "answers.jsonl").read_text().splitlines()]
    examples = tested.datamodule.examples("test")
    assert [(row["prompt"], row["answer"]) for row in rows] == [(e.prompt, e.response) for e in examples]
    assert rows[0].keys() == {"prompt", "answer", "completion", "reward"}
    rewards = tested.model.rewards([row["completion"] for row in rows], [row["answer"] for row in rows])
    assert [row["reward"] for row in rows] == pytest.approx((rewards @ tested.model.rewards.weights).tolist())
    mean = sum(row["reward"] for row in rows) / len(rows)
    assert tested.trainer.callback_metrics["test/reward"].item() == pytest.approx(mean)


@pytest.mark.parametrize("folder", ["smollm2", "llama3_8b"])
def test_other_recipes_run_on_the_tiny_model(tmp_path, folder):
    changes = ["--model.model=tiny_llama", "--model.adapters.rank=4", "--model.max_new_tokens=4"]
    changes += ["--data.max_length=400", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]
    if folder == "llama3_8b":
        changes += [f"--data.path={QUESTIONS}", "--data.val_fraction=0.2"]
    cli = command("fit", f"{folder}/grpo", tmp_path, *changes)
    assert cli.trainer.global_step == 1
    assert "val/reward" in cli.trainer.callback_metrics
    assert cli.trainer.lr_scheduler_configs[0].scheduler.total_steps == 1
    sections = [yaml.safe_load((CONFIGS / folder / f"{name}.yaml").read_text())["model"] for name in ("grpo", "afa")]
    assert sections[0]["adapters"] == sections[1]["adapters"]  # which finds its targets, as tested there


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.rewards=[{function: nowhere.reward}]"], "no reward function 'nowhere.reward'"),
        (["--model.group_size=1"], "group_size 1 must be a whole number, at least 2"),
        (["--data.path=arithmetic:x"], "data arithmetic:x: give the largest number"),
        (["--trainer.accumulate_grad_batches=2"], "set one of them to 1"),
        (["--model.max_new_tokens=400"], "exceed the model's 512 positions"),
    ],
)
def test_bad_arguments(tmp_path, arguments, words):
    path = [] if "data.path" in arguments[0] else [f"--data.path={QUESTIONS}"]
    with pytest.raises(SystemExit) as end:
        run(lambda: command("fit", "smoke/grpo", tmp_path, *path, *arguments))
    assert str(end.value.code).startswith("error: ")
    assert words in str(end.value.code)
    assert "\n" not in str(end.value.code)


@pytest.mark.slow
def test_a_real_process(tmp_path):
    """Checkpoints name the class by its module, whoever started it."""
    line = ["-m", "language.grpo", "fit", f"--config={CONFIGS / 'smoke/grpo.yaml'}", *QUIET]
    line += [f"--trainer.logger.init_args.save_dir={tmp_path}"]
    subprocess.run([sys.executable, *line], check=True, cwd=CONFIGS.parents[1])
    (path,) = tmp_path.rglob("last.ckpt")
    written = torch.load(path, weights_only=True)["lit_adapters"]["module"]
    assert written == "language.grpo.GRPOTuner"
