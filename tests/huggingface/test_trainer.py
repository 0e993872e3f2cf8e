"""AdapterTrainerCallback in transformers' Trainer: trained, saved, loaded and resumed with every method."""

import json
import logging

import peft
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, TrainerCallback

import lit_adapters as la
from lit_adapters.errors import NotFiniteError
from lit_adapters.huggingface import AdapterTrainerCallback, peft_tuners
from lit_adapters.huggingface.checkpoints import STATE
from lit_adapters.optimizers import LoFT, LoRARITE, parameter_groups
from lit_adapters.training.rank_allocation import RankAllocation
from tests.huggingface.tiny_trainer import adapted, train, trainer, values
from tests.matrix import METHODS, MODELS, build
from tests.tiers import fast_only

ADALORA = la.Peft(
    {
        "peft_type": "ADALORA",
        "init_r": 4,
        "target_r": 2,
        "tinit": 1,
        "tfinal": 2,
        "target_modules": ["q_proj", "v_proj"],
    }
)
LORA2 = la.LoRA2(width=3, rank=4, target_rank=2, prune_from=0.1, prune_until=0.8, prune_every=2)
ADAPTIVE = la.AFALoRA(rank=2, schedule=la.schedules.Adaptive(window=5))
CASES = METHODS | {"adalora": ADALORA, "lora2-pruned": LORA2, "afa-adaptive": ADAPTIVE}
CASES["nora-calibrated"] = la.NoRA(groups=4, fit_range="calibrate")


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [n for n in first if not torch.equal(first[n], second[n])] == []


