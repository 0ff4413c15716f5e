"""The loss, term by term, against models that are loaded one by one; its gradient in expectation; its signs."""

import math
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from rlhf_recipes.models import load_causal_lm, load_policy
from rlhf_recipes.models.roles import is_critic_parameter
from rlhf_recipes.ppo.objective import critic_loss, kl_per_token, policy_loss
from rlhf_recipes.ppo.passes import PolicyPass, policy_pass
from rlhf_recipes.ppo.rollout import texts_of
from tests.ppo.support import answer, rollout, trained, unpadded, without_chance

ONE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "critic_learning_rate": 1e-3}


def one_batch(trainer):
    trainer.current_gradient_accumulation_steps, trainer.state.global_step, trainer._step = 1, 1, 1
    return rollout(without_chance(trainer))


def disturb(*models, seed, size=0.05):
    """Add the same noise to the policy's adapter in several models."""
    generator = torch.Generator().manual_seed(seed)
    named = [dict(model.named_parameters()) for model in models]
    with torch.no_grad():
        for name in sorted(name for name in named[0] if "lora_B.default" in name):
            noise = size * torch.randn(named[0][name].shape, generator=generator)
            for parameters in named:
                parameters[name].add_(noise)


def logps_of(model, prompt, completion, temperature=1.0):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double() / temperature
    return logits.log_softmax(-1)[len(prompt) - 1 : -1]


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def kl_by_hand(estimator, anchor, new, old, ref, token):
    """KL at one token from log-distributions of the new policy, the old one and the reference."""
    log_new, log_old, log_ref = new[token], old[token].item(), ref[token].item()
    ratio = (log_new - log_old).exp()
    if anchor == "old":
        return {
            "k1": log_old - log_new,
            "k2": (log_old - log_new) ** 2 / 2,
            "k3": ratio - 1 - (log_new - log_old),
            "full": (old.exp() * (old - new)).sum(),
        }[estimator]
    return {
        "k1": ratio * (log_new - log_ref),
        "k2": (log_new - log_ref) ** 2 / 2,
        "k3": ratio * ((log_ref - log_new).exp() - 1 - (log_ref - log_new)),
        "full": (new.exp() * (new - ref)).sum(),
    }[estimator]


