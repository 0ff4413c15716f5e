"""Sizes that the memory of a PPO run depends on: shapes of model and adapters, lengths, batches, formats, GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NetworkSizes:
    """Shape of a decoder.

    Attributes:
        hidden: Width `H`.
        layers: Transformer layers.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        head_size: Width of a head.
        intermediate: Width `I` of the MLP.
        vocabulary: Number of tokens `V`.
        gated: Whether the MLP has a gate beside its first projection (Llama, Qwen, Gemma) or not (GPT-NeoX, OPT).
        linears: Linear layers that 4-bit loading replaces: all but the output layer.
        linear_parameters: Their weights.
        other_parameters: All the rest: embeddings, norms, biases, the output layer where it is not the embedding.
        largest_linear: Weights of the largest one.
        largest_parameter: Numbers in the largest single tensor.
        embedding: Numbers of the embedding of tokens, and of the output layer.
        tied: Whether the two are one tensor.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    gated: bool
    linears: int
    linear_parameters: int
    other_parameters: int
    largest_linear: int
    largest_parameter: int
    embedding: int
    tied: bool

    @property
    def ends(self) -> int:
        """Numbers of embedding and output layer together."""
        return self.embedding * (1 if self.tied else 2)


@dataclass(frozen=True)
class AdapterSizes:
    """Shape of a LoRA adapter.

    Attributes:
        parameters: Its numbers.
        ranks: Sum of the ranks over the adapted linear layers of one transformer layer.
        inputs: Sum of the input widths of these, each counted: what is kept where every adapter casts its input.
        shared_inputs: The same with an input that several of them read (query, key and value) counted once.
        in_parts: Whether gated MLPs are computed in parts (`rlhf_recipes.models.gated_mlp`), as those with frozen
            weights are. They are not in `inputs` and `shared_inputs` then.
        in_mlps: The numbers of the adapter in MLPs that are computed in parts.
    """

    parameters: int
    ranks: int
    inputs: int
    shared_inputs: int
    in_parts: bool = True
    in_mlps: int = 0


@dataclass(frozen=True)
class RunSizes:
    """Everything that the memory of a PPO run depends on.

    Attributes:
        network: The base model that the roles share.
        policy: The policy's adapter.
        critic: The critic's adapter; `None` for a head on the policy's trunk. A critic of its own counts as an adapter
            of all of its weights.
        critic_network: The network of a critic of its own; `None`: the shared one.
        frozen: Parameters of the adapters that are not trained: the reference's, the average's and the rewards'.
        others: Bytes of models beside the base (a reward model with another base).
        heads: Roles with a head of `H` numbers, the critic's included.
        weight_bytes: Bytes of a weight that is not quantized: 4 or 2.
        quantized_bits: 4 or 8 for a base loaded by bitsandbytes, 0 for one that is not quantized.
        autocast: Whether the run computes in 16 bits by itself (`bf16: true` or `fp16: true`).
        checkpointing: Of how many layers one computes its activations again in the backward pass: 1 for every layer,
            `n` for every n-th, 0 for none.
        eager: Whether the attention keeps its weights (`attn_implementation: eager`).
        exact_kl: Whether the KL is over the whole vocabulary (`kl_estimator: full`).
        optimizer_bytes: Bytes of optimizer state for each trained number.
        micro_batch: Sequences in a forward pass of scoring and training.
        evaluation_batch: Sequences in a forward pass of scoring in an evaluation.
        rollout: Completions in a rollout of one process, which are generated together.
        prompt: Tokens of the longest prompt.
        completion: Tokens of the longest completion.
        device: `"cpu"` or `"cuda"`.
        file_bytes: On a CPU, the size of the weights' file, which is in memory while it is converted or quantized;
            0 if it is used as it is, and read page by page.
    """

    network: NetworkSizes
    policy: AdapterSizes
    critic: AdapterSizes | None
    critic_network: NetworkSizes | None
    frozen: int
    others: int
    heads: int
    weight_bytes: int
    quantized_bits: Literal[0, 4, 8]
    autocast: bool
    checkpointing: int
    eager: bool
    exact_kl: bool
    optimizer_bytes: float
    micro_batch: int
    evaluation_batch: int
    rollout: int
    prompt: int
    completion: int
    device: Literal["cpu", "cuda"]
    file_bytes: int

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + self.completion

    @property
    def trained(self) -> int:
        """Numbers that are trained: the policy's adapter, the critic's, and the critic's head."""
        adapters = self.policy.parameters + (0 if self.critic is None else self.critic.parameters)
        return adapters + self.network.hidden

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation."""
        return 2 if self.autocast else self.weight_bytes


@dataclass(frozen=True)
class Layout:
    """How a run lies on GPUs.

    Attributes:
        processes: Processes that train, one for each GPU; each has a rollout and micro-batches of its own.
        machines: Machines that they are on.
        sharding: What is divided among them. `"none"`: nothing, as DDP; `"zero2"`: gradients and optimizer states;
            `"fsdp2"` and `"zero3"`: weights too.
        shards_quantized: Whether the 4-bit weights lie in tensors of floats (`bnb_4bit_quant_storage`), which can be
            divided. Those of bytes cannot.
        vllm: Who generates: `"none"` (transformers, on the weights that are trained), or vLLM as a `"server"` on GPUs
            of its own, or in the trainers' processes (`"colocate"`).
        tensor_parallel: GPUs that divide one copy of vLLM's model among them.
        vllm_bytes: What vLLM takes of each of its GPUs: `gpu_memory_utilization` times their memory.
        sleeps: Whether a colocated vLLM gives its memory back while the trainer works (`vllm_enable_sleep_mode`).
    """

    processes: int = 1
    machines: int = 1
    sharding: Literal["none", "fsdp2", "zero2", "zero3"] = "none"
    shards_quantized: bool = False
    vllm: Literal["none", "server", "colocate"] = "none"
    tensor_parallel: int = 1
    vllm_bytes: float = 0.0
    sleeps: bool = False

    @property
    def divides_weights(self) -> bool:
        """Whether a GPU holds only its part of the weights."""
        return self.processes > 1 and self.sharding in ("fsdp2", "zero3")

    @property
    def divides_states(self) -> bool:
        """Whether a GPU holds only its part of gradients and optimizer states."""
        return self.processes > 1 and self.sharding != "none"

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed divides."""
        return self.processes > 1 and self.sharding in ("zero2", "zero3")
