"""The classifier through both routes, command line and Python: it trains, tests, saves and loads the same thing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from timm import create_model

import lit_adapters as la
from lit_adapters import AdapterError, DataError
from lit_adapters.lightning import build_optimizers
from tests.tiers import fast_only
from tests.vision.smoke import CONFIGS, checkpoint, log_dir, scalars
from vision.data import CIFARDataModule
from vision.module import ViTClassifier

DATA = {"source": "random", "image_size": 32, "batch_size": 10, "train_subset": 20, "val_subset": 10, "test_subset": 20}
ROOT = Path(__file__).parents[2]
NORA = la.NoRA(groups=4, rank=2)


ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-3, "weight_decay": 0.01}}
COSINE = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR"}


def classifier(**changes) -> ViTClassifier:
    arguments = {"backbone": "test_vit", "pretrained": False, "adapters": NORA, "image_size": 32}
    model = ViTClassifier(**arguments | changes)
    model.configure_optimizers = lambda: build_optimizers(model, ADAMW, COSINE)
    return model


def train(model, folder, callbacks=(), ckpt_path=None, **changes) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
        "callbacks": [la.AdapterCallback(), ModelCheckpoint(folder, filename="last"), *callbacks],
    }
    trainer = Trainer(**settings | changes)
    trainer.fit(model, datamodule=CIFARDataModule(**DATA), ckpt_path=ckpt_path)
    return trainer


def predictions(model) -> torch.Tensor:
    data = CIFARDataModule(**DATA)
    data.setup("test")
    with torch.no_grad():
        return torch.cat([model.eval().cpu().predict_step(batch, 0) for batch in data.test_dataloader()])


@pytest.mark.parametrize("arm", ["nora", "nora_plus_plus"])
def test_what_the_command_line_trained_loads_in_python(smoke_run, arm):
    cli = smoke_run(arm).fitted
    seed_everything(123, verbose=False)
    loaded = ViTClassifier.load_from_checkpoint(checkpoint(cli))
    assert torch.equal(predictions(loaded), predictions(cli.model))
    assert checkpoint(cli, "best").is_file()


METHODS = [
    NORA,
    [
        la.NoRA(groups=4, base="anchored", fit_range="calibrate", targets=["blocks.1.mlp.act"]),
        la.LoRA(rank=2, targets=["qkv"]),
    ],
    la.NoRAPlusPlus(nora=NORA, lora=la.LoRA(rank=2)),
    {"class_path": "lit_adapters.LoRA", "init_args": {"rank": 2}},
    la.AFALoRA(rank=2, activation="rational", schedule=la.schedules.Cosine(end=1.0)),
    [la.LoRAN(rank=2, function="sine", targets=["qkv"]), la.DoRA(rank=2, targets=["fc1"])],
    None,
]


@pytest.mark.parametrize("adapters", fast_only([METHODS[1], METHODS[4], METHODS[6]], METHODS))
def test_what_python_trained_loads_in_python(tmp_path, adapters):
    model = classifier(adapters=adapters, train=["head", "norm1"])
    train(model, tmp_path)
    path = tmp_path / "last.ckpt"
    seed_everything(123, verbose=False)
    loaded = ViTClassifier.load_from_checkpoint(path)
    assert torch.equal(predictions(loaded), predictions(model))

    own = {f"model.{name}" for name, p in model.model.named_parameters() if p.requires_grad}
    own |= {f"model.{name}.{key}" for name, a in la.adapters(model.model) for key in a.adapter_tensors()}
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == own
    assert path.stat().st_size < 2 * sum(p.numel() for p in model.parameters())  # half of the weights' bytes
    del checkpoint["state_dict"]["model.head.weight"]
    torch.save(checkpoint, path)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"model\.head\.weight\""):
        ViTClassifier.load_from_checkpoint(path)


def test_a_head_that_stays_fresh_and_frozen_is_found_again(tmp_path):
    model = classifier(train=[])
    train(model, tmp_path)
    seed_everything(123, verbose=False)
    assert torch.equal(predictions(ViTClassifier.load_from_checkpoint(tmp_path / "last.ckpt")), predictions(model))


def test_pretrained_weights_come_from_their_file_and_not_from_the_checkpoint(tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(create_model("test_vit", img_size=32, num_classes=1000).state_dict(), weights)
    model = classifier(pretrained=str(weights))
    train(model, tmp_path)
    loaded = ViTClassifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(predictions(loaded), predictions(model))
    weights.unlink()
    with pytest.raises(AdapterError, match="no weight file"):
        ViTClassifier.load_from_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.slow
def test_testing_in_another_process_gives_the_same_numbers(smoke_run, tmp_path):
    fitted, tested = smoke_run("nora")
    arguments = [f"--config={CONFIGS / 'smoke/nora.yaml'}", f"--ckpt_path={checkpoint(fitted)}"]
    subprocess.run(
        [sys.executable, "-m", "vision", "test", *arguments],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    there = scalars(tmp_path / "runs" / "vision" / "smoke-nora" / "version_0", "test/")
    assert there == scalars(log_dir(tested), "test/")
    assert there.keys() == {"test/loss", "test/acc1", "test/acc5", "test/calibration_error"}


def test_resuming_meets_the_same_images_in_the_same_order(tmp_path):
    whole = classifier()
    every = ModelCheckpoint(tmp_path / "every", monitor="train/loss", save_top_k=-1)
    train(whole, tmp_path, callbacks=[every], max_epochs=3)
    seed_everything(123, verbose=False)
    resumed = classifier(init_seed=whole.hparams["init_seed"])
    path = next((tmp_path / "every").glob("epoch=1-*.ckpt"))
    train(resumed, tmp_path, max_epochs=3, ckpt_path=path)
    first, second = whole.state_dict(), resumed.state_dict()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []


def test_the_model_is_built_once():
    model = classifier()
    model.configure_model()
    first, report = model.model, model.report
    model.configure_model()
    assert model.model is first
    assert model.report is report


def test_an_attach_that_fails_leaves_no_model_behind():
    model = classifier(adapters=la.NoRA(groups=5))
    for _ in range(2):
        with pytest.raises(AdapterError, match="5 groups do not divide the 192 channels"):
            model.configure_model()


def test_fresh_values_depend_on_the_seed_alone():
    def head(seed, **changes):
        seed_everything(seed, verbose=False)
        model = classifier(**changes)
        torch.rand(3)
        before = torch.get_rng_state()
        model.configure_model()
        return model.model.head.weight, before

    assert torch.equal(head(1)[0], head(1)[0])
    assert not torch.equal(head(1)[0], head(2)[0])
    assert torch.equal(head(1, init_seed=7)[0], head(2, init_seed=7)[0])
    _, before = head(1, adapters=None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_other_classes_than_the_models(tmp_path, stage):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    model = classifier(num_classes=7)
    with pytest.raises(DataError, match=r"the data have 10 classes, the model 7; set model\.num_classes to 10"):
        getattr(trainer, stage)(model, datamodule=CIFARDataModule(**DATA))
    assert model.model is None  # before weights are fetched


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("base", ["rational", "anchored"])
def test_half_precision(tmp_path, precision, base):
    nora = la.NoRA(groups=4, rank=2, base=base, fit_range="calibrate", targets=["blocks.0.mlp.act"])
    model = classifier(adapters=[nora, la.LoRA(rank=2, targets=["qkv", "fc1"])])
    trainer = train(model, tmp_path, precision=precision, max_epochs=1)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert trainer.test(model, datamodule=CIFARDataModule(**DATA), verbose=False)[0]["test/loss"] < 10
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {v.dtype for k, v in kept.items() if "lora_" in k or "numerator" in k} == {torch.float32}


def test_probabilities_for_images_with_or_without_labels():
    model = classifier()
    model.configure_model()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        probabilities = model.eval().predict_step(images, 0)
        assert torch.equal(model.predict_step((images, torch.zeros(3)), 0), probabilities)
    assert probabilities.shape == (3, 10)
    assert torch.allclose(probabilities.sum(-1), torch.ones(3))


def test_metrics_are_those_of_the_predictions(tmp_path):
    model = classifier()
    trainer = train(model, tmp_path, max_epochs=1)
    measured = trainer.test(model, datamodule=CIFARDataModule(**DATA), verbose=False)[0]
    probabilities, labels = predictions(model), torch.arange(100) % 10
    data = CIFARDataModule(**DATA)
    data.setup("test")
    labels = torch.cat([y for _, y in data.test_dataloader()])
    top = probabilities.topk(5).indices
    assert measured["test/acc1"] == pytest.approx((top[:, 0] == labels).float().mean().item())
    assert measured["test/acc5"] == pytest.approx((top == labels[:, None]).any(1).float().mean().item())
    assert measured["test/loss"] == pytest.approx(
        torch.nn.functional.nll_loss(probabilities.log(), labels).item(), rel=1e-4
    )


class Outputs(Callback):
    """Keeps what `test_step` returns."""

    def __init__(self):
        self.batches = []

    def on_test_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self.batches.append(outputs)


def test_results_of_each_image_are_in_the_order_of_the_split():
    outputs = Outputs()
    model = classifier()
    model.configure_model()
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    data = CIFARDataModule(**DATA | {"batch_size": 8})
    measured = Trainer(callbacks=[outputs], **settings).test(model, datamodule=data, verbose=False)[0]
    assert [set(b) for b in outputs.batches] == [{"correct", "loss"}] * 3
    correct, loss = (torch.cat([b[name] for b in outputs.batches]) for name in ("correct", "loss"))
    assert (correct.dtype, loss.dtype) == (torch.bool, torch.float32)
    probabilities = predictions(model)
    labels = torch.cat([y for _, y in data.test_dataloader()])
    assert torch.equal(correct, probabilities.argmax(-1) == labels)
    assert torch.allclose(loss, -probabilities[torch.arange(20), labels].log(), atol=1e-5)
    assert measured["test/acc1"] == pytest.approx(correct.float().mean().item())
    assert measured["test/loss"] == pytest.approx(loss.mean().item(), rel=1e-6)


def test_an_image_is_correct_where_the_accuracy_counts_it():
    """Two logits that differ by a rounding error have equal probabilities, of which the first counts."""
    logits = torch.zeros(1, 10)
    logits[0, 3] = 1e-9
    model = classifier()
    model.forward = lambda images: logits
    model.log = model.log_dict = lambda *arguments, **settings: None
    results = model.test_step((torch.zeros(1, 3, 32, 32), torch.tensor([3])), 0)
    assert results["correct"].float().mean() == model.test_metrics.compute()["test/acc1"] == 0


def test_few_classes_have_no_top_five():
    few, more = (set(classifier(num_classes=n).val_metrics.keys()) for n in (5, 6))
    assert few == {"val/acc1", "val/calibration_error"}
    assert more - few == {"val/acc5"}


def test_an_image_counts_once_however_a_step_is_split(tmp_path):
    """Eleven images: steps of eight and of three, whole or in micro-batches of two, the last of which holds one."""
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(11, 3, 32, 32, generator=draw), torch.randint(10, (11,), generator=draw)
    found = []
    for size, accumulate in ((8, 1), (2, 4)):
        model = classifier(init_seed=1, adapters=la.LoRA(rank=2))
        model.configure_optimizers = lambda model=model: torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=0.1
        )
        torch.manual_seed(1)
        model.configure_model()
        start = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        settings = {"accumulate_grad_batches": accumulate, "enable_checkpointing": False, "callbacks": []}
        running = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, **settings)
        data = torch.utils.data.TensorDataset(images, labels)
        running.fit(model, torch.utils.data.DataLoader(data, batch_size=size))
        assert running.global_step == 2
        end = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        found.append((end - start, running.callback_metrics["train/loss"].item()))
    (whole, loss), (split, split_loss) = found
    assert (split - whole).norm() / whole.norm() < 1e-6
    assert split_loss == pytest.approx(loss, rel=1e-5)


def test_eager_attention_computes_the_same_in_another_way():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    outputs = {}
    for attention in ("fused", "eager"):
        module = ViTClassifier("test_vit", 3, pretrained=False, image_size=32, init_seed=0, attention=attention)
        module.configure_model()
        kinds = {m.fused_attn for m in module.modules() if hasattr(m, "fused_attn")}
        assert kinds == {attention == "fused"}
        outputs[attention] = module.eval()(images)
    torch.testing.assert_close(outputs["fused"], outputs["eager"], rtol=1e-4, atol=1e-5)
    with pytest.raises(la.AdapterError, match="attention 'quick' must be"):
        ViTClassifier("test_vit", 3, pretrained=False, attention="quick")
    module = ViTClassifier("resnet18", 3, pretrained=False, attention="eager", train=["fc"])
    with pytest.raises(la.AdapterError, match="no attention of timm"):
        module.configure_model()
