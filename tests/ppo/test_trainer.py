"""The PPO step against a step computed by hand, with models loaded one by one and loops in float64."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from rlhf_recipes.models import load_causal_lm, load_policy
from rlhf_recipes.models.roles import CRITIC, POLICY, REFERENCE
from rlhf_recipes.ppo.functional import whiten
from tests.ppo.support import rollout, rollout_and_record, slow_but, unpadded

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def logps_by_hand(model, prompt, completion, temperature):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double() / temperature
    logps = logits.log_softmax(-1)
    return [logps[len(prompt) + t - 1, token] for t, token in enumerate(completion)], logps


def gae_by_hand(rewards, values, gamma, lam):
    """Equation 16 of the GAE paper as the double sum it is."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * v1 - v0 for r, v1, v0 in zip(rewards, after, values, strict=True)]
    advantages = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


@pytest.fixture
def classifier(tiny_model_path, reward_adapter):
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    return PeftModel.from_pretrained(base, reward_adapter).eval()


@pytest.mark.parametrize("placement", ["terminal", "uniform"])
def test_the_rollout_equals_one_computed_by_hand(make_trainer, tiny_model_path, sft_adapter, classifier, placement):
    trainer = make_trainer(
        reward_placement=placement,
        kl_coef=0.3,
        gamma=0.9,
        gae_lambda=0.8,
        temperature=0.7,
        whiten_advantages=False,
        max_completion_length=24,
    )
    with torch.no_grad():  # move the policy off its reference, so that there is a KL to see
        for name, parameter in trainer.model.named_parameters():
            if ".default." in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    trainer.state.global_step = 1
    ends = list(range(1, 12))  # many end tokens, for completions of many lengths
    trainer.eos_token_ids = trainer.generation_config.eos_token_id = trainer.generation_kwargs["eos_token_id"] = ends
    batch = rollout(trainer)

    reference = load_policy(load_causal_lm(str(tiny_model_path)), sft_adapter)
    score_head = classifier.get_base_model().score
    lengths = set()
    for row in range(8):
        prompt, completion = unpadded(batch, row)
        ids = torch.tensor([prompt + completion])
        length = len(completion)
        lengths.add(length)
        with torch.no_grad():
            score = classifier(input_ids=ids).logits.item()
            hidden = classifier.get_base_model().model(input_ids=ids).last_hidden_state[0]
            values = score_head(hidden).flatten()[len(prompt) - 1 : -1].tolist()
            ref_logps, _ = logps_by_hand(reference, prompt, completion, 0.7)
            logps, _ = logps_by_hand(trainer.model, prompt, completion, 0.7)
        assert_close(batch["old_per_token_logps"][row, :length].double(), torch.stack(logps), atol=1e-5, rtol=1e-4)
        rewards = [-0.3 * (logp - ref).item() for logp, ref in zip(logps, ref_logps, strict=True)]
        for t in range(length):
            rewards[t] += score / length if placement == "uniform" else score * (t == length - 1)
        advantages, returns = gae_by_hand(rewards, values, 0.9, 0.8)
        assert_close(batch["old_values"][row, :length], torch.tensor(values), atol=1e-5, rtol=1e-4)
        assert_close(batch["advantages"][row, :length], torch.tensor(advantages), atol=1e-4, rtol=1e-3)
        assert_close(batch["returns"][row, :length], torch.tensor(returns), atol=1e-4, rtol=1e-3)
        assert not batch["advantages"][row, length:].any()
    assert len(lengths) > 2, "the test needs ragged lengths"


