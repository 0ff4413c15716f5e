"""Peak memory of each phase of a PPO run: sizes in, bytes out.

Every function is arithmetic. `n` is the number of tokens in a micro-batch, padding included, `c` the bytes of an
activation (4, or 2 where the run computes in 16 bits), `H`, `I` and `V` the widths of model, MLP and vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_recipes.parts import TILE_VOCABULARY, tokens_in_mlp, tokens_in_output
from rlhf_recipes.tools.planning.sizes import AdapterSizes, NetworkSizes, RunSizes

MIB = 2**20

# What a run holds beside its tensors and what the imports take, measured (docs/performance.md): tokenizer, trainer,
# prompts and libraries' buffers on a CPU; nothing that torch would count on a GPU.
FIXED_BYTES = {"cpu": 24 * MIB, "cuda": 0}

# What the driver takes before the first tensor, which torch does not count. Not measured here.
CUDA_CONTEXT_BYTES = 512 * MIB

# What training holds beside tensors from 1 MiB up: glibc's heap with the small ones. Measured too.
TRAINING_BYTES = {"cpu": 12 * MIB, "cuda": 0}

# How many times its tensors' peak a process was measured to take on a CPU with glibc's default settings, at most:
# freed blocks stay with the process (docs/performance.md).
HEAP_FACTOR = 5

LOGITS_COPIES = 5  # of float32, of one step of generation: raw, at the temperature, and three of drawing a token
_KL_POSITIONS = 512  # for which the exact KL makes logits at a time


@dataclass(frozen=True)
class PhaseMemory:
    """Peak memory of a phase, by what takes it, in bytes.

    Attributes:
        weights: The base and other models.
        adapters: Adapters and heads of all roles, in float32.
        optimizer: Gradients and optimizer states of what is trained.
        activations: What the layers keep for the backward pass, and what they compute with.
        logits: The output layer: tiles of logits, or the logits of one step of generation.
        cache: Keys and values of generation.
        rest: The rollout's tensors, and what a run holds beside tensors.
        buffers: Of several GPUs: weights that are gathered, and gradients on their way.
        vllm: What a vLLM in the same process takes.
    """

    weights: float = 0.0
    adapters: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    cache: float = 0.0
    rest: float = 0.0
    buffers: float = 0.0
    vllm: float = 0.0

    @property
    def total(self) -> float:
        """Their sum."""
        return float(sum(vars(self).values()))


def weight_bytes(network: NetworkSizes, bytes_per_weight: int, bits: int = 0) -> float:
    """Bytes of a base model in memory.

    In 4 bits, linear layers but the output layer have half a byte for each weight, one byte for each block of 64 (its
    largest absolute value), a float32 for each 256 of these (double quantization), and tables of 16 and 256 float32
    values and an offset for each layer (QLoRA, https://huggingface.co/papers/2305.14314, section 3). In 8 bits, one
    byte for each weight and a float32 for each row (counted as one for each 64 x 64 weights).

    Args:
        network: Its shape.
        bytes_per_weight: Of what is not quantized.
        bits: 4, 8, or 0 without quantization.

    Example:
        >>> sizes = NetworkSizes(64, 1, 2, 2, 32, 128, 100, True, 7, 40_960, 12_992, 8192, 6400, 6400, False)
        >>> weight_bytes(sizes, 4), weight_bytes(sizes, 4, bits=4)
        (215808, 80760.0)
    """
    other, linear = network.other_parameters * bytes_per_weight, network.linear_parameters
    if bits == 0:
        return other + linear * bytes_per_weight
    if bits == 8:
        return other + linear * (1 + 4 / 4096)
    blocks = linear / 64
    tables = network.linears * 4 * (16 + 256 + 1)
    return other + linear / 2 + blocks + 4 * max(blocks / 256, network.linears) + tables


def kept_per_layer(sizes: RunSizes, network: NetworkSizes, adapter: AdapterSizes) -> float:
    """Bytes for each token that a layer keeps for its backward pass, without checkpointing.

    - Both norms keep their input in float32: `2 H`.
    - Attention keeps queries, keys, values and its output, keys and values repeated for all heads: `4 heads x
      head_size`, which on a CPU are float32 in 16 bits too. The fused kernels (`sdpa`, flash) keep one more number for
      each head; `eager` keeps the weights, a float32 and their 16-bit copy for each head and each token that is looked
      at.
    - The MLP keeps what its activation function reads, `I`. With a gate it keeps the other factor too, and where its
      weights are trained the function's result, `3 I`; where they are frozen only its input besides, `2 I + H`.
    - Each adapted linear layer keeps its input and the `r` numbers between its two matrices. The frozen matrices need
      no inputs. Layers with the same input share it, unless each casts it and keeps its own copy: 16-bit weights
      with float32 adapters, or float32 weights under autocast.

    The output of the MLP's activation function is the input of its last linear layer, and is counted there; with a
    gate and frozen weights it is not kept.
    """
    compute = sizes.compute_bytes
    width = network.heads * network.head_size
    casts = casts_inputs(sizes)
    if sizes.eager:
        attention = 3.0 * width * compute + network.heads * sizes.length * (4 + (compute if compute < 4 else 0))
    elif sizes.device == "cpu" and compute == 2:
        attention = 4.0 * width * 4 + 4 * network.heads
    else:
        attention = (4.0 if casts else 3.0) * width * compute + 4 * network.heads
    wide = 1 if not network.gated else 2 if adapter.in_parts else 3
    mlp = (wide * network.intermediate + (network.hidden if wide == 2 else 0)) * compute
    cast_bytes = 2 if sizes.autocast else 4
    inputs = adapter.inputs * cast_bytes if casts else adapter.shared_inputs * compute
    return 8 * network.hidden + attention + mlp + inputs + adapter.ranks * cast_bytes


def casts_inputs(sizes: RunSizes) -> bool:
    """Return whether each adapted layer keeps a copy of its input in another number format."""
    return sizes.autocast if sizes.weight_bytes == 4 else not sizes.autocast


def kept_activations(sizes: RunSizes, network: NetworkSizes, adapter: AdapterSizes) -> float:
    """Bytes that the forward pass of a micro-batch keeps for its backward pass.

    All that its layers keep, under autocast with 16-bit copies of their adapters; of layers that are checkpointed,
    their input only. After the last layer: its output, which the last norm keeps, the norm's result, and the output
    layer's copy of that, in float32.
    """
    tokens = sizes.micro_batch * sizes.length
    last = 3 * 4 * network.hidden * tokens
    casts = 2.0 * (adapter.parameters - adapter.in_mlps) / network.layers if sizes.autocast else 0.0
    again = -(-network.layers // sizes.checkpointing) if sizes.checkpointing else 0  # the first, then every n-th
    stored = (network.layers - again) * (tokens * kept_per_layer(sizes, network, adapter) + casts)
    return stored + again * tokens * network.hidden * sizes.weight_bytes + last


def working_memory(sizes: RunSizes, tokens: int, backward: bool) -> float:
    """Bytes that one layer computes with and does not keep.

    The widest place is the MLP. Forward: the result of its first projection beside the base layer's, the adapter's
    and the scaled adapter's part of the second, `4 I`, and the residual in float32 with the norm's work on it, `3 H`.
    Backward: gradients at three places of width `I`, and `2 H`. With a gate and frozen weights it works on a part of
    the tokens, for which there are `5 I`. A quantized layer is turned back into numbers of the computation, one layer
    at a time, on a CPU and, for more than a few tokens, on a GPU.
    """
    network = sizes.network
    wide, narrow = (3, 2) if backward else (4, 3)
    in_mlp = tokens
    if network.gated and sizes.policy.in_parts:
        wide, in_mlp = 5, min(tokens, tokens_in_mlp(network.intermediate, sizes.device))
    layer = in_mlp * wide * network.intermediate * sizes.compute_bytes + tokens * narrow * network.hidden * 4
    return layer + (network.largest_linear * sizes.compute_bytes if sizes.quantized_bits else 0)


def logits_memory(sizes: RunSizes, backward: bool) -> float:
    """Bytes with which TRL's fused output layer computes log-probabilities and entropies of a micro-batch.

    It never makes a tensor of (batch, tokens, vocabulary), but tiles of up to 4096 tokens, on a CPU far fewer, and
    32768 vocabulary entries, one after the other. Tokens are those of the completions. On a GPU a kernel works on the
    tile in place, and the tile is allocated in its full width. On a CPU torch makes copies in float32: three forward;
    backward eight and a tile of truth values; and in 16 bits one of the tile's gradient and of the piece of the output
    matrix. Backward also has the gradient of the hidden states in float32.
    """
    network, compute = sizes.network, sizes.compute_bytes
    rows = sizes.micro_batch * sizes.completion
    width = min(network.vocabulary, TILE_VOCABULARY) if sizes.device == "cpu" else TILE_VOCABULARY
    tokens = min(rows, tokens_in_output(network.vocabulary, sizes.device))
    piece = 0 if compute == 4 else min(network.vocabulary, TILE_VOCABULARY) * network.hidden * (4 if backward else 2)
    gradient = rows * network.hidden * 4 if backward else 0
    if sizes.device == "cuda":
        return tokens * width * compute + gradient
    copies = 8 * 4 + 1 if backward else 3 * 4
    return tokens * width * (compute + copies) + piece + gradient


def exact_kl_memory(sizes: RunSizes) -> float:
    """Bytes of the exact KL: float32 logits, log-probabilities and products of 512 positions for both policies."""
    return 6 * 4 * _KL_POSITIONS * sizes.network.vocabulary if sizes.exact_kl else 0


def first_logits_memory(sizes: RunSizes) -> float:
    """Bytes of the logits after the prompts, from which the first tokens are drawn.

    Copies of them in float32, as at each token. On a CPU with 16-bit weights also a copy of the output matrix for each
    completion: the last hidden states are a slice, which torch multiplies as a batch of matrices, and its 16-bit
    kernel there wants each of them whole.
    """
    network = sizes.network
    logits = LOGITS_COPIES * 4 * sizes.rollout * network.vocabulary
    if sizes.device == "cpu" and sizes.weight_bytes == 2:
        logits += 2 * sizes.rollout * network.vocabulary * network.hidden
    return logits


def cache_bytes(sizes: RunSizes) -> float:
    """Bytes of keys and values of a whole rollout at its last token, and of one layer's copy while it grows.

    Heads that share keys and values (grouped-query attention) have them once.
    """
    network = sizes.network
    layer = 2 * sizes.rollout * sizes.length * network.kv_heads * network.head_size * sizes.weight_bytes
    return layer * (network.layers + 1)


def rollout_bytes(sizes: RunSizes) -> float:
    """Bytes of a stored rollout: ids and masks in 8 bytes, five numbers for each token of a completion."""
    return sizes.rollout * (16 * sizes.prompt + (16 + 5 * 4 + 4) * sizes.completion)
