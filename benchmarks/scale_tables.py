"""Write docs/scale_tables.md: which GPUs a base needs, and how fast they are, as `rlhf-recipes plan` computes it.

    python benchmarks/scale_tables.py > docs/scale_tables.md

Nothing is measured, and no weights are needed: models are built from their shapes. It takes half a minute.
"""

import json
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path

from trl import ModelConfig

from rlhf_recipes.ppo.arguments import PPOArguments
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.tools.planning.fit import Setting, smallest_change
from rlhf_recipes.tools.planning.memory import CUDA_CONTEXT_BYTES, MIB
from rlhf_recipes.tools.planning.phases import PHASES, peak, ppo_memory
from rlhf_recipes.tools.planning.run import run_sizes
from rlhf_recipes.tools.planning.serving import SERVER_SHARE, server_memory, sync_bytes
from rlhf_recipes.tools.planning.sizes import Layout
from rlhf_recipes.tools.planning.speed import FAST, GPUS, SLOW, Work, tokens_per_second, update_seconds

QWEN, LLAMA = {"model_type": "qwen2", "vocab_size": 152_064}, {"model_type": "llama", "vocab_size": 128_256}
TIED = {"tie_word_embeddings": True, "vocab_size": 151_936}


def shape(hidden, intermediate, layers, heads, kv_heads):
    """Fields of a config.json."""
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
    return dict(zip(names, (hidden, intermediate, layers, heads, kv_heads), strict=True))


MODELS = {  # shapes of Qwen2.5 and Llama 3.1, as their config.json gives them
    "0.5B": QWEN | TIED | shape(896, 4864, 24, 14, 2),
    "1.5B": QWEN | TIED | shape(1536, 8960, 28, 12, 2),
    "7B": QWEN | shape(3584, 18_944, 28, 28, 4),
    "14B": QWEN | shape(5120, 13_824, 48, 40, 8),
    "32B": QWEN | shape(5120, 27_648, 64, 40, 8),
    "70B": LLAMA | shape(8192, 28_672, 80, 64, 8),
}
NUMBERS = (1, 2, 4, 8, 16, 64)
PROMPT, COMPLETION, MICRO_BATCH, STEPS = 128, 256, 16, 4
GIB = 1024 * MIB
MARGIN = 0.1  # of a GPU that the least that fits leaves free: predicted peaks were up to that much too low


def sizes_of(model):
    """Sizes of the run with a base of this shape, in 16 bits."""
    config = PPOConfig(
        "outputs/plan",
        per_device_train_batch_size=MICRO_BATCH,
        per_device_eval_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=STEPS,
        steps_per_generation=STEPS,
        num_iterations=4,
        max_completion_length=COMPLETION,
        activation_checkpointing=True,
        use_cpu=True,
        report_to="none",
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"dtype": "bfloat16", **MODELS[model]}))
        stages = PPOArguments(sft_adapter=f"{folder}/sft", reward_adapter=f"{folder}/reward")
        sizes, _ = run_sizes(stages, config, ModelConfig(folder, dtype="bfloat16"), PROMPT, "cuda")
    return replace(sizes, autocast=True)


def in_4_bits(sizes):
    return replace(sizes, quantized_bits=4)


def peak_cell(sizes, layout):
    """GiB of the phase that takes most, and its name."""
    name, most = peak(sizes, layout)
    return f"{(most + CUDA_CONTEXT_BYTES) / GIB:.1f} ({name[0]})"


def memory_rows(model, sizes):
    """A row of each of the tables of memory by number of GPUs."""
    sharded = [Layout(number, sharding="fsdp2", shards_quantized=True) for number in NUMBERS]
    return {
        "fsdp2": [model, *(peak_cell(sizes, layout) for layout in sharded)],
        "4bit": [
            model,
            peak_cell(in_4_bits(sizes), Layout()),
            peak_cell(in_4_bits(sizes), Layout(8)),
            *(peak_cell(in_4_bits(sizes), layout) for layout in sharded[1:]),
        ],
    }


def phases_row(model, sizes):
    """GiB of each phase, and of what it is made of in training, of 16 bits on 8 GPUs."""
    phases = ppo_memory(sizes, Layout(8, sharding="fsdp2"))
    train = phases["train"]
    parts = [train.weights, train.adapters + train.optimizer, train.buffers, train.activations + train.logits]
    return [model, *(f"{part / GIB:.1f}" for part in (*parts, *(phases[name].total for name in PHASES)))]


def served(layout, gpu, sizes):
    """The layout beside a server on as few GPUs as hold its model."""
    beside = [
        replace(layout, vllm="server", tensor_parallel=number, vllm_bytes=SERVER_SHARE * gpu.mib * MIB)
        for number in (1, 2, 4, 8)
    ]
    return next(each for each in beside if server_memory(sizes, each).sequences)


def server_row(model, sizes, kind="h100"):
    """What a server takes: GPUs, GiB of each, completions at a time, MiB that are sent after an update."""
    layout = served(Layout(), GPUS[kind], sizes)
    server = server_memory(sizes, layout)
    gib = [f"{part / GIB:.1f}" for part in (server.weights, server.working, server.cache)]
    return [model, f"{layout.tensor_parallel}", *gib, f"{server.sequences:,}", f"{sync_bytes(sizes) / MIB:,.0f}"]


def budget(gpu):
    """Bytes of a GPU that a run may take."""
    return (1 - MARGIN) * gpu.mib * MIB - CUDA_CONTEXT_BYTES


