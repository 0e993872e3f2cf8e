"""Look into saved adapters, compare, merge and convert them."""

# argparse, although jsonargparse is a dependency: typed functions would turn the flag --overwrite into an option that
# takes true or false, and --base-args into --base_args, which breaks command lines that people have written down.

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_model
from torch import nn

from lit_adapters import console, methods
from lit_adapters.activations import LEARNED_ACTIVATIONS
from lit_adapters.cli.estimate import add_arguments as add_estimate_options
from lit_adapters.cli.estimate import estimate
from lit_adapters.cli.models import adapted_model, build_base, import_modules
from lit_adapters.cli.study import add_arguments, study_command
from lit_adapters.errors import AdapterError
from lit_adapters.files.adapters import HEADER, TENSORS, save_adapters
from lit_adapters.files.atomic import check_output, write_directory
from lit_adapters.files.meaning import meaning_of, write_meaning
from lit_adapters.files.peft import check_expressible, export_peft, import_peft
from lit_adapters.files.peft_lora import CONFIG
from lit_adapters.files.saved import read_saved
from lit_adapters.learned import comparison, summary
from lit_adapters.methods import AdapterModule, Method
from lit_adapters.methods.matrix_layers import is_quantised
from lit_adapters.methods.quantised import foreign_quantisation
from lit_adapters.model.merge import cast_weights, forget_quantisation, merge

_WEIGHTS = "model.safetensors"
_SAVED = "adapter directory (lit_adapter.safetensors inside), or Lightning checkpoint written with AdapterCallback"
_BASE = 'timm.create_model --base-args \'{"model_name": "vit_tiny_patch16_224", "num_classes": 100}\''


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise AdapterError(f"{message} ({self.prog} --help tells more)")


def list_methods(args: argparse.Namespace) -> None:
    """`methods`: list all methods of the library, as their classes describe themselves."""
    classes = [c for c in vars(methods).values() if isinstance(c, type) and issubclass(c, Method) and c is not Method]
    rows = [("method", "merges", "exports to peft", "what it is")]
    for cls in classes:
        documentation = import_module(cls.__module__).__doc__ or ""
        rows.append((cls.__name__, cls.merges, cls.exports, documentation.split("\n")[0]))
    print(console.text_table(rows))


def inspect(args: argparse.Namespace) -> None:
    """`inspect`: show what one set of adapters is made of and has learned."""
    saved = read_saved(args.path)
    summaries = summary.summarise(saved)
    print(summary.report(saved, summaries))
    if args.plot:
        from lit_adapters.learned.pictures import save_figure
        from lit_adapters.learned.plots import learned_figure  # matplotlib takes a while, and most calls draw nothing

        figure = learned_figure(summaries, list(summary.learned_functions(saved).values()))
        try:
            print(f"drawn in {save_figure(figure, args.plot, dpi=150)}")
        except ValueError as error:
            raise AdapterError(f"--plot {str(args.plot)!r}: {error}") from error


def diff(args: argparse.Namespace) -> None:
    """`diff`: show what two sets of adapters have in common."""
    print(comparison.report(comparison.compare(read_saved(args.first), read_saved(args.second))))