@pytest.mark.parametrize("method", fast_only(["afa", "nora++", "adalora", "nora-calibrated"], CASES))
def test_saved_loaded_and_resumed(tmp_path, method):
    model = adapted(CASES[method])
    before = values(model)
    train(tmp_path / "whole", model)
    trained = values(model)
    changed = {n for n in trained if not torch.equal(trained[n], before[n])}
    learning = {f"{n}.{k}" for n, a in la.adapters(model) for k in a.adapter_parameters()}
    assert all(n in changed or n.endswith(".directions") for n in learning)  # these may be given up, at 0 again

    # What was saved has the adapters alone, and is read by load_adapters.
    folder = tmp_path / "whole" / "checkpoint-8"
    assert not (folder / "config.json").exists()
    with pytest.raises(ValueError, match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(folder)
    kept = load_file(folder / "model.safetensors")
    assert kept.keys() == {f"{n}.{k}" for n, a in la.adapters(model) for k in a.adapter_tensors()}
    loaded = build("llama")
    la.load_adapters(loaded, folder)
    run = MODELS["llama"].run
    assert torch.equal(run(loaded.eval()), run(model.eval()))

    # A run that is resumed ends as the one that was not stopped.
    resumed = adapted(CASES[method])
    train(tmp_path / "whole", resumed, resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert_same(values(resumed), trained)


def test_an_adaptive_schedule_resumes_while_the_loss_rises(tmp_path):
    """The last logged value counts until the next, also over a resume between the two."""
    schedule = la.schedules.Adaptive(window=5)
    # Saved after an epoch of 4 steps: older versions of transformers resume within one with other batches.
    settings = {"learning_rate": 1.0, "logging_steps": 2, "num_train_epochs": 4, "save_steps": 4}
    whole, resumed = (adapted(la.AFALoRA(rank=2, schedule=schedule)) for _ in range(2))
    made = train(tmp_path, whole, **settings)
    assert len({e["adapter/beta"] for e in made.state.log_history if "adapter/beta" in e}) > 2
    again = train(tmp_path, resumed, resume=str(tmp_path / "checkpoint-4"), **settings)
    assert_same(values(resumed), values(whole))
    states = [run.callback_handler.callbacks[-1]._annealer.state_dict() for run in (made, again)]
    assert states[0] == states[1]
    assert states[0]["means"]


def test_an_adaptive_schedule_may_wait_for_an_evaluation(tmp_path):
    schedule = la.schedules.Adaptive(window=5, monitor="eval_loss")
    model = adapted(la.AFALoRA(rank=2, schedule=schedule))
    made = train(tmp_path, model, eval_strategy="steps", eval_steps=5, logging_steps=1, save_strategy="no")
    assert made.callback_handler.callbacks[-1]._annealer.state_dict()["monitors"][0]["means"]
    assert all(a.beta.item() == 0 for _, a in la.adapters(model))


def test_bfloat16_with_calibration(tmp_path):
    model = adapted(la.NoRA(groups=4, fit_range="calibrate"))
    made = train(tmp_path, model, bf16=True, save_strategy="no")
    assert all(not a.awaits_calibration for _, a in la.adapters(model))
    assert len([e for e in made.state.log_history if "loss" in e]) == 4


class Plain(torch.nn.Module):
    """No model of transformers."""

    def __init__(self):
        super().__init__()
        self.net = build("llama")

    def forward(self, input_ids, labels=None):
        return {"loss": self.net(input_ids=input_ids, labels=labels).loss}


def test_another_model_keeps_the_trainers_checkpoints(tmp_path):
    model = Plain()
    la.attach(model, la.LoRA(rank=2))
    train(tmp_path, model)
    assert load_file(tmp_path / "checkpoint-8" / "model.safetensors").keys() >= {"net.lm_head.weight"}
    assert not hasattr(model, "save_pretrained")


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, as some optimisers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        return super().step(closure)


def test_what_an_optimiser_counts_in_its_groups_stays(tmp_path):
    model = adapted([la.NoRA(groups=4), la.LoRA(rank=2)])
    optimizer = Counting([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    made = trainer(tmp_path, model, save_strategy="no")
    made.optimizer = optimizer
    made.add_callback(AdapterTrainerCallback(made, statistics=(), figures=False))
    made.train()
    (group,) = optimizer.param_groups
    assert group["count"] == 8
    assert group["weight_decay"] == 0.1


def test_a_run_that_failed_leaves_no_hooks_to_the_next(tmp_path):
    model = adapted(la.LoRA(rank=2))
    made = trainer(tmp_path, model, save_strategy="no", logging_steps=1)
    made.add_callback(AdapterTrainerCallback(made, figures=False))
    rows, made.train_dataset = made.train_dataset, [{"input_ids": torch.tensor([99]), "labels": torch.tensor([99])}] * 8
    with pytest.raises(IndexError):
        made.train()
    made.train_dataset = rows
    made.train()
    assert not any(a._forward_pre_hooks for _, a in la.adapters(model))


def test_annealing_follows_the_steps_and_ends_as_lora(tmp_path):
    betas = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            betas.append(next(a.beta.item() for _, a in la.adapters(model)))

    model = adapted(la.AFALoRA(rank=2, schedule=la.schedules.Linear(end=0.5)))
    made = trainer(tmp_path, model, gradient_accumulation_steps=2)
    made.add_callback(AdapterTrainerCallback(made))
    made.add_callback(Watch())
    made.train()
    assert betas == [0.5, 0.0, 0.0, 0.0]
    history = {entry["step"]: entry["adapter/beta"] for entry in made.state.log_history if "adapter/beta" in entry}
    assert history == {0: 1.0, 2: 0.0, 4: 0.0}
    expected = MODELS["llama"].run(model.eval())
    la.merge(model)
    torch.testing.assert_close(MODELS["llama"].run(model), expected)


def test_statistics_and_figures_go_to_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    model = adapted(la.NoRAPlusPlus(nora=la.NoRA(groups=4), lora=la.LoRA(rank=2)))
    statistics = ("functions", "weights", "subspace")
    made = train(tmp_path, model, {"statistics": statistics, "figures": True}, report_to=["tensorboard"])
    board = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0}).Reload()
    names = board.Tags()["scalars"]
    layers = [name for name, _ in la.adapters(model)]
    for name in layers:
        assert any(tag.startswith("train/adapter/") and f"/{name}/" in tag for tag in names), name
    drift = board.Scalars("train/adapter/summary/drift")
    assert [point.step for point in drift] == [0, 2, 4, 6, 8]
    assert drift[0].value < drift[-1].value
    assert any("nonlinearity" in tag or "outside_range" in tag for tag in names)
    assert board.Tags()["images"]
    assert sum("adapter/summary/drift" in entry for entry in made.state.log_history) == 5


def test_weight_decay_leaves_rational_coefficients_alone(tmp_path):
    settings = {"learning_rate": 0.01, "weight_decay": 50.0, "save_strategy": "no", "max_steps": 1}
    updates = {}
    for decay in (0.0, 50.0):
        model = adapted([la.NoRA(groups=4, targets=["act_fn"]), la.LoRA(rank=2)])
        before = values(model)
        made = train(tmp_path, model, **settings | {"weight_decay": decay})
        updates[decay] = {n: v - before[n] for n, v in values(model).items() if v.is_floating_point()}
        assert len(made.optimizer.param_groups) == 2
    decayed = [n for n in updates[0.0] if not torch.equal(updates[0.0][n], updates[50.0][n])]
    assert decayed
    assert all("lora_A" in n for n in decayed)  # B starts at 0, where decay changes nothing


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = adapted(la.LoRA(rank=2))
    made = train(
        tmp_path,
        model,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        eval_strategy="steps",
        eval_steps=4,
        greater_is_better=True,  # which is step 4 for the loss
        learning_rate=3.0,
    )
    assert made.state.best_model_checkpoint.endswith("checkpoint-4")
    best = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    held = values(model)
    assert all(torch.equal(held[n], t) for n, t in best.items())


def test_a_best_model_that_is_still_nonlinear_is_told(tmp_path):
    model = adapted(la.AFALoRA(rank=2, schedule=la.schedules.Linear(end=1.0)))
    with pytest.warns(UserWarning, match=r"still nonlinear .* do not load the best model"):
        train(
            tmp_path,
            model,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            eval_strategy="steps",
            eval_steps=4,
            greater_is_better=True,  # which is step 4 for the loss
        )


def test_save_model_writes_an_adapter_directory(tmp_path):
    model = adapted(la.LoRA(rank=2), train=["norm"])
    made = train(tmp_path, model, save_strategy="no")
    made.save_model(str(tmp_path / "saved"))
    loaded = build("llama")
    la.load_adapters(loaded, tmp_path / "saved")
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    with pytest.raises(la.AdapterError, match="save_pretrained would write a directory"):
        model.save_pretrained(tmp_path / "other")
    la.detach(model)
    model.save_pretrained(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def test_calibration_leaves_the_order_of_the_training_alone(tmp_path):
    """A NoRA whose fit does not depend on the data trains alike with and without a calibration beside it."""
    losses = []
    for methods in ([la.LoRA(rank=2)], [la.LoRA(rank=2), la.NoRA(groups=4, fit_range="calibrate", base="anchored")]):
        model = adapted(methods)
        for name, parameter in model.named_parameters():
            if "numerator" in name or "denominator" in name:
                parameter.requires_grad_(False)
        made = train(tmp_path, model, save_strategy="no")
        losses.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_what_is_refused(tmp_path):
    plain = build("llama")
    with pytest.raises(la.AdapterError, match="takes the trainer, not LlamaForCausalLM: make the trainer first"):
        AdapterTrainerCallback(plain)
    with pytest.raises(la.AdapterError, match=r"has no adapters: call lit_adapters\.attach before"):
        AdapterTrainerCallback(trainer(tmp_path, plain))
    merged = adapted(la.LoRA(rank=2))
    la.merge(merged, unload=False)
    with pytest.raises(la.AdapterError, match="is merged and would not learn"):
        AdapterTrainerCallback(trainer(tmp_path, merged))
    part = build("llama")
    la.attach(part.model, la.LoRA(rank=2))
    with pytest.raises(la.AdapterError, match="only 'model' of the trainer's model was given"):
        AdapterTrainerCallback(trainer(tmp_path, part))
    wrapped = peft.get_peft_model(adapted(la.LoRA(rank=2)), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(la.AdapterError, match=r"peft wraps a model that was given to .* and froze"):
        AdapterTrainerCallback(trainer(tmp_path, wrapped))
    twice = peft.get_peft_model(build("llama"), peft_tuners.LoRANConfig(rank=2, target_modules=["q_proj"]))
    twice.add_adapter("ref", peft_tuners.LoRANConfig(rank=2, target_modules=["q_proj"]))
    with pytest.raises(la.AdapterError, match="holds several of peft's adapters"):
        AdapterTrainerCallback(trainer(tmp_path, twice))
    fsdp = trainer(tmp_path, adapted(la.LoRA(rank=2)))
    fsdp.is_fsdp_enabled = True
    with pytest.raises(la.AdapterError, match="does not work with FSDP and DeepSpeed"):
        AdapterTrainerCallback(fsdp)
    with pytest.raises(la.AdapterError, match="unknown statistics"):
        AdapterTrainerCallback(trainer(tmp_path, adapted(la.LoRA(rank=2))), statistics=["weight"])
    with pytest.raises(la.AdapterError, match=r"does not log; it may name one of .*loss"):
        train(tmp_path, adapted(la.AFALoRA(rank=2, schedule=la.schedules.Adaptive(monitor="rewards/margin"))))


@pytest.mark.parametrize("kind", [LoRARITE, LoFT])
def test_gradients_that_the_optimiser_must_see_whole_are_not_clipped(tmp_path, kind):
    def run(**arguments):
        model = adapted(la.LoRA(rank=2))
        optimizer = kind(parameter_groups(model, 1e-3, pairs=True))
        return train(tmp_path, model, optimizers=(optimizer, None), save_strategy="no", **arguments)

    with pytest.raises(la.AdapterError, match=rf"max_grad_norm=1\.0 would clip .* before {kind.__name__} reads them"):
        run(max_grad_norm=1.0)
    assert run(max_grad_norm=0.0).state.global_step > 0


def test_an_adapter_that_does_not_run_stops_the_run(tmp_path):
    model = adapted(la.LoRA(rank=2))
    layer = model.model.layers[0].mlp
    layer.forward = lambda x: x
    with pytest.raises(la.AdapterError, match="3 of 14 adapters did not run"):
        train(tmp_path, model)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(NotFiniteError, match=r"gradients are not finite at step 2 .* or clip"):
        train(tmp_path, adapted(la.LoRA(rank=2)), learning_rate=1e30, max_grad_norm=0.0)


def test_a_checkpoint_without_the_state_of_the_ranks_is_refused(tmp_path):
    train(tmp_path, adapted(ADALORA))
    (tmp_path / "checkpoint-4" / STATE).unlink()
    with pytest.raises(la.AdapterError, match="checkpoint-4 holds no state of rank allocation"):
        train(tmp_path, adapted(ADALORA), resume=str(tmp_path / "checkpoint-4"))
    # That of another run in the same place is not taken for it.
    (tmp_path / "checkpoint-4" / STATE).write_bytes((tmp_path / "checkpoint-8" / STATE).read_bytes())
    with pytest.raises(la.AdapterError, match="checkpoint-4 holds no state of rank allocation"):
        train(tmp_path, adapted(ADALORA), resume=str(tmp_path / "checkpoint-4"))
    (tmp_path / "checkpoint-4" / STATE).write_bytes(b"no archive")
    with pytest.raises(la.AdapterError, match=r"lit_adapters\.pt is damaged"):
        train(tmp_path, adapted(ADALORA), resume=str(tmp_path / "checkpoint-4"))


def test_the_penalty_enters_before_the_clipping(tmp_path):
    """The gradient of a step is that of the loss plus the penalty, once for several micro-batches, then clipped."""
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    strong = la.Peft({**ADALORA.config, "orth_reg_weight": 5.0})
    for clip in (0.0, 1e-3):
        model = adapted(strong)
        made = trainer(tmp_path, model, gradient_accumulation_steps=2, save_strategy="no", max_grad_norm=clip)
        made.add_callback(AdapterTrainerCallback(made, statistics=(), figures=False))
        made.add_callback(Watch())
        made.train()
    free, clipped = seen[0], seen[len(seen) // 2]
    size = torch.nn.utils.get_total_norm(list(free.values()))
    for name in free:
        torch.testing.assert_close(clipped[name], free[name] * (1e-3 / size), rtol=1e-3, atol=1e-9)
    model = adapted(strong)
    allocation = RankAllocation(model)
    allocation.begin_gradients()
    penalty = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    made = trainer(tmp_path, model, gradient_accumulation_steps=2, save_strategy="no", max_grad_norm=0.0, max_steps=1)
    made.add_callback(Watch())
    model.zero_grad()
    seen.clear()
    made.train()
    plain = seen[0]
    for name, grad in penalty.items():
        assert grad.any() or "lora_B" not in name
        torch.testing.assert_close(free[name], plain[name] + grad, rtol=1e-4, atol=1e-6)


def test_without_the_callback_the_trainer_warns_at_saving(tmp_path, caplog):
    with caplog.at_level(logging.ERROR), pytest.warns(UserWarning, match=r"With .*AdapterTrainerCallback"):
        trainer(tmp_path, adapted(la.LoRA(rank=2)), save_strategy="steps", max_steps=4).train()
    assert json.loads((tmp_path / "checkpoint-4" / "config.json").read_text())