@pytest.mark.parametrize("anchor", ["reference", "old"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
def test_kl_in_the_loss_and_its_gradient(make_trainer, tiny_model_path, sft_adapter, estimator, anchor):
    """With a temperature, and three policies: the reference, one that sampled, and one that moved on since."""
    fields = {"kl_placement": "loss", "kl_estimator": estimator, "kl_anchor": anchor, "kl_coef": 0.7}
    trainer = make_trainer(**ONE, **fields, temperature=0.8, vf_coef=0.0)
    ref, old, new = (load_policy(load_causal_lm(tiny_model_path), sft_adapter) for _ in range(3))
    disturb(trainer.model, old, new, seed=1)
    batch = one_batch(trainer)
    disturb(trainer.model, new, seed=2)
    batch["advantages"].zero_()
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()

    terms = []
    for row in range(8):
        prompt, completion = unpadded(batch, row)
        with torch.no_grad():
            old_logps, ref_logps = (logps_of(model, prompt, completion, 0.8) for model in (old, ref))
        new_logps = logps_of(new, prompt, completion, 0.8)
        for t, token in enumerate(completion):
            terms.append(kl_by_hand(estimator, anchor, new_logps[t], old_logps[t], ref_logps[t], token))
    expected = 0.7 * torch.stack(terms).mean()
    expected.backward()
    assert abs(expected.item()) > 1e-3
    assert_close(loss.double(), expected, atol=1e-5, rtol=1e-4)
    found = gradients_of(trainer.model)
    for name, gradient in gradients_of(new).items():
        assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def expected_kl(estimator, anchor, new, old, ref):
    """Mean of the KL of one-token completions over all tokens, each as often as the old policy samples it."""
    tokens = len(new)
    batch = {
        "completion_mask": torch.ones(tokens, 1),
        "old_per_token_logps": old[:, None],
        "ref_per_token_logps": ref[:, None],
    }
    args = type("Args", (), {"kl_anchor": anchor, "kl_estimator": estimator})
    per_token = kl_per_token(new[:, None], SimpleNamespace(**batch), args)
    return (old.exp() * per_token[:, 0]).sum()


@pytest.mark.parametrize("anchor", ["reference", "old"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimates_have_the_gradient_of_the_kl_in_expectation(estimator, anchor):
    """By enumeration of a vocabulary of five. k2 is biased, but its gradient is the KL's while nothing has moved."""
    generator = torch.Generator().manual_seed(3)
    new, old, ref = (torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(3))
    if estimator == "k2":
        old = new.clone()
    logits = new.clone().requires_grad_()
    estimate = expected_kl(estimator, anchor, logits.log_softmax(0), old, ref)
    (found,) = torch.autograd.grad(estimate, logits)
    exact_logits = new.clone().requires_grad_()
    logps = exact_logits.log_softmax(0)
    exact = (logps.exp() * (logps - ref)).sum() if anchor == "reference" else (old.exp() * (old - logps)).sum()
    (expected,) = torch.autograd.grad(exact, exact_logits)
    assert expected.abs().max() > 0.1 or (estimator, anchor) == ("k2", "old")
    assert_close(found, expected, atol=1e-12, rtol=1e-10)
    if estimator != "k2":
        assert_close(estimate, exact, atol=1e-12, rtol=1e-10)


def numbers_of_a_batch(mask, args):
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(8)]
    logps, old, ref, advantages, values, old_values, returns, entropies = tensors
    batch = {
        "completion_mask": mask,
        "value_mask": mask,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "advantages": advantages,
        "old_values": old_values,
        "returns": returns,
    }
    return PolicyPass(0.2 * logps + old, entropies), values, batch


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed"])
def test_the_total_is_the_sum_of_its_four_terms(make_config, aggregation):
    """C09: `-(L_CLIP - c1 L_VF - beta L_KL + c2 H)` with loops, for each way to average; all padding is skipped."""
    args = make_config(loss_aggregation=aggregation, kl_placement="loss", kl_estimator="k3", vf_coef=0.4, delta=2.0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    new, values, batch = numbers_of_a_batch(mask, args)
    terms = policy_loss(new, SimpleNamespace(**batch), args, kl_coef=0.3, entropy_coef=0.05)[0]
    loss = terms + critic_loss(values, SimpleNamespace(**batch), args)[0]
    sums = [[], [], []]
    for row, length in enumerate((3, 1, 4)):
        for t in range(length):
            log_new, log_old = new.logps[row, t].item(), batch["old_per_token_logps"][row, t].item()
            log_ref, advantage = batch["ref_per_token_logps"][row, t].item(), batch["advantages"][row, t].item()
            value, old_value = values[row, t].item(), batch["old_values"][row, t].item()
            target, ratio = batch["returns"][row, t].item(), math.exp(log_new - log_old)
            clip = min(ratio * advantage, max(0.8, min(1.2, ratio)) * advantage)
            clip = max(clip, 2.0 * advantage) if advantage < 0 else clip
            near = max(old_value - 0.2, min(old_value + 0.2, value))
            value_error = max((value - target) ** 2, (near - target) ** 2) / 2
            kl = ratio * (math.exp(log_ref - log_new) - 1 - (log_ref - log_new))
            sums[row].append(clip - 0.4 * value_error - 0.3 * kl + 0.05 * new.entropies[row, t].item())
    expected = {
        "token": sum(map(sum, sums)) / 8,
        "sequence": sum(sum(terms) / len(terms) for terms in sums) / 3,
        "fixed": sum(map(sum, sums)) / 3 / args.max_completion_length,
    }[aggregation]
    assert loss.item() == pytest.approx(-expected, rel=1e-10)


class Measured:
    """What the four terms are about, measured on a rollout."""

    def __init__(self, trainer, batch):
        mask = batch["completion_mask"].bool()
        with torch.no_grad():
            outputs = policy_pass(trainer, trainer.model, texts_of(batch))
            values = trainer.critic.rollout(texts_of(batch), 8).values
        logps, entropies = outputs.logps, outputs.entropies
        good = mask & (batch["advantages"] > 0)
        self.good, self.entropy = logps[good].mean().item(), entropies[mask].mean().item()
        self.value_error = (values - batch["returns"])[mask].square().mean().item()
        log_ratio = batch["ref_per_token_logps"] - logps
        self.kl = (log_ratio.exp() - 1 - log_ratio)[mask].mean().item()


@pytest.mark.parametrize("term", ["advantage", "value", "entropy", "kl"])
def test_a_step_down_the_loss_goes_the_right_way(make_trainer, term):
    """C09: tokens with a positive advantage get likelier, the critic's error and the KL fall, the entropy rises."""
    coefficients = {"vf_coef": 0.0, "entropy_coef": 0.0, "kl_coef": 0.0, "kl_placement": "loss", "kl_estimator": "k3"}
    coefficients |= {"value": {"vf_coef": 1.0}, "entropy": {"entropy_coef": 1.0}, "kl": {"kl_coef": 1.0}}.get(term, {})
    trainer = make_trainer(**ONE, **coefficients, value_clip=None)
    disturb(trainer.model, seed=1, size=0.1)
    batch = one_batch(trainer)
    if term == "advantage":
        batch["advantages"] = batch["advantages"].clamp(min=0.0)
    else:
        advantages, batch["advantages"] = batch["advantages"], torch.zeros_like(batch["advantages"])
    shown = batch | {"advantages": batch["advantages"] if term == "advantage" else advantages}
    before = Measured(trainer, shown)
    trainer.model.train()
    trainer._compute_loss(trainer.model, batch).backward()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.05 * parameter.grad)
    after = Measured(trainer, shown)
    if term == "advantage":
        assert after.good > before.good + 1e-3
    elif term == "entropy":
        assert after.entropy > before.entropy + 1e-3
    elif term == "value":
        assert after.value_error < before.value_error - 1e-3
    else:
        assert before.kl > 1e-3
        assert after.kl < before.kl - 1e-4


def test_the_bandit_recipe(make_trainer, tiny_model_path, sft_adapter, reward_adapter):
    """C20: A = R(x, y) - V(x), V at the last prompt token; the ratio is that of the whole completion.

    Loss and gradient without whitening and KL, with the value loss on V(x) alone.
    """
    trainer = make_trainer(
        advantage_estimator="bandit",
        importance_sampling_level="sequence_product",
        loss_aggregation="sequence",
        whiten_advantages=False,
        kl_coef=0.0,
        vf_coef=0.5,
        value_clip=None,
        **ONE,
    )
    batch = one_batch(trainer)
    policy = load_policy(load_causal_lm(tiny_model_path), sft_adapter)
    disturb(trainer.model, policy, seed=2, size=0.02)
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()

    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)
    critic = PeftModel.from_pretrained(base, reward_adapter, is_trainable=True)
    old_policy = load_policy(load_causal_lm(tiny_model_path), sft_adapter)
    terms, ratios = [], []
    for row in range(8):
        prompt, completion = unpadded(batch, row)
        with torch.no_grad():
            score = critic(input_ids=torch.tensor([prompt + completion])).logits.item()
            tokens = torch.tensor(completion)[:, None]
            old = logps_of(old_policy, prompt, completion).gather(1, tokens).sum()
        hidden = critic.get_base_model().model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
        value = critic.get_base_model().score(hidden).squeeze()
        ratio = (logps_of(policy, prompt, completion).gather(1, tokens).sum() - old).exp()
        advantage = score - value.item()
        ratios.append(ratio.item())
        terms.append(
            -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + 0.25 * (value - score) ** 2
        )
        length = len(completion)
        assert_close(batch["advantages"][row, :length], torch.full((length,), advantage), atol=1e-4, rtol=1e-4)
        assert batch["value_mask"][row].tolist() == [1] + [0] * (batch["value_mask"].size(1) - 1)
    expected = torch.stack(terms).mean()
    expected.backward()
    assert any(not 0.8 < ratio < 1.2 for ratio in ratios)
    assert any(0.8 < ratio < 1.2 for ratio in ratios)
    assert_close(loss.double(), expected.double(), atol=1e-5, rtol=1e-4)
    found = gradients_of(trainer.model)
    for name, gradient in gradients_of(policy).items():
        assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)
    for name, gradient in gradients_of(critic).items():
        name = "heads.critic.weight" if "score" in name else name.replace(".default.", ".critic.")
        assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)