def merge_command(args: argparse.Namespace) -> None:
    """`merge`: write the model with its updates in the weights."""
    check_output(args.out, args.overwrite, [_WEIGHTS, "model.safetensors.index.json"])
    _check(args.path, lambda name, adapter: adapter.check_linear())
    model, tokenizer = _adapted(args)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    packed = any(is_quantised(module) or foreign_quantisation(module) for module in model.modules())
    if dtype is not None and not packed and all(torch.promote_types(p.dtype, dtype) == dtype for p in _floating(model)):
        cast_weights(model, dtype)  # the sum of weight and update then is as exact as what is asked for
    merged = merge(model)
    end = meaning_of(model).get("end_token_ids")
    if end and (settings := getattr(model, "generation_config", None)) is not None:
        own = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        settings.eos_token_id = list(dict.fromkeys([*end, *(i for i in own if i is not None)]))

    rounded = "" if dtype is None else _cast(model, dtype)
    save = getattr(model, "save_pretrained", None)
    if args.max_shard_size is not None and not callable(save):
        raise AdapterError("--max-shard-size is for models of transformers; leave it out")
    shards = {} if args.max_shard_size is None else {"max_shard_size": args.max_shard_size}
    trusted = ""

    def write(directory: Path) -> None:
        nonlocal trusted
        if not callable(save):
            save_model(model, str(directory / _WEIGHTS))
        else:
            if not any(hasattr(p, "quant_state") for p in model.parameters()):
                forget_quantisation(model)  # GGUF files leave that note too, on plain weights
            if merged.kept:
                from lit_adapters.huggingface.functions import save_with_functions  # transformers takes a while

                save_with_functions(model, directory, **shards)
                trusted = "from_pretrained loads it with trust_remote_code=True: its own file has the functions"
            else:
                save(directory, **shards)
            if hasattr(tokenizer, "save_pretrained"):
                tokenizer.save_pretrained(directory)
        write_meaning(model, directory)

    write_directory(args.out, write)
    print(merged)
    if rounded:
        print(rounded)
    if trusted:
        print(trusted)
    elif merged.kept:
        print(f"{_WEIGHTS} holds their coefficients: to load it, call load_adapters and merge on the base model first")
    print(f"written to {args.out}")


def _floating(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.is_floating_point()]


@torch.no_grad()
def _cast(model: nn.Module, dtype: torch.dtype) -> str:
    """Cast a merged model, and say by how much its weights have moved; empty if they have not.

    Raises:
        AdapterError: A weight is too large for the dtype.
    """
    error = relative = 0.0
    functions = [module for module in model.modules() if isinstance(module, LEARNED_ACTIVATIONS)]
    kept = {id(tensor) for module in functions for tensor in (*module.parameters(), *module.buffers())}
    for name, parameter in chain(model.named_parameters(), model.named_buffers()):
        if id(parameter) in kept:
            continue
        if not parameter.is_floating_point() or parameter.dtype == dtype:
            continue
        stored = parameter.to(dtype)
        if parameter.isfinite().all() and not stored.isfinite().all():
            largest = parameter.abs().max().item()
            raise AdapterError(
                f"{name} has a value of size {largest:.3g}, beyond {dtype}: give --dtype bfloat16 or float32"
            )
        pairs = zip(parameter.flatten().split(1 << 24), stored.flatten().split(1 << 24), strict=True)
        off = max(((a.double() - b.double()).abs().max().item() for a, b in pairs), default=0.0)
        size = parameter.abs().max().item() if parameter.numel() else 0.0
        error, relative = max(error, off), max(relative, off / size if size else 0.0)
    cast_weights(model, dtype)
    name = str(dtype).removeprefix("torch.")
    return f"cast to {name}: error {error:.1e} ({relative:.1e} of |W|)" if error else ""


def export_command(args: argparse.Namespace) -> None:
    """`export-peft`: write adapters in the format of peft."""
    check_output(args.out, args.overwrite, [CONFIG])
    _check(args.path, check_expressible)
    model, tokenizer = _adapted(args)
    tokenizer = tokenizer if hasattr(tokenizer, "save_pretrained") else None

    def write(directory: Path) -> None:
        export_peft(model, directory, tokenizer)
        write_meaning(model, directory)

    write_directory(args.out, write)
    print(f"written to {args.out}: peft.PeftModel.from_pretrained(base_model, {str(args.out)!r})")


def import_command(args: argparse.Namespace) -> None:
    """`import-peft`: write a LoRA or DoRA of peft in our format."""
    check_output(args.out, args.overwrite, [HEADER, TENSORS])
    if not args.path.is_dir():
        raise AdapterError(f"{str(args.path)!r} is not a directory; give one that peft's save_pretrained wrote")
    model = build_base(args.base, args.base_args)
    print(import_peft(model, args.path))
    write_directory(args.out, lambda directory: save_adapters(model, directory))
    print(f"written to {args.out}: lit_adapters.load_adapters(base_model, {str(args.out)!r})")


def _check(path: Path, allowed: Callable[[str, AdapterModule], object]) -> None:
    """Raise before a large model is built, which takes a while, if an adapter in the files would be refused later."""
    for name, layer in read_saved(path).layers.items():
        if layer.adapter is not None:
            allowed(name, layer.adapter)


