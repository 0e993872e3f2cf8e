"""What tracers and exporters record of every method computes what the model computes, without this package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import lit_adapters as la
from lit_adapters.ops import rational, rational_reference
from tests.matrix import ALL, MODELS, UNMERGEABLE, adapted, linear, move

TOLERANCE = 1e-5  # of the largest entry

pytestmark = pytest.mark.filterwarnings("ignore:.*(jit.trace|TorchScript|legacy|isinstance).*")  # PyTorch's own
METHODS = ALL | {
    "loran-tanh": la.LoRAN(rank=2, function="tanh"),
    "nora-5/3": la.NoRA(groups=2, degrees=(5, 3), denominator="sum-of-abs", base="anchored"),
    "nora-4/4": la.NoRA(groups=2, degrees=(4, 4)),
    "peft": la.Peft(config=peft.LoraConfig(r=2, target_modules=["0", "2"])),
}
# In the fast tests, a method of each kind; the others take seconds.
KINDS = ("dora", "loran", "bitfit", "nora-anchored")
SOME = [pytest.param(m, marks=() if m in KINDS else pytest.mark.slow) for m in METHODS]


def network(method: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A trained model, which has kept values of its last forward, and AFA-LoRA with beta between 0 and 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3)).to(dtype)
    la.attach(model, METHODS[method])
    move(model)
    la.set_progress(model, 0.1)
    model.eval()
    with torch.no_grad():
        model(inputs(dtype)[0])
    return model


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """What is traced, and larger values in another number of rows."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(rows, 8, generator=generator) for rows in (5, 7))
    return first.to(dtype), (4 * second).to(dtype)


def assert_alike(recorded: Callable[[Tensor], Tensor], model: nn.Module, examples: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        for x in examples:
            expected, found = model(x).float(), recorded(x).float()
            tolerance = TOLERANCE if x.dtype != torch.bfloat16 else 2e-2
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def onnx_runtime(file: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (name,) = [value.name for value in session.get_inputs()]
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def by_trace(model: nn.Module, x: Tensor, file: Path) -> None:
    """Export by the older of the two exporters of ONNX."""
    torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "rows"}})


def export(model: nn.Module, x: Tensor, strict: bool = False) -> torch.export.ExportedProgram:
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("rows", min=2, max=64)},), strict=strict)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    ours = [str(node.target) for graph in graphs for node in graph.nodes if "lit_adapters" in str(node.target)]
    assert not ours  # operators that a program without this package does not have
    return program


