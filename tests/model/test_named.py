"""Several adapters in one model: chosen, together, by rows, saved, loaded and removed."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lit_adapters as la
from lit_adapters.ops.cache import Cache
from tests.matrix import ALL, METHODS, MODELS, UNMERGEABLE, build

OF_WEIGHTS = [name for name, method in METHODS.items() if all(part.kind == "linear" for part in method.parts())]


def move(model, seed):
    """Give every adapter parameter another value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, adapter in la.adapters(model):
            for parameter in adapter.adapter_parameters().values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def alone(name, method, seed, train=()):
    model = build(name).eval()
    torch.manual_seed(0)
    la.attach(model, method, train=train)
    move(model, seed)
    return model.eval()


def with_two(name, methods, train=((), ())):
    """A model with the adapters "a" and "b", and those of each alone."""
    model = build(name).eval()
    for key, method, trained, seed in zip("ab", methods, train, (1, 2), strict=True):
        torch.manual_seed(0)
        la.attach(model, method, train=trained, name=key)
        move(model, seed)
    return model, *(alone(name, m, s, t) for m, s, t in zip(methods, (1, 2), train, strict=True))


@pytest.mark.parametrize("method", [la.NoRA(groups=2, targets=["1"]), la.GroupAffine(groups=2, targets=["1"])])
def test_the_changes_of_an_activation_that_works_in_place_add_up(method):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))

    both, alone = model(), []
    for seed, name in enumerate("ab"):
        alone.append(model())
        for network, settings in ((both, {"name": name}), (alone[-1], {})):
            torch.manual_seed(seed)
            la.attach(network, method, **settings)
            move(network, seed)
    la.use(both, ["a", "b"])
    x = torch.randn(5, 8)
    y0 = x.relu()
    expected = y0 + sum(network[1](x.clone()) - y0 for network in alone)
    torch.testing.assert_close(both[1](x.clone()), expected)
    assert not torch.allclose(expected, y0, atol=1e-3)


@pytest.mark.parametrize("method", [la.LoRA(rank=2), la.LoRAN(rank=2)])
def test_a_set_that_waits_keeps_no_computed_values(method):
    model = nn.Sequential(nn.Linear(6, 8)).eval()
    for name in ("a", "b"):
        la.attach(model, method, name=name)
    adapters = {}
    for name in ("a", "b"):
        la.use(model, name)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(64, 6))
        adapters[name] = model[0]

    def kept(adapter):
        return [v.value for v in vars(adapter).values() if isinstance(v, Cache) and v.value is not None]

    assert kept(adapters["b"])
    assert not kept(adapters["a"])


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_each_acts_as_if_it_were_alone(name, method):
    run = MODELS[name].run
    with torch.no_grad():
        pretrained = run(build(name).eval())
        model, a, b = with_two(name, (ALL[method], ALL[method]))
        assert la.adapter_names(model) == ["a", "b"]
        for _ in range(2):
            la.use(model, "a")
            assert la.in_use(model) == ["a"]
            assert torch.equal(run(model), run(a))
            assert list(model.state_dict()) == list(a.state_dict())
            la.use(model, ["b"])
            assert torch.equal(run(model), run(b))
            la.use(model, [])
            assert torch.equal(run(model), pretrained)
            with la.using(model, "a"):
                assert torch.equal(run(model), run(a))
            assert la.in_use(model) == []


@pytest.mark.parametrize("method", METHODS)
def test_each_trains_as_if_it_were_alone(method):
    run = MODELS["llama"].run
    model, a, _ = with_two("llama", (METHODS[method], METHODS[method]))
    la.use(model, "a")
    for one in (model, a):
        run(one).sum().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    alone_trained = {n: p.grad for n, p in a.named_parameters() if p.requires_grad}
    assert trained.keys() == alone_trained.keys()
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, alone_trained[name], rtol=0, atol=0)


