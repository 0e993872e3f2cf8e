"""`lit-adapters estimate`: what it says of recipes, without weights, data or files of its own."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from language.module import CausalLMTuner
from lit_adapters.cli.commands import main
from lit_adapters.cli.estimate import _number
from lit_adapters.errors import AdapterError

CONFIGS = Path(__file__).parents[2] / "configs"
SMOKE = [str(path) for path in sorted(CONFIGS.glob("*/smoke/*.yaml"))]
VISION, LANGUAGE = "configs/vision/smoke/lora.yaml", "configs/language/smoke/lora.yaml"
QLORA = "configs/language/smoke/qlora.yaml"
GPU = ("--device", "l40s")
SHARDED = ("--strategy", "fsdp", "--devices", "2")


@pytest.fixture
def estimate(capsys):
    def command(*arguments):
        main(["estimate", *map(str, arguments)])
        return capsys.readouterr().out

    return command


def total(printed):
    return float(re.search(r"in all +([\d,.]+)", printed)[1].replace(",", ""))


@pytest.mark.parametrize(
    ("recipe", "unit"), [(VISION, "images"), pytest.param(LANGUAGE, "tokens", marks=pytest.mark.slow)]
)
def test_it_says_what_fits(estimate, recipe, unit):
    before, level = set(os.listdir()), logging.getLogger("lightning.pytorch").level
    data = "data.root=/nowhere" if recipe == VISION else "data.path=/nowhere.jsonl"
    printed = estimate("--config", recipe, *GPU, data)
    assert "weights" in printed
    assert "time on L40S: at least" in printed
    assert f"{unit} a second" in printed
    assert "fits 44.4 GiB: yes" in printed
    assert set(os.listdir()) == before
    assert logging.getLogger("lightning.pytorch").level == level
    more = estimate("--config", recipe, *GPU, "data.batch_size=64")
    assert total(more) > total(printed)


@pytest.mark.slow
def test_it_says_what_to_change(estimate):
    printed = estimate("--config", LANGUAGE, *GPU, "--device-memory", "12MiB", "--devices", 4)
    assert "fits 12.0 MiB: no; a batch of" in printed
    for change in ("gradient_checkpointing=true", "dtype=bfloat16"):
        assert change in printed
    assert "buckets of gradients" not in estimate("--config", LANGUAGE, *GPU)
    assert "sending" in printed


@pytest.mark.slow
def test_accumulated_batches_take_time_and_the_memory_of_gradients(estimate):
    # With many images the peak is in the backward pass, where further batches find the gradients of the first.
    settings = ["--config", "configs/vision/smoke/full.yaml", *GPU, "data.batch_size=64"]
    one, four = (estimate(*settings, f"trainer.accumulate_grad_batches={n}") for n in (1, 4))
    assert total(one) < total(four) < 1.5 * total(one)
    assert "a step of 64 images" in one
    assert "a step of 256 images" in four


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "share"), [("configs/vision/smoke/full.yaml", 3), (LANGUAGE, 0.7), (LANGUAGE, 3)])
def test_the_batch_that_it_names_fits_and_a_larger_one_does_not(estimate, recipe, share):
    memory = total(estimate("--config", recipe, *GPU)) * share
    said = estimate("--config", recipe, *GPU, "--device-memory", f"{memory}Mi")
    rows = int(re.search(r"(?:a batch of|with at least) ([\d,]+) rows", said)[1].replace(",", ""))
    found = [total(estimate("--config", recipe, *GPU, f"data.batch_size={n}")) for n in (rows, 2 * rows)]
    assert found[0] <= memory * 1.01  # as printed
    assert found[1] > memory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "precision"), [(VISION, "bf16-true"), (LANGUAGE, "bf16-true"), (LANGUAGE, "bf16-mixed")]
)
def test_halves_take_less(estimate, recipe, precision):
    assert total(estimate("--config", recipe, *GPU, f"trainer.precision={precision}")) < total(
        estimate("--config", recipe, *GPU)
    )


@pytest.mark.slow
def test_the_installed_command_finds_the_applications_of_the_checkout(tmp_path):
    """A console script does not have the working directory on its path."""
    (tmp_path / "lit_adapters").symlink_to(CONFIGS.parent / "lit_adapters")
    code = "from lit_adapters.cli import main; main()"
    # AFA-LoRA warns at the end of a process that has not trained to the end, and here nothing was trained.
    command = [sys.executable, "-P", "-c", code, "estimate", "--config", "configs/vision/smoke/afa.yaml", *GPU]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=CONFIGS.parent, env=environment, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    assert "fits 44.4 GiB: yes" in run.stdout
    assert "Exception ignored" not in run.stderr
    assert "nonlinear" not in run.stderr


@pytest.mark.slow
def test_this_machine_is_measured(estimate):
    printed = estimate("--config", VISION)
    assert re.search(r"time on this CPU, \d+ threads: about ", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml"], "'nowhere.yaml'"),
        (["--config", "configs/studies/smoke.yaml"], "has no section model"),
        (["--config", VISION, "--devices", "0"], "--devices 0 must be at least 1"),
        (["--config", VISION, "--device", "h900"], "'h900' is unknown: use cpu, a100-40gb"),
        (["--config", VISION, "--device-memory", "lots"], "'lots' must be a number above 0"),
        (["--config", VISION, "--device-memory", "1e400"], "'1e400' must be a number above 0"),
        (["--config", VISION, "help"], "setting 'help' must be KEY=VALUE"),
        (["--config", VISION, "trainer.devices=8"], "'trainer.devices=8' does not count here"),
        (["--config", VISION, "trainer.precision=64-true"], "precision '64-true' is not estimated"),
        (["--config", VISION, "trainer.accumulate_grad_batches=0"], "accumulate_grad_batches"),
        (["--config", LANGUAGE, "data.max_length=100000"], "data.max_length 100000 exceeds the model's"),
        (["--config", "configs/language/smoke/grpo.yaml", "data.max_length=2048"], "which max_new_tokens takes 8: set"),
        (["--config", QLORA, "--strategy", "fsdp", "--devices", "2"], "4-bit weights cannot be shared"),
        (
            ["--config", LANGUAGE.replace("lora", "lora_rite"), *SHARDED],
            "LoRARITE needs whole matrices: use the",
        ),
        pytest.param(
            ["--config", LANGUAGE.replace("lora", "lora_pre"), *SHARDED],
            "LoRAPre needs whole matrices: use the",
            marks=pytest.mark.slow,
        ),
        (["--config", LANGUAGE.replace("lora", "eva"), *SHARDED], "start='eva' needs whole matrices: calibrate before"),
        pytest.param(
            ["--config", VISION.replace("lora", "nested_lora"), *SHARDED],
            "init='awsvd' needs whole weights: calibrate",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--config", VISION.replace("lora", "adalora"), *SHARDED],
            "AdaLoRA's ranks cannot be allocated with FSDP2",
            marks=pytest.mark.slow,
        ),
        (["--config", LANGUAGE.replace("lora", "grpo"), *SHARDED], "a model that samples cannot be sharded"),
        pytest.param(
            ["--config", LANGUAGE.replace("lora", "draft"), *SHARDED],
            "a draft and its target cannot be sharded",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--config", LANGUAGE.replace("lora", "dpo"), *SHARDED, "model.train=[lm_head]"],
            "needs its initial values",
            marks=pytest.mark.slow,
        ),
        (["--config", VISION, "data.batch_sze=3"], "data.batch_sze.*read as a recipe of vision"),
        (["--config", VISION, "--program", "nothing_such"], "No module named 'nothing_such'"),
    ],
)
def test_wrong_inputs_are_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message) as ended:
        main(["estimate", *arguments])
    assert len(str(ended.value).strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["training_step", "_losses", "made_up_loss"])
def test_a_step_of_its_own_needs_a_made_up_loss(name):
    tuner = type("Own", (CausalLMTuner,), {name: lambda self, *arguments: None})(model="tiny_llama")
    with pytest.raises(AdapterError, match="Own has its own training step or made_up_loss and not both"):
        tuner.training_example(None)


@pytest.mark.parametrize(
    ("text", "value"),
    [("80GiB", 80 * 2**30), ("864GB", 864e9), ("362T", 362e12), ("3.2e12", 3.2e12), ("1.5 GB/s", 1.5e9), ("7", 7)],
)
def test_numbers_have_units(text, value):
    assert _number("--x", text) == value


@pytest.mark.parametrize("text", ["", "GiB", "-3", "1.2.3GB", "0", "5 apples", "nan"])
def test_what_is_no_number(text):
    with pytest.raises(AdapterError, match="must be a number above 0"):
        _number("--x", text)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SMOKE, ids=lambda path: "-".join(Path(path).parts[-3::2]))
def test_every_smoke_recipe(estimate, recipe):
    assert "fits 44.4 GiB: yes" in estimate("--config", recipe, *GPU)
