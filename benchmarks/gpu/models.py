"""The models of the questions, with random weights, and the adapters that they get."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lit_adapters as la
from benchmarks.against_peft import METHODS, adapted
from benchmarks.arms import ARMS
from benchmarks.gpu.setting import Setting

RANK = 8


def llama(setting: Setting) -> Any:
    """A model of the shape of Llama-3.2-1B in bfloat16, on the device, in training mode."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = setting.choose(
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0},
        {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512},
    )
    torch.manual_seed(0)
    with torch.device(setting.device):
        config = LlamaConfig(**sizes, tie_word_embeddings=True)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()


def vit(setting: Setting) -> nn.Module:
    """ViT-B/16 at 224 px in float32, or a tiny ViT, on the device, in training mode."""
    import timm

    torch.manual_seed(0)
    sizes = setting.choose({}, {"img_size": 32, "embed_dim": 64, "depth": 1, "num_heads": 2})
    with torch.device(setting.device):
        return timm.create_model("vit_base_patch16_224", **sizes).train()


MODELS: dict[str, Callable[[Setting], Any]] = {"llama": llama, "vit": vit}


def batch(setting: Setting, name: str) -> tuple[dict[str, int], Callable[[nn.Module], Tensor]]:
    """The sizes of a batch, and its loss under bf16 autocast."""
    torch.manual_seed(1)
    if name == "llama":
        rows, tokens = setting.choose((4, 1024), (2, 8))
        ids = torch.randint(0, setting.choose(128256, 300), (rows, tokens), device=setting.device)
        sizes = {"rows": rows, "tokens": tokens}

        def loss(model: nn.Module) -> Tensor:
            return model(input_ids=ids, labels=ids, use_cache=False).loss
    else:
        count, pixels = setting.choose((128, 224), (2, 32))
        images = torch.randn(count, 3, pixels, pixels, device=setting.device)
        classes = torch.arange(count, device=setting.device) % 10
        sizes = {"images": count, "pixels": pixels}

        def loss(model: nn.Module) -> Tensor:
            return F.cross_entropy(model(images), classes)

    def under_autocast(model: nn.Module) -> Tensor:
        with torch.autocast(setting.device, torch.bfloat16):
            return loss(model)

    return sizes, under_autocast


def sharing(model: nn.Module) -> nn.Module:
    """A copy with the same parameters, not copies of them: for adapters that leave them as they are."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def with_arm(model: nn.Module, name: str, arm: str, library: str = "ours") -> nn.Module:
    """The model with what an arm of `benchmarks.arms` trains, in training mode.

    LoRA and DoRA have the same rank and layers in both libraries. "frozen" is the model without adapters, with
    gradients carried to its first layer.
    """
    if arm == "full":
        return model.requires_grad_(True).train()
    if arm == "frozen" or arm in METHODS:
        model = adapted(model, name, "frozen" if arm == "frozen" else library, arm, RANK)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # as peft's `get_peft_model` does, and ours
        return model
    method = ARMS[arm].method
    assert method is not None
    la.attach(model, method(**(ARMS[arm].vision if name == "vit" else ARMS[arm].language)))
    la.set_progress(model, 0.1)  # AFA-LoRA between its sigma and linear
    return model.train()
