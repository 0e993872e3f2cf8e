"""A disk without space, played by a limit on the size of files: one error names the file, and nothing is lost."""

import contextlib
import resource

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import lit_adapters as la
from lit_adapters.files.atomic import write_atomically, write_directory
from lit_adapters.learned.pictures import save_figure
from tests.learned.saved_adapters import refuses

LIMIT = 4096  # bytes of a file


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))


@contextlib.contextmanager
def full_disk():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def adapted(folder):
    model = base()
    la.attach(model, la.LoRA(rank=2, targets=["0"]), train=["2"])
    la.save_adapters(model, folder / "adapter")
    la.export_peft(model, folder / "peft")
    return model


@pytest.mark.parametrize("write", [la.save_adapters, la.export_peft])
def test_saving(write, tmp_path):
    model = adapted(tmp_path)
    before = contents(tmp_path)
    with torch.no_grad():
        model[2].weight.add_(1)
    for folder in (tmp_path / "adapter", tmp_path / "peft", tmp_path / "new"):
        with pytest.raises(la.AdapterError, match=r"model.safetensors|lit_adapter.safetensors") as raised, full_disk():
            write(model, folder)
        assert "disk is full" in str(raised.value)
        assert "nothing was lost" in str(raised.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("command", "name"), [("merge", "merged"), ("export-peft", "exported")])
def test_commands(command, name, run, tmp_path):
    adapted(tmp_path)
    options = ["--out", tmp_path / name, "--base", f"{__name__}.base", "--overwrite"]
    run(command, tmp_path / "adapter", *options)
    before = contents(tmp_path)
    with full_disk():
        message = refuses(command, tmp_path / "adapter", *options)
    assert str(tmp_path / name) in message
    assert "disk is full" in message
    assert contents(tmp_path) == before
    run(command, tmp_path / "adapter", *options)


def test_pictures(tmp_path):
    figure = Figure(figsize=(3, 3))
    figure.text(0.1, 0.5, "what was learned, and more than 4 kB")
    path = save_figure(figure, tmp_path / "learned", dpi=200)
    assert path.name == "learned.png"
    before = contents(tmp_path)
    with pytest.raises(la.AdapterError, match=r"learned\.png could not be written \(the disk is full"), full_disk():
        save_figure(figure, path, dpi=200)
    assert contents(tmp_path) == before


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "old").write_text("x")
    (tmp_path / "out").symlink_to("elsewhere")
    write_directory(tmp_path / "out", lambda place: (place / "new").write_text("y"))
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["new"]


def test_other_reasons_and_errors_of_the_writer(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        with pytest.raises(la.AdapterError, match="could not be written") as raised:
            write_atomically(path, lambda temporary: temporary.write_text("x"))
        assert "disk is full" not in str(raised.value)

    def bug(place):
        (place / "half").write_text("half") if place.is_dir() else place.write_text("half")
        raise KeyError("a bug is no full disk")

    for write in (write_atomically, write_directory):
        with pytest.raises(KeyError):
            write(tmp_path / "out", bug)
    assert sorted(contents(tmp_path)) == [(tmp_path / "file").relative_to(tmp_path)]