@pytest.mark.parametrize("method", [m for m in OF_WEIGHTS if m not in UNMERGEABLE])
def test_updates_of_weights_add_up(method):
    run = MODELS["llama"].run
    model, a, b = with_two("llama", (METHODS[method], la.DoRA(rank=3)))
    for one in (model, a, b):
        la.set_progress(one, 1.0)
    with la.using(model, "a"):
        la.set_progress(model, 1.0)
    base = build("llama").double().eval()
    expected = copy.deepcopy(base)
    parameters = dict(base.named_parameters())
    for one in (a, b):
        for adapter_name, adapter in la.adapters(one):
            for key, value in adapter.merged_parameters(torch.float64).items():
                layer = expected.get_submodule(adapter_name)
                before = parameters.get(f"{adapter_name}.{key}")
                if getattr(layer, key, None) is None:
                    setattr(layer, key, nn.Parameter(torch.zeros_like(value)))
                getattr(layer, key).data += value.detach() - (0 if before is None else before.detach())
    la.use(model, ["a", "b"])
    with torch.no_grad():
        torch.testing.assert_close(run(model).double(), run(expected), rtol=1e-5, atol=1e-5)
        together = run(model)
        la.merge(model, unload=False)
        torch.testing.assert_close(run(model), together, rtol=1e-5, atol=1e-5)
        la.unmerge(model)
        assert torch.equal(run(model), together)
        with la.disabled(model):
            assert torch.equal(run(model), run(build("llama").eval()))
        assert la.merge(model).merged
        assert not list(la.adapters(model))
        torch.testing.assert_close(run(model), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_add_their_changes(dtype):
    class OneActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.act, self.outer = nn.Identity(), nn.GELU(), nn.Identity()

        def forward(self, x):
            return self.outer(self.act(self.inner(x)))

    x = torch.randn(64, 8).to(dtype)
    model, functions = OneActivation(), {}
    for seed, key in enumerate("ab"):
        la.attach(model, la.NoRA(groups=4, targets=["act"], base="anchored", channel_dim=-1), name=key)
        move(model, seed)
        functions[key] = copy.deepcopy(model)
    la.use(model, ["a", "b"])
    y0 = nn.functional.gelu(x)
    expected = y0.double() + sum(f(x).double() - y0.double() for f in functions.values())
    torch.testing.assert_close(model(x), expected.to(dtype))
    with pytest.raises(la.AdapterError, match="no module without adapters computes what several do together"):
        la.merge(model)
    assert la.in_use(model) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, m) for name in ("vit", "llama") for m in ALL] + [(name, m) for name in ("bert", "gpt2") for m in METHODS],
)
def test_rows_with_adapters_of_their_own(name, method):
    model, a, b = with_two(name, (ALL[method], METHODS["nora++"]))
    inputs = torch.cat([MODELS[name].inputs()] * 3)[:5]
    inputs = inputs.flip(-1).roll(1, 0) if inputs.is_floating_point() else (inputs + torch.arange(5)[:, None]) % 40

    def run(network, x):
        output = network(x, **MODELS[name].arguments)
        return output if isinstance(output, torch.Tensor) else output.logits

    names = ["b", None, "a", "b", "a"]
    with torch.no_grad():
        with la.rows(model, names):
            mixed = run(model, inputs)
        assert la.in_use(model) == ["b"]
        pretrained = build(name).eval()
        for i, key in enumerate(names):
            one = {"a": a, "b": b, None: pretrained}[key]
            torch.testing.assert_close(mixed[i : i + 1], run(one, inputs[i : i + 1]), rtol=1e-4, atol=1e-5)


