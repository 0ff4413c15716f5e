"""Each family through SFT, reward model and PPO with both critics, against single rows of transformers and PEFT."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_recipes.models import load_causal_lm
from rlhf_recipes.models.chance import compute_as_in_evaluation
from tests.families.stages import (
    PROMPTS,
    make_ppo,
    plain_classifier,
    plain_logps,
    plain_policy,
    plain_score,
    plain_text,
    save_base,
    texts,
    train_reward,
    train_sft,
)
from tests.families.table import FAMILIES
from tests.ppo.support import rollout_and_record, unpadded

EXACT = {"atol": 1e-5, "rtol": 1e-5}
CASES = [
    pytest.param(name, id=name, marks=[] if family.fast else pytest.mark.slow) for name, family in FAMILIES.items()
]


def count(completion_ids, **columns):
    """A reward that needs no model."""
    return [float(sum(ids) % 7) for ids in completion_ids]


@pytest.mark.parametrize("name", CASES)
def test_a_family_through_all_stages(name, tiny_tokenizer, tmp_path):
    family = FAMILIES[name]
    base = save_base(name, tmp_path / "base", tiny_tokenizer)
    if family.load is not None:
        with pytest.raises(ValueError, match=family.load):
            load_causal_lm(base)
        return
    model, sft = train_sft(base, tmp_path / "sft", tiny_tokenizer)
    plain = plain_policy(base, sft)
    prompt, answer = [7, 12, 9, 21], [8, 30, 17, 1]
    assert_close(plain_logps(model, prompt, answer), plain_logps(plain, prompt, answer), **EXACT)

    reward, scorer = count, None
    if family.reward is None and not family.other_head:
        model, reward = train_reward(base, tmp_path / "reward", tiny_tokenizer)
        scorer = plain_classifier(base, reward)
        assert_close(plain_score(model, prompt + answer), plain_score(scorer, prompt + answer), **EXACT)
    elif family.reward is not None:
        with pytest.raises(ValueError, match=family.reward):
            train_reward(base, tmp_path / "reward", tiny_tokenizer)

    if family.ppo is not None:
        with pytest.raises(ValueError, match=family.ppo):
            make_ppo(sft, tmp_path / "ppo", tiny_tokenizer, count, critic="head", critic_init="policy")
        return
    start = {"critic_init": "policy"} if scorer is None else {}
    trainer = make_ppo(sft, tmp_path / "adapter", tiny_tokenizer, reward, **start)
    check_rollout(trainer, plain, scorer)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    check_saved(trainer, base, tmp_path / "adapter", scorer)

    greedy = {"temperature": 1e-5, "critic": "head", "critic_init": "policy"}
    trainer = make_ppo(sft, tmp_path / "head", tiny_tokenizer, reward, **greedy)
    prompts = tiny_tokenizer(PROMPTS)["input_ids"]
    assert texts(trainer) == [plain_text(plain, ids, trainer.eos_token_ids, 6) for ids in prompts]
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def check_rollout(trainer, plain, scorer):
    """Log-probabilities, values and scores of a rollout are those of single rows."""
    batch, record = rollout_and_record(trainer, prepare=compute_as_in_evaluation)
    assert len({len(unpadded(batch, row)[0]) for row in range(8)}) > 2, "the rows are of unlike length"
    for row in range(8):
        prompt, completion = unpadded(batch, row)
        found = batch["old_per_token_logps"][row, : len(completion)]
        assert_close(found, plain_logps(plain, prompt, completion, trainer.temperature), **EXACT)
        assert_close(batch["ref_per_token_logps"][row, : len(completion)], found, **EXACT)
        if scorer is not None:
            assert_close(record.scores[row].float(), plain_score(scorer, prompt + completion), **EXACT)
            value = batch["old_values"][row, len(completion) - 1]
            assert_close(value, plain_score(scorer, (prompt + completion)[:-1]), **EXACT)


def check_saved(trainer, base, folder, scorer):
    """Policy and critic are those that transformers and PEFT reload, and have moved."""
    trainer.model.eval()
    prompt, answer = [7, 12, 9, 21], [8, 30, 17, 1]
    plain = plain_policy(base, folder)
    assert_close(plain_logps(trainer.model, prompt, answer), plain_logps(plain, prompt, answer), **EXACT)
    with trainer.roles.use(trainer.reference):
        before = plain_logps(trainer.model, prompt, answer)
    assert (plain_logps(plain, prompt, answer) - before).abs().max() > 1e-4
    if scorer is not None:
        critic = plain_classifier(base, folder / "critic")
        assert (plain_score(critic, prompt) - plain_score(scorer, prompt)).abs() > 1e-4