def test_masked_completions_do_not_count(make_trainer):
    """`mask_truncated_completions`: the loss is the one of the rollout without the rows that were cut off."""
    for aggregation in ("token", "sequence"):
        fields = {**ONE, "mask_truncated_completions": True, "loss_aggregation": aggregation, "entropy_coef": 0.1}
        trainer = make_trainer(**fields, whiten_advantages=False)
        batch = one_batch(trainer)
        kept = batch["completion_mask"].any(dim=1)
        assert 0 < kept.sum() < 8
        loss = trainer._compute_loss(trainer.model, batch)
        without = {name: value[kept] if value.dim() else value for name, value in batch.items()}
        assert_close(loss, trainer._compute_loss(trainer.model, without), atol=1e-6, rtol=1e-5)


def test_a_token_has_no_part_in_what_it_is_predicted_from(make_trainer):
    """C18: log-probabilities before a token, and the value and the entropy at it, do not change with it."""
    trainer = make_trainer(**ONE)
    batch = rollout(without_chance(trainer, make=lambda prompt, repeat: [*answer(prompt)[:1], 7, 8, 9, 10, 11]))
    changed = batch | {"completion_ids": batch["completion_ids"].clone()}
    changed["completion_ids"][:, 3] = 20
    found = []
    for each in (batch, changed):
        with torch.no_grad():
            values = trainer.critic.rollout(texts_of(each), 8).values
            outputs = policy_pass(trainer, trainer.model, texts_of(each))
            found.append((outputs.logps, outputs.entropies, values))
    for (logps, entropies, values), (other_logps, other_entropies, other_values) in [found]:
        assert_close(logps[:, :3], other_logps[:, :3])
        assert (logps[:, 3] - other_logps[:, 3]).abs().min() > 1e-4
        for here, there in ((entropies, other_entropies), (values, other_values)):
            assert_close(here[:, :4], there[:, :4])
            assert (here[:, 4:] - there[:, 4:]).abs().min() > 1e-7


