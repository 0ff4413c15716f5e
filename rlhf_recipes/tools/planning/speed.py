"""Time of an update, as a range from stated assumptions: sizes and a GPU's figures in, seconds out.

Nothing here was measured on a GPU. Work is counted, and divided by what a GPU can do at most, times the share of it
that is assumed to be reached: `SLOW` and `FAST` are the two ends of the range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rlhf_recipes.tools.planning.memory import weight_bytes
from rlhf_recipes.tools.planning.serving import cache_bytes_of_a_token, server_memory
from rlhf_recipes.tools.planning.sharding import adapters_on_a_gpu, base_bytes
from rlhf_recipes.tools.planning.sizes import Layout, NetworkSizes, RunSizes

_GB, _TB = 1e9, 1e12


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, from its vendor's data sheet.

    Attributes:
        title: Its name.
        mib: Its memory as the driver shows it, in MiB.
        bandwidth: Of its memory, in bytes per second.
        flops: In bfloat16 on tensor cores, without sparsity, accumulated in float32, per second.
        link: To another GPU of the same machine, one way, in bytes per second: NVLink, or PCIe where there is none.
    """

    title: str
    mib: int
    bandwidth: float
    flops: float
    link: float


# NVIDIA's data sheets (A100: 1758950; H100 SXM; H200 SXM; L40S) and its Ada architecture whitepaper (RTX 4090). Links
# are given there for both ways together: NVLink 600 and 900 GB/s, PCIe 4.0 x16 64 GB/s.
GPUS = {
    "rtx4090": Gpu("RTX 4090 24 GB", 24_564, 1008 * _GB, 165.2 * _TB, 32 * _GB),
    "l40s": Gpu("L40S 48 GB", 46_068, 864 * _GB, 362 * _TB, 32 * _GB),
    "a100_40gb": Gpu("A100 SXM 40 GB", 40_960, 1555 * _GB, 312 * _TB, 300 * _GB),
    "a100_80gb": Gpu("A100 SXM 80 GB", 81_920, 2039 * _GB, 312 * _TB, 300 * _GB),
    "h100": Gpu("H100 SXM 80 GB", 81_559, 3350 * _GB, 989 * _TB, 450 * _GB),
    "h200": Gpu("H200 SXM 141 GB", 143_771, 4800 * _GB, 989 * _TB, 450 * _GB),
}


@dataclass(frozen=True)
class Pace:
    """What is assumed of how well hardware is used.

    Attributes:
        passes: Share of `flops` in passes over whole texts, recomputed activations counted as work.
        reading: Share of the memory's bandwidth while tokens are decoded.
        python_seconds: Of a layer of transformers' `generate`, for each token, for launching its kernels from Python.
        graph_seconds: The same of vLLM, which replays them from a CUDA graph.
        link: Share of a link's bandwidth in collective operations.
        network: Bytes per second between machines, for each GPU, one way.
        overlaps: Whether communication is hidden behind computation, as far as there is some.
    """

    passes: float
    reading: float
    python_seconds: float
    graph_seconds: float
    link: float
    network: float
    overlaps: bool


SLOW = Pace(0.2, 0.4, 1.5e-3, 6e-5, 0.4, 25e9 / 8, overlaps=False)
FAST = Pace(0.45, 0.8, 5e-4, 2e-5, 0.8, 400e9 / 8, overlaps=True)


@dataclass(frozen=True)
class Work:
    """What an update does with a rollout.

    Attributes:
        epochs: Times that each of its texts is trained on.
        steps: Optimizer steps in all of them.
    """

    epochs: int
    steps: int


@dataclass(frozen=True)
class Seconds:
    """Time of an update, by phase."""

    generate: float
    score: float
    train: float

    @property
    def total(self) -> float:
        """Their sum: the phases follow one another."""
        return self.generate + self.score + self.train


def forward_flops(network: NetworkSizes, length: int, outputs: int) -> float:
    """Floating-point operations of a network on one text.

    Two for each weight and token, and two for each number of queries, token and position that is looked at, on average
    half of the text, in each of attention's two products (Kaplan et al. 2020, https://huggingface.co/papers/2001.08361,
    table 1). Norms, activation functions and adapters are left out, below 2 % together.

    Args:
        network: Its shape.
        length: Tokens of the text.
        outputs: Tokens for which the output layer runs.
    """
    attention = 2 * network.layers * network.heads * network.head_size * length
    return length * (2 * network.linear_parameters + attention) + outputs * 2 * network.embedding


def training_flops(sizes: RunSizes, network: NetworkSizes, outputs: int) -> float:
    """Floating-point operations of a forward and a backward pass on one text.

    Backward takes the forward pass once again for the gradients of activations, and attention twice. Frozen weights
    get no gradient; a critic of its own, whose weights are trained, takes it twice. What is not kept is computed
    again.

    Args:
        sizes: The run.
        network: The base, or the critic's own network.
        outputs: Tokens for which the output layer runs.
    """
    forward = forward_flops(network, sizes.length, outputs)
    attention = 2 * network.layers * network.heads * network.head_size * sizes.length**2
    weights = forward - attention
    trained = 2 if network is sizes.critic_network else 1
    again = (forward - outputs * 2 * network.embedding) / sizes.checkpointing if sizes.checkpointing else 0.0
    return forward + trained * weights + 2 * attention + again


