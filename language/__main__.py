"""Command line: python -m language fit|validate|test|predict --config FILE.yaml [--key=value ...], or generate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from lightning.pytorch.cli import ArgsType
from transformers import TextStreamer

from language.cli import LanguageCLI
from language.data.formats import FormatName
from language.data.module import InstructionDataModule
from language.generate import generate
from language.models import context_length
from language.module import CausalLMTuner, load_tuner
from language.prompt import prompt_tokens
from lit_adapters.errors import AdapterError
from lit_adapters.lightning.cli import run


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise AdapterError(f"{message} (generate --help lists what it takes)")


def main(args: ArgsType = None, **kwargs: Any) -> LanguageCLI | str:
    """Run a subcommand; returns the finished CLI, or the text that `generate` made.

    Further arguments are those of LightningCLI.
    """
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given[:1] == ["generate"]:
        return generate_command(given[1:])
    return LanguageCLI(CausalLMTuner, InstructionDataModule, args=args, **kwargs)


def generate_command(args: Sequence[str]) -> str:
    """`python -m language generate --ckpt FILE --prompt TEXT`: print a fine-tuned model's answer, and return it.

    Raises:
        AdapterError: the arguments are not valid, or the checkpoint is missing, torn or another class's.
    """
    parser = _Parser("python -m language generate", description="Answer a prompt with a fine-tuned model.")
    parser.add_argument("--ckpt", required=True, type=Path, help="checkpoint that fit has written")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--format", choices=get_args(FormatName), help="data.format of the training; default: no frame")
    parser.add_argument("--use_chat_template", action="store_true", help="data.use_chat_template of the training")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    parser.add_argument("--seed", type=int, default=0, help="of a temperature above 0")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(args)
    tuner = load_tuner(given.ckpt, CausalLMTuner, "language").to(given.device).eval()
    room = context_length(tuner.model)  # type: ignore[arg-type]
    row = prompt_tokens(tuner.tokenizer, given.prompt, given.format, given.use_chat_template, room or sys.maxsize)
    streamer = TextStreamer(tuner.tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
    torch.manual_seed(given.seed)
    return generate(tuner.model, tuner.tokenizer, [row], given.max_new_tokens, given.temperature, streamer)[0]


if __name__ == "__main__":
    run(main)
