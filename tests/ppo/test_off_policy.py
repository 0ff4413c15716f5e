"""Whether a rollout's completions are the policy's own samples: from the logs, and against the plain model."""

import json
import logging

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GenerationConfig

from rlhf_recipes.models.generation import sample_with_transformers
from rlhf_recipes.ppo.off_policy import off_policy_metrics, sampled_moments, second_moments
from rlhf_recipes.ppo.rollout import texts_of
from tests.ppo.support import rollout, unpadded


def test_both_moments_are_those_of_the_plain_model(make_trainer, tiny_model_path):
    """Against log-probabilities in float64 of transformers alone, one row at a time, on tokens that nobody sampled."""
    trainer = make_trainer(model=tiny_model_path, critic_init="policy", reward_funcs=count, temperature=0.6)
    batch = rollout(trainer)
    batch["completion_ids"] = torch.randint(6, 30, batch["completion_ids"].shape)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path).double()
    gaps, squares, expected, logps, entropies = [], [], [], [], []
    for row in range(8):
        prompt, completion = unpadded(batch, row)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.6
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        own = log_p.gather(1, torch.tensor(completion)[:, None]).squeeze(1)
        logps.append(own)
        entropies.append(entropy)
        gaps.append(own + entropy)
        if row == 0:  # an eighth of the rows
            squares.append((own + entropy).square())
            expected.append((log_p.exp() * (log_p + entropy[:, None]).square()).sum(-1))
    padded = (torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).float() for rows in (logps, entropies))
    moments = sampled_moments(trainer, texts_of(batch))
    found = off_policy_metrics(sum(padded), batch["completion_mask"], moments)
    assert_close(found["ppo/off_policy_gap"].double(), torch.cat(gaps).mean(), atol=1e-5, rtol=1e-4)
    ratio = torch.cat(squares).sum() / torch.cat(expected).sum()
    assert_close(found["ppo/off_policy_spread"].double(), ratio, atol=1e-5, rtol=1e-3)


def count(completions, **kwargs):
    return [float(len(text)) for text in completions]


def test_they_are_logged_and_near_what_they_should_be(make_trainer):
    trainer = make_trainer(
        per_device_train_batch_size=64, num_generations=8, max_steps=1, num_iterations=1, max_completion_length=16
    )
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "ppo/off_policy_gap" in entry)
    assert entry["ppo/off_policy_gap"] == pytest.approx(0.0, abs=0.15)  # about 1,000 tokens
    assert entry["ppo/off_policy_spread"] == pytest.approx(1.0, abs=0.5)


@pytest.mark.parametrize(("name", "value"), [("min_p", 0.25), ("typical_p", 0.2), ("top_k", 3)])
def test_one_of_the_two_sees_what_a_setting_would_do(tiny_model_path, name, value):
    """What transformers draws with such a setting is not what the moments of the model itself say."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    model.lm_head.weight.data *= 4
    ids = torch.full((2000, 1), 9)
    config = GenerationConfig(do_sample=True, max_new_tokens=1, pad_token_id=0, **({"top_k": 0} | {name: value}))
    shaped = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)[:, 1]
    plain = GenerationConfig(do_sample=True, max_new_tokens=1, pad_token_id=0, top_k=0)
    own = sample_with_transformers(model, plain, 1.0, input_ids=ids, attention_mask=torch.ones_like(ids))[:, 1]
    with torch.no_grad():
        logits = model(input_ids=ids[:1]).logits[0]
    log_p = logits.log_softmax(-1)[0]
    gap = [(log_p[tokens] - (log_p.exp() * log_p).sum()).mean().item() for tokens in (shaped, own)]
    sums = [second_moments(logits.expand(2000, -1), tokens, 1.0) for tokens in (shaped, own)]
    spread = [(seen / expected).item() for seen, expected in sums]
    assert gap[1] == pytest.approx(0.0, abs=0.1)
    assert spread[1] == pytest.approx(1.0, abs=0.2)
    assert abs(gap[0]) > 0.3 or abs(spread[0] - 1.0) > 0.5


def test_a_certain_policy_has_no_spread_to_compare():
    logits = torch.tensor([[0.0, -1e4, float("-inf")]])
    assert second_moments(logits, torch.tensor([0]), 1.0).tolist() == [0.0, 0.0]


def test_settings_of_the_models_files_are_named_in_one_line(make_trainer, tiny_model_path, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    settings = {"min_p": 0.25, "suppress_tokens": list(range(400)), "top_p": 1.0}
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=1, pad_token_id=0, **settings)
    with caplog.at_level(logging.WARNING, "rlhf_recipes"):
        make_trainer(model=model, critic_init="policy", reward_funcs=count)
        lines = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert len(lines) == 1
    assert "min_p=0.25, suppress_tokens=[0, 1, 2" in lines[0]
    assert "top_p" not in lines[0]
    assert len(lines[0]) < 400
    assert json.loads(model.generation_config.to_json_string())["min_p"] == 0.25