def decoding_bytes(sizes: RunSizes, rows: int) -> float:
    """Bytes that one step of decoding reads and writes: weights of layers and output, keys and values of all rows.

    Keys and values are those of half of the completion, on average. bitsandbytes multiplies 4-bit weights by one row
    as they are; for more rows it writes the matrix out in 16 bits, and reads it again (`matmul_4bit`).

    Args:
        sizes: The run.
        rows: Completions that are decoded together.
    """
    network = sizes.network
    output = network.embedding * sizes.weight_bytes
    layers = weight_bytes(network, sizes.weight_bytes, sizes.quantized_bits) - network.ends * sizes.weight_bytes
    if sizes.quantized_bits == 4 and rows > 1:
        layers += 2 * network.linear_parameters * sizes.compute_bytes
    seen = sizes.prompt + sizes.completion / 2
    return output + layers + rows * seen * cache_bytes_of_a_token(network) * sizes.weight_bytes / 2


def link_bandwidth(layout: Layout, gpu: Gpu, pace: Pace) -> float:
    """Bytes per second and GPU of a collective operation, which runs at the pace of its slowest link."""
    inside = gpu.link * pace.link
    return inside if layout.machines == 1 else min(inside, pace.network)


def gather_seconds(sizes: RunSizes, layout: Layout, gpu: Gpu, pace: Pace) -> float:
    """Seconds in which all weights that are divided are gathered once: each GPU receives the parts of all others."""
    if not layout.divides_weights:
        return 0.0
    adapters = 0.0 if layout.is_zero else adapters_on_a_gpu(sizes, Layout())
    others = (base_bytes(sizes, layout)[1] + adapters) * (layout.processes - 1) / layout.processes
    return others / link_bandwidth(layout, gpu, pace)


def generation_seconds(sizes: RunSizes, layout: Layout, gpu: Gpu, pace: Pace) -> float:
    """Seconds to sample the rollout: the pass over the prompts, and a step for each token.

    A step takes what reading takes, or what computing takes if that is more, and its launches. With transformers each
    process samples its own rows, under ZeRO-3 from weights that were gathered for it. A server samples those of all
    processes on `tensor_parallel` GPUs, as many at a time as its cache holds. GPUs that divide a layer exchange its
    two results.
    """
    network, rows = sizes.network, sizes.rollout
    gathering = gather_seconds(sizes, layout, gpu, pace) if layout.is_zero else 0.0
    waves, launch, parallel = 1, pace.python_seconds, 1
    if layout.vllm != "none":
        sizes = replace(sizes, weight_bytes=2)
        rows *= layout.processes if layout.vllm == "server" else 1
        waves = math.ceil(rows / max(1, server_memory(sizes, layout).sequences))
        rows = math.ceil(rows / waves)
        launch, parallel, gathering = pace.graph_seconds, layout.tensor_parallel, 0.0
    flops = gpu.flops * pace.passes * parallel
    prompts = rows * forward_flops(network, sizes.prompt, 1) / flops
    reading = decoding_bytes(sizes, rows) / (gpu.bandwidth * pace.reading * parallel)
    computing = rows * 2 * (network.linear_parameters + network.embedding) / flops
    exchanged = 2 * network.layers * rows * network.hidden * 2 * 2 * (parallel - 1) / parallel
    step = max(reading, computing) + network.layers * launch + exchanged / (gpu.link * pace.link)
    return waves * (prompts + sizes.completion * step) + gathering


def update_seconds(sizes: RunSizes, layout: Layout, gpu: Gpu, work: Work, pace: Pace) -> Seconds:
    """Seconds of an update, by phase, all texts at their full length.

    Scoring runs the policy, the reference, a critic with layers of its own, and each reward on the base. Training runs
    policy and critic forward and backward in each epoch. ZeRO-3 gathers the weights for each pass of a micro-batch, in
    training for both directions; FSDP2 too in training, and for sampling and scoring once. Gradients are reduced once
    for each optimizer step, which a ring does by sending them about twice.

    Args:
        sizes: The run of one process.
        layout: How it lies on GPUs.
        gpu: Their kind.
        work: What is done with a rollout.
        pace: What is assumed.
    """
    network, critic = sizes.network, sizes.critic_network or sizes.network
    outputs, flops = sizes.completion, gpu.flops * pace.passes
    gather = gather_seconds(sizes, layout, gpu, pace)
    micro_batches = math.ceil(sizes.rollout / sizes.micro_batch)

    def passes(texts_flops: float, gathered: int) -> float:
        computing, moving = texts_flops * sizes.rollout / flops, gathered * gather
        return max(computing, moving) if pace.overlaps else computing + moving

    policies, rewards = 2 * forward_flops(network, sizes.length, outputs), sizes.heads - 1
    scoring, networks = policies + rewards * forward_flops(network, sizes.length, 0), 2 + rewards
    training, trained = training_flops(sizes, network, outputs), 1
    if sizes.critic is not None:
        scoring, networks = scoring + forward_flops(critic, sizes.length, 0), networks + 1
        training, trained = training + training_flops(sizes, critic, 0), 2
    share = (layout.processes - 1) / layout.processes
    reduced = work.steps * 2 * 4 * sizes.trained * share / link_bandwidth(layout, gpu, pace)
    return Seconds(
        generation_seconds(sizes, layout, gpu, pace),
        passes(scoring, networks * micro_batches if layout.is_zero else 1),
        passes(training * work.epochs, 2 * trained * work.epochs * micro_batches) + reduced,
    )


def tokens_per_second(sizes: RunSizes, layout: Layout, seconds: Seconds) -> float:
    """Completion tokens of an update, of all processes, for each second of it."""
    return layout.processes * sizes.rollout * sizes.completion / seconds.total
