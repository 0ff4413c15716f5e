"""The smallest change with which a run fits, against all changes tried one by one."""

from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given, settings

from rlhf_recipes.tools.planning.fit import Setting, has_room_for_vllm, smallest_change
from rlhf_recipes.tools.planning.phases import peak
from rlhf_recipes.tools.planning.sizes import AdapterSizes, Layout
from tests.tools.planning.support import NETWORK
from tests.tools.planning.support import SIZES as CPU

MIB = 2**20
# A base that weighs much more than what is computed with it, in float32 of 4.8 MB
HEAVY = replace(
    CPU,
    device="cuda",
    network=replace(NETWORK, linear_parameters=1_000_000, other_parameters=200_000, embedding=90_000, vocabulary=1),
    micro_batch=4,
    rollout=8,
)


def setting(budget, layout=None, in_a_step=4, **fields):
    return Setting(replace(HEAVY, **fields), layout or Layout(), budget, in_a_step)


def test_what_fits_is_left_as_it_is():
    run = setting(100 * MIB)
    assert smallest_change(run) is run


def test_a_smaller_micro_batch_comes_first():
    _, most = peak(replace(HEAVY, micro_batch=2))
    found = smallest_change(setting(most))
    assert found.changes == ("`per_device_train_batch_size: 2` with `gradient_accumulation_steps: 2`",)
    assert found.sizes.micro_batch == 2
    assert smallest_change(setting(most, in_a_step=4, micro_batch=1)).changes == ()


def test_one_field_comes_before_more_gpus():
    least = peak(replace(HEAVY, micro_batch=1, quantized_bits=4))[1]
    assert peak(replace(HEAVY, micro_batch=1))[1] > least
    found = smallest_change(setting(least * 1.2, micro_batch=1))
    assert found.changes == ("`load_in_4bit: true`",)
    assert (found.layout.processes, found.sizes.quantized_bits) == (1, 4)


def test_gpus_are_shared_before_there_are_more_of_them():
    large = AdapterSizes(3_000_000, 14, 64, 40)
    run = setting(0, Layout(4), micro_batch=1, policy=large, critic=None, frozen=0, checkpointing=1, quantized_bits=4)
    divided = replace(run.layout, sharding="fsdp2", shards_quantized=True)
    run = replace(run, budget=peak(run.sizes, divided)[1])
    assert peak(run.sizes, run.layout)[1] > run.budget
    found = smallest_change(run)
    assert found.changes == ("`--num_processes 4 --sharding fsdp2`", "`bnb_4bit_quant_storage: bfloat16`")


def test_nothing_helps_a_gpu_that_is_too_small():
    assert smallest_change(setting(1000.0)) is None


def test_a_cpu_gets_no_more_processes():
    run = setting(1 * MIB, device="cpu")
    assert smallest_change(run) is None


def test_divided_4_bit_weights_must_lie_in_floats():
    deep = {"network": replace(HEAVY.network, layers=20), "prompt": 3000, "rollout": 1, "evaluation_batch": 1}
    run = setting(0, Layout(16, sharding="fsdp2"), 1, micro_batch=1, checkpointing=1, quantized_bits=4, **deep)
    run = replace(run, budget=peak(run.sizes, replace(run.layout, shards_quantized=True))[1])
    assert peak(run.sizes, run.layout)[1] > run.budget
    assert smallest_change(run).changes == ("`bnb_4bit_quant_storage: bfloat16`",)


def test_room_for_vllm():
    server = Layout(2, vllm="server", vllm_bytes=64 * MIB)
    assert has_room_for_vllm(setting(MIB, server))
    assert not has_room_for_vllm(setting(MIB, replace(server, vllm_bytes=1000)))
    assert has_room_for_vllm(setting(MIB, Layout(2)))
    crowded = setting(100 * MIB, replace(server, vllm_bytes=1000))
    assert smallest_change(crowded) is None


@settings(max_examples=30)
@given(
    budget=st.floats(0.1 * MIB, 12 * MIB),
    processes=st.sampled_from([1, 2, 4, 64]),
    sharding=st.sampled_from(["none", "fsdp2"]),
    bits=st.sampled_from([0, 4]),
)
def test_what_is_found_fits_and_less_does_not(budget, processes, sharding, bits):
    run = setting(budget, Layout(processes, sharding=sharding), quantized_bits=bits)
    fits = any(peak(replace(run.sizes, micro_batch=size), run.layout)[1] <= budget for size in (1, 2, 4))
    found = smallest_change(run)
    assert found is not None or not fits
    if found is None:
        return
    assert peak(found.sizes, found.layout)[1] <= budget
    assert has_room_for_vllm(found)
    assert found.layout.processes >= processes
    if fits:
        assert found.layout == run.layout
        assert replace(found.sizes, micro_batch=run.sizes.micro_batch) == run.sizes
    if found.sizes.micro_batch < run.sizes.micro_batch:  # the next larger one does not fit
        larger = replace(found.sizes, micro_batch=2 * found.sizes.micro_batch)
        assert peak(larger, found.layout)[1] > budget
