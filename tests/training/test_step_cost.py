"""What a step takes, traced without values: held to the allocator, to formulas and to known sizes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import lit_adapters as la
from benchmarks.timing import allocated_mib
from language.generate import made_up_completions
from lit_adapters import optimizers
from lit_adapters.lightning.recipe_cost import read_recipe
from lit_adapters.ops import cache
from lit_adapters.training.hardware import DEVICES, Device
from lit_adapters.training.placement import BUCKETS, GATHERED, SENT, place
from lit_adapters.training.step_cost import (
    CACHE,
    GRADIENTS,
    KEPT,
    LOGITS,
    OPTIMIZER,
    TEMPORARY,
    TRAINED,
    WEIGHTS,
    Example,
    Operation,
    step_cost,
)
from tests.matrix import ALL, METHODS

ROWS, LENGTH, VOCABULARY = 4, 64, 512


def llama(**changes):
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).train()


def loss(model):
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, 0] = 0  # as in a padded batch
    return model(input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False).loss


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def example(method=None, prepare=None, **changes):
    def build():
        model = llama(**changes)
        if method is not None:
            la.attach(model, method)
        if prepare is not None:
            prepare(model)
        return model

    return Example(build, loss, ROWS, ROWS * LENGTH, "tokens", VOCABULARY)


def beyond_the_model(cost):
    return (cost.peak - cost.parts.get(WEIGHTS, 0) - cost.parts.get(TRAINED, 0)) / 2**20


def held_to_the_allocator(given, autocast=None, optimizer=adamw):
    cost = step_cost(given, optimizer, autocast)
    model = given.build()
    storages = [t.untyped_storage() for t in [*model.parameters(), *model.buffers()]]
    storages = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert cost.parts.get(WEIGHTS, 0) + cost.parts.get(TRAINED, 0) == sum(storages.values())
    stepping = optimizer(model)

    def step():
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            value = given.loss(model)
        stepping.zero_grad()  # as Lightning does
        value.backward()
        stepping.step()

    assert beyond_the_model(cost) == pytest.approx(allocated_mib(step), rel=0.1)
    return cost


@pytest.mark.parametrize("name", ["lora", "nora"])
def test_memory_is_what_the_allocator_counts(name):
    held_to_the_allocator(example(METHODS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", list(ALL))
def test_memory_of_every_method_is_what_the_allocator_counts(name, autocast):
    held_to_the_allocator(example(ALL[name]), autocast)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LoRAPlus", "LoRARITE", "LoFT"])
def test_memory_of_every_optimizer_is_what_the_allocator_counts(name):
    def optimizer(model):
        return getattr(optimizers, name)(optimizers.parameter_groups(model, lr=1e-3, pairs=True))

    held_to_the_allocator(example(la.LoRA(rank=16)), optimizer=optimizer)


@pytest.mark.slow
def test_sampling_takes_keys_and_values_and_as_many_products_as_its_passes():
    """Two of 100 passes are traced; the plain formula of attention, whose products torch counts."""
    new = 101

    def sampled(model):
        made_up_completions(model, ROWS, LENGTH, new)
        return model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits.sum()

    def freeze(model):
        model.requires_grad_(False).lm_head.requires_grad_(True)

    given = example(prepare=freeze, attn_implementation="eager", num_hidden_layers=12)
    cost = step_cost(replace(given, loss=sampled), adamw)
    model = given.build()
    with FlopCounterMode(display=False) as counter:
        sampled(model).backward()
    assert cost.flops() == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert cost.parts[CACHE] == 12 * 2 * ROWS * 2 * (LENGTH + new - 1) * 16 * 4


@pytest.mark.parametrize("name", ["grpo", "draft"])
def test_memory_of_other_trainings_is_what_the_allocator_counts(name):
    """With eager attention, which forms the mask that the made-up rows, which have no padding, could do without."""
    recipe = read_recipe(Path(f"configs/language/smoke/{name}.yaml"), ["model.attention=eager"])
    held_to_the_allocator(recipe.example, optimizer=recipe.optimizer)


def test_full_fine_tuning_and_checkpointing():
    full = held_to_the_allocator(example())
    assert full.parts[TRAINED] > 0
    assert full.parts[OPTIMIZER] == pytest.approx(2 * full.parts[TRAINED], rel=1e-3)

    def enable(model):
        model.gradient_checkpointing_enable({"use_reentrant": False})

    plain, checkpointed = (held_to_the_allocator(example(METHODS["lora"], p)) for p in (None, enable))
    assert checkpointed.peak < plain.peak
    assert checkpointed.flops() > plain.flops()


def test_logits_are_told_apart():
    parts = step_cost(example(METHODS["lora"]), adamw).parts
    assert parts[LOGITS] % (ROWS * LENGTH * VOCABULARY * 4) == 0


def test_tied_weights_count_once():
    tied, untied = (step_cost(example(METHODS["lora"], tie_word_embeddings=t), adamw) for t in (True, False))
    assert untied.parts[WEIGHTS] - tied.parts[WEIGHTS] == VOCABULARY * 64 * 4


def test_weights_are_cast():
    full, half = (step_cost(example(METHODS["lora"]), adamw, weights=dtype) for dtype in (None, torch.bfloat16))
    assert half.parts[TRAINED] == full.parts[TRAINED]  # adapters stay in float32
    assert half.parts[WEIGHTS] == pytest.approx(full.parts[WEIGHTS] / 2, rel=0.01)


def test_operations_of_a_linear_layer():
    """2 n m k operations in the forward pass, as many for the gradient of the weight, none for that of the input."""
    rows, inputs, outputs = 8, 16, 32

    def build():
        return nn.Linear(inputs, outputs, bias=False)

    given = Example(build, lambda m: m(torch.ones(rows, inputs)).sum(), rows, rows, "rows", 0)
    cost = step_cost(given, lambda m: torch.optim.SGD(m.parameters(), lr=1.0))
    assert cost.flops() == 2 * 2 * rows * inputs * outputs
    assert cost.flops(3) == 3 * cost.flops()
    assert cost.parts[GRADIENTS] == cost.parts[TRAINED] == 4 * inputs * outputs
    product = next(o for o in cost.operations if o.flops)
    assert product.moved == 4 * (rows * inputs + inputs * outputs + rows * outputs)


def test_operations_of_attention():
    """2 n^2 k for each of two products forward and five backward, of every head."""
    heads, length, size = 3, 16, 8

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.given = nn.Parameter(torch.randn(2, heads, length, size))

        def forward(self):
            return F.scaled_dot_product_attention(self.given, self.given, self.given, is_causal=True).sum()

    cost = step_cost(Example(Attention, lambda m: m(), 2, 2, "rows", 0), adamw)
    assert cost.flops() == (2 + 5) * 2 * 2 * heads * length * length * size


def test_gradients_live_through_the_next_forward_pass():
    """In Lightning, so a Trainer's peak has them beside the activations."""
    cost = step_cost(example(), adamw)
    assert cost.parts[GRADIENTS] == cost.parts[TRAINED]


