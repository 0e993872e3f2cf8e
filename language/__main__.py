"""Command line: python -m language fit|validate|test|predict --config FILE.yaml [--key=value ...], or generate."""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage, and looking for it takes a second; `run` enables it

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import ArgsType
from transformers import TextStreamer

from language.cli import LanguageCLI
from language.data.formats import FormatName
from language.data.module import InstructionDataModule
from language.generate import generate
from language.models import context_length, default_device
from language.module import CausalLMTuner, load_tuner
from language.prompt import prompt_tokens
from lit_adapters import console
from lit_adapters.files.meaning import meaning_of
from lit_adapters.lightning.cli import run


def main(args: ArgsType = None, **kwargs: Any) -> LanguageCLI | str:
    """Run a subcommand; returns the finished CLI, or the text that `generate` made.

    Further arguments are those of LightningCLI.
    """
    words = sys.argv[1:] if args is None else args
    if isinstance(words, list) and words[:1] == ["generate"]:
        return console.call(generate_command, words[1:], "python -m language generate")
    return LanguageCLI(CausalLMTuner, InstructionDataModule, args=args, **kwargs)


def generate_command(
    *,
    ckpt: Path,
    prompt: str,
    format: FormatName | None = None,
    use_chat_template: bool | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    device: str | None = None,
) -> str:
    """Answer a prompt with a fine-tuned model, token by token.

    Args:
        ckpt: Checkpoint that fit has written.
        prompt: What to answer.
        format: The training's data.format, which newer checkpoints hold; where it is not known the prompt stands as it
            is.
        use_chat_template: The training's data.use_chat_template, which newer checkpoints hold.
        max_new_tokens: Tokens of the longest answer.
        temperature: 0 takes the likeliest token each time.
        seed: Seeds what a temperature above 0 draws.
        device: `cuda` or `cpu`; by default `cuda` where there is one.

    Returns:
        The answer.

    Raises:
        AdapterError: The checkpoint is missing, torn or another class's, or a value is out of range.
    """
    tuner = load_tuner(ckpt, CausalLMTuner, "language").to(device or default_device()).eval()
    model: Any = tuner.model
    room = context_length(model) or sys.maxsize
    row = prompt_tokens(tuner.tokenizer, prompt, format, use_chat_template, room, meaning_of(model))
    streamer = TextStreamer(tuner.tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed)
    return generate(model, tuner.tokenizer, [row], max_new_tokens, temperature, streamer)[0]


if __name__ == "__main__":
    run(main)
