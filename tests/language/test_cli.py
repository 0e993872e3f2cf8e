"""`python -m language`: bad input ends with one line that names it, before any training time; `generate` answers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import lit_adapters as la
from language.__main__ import main
from language.models import create_tokenizer
from language.prompt import prompt_tokens
from lit_adapters.lightning.cli import run
from tests.language.tiny import CONFIGS, QUIET, ROWS, built, data, moved, quick_main, trainer

LORA = str(CONFIGS / "smoke/lora.yaml")


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch, tmp_path):
    """LightningCLI warns when it is given arguments and the process has some too; what is written is temporary."""
    monkeypatch.setattr("sys.argv", ["language"])
    monkeypatch.chdir(tmp_path)


def error_line(arguments) -> str:
    """What `run(main)` would print before it exits with status 1."""
    with pytest.raises(SystemExit) as end:
        run(lambda: quick_main(arguments))
    assert isinstance(end.value.code, str)  # Python prints a string and exits with 1
    assert end.value.code.startswith("error: ")
    assert "\n" not in end.value.code
    return end.value.code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.adapters.targets=[q_porj]"], ["targets ['q_porj'] match no module", "Near misses", "q_proj"]),
        (["--model.adapters=lit_adapters.NoRA", "--model.adapters.groups=5"], ["5 groups do not divide"]),
        (["--model.model=nowhere.gguf"], ["no model file 'nowhere.gguf'"]),
        (["--model.quantization=int3"], ["model.quantization", "int3"]),
        (["--model.quantization=nf4", "--model.train=.*"], ["uint8, which cannot train"]),
        (["--data.path=nowhere.jsonl"], ["nowhere.jsonl does not exist"]),
        (["--data.max_length=1000"], ["data.max_length 1000 exceeds the model's 512 positions: set it to 512"]),
        (["--data.tokenizer=other"], ["data.tokenizer"]),
    ],
)
def test_bad_arguments(arguments, words):
    common = [f"--data.path={ROWS}", *QUIET, "--trainer.fast_dev_run=true"]
    line = error_line(["fit", f"--config={LORA}", *common, *arguments])
    assert [word for word in words if word not in line] == [], line


def test_a_bad_row_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    line = error_line(["fit", f"--config={LORA}", "--data.path=bad.jsonl", *QUIET])
    assert "bad.jsonl line 2: field 'output' is missing" in line


# generate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    module = moved(built(adapters=la.LoRAN(rank=2)))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 1e-9)
    trainer(folder).fit(module, datamodule=data(train_subset=4))
    return folder / "last.ckpt", module


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generate_answers(checkpoint, capsys, temperature):
    path, module = checkpoint
    arguments = [f"--ckpt={path}", "--prompt", "Say it", "--max_new_tokens=7", f"--temperature={temperature}"]
    text = main(["generate", *arguments, "--device=cpu"])
    assert capsys.readouterr().out == f"{text}\n"
    assert main(["generate", *arguments, "--device=cpu"]) == text
    assert (main(["generate", *arguments, "--device=cpu", "--seed=1"]) == text) == (temperature == 0)
    row = {"input_ids": torch.tensor([list(module.tokenizer("Say it")["input_ids"])])}
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    module.hparams["max_new_tokens"] = 7
    assert (module.eval().predict_step(row, 0) == [text]) == (temperature == 0)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(("name", "field"), [("alpaca", "instruction"), ("openorca", "question"), ("pairs", "prompt")])
def test_prompts_are_framed_as_in_training(tmp_path, name, field, chat):
    answer = {"alpaca": "output", "openorca": "response", "pairs": "response"}[name]
    (tmp_path / "row.jsonl").write_text(f'{{"{field}": "Say it", "{answer}": "it"}}\n' * 2)
    given = data(path="row.jsonl", format=name, use_chat_template=chat, prompt_template=None, max_length=400)
    given.val_fraction = 0.0
    given.setup("fit")
    row = next(iter(given.train_dataloader()))
    trained = row["input_ids"][0][: (row["labels"][0] == -100).cumprod(0).sum()].tolist()
    assert prompt_tokens(create_tokenizer("tiny_llama"), "Say it", name, chat, 400) == trained
    with pytest.raises(la.DataError, match="--prompt: the prompt has"):
        prompt_tokens(create_tokenizer("tiny_llama"), "Say it", name, chat, 4)


def test_a_conversation_and_a_bare_prompt():
    tokenizer = create_tokenizer("tiny_llama")
    expected = tokenizer("<s>user\nhi</s>\n<s>assistant\n")["input_ids"]
    assert prompt_tokens(tokenizer, "hi", "chat", False, 400) == expected
    assert prompt_tokens(tokenizer, "hi", None, True, 400) == expected
    assert prompt_tokens(tokenizer, "hi", None, False, 400) == tokenizer("hi")["input_ids"]


def test_generate_says_what_is_wrong(checkpoint, tmp_path):
    path, _ = checkpoint
    (tmp_path / "torn.ckpt").write_bytes(path.read_bytes()[:500])
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    for arguments, words in [
        (["--prompt=x"], "the following arguments are required: ckpt (python -m language generate --help"),
        ([f"--ckpt={path}", "--prompt=x", "--temprature=1"], "unrecognized arguments: --temprature=1"),
        ([f"--ckpt={path}", "--prompt=x", "--temperature=hot"], "Expected a <class 'float'>. Got value: hot"),
        ([f"--ckpt={path}", "--prompt=x", "--format=poetry"], "'pairs']; Given value: poetry"),
        ([f"--ckpt={path}", "--prompt=x", "--temperature=-1"], "temperature -1.0 must be a finite number"),
        ([f"--ckpt={path}", "--prompt="], "a prompt has no tokens"),
        (["--ckpt=nowhere.ckpt", "--prompt=x"], "--ckpt 'nowhere.ckpt' does not exist"),
        (["--ckpt=torn.ckpt", "--prompt=x"], "--ckpt 'torn.ckpt' is torn or not a checkpoint"),
        (["--ckpt=foreign.ckpt", "--prompt=x"], "--ckpt 'foreign.ckpt' is not a checkpoint of `python -m language"),
    ]:
        line = error_line(["generate", *arguments])
        assert words in line, line


@pytest.mark.slow
def test_a_real_process(checkpoint):
    """No advertisement and no progress bar on stdout; status 1 and one line for an error."""
    path, _ = checkpoint
    command = [sys.executable, "-m", "language", "generate", f"--ckpt={path}", "--max_new_tokens=4", "--device=cpu"]
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--prompt=hi"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    assert done.stdout.endswith("\n")
    assert len(done.stdout.encode()) <= 4 * 3 + 1
    failed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.strip().split("\n")[-1].startswith("error: the following arguments are required: prompt")


def test_predict_continues_the_test_rows():
    few = ["--data.test_subset=2", "--trainer.limit_predict_batches=1", "--model.max_new_tokens=3"]
    cli = quick_main(["predict", f"--config={LORA}", f"--data.path={ROWS}", *QUIET, *few])
    assert len(cli.datamodule.predict_dataloader().dataset) == 2
