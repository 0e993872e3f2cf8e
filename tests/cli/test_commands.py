"""The console script: what it prints against brute force, what it writes, and how it refuses."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lit_adapters as la
from lit_adapters.cli.commands import main
from tests.learned.saved_adapters import NET, adapted_net, checkpoint, refuses, saved_net
from tests.lightning.tiny_task import Net, Task
from tests.matrix import METHODS, MODELS, adapted, build

LORA = la.LoRA(rank=2, alpha=4.0)


# merge


def test_merge_of_a_directory(run, tmp_path):
    net = saved_net(tmp_path / "adapter", LORA)
    printed = run("merge", tmp_path / "adapter", "--out", tmp_path / "out", "--base", NET)
    assert printed.startswith("merged 4 layers, error ")
    plain = Net().eval()
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    x = torch.randn(5, 8)
    torch.testing.assert_close(plain(x), net(x))
    assert not torch.allclose(plain(x), Net().eval()(x))
    other = tmp_path / "file"
    other.touch()
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == other.stat().st_mode


def test_merge_says_what_a_cast_costs_and_casts_first_to_what_is_wider(run, tmp_path):
    net = saved_net(tmp_path / "adapter", LORA)
    command = "merge", tmp_path / "adapter", "--base", NET
    printed = run(*command, "--out", tmp_path / "half", "--dtype", "bfloat16")
    la.merge(net)
    half = load_file(tmp_path / "half" / "model.safetensors")
    exact = net.state_dict()
    error = max((half[k].double() - v.double()).abs().max().item() for k, v in exact.items() if v.is_floating_point())
    assert f"cast to bfloat16: error {error:.1e} (" in printed
    la.save_adapters(large := adapted_net(LORA), tmp_path / "large")
    with torch.no_grad():
        large.blocks[0].fc1.lora_B.mul_(1e7)
    la.save_adapters(large, tmp_path / "large")
    said = refuses("merge", tmp_path / "large", "--base", NET, "--out", tmp_path / "x", "--dtype", "float16")
    assert "beyond torch.float16: give --dtype bfloat16 or float32" in said
    assert not (tmp_path / "x").exists()
    wide = adapted_net(LORA)
    wide.norm.running_var.fill_(1e6)
    la.save_adapters(wide, tmp_path / "wide")
    said = refuses("merge", tmp_path / "wide", "--base", NET, "--out", tmp_path / "x", "--dtype", "float16")
    assert "norm.running_var has a value of size 1e+06, beyond torch.float16" in said


def test_merge_of_a_checkpoint_builds_the_module_that_wrote_it(run, tmp_path):
    task, path = checkpoint(tmp_path, Task())
    printed = run("merge", path, "--out", tmp_path / "out")
    assert "merged 4 layers" in printed
    assert "2 rational activations stay" in printed
    values = load_file(tmp_path / "out" / "model.safetensors")
    merged = Task().net
    merged.load_state_dict(task.net.state_dict())
    la.merge(merged)
    assert values.keys() == merged.state_dict().keys()
    assert "blocks.0.act.numerator" in values
    assert all(torch.equal(values[k], v) for k, v in merged.state_dict().items())


def test_merge_of_a_transformers_model_is_one_that_transformers_loads(run, tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    model = adapted("llama", "lora").eval()
    la.save_adapters(model, tmp_path / "adapter")
    arguments = json.dumps([str(tmp_path / "base")])
    maker = "transformers.AutoModelForCausalLM.from_pretrained"
    run("merge", tmp_path / "adapter", "--out", tmp_path / "out", "--base", maker, "--base-args", arguments)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(MODELS["llama"].run(loaded), MODELS["llama"].run(model))


def test_merge_of_learned_functions_is_one_that_transformers_loads(run, tmp_path):
    """With the file beside the weights, and only with it."""
    build("llama").save_pretrained(tmp_path / "base")
    model = adapted("llama", "nora++").eval()
    la.save_adapters(model, tmp_path / "adapter")
    arguments = json.dumps({"pretrained_model_name_or_path": str(tmp_path / "base")})
    maker = "transformers.AutoModelForCausalLM.from_pretrained"
    rest = ["--base", maker, "--base-args", arguments, "--max-shard-size", "20KB"]
    printed = run("merge", tmp_path / "adapter", "--out", tmp_path / "out", *rest)
    assert "loads it with trust_remote_code=True" in printed
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    torch.testing.assert_close(MODELS["llama"].run(loaded), MODELS["llama"].run(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)

    run("merge", tmp_path / "adapter", "--out", tmp_path / "half", *rest[:4], "--dtype", "bfloat16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", trust_remote_code=True)
    assert half.dtype == torch.bfloat16
    assert half.model.layers[0].mlp.act_fn.numerator.dtype == torch.float32
    saved_net(tmp_path / "net", LORA)
    command = "merge", tmp_path / "net", "--out", tmp_path / "x", "--base", NET
    assert "is for models of transformers" in refuses(*command, "--max-shard-size", "1GB")


def test_out_is_replaced_as_a_whole_or_not_at_all(run, tmp_path, monkeypatch):
    saved_net(tmp_path / "adapter", LORA)
    command = ["merge", tmp_path / "adapter", "--base", NET, "--out"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    assert "is not empty; give another directory, or --overwrite" in refuses(*command, tmp_path / "full")
    assert "holds other things than an earlier result" in refuses(*command, tmp_path / "full", "--overwrite")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years of work"
    assert "is a file" in refuses(*command, tmp_path / "full" / "thesis.tex")

    run(*command, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "--overwrite" in refuses(*command, tmp_path / "out")

    def full_disk(model, path):
        raise OSError(28, "No space left on device", path)

    with monkeypatch.context() as patch:
        patch.setattr("lit_adapters.cli.commands.save_model", full_disk)
        assert "No space left on device" in refuses(*command, tmp_path / "out", "--overwrite")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    saved_net(tmp_path / "adapter", LORA, seed=1)
    run(*command, tmp_path / "out", "--overwrite")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "full", "out"]


# peft


def test_export_and_import_of_peft(run, tmp_path):
    net = saved_net(tmp_path / "adapter", la.AFALoRA(rank=2))
    run("export-peft", tmp_path / "adapter", "--out", tmp_path / "peft", "--base", NET)
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / "peft").eval()
    x = torch.randn(5, 8)
    torch.testing.assert_close(theirs(x), net(x))
    printed = run("import-peft", tmp_path / "peft", "--out", tmp_path / "back", "--base", NET)
    assert printed.startswith("lora ")
    back = Net()
    la.load_adapters(back, tmp_path / "back")
    torch.testing.assert_close(back.eval()(x), net(x))


# methods


@pytest.mark.parametrize("name", METHODS)
def test_methods_tells_what_really_merges_and_exports(run, tmp_path, name):
    method = METHODS[name]
    found = {line.split()[0]: line for line in run("methods").splitlines()[1:]}
    assert sys.modules[type(method).__module__].__doc__.split("\n")[0] in found[type(method).__name__]
    fresh, annealed = adapted("vit", name), adapted("vit", name)
    la.set_progress(annealed, 1.0)

    def can(what, model):
        try:
            what(model)
        except la.AdapterError:
            return False
        return True

    def into_weights(model):
        if la.merge(model).kept:
            raise la.AdapterError("some functions stay")

    expected = {"yes": (True, True), "at beta = 0": (False, True)}
    exports = can(lambda m: la.export_peft(m, tmp_path), fresh), can(lambda m: la.export_peft(m, tmp_path), annealed)
    assert exports == expected.get(type(method).exports, (False, False))
    assert (can(into_weights, fresh), can(into_weights, annealed)) == expected.get(type(method).merges, (False, False))


def test_all_methods_are_listed(run):
    names = [line.split()[0] for line in run("methods").splitlines()[1:]]
    assert sorted(names) == sorted(n for n in la.__all__ if n in vars(la) and _is_method(getattr(la, n)))


def _is_method(value):
    return isinstance(value, type) and issubclass(value, la.Method) and value is not la.Method


# Bad input


def test_paths_that_are_no_adapters(tmp_path):
    saved_net(tmp_path / "adapter", LORA)
    assert "does not exist" in refuses("inspect", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "has no lit_adapter.safetensors" in refuses("inspect", tmp_path / "empty")
    la.export_peft(adapted_net(LORA), tmp_path / "peft")
    assert "was saved by peft; run lit-adapters import-peft" in refuses("inspect", tmp_path / "peft")
    file = tmp_path / "adapter" / "lit_adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert "is torn or not a safetensors file" in refuses("inspect", tmp_path / "adapter")


def test_files_that_are_no_checkpoints_of_adapters(tmp_path):
    _, path = checkpoint(tmp_path)
    (tmp_path / "torn.ckpt").write_bytes(path.read_bytes()[:1000])
    assert "is torn or not a checkpoint" in refuses("inspect", tmp_path / "torn.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    assert "has no state_dict" in refuses("inspect", tmp_path / "list.ckpt")
    content = torch.load(path, weights_only=True)
    torch.save(content | {"lit_adapters": content["lit_adapters"] | {"format": 99}}, tmp_path / "newer.ckpt")
    assert "has format 99" in refuses("inspect", tmp_path / "newer.ckpt")
    del content["state_dict"]["net.blocks.0.act.density"]
    torch.save(content, tmp_path / "less.ckpt")
    assert "blocks.0.act.density is missing, and should be (256,)" in refuses("inspect", tmp_path / "less.ckpt")
    del content["state_dict"]["net.blocks.0.fc1.lora_A"]
    torch.save(content, tmp_path / "less.ckpt")
    assert "'blocks.0.fc1' lacks lora_A or lora_B" in refuses("inspect", tmp_path / "less.ckpt")
    del content["state_dict"]["net.head.bias"]
    torch.save(content, tmp_path / "less.ckpt")
    assert "lacks 'head.bias', which trained" in refuses("inspect", tmp_path / "less.ckpt")
    del content["lit_adapters"]
    torch.save(content, tmp_path / "plain.ckpt")
    assert "says nothing about adapters; train with lit_adapters.AdapterCallback" in refuses(
        "inspect", tmp_path / "plain.ckpt"
    )
    torch.save({"state_dict": {}, "callback": Net()}, tmp_path / "pickle.ckpt")
    assert "cannot be read as a checkpoint of tensors and plain values" in refuses("inspect", tmp_path / "pickle.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --base and --base-args"),
        (["--base", "nowhere.build"], "--base 'nowhere.build' does not exist"),
        (["--base", "build"], "--base 'build' does not exist"),
        (["--base", "torch.nn.Lineer"], "'torch.nn' has no 'Lineer'"),
        (["--base", "torch.pi"], "is a float, nothing that makes a model"),
        (["--base", "torch.ones", "--base-args", "[2]"], "made a Tensor, not a torch model"),
        (["--base", "torch.nn.Linear", "--base-args", "[2"], "--base-args '[2' is not valid JSON"),
        (["--base", "torch.nn.Linear", "--base-args", "2"], "must be a JSON list or object"),
        (["--base", "torch.nn.Linear", "--base-args", "[2]"], "called with [2], failed: TypeError"),
        (["--base", "torch.nn.Linear", "--base-args", "[8, 3]"], "belongs to another base model"),
    ],
)
def test_bases_that_do_not_fit(tmp_path, options, message):
    saved_net(tmp_path / "adapter", LORA)
    assert message in refuses("merge", tmp_path / "adapter", "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_modules_that_do_not_fit(tmp_path):
    _, path = checkpoint(tmp_path)
    command = "merge", path, "--out", tmp_path / "out"
    assert "leave out --base" in refuses(*command, "--base", NET)
    assert "is not a LightningModule" in refuses(*command, "--module", NET)
    assert "Task cannot load" in refuses(
        "merge", checkpoint(tmp_path / "more", Task(methods=la.DoRA(rank=2)))[1], "--out", tmp_path / "out"
    )
    content = torch.load(path, weights_only=True)
    torch.save(content | {"lit_adapters": content["lit_adapters"] | {"module": "__gone__.Task"}}, path)
    assert "written by '__gone__.Task', which has not been imported" in refuses(*command)


def test_what_cannot_be_merged_or_exported_is_refused_before_a_model_is_built(tmp_path):
    net = adapted_net(la.AFALoRA(rank=2))
    la.set_progress(net, 0.0)
    la.save_adapters(net, tmp_path / "afa")
    saved_net(tmp_path / "nora", la.NoRA(groups=4))
    rest = "--out", tmp_path / "out", "--base", "nowhere.build"
    assert "nonlinear at beta = 1" in refuses("merge", tmp_path / "afa", *rest)
    assert "nonlinear at beta = 1" in refuses("export-peft", tmp_path / "afa", *rest)
    assert "has nora, which the LoRA format of peft cannot express" in refuses("export-peft", tmp_path / "nora", *rest)


@pytest.mark.parametrize("args", [[], ["frobnicate"], ["inspect"], ["merge", "somewhere"], ["diff", "a"]])
def test_unknown_and_missing_arguments(args):
    assert "--help tells more)" in refuses(*args)


@pytest.mark.parametrize("command", ["methods", "inspect", "diff", "merge", "export-peft", "import-peft"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"example:  lit-adapters {command}" in capsys.readouterr().out


@pytest.mark.slow
def test_as_a_program(tmp_path):
    """Quick to start, one line and status 1 for an error, quiet when nobody reads on."""
    heavy = ["lightning", "timm", "transformers", "matplotlib", "peft"]
    script = f"""
        set -o pipefail; {sys.executable} -m lit_adapters.cli methods | true; echo status $?
        {sys.executable} - <<END
import sys
from lit_adapters.cli.commands import main
print([name for name in {heavy} if name in sys.modules], flush=True)
main(["inspect", "{tmp_path}/nothing"])
END
        echo status $?
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["status 0", "[]", "status 1"]
    assert done.stderr == (
        f"error: '{tmp_path}/nothing' does not exist; give an adapter directory or a Lightning checkpoint\n"
    )
