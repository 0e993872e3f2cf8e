"""Damaged and hostile adapter directories: one AdapterError, before anything of the model is touched."""

import itertools
import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lit_adapters as la
from lit_adapters.files.adapters import HEADER, TENSORS
from lit_adapters.files.saved import read_saved
from lit_adapters.learned import summary
from tests.mutations import byte_edits, json_edits


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.BatchNorm1d(8), nn.Linear(8, 3))


METHODS = [la.NoRA(groups=4), la.AFALoRA(rank=2, targets=["0"], rank_pattern={"0": 3})]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The content of the tensor file of a trained model."""
    folder, model = tmp_path_factory.mktemp("written"), base()
    la.attach(model, METHODS, train=["3"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    la.save_adapters(model, folder)
    return (folder / TENSORS).read_bytes()


@pytest.fixture
def parts(written, tmp_path):
    """The header without checksums, as version 0.1 wrote it, and the tensors."""
    (tmp_path / TENSORS).write_bytes(written)
    with safe_open(tmp_path / TENSORS, framework="pt") as file:
        header = json.loads(file.metadata()["lit_adapter"])
        # Copies: older versions map the file, which the tests write again.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    del header["checksums"], header["base"]["fingerprint"]
    return header, tensors


class Unchanged:
    """A base model, and the check that it is as before, module for module and bit for bit."""

    def __init__(self):
        self.model = base()
        self.modules = [(n, id(m)) for n, m in self.model.named_modules()]
        self.values = {n: (id(t), t.clone()) for n, t in self.model.state_dict(keep_vars=True).items()}

    def check(self):
        assert [(n, id(m)) for n, m in self.model.named_modules()] == self.modules
        now = self.model.state_dict(keep_vars=True)
        assert now.keys() == self.values.keys()
        assert all(id(now[n]) == i and torch.equal(now[n], value) for n, (i, value) in self.values.items())
        assert all(p.requires_grad for p in self.model.parameters())
        assert not self.model._load_state_dict_post_hooks
        assert not self.model._load_state_dict_pre_hooks
        assert "_lit_adapters" not in self.model.__dict__


def tried(directory, before):
    """Load and inspect a directory; whether it was refused, each time by an AdapterError.

    Returns:
        Whether loading was refused; the base model is then checked, and otherwise replaced by the caller.
    """
    try:
        la.load_adapters(before.model, directory)
        refused = False
    except la.AdapterError:
        before.check()
        refused = True
    try:
        saved = read_saved(directory)
        summary.report(saved, summary.summarise(saved))
    except la.AdapterError:
        pass
    return refused


def write(directory, header, tensors):
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, directory / TENSORS, metadata={"lit_adapter": text})


def test_every_flipped_bit_is_noticed(written, tmp_path):
    generator, before = random.Random(0), Unchanged()
    for place in [*range(8), *(generator.randrange(len(written)) for _ in range(112))]:
        damaged = bytearray(written)
        damaged[place] ^= 1 << generator.randrange(8)
        (tmp_path / TENSORS).write_bytes(damaged)
        assert tried(tmp_path, before), f"byte {place}"


def test_damaged_bytes_are_noticed(written, tmp_path):
    before = Unchanged()
    for what, damaged in byte_edits(written, 80):
        (tmp_path / TENSORS).write_bytes(damaged)
        assert damaged == written or tried(tmp_path, before), what


@pytest.mark.filterwarnings("ignore")
def test_edited_headers_are_refused_or_mean_something(parts, tmp_path):
    header, tensors = parts
    before, refused = Unchanged(), 0
    for what, edited in json_edits(header, 180):
        try:
            text = json.dumps(edited)
        except ValueError:
            continue
        write(tmp_path, text, tensors)
        try:
            if tried(tmp_path, before):
                refused += 1
            else:
                before = Unchanged()
        except Exception as error:
            raise AssertionError(what) from error
    assert refused > 130


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"format": ' + "[" * 500 + "]" * 500 + "}",
        '{"format": 1, "format": 1, "lit_adapters": "0.2"}',
        '{"format": ' + "9" * 5000 + ', "lit_adapters": "0.2"}',
        '{"format": 1, "lit_adapters": "\\ud83d"}',
        '{"format": true, "lit_adapters": "0.2"}',
        "null",
        "",
    ],
    ids=["deep", "deep inside", "key twice", "huge number", "half a character", "true", "null", "empty"],
)
def test_headers_that_are_no_plain_json_are_refused(text, parts, tmp_path):
    write(tmp_path, text, parts[1])
    assert tried(tmp_path, Unchanged())


BROKEN = {
    "nan": lambda t: t.masked_fill(torch.ones_like(t, dtype=torch.bool), float("nan")),
    "inf": lambda t: t + float("inf"),
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "float16": lambda t: t.half(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "scalar": lambda t: t.sum(),
    "empty": lambda t: t[:0],
    "one more dimension": lambda t: t[None].clone(),
    "vector": lambda t: t.reshape(-1).clone(),
}


def test_broken_tensors_are_refused_by_name(parts, tmp_path):
    header, tensors = parts
    before = Unchanged()
    names = ["0.lora_A", "0.lora_B", "1.numerator_A", "1.denominator_B", "1.density", "0.beta"]
    count = 0
    for name, (what, edit) in itertools.product(names, BROKEN.items()):
        if tensors[name].dim() == 0 and what in ("scalar", "empty", "vector"):
            continue
        if edit(tensors[name]).shape == tensors[name].shape and edit(tensors[name]).dtype == tensors[name].dtype:
            assert what in ("nan", "inf", "vector"), what
            if what == "vector":
                continue
        write(tmp_path, header, tensors | {name: edit(tensors[name])})
        with pytest.raises(la.AdapterError, match=name):
            la.load_adapters(before.model, tmp_path)
        before.check()
        with pytest.raises(la.AdapterError, match=name):
            read_saved(tmp_path)
        count += 1
    assert count > 40


@pytest.mark.parametrize("sizes", [[[0, 0], [0, 0]], [[2**40, 2**40], [8, 4]], [[8, 4], [4, 8]], [[9, 4], [9, 4]]])
def test_an_error_in_the_middle_of_loading_leaves_the_model_as_before(sizes, tmp_path):
    """VeRA looks at its sizes as its state is loaded, after other tensors have been."""
    model = base()
    la.attach(model, la.VeRA(rank=4, targets=["0", "3"]))
    model[2].running_mean.fill_(5)
    la.save_adapters(model, tmp_path)
    with safe_open(tmp_path / TENSORS, framework="pt") as file:
        header = json.loads(file.metadata()["lit_adapter"])
        # Copies: older versions map the file, which the tests write again.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    del header["checksums"], header["base"]["fingerprint"]
    write(tmp_path, header, tensors | {"3.vera_sizes": torch.tensor(sizes)})
    before = Unchanged()
    assert tried(tmp_path, before)


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_values_with_which_nothing_can_be_computed_are_named(parts, tmp_path, value):
    header, tensors = parts
    write(tmp_path, header, tensors | {"1.density": torch.full_like(tensors["1.density"], value)})
    saved = read_saved(tmp_path)
    with pytest.raises(la.AdapterError, match=r"'1'|all layers"):
        summary.report(saved, summary.summarise(saved))


def test_a_copy_of_another_save_is_no_damage(parts, written, tmp_path):
    """Two processes write to one directory, or one of them was stopped between two renames."""
    la.save_adapters(_adapted(), tmp_path)
    other = (tmp_path / HEADER).read_text()
    (tmp_path / TENSORS).write_bytes(written)
    assert json.loads(other)["methods"] != parts[0]["methods"]
    loaded = base()
    la.load_adapters(loaded, tmp_path)
    assert type(loaded[1]).__name__ == "NoRAActivation"
    (tmp_path / HEADER).write_text(other.replace('"rank": 1', '"rank": 2'))
    with pytest.raises(la.AdapterError, match="do not belong together"):
        la.load_adapters(base(), tmp_path)


def _adapted():
    model = base()
    la.attach(model, la.LoRA(rank=1, targets=["0"]))
    return model