def test_the_rollout_stays_what_it_was_through_all_epochs(make_trainer):
    """C17: no gradient, and the same numbers for each completion after the updates as before."""
    shape = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "steps_per_generation": 4}
    trainer = without_chance(make_trainer(**shape, max_steps=12, num_iterations=3, critic_learning_rate=1e-2))
    generate, kept = trainer._generate_and_score_completions, []

    def generate_and_keep(inputs):
        batch = generate(inputs)
        kept.append({name: value.clone() for name, value in batch.items()})
        return batch

    trainer._generate_and_score_completions = generate_and_keep
    weights = trained(trainer)
    trainer.train()
    assert any(not torch.equal(weight, weights[name]) for name, weight in trained(trainer).items())
    assert len(kept) == 1
    names = [name for name, value in kept[0].items() if value.dim()]
    after = {name: torch.cat([batch[name] for batch in trainer._buffered_inputs]) for name in names}
    rows_after = torch.cat([after["prompt_ids"], after["completion_ids"]], 1).tolist()
    order = {tuple(row): number for number, row in enumerate(rows_after)}
    rows = torch.cat([kept[0]["prompt_ids"], kept[0]["completion_ids"]], 1).tolist()
    places = [order[tuple(row)] for row in rows]
    assert sorted(places) == list(range(8)) != places
    for name, tensor in after.items():
        assert not tensor.requires_grad
        assert torch.equal(tensor[places], kept[0][name]), name


def test_the_critic_is_not_moved_by_the_policys_terms(make_trainer):
    """And the policy is not moved by the value loss, because they have adapters of their own."""
    for vf_coef, moves_critic in ((0.0, False), (1.0, True)):
        trainer = make_trainer(**ONE, vf_coef=vf_coef, entropy_coef=0.1)
        batch = one_batch(trainer)
        if moves_critic:
            batch["advantages"].zero_()
            trainer.updates.entropy_coef = 0.0
        trainer._compute_loss(trainer.model, batch).backward()
        for name, gradient in gradients_of(trainer.model).items():
            assert gradient.any().item() == (is_critic_parameter(name) == moves_critic), name
