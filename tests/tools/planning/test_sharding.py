"""What a GPU holds of a shared run: by hand, against torch's FSDP2 and DeepSpeed's estimates, and by properties."""

import contextlib
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from rlhf_recipes.models.fused_lora import fuse_lora
from rlhf_recipes.tools.planning.network import adapter_sizes, empty_model, network_sizes
from rlhf_recipes.tools.planning.phases import PHASES, ppo_memory
from rlhf_recipes.tools.planning.sharding import (
    GATHERED_UNITS,
    adapters_on_a_gpu,
    base_bytes,
    base_on_a_gpu,
    base_while_loading,
    buffers_on_a_gpu,
    gradients_on_a_gpu,
    optimizer_on_a_gpu,
    unit_bytes,
)
from rlhf_recipes.tools.planning.sizes import AdapterSizes, Layout, NetworkSizes
from tests.tools.planning.support import NETWORK
from tests.tools.planning.support import SIZES as CPU

SIZES = replace(CPU, device="cuda")
IN_16_BITS = replace(SIZES, weight_bytes=2, autocast=True)
IN_4_BITS = replace(IN_16_BITS, quantized_bits=4)
ONE = Layout()
DDP, FSDP, ZERO_2, ZERO_3 = (Layout(4, sharding=kind) for kind in ("none", "fsdp2", "zero2", "zero3"))
WEIGHTS, OTHER, TRAINED, ADAPTERS = 2792, 1640, 1208, 1208 + 1200 + 8
PACKED, SCALES = 1152 / 2, 1152 / 64 + 14 * 4 + 14 * 4 * 273


def test_base_bytes_numbers():
    assert base_bytes(SIZES, ONE) == base_bytes(SIZES, DDP) == base_bytes(SIZES, ZERO_2) == (4 * WEIGHTS, 0)
    assert base_bytes(SIZES, FSDP) == base_bytes(SIZES, ZERO_3) == (0, 4 * WEIGHTS)
    assert base_bytes(SIZES, replace(FSDP, processes=1)) == (4 * WEIGHTS, 0)
    # packed weights in tensors of bytes stay whole, as their scales do in any case
    assert base_bytes(IN_4_BITS, FSDP) == (PACKED + SCALES, 2 * OTHER)
    assert base_bytes(IN_4_BITS, replace(FSDP, shards_quantized=True)) == (SCALES, PACKED + 2 * OTHER)
    in_8_bits = base_bytes(replace(IN_16_BITS, quantized_bits=8), replace(FSDP, shards_quantized=True))
    assert in_8_bits == (1152 * (1 + 4 / 4096), 2 * OTHER)
    # DeepSpeed casts float32 weights where the run computes in 16 bits
    assert base_bytes(replace(SIZES, autocast=True), ZERO_3) == (0, 2 * WEIGHTS)
    assert base_bytes(replace(SIZES, autocast=True), FSDP) == (0, 4 * WEIGHTS)


def test_base_on_a_gpu_numbers():
    assert base_on_a_gpu(SIZES, FSDP) == WEIGHTS
    assert base_on_a_gpu(SIZES, DDP) == 4 * WEIGHTS
    assert base_on_a_gpu(IN_4_BITS, replace(FSDP, shards_quantized=True)) == SCALES + (PACKED + 2 * OTHER) / 4
    assert base_while_loading(SIZES, FSDP) == 4 * WEIGHTS  # each process reads it
    assert base_while_loading(SIZES, ZERO_3) == WEIGHTS
    assert base_while_loading(IN_4_BITS, replace(ZERO_3, shards_quantized=True)) == SCALES + PACKED + 2 * OTHER
    assert base_while_loading(IN_4_BITS, replace(FSDP, shards_quantized=True)) == SCALES + PACKED + 2 * OTHER


def test_adapters_numbers():
    assert adapters_on_a_gpu(IN_16_BITS, ONE) == adapters_on_a_gpu(IN_16_BITS, DDP) == 4 * ADAPTERS
    assert adapters_on_a_gpu(IN_16_BITS, FSDP) == ADAPTERS
    assert adapters_on_a_gpu(IN_16_BITS, ZERO_2) == adapters_on_a_gpu(IN_16_BITS, ZERO_3) == 2 * ADAPTERS
    assert adapters_on_a_gpu(SIZES, ZERO_3) == 4 * ADAPTERS


