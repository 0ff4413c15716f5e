"""Phases of a run, by hand and by property, and the largest micro-batch."""

from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given

from rlhf_recipes.tools.planning.memory import FIXED_BYTES, TRAINING_BYTES
from rlhf_recipes.tools.planning.phases import PHASES, largest_micro_batch, largest_rollout, peak, ppo_memory
from rlhf_recipes.tools.planning.sizes import AdapterSizes, Layout
from tests.tools.planning.support import NETWORK
from tests.tools.planning.support import SIZES as CPU

NO_ADAPTER = AdapterSizes(0, 0, 0, 0)
SIZES = replace(CPU, device="cuda")
WEIGHTS, ADAPTERS, TRAINED = 4 * 2792, 4 * (1208 + 1200 + 8), 1208


def test_load_numbers():
    rest = 6 * 128  # of the rollout
    assert ppo_memory(SIZES)["load"].total == WEIGHTS + ADAPTERS + rest
    without = replace(SIZES, policy=NO_ADAPTER, critic=None, frozen=0)
    assert ppo_memory(without)["load"].total == WEIGHTS + 4 * 800 + rest  # the largest tensor twice
    assert ppo_memory(CPU)["load"].total == ADAPTERS + FIXED_BYTES["cpu"] + rest  # mapped weights are not read yet
    converted = ppo_memory(replace(CPU, file_bytes=50_000))["load"]
    assert converted.weights == WEIGHTS + 50_000
    assert ppo_memory(replace(CPU, others=777))["load"].weights == 777


def test_generate_numbers():
    generate = ppo_memory(SIZES)["generate"]
    assert generate.weights == WEIGHTS
    assert generate.adapters == ADAPTERS
    assert generate.optimizer == 8 * TRAINED
    assert (generate.cache, generate.logits, generate.activations) == (2 * 6 * 5 * 4 * 4 * 3, 5 * 4 * 6 * 100, 0)
    long = ppo_memory(replace(SIZES, prompt=300))["generate"]
    assert (long.cache, long.logits, long.activations) == (0, 0, 6 * 300 * 416)  # the prompts take more
    wide = ppo_memory(replace(CPU, weight_bytes=2, network=replace(NETWORK, hidden=800)))["generate"]
    assert (wide.cache, wide.logits) == (0, 5 * 4 * 6 * 100 + 2 * 6 * 100 * 800)  # the first token does


def test_score_numbers():
    score = ppo_memory(replace(CPU, evaluation_batch=4))["score"]
    assert (score.activations, score.logits) == (2 * 4 * 20 * 8, 8 * 100 * 16)
    small = replace(NETWORK, vocabulary=1)
    assert ppo_memory(replace(CPU, network=small))["score"].activations == 10 * 416
    assert ppo_memory(replace(CPU, exact_kl=True))["score"].logits == 6 * 4 * 512 * 100


def test_train_numbers():
    kept = 2 * 10 * 448 + 960
    train = ppo_memory(replace(CPU, network=replace(NETWORK, vocabulary=1)))["train"]
    assert (train.activations, train.logits) == (kept + 10 * 384, 0)  # a backward pass begins
    assert train.optimizer == 12 * TRAINED + 4 * 600  # the policy's gradient is kept while the critic runs
    assert train.rest == FIXED_BYTES["cpu"] + TRAINING_BYTES["cpu"] + 6 * 128
    train = ppo_memory(replace(CPU, network=replace(NETWORK, vocabulary=200)))["train"]
    assert (train.activations, train.logits) == (kept, 4 * 200 * 37 + 128)  # the policy's output layer
    assert train.optimizer == 12 * TRAINED
    again = ppo_memory(replace(CPU, network=replace(NETWORK, vocabulary=1), checkpointing=1))["train"]
    assert again.activations == 640 + 960 + 10 * 448 + 10 * 384


def test_critic_takes_what_it_is():
    small = replace(SIZES, network=replace(NETWORK, vocabulary=1), device="cpu")
    adapter = ppo_memory(small)["train"]
    head = ppo_memory(replace(small, critic=None))["train"]
    assert adapter.total - head.total == 600 * (4 + 12 + 4)  # networks run one after the other
    deeper = replace(NETWORK, layers=4)
    own = ppo_memory(replace(small, critic_network=deeper))["train"]
    assert own.activations - adapter.activations == 2 * 10 * 448