def test_what_rows_refuse():
    model, _, _ = with_two("llama", (METHODS["lora"], METHODS["nora"]))
    x = MODELS["llama"].inputs()
    with la.rows(model, ["a", "b", None]), pytest.raises(la.AdapterError, match=r"input \(2, 6, 32\) for 3 rows"):
        model(x)
    assert la.in_use(model) == ["b"]
    with pytest.raises(la.AdapterError, match="no adapters called 'c'; it has 'a', 'b'"), la.rows(model, ["c"]):
        pass
    with pytest.raises(la.AdapterError, match="names is empty"), la.rows(model, []):
        pass
    with la.rows(model, ["a", "b"]):
        for call in (lambda: la.attach(model, METHODS["lora"], name="c"), lambda: la.save_adapters(model, "nowhere")):
            with pytest.raises(la.AdapterError, match=r"inside this block of lit_adapters\.rows"):
                call()
        with pytest.raises(la.AdapterError, match="several do together"):
            la.merge(model)
    trained, _, _ = with_two("bert", (METHODS["lora"], METHODS["lora"]), ((), ["classifier"]))
    with pytest.raises(la.AdapterError, match=r"'b' train 'classifier\S+'"), la.rows(trained, ["a", "b"]):
        pass
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    la.attach(encoder, la.LoRA(rank=2, targets=["linear1"]))
    with pytest.raises(la.AdapterError, match="batch_first=False"), la.rows(encoder, ["default"]):
        pass


def test_each_has_its_own_head():
    model = build("bert").eval()
    start = copy.deepcopy(model.classifier)
    run = MODELS["bert"].run
    la.attach(model, METHODS["lora"], name="plain")
    outputs = {}
    for seed, key in enumerate(("first", "second")):
        la.attach(model, METHODS["lora"], train=["classifier"], name=key)
        assert torch.equal(model.classifier.weight, start.weight)
        assert model.classifier.weight.requires_grad
        move(model, seed)
        with torch.no_grad():
            model.classifier.weight.add_(seed + 1)
            outputs[key] = run(model)
    la.use(model, "plain")
    assert torch.equal(model.classifier.weight, start.weight)
    assert not model.classifier.weight.requires_grad
    for key, output in outputs.items():
        la.use(model, key)
        assert torch.equal(run(model), output)
    with pytest.raises(la.AdapterError, match=r"'first' and 'second' have different values of 'classifier\.\w+'"):
        la.use(model, ["first", "second"])
    la.use(model, ["plain", "second"])
    assert not torch.equal(model.classifier.weight, start.weight)
    la.detach(model, "second")
    assert la.adapter_names(model) == ["plain", "first"]
    assert la.in_use(model) == []
    assert torch.equal(model.classifier.weight, start.weight)
    la.use(model, "first")
    assert torch.equal(run(model), outputs["first"])


def test_a_head_that_is_trained_in_place_is_no_start_for_others():
    model = build("bert")
    la.attach(model, METHODS["lora"], train=["classifier"])
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(la.AdapterError, match=r"'classifier\.\w+' trains with the adapters 'default'"):
        la.attach(model, METHODS["lora"], name="other")
    assert la.adapter_names(model) == la.in_use(model) == ["default"]
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    la.attach(model, METHODS["dora"], train=["classifier"], name="other")
    assert model.classifier.weight.requires_grad
    with torch.no_grad():
        model.classifier.weight.zero_()
    la.use(model, "default")
    assert torch.equal(model.classifier.weight, before["classifier.weight"])


def test_each_has_its_own_running_statistics():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    la.attach(model, la.LoRA(rank=2, targets=["0"]), name="a")
    model(torch.randn(8, 4) + 5)
    of_a = model[1].running_mean.clone()
    la.attach(model, la.LoRA(rank=2, targets=["0"]), name="b")
    model(torch.randn(8, 4) - 50)
    of_b = model[1].running_mean.clone()
    la.use(model, "a")
    assert torch.equal(model[1].running_mean, of_a)
    la.use(model, "b")
    assert torch.equal(model[1].running_mean, of_b)
    with pytest.raises(la.AdapterError, match=r"different values of '1\.\w+'"):
        la.use(model, ["a", "b"])
    assert la.in_use(model) == ["b"]


