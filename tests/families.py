"""One small member of each of many model families, with random weights, and which methods each one refuses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import timm
import torch
import transformers
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """A family by one of its members.

    Attributes:
        name: unique within the library.
        library: "timm" or "transformers".
        model: name of the architecture there.
        make: builds it.
        inputs: keyword arguments of its forward.
        linear: targets of the methods on weights.
        activations: targets of the methods on activations.
        channel_dim: of methods on activations, where the layers around an activation do not tell.
        groups: of methods on activations.
        train: a head that no getter tells of.
        refused: the expected AdapterError, as a regular expression, by method; the other methods work.
    """

    name: str
    library: str
    model: str
    make: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]
    linear: str | Sequence[str] = "all-linear"
    activations: str | Sequence[str] = "activations"
    channel_dim: int | Literal["auto"] = "auto"
    groups: int = 4
    train: Sequence[str] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    def run(self, network: nn.Module) -> Tensor:
        """The logits (N, ..., classes) of `network`, a (possibly adapted) copy of this model."""
        output = network(**self.inputs)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits


_OWN = ("linear", "activations", "channel_dim", "groups", "train", "refused")  # what entries give for Family itself


def _own(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: arguments.pop(k) for k in _OWN if k in arguments}


def _images(size: int, name: str) -> dict[str, Tensor]:
    return {name: torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))}


def _timm(name: str, model: str, size: int = 64, **arguments: Any) -> Family:
    own = _own(arguments)
    make = functools.partial(timm.create_model, model, pretrained=False, num_classes=5, **arguments)
    return Family(name, "timm", model, make, _images(size, "x"), **own)


def _vit(name: str, model: str, **arguments: Any) -> Family:
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
    return _timm(name, model, 32, **(sizes | arguments))


_TOKENS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))
_INPUTS = {
    "CausalLM": {"input_ids": _TOKENS},
    "SequenceClassification": {"input_ids": _TOKENS},
    "Seq2SeqLM": {"input_ids": _TOKENS, "decoder_input_ids": _TOKENS},
    "ImageClassification": _images(64, "pixel_values"),
}
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _transformers(task: str, model: str, common: Mapping[str, Any], name: str = "", **arguments: Any) -> Family:
    own, arguments = _own(arguments), {**common, **arguments}
    if task.endswith("Classification"):
        arguments["num_labels"] = 5
        own = {"train": ["classifier"], **own}

    def make() -> nn.Module:
        config = transformers.AutoConfig.for_model(model, **arguments)
        network: nn.Module = getattr(transformers, f"AutoModelFor{task}").from_config(config)
        return network

    return Family(name or model.removesuffix("_text"), "transformers", model, make, _INPUTS[task], **own)


_language = functools.partial(_transformers, "CausalLM")
_encoder = functools.partial(_transformers, "SequenceClassification")
_encoder_decoder = functools.partial(_transformers, "Seq2SeqLM")
_classifier = functools.partial(_transformers, "ImageClassification")

_ACTIVATIONS = ("NoRA", "GroupAffine")
_PAIRS = ("LoRA", "VeRA", "NestedLoRA", "LoRA2", "AFALoRA", "DenseLoRA")  # products of width r on the layer's input
_WEIGHTS = (*_PAIRS, "LoRAN")
_FUNCTION = dict.fromkeys(_ACTIVATIONS, "These blocks hold no known activation module of their own")
_DEFAULT = dict.fromkeys((*_ACTIVATIONS, *_WEIGHTS), r"targets '[a-z-]+' match no module")
_READ = dict.fromkeys(("AFALoRA", "DenseLoRA"), r"the model reads .* and does not call it")
_OWN_FORWARD = dict.fromkeys(_WEIGHTS, "StdConv2d|Conv2dSame")  # they do more than convolve
_DEPTHWISE = dict.fromkeys(_PAIRS, "is a convolution in groups")
_MAMBA = dict.fromkeys(_WEIGHTS, "adapters did not run")
_MAMBA |= dict.fromkeys(_ACTIVATIONS, "its neighbours are Conv1d and Linear")
_THIN: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (2, 2, 2, 2)}
_HYBRID: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2}
_WINDOWED: dict[str, Any] = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}

_VISION = [
    _vit("vit", "vit_tiny_patch16_224", img_size=32),
    _timm("vit, SwiGLU", "test_vit4", img_size=64),
    _timm("vit, relative positions", "test_vit_relpos", img_size=64),
    _timm("vit, hybrid", "vit_tiny_r_s16_p8_224", 32, **_HYBRID),
    _vit("deit", "deit_tiny_distilled_patch16_224", img_size=32),
    _vit("deit3", "deit3_small_patch16_224", img_size=32),
    _vit("siglip", "vit_base_patch16_siglip_224", img_size=32),
    _vit("beit", "beit_base_patch16_224", img_size=32, refused=_READ),
    _vit("beitv2", "beitv2_base_patch16_224", img_size=32, refused=_READ),
    _vit("eva", "eva_large_patch14_196", img_size=32),
    _vit("eva02", "eva02_tiny_patch14_224", img_size=32, refused=_READ),
    _vit("dinov3", "vit_small_patch16_dinov3", img_size=32),
    _vit("naflexvit", "naflexvit_base_patch16_gap"),
    _timm("qwen3_vit", "qwen3_vit_88m", embed_dim=32, depth=2, num_heads=2),
    _vit("samvit", "samvit_base_patch16_224", img_size=32, global_attn_indexes=(1,), window_size=2, neck_chans=16),
    _vit("cait", "cait_xxs24_224", img_size=32),
    _vit("xcit", "xcit_nano_12_p8_224", img_size=32),
    _vit("convit", "convit_tiny", img_size=32, local_up_to_layer=1),
    _timm("tnt", "tnt_s_patch16_224", 32, img_size=32, depth=2),
    _timm("swin", "swin_tiny_patch4_window7_224", 32, **_WINDOWED),
    _timm("swinv2", "swinv2_tiny_window8_256", 32, **_WINDOWED, refused=_READ),
    _timm("swinv2_cr", "swinv2_cr_tiny_224", 32, **_WINDOWED),
    _timm("pit", "pit_ti_224", img_size=64, base_dims=(8, 8, 8), depth=(1, 1, 1)),
    _timm(
        "pvt_v2",
        "pvt_v2_b0",
        96,
        depths=(1, 1, 1, 1),
        refused=dict.fromkeys(_ACTIVATIONS, "its neighbours are Conv2d and Linear"),
    ),
    _timm("pvt_v2, channel_dim", "pvt_v2_b0", 96, depths=(1, 1, 1, 1), channel_dim=-1),
    _timm("twins, pcpvt", "twins_pcpvt_small", img_size=64, **_THIN),
    _timm("twins, svt", "twins_svt_small", img_size=64, **_THIN),
    _timm("crossvit", "crossvit_9_240", 240, embed_dim=(16, 32), depth=((1, 1, 0),), num_heads=(2, 2)),
    _timm("levit", "levit_128s", img_size=64, refused=dict.fromkeys(_ACTIVATIONS, _DEFAULT["NoRA"])),
    _timm("levit, named", "levit_128s", img_size=64, activations=["mlp.act"], channel_dim=-1),
    _timm("nest", "nest_tiny", img_size=64, drop_path_rate=0.0),
    _timm("davit", "davit_tiny", **_THIN),
    _timm("hiera", "hiera_tiny_224", img_size=(64, 64), embed_dim=16, stages=(1, 1, 1, 1)),
    _timm("mvitv2", "mvitv2_tiny", img_size=64),
    _timm("volo", "volo_d1_224", img_size=64),
    _timm("coat", "coat_lite_tiny", img_size=64),
    _timm("gcvit", "gcvit_xxtiny", img_size=64),
    _timm("vitamin", "vitamin_small_224", img_size=64, depth=2),
    _timm("tiny_vit", "tiny_vit_5m_224", **_THIN, window_sizes=(4, 4, 4, 2)),
    _timm("mixer", "mixer_s32_224", img_size=64),
    _timm("resmlp", "resmlp_12_224", img_size=64),
    _timm("gmlp", "gmlp_ti16_224", img_size=64),
    _timm("sequencer", "sequencer2d_s", layers=(1, 1, 1, 1), embed_dims=(32, 32, 32, 32)),
    _timm("convnext", "test_convnext"),
    _timm("convnextv2", "test_convnext2"),
    _timm("mambaout", "test_mambaout"),
    _timm("edgenext", "edgenext_xx_small"),
    _timm("maxvit", "test_maxvit", img_size=64),
    _timm("mobilevit", "mobilevit_xxs"),
    _timm("swiftformer", "swiftformer_xs"),
    _timm("caformer", "caformer_s18", refused=_FUNCTION),
    # From here on convolutions, which have to be named.
    _timm("convformer", "convformer_s18", linear=["fc1", "fc2"], refused=_FUNCTION),
    _timm("coatnet", "test_coatnet", img_size=64, linear=["qkv", "fc1", "fc2"]),
    _timm("mobilevitv2", "mobilevitv2_050", linear=["qkv_proj", "fc1", "fc2"]),
    _timm("efficientformer", "efficientformer_l1", 224, depths=(1, 1, 1, 2), embed_dims=(16, 32, 32, 32)),
    _timm("efficientformerv2", "efficientformerv2_s0", img_size=64, linear=["fc1.conv"], activations=["mid.bn.act"]),
    _timm("poolformer", "poolformer_s12", linear=["fc1", "fc2"]),
    _timm("focalnet", "focalnet_tiny_srf", linear=["fc1", "fc2"]),
    _timm("visformer", "visformer_tiny", img_size=64, linear=["conv1", "conv3"]),
    _timm("inception_next", "inception_next_atto", linear=["fc1", "fc2"]),
    _timm("efficientvit", "efficientvit_b0", linear=["qkv.conv", "inverted_conv.conv"]),
    _timm(
        "efficientvit, msra", "efficientvit_m0", img_size=64, linear=["pw1.conv"], activations=["m.act"], channel_dim=1
    ),
    _timm("fastvit", "fastvit_t8", layers=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32), linear=["fc1", "fc2"]),
    _timm(
        "repvit",
        "repvit_m0_9",
        embed_dim=(16, 32, 32, 32),
        depth=(1, 1, 1, 1),
        linear=r".*channel_mixer\.conv\d\.c",
        activations=["channel_mixer.act"],
        channel_dim=1,
    ),
    _timm("fasternet", "fasternet_t0", linear=["mlp.0", "mlp.3"]),
    _timm("convmixer", "convmixer_1024_20_ks9_p14", 28, linear=r"blocks\.\d+\.1"),
    _timm("starnet", "starnet_s1", linear=["f1.conv", "f2.conv"], activations=r"stages.*\.act", channel_dim=1),
    _timm("efficientnet", "test_efficientnet", linear=["conv_pw", "conv_pwl"], activations=["bn1.act"]),
    _timm("efficientnet, default targets", "test_efficientnet", refused=_DEFAULT),
    _timm("mobilenetv3", "mobilenetv3_small_050", linear=["conv_pw"], activations=["bn1.act"]),
    _timm(
        "mobilenetv3, depthwise",
        "mobilenetv3_small_050",
        linear=["conv_dw"],
        activations=["bn1.act"],
        refused=_DEPTHWISE,
    ),
    _timm(
        "mobilenetv3, same padding",
        "tf_mobilenetv3_small_minimal_100",
        linear=["conv_stem"],
        activations=["bn1.act"],
        refused=_OWN_FORWARD,
    ),
    _timm("mobilenetv4", "mobilenetv4_conv_small_035", linear=["pw_exp.conv"], activations=["pw_exp.bn.act"]),
    _timm("mobilenetv4, hybrid", "mobilenetv4_hybrid_medium", linear=["query.proj"], activations=["pw_exp.bn.act"]),
    _timm("ghostnet", "ghostnet_050", linear=["primary_conv.0"], activations=r".*ghost1\.primary_conv\.2", groups=2),
    _timm("rexnet", "rexnet_100", linear=["conv_exp.conv", "conv_pwl.conv"], activations=["conv_exp.bn.act"], groups=2),
    _timm("regnetx", "regnetx_002", linear=["conv1.conv", "conv3.conv"], activations=["conv1.bn.act"]),
    _timm("regnety", "regnety_002", linear=["conv1.conv", "conv3.conv"], activations=["conv1.bn.act"]),
    _timm("regnety, default targets", "regnety_002", refused=_DEFAULT),
    _timm("resnet", "test_resnet", linear=r"layer.*\.conv\d", activations=r"layer.*\.act\d"),
    _timm("resnetv2", "resnetv2_18", linear=["conv1", "conv2"], activations=["norm1.act", "norm2.act"]),
    _timm("densenet", "densenet121", block_config=(2, 2, 2, 2), linear=["conv2"], activations=["norm2.act"]),
    _timm("nfnet", "test_nfnet", linear=["conv1", "conv3"], activations=["act1", "act3"], refused=_OWN_FORWARD),
    _timm("vit, hybrid, stem", "vit_tiny_r_s16_p8_224", 32, **_HYBRID, linear=["backbone.conv"], refused=_OWN_FORWARD),
    _timm("byobnet", "test_byobnet", linear=["conv2_kxk.conv"], activations=["conv1_1x1.bn.act"]),
    _timm("botnet", "botnet26t_256", img_size=64, linear=["conv1_1x1.conv", "qkv"], activations=["conv1_1x1.bn.act"]),
    _timm("hgnetv2", "hgnetv2_b0", linear=["conv1.conv"], activations=["conv2.act"]),
    _timm("vovnet", "ese_vovnet19b_slim", linear=["conv_concat.conv"], activations=["conv_concat.bn.act"]),
    _timm("cspnet", "cs3darknet_s", linear=["conv1.conv"], activations=["conv1.bn.act"]),
]

_DECODERS = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "olmo2",
    "cohere",
    "stablelm",
    "starcoder2",
    "granite",
    "glm4",
    "smollm3",
    "nemotron",
    "exaone4",
    "persimmon",
]
_ENCODERS = ["bert", "roberta", "electra", "deberta", "deberta-v2", "modernbert", "mpnet", "convbert", "albert"]
_SHARED = _SIZES | {"num_key_value_heads": 2, "head_dim": 8}  # queries share keys and values
_EXPERTS = _SHARED | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_SHORT = {"vocab_size": 64, "hidden_size": 32}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
_BART = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in (("layers", 2), ("attention_heads", 4))}
_BART |= {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_WHOLE = {"drop_path_rate": 0.0}  # a dropped block would have no gradient
_IMAGE = {k: v for k, v in _SIZES.items() if k != "vocab_size"} | {"image_size": 64, "patch_size": 16} | _WHOLE
_WINDOWS = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
_WINDOWS |= _WHOLE
_STAGES = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]} | _WHOLE

_TRANSFORMERS = [
    *(_language(model, _SHARED) for model in _DECODERS),
    _language("gpt2", _GPT),
    _language("gpt_bigcode", _GPT),
    _language("gptj", _GPT, rotary_dim=4),
    _language("codegen", _GPT, rotary_dim=4),
    _language("gpt_neox", _SIZES),
    _language("opt", _SIZES, ffn_dim=64, word_embed_proj_dim=32),
    _language("bloom", _SHORT, n_layer=2, n_head=4),
    _language("falcon", _SHORT, num_hidden_layers=2, num_attention_heads=4),
    _language("mpt", {}, vocab_size=64, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    _language("apertus", _SIZES, refused={"NoRA": "XIELUActivation has parameters of its own"}),
    _language("lfm2", _SIZES, num_key_value_heads=2, full_attn_idxs=[1], refused=_FUNCTION),
    _language("mixtral", _EXPERTS, refused=_FUNCTION),
    _language("mixtral", _EXPERTS, "mixtral, experts", activations=["experts.act_fn"], channel_dim=-1),
    _language("qwen3_moe", _EXPERTS, refused=_FUNCTION),
    _language("gpt_oss", _EXPERTS, refused=_FUNCTION),
    _language("phimoe", _EXPERTS, refused=_FUNCTION),
    _language("llama4_text", _EXPERTS, intermediate_size_mlp=64),
    _language("deepseek_v3", _SIZES | _LATENT, n_group=1, topk_group=1),
    _language("mamba", _SHORT, num_hidden_layers=2, state_size=8, refused=_MAMBA),
    _language("rwkv", _SHORT, num_hidden_layers=2, attention_hidden_size=32, refused=_FUNCTION),
    *(_encoder(model, _SIZES) for model in _ENCODERS),
    _encoder("distilbert", {}, vocab_size=64, dim=32, hidden_dim=64, n_layers=2, n_heads=4),
    _encoder("esm", _SIZES, linear=["query", "key", "value"], refused=dict.fromkeys(_ACTIVATIONS, "contact_head")),
    _encoder("xlnet", {}, vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64, train=["logits_proj"]),
    _encoder_decoder("t5", _T5),
    _encoder_decoder("mt5", _T5),
    _encoder_decoder("switch_transformers", _T5, num_experts=2),
    _encoder_decoder("bart", _BART),
    _classifier("vit", _IMAGE),
    _classifier("dinov2", _IMAGE),
    _classifier("beit", _IMAGE),
    _classifier("swin", _WINDOWS),
    _classifier("swinv2", _WINDOWS),
    _classifier("convnext", _STAGES),
    _classifier("segformer", _STAGES, num_attention_heads=[1, 2, 2, 2], decoder_hidden_size=16),
]

FAMILIES: dict[str, Family] = {f"{f.library} {f.name}": f for f in (*_VISION, *_TRANSFORMERS)}
