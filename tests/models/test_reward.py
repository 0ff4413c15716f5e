"""Reward models from adapters: no base that rounds has an adapter merged into it, in 4 bits least of all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from rlhf_recipes.models import load_reward_model
from rlhf_recipes.models.reward import load_whole_reward_model
from rlhf_recipes.reward_modeling.finished import average_reward_models
from rlhf_recipes.rewards import ClassifierReward
from rlhf_recipes.tools.certificate import load_scorer
from rlhf_recipes.tools.certificate.pairs import score_pairs

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
FP4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
INT8 = BitsAndBytesConfig(load_in_8bit=True)
QUANTIZED = {"nf4": NF4, "fp4": FP4, "int8": INT8}
PROMPTS = ["the film was ", "the actor was ", "the story "] * 4
COMPLETIONS = ["good", "bad and slow", "very warm", "not good"] * 3


def plain(base, adapter, **options):
    """The adapter beside its base with transformers and PEFT alone, in layers that bitsandbytes leaves as they are."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def scores_of(model, tokenizer):
    """Scores one row at a time, with an end token."""
    rows = [prompt + text + tokenizer.eos_token for prompt, text in zip(PROMPTS, COMPLETIONS, strict=True)]
    return torch.cat([model(**tokenizer(row, return_tensors="pt")).logits[:, 0].float() for row in rows])


@pytest.fixture(scope="module")
def tokenizer(tiny_model_path):
    return AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.fixture(scope="module")
def small_adapter(reward_adapter, tmp_path_factory):
    """The adapter at a tenth of its scale: what a short training leaves, and what 4 bits round away."""
    folder = shutil.copytree(reward_adapter, tmp_path_factory.mktemp("adapters") / "small")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] / 10}))
    return folder


@pytest.fixture(scope="module", params=QUANTIZED)
def unmerged(request, tiny_model_path, small_adapter, tokenizer):
    """The name of a quantization, and the scores of the adapter on a base in it."""
    model = plain(tiny_model_path, small_adapter, quantization_config=QUANTIZED[request.param])
    scores = scores_of(model, tokenizer)
    with model.disable_adapter():
        assert (scores - scores_of(model, tokenizer)).abs().max() > 1e-2  # the adapter has an effect to be lost
    return request.param, scores


class TestQuantizedBase:
    """What each way of loading an adapter on a quantized base gives, against the unmerged model."""

    def test_it_is_not_merged(self, unmerged, small_adapter):
        name, expected = unmerged
        model, tokenizer = load_reward_model(small_adapter, quantization_config=QUANTIZED[name])
        assert isinstance(model, PeftModel)
        assert_close(scores_of(model.eval(), tokenizer), expected, rtol=0, atol=1e-5)

    def test_as_a_reward(self, unmerged, small_adapter):
        name, expected = unmerged
        reward = ClassifierReward(*load_reward_model(small_adapter, quantization_config=QUANTIZED[name]), batch_size=1)
        assert_close(torch.tensor(reward(prompts=PROMPTS, completions=COMPLETIONS)), expected, rtol=0, atol=1e-5)
        assert not any(parameter.requires_grad for parameter in reward.model.parameters())

    def test_in_the_certificate(self, unmerged, small_adapter, tiny_model_path):
        name, expected = unmerged
        rows = {"prompt": PROMPTS, "chosen": COMPLETIONS, "rejected": COMPLETIONS[::-1]}
        for paths in ((str(small_adapter), None), (tiny_model_path, str(small_adapter))):
            scorer = load_scorer(*paths, quantization_config=QUANTIZED[name], batch_size=1)
            scores = score_pairs(scorer, Dataset.from_dict(rows)).chosen
            assert_close(torch.from_numpy(scores).float(), expected, rtol=0, atol=1e-5)


def test_16_bits_are_not_merged_either(tiny_model_path, small_adapter, tokenizer):
    model, _ = load_reward_model(small_adapter, dtype="bfloat16")
    assert isinstance(model, PeftModel)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1, dtype=torch.bfloat16)
    expected = scores_of(PeftModel.from_pretrained(base, small_adapter).eval(), tokenizer)
    assert_close(scores_of(model.eval(), tokenizer), expected, rtol=0, atol=0.03)  # other layers, rounded elsewhere
    reward = ClassifierReward(model, tokenizer, batch_size=1)
    assert_close(torch.tensor(reward(prompts=PROMPTS, completions=COMPLETIONS)), expected, rtol=0, atol=0.03)


def test_float32_is_merged(tiny_model_path, small_adapter, tokenizer):
    model, _ = load_reward_model(small_adapter)
    assert not isinstance(model, PeftModel)
    expected = scores_of(plain(tiny_model_path, small_adapter), tokenizer)
    assert_close(scores_of(model.eval(), tokenizer), expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def base_in_4_bits(tiny_model_path, small_adapter, tmp_path_factory):
    """A base that was saved in 4 bits, and two adapters that name it as theirs."""
    folder = tmp_path_factory.mktemp("quantized")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1, quantization_config=NF4)
    base.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(folder / "base")
    adapters = [shutil.copytree(small_adapter, folder / f"reward_{number}") for number in range(2)]
    for adapter, sign in zip(adapters, (1, -1), strict=True):
        config = json.loads((adapter / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": str(folder / "base"), "lora_alpha": sign * config["lora_alpha"]}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    return str(folder / "base"), adapters


class TestBaseSavedIn4Bits:
    """Nobody asked for a quantization; the folder of the base has it."""

    def test_it_is_not_merged(self, base_in_4_bits, tokenizer):
        base, adapters = base_in_4_bits
        model, _ = load_reward_model(adapters[0])
        assert isinstance(model, PeftModel)
        expected = scores_of(plain(base, adapters[0]), tokenizer)
        assert_close(scores_of(model.eval(), tokenizer), expected, rtol=0, atol=1e-5)

    def test_a_whole_model_is_merged_into_dequantized_weights(self, base_in_4_bits, tokenizer):
        base, adapters = base_in_4_bits
        model, _ = load_whole_reward_model(adapters[0])
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        expected = scores_of(plain(base, adapters[0]), tokenizer)
        assert_close(scores_of(model.eval(), tokenizer), expected, rtol=0, atol=1e-5)

    def test_the_average_of_opposite_adapters_is_the_base(self, base_in_4_bits, tokenizer, tmp_path):
        base, adapters = base_in_4_bits
        average_reward_models(adapters, tmp_path / "mean")
        assert "quantization_config" not in json.loads(Path(tmp_path, "mean", "config.json").read_text())
        mean, _ = load_reward_model(tmp_path / "mean")
        peft = plain(base, adapters[0])
        peft.get_base_model().score.original_module = peft.get_base_model().score.modules_to_save["default"]
        with peft.disable_adapter():
            expected = scores_of(peft, tokenizer)
        assert_close(scores_of(mean.eval(), tokenizer), expected, rtol=0, atol=1e-5)
