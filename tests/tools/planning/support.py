"""Sizes of a small run on a CPU, for sums by hand."""

from rlhf_recipes.tools.planning.sizes import AdapterSizes, NetworkSizes, RunSizes

# H 8, two layers, 2 heads of 4 (one for keys), I 16, V 100: q 64, k 32, v 32, o 64, gate, up and down 128 each
NETWORK = NetworkSizes(
    hidden=8,
    layers=2,
    heads=2,
    kv_heads=1,
    head_size=4,
    intermediate=16,
    vocabulary=100,
    gated=True,
    linears=14,
    linear_parameters=1152,
    other_parameters=1640,
    largest_linear=128,
    largest_parameter=800,
    embedding=800,
    tied=False,
)
ADAPTER = AdapterSizes(parameters=600, ranks=14, inputs=32, shared_inputs=16)
WHOLE = AdapterSizes(parameters=600, ranks=14, inputs=64, shared_inputs=40, in_parts=False)  # of gate, up and down
SIZES = RunSizes(
    network=NETWORK,
    policy=ADAPTER,
    critic=ADAPTER,
    critic_network=None,
    frozen=1200,
    others=0,
    heads=2,
    weight_bytes=4,
    quantized_bits=0,
    autocast=False,
    checkpointing=0,
    eager=False,
    exact_kl=False,
    optimizer_bytes=8,
    micro_batch=2,
    evaluation_batch=2,
    rollout=6,
    prompt=3,
    completion=2,
    device="cpu",
    file_bytes=0,
)
