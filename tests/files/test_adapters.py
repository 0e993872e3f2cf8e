"""Adapter directories: what is in them, and every way in which one can be wrong."""

import json
import os
from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lit_adapters as la
from lit_adapters.files import adapters as checkpoint
from lit_adapters.files.adapters import CARD, HEADER, TENSORS


def base(classes=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.BatchNorm1d(16), nn.Linear(16, classes))


METHODS = [la.NoRA(groups=4), la.LoRA(rank=2, targets=["0"])]


@pytest.fixture
def saved(tmp_path):
    """A trained model and the directory it was saved to."""
    model = base()
    la.attach(model, METHODS, train=["3"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model(torch.randn(8, 4))  # moves the running statistics
    la.save_adapters(model, tmp_path / "adapter")
    return model.eval(), tmp_path / "adapter"


def test_everything_that_changed_comes_back(saved):
    model, directory = saved
    loaded = base()
    la.load_adapters(loaded, directory)
    x = torch.randn(5, 4)
    assert torch.equal(loaded.eval()(x), model(x))
    assert loaded[2].running_mean.abs().sum() > 0


def test_files_are_small_and_no_foreign_names(saved):
    model, directory = saved
    assert sorted(os.listdir(directory)) == [CARD, HEADER, TENSORS]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert (directory / TENSORS).stat().st_size <= 4 * trained + buffers + 64 * 1024
    header = json.loads((directory / HEADER).read_text())
    with safe_open(directory / TENSORS, framework="pt") as file:
        assert json.loads(file.metadata()["lit_adapter"]) == header


def refuses(directory, message, model=None):
    """Loading raises, and leaves the model as it was."""
    model = model or base()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(la.AdapterError, match=message):
        la.load_adapters(model, directory)
    assert not list(la.adapters(model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_missing(tmp_path):
    refuses(tmp_path, "does not exist")


def test_torn(saved):
    _, directory = saved
    content = (directory / TENSORS).read_bytes()
    for length in (0, 7, 100, len(content) - 1):
        (directory / TENSORS).write_bytes(content[:length])
        refuses(directory, "torn or not a safetensors file")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"lit_adapter": "{"}, {"lit_adapter": "[1]"}])
def test_foreign(tmp_path, metadata):
    save_file({"lora_A": torch.zeros(2)}, tmp_path / TENSORS, metadata=metadata)
    refuses(tmp_path, "not written by lit_adapters")


def rewrite(directory, change=lambda header: None, tensors=lambda tensors: None):
    """Save the directory anew with a changed header or changed tensors, without checksums as in version 0.1."""
    with safe_open(directory / TENSORS, framework="pt") as file:
        header = json.loads(file.metadata()["lit_adapter"])
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    header.pop("checksums", None)
    header["base"].pop("fingerprint", None)
    change(header)
    tensors(content)
    save_file(content, directory / TENSORS, metadata={"lit_adapter": json.dumps(header)})
    (directory / HEADER).write_text(json.dumps(header))


def test_newer_format(saved):
    _, directory = saved
    rewrite(directory, lambda header: header.update(format=99))
    refuses(directory, "format 99")


def test_header_that_was_edited_by_hand(saved):
    _, directory = saved
    header = json.loads((directory / HEADER).read_text())
    (directory / HEADER).write_text(json.dumps(header | {"train": []}))
    refuses(directory, "do not belong together")
    (directory / HEADER).unlink()
    la.load_adapters(base(), directory)  # the tensor file is complete in itself


def test_missing_unexpected_and_misshapen_tensors(saved):
    _, directory = saved
    rewrite(directory, tensors=lambda t: t.pop("0.lora_A"))
    refuses(directory, r"missing \['0.lora_A'\]")
    rewrite(directory, tensors=lambda t: t.update({"0.lora_A": torch.zeros(2, 4), "extra": torch.zeros(1)}))
    refuses(directory, r"unexpected \['extra'\]")
    rewrite(directory, tensors=lambda t: (t.pop("extra"), t.update({"0.lora_A": torch.zeros(3, 4)})))
    refuses(directory, r"other shapes \['0.lora_A'\]")


def test_another_base(saved):
    _, directory = saved
    refuses(directory, r"another base model: '3.weight' is 3x16 there and 7x16 here", base(classes=7))
    with pytest.warns(UserWarning, match="other weights of this architecture"):
        la.load_adapters(base(seed=1), directory)


def test_storage_dtype_of_the_base_does_not_matter(saved, recwarn):
    _, directory = saved
    la.load_adapters(base().bfloat16(), directory)
    assert not [w for w in recwarn if "other weights" in str(w.message)]


def test_onto_a_meta_model(saved):
    """Adapters and modules of `train` become real; the base may be loaded after or before."""
    model, directory = saved
    with torch.device("meta"):
        empty = base()
    la.load_adapters(empty, directory)
    empty.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(5, 4)
    assert torch.equal(empty.eval()(x), model(x))

    with torch.device("meta"):
        empty = base()
    la.load_adapters(empty, directory)
    kept = {n for n, p in empty.named_parameters() if p.requires_grad}
    assert {n for n, p in empty.named_parameters() if not p.is_meta} == kept
    base_only = {k: v for k, v in model.state_dict().items() if k not in kept}
    empty.load_state_dict(base_only, strict=False, assign=True)
    assert torch.equal(empty.eval()(x), model(x))


@dataclass
class OwnMethod(la.LoRA):
    """A method of a user's own."""

    strength: float = 1.0


def test_a_method_from_elsewhere(tmp_path):
    model, loaded = base(), base()
    la.attach(model, OwnMethod(rank=2, strength=3.0))
    la.save_adapters(model, tmp_path)
    (method,) = json.loads((tmp_path / HEADER).read_text())["methods"]
    assert method["class_path"] == f"{__name__}.OwnMethod"
    assert method["init_args"]["strength"] == 3.0
    la.load_adapters(loaded, tmp_path)


def test_what_is_not_finite_is_not_written(saved):
    model, directory = saved
    before = (directory / TENSORS).read_bytes()
    with torch.no_grad():
        model[0].lora_B[0, 0] = float("nan")
    with pytest.raises(la.AdapterError, match=r"'0.lora_B' is not finite"):
        la.save_adapters(model, directory)
    assert (directory / TENSORS).read_bytes() == before


def test_a_write_that_fails_half_way_leaves_the_old_files(saved, monkeypatch):
    model, directory = saved
    before = {name: (directory / name).read_bytes() for name in (CARD, TENSORS, HEADER)}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(la.AdapterError, match="no space left"):
        la.save_adapters(model, directory)
    assert {name: (directory / name).read_bytes() for name in os.listdir(directory)} == before


def test_without_adapters_there_is_nothing_to_save(tmp_path):
    with pytest.raises(la.AdapterError, match=r"call lit_adapters\.attach"):
        la.save_adapters(base(), tmp_path)


def test_saving_while_merged_keeps_the_base_recognisable(saved, tmp_path, recwarn):
    model, _ = saved
    la.merge(model, unload=False)
    la.save_adapters(model, tmp_path / "again")
    la.load_adapters(base(), tmp_path / "again")
    assert not [w for w in recwarn if "other weights" in str(w.message)]
