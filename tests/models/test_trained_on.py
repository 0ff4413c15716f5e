"""Adapters on a base of another precision than in training: the difference is measured, told, and refused if large."""

import json
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from trl import SFTConfig

from rlhf_recipes.models import load_causal_lm, load_policy, load_reward_model, load_sequence_classifier
from rlhf_recipes.models.roles import Roles
from rlhf_recipes.models.trained_on import FILE, describe_base, log_probs, raw_score, save_trained_on
from rlhf_recipes.reward_modeling import PreferenceConfig, PreferenceTrainer
from rlhf_recipes.supervised import CompletionTrainer

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
ROWS = [[6, 7, 9, 20, 11, 8, 1], [12, 9, 6, 25, 1], [6, 30, 7, 1]]


def trained(base, folder, task, scale, quantization=NF4):
    """An adapter that was trained on a 4-bit base: random weights, and the record of a stage."""
    load = load_causal_lm if task == "CAUSAL_LM" else load_sequence_classifier
    torch.manual_seed(2)
    model = get_peft_model(
        load(base, quantization_config=quantization), LoraConfig(task_type=task, target_modules="all-linear", r=4)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() + torch.randn(parameter.shape) * scale
    model.save_pretrained(folder)
    numbers_of = log_probs if task == "CAUSAL_LM" else raw_score
    save_trained_on(folder, model, ROWS, numbers_of)
    with torch.no_grad():
        return model.eval(), [number for row in ROWS for number in numbers_of(model, row)]


def said(caplog, action):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "rlhf_recipes"):
        action()
    return [record.getMessage() for record in caplog.records if "was trained on a base" in record.getMessage()]


def test_a_policy_on_another_base_is_measured_in_nats(tiny_model_path, tmp_path, caplog):
    _, before = trained(tiny_model_path, tmp_path, "CAUSAL_LM", 0.02)
    [line] = said(caplog, lambda: load_policy(load_causal_lm(tiny_model_path), tmp_path, tolerance=10.0))
    model = load_policy(load_causal_lm(tiny_model_path), tmp_path, tolerance=10.0).eval()
    now = [number for row in ROWS for number in log_probs(model, row)]
    expected = sum(abs(a - b) for a, b in zip(now, before, strict=True)) / len(now)
    assert expected > 1e-3
    assert f"differs by {expected:.2g} nats per token" in line
    assert "a base in 4 bits (nf4, double quantization), computed in float32" in line
    with pytest.raises(ValueError, match=rf"differs by {expected:.2g} nats per token \(allowed: .*adapter_tolerance"):
        load_policy(load_causal_lm(tiny_model_path), tmp_path, tolerance=0.9 * expected)


def test_nothing_is_said_on_the_base_of_the_training_or_without_a_record(tiny_model_path, tmp_path, caplog):
    trained(tiny_model_path, tmp_path, "CAUSAL_LM", 0.02)
    same = load_causal_lm(tiny_model_path, quantization_config=NF4)
    assert said(caplog, lambda: load_policy(same, tmp_path, tolerance=1e-9)) == []
    (tmp_path / FILE).unlink()
    assert said(caplog, lambda: load_policy(load_causal_lm(tiny_model_path), tmp_path, tolerance=1e-9)) == []


@pytest.mark.parametrize("door", ["role", "whole"])
def test_a_reward_on_another_base_is_measured_by_its_spread(tiny_model_path, sft_adapter, tmp_path, caplog, door):
    _, before = trained(tiny_model_path, tmp_path / "reward", "SEQ_CLS", 0.1)

    def load(tolerance):
        if door == "whole":
            model, _ = load_reward_model(tmp_path / "reward", tolerance)
            return [number for row in ROWS for number in raw_score(model.eval(), row)]
        roles = Roles(load_policy(load_causal_lm(tiny_model_path), sft_adapter))
        roles.add_scalar_role("reward", tmp_path / "reward", tolerance)
        return roles.scores("reward", ROWS, 0, 1).tolist()

    now = load(100.0)
    [line] = said(caplog, lambda: load(100.0))
    spread = torch.tensor(before).std().item()
    expected = sum(abs(a - b) for a, b in zip(now, before, strict=True)) / len(now) / spread
    assert f"differs by {expected:.2g} of the spread of the scores" in line
    with pytest.raises(ValueError, match="so it is another model"):
        load(0.9 * expected)


def test_ppo_takes_the_bound_from_its_configuration(make_trainer, tiny_model_path, tmp_path):
    trained(tiny_model_path, tmp_path, "CAUSAL_LM", 0.02)
    with pytest.raises(ValueError, match="`adapter_tolerance` raises the bound"):
        make_trainer(model=str(tmp_path), adapter_tolerance=1e-6)
    make_trainer(model=str(tmp_path), adapter_tolerance=10.0)


def test_a_damaged_record_is_named(tiny_model_path, tmp_path):
    trained(tiny_model_path, tmp_path, "CAUSAL_LM", 0.02)
    (tmp_path / FILE).write_text('{"base": "float32"}')
    with pytest.raises(ValueError, match=rf"{FILE} is damaged"):
        load_policy(load_causal_lm(tiny_model_path), tmp_path)


def test_bases_in_words(tiny_model_path):
    assert describe_base(load_causal_lm(tiny_model_path)) == "float32"
    assert describe_base(load_causal_lm(tiny_model_path, dtype="bfloat16")) == "bfloat16"
    eight = BitsAndBytesConfig(load_in_8bit=True)
    assert describe_base(load_causal_lm(tiny_model_path, quantization_config=eight)).startswith("8 bits")


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_every_stage_leaves_a_record(make_trainer, tiny_model_path, tiny_tokenizer, tiny_texts, tmp_path, stage):
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "disable_tqdm": True}
    folder, numbers_of = str(tmp_path / "out"), log_probs
    lora = {"target_modules": "all-linear", "r": 4}
    if stage == "sft":
        trainer = CompletionTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_path),
            args=SFTConfig(folder, **options),
            train_dataset=Dataset.from_dict({"text": tiny_texts}),
            processing_class=tiny_tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
        )
    elif stage == "reward":
        numbers_of = raw_score
        rows = [{"prompt": "the film ", "chosen": text, "rejected": "bad"} for text in tiny_texts]
        trainer = PreferenceTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1),
            args=PreferenceConfig(folder, **options),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer,
            peft_config=LoraConfig(task_type="SEQ_CLS", **lora),
        )
    else:
        trainer = make_trainer(max_steps=1, num_iterations=1)
    trainer.train()
    trainer.save_model(folder)
    record = json.loads((tmp_path / "out" / FILE).read_text())
    assert record["base"] == "float32"
    assert len(record["rows"]) == 8
    model = trainer.model.eval()
    for row, numbers in zip(record["rows"], record["numbers"], strict=True):
        assert numbers == pytest.approx(numbers_of(model, row), abs=1e-5)