def test_the_loss_and_its_gradient_equal_ones_computed_by_hand(
    make_trainer, tiny_model_path, sft_adapter, classifier, reward_adapter
):
    trainer = make_trainer(vf_coef=0.5, entropy_coef=0.02, gradient_accumulation_steps=1)
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.global_step, trainer._step = 1, 1
    batch = rollout(trainer, rows=4)
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + 0.3 * torch.randn(batch["advantages"].shape)
    batch["old_values"] = batch["old_values"] + 0.3 * torch.randn(batch["advantages"].shape)
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()

    policy = load_policy(load_causal_lm(str(tiny_model_path)), sft_adapter).train()
    critic = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1),
        reward_adapter,
        is_trainable=True,
    )
    terms = []
    for row in range(4):
        prompt, completion = unpadded(batch, row)
        logps, distribution = logps_by_hand(policy, prompt, completion, 1.0)
        hidden = critic.get_base_model().model(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
        values = critic.get_base_model().score(hidden).flatten()[len(prompt) - 1 : -1]
        for t, (logp, value) in enumerate(zip(logps, values, strict=True)):
            advantage, old_value = batch["advantages"][row, t], batch["old_values"][row, t]
            ratio = (logp - batch["old_per_token_logps"][row, t]).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            clipped = old_value + (value - old_value).clamp(-0.2, 0.2)
            target = batch["returns"][row, t]
            value_error = torch.maximum((value - target) ** 2, (clipped - target) ** 2)
            p = distribution[len(prompt) + t - 1]
            terms.append(-surrogate + 0.5 * 0.5 * value_error + 0.02 * (p.exp() * p).sum())
    expected = torch.stack(terms).mean()
    expected.backward()
    assert_close(loss.double(), expected.double(), atol=1e-5, rtol=1e-4)
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            assert_close(gradients.pop(name), parameter.grad, atol=1e-6, rtol=1e-3)
    for name, parameter in critic.named_parameters():
        if "lora_" in name:
            assert_close(gradients.pop(name.replace(".default.", ".critic.")), parameter.grad, atol=1e-6, rtol=1e-3)
    head = critic.get_base_model().score.modules_to_save["default"].weight.grad
    assert_close(gradients.pop("heads.critic.weight"), head, atol=1e-6, rtol=1e-3)
    assert not gradients


def test_micro_batches_add_up_to_the_whole_batch(make_trainer):
    """Gradients of 4 micro-batches of 2 equal those of one of 8, although completions differ in length."""
    found = []
    for size, steps in ((8, 1), (2, 4)):
        trainer = make_trainer(per_device_train_batch_size=size, gradient_accumulation_steps=steps, num_iterations=1)
        trainer.current_gradient_accumulation_steps, trainer.state.global_step = steps, 1
        if not found:
            whole = rollout(trainer)
        for start in range(0, 8, size):
            part = {k: v if v.dim() == 0 else v[start : start + size] for k, v in whole.items()}
            trainer._compute_loss(trainer.model, part).backward()
        found.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("critic", ["adapter", "head"])
@pytest.mark.parametrize("quantization", [None, FOUR_BIT], ids=["float32", "4-bit"])
def test_before_the_first_update_kl_is_0_and_every_ratio_1(make_trainer, critic, quantization):
    trainer = make_trainer(quantization_config=quantization, critic=critic, max_steps=1, num_iterations=1)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["kl"] == 0.0
    assert first["ppo/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert first["ppo/clip_fraction"] == 0.0
    assert first["ppo/approx_kl"] == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize(
    ("critic", "checkpointing"),
    [
        ("adapter", True),
        ("head", False),
        pytest.param("adapter", False, marks=pytest.mark.slow),
        pytest.param("head", True, marks=pytest.mark.slow),
    ],
)
def test_training_moves_policy_and_critic_and_nothing_else(make_trainer, critic, checkpointing):
    trainer = make_trainer(
        quantization_config=FOUR_BIT,
        critic=critic,
        gradient_checkpointing=checkpointing,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(f".{POLICY}." in name or f".{CRITIC}." in name for name in moved)
    assert any(f".{POLICY}." in name for name in moved)
    assert "heads.critic.weight" in moved
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_a_fresh_adapter_has_the_bare_base_as_reference(make_trainer, tiny_model_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    trainer = make_trainer(model=str(tiny_model_path), peft_config=config, max_steps=2)
    assert trainer.reference is None
    assert REFERENCE not in trainer.model.peft_config
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == 0.0


def test_a_policy_that_differs_from_its_reference_is_refused(make_trainer):
    trainer = make_trainer()
    for name, parameter in trainer.model.named_parameters():
        if ".default.weight" in name:
            parameter.data += 0.05
    with pytest.raises(RuntimeError, match="policy must equal its reference, but the log-probabilities differ"):
        trainer.train()


def test_ratios_that_differ_from_1_in_the_first_pass_are_refused(make_trainer):
    trainer = make_trainer()
    batch = rollout(trainer)
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + 0.01
    with pytest.raises(RuntimeError, match=r"every ratio .* must be 1, but the log-probabilities differ by 0.01 nats"):
        trainer._compute_loss(trainer.model, batch)


def test_dropout_is_refused(make_trainer, tiny_model_path):
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False
    )
    trainer = make_trainer(
        model=str(tiny_model_path), peft_config=config, disable_dropout=False, kl_coef=0.0, critic_init="policy"
    )
    with pytest.raises(RuntimeError, match="must equal its reference"):
        trainer.train()


def test_functions_and_adapters_are_mixed_with_weights(make_trainer, reward_adapter, classifier):
    def count(completions, prompt_ids, completion_ids, **kwargs):
        assert [len(ids) > 0 for ids in prompt_ids] == [True] * len(completions)
        return [float(len(ids)) for ids in completion_ids]

    trainer = make_trainer(reward_funcs=[str(reward_adapter), count], reward_weights=[2.0, 0.5])
    assert trainer.reward_func_names == ["reward", "count"]
    batch, record = rollout_and_record(trainer)
    for row in range(8):
        prompt, completion = unpadded(batch, row)
        with torch.no_grad():
            score = classifier(input_ids=torch.tensor([prompt + completion])).logits.item()
        assert record.scores[row].item() == pytest.approx(2 * score + 0.5 * len(completion), abs=1e-4)


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (lambda prompts, **kwargs: [1.0] * (len(prompts) - 1), ValueError, "must return a list of 8 rewards"),
        (lambda prompts, **kwargs: [float("nan")] * len(prompts), ValueError, "returned nan for completion 0"),
        (lambda prompts, **kwargs: [None] * len(prompts), ValueError, "returned None for completion 0 and 7 more"),
        (lambda prompts, **kwargs: 1 / 0, RuntimeError, "raised ZeroDivisionError"),
        (lambda prompts, **kwargs: ["good"] * len(prompts), TypeError, "returned 'good' for completion 0"),
    ],
)
def test_bad_rewards_are_errors(make_trainer, reward, error, message):
    trainer = make_trainer(reward_funcs=reward, critic_init="policy")
    with pytest.raises(error, match=message):
        trainer.train()


def test_bad_arguments_are_errors(make_trainer, tiny_model_path, reward_adapter, prompts):
    with pytest.raises(ValueError, match="quantized model cannot be trained as a whole. Give `peft_config`"):
        make_trainer(model=str(tiny_model_path), quantization_config=FOUR_BIT)
    with pytest.raises(ValueError, match="already has an adapter"):
        make_trainer(peft_config=LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="no reward adapter is among"):
        make_trainer(reward_funcs=lambda prompts, **kwargs: [0.0] * len(prompts), critic_init="reward")
    with pytest.raises(ValueError, match="one weight each, got 1 and 2"):
        make_trainer(reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="second copy of the policy's base"):
        make_trainer(reward_funcs=[str(reward_adapter), str(tiny_model_path)])
    with pytest.raises(ValueError, match="needs a column 'prompt'; it has \\['text'\\]"):
        make_trainer(dataset=prompts.rename_column("prompt", "text"))
    with pytest.raises(ValueError, match="300"):
        make_trainer(dataset=Dataset.from_list([{"prompt": "the film " * 150}] * 8))
    with pytest.raises(ValueError, match="rollout takes 8 different prompts, but the dataset has 7"):
        make_trainer(dataset=prompts.select(range(7)))


def test_peft_alone_loads_what_is_saved(make_trainer, tiny_model_path, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    policy = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    critic = PeftModel.from_pretrained(base, tmp_path / "saved" / "critic")
    ids = torch.tensor([[6, 7, 8, 9]])
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token == "<pad>"
    with torch.no_grad():
        assert_close(policy(input_ids=ids).logits, trainer.model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
        score = trainer.roles.scores(CRITIC, ids.tolist(), pad_token_id=0, batch_size=1)
        assert_close(critic(input_ids=ids).logits[0], score, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("critic", slow_but(["adapter", "head"], "adapter"))
def test_a_resumed_run_equals_one_that_never_stopped(make_trainer, critic, tmp_path):
    fields = {"critic": critic, "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "run")}
    whole = make_trainer(**fields)
    whole.train()
    resumed = make_trainer(**fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5)


def fraction_of_good(completions, **kwargs):
    return [text.split().count("good") / max(1, len(text.split())) for text in completions]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.slow
def test_it_learns_a_known_reward_and_not_a_shuffled_one(make_trainer, shuffled):
    generator = torch.Generator().manual_seed(0)

    def reward(completions, **kwargs):
        rewards = torch.tensor(fraction_of_good(completions)) * 10
        return rewards[torch.randperm(len(rewards), generator=generator)] if shuffled else rewards

    trainer = make_trainer(
        reward_funcs=reward,
        critic_init="policy",
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        max_steps=60,
        learning_rate=5e-3,
        kl_coef=0.02,
        whiten_advantages=True,
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert (last - first > 1.0) != shuffled, (first, last)


def test_more_than_one_completion_per_prompt(make_trainer):
    trainer = make_trainer(num_generations=4, max_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["reward"] is not None


def test_whitened_advantages_have_mean_0_and_variance_1(make_trainer):
    trainer = make_trainer()
    batch = rollout(trainer)
    counted = batch["advantages"][batch["completion_mask"].bool()]
    assert counted.mean().abs() < 1e-5
    assert counted.var(correction=0) == pytest.approx(1.0, abs=1e-3)
    assert_close(whiten(batch["advantages"], batch["completion_mask"]), batch["advantages"], atol=1e-4, rtol=1e-3)


def test_unbiased_whitening_reaches_advantages_and_rewards(make_trainer):
    """Smaller by sqrt(1 - 1 / n) over the n tokens of the rollout, all of them alike."""
    plain, unbiased = (rollout(make_trainer(whiten_unbiased=choice)) for choice in (False, True))
    tokens = plain["completion_mask"].sum()
    assert_close(unbiased["advantages"], plain["advantages"] * (1 - 1 / tokens).sqrt(), rtol=1e-5, atol=1e-6)
    fields = {"whiten_rewards": True, "whiten_advantages": False, "gae_lambda": 1.0}
    spreads = []
    for choice in (False, True):
        batch = rollout(make_trainer(whiten_unbiased=choice, **fields))
        after = torch.nn.functional.pad(batch["returns"][:, 1:], (0, 1))
        rewards = (batch["returns"] - after)[batch["completion_mask"].bool()]  # gamma and lambda are 1
        spreads.append(rewards.std(correction=int(choice)).item())
    assert spreads == pytest.approx([1.0, 1.0], abs=1e-4)


def test_the_rollout_carries_no_gradients(make_trainer):
    batch = rollout(make_trainer())
    assert not any(value.requires_grad for value in batch.values() if isinstance(value, torch.Tensor))