def test_several_gpus_numbers():
    one, ddp = ppo_memory(SIZES), ppo_memory(SIZES, Layout(4))
    assert ddp["load"] == one["load"]
    for name in PHASES[1:]:  # a copy of the gradients
        assert ddp[name] == replace(one[name], buffers=4 * TRAINED)
    sharded = ppo_memory(SIZES, Layout(4, sharding="fsdp2"))
    assert sharded["load"].total == WEIGHTS + 4 * 800 + 6 * 128  # each process reads the base
    for name in ("generate", "score"):
        assert (sharded[name].weights, sharded[name].adapters) == (WEIGHTS / 4, ADAPTERS / 4)
        assert sharded[name].optimizer == 8 * TRAINED / 4
    small = replace(CPU, network=replace(NETWORK, vocabulary=1))
    train = ppo_memory(small, Layout(4, sharding="fsdp2"))["train"]
    assert train.optimizer == (12 * TRAINED + 4 * 600) / 4
    assert train.activations == ppo_memory(small)["train"].activations
    assert ppo_memory(replace(small, others=777), Layout(4, sharding="fsdp2"))["score"].weights == WEIGHTS / 4 + 777


def test_vllm_takes_what_it_is_given():
    server = ppo_memory(SIZES, Layout(1, vllm="server", vllm_bytes=5000))["generate"]
    assert (server.cache, server.logits, server.activations, server.vllm) == (0, 0, 0, 0)
    assert server.weights == WEIGHTS
    awake, asleep = (
        ppo_memory(SIZES, Layout(vllm="colocate", vllm_bytes=5000, sleeps=each)) for each in (False, True)
    )
    assert [awake[name].vllm for name in PHASES] == [0, 5000, 5000, 5000]
    assert [asleep[name].vllm for name in PHASES] == [0, 5000, 0, 0]
    assert replace(awake["train"], vllm=0) == asleep["train"] == ppo_memory(SIZES)["train"]


def test_peak_names_the_largest_phase():
    phases = ppo_memory(CPU)
    name, most = peak(CPU)
    assert most == max(memory.total for memory in phases.values()) == phases[name].total
    assert name == "train"
    assert peak(replace(CPU, rollout=50_000))[0] == "generate"
    layout = Layout(4, sharding="fsdp2")
    assert peak(SIZES, layout)[1] == max(memory.total for memory in ppo_memory(SIZES, layout).values())


@given(
    field=st.sampled_from(["micro_batch", "evaluation_batch", "rollout", "prompt", "completion", "frozen", "others"]),
    more=st.integers(1, 30),
    device=st.sampled_from(["cpu", "cuda"]),
    checkpointing=st.sampled_from([0, 1, 2]),
    autocast=st.booleans(),
)
def test_no_phase_shrinks_when_something_grows(field, more, device, checkpointing, autocast):
    less = replace(SIZES, device=device, checkpointing=checkpointing, autocast=autocast)
    before, after = ppo_memory(less), ppo_memory(replace(less, **{field: getattr(less, field) + more}))
    assert all(after[name].total >= before[name].total for name in PHASES)


@given(budget=st.integers(10_000, 2_000_000))
def test_largest_micro_batch_fits_and_the_next_does_not(budget):
    found = largest_micro_batch(SIZES, budget, range(1, 65))
    if found is not None:
        assert peak(replace(SIZES, micro_batch=found))[1] <= budget
    if found != 64:
        assert peak(replace(SIZES, micro_batch=(found or 0) + 1))[1] > budget


def test_largest_micro_batch_is_one_of_the_candidates():
    _, most = peak(replace(SIZES, micro_batch=6))
    assert largest_micro_batch(SIZES, most, [1, 2, 4, 8]) == 4
    assert largest_micro_batch(SIZES, 1000, [1, 2]) is None
    layout = Layout(4)
    _, most = peak(replace(SIZES, micro_batch=6), layout)
    assert largest_micro_batch(SIZES, most, [1, 2, 4, 8], layout) == 4


@given(budget=st.integers(10_000, 20_000_000))
def test_largest_rollout_fits_and_the_next_does_not(budget):
    found = largest_rollout(SIZES, budget)

    def taken(rollout):
        return ppo_memory(replace(SIZES, rollout=rollout))["generate"].total

    assert found == 0 or taken(found) <= budget
    assert taken(found + 1) > budget
