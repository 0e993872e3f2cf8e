"""What every invariant of the library runs over: methods and tiny models. A new method is one line in METHODS."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import lit_adapters as la

# One of each method runs over all models; its variants, which differ inside the adapter alone, over an encoder and a
# decoder.
METHODS: dict[str, la.Method] = {
    "lora": la.LoRA(rank=2, alpha=4.0),
    "dora": la.DoRA(rank=2, alpha=4.0),
    "loran": la.LoRAN(rank=2, alpha=4.0),
    "afa": la.AFALoRA(rank=2, alpha=4.0, activation="silu"),
    "vera": la.VeRA(rank=6),
    "dense_lora": la.DenseLoRA(rank=2, alpha=4.0, dropout=0.0),
    "nested_lora": la.NestedLoRA(rank=3, inner_rank=2, alpha=6.0, init="svd"),
    "lora2": la.LoRA2(width=3, rank=2, alpha=400.0),
    "nora": la.NoRA(groups=4),
    "nora++": la.NoRAPlusPlus(nora=la.NoRA(groups=4), lora=la.LoRA(rank=2)),
    "bitfit": la.BitFit(add_missing=True),
    "group_affine": la.GroupAffine(groups=4),
}
VARIANTS: dict[str, la.Method] = {
    "rslora": la.LoRA(rank=3, alpha=4.0, rslora=True),
    "dora-pissa": la.DoRA(rank=2, alpha=4.0, start="pissa"),
    "loran-sine": la.LoRAN(rank=2, alpha=4.0, function="sine", frequency=20.0),
    "afa-rational": la.AFALoRA(rank=2, alpha=4.0, activation="rational", groups=2),
    "nora-anchored": la.NoRA(groups=4, base="anchored"),
    "nora-direct": la.NoRA(groups=4, rank=None, base="anchored"),
    "nora-sum-of-abs": la.NoRA(groups=4, denominator="sum-of-abs"),
    "nora-published": la.NoRA(groups=4, rank=2, scaling="none"),
    "nora++-dora": la.NoRAPlusPlus(nora=la.NoRA(groups=4, base="anchored"), lora=la.DoRA(rank=2)),
}
ALL = METHODS | VARIANTS
# Those that `merge` refuses, as no module without an adapter computes what they do.
UNMERGEABLE = ("dense_lora",)
# Those that start from a fit of the pretrained activation; all others start from the pretrained function itself.
FITTED = ("nora", "nora-sum-of-abs", "nora-published", "nora++")


@dataclass(frozen=True)
class Model:
    """A tiny network.

    Attributes:
        make: builds it.
        shape: of its input.
        head: name of its head.
        arguments: further keyword arguments of its forward.
        vocabulary: size of the vocabulary; 0 where the input is real.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    head: str
    arguments: dict[str, Any] = field(default_factory=dict)
    vocabulary: int = 0

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.vocabulary:
            return torch.randint(self.vocabulary, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator).to(dtype)

    def run(self, network: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """Logits of `network`, a (possibly adapted) copy of this model, for the input."""
        output = network(self.inputs(dtype), **self.arguments)
        return output if isinstance(output, Tensor) else output.logits


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0}
_LLAMA = LlamaConfig(**_SMALL, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
_BERT = BertConfig(
    **_SMALL,
    intermediate_size=64,
    num_attention_heads=2,
    num_labels=3,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
_GPT2 = GPT2Config(
    n_embd=32,
    n_layer=2,
    n_head=2,
    vocab_size=40,
    n_positions=32,
    tie_word_embeddings=False,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
)
_SWIN = {
    "img_size": 32,
    "embed_dim": 16,
    "depths": (1, 1),
    "num_heads": (2, 2),
    "window_size": 4,
    "num_classes": 5,
    "drop_path_rate": 0.0,
}
_VIT = {"img_size": 32, "depth": 2, "num_classes": 5}
_CONVNEXT = {"depths": (1, 1, 1, 1), "ls_init_value": 0.5, "num_classes": 5}
MODELS: dict[str, Model] = {
    "vit": Model(lambda: timm.create_model("test_vit", **_VIT), (3, 3, 32, 32), "head"),
    "swin": Model(lambda: timm.create_model("swin_tiny_patch4_window7_224", **_SWIN), (3, 3, 32, 32), "head.fc"),
    "convnext": Model(lambda: timm.create_model("test_convnext", **_CONVNEXT), (3, 3, 32, 32), "head.fc"),
    "llama": Model(lambda: LlamaForCausalLM(_LLAMA), (2, 6), "lm_head", {"use_cache": False}, vocabulary=40),
    "gpt2": Model(lambda: GPT2LMHeadModel(_GPT2), (2, 6), "lm_head", {"use_cache": False}, vocabulary=40),
    "bert": Model(lambda: BertForSequenceClassification(_BERT), (2, 6), "classifier", vocabulary=40),
}
# Method, model and dtype.
CASES = [(method, name, dtype) for method in METHODS for name in MODELS for dtype in (torch.float32, torch.bfloat16)]
CASES += [(method, name, torch.float32) for method in VARIANTS for name in ("vit", "llama")]


@functools.cache
def _prototype(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name].make()


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh copy of a model, with the same weights each time."""
    return copy.deepcopy(_prototype(name)).to(dtype)


def adapted(
    name: str, method: str, dtype: torch.dtype = torch.float32, train: Sequence[str] = (), seed: int | None = 0
) -> nn.Module:
    """A fresh copy with a method attached; with a `seed`, every adapter parameter has moved off its start."""
    network = build(name, dtype)
    torch.manual_seed(0)
    la.attach(network, ALL[method], train=train)
    if seed is not None:
        move(network, seed)
    return network


def move(network: nn.Module, seed: int = 0) -> None:
    """Give all that trains other values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def linear(network: nn.Module) -> nn.Module:
    """The network with all annealing done, as at the end of training: what merging asks for."""
    la.set_progress(network, 1.0)
    return network


def changed_tensors(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Keys whose tensors differ in a single bit, or stand on one side only."""
    both = before.keys() & after.keys()
    return sorted(before.keys() ^ after.keys()) + [k for k in sorted(both) if not torch.equal(before[k], after[k])]