def test_optimizer_and_gradients_numbers():
    assert [optimizer_on_a_gpu(IN_16_BITS, each) for each in (ONE, DDP)] == [8 * TRAINED] * 2
    assert optimizer_on_a_gpu(IN_16_BITS, FSDP) == 2 * TRAINED
    assert optimizer_on_a_gpu(IN_16_BITS, ZERO_2) == optimizer_on_a_gpu(IN_16_BITS, ZERO_3) == 3 * TRAINED
    assert [gradients_on_a_gpu(IN_16_BITS, each) for each in (ONE, DDP)] == [4 * TRAINED] * 2
    assert gradients_on_a_gpu(IN_16_BITS, FSDP) == gradients_on_a_gpu(IN_16_BITS, ZERO_3) == TRAINED
    assert gradients_on_a_gpu(IN_16_BITS, ZERO_2) == 1.5 * TRAINED
    assert gradients_on_a_gpu(SIZES, ZERO_2) == TRAINED


def test_buffers_numbers():
    # a layer: half of what is neither embedding (800) nor output layer (800), and half of the adapters, in float32
    layer = (4 * (WEIGHTS - 1600) + 4 * (1208 + 1200)) / 2
    assert unit_bytes(SIZES, FSDP) == layer
    assert [buffers_on_a_gpu(SIZES, ONE, phase) for phase in PHASES[1:]] == [0, 0, 0]
    assert [buffers_on_a_gpu(SIZES, DDP, phase) for phase in PHASES[1:]] == [4 * TRAINED] * 3
    sampling, scoring, training = (buffers_on_a_gpu(SIZES, FSDP, phase) for phase in PHASES[1:])
    assert sampling == 4 * WEIGHTS + 4 * ADAPTERS
    assert scoring == sampling
    assert training == 3200 + 2 * layer + 2 * 4 * TRAINED / 2
    wide = replace(SIZES, network=replace(NETWORK, embedding=8000, other_parameters=16_040))
    assert buffers_on_a_gpu(wide, FSDP, "train") == training + 4 * 7200
    tied = replace(wide, network=replace(wide.network, tied=True, other_parameters=8040))
    assert buffers_on_a_gpu(tied, FSDP, "train") == training + 4 * 7200
    assert buffers_on_a_gpu(SIZES, replace(FSDP, vllm="server"), "generate") == sampling
    bucket = 2 * 500_000_000
    assert [buffers_on_a_gpu(IN_16_BITS, ZERO_2, phase) for phase in PHASES[1:]] == [0, 0, bucket]
    assert [buffers_on_a_gpu(IN_16_BITS, ZERO_3, phase) for phase in PHASES[1:]] == [bucket + 2 * WEIGHTS] * 3
    large = replace(IN_16_BITS, network=replace(NETWORK, other_parameters=3 * 10**9))
    live = [buffers_on_a_gpu(large, ZERO_3, phase) - bucket for phase in PHASES[1:]]
    assert live == [6e9 + 2304, 2e9, 2e9]
    assert buffers_on_a_gpu(large, replace(ZERO_3, vllm="server"), "generate") == bucket + 2e9


# FSDP2 itself, on processes that are only pretended


@contextlib.contextmanager
def process(rank, of):
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=of)
    try:
        yield init_device_mesh("cpu", (of,))
    finally:
        torch.distributed.destroy_process_group()


def spread(model, mesh, ignored=()):
    """Divide a model into the units that accelerate makes of it."""
    inner = model.get_base_model()
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params={p for p in layer.parameters() if p in ignored})
    head = inner.lm_head
    ends = [[inner.model.norm, inner.model.embed_tokens, head]]
    if head.weight is not inner.model.embed_tokens.weight:
        ends = [inner.model.embed_tokens, [inner.model.norm, head]]
    for end in ends:
        fully_shard(end, mesh=mesh, reshard_after_forward=not isinstance(end, list))
    fully_shard(model, mesh=mesh, ignored_params=set(ignored))


LORA = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
ROLES = ("critic", "ref")


def shared_model(path):
    """A base with the adapters of three roles, on no device, and its sizes."""
    empty = empty_model(path)
    network, adapter = network_sizes(empty), adapter_sizes(empty, LORA)
    base = empty_model(path)
    model = get_peft_model(base, fuse_lora(LORA, base), low_cpu_mem_usage=True)
    for role in ROLES:
        model.add_adapter(role, LORA, low_cpu_mem_usage=True)
    fields = {"policy": adapter, "critic": adapter, "frozen": adapter.parameters, "heads": 1}
    return model, replace(SIZES, network=network, weight_bytes=2, **fields)