def test_an_optimizer_that_takes_all_parameters_at_once_needs_more():
    def build():
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))

    given = Example(build, lambda m: m(torch.ones(1, 64)).sum(), 1, 1, "rows", 0)
    one, all_at_once = (step_cost(given, adamw, foreach=foreach) for foreach in (False, True))
    assert all_at_once.peak > one.peak


def test_operations_that_change_their_arguments():
    """SGD without momentum reads parameters and gradients, and writes parameters, one by one or all at once."""

    def build():
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))

    given = Example(build, lambda m: m(torch.ones(1, 64)).sum(), 1, 1, "rows", 0)
    for foreach in (False, True):
        cost = step_cost(given, lambda m: torch.optim.SGD(m.parameters(), lr=1.0), foreach=foreach)
        assert sum(operation.moved for operation in cost.update) == 3 * cost.parts[TRAINED], foreach


def _drawn(given):
    return given.bernoulli_(0.5)


def _all_zero(given):
    torch._foreach_zero_([given])


@pytest.mark.parametrize(
    ("fill", "times"), [(lambda given: given.copy_(torch.ones(1024)), 2), (torch.zero_, 1), (_drawn, 1), (_all_zero, 1)]
)
def test_filling_a_tensor_writes_it_once(fill, times):
    def filled(model):
        given = torch.empty(4096)[:1024]
        fill(given)
        return model(given[:4]).sum()

    given_bytes = 4 * 1024
    cost = step_cost(Example(lambda: nn.Linear(4, 1), filled, 1, 1, "rows", 0), adamw)
    sizes = {operation.moved for operation in cost.operations} - {4 * given_bytes}  # without making the memory
    assert max(sizes) == times * given_bytes