def _adapted(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    return adapted_model(args.path, args.base, args.base_args, args.module)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("lit-adapters", description=__doc__, epilog="lit-adapters COMMAND --help explains each.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, what: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=f"example:  lit-adapters {name} {example}".rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    def output(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--out", required=True, type=Path, help="directory to create")
        sub.add_argument("--overwrite", action="store_true", help="replace an earlier result in --out")

    def base(sub: argparse.ArgumentParser, required: bool) -> None:
        sub.add_argument(
            "--base",
            required=required,
            metavar="PATH",
            help="what makes the base model, anything Python can import "
            "and call: timm.create_model, transformers.AutoModelForCausalLM.from_pretrained, my_file.build",
        )
        sub.add_argument("--base-args", metavar="JSON", help='its arguments: {"name": value, ...} or ["DIR"]')

    def imports(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--import",
            dest="imports",
            action="append",
            default=[],
            metavar="MODULE",
            help="import a module of yours first, whose methods the files name; files never import by themselves",
        )

    command("methods", list_methods, "list the adapter methods: what each is, whether it merges into weights", "")
    sub = command(
        "estimate",
        estimate,
        "say what a recipe takes in memory and time, before anything is loaded",
        "--config configs/language/smollm2/lora.yaml --device l40s data.batch_size=16",
    )
    add_estimate_options(sub)
    sub = command(
        "inspect",
        inspect,
        "show what adapters have learned, layer by layer; no base model",
        "out/ --plot learned.png",
    )
    sub.add_argument("path", type=Path, metavar="DIR|CKPT", help=_SAVED)
    imports(sub)
    sub.add_argument("--plot", type=Path, metavar="FILE", help="also draw it, as .png, .pdf or .svg")
    sub = command(
        "diff",
        diff,
        "compare two sets of adapters, of two seeds say; no base model",
        "seed0/adapter seed1/adapter",
    )
    sub.add_argument("first", type=Path, metavar="A", help=_SAVED)
    sub.add_argument("second", type=Path, metavar="B", help="the same")
    imports(sub)
    for name, run, what in (
        ("merge", merge_command, "write the model with its updates added to the weights, free of adapters"),
        ("export-peft", export_command, "write LoRA, DoRA or annealed AFA-LoRA in the format of the peft library"),
    ):
        sub = command(
            name,
            run,
            what,
            f"out/ --out result --base {_BASE}\n"
            f"          lit-adapters {name} runs/version_0/checkpoints/last.ckpt --out result",
        )
        sub.add_argument("path", type=Path, metavar="DIR|CKPT", help=_SAVED)
        output(sub)
        base(sub, required=False)
        imports(sub)
        sub.add_argument(
            "--module",
            metavar="CLASS",
            help="LightningModule of a checkpoint, as vision.module.ViTClassifier; default: the one that wrote it",
        )
        if run is merge_command:
            kinds = ("float32", "bfloat16", "float16")
            sub.add_argument("--dtype", choices=kinds, help="dtype of the weights; default: that of the model")
            sub.add_argument("--max-shard-size", metavar="SIZE", help="largest weight file of transformers, as 2GB")
    sub = command(
        "import-peft",
        import_command,
        "write a LoRA or DoRA of the peft library as an adapter directory",
        f"peft_dir --out adapter --base {_BASE}",
    )
    sub.add_argument("path", type=Path, metavar="DIR", help="what peft's save_pretrained wrote")
    output(sub)
    base(sub, required=True)
    sub = command("study", study_command, "compare methods: search rates, run, report", "run STUDY.yaml")
    add_arguments(sub)
    return parser


def _short_warning(message: Warning | str, *rest: Any, **more: Any) -> str:
    return f"warning: {console.one_line(message)}\n"


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; bad input ends it with one line on stderr and exit status 1."""

    def command() -> None:
        parsed = _parser().parse_args(args)
        try:
            import_modules(getattr(parsed, "imports", ()))
            parsed.run(parsed)
            sys.stdout.flush()
        except BrokenPipeError:  # somebody reads the first lines only; the rest must not fail at exit either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    formatted, warnings.formatwarning = warnings.formatwarning, _short_warning
    try:
        console.run(command, OSError)
    finally:
        warnings.formatwarning = formatted
