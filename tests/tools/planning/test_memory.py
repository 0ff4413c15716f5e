"""Terms of the plan against numbers worked out by hand, and against what torch keeps of real models."""

import contextlib
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlhf_recipes.models import load_causal_lm
from rlhf_recipes.models.fused_lora import fuse_lora
from rlhf_recipes.models.gated_mlp import fuse_mlps
from rlhf_recipes.models.packing import pack
from rlhf_recipes.tools.planning.memory import (
    PhaseMemory,
    cache_bytes,
    casts_inputs,
    exact_kl_memory,
    first_logits_memory,
    kept_activations,
    kept_per_layer,
    logits_memory,
    rollout_bytes,
    weight_bytes,
    working_memory,
)
from rlhf_recipes.tools.planning.network import adapter_sizes, empty_model, network_sizes
from tests.tools.planning.support import ADAPTER, NETWORK, SIZES, WHOLE

AUTOCAST = replace(SIZES, weight_bytes=2, autocast=True)


def test_total_is_the_sum_of_the_parts():
    assert PhaseMemory(1, 2, 3, 4, 5, 6, 7).total == 28


def test_weight_bytes_numbers():
    assert weight_bytes(NETWORK, 4) == 4 * 2792
    assert weight_bytes(NETWORK, 2) == 2 * 2792
    four_bits = 1640 * 4 + 1152 / 2 + 1152 / 64 + 14 * 4 + 14 * 4 * 273
    assert weight_bytes(NETWORK, 4, bits=4) == four_bits
    assert weight_bytes(NETWORK, 2, bits=8) == 1640 * 2 + 1152 * (1 + 4 / 4096)


def test_kept_per_layer_numbers():
    # norms 2 x 8 x 4; q, k, v 3 x 8 x 4 and 4 for each head; MLP (2 x 16 + 8) x 4; inputs 16 x 4; ranks 14 x 4
    assert kept_per_layer(SIZES, NETWORK, ADAPTER) == 64 + 96 + 8 + 160 + 64 + 56
    # trained as a whole: MLP 3 x 16 x 4; inputs 40 x 4; ranks 14 x 4
    assert kept_per_layer(SIZES, NETWORK, WHOLE) == 64 + 96 + 8 + 192 + 160 + 56
    # every adapted layer casts its input, so that the attention's output is kept beside it
    mixed = replace(SIZES, autocast=True, device="cuda")
    assert kept_per_layer(mixed, NETWORK, ADAPTER) == 64 + 64 + 8 + 80 + 64 + 28
    assert kept_per_layer(replace(AUTOCAST, device="cuda"), NETWORK, ADAPTER) == 64 + 48 + 8 + 80 + 32 + 28
    # a CPU keeps q, k, v and the attention's output in float32, 4 x 8 x 4
    assert kept_per_layer(AUTOCAST, NETWORK, ADAPTER) == 64 + 128 + 8 + 80 + 32 + 28
    # the weights of 2 heads to 5 tokens, in place of one number for each head
    assert kept_per_layer(replace(SIZES, eager=True), NETWORK, ADAPTER) == 64 + 96 + 40 + 160 + 64 + 56
    plain = replace(NETWORK, gated=False)
    assert kept_per_layer(SIZES, plain, ADAPTER) == 64 + 96 + 8 + 64 + 64 + 56


@pytest.mark.parametrize(
    ("weights", "bits", "autocast", "casts"),
    [
        (4, 0, False, False),
        (2, 0, False, True),
        (4, 0, True, True),
        (2, 0, True, False),
        (2, 4, True, False),
        (2, 4, False, True),
    ],
)
def test_casts_inputs_where_formats_differ(weights, bits, autocast, casts):
    assert casts_inputs(replace(SIZES, weight_bytes=weights, quantized_bits=bits, autocast=autocast)) is casts


def test_kept_activations_numbers():
    tokens, layer = 10, 448
    assert kept_activations(SIZES, NETWORK, ADAPTER) == 2 * tokens * layer + 3 * 4 * 8 * tokens
    checkpointing = replace(SIZES, checkpointing=1)
    assert kept_activations(checkpointing, NETWORK, ADAPTER) == 2 * 8 * 4 * tokens + 3 * 4 * 8 * tokens
    every_second = kept_activations(replace(SIZES, checkpointing=2), NETWORK, ADAPTER)
    assert every_second == (448 + 8 * 4) * tokens + 3 * 4 * 8 * tokens
    assert kept_activations(AUTOCAST, NETWORK, ADAPTER) == 2 * tokens * 340 + 3 * 4 * 8 * tokens + 2 * 600
    in_mlps = replace(ADAPTER, in_mlps=100)  # of which no copies are kept
    expected = 2 * tokens * 340 + 3 * 4 * 8 * tokens + 2 * 500
    assert kept_activations(AUTOCAST, NETWORK, in_mlps) == expected


def test_working_memory_numbers():
    assert working_memory(SIZES, 10, backward=False) == 10 * (5 * 16 * 4 + 3 * 8 * 4)
    assert working_memory(SIZES, 10, backward=True) == 10 * (5 * 16 * 4 + 2 * 8 * 4)
    many = 20_000  # a CPU computes the MLP for 2**18 / 16 at a time, a GPU for 4096
    assert working_memory(SIZES, many, backward=True) == 2**14 * 5 * 16 * 4 + many * 2 * 8 * 4
    gpu = replace(SIZES, device="cuda")
    assert working_memory(gpu, many, backward=True) == 4096 * 5 * 16 * 4 + many * 2 * 8 * 4
    whole = replace(SIZES, policy=WHOLE)
    assert working_memory(whole, 10, backward=False) == 10 * (4 * 16 * 4 + 3 * 8 * 4)
    assert working_memory(whole, 10, backward=True) == 10 * (3 * 16 * 4 + 2 * 8 * 4)
    quantized = replace(whole, quantized_bits=4)
    assert working_memory(quantized, 10, backward=True) == 10 * (3 * 16 * 4 + 2 * 8 * 4) + 128 * 4


