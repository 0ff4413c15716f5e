"""Time of an update: by hand, against torch's count of operations, and by properties."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from rlhf_recipes.tools.planning.network import empty_model, network_sizes
from rlhf_recipes.tools.planning.sizes import Layout
from rlhf_recipes.tools.planning.speed import (
    FAST,
    GPUS,
    SLOW,
    Gpu,
    Pace,
    Seconds,
    Work,
    decoding_bytes,
    forward_flops,
    gather_seconds,
    generation_seconds,
    link_bandwidth,
    tokens_per_second,
    training_flops,
    update_seconds,
)
from tests.tools.planning.support import NETWORK
from tests.tools.planning.support import SIZES as CPU

SIZES = replace(CPU, device="cuda")
GPU = Gpu("one", 1024, bandwidth=1000.0, flops=1e6, link=500.0)
PACE = Pace(1.0, 1.0, 0.0, 0.0, 1.0, network=100.0, overlaps=False)
WORK = Work(epochs=3, steps=6)
# of one text of 5 tokens: 1152 weights, and 2 layers of 8 numbers that look at half of 5 tokens, in two products
FORWARD = 5 * (2 * 1152 + 2 * 2 * 8 * 5)
OUTPUT = 2 * 800


def test_forward_flops_numbers():
    assert forward_flops(NETWORK, 5, 0) == FORWARD
    assert forward_flops(NETWORK, 5, 2) == FORWARD + 2 * OUTPUT


def test_training_flops_numbers():
    attention = 5 * 2 * 2 * 8 * 5
    twice = 2 * (FORWARD + 2 * OUTPUT) + attention
    assert training_flops(SIZES, NETWORK, 2) == twice
    assert training_flops(replace(SIZES, checkpointing=1), NETWORK, 2) == twice + FORWARD
    assert training_flops(replace(SIZES, checkpointing=2), NETWORK, 2) == twice + FORWARD / 2
    own = replace(NETWORK, layers=2)
    assert training_flops(replace(SIZES, critic_network=own), own, 0) == 3 * FORWARD


def counted(path, rows, length, backward):
    """Operations that torch counts in a pass of the layers and the output layer, adapters left out."""
    base = empty_model(path, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=1, target_modules="all-linear"))
    model.to("meta")
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids).logits
        if backward:
            logits.float().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_operations_are_those_that_torch_counts(other_model_path, backward):
    network = network_sizes(empty_model(other_model_path))
    rows, length = 2, 64
    sizes = replace(SIZES, network=network, prompt=length, completion=0)
    attention = 2 * network.layers * network.heads * network.head_size * length**2
    planned = training_flops(sizes, network, length) if backward else forward_flops(network, length, length)
    # torch's eager attention computes what the mask hides too: twice the half that counts here
    planned += attention * (3 if backward else 1)
    assert counted(other_model_path, rows, length, backward) == pytest.approx(rows * planned, rel=0.06)


def test_decoding_bytes_numbers():
    weights = 4 * (1152 + 40) + 4 * 800  # layers and the output layer, not the embedding
    cache = 2 * 2 * 1 * 4 * 4 * (3 + 1)  # one head's keys and values in two layers, at the prompt and half of the rest
    assert decoding_bytes(SIZES, 1) == weights + cache
    assert decoding_bytes(SIZES, 6) == weights + 6 * cache
    four_bits = replace(SIZES, weight_bytes=2, quantized_bits=4)
    packed = 1152 / 2 + 1152 / 64 + 14 * 4 + 14 * 4 * 273
    alone = packed + 2 * 40 + 2 * 800 + cache / 2
    assert decoding_bytes(four_bits, 1) == alone
    assert decoding_bytes(four_bits, 2) == alone + cache / 2 + 2 * 2 * 1152  # written out and read again


def test_link_bandwidth_numbers():
    assert link_bandwidth(Layout(4), GPU, PACE) == 500
    assert link_bandwidth(Layout(4), GPU, replace(PACE, link=0.5)) == 250
    assert link_bandwidth(Layout(4, machines=2), GPU, PACE) == 100
    assert link_bandwidth(Layout(4, machines=2), replace(GPU, link=50), PACE) == 50


def test_gather_seconds_numbers():
    assert gather_seconds(SIZES, Layout(4), GPU, PACE) == 0
    adapters = 1208 + 1200 + 8
    assert gather_seconds(SIZES, Layout(4, sharding="fsdp2"), GPU, PACE) == 4 * (2792 + adapters) * 3 / 4 / 500
    assert gather_seconds(SIZES, Layout(4, sharding="zero3"), GPU, PACE) == 4 * 2792 * 3 / 4 / 500


def test_generation_seconds_numbers():
    prompts = 6 * forward_flops(NETWORK, 3, 1) / 1e6
    reading, computing = decoding_bytes(SIZES, 6) / 1000, 6 * 2 * (1152 + 800) / 1e6
    assert generation_seconds(SIZES, Layout(), GPU, PACE) == pytest.approx(prompts + 2 * reading)
    slow = replace(GPU, flops=100.0)
    assert generation_seconds(SIZES, Layout(), slow, PACE) == pytest.approx(1e4 * (prompts + 2 * computing))
    launched = replace(PACE, python_seconds=5.0, graph_seconds=1.0)
    assert generation_seconds(SIZES, Layout(), GPU, launched) == pytest.approx(prompts + 2 * (reading + 2 * 5))
    gathered = Layout(4, sharding="zero3")
    once = gather_seconds(SIZES, gathered, GPU, PACE)
    assert generation_seconds(SIZES, gathered, GPU, PACE) == pytest.approx(prompts + 2 * reading + once)
    assert generation_seconds(SIZES, Layout(4, sharding="fsdp2"), GPU, PACE) == pytest.approx(prompts + 2 * reading)


def test_generation_seconds_of_vllm_numbers():
    sizes = replace(SIZES, weight_bytes=2)
    server = Layout(4, sharding="fsdp2", vllm="server", tensor_parallel=2, vllm_bytes=2**30)
    rows, flops = 4 * 6, 2e6
    prompts = rows * forward_flops(NETWORK, 3, 1) / flops
    exchanged = 2 * 2 * rows * 8 * 2 * 2 / 2 / 500
    step = decoding_bytes(sizes, rows) / 2000 + exchanged
    assert generation_seconds(sizes, server, GPU, PACE) == pytest.approx(prompts + 2 * step)
    colocated = replace(server, vllm="colocate", tensor_parallel=1)
    alone = 6 * forward_flops(NETWORK, 3, 1) / 1e6 + 2 * decoding_bytes(sizes, 6) / 1000
    assert generation_seconds(sizes, colocated, GPU, PACE) == pytest.approx(alone)
    # with room for half of them, half are sampled after the other half
    token = 2 * 2 * 2 * 4
    small = replace(server, tensor_parallel=1, vllm_bytes=1200 + 2 * 2792 + 8192 * 224 + 204_800 + 12 * 5 * token)
    halves = 2 * (12 * forward_flops(NETWORK, 3, 1) / 1e6 + 2 * decoding_bytes(sizes, 12) / 1000)
    assert generation_seconds(sizes, small, GPU, PACE) == pytest.approx(halves)


def test_update_seconds_numbers():
    plain = update_seconds(SIZES, Layout(), GPU, WORK, PACE)
    # policy, reference, and without the output layer the critic and one reward
    assert plain.score == pytest.approx(6 * (4 * FORWARD + 2 * 2 * OUTPUT) / 1e6)
    training = training_flops(SIZES, NETWORK, 2) + training_flops(SIZES, NETWORK, 0)
    assert plain.train == pytest.approx(6 * 3 * training / 1e6)
    head = update_seconds(replace(SIZES, critic=None), Layout(), GPU, WORK, PACE)
    assert head.score == pytest.approx(6 * (3 * FORWARD + 2 * 2 * OUTPUT) / 1e6)
    assert head.train == pytest.approx(6 * 3 * training_flops(SIZES, NETWORK, 2) / 1e6)
    assert plain.total == plain.generate + plain.score + plain.train


def test_update_seconds_of_several_gpus_numbers():
    one, ddp = (update_seconds(SIZES, Layout(number), GPU, WORK, PACE) for number in (1, 4))
    reduced = 6 * 2 * 4 * 1208 * 3 / 4 / 500
    assert (ddp.generate, ddp.score) == (one.generate, one.score)
    assert ddp.train == pytest.approx(one.train + reduced)
    layout = Layout(4, sharding="fsdp2")
    sharded, gather = update_seconds(SIZES, layout, GPU, WORK, PACE), gather_seconds(SIZES, layout, GPU, PACE)
    # once for sampling and scoring; three micro-batches of two trained networks in three epochs for both directions
    assert sharded.score == pytest.approx(one.score + gather)
    assert sharded.train == pytest.approx(one.train + 3 * 2 * 3 * 2 * gather + reduced)
    hidden = update_seconds(SIZES, layout, GPU, WORK, replace(PACE, overlaps=True))
    assert hidden.score == pytest.approx(max(one.score, gather))
    zero = replace(layout, sharding="zero3")
    scored = update_seconds(SIZES, zero, GPU, WORK, PACE).score
    assert scored == pytest.approx(one.score + 3 * 4 * gather_seconds(SIZES, zero, GPU, PACE))  # four networks


def test_tokens_per_second_numbers():
    assert tokens_per_second(SIZES, Layout(4), Seconds(1.0, 2.0, 3.0)) == 4 * 6 * 2 / 6


def test_figures_are_of_the_order_that_data_sheets_give():
    by_memory = sorted(GPUS.values(), key=lambda gpu: gpu.mib)
    assert [gpu.mib // 1000 for gpu in by_memory] == [24, 40, 46, 81, 81, 143]
    for gpu in GPUS.values():
        assert 8e11 < gpu.bandwidth < 5e12
        assert 1e14 < gpu.flops < 1e15
        assert gpu.link in (32e9, 300e9, 450e9)


LAYOUTS = st.builds(
    Layout,
    processes=st.integers(1, 64),
    sharding=st.sampled_from(["none", "fsdp2", "zero2", "zero3"]),
    vllm=st.sampled_from(["none", "server"]),
    vllm_bytes=st.just(2.0**30),
)


@given(layout=LAYOUTS, gpu=st.sampled_from(list(GPUS.values())), checkpointing=st.sampled_from([0, 1, 2]))
def test_slow_is_slower_than_fast_and_faster_gpus_are_faster(layout, gpu, checkpointing):
    sizes = replace(SIZES, checkpointing=checkpointing)
    slow, fast = (update_seconds(sizes, layout, gpu, WORK, pace) for pace in (SLOW, FAST))
    assert slow.generate > fast.generate > 0
    assert slow.score > fast.score > 0
    assert slow.train > fast.train > 0
    better = replace(gpu, bandwidth=2 * gpu.bandwidth, flops=2 * gpu.flops, link=2 * gpu.link)
    for pace in (SLOW, FAST):
        assert (
            update_seconds(sizes, layout, better, WORK, pace).total
            < update_seconds(sizes, layout, gpu, WORK, pace).total
        )


@given(field=st.sampled_from(["rollout", "prompt", "completion"]), more=st.integers(1, 30), layout=LAYOUTS)
def test_more_work_takes_longer(field, more, layout):
    longer = replace(SIZES, **{field: getattr(SIZES, field) + more})
    before, after = (update_seconds(sizes, layout, GPUS["h100"], WORK, SLOW) for sizes in (SIZES, longer))
    assert after.score > before.score
    assert after.train > before.train
    assert after.generate > before.generate


@given(processes=st.integers(2, 32))
def test_ddp_scales_and_never_more_than_by_its_gpus(processes):
    one, several = (
        tokens_per_second(SIZES, layout, update_seconds(SIZES, layout, GPUS["a100_80gb"], WORK, FAST))
        for layout in (Layout(), Layout(processes))
    )
    assert one < several <= processes * one
