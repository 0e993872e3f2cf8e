"""Networks for the tests of peft's format, and our methods on them."""

import torch
from torch import Tensor, nn

import lit_adapters as la
from tests.matrix import MODELS, build, linear, move

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class ConvNet(nn.Module):
    """Convolutions with stride and padding, a normalisation with running statistics, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.norm(self.conv1(x)).relu()).mean((2, 3)))


def fresh(name: str) -> nn.Module:
    if name != "convolutions":
        return build(name).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvNet().eval()


def head(name: str) -> str:
    return "head" if name == "convolutions" else MODELS[name].head


def run(name: str, network: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    return network(IMAGES.to(dtype)) if name == "convolutions" else MODELS[name].run(network, dtype)


def method(name: str, kind: type[la.Method] = la.LoRA, **settings) -> la.Method:
    targets = ["conv1", "conv2"] if name == "convolutions" else "all-linear"
    return kind(**{"rank": 2, "alpha": 3.0, "targets": targets} | settings)


KINDS = {
    "lora": {"kind": la.LoRA},
    "rslora": {"kind": la.LoRA, "rank": 3, "rslora": True},
    "dora": {"kind": la.DoRA},
    "afa": {"kind": la.AFALoRA},
}
NETWORKS = ["llama", "gpt2", "vit", "convolutions"]


def trained(name: str, kind: str = "lora", **settings) -> nn.Module:
    """A network with the method and its head off their start."""
    network = fresh(name)
    la.attach(network, method(name, **KINDS[kind] | settings), train=[head(name)])
    move(network)
    return linear(network)


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


class Nested(nn.Module):
    """Names that end one another, with a head whose name ends another's."""

    def __init__(self, other: str = "tail") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a = nn.ModuleDict({"fc1": nn.Linear(6, 6)})
            self.b = nn.ModuleDict({"a": nn.ModuleDict({"fc1": nn.Linear(6, 6), "fc": nn.Linear(6, 6)})})
            self.head = nn.Linear(6, 6)
            self.add_module(other, nn.Linear(6, 6))
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        x = self.b["a"]["fc"](self.b["a"]["fc1"](self.a["fc1"](x)))
        return self.get_submodule(self.other)(self.head(x))
