"""Models and settings for which texts are not packed: the same numbers, and settings of generation that hold."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_recipes.models.packing import is_packed
from tests.ppo.support import EOS, rollout, trained, without_chance

CRITICS = [{"critic": "head", "critic_init": "policy"}, {}, {"critic_layers": 1}]


@pytest.mark.parametrize("critic", CRITICS, ids=str)
def test_a_run_is_the_same_where_the_attention_cannot_pack(make_trainer, critic):
    found = []
    for attention in ("sdpa", "eager"):
        fields = {"model_init_kwargs": {"attn_implementation": attention}, "max_steps": 4, **critic}
        trainer = without_chance(make_trainer(**fields))
        assert is_packed(trainer.model.get_base_model()) == (attention == "sdpa")
        before = trained(trainer)
        trainer.train()
        after = trained(trainer)
        assert any(not torch.equal(after[name], before[name]) for name in before)
        found.append(after)
    for name, packed in found[0].items():
        assert_close(found[1][name], packed, atol=2e-4, rtol=1e-2, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_settings_of_generation_hold(make_trainer, tiny_tokenizer, attention):
    allowed = {EOS, 7, 8, 9}  # transformers never bans the end token
    banned = [[token] for token in range(len(tiny_tokenizer)) if token not in allowed]
    trainer = make_trainer(
        generation_kwargs={"bad_words_ids": banned}, model_init_kwargs={"attn_implementation": attention}
    )
    batch = rollout(trainer)
    tokens = batch["completion_ids"][batch["completion_mask"].bool()]
    assert set(tokens.tolist()) <= allowed
    assert tokens.unique().numel() > 1