@pytest.mark.filterwarnings("ignore:.*still nonlinear:UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_by_name(method, tmp_path):
    run = MODELS["bert"].run
    model, a, b = with_two("bert", (METHODS[method], la.DoRA(rank=3)), (["classifier"], ["classifier"]))
    la.use(model, "a")
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
        a.classifier.bias.add_(1.0)
    la.use(model, "b")
    la.save_adapters(model, tmp_path / "a", name="a")
    assert la.in_use(model) == ["b"]
    la.save_adapters(model, tmp_path / "b")
    loaded = build("bert").eval()
    for key in "ba":
        la.load_adapters(loaded, tmp_path / key, name=key)
        assert la.in_use(loaded) == [key]
    with torch.no_grad():
        for key, one in (("a", a), ("b", b)):
            la.use(loaded, key)
            assert torch.equal(run(loaded), run(one))
    fresh = build("bert").eval()
    la.load_adapters(fresh, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(run(fresh), run(a))


def test_a_load_that_fails_changes_nothing(tmp_path):
    model, _, b = with_two("llama", (METHODS["lora"], METHODS["nora"]))
    la.save_adapters(model, tmp_path)
    with pytest.raises(la.AdapterError, match="already has adapters"):
        la.load_adapters(model, tmp_path, name="a")
    header = tmp_path / "lit_adapter.json"
    file = tmp_path / "lit_adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(la.AdapterError):
        la.load_adapters(model, tmp_path, name="c")
    assert header.exists()
    assert la.adapter_names(model) == ["a", "b"]
    assert la.in_use(model) == ["b"]
    with torch.no_grad():
        assert torch.equal(MODELS["llama"].run(model), MODELS["llama"].run(b))


def test_an_attach_that_fails_changes_nothing():
    model, a, _ = with_two("llama", (METHODS["lora"], METHODS["nora"]))
    la.use(model, "a")
    for wrong in (la.LoRA(rank=999), la.LoRA(targets=["nowhere"])):
        with pytest.raises(la.AdapterError):
            la.attach(model, wrong, name="c")
        assert la.adapter_names(model) == ["a", "b"]
        assert la.in_use(model) == ["a"]
    with torch.no_grad():
        assert torch.equal(MODELS["llama"].run(model), MODELS["llama"].run(a))


@pytest.mark.parametrize("method", METHODS)
def test_removed_without_touching_others(method):
    run = MODELS["llama"].run
    base = build("llama").eval()
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    model, a, _ = with_two("llama", (METHODS[method], METHODS["nora++"]))
    with torch.no_grad():
        la.detach(model, "b")
        assert torch.equal(run(model), run(base))
        la.use(model, "a")
        assert torch.equal(run(model), run(a))
        la.attach(model, METHODS["nora++"], name="b")
        la.detach(model, "a")
        assert la.in_use(model) == ["b"]
        la.detach(model, "b")
        assert la.adapter_names(model) == []
        assert torch.equal(run(model), run(base))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: torch.load(save(m), weights_only=False)])
@pytest.mark.parametrize("method", METHODS)
def test_copies_have_all_adapters(method, copied):
    run = MODELS["llama"].run
    model, a, b = with_two("llama", (METHODS[method], METHODS["nora"]))
    other = copied(model)
    move(model, 7)
    with torch.no_grad():
        assert torch.equal(run(other), run(b))
        la.use(other, "a")
        assert torch.equal(run(other), run(a))
        la.use(other, ["a", "b"])
        run(copied(other))


def save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_moved_and_cast_with_the_model():
    model, _, b = with_two("bert", (METHODS["lora"], METHODS["nora"]), ((), ["classifier"]))
    la.use(model, "a")
    model.to(torch.bfloat16)
    la.use(model, "b")
    b.to(torch.bfloat16)
    assert model.classifier.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for _, x in la.adapters(model) for p in x.adapter_parameters().values())
    with torch.no_grad():
        assert torch.equal(MODELS["bert"].run(model), MODELS["bert"].run(b))
        la.use(model, ["a"])
        model.train()
        assert all(x.training for _, x in la.adapters(model))
        model.eval()
        la.use(model, "b")
        assert not any(x.training for _, x in la.adapters(model))


