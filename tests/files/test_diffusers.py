"""LoRA for diffusers: loaded by its own loader into a fresh model, it computes the same."""

import pytest
import torch
from diffusers import UNet2DConditionModel

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
