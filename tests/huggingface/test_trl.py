"""AdapterTrainerCallback in the trainers of TRL: trained, saved, loaded and equal."""

import copy
import math
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification, set_seed

import lit_adapters as la
from language.models import create_model, create_tokenizer
from lit_adapters.huggingface import AdapterTrainerCallback, peft_tuners
from tests.huggingface.tiny_trainer import values
from tests.matrix import METHODS
from tests.tiers import fast_only

trl = pytest.importorskip("trl")

WORDS = ["apple", "bread", "crane", "daisy", "eagle", "fence", "grape", "house"]
PAIRS = [{"prompt": f"say {w}", "completion": f" {w}"} for w in WORDS]
CHOICES = [
    {"prompt": f"say {w}", "chosen": f" {w}", "rejected": f" {v}"} for w, v in zip(WORDS, WORDS[::-1], strict=True)
]
RATED = [{"chosen": f"good {w}", "rejected": f"bad {w}"} for w in WORDS]
PROMPTS = [{"prompt": f"say {w}"} for w in WORDS]
COMMON = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "save_steps": 2,
    "logging_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "log_level": "error",
    "gradient_checkpointing": False,
}


def causal():
    set_seed(0)
    return create_model("tiny_llama")


def classifier():
    set_seed(0)
    config: LlamaConfig = causal().config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


def sft(folder: Path, model, config=None):
    args = trl.SFTConfig(str(folder), max_length=32, **COMMON)
    return trl.SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=create_tokenizer("tiny_llama"),
        peft_config=config,
    )


def dpo(folder: Path, model, config=None):
    reference = None
    if config is None:
        reference = copy.deepcopy(model)
        la.detach(reference)
    args = trl.DPOConfig(str(folder), max_length=32, **COMMON)
    rows, tokenizer = Dataset.from_list(CHOICES), create_tokenizer("tiny_llama")
    return trl.DPOTrainer(model, reference, args, train_dataset=rows, processing_class=tokenizer, peft_config=config)


def grpo(folder: Path, model, config=None):
    def reward(completions, **_):
        return [float(len(set(text))) for text in completions]

    args = trl.GRPOConfig(str(folder), num_generations=4, max_completion_length=6, beta=0.0, **COMMON)
    rows, tokenizer = Dataset.from_list(PROMPTS), create_tokenizer("tiny_llama")
    return trl.GRPOTrainer(model, reward, args, train_dataset=rows, processing_class=tokenizer, peft_config=config)


def reward(folder: Path, model, config=None):
    args = trl.RewardConfig(str(folder), max_length=32, **COMMON)
    rows, tokenizer = Dataset.from_list(RATED), create_tokenizer("tiny_llama")
    return trl.RewardTrainer(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=config)


TRAINERS = {"sft": (sft, causal), "dpo": (dpo, causal), "grpo": (grpo, causal), "reward": (reward, classifier)}
NAMES = ["lora", "dora", "loran", "afa", "nora", "nora++", "vera", "group_affine"]
CASES = [(trainer, method) for trainer in TRAINERS for method in NAMES]
FAST = [("sft", "afa"), ("dpo", "nora++"), ("grpo", "loran"), ("reward", "nora")]


def adapted(name, method):
    model = TRAINERS[name][1]()
    la.attach(model, METHODS[method], train=["score"] if name == "reward" else ())
    return model


@pytest.mark.parametrize(("name", "method"), fast_only(FAST, CASES))
def test_trained_saved_and_loaded(tmp_path, name, method):
    make, base = TRAINERS[name]
    model = adapted(name, method)
    before = values(model)
    trainer = make(tmp_path, model)
    trainer.add_callback(AdapterTrainerCallback(trainer, figures=False))
    trainer.train()
    assert trainer.model is model
    trained = values(model)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    changed = {n for n in trained if not torch.equal(trained[n], before[n])}
    assert changed & {n for n, p in model.named_parameters() if p.requires_grad}
    assert not changed & frozen
    assert any("adapter/summary" in key for entry in trainer.state.log_history for key in entry)

    fresh = base()
    la.load_adapters(fresh, tmp_path / "checkpoint-4")
    ids = torch.arange(1, 9)[None]
    model.eval()
    assert torch.equal(fresh.eval()(ids).logits, model(ids).logits)
    trainer.save_model(str(tmp_path / "saved"))
    la.load_adapters(base(), tmp_path / "saved")


@pytest.mark.parametrize("method", ["afa", "nora++"])
def test_sft_resumes_bit_for_bit(tmp_path, method):
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        model = adapted("sft", method)
        trainer = sft(tmp_path, model)
        trainer.add_callback(AdapterTrainerCallback(trainer))
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append(values(model))
    assert [n for n in ends[0] if not torch.equal(ends[0][n], ends[1][n])] == []


PEFT = {
    "nora": (peft_tuners.NoRAConfig, {"groups": 4, "base": "anchored"}),
    "afa": (peft_tuners.AFALoRAConfig, {"rank": 2}),
    "loran": (peft_tuners.LoRANConfig, {"rank": 2}),
    "nora++": (peft_tuners.NoRAPlusPlusConfig, {"nora": la.NoRA(groups=4), "lora": la.LoRA(rank=2)}),
}


@pytest.mark.parametrize(
    ("name", "method"),
    fast_only([("dpo", "nora"), ("sft", "afa")], [(trainer, method) for trainer in TRAINERS for method in PEFT]),
)
def test_peft_config(tmp_path, name, method):
    """The trainers make the peft model; DPO's reference is the model without its adapter, and no second one."""
    make, base = TRAINERS[name]
    kind, settings = PEFT[method]
    task = "SEQ_CLS" if name == "reward" else "CAUSAL_LM"
    trainer = make(tmp_path, base(), kind(**settings, task_type=task))
    trainer.add_callback(AdapterTrainerCallback(trainer, figures=False))
    if name == "dpo":
        assert trainer.ref_model is None
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    if name == "dpo":
        assert history[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)  # model and reference are equal at first
    assert any("adapter/summary" in key for entry in trainer.state.log_history for key in entry)
    if method == "afa":
        assert all(a.beta.item() == 0 for _, a in la.adapters(trainer.model))
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "checkpoint-4")
    ids = torch.arange(1, 9)[None]
    assert torch.equal(again.eval()(ids).logits, trainer.model.eval()(ids).logits)


def test_a_peft_model_resumes_as_lora_of_peft_does(tmp_path):
    """Bit for bit, with the annealing at its place."""
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        trainer = sft(tmp_path, causal(), peft_tuners.AFALoRAConfig(rank=2, task_type="CAUSAL_LM"))
        trainer.add_callback(AdapterTrainerCallback(trainer))
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append(values(trainer.model))
    assert [n for n in ends[0] if not torch.equal(ends[0][n], ends[1][n])] == []


def test_calibration_in_grpo_is_left_to_the_user(tmp_path):
    model = causal()
    la.attach(model, la.NoRA(groups=4, fit_range="calibrate"))
    trainer = grpo(tmp_path, model)
    trainer.add_callback(AdapterTrainerCallback(trainer))
    with pytest.raises(
        la.AdapterError, match=r"batches of GRPOTrainer are not arguments .* call lit_adapters\.calibrate"
    ):
        trainer.train()
