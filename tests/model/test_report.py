"""What `attach` reports."""

import timm

import lit_adapters as la
from lit_adapters.model.report import AdapterReport
from tests.matrix import build


def test_counts_and_table():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=100)
    report = la.attach(model, la.NoRAPlusPlus(lora=la.LoRA(rank=4, targets=["qkv"])), train=["head", "norm"])
    lora, head, norm = 12 * 4 * (192 + 3 * 192), 192 * 100 + 100, 2 * 192
    assert report.adapter_parameters == 936 + lora
    assert (sum(report.head.values()), sum(report.trained.values())) == (head, norm)
    assert report.trainable_without_head == 936 + lora + norm
    assert report.trainable == 936 + lora + norm + head == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert str(report).splitlines() == [
        "lora         12 modules       36,864 parameters   blocks.0.attn.qkv ... blocks.11.attn.qkv",
        "nora         12 modules          936 parameters   blocks.0.mlp.act ... blocks.11.mlp.act",
        "head                          19,300 parameters   head.weight, head.bias",
        "base                             384 parameters   norm.weight, norm.bias",
        f"trainable  57,484 of {report.total:,} (1.03%); 38,184 without the head",
    ]


def test_a_head_that_no_getter_tells_of_is_what_train_names():
    report = la.attach(build("bert"), la.LoRA(rank=2), train=["classifier"])
    assert set(report.head) == {"classifier.weight", "classifier.bias"}


def test_long_lists_are_cut_and_empty_ones_left_out():
    report = AdapterReport([("one", "nora", 78)], trained={f"layer{i}": 1 for i in range(5)}, total=100)
    text = str(report)
    assert "layer0, layer1, layer2 and 2 more" in text
    assert "head  " not in text
    assert "nora          1 modules" in text
    assert text.splitlines()[0].endswith("one")
    assert "(0.00%)" in str(AdapterReport([]))
