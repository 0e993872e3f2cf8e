"""LoRA as pipelines of diffusers load it: one safetensors file, `pipeline.load_lora_weights(directory)`."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lit_adapters.errors import AdapterError
from lit_adapters.files.atomic import write_together
from lit_adapters.files.peft import check_expressible, pair_tensors
from lit_adapters.methods.dora import DoRAAdapter
from lit_adapters.methods.low_rank import LowRankAdapter
from lit_adapters.model.meta import require_loaded
from lit_adapters.model.record import adapters, attachment, inner, unfrozen
from lit_adapters.model.sharding import refuse_sharded

FILE = "pytorch_lora_weights.safetensors"


def export_diffusers(model: nn.Module, directory: str | Path, component: str | None = None) -> None:
    """Write the LoRA of a part of a pipeline for `pipeline.load_lora_weights(directory)`.

    What the file already holds of other components stays, so that a denoiser and its text encoder go into one directory
    by two calls. B is written with the scale in it, and smaller ranks are filled up with zeros, so that the file needs
    no alpha.
    `lit_adapters.to_lora` makes LoRA of other methods first.

    Args:
        model: The part of the pipeline that was given to `attach`.
        directory: Where to; created if missing.
        component: Its name in the pipeline: "unet", "transformer", "text_encoder" or "text_encoder_2". By default
            "unet" for a class whose name begins with UNet, "text_encoder" for a model of transformers, and
            "transformer" for others.

    Raises:
        AdapterError: An adapter is neither LoRA nor AFA-LoRA at beta = 0, is merged, or is not finite; something else
            trains, which the format cannot hold; the model is sharded or on the meta device; or the directory holds
            a file that cannot be read. Nothing is written then.
    """
    model = inner(model)
    refuse_sharded(model, "export_diffusers")
    require_loaded(model, "export_diffusers")
    component = component or _component(model)
    others = [*attachment(model).trained_parameters, *unfrozen(model)]
    if others:
        raise AdapterError(f"{others[0]!r} trains besides the adapters, and the format of diffusers has LoRA alone")
    ranks = [a.update_rank for _, a in adapters(model) if isinstance(a, LowRankAdapter)]
    tensors = {}
    for name, adapter in adapters(model):
        if isinstance(adapter, DoRAAdapter):
            raise AdapterError(f"{name!r} has dora; call lit_adapters.to_lora(model, rank) first")
        for key, value in pair_tensors(check_expressible(name, adapter)).items():
            dimension = 1 if key == "lora_B.weight" else 0
            scaled = adapter.scaling * value if dimension else value  # type: ignore[operator]
            # The loader takes one alpha for all layers where there is none, so that all have one rank.
            missing = list(scaled.shape)
            missing[dimension] = max(ranks) - scaled.shape[dimension]
            whole = torch.cat([scaled, scaled.new_zeros(missing)], dim=dimension)
            tensors[f"{component}.{name}.{key}"] = whole.detach().cpu().clone().contiguous()
    if not tensors:
        raise AdapterError("the model has no adapters")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise AdapterError(f"{broken[0]!r} is not finite; nothing was written to {directory}")
    tensors |= _of_other_components(Path(directory, FILE), component)
    write_together(Path(directory), {FILE: lambda path: save_file(tensors, path, metadata={"format": "pt"})})


def _component(model: nn.Module) -> str:
    """What a pipeline of diffusers calls a model of this kind."""
    if type(model).__name__.startswith("UNet"):
        return "unet"
    return "text_encoder" if type(model).__module__.startswith("transformers.") else "transformer"


def _of_other_components(file: Path, component: str) -> dict[str, torch.Tensor]:
    """The tensors of a file that belong to other parts of the pipeline.

    Raises:
        AdapterError: The file is torn.
    """
    if not file.is_file():
        return {}
    try:
        return {name: tensor for name, tensor in load_file(file).items() if not name.startswith(f"{component}.")}
    except SafetensorError as error:
        raise AdapterError(f"{file} is damaged ({error}): remove it, or give another directory") from error
