"""`disabled` and `verify`: adapters switched off, and adapters that a model passes by."""

import pytest
import torch
from torch import nn

import lit_adapters as la
from tests.matrix import METHODS, MODELS, adapted, move


class ReadsWeights(nn.Module):
    """Takes the weight of a layer, and never calls it, in a way that attach does not foresee."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24, bias=False)
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.proj((x @ self.qkv.weight.T)[..., :8])


# ---- verify


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_ordinary_models_pass(method, name):
    network = adapted(name, method).train()
    la.verify(network, MODELS[name].inputs(), **MODELS[name].arguments)
    assert all(module.training for module in network.modules())
    assert all(p.grad is None for p in network.parameters())


def test_a_layer_whose_weight_is_read_is_named():
    model = nn.Sequential(ReadsWeights())
    la.attach(model, la.LoRA(rank=2))
    with pytest.raises(la.AdapterError, match=r"1 of 2 adapters did not run: 0.qkv \(Linear\).*exclude them"):
        la.verify(model, torch.randn(2, 3, 8))
    la.detach(model)
    la.attach(model, la.LoRA(rank=2, exclude=["qkv"]))
    la.verify(model, torch.randn(2, 3, 8))


def test_a_fused_encoder_layer_calls_its_adapters():
    """PyTorch's fast path of inference would read all weights of the layer at once."""
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation=nn.GELU()).eval()
    la.attach(model, la.NoRAPlusPlus(nora=la.NoRA(groups=4, targets=["activation"]), lora=la.LoRA(rank=2)))
    move(model)
    x, enabled = torch.randn(2, 3, 8), torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(True)
        la.verify(model, x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), model.train()(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def test_without_adapters_there_is_nothing_to_do():
    for call in (lambda m: la.verify(m, torch.ones(1)), lambda m: la.disabled(m).__enter__()):
        with pytest.raises(la.AdapterError, match="no adapters"):
            call(nn.Linear(1, 1))


def test_verify_leaves_modes_and_hooks_as_they_were_even_after_an_error():
    network = adapted("vit", "nora++").train()
    network.norm.eval()
    with pytest.raises(AttributeError, match="shape"):
        la.verify(network, "not an image")
    assert network.training
    assert not network.norm.training
    assert all(not m._forward_pre_hooks and "forward" not in vars(m) for m in network.modules())
    assert all(a.base.training for _, a in la.adapters(network))


# ---- disabled


def test_disabled_keeps_what_train_has_learned():
    network, x = adapted("vit", "nora++", train=["head"]), MODELS["vit"].inputs()
    twin = adapted("vit", "nora++", train=["head"])
    la.detach(twin)
    with la.disabled(network):
        assert torch.equal(network(x), twin(x))


def test_disabled_ends_with_an_error_and_nests():
    network, x = adapted("vit", "nora++"), MODELS["vit"].inputs()
    expected = network(x)
    with pytest.raises(ZeroDivisionError), la.disabled(network), la.disabled(network):
        raise ZeroDivisionError
    assert torch.equal(network(x), expected)
    next(la.adapters(network))[1].enabled = False  # the user's own choice survives
    partly = network(x)
    with la.disabled(network):
        pass
    assert torch.equal(network(x), partly)


def test_what_is_disabled_gets_no_gradient():
    network = adapted("vit", "nora++", train=["head"])
    with la.disabled(network):
        MODELS["vit"].run(network).sum().backward()
    assert {n for n, p in network.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}


def test_blocks_of_disabled_may_overlap():
    model = nn.Sequential(nn.Linear(8, 8))
    la.attach(model, la.LoRA(rank=2))
    one, other = la.disabled(model), la.disabled(model)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert not model[0].enabled
    other.__exit__(None, None, None)
    assert model[0].enabled


@pytest.mark.parametrize("method", [la.LoRA, la.DoRA, la.LoRAN, la.AFALoRA, la.VeRA])
def test_rows_of_unequal_length_in_an_encoder(method):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2).eval()
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=mask)
    la.attach(model, method(rank=2))
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), plain)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
        nested = model(x, src_key_padding_mask=mask)  # in eval mode nn.TransformerEncoder makes one nested tensor
        padded = model.train()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(nested[~mask], padded[~mask])
    assert not nested[mask].any()


@pytest.mark.parametrize(
    "method", [la.LoRA(rank=2), la.DoRA(rank=2), la.LoRAN(rank=2), la.AFALoRA(rank=2), la.VeRA(rank=2)]
)
def test_rows_of_unequal_length_in_a_nested_tensor(method):
    layer = nn.Sequential(nn.Linear(6, 5))
    la.attach(layer, method)
    move(layer)
    rows = [torch.randn(3, 6), torch.randn(4, 6)]
    y = layer(torch.nested.nested_tensor(rows, layout=torch.jagged))
    for got, row in zip(y.unbind(), rows, strict=True):
        torch.testing.assert_close(got, layer(row))