def fit_row(model, sizes):
    """For each kind of GPU, the fewest and the least change from the recipes' setting with which the run fits."""
    cells = [model]
    for gpu in GPUS.values():
        found = smallest_change(Setting(in_4_bits(sizes), Layout(), budget(gpu), MICRO_BATCH * STEPS))
        cells.append("-" if found is None else describe(found))
    return cells


def describe(setting):
    """A setting in few words: GPUs, bits, micro-batch."""
    bits = "4-bit" if setting.sizes.quantized_bits else "16-bit"
    return f"{setting.layout.processes}, {bits}, {setting.sizes.micro_batch}"


def speed_rows(model, sizes, kind="h100"):
    """Completion tokens per second on a kind of GPU, from slow to fast, where the run fits."""
    gpu, work = GPUS[kind], Work(epochs=4, steps=4)

    def cell(run, layout):
        if peak(run, layout)[1] > budget(gpu):
            return "-"
        low, high = (
            tokens_per_second(run, layout, update_seconds(run, layout, gpu, work, pace)) for pace in (SLOW, FAST)
        )
        server = f" (+ {layout.tensor_parallel})" if layout.vllm == "server" else ""
        return f"{float(f'{low:.2g}'):,g} to {float(f'{high:.2g}'):,g}{server}"

    machines = [max(1, number // 8) for number in NUMBERS]
    replicated = [Layout(number, machine) for number, machine in zip(NUMBERS, machines, strict=True)]
    sharded = [
        served(layout if layout.processes == 1 else replace(layout, sharding="fsdp2"), gpu, sizes)
        for layout in replicated
    ]
    return {
        "ddp": [model, *(cell(in_4_bits(sizes), layout) for layout in replicated)],
        "server": [model, *(cell(sizes, layout) for layout in sharded)],
    }


def table(header, rows):
    """A table of Markdown."""
    lines = [" | ".join(row) for row in (header, *rows)]
    return "\n".join([f"| {lines[0]} |", f"|{'---|' * len(header)}", *(f"| {line} |" for line in lines[1:])])


def text(words):
    """A paragraph in lines of the project's length."""
    return textwrap.fill(words, 119, break_long_words=False, break_on_hyphens=False)


def page(models=MODELS):
    """The page."""
    sizes = {model: sizes_of(model) for model in models}
    memory = [memory_rows(*each) for each in sizes.items()]
    speed = [speed_rows(*each) for each in sizes.items()]
    gpus = ["base", *(f"{number} GPU{'s' if number > 1 else ''}" for number in NUMBERS)]
    four_bits = ["base", "1 GPU", "DDP, any number", *(f"FSDP2, {number}" for number in NUMBERS[1:])]
    phases = ["base", "weights", "adapters, gradients, Adam", "gathered", "activations, logits", *PHASES]
    parts = [
        "# What fits where: computed tables",
        text(
            "**Computed, not measured**, by the formulas of [`rlhf-recipes plan`](plan.md), which knows your run "
            "better. `python benchmarks/scale_tables.py > docs/scale_tables.md` writes this page."
        ),
        text(
            "Shapes of Qwen2.5 (70B: Llama 3.1), LoRA of rank 16 on all linear layers for policy, reference, critic "
            f"(`critic: adapter`) and one reward. On each GPU rollouts of {MICRO_BATCH * STEPS} completions in "
            f"micro-batches of {MICRO_BATCH}, {PROMPT} + {COMPLETION} tokens, 4 epochs, bfloat16, "
            "`activation_checkpointing: true`. GiB with the 0.5 of the CUDA context; in brackets the phase that "
            "decides: load, generate, score, train."
        ),
        "## Memory of a GPU: 16 bits, FSDP2, transformers generates",
        text(
            "Every GPU holds all weights while they are loaded, and while a rollout is sampled and scored. So more "
            "GPUs save little, but in training."
        ),
        table(gpus, [each["fsdp2"] for each in memory]),
        "On 8 GPUs, without the context: what training is made of, and each phase.",
        table(phases, [phases_row(*each) for each in sizes.items()]),
        "## Memory of a GPU: 4 bits, transformers generates",
        text("FSDP2 with `bnb_4bit_quant_storage: bfloat16`."),
        table(four_bits, [each["4bit"] for each in memory]),
        "## The least that fits",
        text(
            f"From one GPU with a 4-bit base: the smallest change that `plan` finds, with {MARGIN * 100:.0f} % of the "
            "GPU left free. GPUs (with FSDP2, if several), bits of the base, micro-batch; a rollout of one step, and "
            "evaluations one by one, where that is needed. `-`: none on up to 64 GPUs."
        ),
        table(["base", *(gpu.title for gpu in GPUS.values())], [fit_row(*each) for each in sizes.items()]),
        "## A vLLM server on H100",
        text(
            f"In 16 bits on as few GPUs as hold it, with {SERVER_SHARE:g} of their memory: GiB of each, completions "
            f"of {PROMPT + COMPLETION} tokens that its cache holds, and the adapter that it gets after each update."
        ),
        table(
            ["base", "GPUs", "weights", "to compute with", "cache", "completions", "MiB an update"],
            [server_row(*each) for each in sizes.items()],
        ),
        "## Completion tokens per second on H100",
        text(
            "From slow to fast, by the assumptions of [`plan`](plan.md#tokens-per-second), 8 GPUs in a machine; `-` "
            f"where less than {MARGIN * 100:.0f} % would be free. 4 bits, DDP, transformers generates:"
        ),
        table(gpus, [each["ddp"] for each in speed]),
        "16 bits, FSDP2 beside a vLLM server (its GPUs in brackets):",
        table(gpus, [each["server"] for each in speed]),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