def test_hooks_of_the_layers_stay():
    model = build("llama").eval()
    calls = []
    layer = model.model.layers[0].mlp.down_proj
    handle = layer.register_forward_hook(lambda *args: calls.append(1))
    la.attach(model, METHODS["lora"], name="a")
    la.attach(model, METHODS["dora"], name="b")
    for names in ("a", ["a", "b"], [], "b"):
        la.use(model, names)
        MODELS["llama"].run(model)
    assert len(calls) == 4
    handle.remove()
    for names in ("a", ["a", "b"]):
        la.use(model, names)
        MODELS["llama"].run(model)
    assert len(calls) == 4


def test_to_lora_of_one_of_several():
    model, a, b = with_two("bert", (METHODS["lora"], METHODS["dora"]), (["classifier"], ["classifier"]))
    la.use(model, "a")
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
        a.classifier.bias.add_(1.0)
        la.to_lora(model, rank=2)
        assert la.in_use(model) == ["a"]
        torch.testing.assert_close(MODELS["bert"].run(model), MODELS["bert"].run(a), rtol=1e-4, atol=1e-5)
        la.use(model, "b")
        assert torch.equal(MODELS["bert"].run(model), MODELS["bert"].run(b))


def test_what_is_refused():
    model, _, _ = with_two("llama", (METHODS["lora"], METHODS["lora"]))
    with pytest.raises(la.AdapterError, match="already has adapters"):
        la.attach(model, METHODS["lora"], name="a")
    for wrong in ("", None, 3):
        with pytest.raises(la.AdapterError, match="must be a text"):
            la.attach(model, METHODS["lora"], name=wrong)
    with pytest.raises(la.AdapterError, match="no adapters called 'c'"):
        la.use(model, ["a", "c"])
    with pytest.raises(la.AdapterError, match="no adapters called 'c'"):
        la.detach(model, "c")
    with pytest.raises(la.AdapterError, match="'a' were trained on"):
        la.merge(model)
    la.merge(model, unload=False)
    for call in (lambda: la.use(model, "a"), lambda: la.attach(model, METHODS["lora"], name="c")):
        with pytest.raises(la.AdapterError, match=r"is merged; call lit_adapters\.unmerge"):
            call()
    la.unmerge(model)
    la.use(model, ["a", "b"])
    with pytest.raises(la.AdapterError, match="are in use together"):
        la.save_adapters(model, "nowhere")
    with pytest.raises(la.AdapterError, match="a state dict would lack the adapters 'a', 'b'"):
        model.state_dict()
    la.use(model, [])
    with pytest.raises(la.AdapterError, match=r"no adapter is in use: call lit_adapters.use\(model, 'a'\)"):
        la.merge(model)
    with pytest.raises(la.AdapterError, match="no adapters called 'a'; it has none"):
        la.use(build("llama"), "a")


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 compiles for each module object")
@pytest.mark.parametrize("method", ["lora", "loran", "nora++"])
def test_another_adapter_compiles_nothing_anew(method):
    run = MODELS["llama"].run
    model, a, b = with_two("llama", (METHODS[method], METHODS[method]))
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        for key in "abab":
            la.use(model, key)
            torch.testing.assert_close(run(compiled), run({"a": a, "b": b}[key]), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    for seed, key in enumerate("ab"):
        la.attach(model, la.LoRA(rank=2, targets=["0", "2"]), name=key)
        move(model, seed)
    return model.eval()


def test_a_sum_and_rows_of_the_same_names_are_not_confused(tmp_path):
    model, x = small(), torch.randn(2, 4)
    la.use(model, ["a", "b"])
    together = model(x)
    with la.rows(model, ["a", "b"]):
        by_rows = model(x)
        with la.using(model, "a"):
            one = model(x)
        assert torch.equal(model(x), by_rows)
        with la.using(model, ["a", "b"]):
            assert torch.equal(model(x), together)
        assert torch.equal(model(x), by_rows)
    assert torch.equal(model(x), together)
    la.use(model, "a")
    for names in (["a", None], ["a", "a"], [None, None]):
        with la.rows(model, names), pytest.raises(la.AdapterError, match="inside this block"):
            la.save_adapters(model, tmp_path)
        assert la.in_use(model) == ["a"]
        torch.testing.assert_close(model(torch.cat([x, x]))[:2], model(x))
        assert all(p.requires_grad for _, a in la.adapters(model) for p in a.adapter_parameters().values())
    torch.testing.assert_close(model(x), one)
    la.use(model, [])
    with la.rows(model, [None, None]):
        pass
    with pytest.raises(la.AdapterError, match="no adapter is in use"):
        la.save_adapters(model, tmp_path)


def test_adapters_in_use_together_do_not_train():
    model, x = small(), torch.randn(2, 4)
    la.use(model, "a")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    la.use(model, ["a", "b"])
    given = x.clone().requires_grad_()
    model(given).sum().backward()
    assert given.grad.any()  # the input has its gradient
    optimizer.step()
    la.use(model, "a")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert [p.requires_grad for p in optimizer.param_groups[0]["params"]] == [True] * 4


def test_dropout_does_not_act_while_several_are_in_use():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    for key in "ab":
        la.attach(model, la.LoRA(rank=2, targets=["0"], dropout=0.5), name=key)
        move(model, 1)
    la.use(model, ["a", "b"])
    model.train()
    x = torch.randn(5, 4)
    assert torch.equal(model(x), model(x))
    la.use(model, "a")
    assert model[0].training


def test_rows_have_the_running_statistics_of_their_adapters():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    for key, shift in (("a", 5), ("b", -50)):
        la.attach(model, la.LoRA(rank=2, targets=["0"]), name=key)
        model.train()(torch.randn(8, 4) + shift)
        model.eval()
    x = torch.randn(2, 4)
    for key in "ab":
        la.use(model, key)
        expected = model(x)
        with la.rows(model, [key, key]):
            torch.testing.assert_close(model(x), expected)


def test_a_change_that_fails_leaves_the_adapters_in_use():
    model = small()
    la.use(model, "a")
    before = model(torch.ones(1, 4))
    model[2] = nn.Linear(4, 4)
    for call in (
        lambda: la.use(model, "b"),
        lambda: la.use(model, ["a", "b"]),
        lambda: la.rows(model, ["b"]).__enter__(),
    ):
        with pytest.raises(la.AdapterError, match="'2' is another module now"):
            call()
        assert la.in_use(model) == ["a"]
        assert isinstance(model[0], la.AdapterModule)
    assert before.shape == (1, 4)


def test_what_the_user_has_unfrozen_stays_so(tmp_path):
    model = small()
    la.use(model, "a")
    model[0].bias.requires_grad_(True)
    la.save_adapters(model, tmp_path / "b", name="b")
    assert model[0].bias.requires_grad
    la.use(model, "b")
    assert not model[0].bias.requires_grad
    la.use(model, "a")
    assert model[0].bias.requires_grad
    with torch.no_grad():
        model[0].bias.add_(1.0)
    la.save_adapters(model, tmp_path / "a")
    other = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    la.attach(other, la.LoRA(rank=2, targets=["0"]), name="first")
    with pytest.raises(la.AdapterError, match=r"holds '0\.bias' of the base, which was unfrozen"):
        la.load_adapters(other, tmp_path / "a", name="second")
    assert la.in_use(other) == ["first"]


def test_a_hook_on_an_activation_while_several_are_in_use():
    model, calls = build("llama").eval(), []
    for key in "ab":
        la.attach(model, METHODS["nora"], name=key)
    la.use(model, ["a", "b"])
    handle = model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *args: calls.append(1))
    for names in (["a", "b"], "b"):
        la.use(model, names)
        MODELS["llama"].run(model)
    assert len(calls) == 2
    handle.remove()
