"""LoRA for diffusers: loaded by its own loader into a fresh model, it computes the same."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

import lit_adapters as la
from lit_adapters.files.diffusers import FILE
from tests.matrix import move

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def text_encoder():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=32))


@torch.no_grad()
def run(model):
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return model(sample, torch.tensor([3, 7]), text).sample


@pytest.mark.parametrize(
    "method",
    [
        la.LoRA(rank=2, alpha=6.0, targets=TARGETS),
        la.LoRA(rank=3, rslora=True, targets=[*TARGETS, "conv1"]),
        la.LoRA(rank=2, targets=TARGETS, rank_pattern={r".*to_q": 4, r".*to_k": 1}),
        la.LoRA(rank=2, start="pissa", targets=TARGETS),
        la.AFALoRA(rank=2, targets=TARGETS),
        la.LoRAN(rank=2, targets=TARGETS),
    ],
    ids=["lora", "convolutions", "ranks", "pissa", "afa", "loran"],
)
def test_a_model_of_diffusers_computes_the_same(tmp_path, method):
    model = unet()
    base = run(model)
    la.attach(model, method)
    move(model)
    la.set_progress(model, 1.0)
    if isinstance(method, la.LoRAN):
        la.to_lora(model, 2)
    expected = run(model.eval())
    la.export_diffusers(model, tmp_path, "unet")
    other = unet()
    other.load_lora_adapter(tmp_path, weight_name=FILE, prefix="unet")
    torch.testing.assert_close(run(other), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, base, rtol=1e-4, atol=1e-5) or isinstance(method, la.LoRAN)


def test_two_components_share_a_file_and_each_has_its_usual_name(tmp_path):
    for make in (unet, text_encoder, unet):
        torch.manual_seed(0)
        model = make()
        la.attach(model, la.LoRA(rank=2, targets=TARGETS if make is unet else ["q_proj"]))
        move(model)
        la.export_diffusers(model, tmp_path)
    names = load_file(tmp_path / FILE)
    assert {name.partition(".")[0] for name in names} == {"unet", "text_encoder"}
    other = unet()
    other.load_lora_adapter(tmp_path, weight_name=FILE, prefix="unet")
    torch.testing.assert_close(run(other), run(model.eval()), rtol=1e-4, atol=1e-5)
    (tmp_path / FILE).write_bytes(b"torn")
    with pytest.raises(la.AdapterError, match="is damaged"):
        la.export_diffusers(model, tmp_path)


def test_what_is_refused(tmp_path):
    for method, train, message in (
        (la.DoRA(rank=2, targets=TARGETS), (), "has dora; call lit_adapters.to_lora"),
        (la.LoRAN(rank=2, targets=TARGETS), (), "which the LoRA format of peft cannot express"),
        (la.LoRA(rank=2, targets=TARGETS), ["conv_out"], "has LoRA alone"),
    ):
        model = unet()
        la.attach(model, method, train=train)
        with pytest.raises(la.AdapterError, match=message):
            la.export_diffusers(model, tmp_path)
    assert not any(tmp_path.iterdir())