def test_logits_memory_numbers():
    assert logits_memory(SIZES, backward=False) == 4 * 100 * 16
    assert logits_memory(SIZES, backward=True) == 4 * 100 * 37 + 4 * 8 * 4
    assert logits_memory(AUTOCAST, backward=False) == 4 * 100 * 14 + 100 * 8 * 2
    gpu = replace(SIZES, device="cuda")
    assert logits_memory(gpu, backward=False) == 4 * 32768 * 4
    large = replace(SIZES, micro_batch=4000, network=replace(NETWORK, vocabulary=150_000))
    assert logits_memory(large, backward=False) == 32 * 32768 * 16
    assert logits_memory(replace(large, device="cuda"), backward=False) == 4096 * 32768 * 4


def test_small_terms_numbers():
    assert exact_kl_memory(SIZES) == 0
    assert exact_kl_memory(replace(SIZES, exact_kl=True)) == 6 * 4 * 512 * 100
    assert first_logits_memory(SIZES) == 5 * 4 * 6 * 100
    assert first_logits_memory(AUTOCAST) == 5 * 4 * 6 * 100 + 2 * 6 * 100 * 8
    assert first_logits_memory(replace(AUTOCAST, device="cuda")) == 5 * 4 * 6 * 100
    assert cache_bytes(SIZES) == 2 * 6 * 5 * 1 * 4 * 4 * 3
    assert rollout_bytes(SIZES) == 6 * (16 * 3 + 40 * 2)


@given(
    more=st.integers(1, 8),
    field=st.sampled_from(["micro_batch", "prompt", "completion"]),
    checkpointing=st.sampled_from([0, 1, 2]),
    autocast=st.booleans(),
)
def test_terms_grow_with_batch_and_length(more, field, checkpointing, autocast):
    less = replace(AUTOCAST if autocast else SIZES, checkpointing=checkpointing)
    greater = replace(less, **{field: getattr(less, field) + more})
    assert kept_activations(greater, NETWORK, ADAPTER) > kept_activations(less, NETWORK, ADAPTER)
    grows = logits_memory(greater, backward=True) > logits_memory(less, backward=True)
    assert grows == (field != "prompt"), "the output layer sees the completions only"


# What torch does with real models

FORMS = {
    "float32": {},
    "bfloat16": {"weight_bytes": 2},
    "autocast": {"weight_bytes": 2, "autocast": True},
    "eager": {"eager": True},
    "bfloat16 on a GPU": {"weight_bytes": 2, "device": "cuda"},  # as here without `pack`
    "autocast on a GPU": {"weight_bytes": 2, "autocast": True, "device": "cuda"},
}


def kept_by_torch(model, ids):
    """Bytes of the storages that a forward pass keeps for its backward pass, weights aside."""
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.get_base_model().base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("checkpointing", [0, 1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_kept_activations_are_what_torch_keeps(other_model_path, form, checkpointing):
    fields = FORMS[form]
    dtype = torch.bfloat16 if fields.get("weight_bytes") == 2 else torch.float32
    attention = "eager" if form == "eager" else "sdpa"
    base = AutoModelForCausalLM.from_pretrained(other_model_path, dtype=dtype, attn_implementation=attention)
    if "device" not in fields:
        pack(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    fuse_mlps(base)
    model = get_peft_model(base, fuse_lora(config)).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=checkpointing)
    autocast = torch.autocast("cpu", torch.bfloat16) if "autocast" in fields else contextlib.nullcontext()
    ids = torch.randint(3, 20, (4, 16))
    with autocast:
        kept = kept_by_torch(model, ids)
    empty = empty_model(other_model_path)
    network = network_sizes(empty)
    lengths = {"micro_batch": 4, "prompt": 10, "completion": 6, "checkpointing": checkpointing}
    sizes = replace(SIZES, network=network, **lengths, **fields)
    planned = kept_activations(sizes, network, adapter_sizes(empty, config))
    result = 2 * 4 * 64 * network.hidden  # the last states and the output layer's copy are not for the layers
    first = 0 if checkpointing else 4 * 64 * network.hidden  # the input of the first norm needs no gradient
    assert kept == pytest.approx(planned - result - first, rel=0.03)


def tensor_bytes(model):
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weight_bytes_are_those_of_real_models(other_model_path, dtype, bits):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = load_causal_lm(other_model_path, dtype=dtype, quantization_config=quantization if bits else None)
    network = network_sizes(empty_model(other_model_path))
    planned = weight_bytes(network, 2 if dtype == "bfloat16" else 4, bits)
    # the second level's blocks of 256 are rounded up for each layer
    assert tensor_bytes(model) == (planned if bits == 0 else pytest.approx(planned, rel=2e-3))


def test_adapter_and_optimizer_bytes_are_those_of_real_models(other_model_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(other_model_path, dtype=torch.bfloat16), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    planned = adapter_sizes(empty_model(other_model_path), config)
    assert sum(parameter.numel() * parameter.element_size() for parameter in trained) == 4 * planned.parameters
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(moment.numel() * moment.element_size() for moment in moments) == 8 * planned.parameters