def packed(model, storage):
    """Put weights of 4 bits in the place of those of linear layers, as bitsandbytes lays them out in memory."""
    weights = set()
    for name, module in model.named_modules():
        if name.endswith("base_layer"):
            numbers = module.weight.numel() // 2 // storage.itemsize
            empty = torch.empty(numbers, 1, dtype=storage, device="meta")
            module.weight = nn.Parameter(empty, requires_grad=False)
            weights.add(module.weight)
    return weights


def held(model):
    """Bytes of base and of adapters that a process holds."""
    sums = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        part = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        sums["lora_" in name] += part.numel() * part.element_size()
    return sums[False], sums[True]


def parts_of_fsdp2(path, processes, ranks):
    parts = []
    for rank in ranks:
        with process(rank, processes) as mesh:
            model, sizes = shared_model(path)
            spread(model, mesh)
            parts.append(held(model))
    return parts, sizes, Layout(processes, sharding="fsdp2")


def test_parts_are_those_of_fsdp2(other_model_path):
    parts, sizes, layout = parts_of_fsdp2(other_model_path, 3, range(3))
    base, adapters = (sum(column) for column in zip(*parts, strict=True))
    head = 4 * sizes.network.hidden  # the critic's, which this model lacks
    assert base == sum(base_bytes(sizes, layout)) == base_bytes(sizes, ONE)[0]
    assert adapters == adapters_on_a_gpu(sizes, ONE) - head


@pytest.mark.parametrize("processes", [2, 8])
def test_no_part_is_larger_than_planned_but_by_a_row_of_each_matrix(other_model_path, processes):
    [(base, adapters)], sizes, layout = parts_of_fsdp2(other_model_path, processes, [0])
    assert base == pytest.approx(base_on_a_gpu(sizes, layout), rel=0.01)
    assert adapters == pytest.approx(adapters_on_a_gpu(sizes, layout), rel=0.01)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.uint8], ids=str)
def test_parts_of_4_bits_are_those_of_fsdp2(other_model_path, storage):
    with process(1, 4) as mesh:
        model, sizes = shared_model(other_model_path)
        weights = packed(model, storage)
        assert len(weights) == 21
        # accelerate ignores what holds no floats
        spread(model, mesh, ignored=weights if storage == torch.uint8 else ())
        base, _ = held(model)
    sizes = replace(sizes, quantized_bits=4)
    layout = Layout(4, sharding="fsdp2", shards_quantized=storage == torch.bfloat16)
    scales = sizes.network.linear_parameters / 64 + 21 * (4 + 4 * 273)  # belong to no parameter
    assert base + scales == pytest.approx(base_on_a_gpu(sizes, layout), rel=0.03)


def test_two_units_are_gathered_at_a_time():
    hidden, layers, rank = 64, 4, 4

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(hidden, 4 * hidden, bias=False), nn.Linear(4 * hidden, hidden, bias=False)
            self.a, self.b = nn.Linear(hidden, rank, bias=False), nn.Linear(rank, hidden, bias=False)
            self.up.requires_grad_(False), self.down.requires_grad_(False)

        def forward(self, states):
            return states + self.down(self.up(states).relu()) + self.b(self.a(states))

    network = NetworkSizes(hidden, layers, 1, 1, 1, 1, 1, True, 8, 8 * hidden**2 * layers, 0, 0, 0, 0, True)
    adapter = AdapterSizes(2 * rank * hidden * layers, rank, 0, 0)
    sizes = replace(SIZES, network=network, policy=adapter, critic=None, frozen=-hidden)  # without the critic's head
    with process(0, 4) as mesh, FakeTensorMode():
        model = nn.Sequential(*(Layer() for _ in range(layers)))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        tracker = FSDPMemTracker(model)
        with tracker:
            model(torch.ones(1, hidden)).sum().backward()
    layout = Layout(4, sharding="fsdp2")
    for moment in ("AFT_PRE_FW", "BEF_POST_FW", "AFT_PRE_BW", "BEF_POST_BW"):
        for layer in list(model)[1:-1]:
            snapshots = tracker.memory_tracking[layer].snapshots
            [snapshot] = [each[0] for state, each in snapshots.items() if state.name == moment]
            bytes_of = {kind.name: size for kind, size in snapshot[torch.device("cpu")].items() if kind != "Total"}
            gathered = bytes_of["UNSHARDED_PARAM"] + bytes_of["ALL_GATHER"]
            assert gathered == GATHERED_UNITS * unit_bytes(sizes, layout)
            assert bytes_of["SHARDED_PARAM"] == base_on_a_gpu(sizes, layout) + 2 * rank * hidden * layers
            if moment == "BEF_POST_BW":
                gradients = bytes_of["UNSHARDED_GRAD"] + bytes_of["REDUCE_SCATTER"]
                assert gradients == 2 * 4 * adapter.parameters / layers