def test_what_adapters_keep_between_steps_is_told():
    method = la.NestedLoRA(rank=32, inner_rank=2, init="svd")  # keeps its frozen outer pair in the dtype of products
    cost = step_cost(example(method), adamw, torch.bfloat16)
    assert cost.parts[KEPT] > 0


def test_packed_weights_take_what_bitsandbytes_needs():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(128, 4096)
    packed = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    packed = packed.to("cpu")
    state = packed.quant_state
    taken = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes

    def build():
        model = nn.Sequential(nn.Linear(4096, 128, bias=False), nn.GELU())
        la.attach(model, la.LoRA(rank=2, targets=["0"]))
        return model

    def cost(is_packed):
        given = Example(build, lambda m: m(torch.ones(2, 4096)).sum(), 2, 2, "rows", 0, is_packed)
        return step_cost(given, adamw)

    plain, quantised = cost(False), cost(True)
    assert plain.parts[WEIGHTS] - quantised.parts[WEIGHTS] == pytest.approx(weight.nbytes - taken, rel=1e-3)
    assert quantised.parts[TEMPORARY] - plain.parts.get(TEMPORARY, 0) == weight.nbytes


def test_values_are_kept_in_other_modes_as_before():
    step_cost(example(METHODS["lora"]), adamw)
    assert cache._represents_others


def test_several_devices():
    cost = step_cost(example(METHODS["lora"]), adamw)
    model = example(METHODS["lora"]).build()
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert place(cost, 1, "fsdp").parts == cost.parts
    trained = cost.parts[TRAINED]
    ddp = place(cost, 4, "ddp")
    assert ddp.peak == cost.peak + trained == cost.peak + ddp.parts[BUCKETS]
    assert ddp.sent == 2 * 3 / 4 * trained
    sharded = place(cost, 4, "fsdp")
    assert cost.buffers == buffers > 0
    assert sharded.parts[WEIGHTS] == (cost.parts[WEIGHTS] - buffers) / 4 + buffers  # FSDP2 shards parameters alone
    assert sharded.parts[GATHERED] == 2 * cost.largest_block + cost.rest
    assert 2 * cost.largest_block + cost.rest == cost.parts[WEIGHTS] + trained - buffers  # of two blocks
    assert sharded.parts[SENT] == 2 * cost.trained_block == trained
    assert sharded.sent == 3 / 4 * (2 * (cost.parts[WEIGHTS] - buffers + trained) + trained)
    assert place(cost, 4, "ddp", 3).sent == ddp.sent  # once a step
    assert place(cost, 4, "fsdp", 3).sent == 3 * sharded.sent  # nothing holds back the gradients of a batch
    assert ddp.seconds_between(DEVICES["h100"]) == ddp.sent / 450e9


def test_each_operation_is_bound_by_arithmetic_or_memory():
    device = Device("d", 1e9, halves=20.0, floats=10.0, bandwidth=5.0, link=1.0, overhead=0.5, reach=(0.5, 0.25))
    floats = [Operation(100, 5, torch.float32), Operation(0, 20, torch.float32)]
    assert device.seconds(floats) == (10 + 4) / 0.5 + 2 * 0.5
    assert device.seconds([Operation(100, 5, torch.bfloat16)]) == 5 / 0.25 + 0.5
    assert device.bounds(floats) == (10, 5)
