"""What vLLM does with its part of a GPU, by hand and by property."""

from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given

from rlhf_recipes.tools.planning.memory import weight_bytes, working_memory
from rlhf_recipes.tools.planning.serving import cache_bytes_of_a_token, server_memory, sync_bytes
from rlhf_recipes.tools.planning.sizes import Layout
from tests.tools.planning.support import NETWORK
from tests.tools.planning.support import SIZES as CPU

SIZES = replace(CPU, device="cuda", weight_bytes=2)
MIB = 2**20


def test_server_numbers():
    # a layer's work on 8192 tokens: 4 x 16 numbers of 2 bytes and 3 x 8 of 4; logits of 256 sequences, twice
    working = 8192 * (4 * 16 * 2 + 3 * 8 * 4) + 2 * 4 * 256 * 100
    server = server_memory(SIZES, Layout(vllm="server", vllm_bytes=4 * MIB))
    assert server.weights == 2 * 2792 + 2 * 600
    assert server.working == working
    assert server.cache == 4 * MIB - server.weights - working
    # a token has keys and values of one head of 4 numbers, in two layers
    assert server.sequences == int(server.cache // (2 * 2 * 2 * 4)) // 5
    four_bits = server_memory(replace(SIZES, quantized_bits=4), Layout(vllm="server", vllm_bytes=4 * MIB))
    assert four_bits.weights == weight_bytes(NETWORK, 2, 4) + 1200


def test_a_server_without_room_holds_no_completion():
    server = server_memory(SIZES, Layout(vllm="server", vllm_bytes=1000))
    assert server.cache < 0
    assert server.sequences == 0


def test_cache_of_a_token_numbers():
    assert cache_bytes_of_a_token(NETWORK) == 2 * 2 * 2 * 1 * 4
    assert cache_bytes_of_a_token(NETWORK, 8) == cache_bytes_of_a_token(NETWORK)  # the one head is copied
    assert cache_bytes_of_a_token(replace(NETWORK, kv_heads=8), 4) == 2 * cache_bytes_of_a_token(NETWORK)


def test_only_the_policys_adapter_travels():
    assert sync_bytes(SIZES) == 4 * 600
    assert sync_bytes(replace(SIZES, quantized_bits=4, frozen=10**6)) == 4 * 600


@given(parallel=st.sampled_from([1, 2, 4, 8]), gib=st.floats(0.01, 10), more=st.floats(0, 10))
def test_more_memory_or_more_gpus_hold_no_fewer_completions(parallel, gib, more):
    layout = Layout(vllm="server", tensor_parallel=parallel, vllm_bytes=gib * 2**30)
    server = server_memory(SIZES, layout)
    assert server.weights + server.working + server.cache == layout.vllm_bytes or abs(server.cache) > 0
    assert server_memory(SIZES, replace(layout, vllm_bytes=(gib + more) * 2**30)).sequences >= server.sequences
    assert server_memory(SIZES, replace(layout, tensor_parallel=2 * parallel)).sequences >= server.sequences
    assert server.weights * parallel == 2 * 2792 + 2 * 600
    assert server.working >= working_memory(SIZES, 8192, backward=False) / parallel
