"""`save_pretrained` of an adapted model."""

import copy
import pickle

import pytest
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import lit_adapters as la
from tests.matrix import METHODS, MODELS, build

CASES = [(method, lambda m: m) for method in ("lora", "nora", "bitfit")]
CASES += [("dora", copy.deepcopy), ("loran", lambda m: pickle.loads(pickle.dumps(m)))]


@pytest.mark.parametrize(("method", "change"), CASES)
def test_it_refuses_while_there_are_adapters(method, change, tmp_path):
    model = build("llama")
    la.attach(model, METHODS[method])
    model = change(model)
    for part in (model, model.model):
        with pytest.raises(la.AdapterError, match=r"without its adapters; lit_adapters\.save_adapters.*merge"):
            part.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    la.detach(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(MODELS["llama"].run(again), MODELS["llama"].run(model))


def test_a_trainer_saves_its_checkpoint_with_a_warning(tmp_path):
    model = build("llama")
    la.attach(model, la.LoRA(rank=2))
    with pytest.warns(UserWarning, match="from_pretrained loads this directory without the adapters"):
        model.save_pretrained(tmp_path, state_dict=None, is_main_process=True)
    assert (tmp_path / "model.safetensors").is_file()


def test_a_merged_or_frozen_model_is_an_ordinary_one(tmp_path):
    merged, frozen = build("llama"), build("llama")
    la.attach(merged, la.LoRA(rank=2))
    la.merge(merged)
    la.attach(frozen, [], train=["norm"])
    for model in (merged, frozen):
        model.save_pretrained(tmp_path)


def test_functions_that_stay_after_merging(tmp_path):
    model = build("llama")
    la.attach(model, METHODS["nora"])
    la.merge(model)
    for part in (model, model.model):
        with pytest.raises(
            la.AdapterError, match=r"without its learned functions; lit_adapters\.huggingface\.save_with"
        ):
            part.save_pretrained(tmp_path)
    la.attach(model, METHODS["lora"])
    la.merge(model)
    with pytest.raises(la.AdapterError, match="without its learned functions"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