@pytest.mark.parametrize("method", [m if m in ALL else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_trace(method):
    model, examples = network(method), inputs()
    assert_alike(torch.jit.trace(model, examples[0]), model, examples)


@pytest.mark.parametrize("method", ["lora", "dora", "loran", "bitfit"])
def test_trace_of_a_merged_model(method):
    model, examples = network(method), inputs()
    la.merge(model, unload=False)
    assert_alike(torch.jit.trace(model, examples[0]), model, examples)


@pytest.mark.parametrize("method", SOME)
def test_onnx_by_trace(method, tmp_path):
    model, examples = network(method), inputs()
    by_trace(model, examples[0], tmp_path / "m.onnx")
    assert_alike(onnx_runtime(tmp_path / "m.onnx"), model, examples)


@pytest.mark.parametrize("method", SOME)
def test_export(method):
    model, examples = network(method), inputs()
    assert_alike(export(model, examples[0]).module(), model, examples)


@pytest.mark.parametrize("method", ["dora", "loran", "nora", "bitfit"])
def test_a_graph_of_fx(method):
    """It reads the weights it was made with, and nothing that was kept from a call before."""
    model, (x, _) = network(method), inputs()
    with torch.no_grad():
        graph = make_fx(model)(x)
    assert_alike(graph, model, (x, 3 * x))


@pytest.mark.parametrize("method", ["nora", "group_affine"])
def test_a_merged_function(method, tmp_path):
    model, examples = network(method), inputs()
    la.merge(model)
    assert_alike(torch.jit.trace(model, examples[0]), model, examples)
    assert_alike(export(model, examples[0]).module(), model, examples)
    by_trace(model, examples[0], tmp_path / "m.onnx")
    assert_alike(onnx_runtime(tmp_path / "m.onnx"), model, examples)


@pytest.mark.parametrize("form", ["abs-of-sum", "sum-of-abs"])
@pytest.mark.parametrize("degrees", [(5, 4), (4, 4), (3, 4), (5, 3)])
def test_the_formula_does_not_overflow(form, degrees):
    """The powers of 1e30 are too large for float32, R(1e30) is not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, generator=generator) * torch.tensor([1.0, 10.0, 1e5, 1e15]).unsqueeze(1)
    a, b = (torch.randn(2, k, generator=generator).abs() + 0.1 for k in (degrees[0] + 1, degrees[1]))
    expected = rational_reference(x.double(), a.double(), b.double(), form)
    found = make_fx(lambda x: rational(x, a, b, form))(x)(x)
    fits = expected.abs() < 1e37
    assert ((found - expected).abs() <= TOLERANCE * expected.abs())[fits].all()
    assert fits.sum() >= 18


@pytest.mark.parametrize("method", ["lora", "dora", "loran", "afa", "vera", "bitfit", "nora", "group_affine", "peft"])
def test_symbols_and_scripts_are_refused(method):
    model = network(method)
    with pytest.raises(la.AdapterError, match=r"torch\.fx\.symbolic_trace cannot follow '\d'.* use torch\.export"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(la.AdapterError, match=r"torch\.jit\.script cannot compile '\d'.* use torch\.export"):
        torch.jit.script(model)
    assert_alike(model, model, inputs())  # still whole


@pytest.mark.parametrize("method", ["lora", "dora", "loran", "vera", "bitfit", "nora", "group_affine"])
def test_symbols_and_scripts_of_a_merged_model(method):
    model, examples = network(method), inputs()
    la.merge(model)
    if method in ("nora", "group_affine"):
        left = {"nora": "RationalActivation", "group_affine": "AffineActivation"}[method]
        with pytest.raises(la.AdapterError, match=f"symbolic_trace cannot follow '{left}'"):
            torch.fx.symbolic_trace(model)
        with pytest.raises(la.AdapterError, match=f"script cannot compile '{left}'"):
            torch.jit.script(model)
        return
    assert_alike(torch.fx.symbolic_trace(model), model, examples)
    assert_alike(torch.jit.script(model), model, examples)


@pytest.mark.parametrize("method", ["dora", "loran", "afa", "nora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_trace_of_other_dtypes(method, dtype):
    model, examples = network(method, dtype), inputs(dtype)
    assert_alike(torch.jit.trace(model, examples[0], check_trace=False), model, examples)


def test_a_graph_in_bfloat16_exports(tmp_path):
    by_trace(network("afa", torch.bfloat16), inputs(torch.bfloat16)[0], tmp_path / "m.onnx")


@pytest.mark.parametrize("method", ["lora", "dora", "loran", "afa", "nora", "bitfit"])
def test_a_model_in_train_mode(method):
    """AFA-LoRA asks for its annealing, and weights are kept, only outside of a trace."""
    model, examples = network(method).train(), inputs()
    assert_alike(torch.jit.trace(model, examples[0]), model, examples)


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_programs_run_where_this_package_is_not(merged, tmp_path):
    """One process runs the programs of all methods, as starting one takes seconds."""
    models = {method: network(method) for method in METHODS if not (merged and method in UNMERGEABLE)}
    x, other = inputs()
    torch.save(other, tmp_path / "x")
    for method, model in models.items():
        folder = tmp_path / method.replace("/", "-")
        folder.mkdir()
        if merged:
            la.merge(linear(model))
        torch.export.save(export(model, x, strict=True), folder / "m.pt2")
    program = (
        "import sys, torch; sys.modules['lit_adapters'] = None; x = torch.load('x')\n"
        "for folder in sys.argv[1:]: "
        "torch.save(torch.export.load(folder + '/m.pt2').module()(x).detach(), folder + '/y.pt')"
    )
    folders = {method: method.replace("/", "-") for method in models}
    subprocess.run([sys.executable, "-c", program, *folders.values()], check=True, cwd=tmp_path)
    for method, model in models.items():
        assert_alike(lambda _, folder=folders[method]: torch.load(tmp_path / folder / "y.pt"), model, (other,))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_onnx_by_export(method, tmp_path):
    model, examples = network(method), inputs()
    shapes = ({0: Dim("rows", min=2, max=64)},)
    torch.onnx.export(model, examples[:1], tmp_path / "m.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert_alike(onnx_runtime(tmp_path / "m.onnx"), model, examples)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [la.NoRA, la.GroupAffine])
@pytest.mark.parametrize("channel_dim", [1, -3])
def test_channels_that_are_not_last_with_the_older_onnx_exporter(method, channel_dim, tmp_path):
    """It cannot exchange dimensions that are counted from the end."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(), nn.Conv2d(4, 3, 1)).eval()
    la.attach(model, method(groups=2, targets=["1"], channel_dim=channel_dim))
    move(model)
    examples = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    torch.onnx.export(model, examples[:1], tmp_path / "m.onnx", dynamo=False)
    assert_alike(onnx_runtime(tmp_path / "m.onnx"), model, examples)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "loran", "bitfit", "nora", "nora-anchored", "afa-rational"])
def test_compiled_ahead_of_time(method):
    model, examples = network(method), inputs()
    package = torch._inductor.aoti_compile_and_package(export(model, examples[0]))
    assert_alike(torch._inductor.aoti_load_package(package), model, examples)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "gpt2", "bert", "llama"])
@pytest.mark.parametrize("method", ["lora", "dora", "loran", "afa", "vera", "bitfit", "nora", "nora++-dora"])
def test_whole_models(method, name):
    model = Logits(adapted(name, method).eval(), MODELS[name].arguments)
    x = MODELS[name].inputs()
    other = x.flip(1) if MODELS[name].vocabulary else 2 * x
    assert_alike(torch.jit.trace(model, x), model, (x, other))
    assert_alike(export(model, x).module(), model, (x, torch.cat([other, x])))


class Logits(nn.Module):
    """A network that returns logits alone."""

    def __init__(self, network: nn.Module, arguments: dict[str, object]) -> None:
        super().__init__()
        self.network, self.arguments = network, arguments

    def forward(self, x: Tensor) -> Tensor:
        output = self.network(x, **self.arguments)
        return output if isinstance(output, Tensor) else output.logits