# DeepSpeed's own estimates: `runtime/zero/stage_1_and_2.py` and `stage3.py` of 0.19, without offloading


def estimate_zero2(total_params, total_gpus):
    return 2 * total_params + int(18 * total_params / total_gpus)


def estimate_zero3(total_params, largest_layer_params, total_gpus):
    return 4 * largest_layer_params + int(18 * total_params / total_gpus)


@given(processes=st.integers(2, 64), hidden=st.integers(1, 4000), matrices=st.integers(1, 40))
def test_whole_models_are_estimated_as_by_deepspeed(processes, hidden, matrices):
    total = matrices * hidden**2
    none = AdapterSizes(0, 0, 0, 0)
    whole = replace(IN_16_BITS, policy=AdapterSizes(total - hidden, 0, 0, 0), critic=None, frozen=0, heads=1)
    whole = replace(whole, network=replace(NETWORK, hidden=hidden))
    assert whole.trained == total
    zero2, zero3 = (Layout(processes, sharding=kind) for kind in ("zero2", "zero3"))
    states = optimizer_on_a_gpu(whole, zero2) + gradients_on_a_gpu(whole, zero2)
    assert int(adapters_on_a_gpu(whole, zero2) + states) == estimate_zero2(total, processes)
    # their weights are the base here, and what they train is the same numbers
    divided = replace(whole, network=replace(whole.network, linear_parameters=total, other_parameters=0))
    weights = base_on_a_gpu(divided, zero3)
    states = optimizer_on_a_gpu(divided, zero3) + gradients_on_a_gpu(divided, zero3)
    assert weights + states == pytest.approx(estimate_zero3(total, 0, processes), abs=1)
    assert base_on_a_gpu(replace(divided, policy=none), zero3) == weights


LAYOUTS = st.builds(
    Layout,
    processes=st.integers(1, 64),
    sharding=st.sampled_from(["none", "fsdp2", "zero2", "zero3"]),
    shards_quantized=st.booleans(),
    vllm=st.sampled_from(["none", "server"]),
)
RUNS = st.builds(
    lambda bits, autocast, micro_batch, rollout: replace(
        IN_16_BITS, quantized_bits=bits, autocast=autocast, micro_batch=micro_batch, rollout=rollout
    ),
    st.sampled_from([0, 4, 8]),
    st.booleans(),
    st.integers(1, 30),
    st.integers(1, 30),
)


@given(sizes=RUNS, layout=LAYOUTS)
def test_parts_add_up_to_the_whole(sizes, layout):
    whole, divided = base_bytes(sizes, layout)
    assert whole + divided == pytest.approx(base_bytes(sizes, ONE)[0])
    everywhere = layout.processes * base_on_a_gpu(sizes, layout)
    assert everywhere == pytest.approx(layout.processes * whole + divided)
    if layout.divides_states:
        master = 4 if layout.is_zero else 0
        states = layout.processes * optimizer_on_a_gpu(sizes, layout)
        assert states == pytest.approx(optimizer_on_a_gpu(sizes, ONE) + master * sizes.trained)


@given(sizes=RUNS, layout=LAYOUTS, more=st.integers(1, 64))
def test_no_gpu_holds_more_when_there_are_more(sizes, layout, more):
    before = ppo_memory(sizes, layout)
    after = ppo_memory(sizes, replace(layout, processes=layout.processes + more))
    for phase in PHASES:
        if layout.processes > 1:
            assert after[phase].total <= before[phase].total * (1 + 1e-12)
            if layout.sharding == "none":
                assert after[phase] == before[phase]
        assert after[phase].activations <= before[phase].activations or after[phase].activations == 0


@given(sizes=RUNS, layout=LAYOUTS)
def test_one_gpu_is_what_it_was_whatever_divides(sizes, layout):
    alone = replace(layout, processes=1, vllm="none")
    assert ppo_memory(sizes, alone) == ppo_memory(sizes)
