"""What a GPU holds of a run that several GPUs share: sizes in, bytes out.

`N` processes train, each with rows of its own. DDP gives each of them everything. ZeRO-2 divides gradients and
optimizer states, FSDP2 and ZeRO-3 also the weights, of which the ones in use are gathered for the time of their use
(ZeRO: https://huggingface.co/papers/1910.02054, section 5; FSDP: https://huggingface.co/papers/2304.11277).
"""

from __future__ import annotations

from rlhf_recipes.tools.planning.memory import weight_bytes
from rlhf_recipes.tools.planning.sizes import Layout, RunSizes

# DeepSpeed's defaults, in numbers, which accelerate leaves as they are: the buffer in which gradients are reduced, and
# the weights that stay gathered while they will be used again (`reduce_bucket_size`, `stage3_max_live_parameters`).
REDUCE_BUCKET, MAX_LIVE = 500_000_000, 1_000_000_000

# FSDP2 holds two units: the one that computes, and what was gathered for the next, from which its weights are copied.
GATHERED_UNITS = 2


def base_bytes(sizes: RunSizes, layout: Layout) -> tuple[float, float]:
    """Bytes of the base that lie whole on every GPU, and bytes that are divided among them.

    In 4 bits only the packed weights can be divided, and only if they lie in tensors of floats: accelerate leaves
    those of bytes whole (`fsdp2_prepare_model`). Their scales belong to no parameter, and are whole on every GPU.
    8-bit weights are not divided. DeepSpeed casts weights to the 16 bits in which a run computes.

    Args:
        sizes: The run.
        layout: How it lies on GPUs.

    Returns:
        Both; their sum is the base on one GPU.
    """
    network = sizes.network
    of_a_weight = min(sizes.weight_bytes, sizes.compute_bytes) if layout.is_zero else sizes.weight_bytes
    total = weight_bytes(network, of_a_weight, sizes.quantized_bits)
    if not layout.divides_weights:
        return total, 0.0
    if sizes.quantized_bits == 0:
        return 0.0, total
    packed = network.linear_parameters / 2 if sizes.quantized_bits == 4 and layout.shards_quantized else 0
    divided = network.other_parameters * of_a_weight + packed
    return total - divided, divided


def base_on_a_gpu(sizes: RunSizes, layout: Layout) -> float:
    """Bytes of the base on one GPU: what is whole, and its part of what is divided.

    Rows of a matrix are not divided, so that the largest part is up to a row of each matrix more.
    """
    whole, divided = base_bytes(sizes, layout)
    return whole + divided / layout.processes


def base_while_loading(sizes: RunSizes, layout: Layout) -> float:
    """Bytes of the base on one GPU while it is loaded.

    Under FSDP2 each process reads the whole base, tries the policy out, and has it divided then. 4 and 8 bits are
    quantized whole in any case.
    """
    if sizes.quantized_bits or layout.sharding == "fsdp2":
        return sum(base_bytes(sizes, layout))
    return base_on_a_gpu(sizes, layout)


def adapters_on_a_gpu(sizes: RunSizes, layout: Layout) -> float:
    """Bytes of adapters and heads of all roles on one GPU.

    Float32, divided by FSDP2. DeepSpeed casts them to 16 bits where the run computes in 16 bits. ZeRO-3 would divide
    matrices of more than 100,000 numbers (`stage3_param_persistence_threshold`), which most of an adapter's are not:
    they are counted as whole.
    """
    numbers = sizes.trained + sizes.frozen + (sizes.heads - 1) * sizes.network.hidden
    if layout.is_zero:
        return float(numbers * sizes.compute_bytes)
    return 4 * numbers / (layout.processes if layout.divides_weights else 1)


def optimizer_on_a_gpu(sizes: RunSizes, layout: Layout) -> float:
    """Bytes of optimizer states on one GPU; DeepSpeed's have a float32 copy of what is trained besides.

    For a whole model of `P` numbers in 16 bits, trained by Adam, this and `gradients_on_a_gpu` are the `16 P / N` of
    `estimate_zero3_model_states_mem_needs` and the `18 P / N` of `estimate_zero2_model_states_mem_needs` of DeepSpeed.
    """
    of_a_number = sizes.optimizer_bytes + (4 if layout.is_zero else 0)
    return sizes.trained * of_a_number / (layout.processes if layout.divides_states else 1)


def gradients_on_a_gpu(sizes: RunSizes, layout: Layout) -> float:
    """Bytes of gradients on one GPU: float32, and with ZeRO-2 those in 16 bits that they are made of."""
    in_16_bits = layout.is_zero and layout.sharding == "zero2" and sizes.compute_bytes == 2
    return sizes.trained * (6 if in_16_bits else 4) / (layout.processes if layout.divides_states else 1)


def unit_bytes(sizes: RunSizes, layout: Layout) -> float:
    """Bytes of a transformer layer that FSDP2 has gathered, with its part of the adapters of all roles.

    Each number keeps its format: accelerate's `mixed_precision` is off, and autocast works on what was gathered.
    """
    network = sizes.network
    of_the_base = base_bytes(sizes, layout)[1] - network.ends * sizes.weight_bytes
    return (of_the_base + 4 * (sizes.trained + sizes.frozen)) / network.layers


def buffers_on_a_gpu(sizes: RunSizes, layout: Layout, phase: str) -> float:
    """Bytes that sharing a run takes besides: weights that are gathered, and gradients on their way.

    - DDP: a copy of all gradients, in which they are reduced (`gradient_as_bucket_view` is off), once training began.
    - FSDP2: while a rollout is sampled and scored, the whole base and all adapters, gathered once: otherwise they
      would be gathered again for each token. In training the unit of the output layer (with the embedding, where they
      are one tensor), which stays gathered, two units of transformer layers, a layer's gradients, and the buffer from
      which they are reduced.
    - ZeRO-2: the buffer of `reduce_bucket_size`, in training.
    - ZeRO-3: that buffer at all times, and up to `stage3_max_live_parameters` of gathered weights; while transformers
      samples, all of them (`ds3_gather_for_generation`).

    Args:
        sizes: The run.
        layout: How it lies on GPUs.
        phase: Of a run, as in `PHASES`, but `load`.
    """
    if layout.processes == 1:
        return 0.0
    bucket = float(REDUCE_BUCKET * sizes.compute_bytes)
    if not layout.divides_weights:
        if layout.sharding == "zero2":
            return bucket if phase == "train" else 0.0
        return 4.0 * sizes.trained
    divided = base_bytes(sizes, layout)[1]
    if layout.is_zero:
        sampling = phase == "generate" and layout.vllm == "none"
        return bucket + (divided if sampling else min(divided, MAX_LIVE * sizes.compute_bytes))
    if phase != "train":
        return divided + adapters_on_a_gpu(sizes, Layout())
    gradients = 4 * sizes.trained / sizes.network.layers
    return sizes.network.embedding * sizes.weight_bytes + GATHERED_UNITS * (unit_bytes(sizes, layout) + gradients)
