"""Figures and histograms in TensorBoard, Weights & Biases and MLflow, and without any trainer."""

import json

import mlflow
import pytest
import torch
import wandb
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure

import lit_adapters as la
from lit_adapters.training.boards import MLflow, WeightsAndBiases
from tests.lightning.tiny_task import Net, Task, both, events, fit
from tests.matrix import adapted

COUNTS, LIMITS = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64), torch.linspace(-1, 2, 4, dtype=torch.float64)


def test_statistics_of_a_model_without_a_trainer():
    model = adapted("llama", "nora++")
    scalars = la.statistics(model)
    for name, adapter in la.adapters(model):
        for statistic, value in adapter.statistics().items():
            assert scalars[f"adapter/{adapter.method}/{name}/{statistic}"] == pytest.approx(value)
    assert {
        "adapter/summary/drift",
        "adapter/summary/relative_norm",
        "adapter/subspace/effective_rank",
    } <= scalars.keys()
    assert "adapter/beta" not in scalars
    assert {tag.split("/")[1] for tag in la.statistics(model, ["weights"])} == {"lora", "summary"}
    assert la.statistics(adapted("llama", "afa"))["adapter/beta"] == 1.0


def test_figures_of_a_model_without_a_trainer():
    figures = la.figures(adapted("llama", "nora++"))
    assert figures.keys() == {
        "adapter/functions",
        "adapter/changes",
        "adapter/slopes",
        "adapter/drift_map",
        "adapter/functional_subspace",
        "adapter/norm_map",
        "adapter/weight_spectra",
    }
    assert all(isinstance(figure, Figure) and figure.axes for figure in figures.values())


@pytest.mark.parametrize("call", [la.statistics, la.figures])
def test_a_model_without_adapters(call):
    with pytest.raises(la.AdapterError, match="Net has no adapters"):
        call(Net())
    with pytest.raises(la.AdapterError, match=r"unknown statistics \['speed'\]"):
        la.statistics(adapted("llama", "lora"), ["speed"])


def test_weights_and_biases_gets_images_and_histograms(tmp_path):
    """Offline, as it is without an account."""
    logged = []
    with wandb.init(mode="offline", dir=tmp_path, project="test") as run:
        log, run.log = run.log, lambda values: (logged.append(values), log(values))
        board = WeightsAndBiases(run)
        figure = Figure()
        figure.subplots().plot([0, 1])
        board.figure("adapter/functions", figure, 3)
        board.values("adapter/lora/x/lora_A", torch.arange(6.0).view(2, 3), 3)
        board.counts("adapter/nora/x/inputs", COUNTS, LIMITS, 3)
    image, values, counts = logged
    assert isinstance(image["adapter/functions"], wandb.Image)
    assert sum(values["adapter/lora/x/lora_A"].histogram) == 6
    assert counts["adapter/nora/x/inputs"].histogram == COUNTS.tolist()
    assert counts["adapter/nora/x/inputs"].bins == LIMITS.tolist()
    assert {entry["trainer/global_step"] for entry in logged} == {3}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A folder for MLflow: a database would need its larger package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file://{tmp_path}/mlruns"


def test_mlflow_gets_figures_and_counts(tmp_path, store):
    client = mlflow.MlflowClient(store)
    experiment = client.create_experiment("test", artifact_location=str(tmp_path / "artifacts"))
    run = client.create_run(experiment).info.run_id
    board = MLflow(client, run)
    figure = Figure()
    figure.subplots().plot([0, 1])
    board.figure("adapter/functions", figure, 3)
    board.values("adapter/lora/x/lora_A", torch.arange(6.0).view(2, 3), 3)
    board.counts("adapter/nora/x/inputs", COUNTS, LIMITS, 3)
    folder = tmp_path / "artifacts" / run / "artifacts" / "adapter"
    assert (folder / "functions" / "step-3.png").read_bytes().startswith(b"\x89PNG")
    assert sum(json.loads((folder / "lora" / "x" / "lora_A" / "step-3.json").read_text())["counts"]) == 6
    assert json.loads((folder / "nora" / "x" / "inputs" / "step-3.json").read_text()) == {
        "limits": LIMITS.tolist(),
        "counts": COUNTS.tolist(),
    }


def test_a_training_with_three_loggers(tmp_path, monkeypatch, store):
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers = [
        TensorBoardLogger(tmp_path, "tb"),
        WandbLogger(save_dir=tmp_path, mode="offline"),
        MLFlowLogger(tracking_uri=store, artifact_location=str(tmp_path / "artifacts")),
    ]
    logged = []
    run = loggers[1].experiment
    monkeypatch.setattr(run, "log", lambda values, *args, **kwargs: logged.append(values))
    fit(tmp_path, Task(both()), logger=loggers, max_epochs=1)
    wandb.finish()
    tags = events(loggers[0].log_dir).Tags()
    drawn = set(tags["images"])
    assert {"adapter/functions", "adapter/norm_map", "adapter/weight_spectra"} <= drawn
    by_tag = {tag: value for values in logged for tag, value in values.items()}
    assert {tag for tag, value in by_tag.items() if isinstance(value, wandb.Image)} == drawn
    histograms = {tag for tag, value in by_tag.items() if isinstance(value, wandb.Histogram)}
    assert histograms == set(tags["histograms"])
    assert any(tag.endswith("/inputs") for tag in histograms)
    folder = tmp_path / "artifacts" / loggers[2].run_id / "artifacts"
    assert {str(p.parent.relative_to(folder)) for p in folder.rglob("*.png")} == drawn
    assert {str(p.parent.relative_to(folder)) for p in folder.rglob("*.json")} == histograms
