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
    weight_bytes,
    working_memory,
)
from rlhf_recipes.tools.planning.sizes import AdapterSizes, NetworkSizes, RunSizes

PHASES = ("load", "generate", "score", "train")


def ppo_memory(sizes: RunSizes) -> dict[str, PhaseMemory]:
    """Peak memory of each phase of a PPO run.

    - load: the weights, on a GPU the largest tensor twice, and on a CPU the whole file while it is converted or
      quantized. A file that is used as it is is mapped, and counts from the first forward pass on.
    - generate: keys and values of a whole rollout and the logits of one step, or one layer's work on all prompts.
    - score: old and reference log-probabilities, values and rewards, a micro-batch at a time, without gradients: one
      layer's work, or the output layer's.
    - train: gradients and optimizer states, and the largest of three moments: the backward pass of the policy's
      output layer begins; that of its layers begins; or that of a critic with layers of its own, whose forward pass
      comes after both, while the policy's gradients are kept besides. What the first update keeps of a rollout of one
      micro-batch from the last pass of its scoring on counts here.

    Args:
        sizes: The run.

    Returns:
        By the names in `PHASES`, in bytes.
    """
    network = sizes.network
    weights = weight_bytes(network, sizes.weight_bytes, sizes.quantized_bits) + sizes.others
    common = PhaseMemory(
        weights=weights,
        adapters=4 * (sizes.trained + sizes.frozen + (sizes.heads - 1) * network.hidden),
        optimizer=sizes.trained * sizes.optimizer_bytes,
        rest=FIXED_BYTES[sizes.device] + rollout_bytes(sizes),
    )
    return dict(
        zip(
            PHASES,
            (_load(sizes, common), _generate(sizes, common), _score(sizes, common), _train(sizes, common)),
            strict=True,
        )
    )


def _load(sizes: RunSizes, common: PhaseMemory) -> PhaseMemory:
    largest = 4 * sizes.network.largest_parameter if sizes.device == "cuda" else 0
    after = replace(common, optimizer=0)
    if sizes.device == "cpu" and sizes.file_bytes == 0:
        return replace(after, weights=sizes.others)
    while_reading = replace(after, adapters=0, weights=common.weights + sizes.file_bytes + largest)
    return max(while_reading, after, key=lambda memory: memory.total)


def _generate(sizes: RunSizes, common: PhaseMemory) -> PhaseMemory:
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


def _train(sizes: RunSizes, common: PhaseMemory) -> PhaseMemory:
    common = replace(
        common,
        optimizer=sizes.trained * (4 + sizes.optimizer_bytes),  # gradients live only here
        rest=common.rest + TRAINING_BYTES[sizes.device],
    )
    in_layers = _backward(sizes, sizes.network, sizes.policy)
    activations = kept_activations(sizes, sizes.network, sizes.policy)
    moments = [
        replace(common, activations=in_layers, logits=exact_kl_memory(sizes)),
        replace(common, activations=activations, logits=logits_memory(sizes, backward=True)),
    ]
    if sizes.critic is not None:
        own = _backward(sizes, sizes.critic_network or sizes.network, sizes.critic)
        moments.append(replace(common, activations=own, optimizer=common.optimizer + 4 * sizes.policy.parameters))
    return max(moments, key=lambda memory: memory.total)


def _backward(sizes: RunSizes, network: NetworkSizes, adapter: AdapterSizes) -> float:
    """Bytes of activations when the backward pass of a network's layers begins."""
    tokens = sizes.micro_batch * sizes.length
    again = kept_per_layer(sizes, network, adapter) * tokens if sizes.checkpointing == 1 else 0.0
    working = working_memory(replace(sizes, network=network), tokens, backward=True)
    return kept_activations(sizes, network, adapter) + again + working


def peak(sizes: RunSizes) -> tuple[str, float]:
    """The phase that takes most, and its bytes."""
    phases = ppo_memory(sizes)
    name = max(PHASES, key=lambda phase: phases[phase].total)
    return name, phases[name].total


def largest_micro_batch(sizes: RunSizes, budget: float, candidates: Iterable[int]) -> int | None:
    """The largest micro-batch of training whose phases all fit.

    Args:
        sizes: The run; its rollout stays as it is.
        budget: Bytes.
        candidates: Micro-batches that may be taken.

    Returns:
        The largest one, or `None` if none fits.
    """
    fitting = [size for size in candidates if peak(replace(sizes, micro_batch=size))[1] <= budget]
    return max(fitting, default=None)


def largest_rollout(sizes: RunSizes, budget: float) -> int:
    """The most completions of one process that can be generated together; 0 if not even one."""

    def fits(rollout: int) -> bool:
        return ppo_memory(replace(sizes, rollout=rollout))["generate"].total <= budget

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
