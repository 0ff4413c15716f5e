"""What is loaded for a run, and with which options: remote code, tokenizers of rewards, options without effect."""

import json
import sys

import pytest
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    dynamic_module_utils,
)

from rlhf_recipes.rewards import ClassifierReward, EnsembleReward
from tests.conftest import wordpiece

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
OWN_CODE = """
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from transformers import PreTrainedTokenizerFast

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnLlama(LlamaForCausalLM):
    config_class = OwnConfig

class OwnModel(LlamaModel):
    config_class = OwnConfig

AutoModel.register(OwnConfig, OwnModel, exist_ok=True)

class OwnClassifier(LlamaForSequenceClassification):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def count(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


@pytest.fixture
def own_code(monkeypatch, tmp_path):
    """Give a saved model code of its own; what transformers copies of it stays in the test's folder."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def make(model, tokenizer, name):
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "own.py").write_text(OWN_CODE)
        classes = {
            "AutoConfig": "own.OwnConfig",
            "AutoModelForCausalLM": "own.OwnLlama",
            "AutoModelForSequenceClassification": "own.OwnClassifier",
        }
        for file, added in (
            ("config.json", {"model_type": "own_llama", "auto_map": classes}),
            (
                "tokenizer_config.json",
                {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}},
            ),
        ):
            path = folder / file
            path.write_text(json.dumps(json.loads(path.read_text()) | added))
        return str(folder)

    return make


def test_code_of_a_model_runs_only_if_it_is_trusted(make_trainer, tiny_model_path, tiny_tokenizer, own_code):
    """Base, tokenizer, reward model and critic, each from a folder with code of its own."""
    base = own_code(AutoModelForCausalLM.from_pretrained(tiny_model_path), tiny_tokenizer, "base")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    scorer, critic = (own_code(model, tiny_tokenizer, name) for name in ("scorer", "critic"))
    own = {"model": base, "peft_config": LORA, "reward_funcs": scorer}
    own |= {"critic": "model", "critic_model": critic, "max_steps": 1, "num_iterations": 1}
    trainer = make_trainer(**own, trust_remote_code=True)
    loaded = {
        "OwnLlama": trainer.model.get_base_model(),
        "OwnTokenizer": trainer.processing_class,
        "OwnClassifier": trainer.reward_funcs[0].model,
    }
    assert {name: type(one).__name__ for name, one in loaded.items()} == {name: name for name in loaded}
    assert type(trainer.reward_funcs[0]._tokenizer).__name__ == "OwnTokenizer"
    assert type(trainer.model.critic_model).__name__ == "OwnClassifier"
    trainer.train()
    plain = {"model": tiny_model_path, "peft_config": LORA, "reward_funcs": count}
    for name in ("model", "reward_funcs"):
        with pytest.raises(ValueError, match="trust_remote_code"):
            make_trainer(**plain | {name: own[name]})
    with pytest.raises(ValueError, match="trust_remote_code"):
        make_trainer(**plain, critic="model", critic_model=critic)


@pytest.fixture
def other_words(bert_path, tiny_texts):
    """A tokenizer that reads other words than the one in the reward model's folder."""
    return wordpiece(sorted({word for text in tiny_texts for word in text.split()}, reverse=True))


def test_a_tokenizer_beside_the_path_of_a_reward_model_is_used(make_trainer, bert_path, other_words):
    rows = {"prompts": ["the film "], "completions": ["was good"]}
    model = AutoModelForSequenceClassification.from_pretrained(bert_path)
    expected = [
        ClassifierReward(model, words)(**rows)[0] for words in (other_words, AutoTokenizer.from_pretrained(bert_path))
    ]
    assert abs(expected[0] - expected[1]) > 1e-2
    fields = {"reward_funcs": [str(bert_path), count]}
    trainer = make_trainer(**fields, reward_processing_classes=[other_words, None])
    assert trainer.reward_funcs[0](**rows)[0] == pytest.approx(expected[0], abs=1e-6)
    trainer = make_trainer(**fields, reward_processing_classes=[None, None])
    assert trainer.reward_funcs[0](**rows)[0] == pytest.approx(expected[1], abs=1e-6)
    single = make_trainer(reward_funcs=str(bert_path), reward_processing_classes=other_words)
    assert single.reward_funcs[0](**rows)[0] == pytest.approx(expected[0], abs=1e-6)


def test_tokenizers_that_no_reward_would_use_are_refused(make_trainer, reward_adapter, bert_path, tiny_tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(bert_path)
    given = ClassifierReward(model, AutoTokenizer.from_pretrained(bert_path))
    name = "`reward_processing_classes"
    with pytest.raises(
        ValueError, match=rf"{name}\[0\]` is given, but that reward is an adapter on the policy's base"
    ):
        make_trainer(reward_processing_classes=tiny_tokenizer)
    for reward in (given, EnsembleReward([str(reward_adapter), count])):
        with pytest.raises(ValueError, match=rf"{name}\[1\]` is given, but that reward is a (Class|Ens).* of its own"):
            make_trainer(reward_funcs=[count, reward], reward_processing_classes=[None, tiny_tokenizer])
    with pytest.raises(ValueError, match=f"{name}` has 2 entries, and `reward_funcs` 1"):
        make_trainer(reward_processing_classes=[None, None])
    with pytest.raises(TypeError, match=rf"{name}\[0\]` must be a tokenizer or None, got str"):
        make_trainer(reward_processing_classes=["tokenizer"])


def test_options_of_loading_without_anything_to_load_are_refused(make_trainer, tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    four_bit = BitsAndBytesConfig(load_in_4bit=True)
    loaded = {"model": model, "peft_config": LORA}
    with pytest.raises(ValueError, match="`model_init_kwargs` is for loading a model, but `model` is loaded already"):
        make_trainer(**loaded, model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="`quantization_config` is for loading a model, but"):
        make_trainer(**loaded, quantization_config=four_bit)
    with pytest.raises(ValueError, match="`quantization_config` is given twice"):
        make_trainer(quantization_config=four_bit, model_init_kwargs={"quantization_config": four_bit})
