"""The files that all sides of the speed benchmark read: one model per size, a reward adapter, and prompts.

Models are random. What a token costs does not depend on the weights; how long completions get does, so the output
layer is set to draw the end token with a chosen probability.
"""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    Qwen2Config,
)

PROMPT_LENGTH, COMPLETION_LENGTH = 32, 48
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
LENGTHS = {"fixed": 1e-12, "ragged": 1 / 24}  # probability of the end token at each step
SIZES: dict[str, dict] = {
    "1.3M": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384},
    "27M": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1408},
    "135M": {  # the shape of SmolLM2-135M
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "tie_word_embeddings": True,
    },
}


def qwen(hidden, layers, heads, key_value_heads, intermediate, tied=True):
    """The fields of a shape of Qwen2.5."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": intermediate,
        "tie_word_embeddings": tied,
    }


QWEN = {
    "0.5B": qwen(896, 24, 14, 2, 4864),
    "1.5B": qwen(1536, 28, 12, 2, 8960),
    "3B": qwen(2048, 36, 16, 2, 11008),
    "7B": qwen(3584, 28, 28, 4, 18944, tied=False),
}
VOCABULARY = {"135M": 49_152, "0.5B": 151_936, "1.5B": 151_936, "3B": 151_936, "7B": 152_064}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_world(
    folder: Path,
    size: str,
    lengths: str,
    texts: Path | None,
    vocabulary: int | None = None,
    prompt_length: int = PROMPT_LENGTH,
) -> Path:
    """Write the model, the reward adapter and the prompts of one size, unless they are there, and name the folder."""
    from rlhf_recipes.models.tiny import word_tokenizer

    vocabulary = vocabulary or VOCABULARY.get(size, 2000)
    world = folder / f"{size}_{lengths}_{vocabulary}_{prompt_length}"
    if (world / "prompts.json").exists():
        return world
    turns = read_prompts(texts)
    counts = Counter(word for turn in turns for word in turn)
    words = [word for word, _ in counts.most_common(min(vocabulary, 2000) - 3)]
    words += [f"unused{index}" for index in range(vocabulary - 3 - len(words))]
    tokenizer = word_tokenizer(words)
    torch.manual_seed(0)
    model = make_model(size, vocabulary, tokenizer)
    set_end_probability(model, tokenizer.eos_token_id, LENGTHS[lengths])
    for part in (model, tokenizer):
        part.save_pretrained(world / "policy")
    scorer = AutoModelForSequenceClassification.from_pretrained(world / "policy", num_labels=1)
    scorer = get_peft_model(scorer, LoraConfig(task_type="SEQ_CLS", **LORA))
    scorer.save_pretrained(world / "reward")

    long = [word for turn in turns for word in turn]
    fixed = [long[start : start + prompt_length] for start in range(0, len(long) - prompt_length, prompt_length)]
    chosen = fixed if lengths == "fixed" else [turn[-prompt_length:] for turn in turns]
    (world / "prompts.json").write_text(json.dumps([" ".join(turn) for turn in chosen[:1024]]))
    return world


def read_prompts(texts: Path | None) -> list[list[str]]:
    """Words of the first turns of people in a file of dialogues, or of made-up reviews."""
    if texts is None:
        from rlhf_recipes.data.synthetic import grammar

        rng = random.Random(0)
        prompts, _ = grammar.split_prompts(0.25, rng)
        return [f"{prompt} {grammar.write_review(prompt, grammar.Style(), rng)}".split() for prompt in prompts]
    with gzip.open(texts, "rt") as lines:
        first = [json.loads(line)["chosen"].split("\n\nHuman: ")[1].split("\n\nAssistant:")[0] for line in lines]
    return [turn.split() for turn in dict.fromkeys(first) if turn.split()]


def make_model(size, vocabulary, tokenizer):
    """A Llama with random weights, or a Qwen2 in the shape of a Qwen2.5; one of more than a billion in bfloat16."""
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    options = tokens | {"max_position_embeddings": 512, "vocab_size": vocabulary}
    if size in QWEN:
        config = Qwen2Config(**QWEN[size], **options)
    else:
        config = LlamaConfig(**{"tie_word_embeddings": False} | SIZES[size], **options)
    dtype = torch.float32 if size in (*SIZES, "0.5B") else torch.bfloat16
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.do_sample = True
    return model


@torch.no_grad()
def set_end_probability(model, end: int, probability: float) -> None:
    """Give all embeddings a common part, which the last hidden states keep, and point the end token's row along it."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    common = 5 * embeddings.std() * torch.ones_like(embeddings[0])
    embeddings += common
    ids = torch.randint(3, len(embeddings), (8, 32), device=DEVICE)
    direction = common / common.norm()
    states = model.base_model(input_ids=ids).last_hidden_state.flatten(0, 1)
    logits = model.lm_head(states)
    logits[:, end] = -torch.inf
    wanted = (logits.logsumexp(dim=1) + torch.tensor(probability / (1 - probability)).log()).mean()
    head[end] = direction * wanted / (states @ direction).mean()


def dtype_of(precision: str) -> torch.dtype:
    """Of weights, or of what 4 bits are computed in: bfloat16 on a GPU."""
    return torch.bfloat16 if precision == "bf16" or (precision, DEVICE) == ("4bit", "cuda") else torch.float32


def four_bit() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype_of("4bit"),
    )


def load(world: Path, kind, precision: str, **options):
    """Load a model of the benchmark in float32, bfloat16 or 4 bits."""
    if precision == "4bit":
        options["quantization_config"] = four_bit()
        options["device_map"] = {"": DEVICE}
    model = kind.from_pretrained(world / "policy", dtype=dtype_of(precision), **options).to(DEVICE)
    if kind is AutoModelForCausalLM:  # bitsandbytes may repack, at the first pass in eval mode, what is trained later
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model


def prompts(world: Path):
    from datasets import Dataset

    return Dataset.from_dict({"prompt": json.loads((world / "prompts.json").read_text())})
