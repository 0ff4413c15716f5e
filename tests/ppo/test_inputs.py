"""Things of a kind that the trainer cannot use are refused by name, before anything is loaded."""

import pytest
import torch
from datasets import DatasetDict
from peft import AdaLoraConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl import GRPOConfig

from rlhf_recipes import PPOTrainer

CAUSAL = {"task_type": "CAUSAL_LM"}


class TorchRows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"prompt": "the film"}


def given(**arguments):
    defaults = {"model": "no/such/model", "reward_funcs": len, "train_dataset": TorchRows()}
    return PPOTrainer(**(defaults | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"train_dataset": None}, ValueError, "`train_dataset` is missing"),
        ({}, TypeError, "`train_dataset` must be a `datasets.Dataset`.* got TorchRows. .*from_list"),
        ({"train_dataset": [{"prompt": "the"}]}, TypeError, "`train_dataset` must be .* got list"),
        ({"train_dataset": "rows.jsonl"}, TypeError, "`train_dataset` must be .* got str"),
        ({"train_dataset": DatasetDict()}, TypeError, "`train_dataset` is a DatasetDict. Give one of its splits"),
        ({"train_dataset": {"prompt": ["the"]}}, TypeError, r"`train_dataset` is a dict.*\['prompt'\]"),
    ],
    ids=["none", "torch", "list", "path", "splits", "columns"],
)
def test_training_data_of_another_kind(arguments, error, message):
    with pytest.raises(error, match=message):
        given(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"args": GRPOConfig("x", use_cpu=True, bf16=False)}, "`args` must be a `PPOConfig`, got GRPOConfig"),
        ({"args": {"learning_rate": 1e-5}}, "`args` must be a `PPOConfig`, got dict"),
        ({"eval_dataset": [{"prompt": "the"}]}, "`eval_dataset` must be .* got list"),
        ({"eval_dataset": {"early": TorchRows()}}, r"`eval_dataset\['early'\]` must be .* got TorchRows"),
        ({"processing_class": "tokenizer"}, "`processing_class` must be a tokenizer .*got str"),
        ({"peft_config": {"r": 8}}, "`peft_config` must be a `peft.LoraConfig`, got dict"),
        ({"peft_config": PromptTuningConfig(num_virtual_tokens=4, **CAUSAL)}, "`peft_config` is a PromptTuningConfig"),
        ({"peft_config": PrefixTuningConfig(num_virtual_tokens=4, **CAUSAL)}, "`peft_config` is a PrefixTuningConfig"),
        ({"peft_config": IA3Config(**CAUSAL)}, "`peft_config` is a IA3Config.*give a `peft.LoraConfig`"),
        ({"peft_config": AdaLoraConfig(total_step=9, **CAUSAL)}, "`peft_config` is a AdaLoraConfig"),
        ({"reward_funcs": [len, 0.5]}, r"`reward_funcs\[1\]` is a float. Give a function"),
        ({"reward_funcs": None}, r"`reward_funcs\[0\]` is a NoneType"),
        ({"reward_funcs": torch.nn.Linear}, r"`reward_funcs\[0\]` is .*A class must be instantiated"),
        ({"reward_funcs": torch.nn.Linear(2, 1)}, r"`reward_funcs\[0\]` is Linear.*one of transformers'"),
        ({"model": None}, "`model` must be a path, .*got NoneType"),
        ({"callbacks": ["x"]}, r"`callbacks\[0\]` must be a `TrainerCallback`, got str"),
        ({"callbacks": TrainerCallback()}, r"`callbacks` must be a list of callbacks, got TrainerCallback"),
        ({"eval_dataset": {1: TorchRows()}}, "The names of `eval_dataset` must be text, got 1 .int."),
    ],
)
def test_arguments_of_another_kind(prompts, tiny_model_path, make_config, arguments, message):
    defaults = {"train_dataset": prompts, "model": tiny_model_path, "args": make_config()}
    with pytest.raises(TypeError, match=message):
        given(**(defaults | arguments))


def test_an_adapter_for_something_else_than_a_policy(prompts, tiny_model_path):
    with pytest.raises(ValueError, match="`peft_config` has the task type SEQ_CLS.*set `task_type='CAUSAL_LM'`"):
        given(train_dataset=prompts, model=tiny_model_path, peft_config=LoraConfig(task_type="SEQ_CLS"))


def test_a_policy_with_another_adapter_than_lora(prompts, tiny_model_path, make_config):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_path), IA3Config(**CAUSAL))
    with pytest.raises(TypeError, match="The adapter 'default' of `model` is a IA3Config"):
        given(train_dataset=prompts, model=model, args=make_config())


def test_a_classifier_is_no_policy(make_trainer, tiny_model_path, reward_adapter, tmp_path):
    """It would be trained with an output head that starts at random, or without the head that it has."""
    peft_config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    classifier.save_pretrained(tmp_path / "untied")
    with pytest.raises(ValueError, match="is no trained language model: its files lack 1 .*'lm_head.weight'.*`model`"):
        make_trainer(model=str(tmp_path / "untied"), peft_config=peft_config)
    with pytest.raises(ValueError, match="`model` is a LlamaForSequenceClassification, which has no output head"):
        make_trainer(model=classifier, peft_config=peft_config)
    with pytest.raises(ValueError, match="is a reward model's or a critic's .task type SEQ_CLS.*`model`"):
        make_trainer(model=str(reward_adapter))
    classifier.config.tie_word_embeddings = True
    classifier.save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match="its files hold 'score.weight', and are those of a classifier"):
        make_trainer(model=str(tmp_path / "tied"), peft_config=peft_config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"placement": "terminal"}, "`placement` must be a function, got 'terminal'"),
        ({"score_transforms": [3]}, r"`score_transforms\[0\]` is 3. Give a callable"),
    ],
)
def test_what_is_no_function(make_trainer, arguments, message):
    with pytest.raises(TypeError, match=message):
        make_trainer(**arguments)


def test_rewards_of_one_name_are_told_apart(make_trainer):
    rewards = [lambda completions, **kwargs: [1.0] * len(completions) for _ in range(2)]
    assert make_trainer(reward_funcs=rewards).reward_func_names == ["<lambda>", "<lambda>_1"]
