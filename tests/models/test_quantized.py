"""4-bit models that the user loaded: every door keeps bitsandbytes from repacking them, or refuses them."""

import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
)
from trl import SFTConfig, SFTTrainer

from rlhf_recipes.evaluation.callbacks import PolicyEvaluation
from rlhf_recipes.models import Roles, keep_4bit_differentiable, quantized, upcast_trainable
from rlhf_recipes.models.quantized import merges_exactly, unpacked
from rlhf_recipes.ppo.setup import build_rewards
from rlhf_recipes.reward_modeling import PreferenceConfig, PreferenceTrainer, score_sequences
from rlhf_recipes.rewards import ClassifierReward, TokenClassifierReward
from rlhf_recipes.tools.certificate import Scorer

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
PAIRS = [
    {"prompt": "the film was", "chosen": f" very {word}", "rejected": " bad"} for word in ("good", "warm", "great")
]


def layers(model):
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


@pytest.fixture(scope="module")
def load(tiny_model_path):
    """Load a model with transformers alone, as a user would; the flags are on, as with AVX512-BF16."""
    loaded = {}

    def make(auto_class, lora=False):
        if auto_class not in loaded:
            options = {} if auto_class is AutoModelForCausalLM else {"num_labels": 1}
            loaded[auto_class] = auto_class.from_pretrained(tiny_model_path, quantization_config=FOUR_BIT, **options)
        model = copy.deepcopy(loaded[auto_class])
        for layer in layers(model):
            layer.support_avx512bf16_for_cpu = True
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4)) if lora else model

    return make


def preference_trainer(model, tokenizer, folder):
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear")
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
    return PreferenceTrainer(
        model=model,
        args=PreferenceConfig(output_dir=str(folder), disable_tqdm=True, **options),
        train_dataset=Dataset.from_list(PAIRS),
        eval_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        peft_config=config,
    )


# Each takes the fixtures that it needs and returns the model that it was given.
def policy(load, make_trainer, **_):
    model = load(AutoModelForCausalLM)
    make_trainer(model=model, peft_config=LoraConfig(task_type="CAUSAL_LM", r=4))
    return model


def policy_with_adapter(load, make_trainer, **_):
    model = load(AutoModelForCausalLM, lora=True)
    make_trainer(model=model)
    return model


def reward_of_ppo(load, make_config, tiny_tokenizer, **_):
    reward, roles = load(AutoModelForSequenceClassification), Roles(load(AutoModelForCausalLM, lora=True))
    reward.config._name_or_path = "another/base"
    [model], _ = build_rewards(reward, roles, tiny_tokenizer, make_config(), [tiny_tokenizer])
    return model.model


def reward_stage(load, tiny_tokenizer, tmp_path, **_):
    model = load(AutoModelForSequenceClassification)
    preference_trainer(model, tiny_tokenizer, tmp_path)
    return model


def classifier_reward(load, tiny_tokenizer, **_):
    return ClassifierReward(load(AutoModelForSequenceClassification), tiny_tokenizer).model


def token_reward(load, tiny_tokenizer, **_):
    return TokenClassifierReward(load(AutoModelForTokenClassification), tiny_tokenizer, tiny_tokenizer).model


def certificate(load, tiny_tokenizer, **_):
    scorer = Scorer(load(AutoModelForSequenceClassification), tiny_tokenizer)
    scorer.score([scorer.encode("the film", " was good")])
    return scorer.model


def scoring(load, tiny_tokenizer, **_):
    model = load(AutoModelForSequenceClassification)
    score_sequences(model, [[4, 5], [6]])
    return model


def sampling_hook(load, tiny_tokenizer, tmp_path, prompts, **_):
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
    trainer = SFTTrainer(
        model=load(AutoModelForCausalLM),
        args=SFTConfig(output_dir=str(tmp_path), disable_tqdm=True, **options),
        train_dataset=Dataset.from_list([{"prompt": "the film", "completion": " was good"}]),
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4),
    )
    PolicyEvaluation(trainer, prompts)
    return trainer.model


DOORS = [
    policy,
    policy_with_adapter,
    reward_of_ppo,
    reward_stage,
    classifier_reward,
    token_reward,
    certificate,
    scoring,
    sampling_hook,
]


@pytest.fixture
def given(make_trainer, make_config, tiny_tokenizer, tmp_path, prompts):
    return {
        "make_trainer": make_trainer,
        "make_config": make_config,
        "tiny_tokenizer": tiny_tokenizer,
        "tmp_path": tmp_path,
        "prompts": prompts,
    }


@pytest.mark.parametrize("door", DOORS)
class TestDoors:
    def test_the_layers_stay_as_they_are(self, door, load, given):
        model = door(load=load, **given)
        assert len(layers(model)) >= 14
        assert not any(layer.support_avx512bf16_for_cpu for layer in layers(model))

    def test_a_repacked_layer_is_refused(self, door, load, given):
        def repacked(*args, **kwargs):
            model = load(*args, **kwargs)
            layers(model)[3].weight.quant_state.packing_format_for_cpu = True
            return model

        with pytest.raises(
            ValueError, match=r"layer '.*o_proj.*' was repacked by bitsandbytes.*before its first forward"
        ):
            door(load=repacked, **given)


def test_gradients_after_an_evaluation_are_those_before_it(load, tiny_tokenizer, tmp_path):
    model = load(AutoModelForSequenceClassification)
    trainer = preference_trainer(model, tiny_tokenizer, tmp_path)
    upcast_trainable(trainer.model)
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter.data)
    batch = next(iter(trainer.get_train_dataloader()))

    def gradients():
        trainer.model.train().zero_grad()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}

    before = gradients()
    trainer.evaluate()
    after = gradients()
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        assert_close(after[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_a_layer_that_bitsandbytes_has_repacked_is_recognised(load):
    model = load(AutoModelForCausalLM).eval()
    if not Linear4bit(64, 64).support_avx512bf16_for_cpu:
        pytest.skip("this processor has no AVX512-BF16, so that bitsandbytes repacks nothing")
    with torch.no_grad():
        model(torch.tensor([[4, 5]]))
    with pytest.raises(ValueError, match="was repacked by bitsandbytes"):
        keep_4bit_differentiable(model)


def test_what_an_adapter_can_be_merged_into(load):
    assert not merges_exactly(load(AutoModelForCausalLM))
    mixed = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).half())
    assert not merges_exactly(mixed)
    assert merges_exactly(mixed.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("free", [10**9, 10])
def test_unpacked_weights_give_the_same_numbers(tiny_model_path, monkeypatch, dtype, free):
    config = BitsAndBytesConfig(**{**FOUR_BIT.to_dict(), "bnb_4bit_compute_dtype": dtype})
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path, quantization_config=config, dtype=dtype)
    keep_4bit_differentiable(base)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    ids, packed = torch.arange(12).view(2, 6), layers(model)
    monkeypatch.setattr(quantized, "_free_memory", lambda device: free)
    with torch.no_grad():
        expected = model(ids).logits
        with unpacked(base):
            assert len(layers(model)) == (0 if free > 10 else len(packed))
            assert torch.equal(model(ids).logits, expected)

    @unpacked(base)
    def fail():
        raise KeyError

    with pytest.raises(KeyError):  # they come back after an error too
        fail()
    assert all(one is other for one, other in zip(layers(model), packed, strict=True))


def test_nothing_is_unpacked_of_a_model_in_whole_numbers():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with unpacked(model):
        assert type(model[0]) is torch.nn.Linear
