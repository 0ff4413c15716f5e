"""The phases of a PPO run, combined from the terms of `memory`, and the largest micro-batch for a budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rlhf_recipes.tools.planning.memory import (
    FIXED_BYTES,
    LOGITS_COPIES,
    TRAINING_BYTES,
    PhaseMemory,
    cache_bytes,
    exact_kl_memory,
    first_logits_memory,
    kept_activations,
    kept_per_layer,
    logits_memory,
    rollout_bytes,
    working_memory,
)
from rlhf_recipes.tools.planning.sharding import (
    adapters_on_a_gpu,
    base_on_a_gpu,
    base_while_loading,
    buffers_on_a_gpu,
    gradients_on_a_gpu,
    optimizer_on_a_gpu,
)
from rlhf_recipes.tools.planning.sizes import AdapterSizes, Layout, NetworkSizes, RunSizes

PHASES = ("load", "generate", "score", "train")
ONE_GPU = Layout()


def ppo_memory(sizes: RunSizes, layout: Layout = ONE_GPU) -> dict[str, PhaseMemory]:
    """Peak memory of each phase of a PPO run, on each of its GPUs.

    - load: the weights, on a GPU the largest tensor twice, and on a CPU the whole file while it is converted or
      quantized. A file that is used as it is is mapped, and counts from the first forward pass on.
    - generate: keys and values of a whole rollout and the logits of one step, or one layer's work on all prompts; or
      what a vLLM in the same process takes, and nothing where it is a server.
    - score: old and reference log-probabilities, values and rewards, a micro-batch at a time, without gradients: one
      layer's work, or the output layer's.
    - train: gradients and optimizer states, and the largest of three moments: the backward pass of the policy's
      output layer begins; that of its layers begins; or that of a critic with layers of its own, whose forward pass
      comes after both, while the policy's gradients are kept besides. What the first update keeps of a rollout of one
      micro-batch from the last pass of its scoring on counts here.

    Args:
        sizes: The run.
        layout: How it lies on GPUs; by default on one.

    Returns:
        By the names in `PHASES`, in bytes.
    """
    common = PhaseMemory(
        weights=base_on_a_gpu(sizes, layout) + sizes.others,
        adapters=adapters_on_a_gpu(sizes, layout),
        optimizer=optimizer_on_a_gpu(sizes, layout),
        rest=FIXED_BYTES[sizes.device] + rollout_bytes(sizes),
        vllm=layout.vllm_bytes if layout.vllm == "colocate" and not layout.sleeps else 0.0,
    )
    generate, score, train = (
        replace(common, buffers=buffers_on_a_gpu(sizes, layout, phase)) for phase in ("generate", "score", "train")
    )
    train = replace(
        train,
        optimizer=common.optimizer + gradients_on_a_gpu(sizes, layout),  # gradients live only here
        rest=common.rest + TRAINING_BYTES[sizes.device],
    )
    return {
        "load": _load(sizes, layout, common),
        "generate": _generate(sizes, layout, generate),
        "score": _score(sizes, score),
        "train": _train(sizes, layout, train),
    }


def _load(sizes: RunSizes, layout: Layout, common: PhaseMemory) -> PhaseMemory:
    largest = 4 * sizes.network.largest_parameter if sizes.device == "cuda" else 0
    after = replace(common, optimizer=0, vllm=0)
    if sizes.device == "cpu" and sizes.file_bytes == 0:
        return replace(after, weights=sizes.others)
    weights = base_while_loading(sizes, layout) + sizes.others
    while_reading = replace(after, adapters=0, weights=weights + sizes.file_bytes + largest)
    return max(while_reading, after, key=lambda memory: memory.total)


def _generate(sizes: RunSizes, layout: Layout, common: PhaseMemory) -> PhaseMemory:
    if layout.vllm != "none":
        return replace(common, vllm=layout.vllm_bytes if layout.vllm == "colocate" else 0.0)
    prompts = replace(common, activations=working_memory(sizes, sizes.rollout * sizes.prompt, backward=False))
    first_token = replace(common, logits=first_logits_memory(sizes))
    last_token = replace(
        common, cache=cache_bytes(sizes), logits=LOGITS_COPIES * 4 * sizes.rollout * sizes.network.vocabulary
    )
    return max(prompts, first_token, last_token, key=lambda memory: memory.total)


def _score(sizes: RunSizes, common: PhaseMemory) -> PhaseMemory:
    scoring = replace(sizes, micro_batch=max(sizes.micro_batch, sizes.evaluation_batch))
    tokens = scoring.micro_batch * scoring.length
    layer = replace(common, activations=working_memory(scoring, tokens, backward=False))
    states = 2 * 4 * tokens * sizes.network.hidden
    output = replace(common, activations=states, logits=max(logits_memory(scoring, False), exact_kl_memory(sizes)))
    return max(layer, output, key=lambda memory: memory.total)


def _train(sizes: RunSizes, layout: Layout, common: PhaseMemory) -> PhaseMemory:
    in_layers = _backward(sizes, sizes.network, sizes.policy)
    activations = kept_activations(sizes, sizes.network, sizes.policy)
    moments = [
        replace(common, activations=in_layers, logits=exact_kl_memory(sizes)),
        replace(common, activations=activations, logits=logits_memory(sizes, backward=True)),
    ]
    if sizes.critic is not None:
        own = _backward(sizes, sizes.critic_network or sizes.network, sizes.critic)
        kept = 4 * sizes.policy.parameters / (layout.processes if layout.divides_states else 1)
        moments.append(replace(common, activations=own, optimizer=common.optimizer + kept))
    return max(moments, key=lambda memory: memory.total)


def _backward(sizes: RunSizes, network: NetworkSizes, adapter: AdapterSizes) -> float:
    """Bytes of activations when the backward pass of a network's layers begins."""
    tokens = sizes.micro_batch * sizes.length
    again = kept_per_layer(sizes, network, adapter) * tokens if sizes.checkpointing == 1 else 0.0
    working = working_memory(replace(sizes, network=network), tokens, backward=True)
    return kept_activations(sizes, network, adapter) + again + working


def peak(sizes: RunSizes, layout: Layout = ONE_GPU) -> tuple[str, float]:
    """The phase that takes most, and its bytes."""
    phases = ppo_memory(sizes, layout)
    name = max(PHASES, key=lambda phase: phases[phase].total)
    return name, phases[name].total


def largest_micro_batch(
    sizes: RunSizes, budget: float, candidates: Iterable[int], layout: Layout = ONE_GPU
) -> int | None:
    """The largest micro-batch of training whose phases all fit.

    Args:
        sizes: The run; its rollout stays as it is.
        budget: Bytes.
        candidates: Micro-batches that may be taken.
        layout: How it lies on GPUs.

    Returns:
        The largest one, or `None` if none fits.
    """
    fitting = [size for size in candidates if peak(replace(sizes, micro_batch=size), layout)[1] <= budget]
    return max(fitting, default=None)


def largest_rollout(sizes: RunSizes, budget: float, layout: Layout = ONE_GPU) -> int:
    """The most completions of one process that can be generated together; 0 if not even one."""

    def fits(rollout: int) -> bool:
        return ppo_memory(replace(sizes, rollout=rollout), layout)["generate"].total <= budget

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
