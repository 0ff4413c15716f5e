"""Memory of vLLM when it generates: what its model takes of a GPU, and how many completions its cache holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf_recipes.tools.planning.memory import weight_bytes, working_memory
from rlhf_recipes.tools.planning.sizes import Layout, NetworkSizes, RunSizes

SERVER_SHARE = 0.9  # of a GPU's memory that `vllm serve` takes by default

# With which vLLM tries out how much it needs beside weights and cache: tokens in a step and sequences in one, its
# defaults for an engine (`max_num_batched_tokens`, `max_num_seqs`).
BATCHED_TOKENS, SEQUENCES = 8192, 256


@dataclass(frozen=True)
class ServerMemory:
    """What vLLM does with its part of a GPU, in bytes.

    Attributes:
        weights: Its part of the base, and of the adapter.
        working: What a step computes with.
        cache: What is left for keys and values; below 0 if weights and steps do not fit.
        sequences: Completions of full length that the cache holds at the same time.
    """

    weights: float
    working: float
    cache: float
    sequences: int


def server_memory(sizes: RunSizes, layout: Layout) -> ServerMemory:
    """Divide what vLLM takes of a GPU (`gpu_memory_utilization` times its memory) as vLLM does.

    Weights come first, in 16 bits or quantized as in the run; then the largest step is tried out; the rest is cache
    (`determine_available_memory` of vLLM's worker). With tensor parallelism each GPU has its part of every matrix,
    and its heads' keys and values, which are copied where there are fewer of them than GPUs.

    Args:
        sizes: The run.
        layout: Where vLLM is, and with how much memory.
    """
    parallel, network = layout.tensor_parallel, sizes.network
    weights = (weight_bytes(network, 2, sizes.quantized_bits) + 2 * sizes.policy.parameters) / parallel
    logits = 2 * 4 * SEQUENCES * network.vocabulary  # in float32, and sorted or normalized
    all_at_once = replace(sizes, policy=replace(sizes.policy, in_parts=False))
    working = working_memory(all_at_once, BATCHED_TOKENS, backward=False) / parallel + logits
    cache = layout.vllm_bytes - weights - working
    tokens = max(0, int(cache // cache_bytes_of_a_token(network, parallel)))
    return ServerMemory(weights, working, cache, tokens // sizes.length)


def cache_bytes_of_a_token(network: NetworkSizes, tensor_parallel: int = 1) -> float:
    """Bytes of keys and values of one token on one GPU, in 16 bits, for all layers.

    Example:
        >>> sizes = NetworkSizes(64, 1, 2, 2, 32, 128, 100, True, 7, 40_960, 12_992, 8192, 6400, 6400, False)
        >>> cache_bytes_of_a_token(sizes), cache_bytes_of_a_token(sizes, 2), cache_bytes_of_a_token(sizes, 4)
        (256.0, 128.0, 128.0)
    """
    heads = max(1.0, network.kv_heads / tensor_parallel)
    return 2 * 2 * network.layers * heads * network.head_size


def sync_bytes(sizes: RunSizes) -> int:
    """Bytes that travel to vLLM after each update: the policy's adapter, in float32. The base stays what it was."""
    return 4 * sizes.policy.parameters
