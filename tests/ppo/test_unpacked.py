"""Models and settings for which texts are not packed: the same numbers, and settings of generation that hold."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_recipes.models.packing import is_packed
from tests.ppo.support import rollout, trained, without_chance

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
def test_settings_that_the_trainer_was_given_later_do_not_pass(make_trainer, attention):
    trainer = make_trainer(model_init_kwargs={"attn_implementation": attention})
    trainer.generation_config.suppress_tokens = [7, 8]
    with pytest.raises(RuntimeError, match=r"\['SuppressTokensLogitsProcessor'\] would change what is drawn"):
        rollout(trainer)


def test_settings_of_memory_hold(make_trainer):
    """A chunked reading of the prompts is one call of transformers' `generate`, and draws what it draws otherwise."""
    rollouts = []
    for kwargs in (None, {"prefill_chunk_size": 2}):
        fields = {"generation_kwargs": kwargs, "temperature": 1e-4, "max_completion_length": 4}
        rollouts.append(rollout(make_trainer(model_init_kwargs={"attn_implementation": "eager"}, **fields)))
    assert torch.equal(rollouts[0]["completion_ids"], rollouts[1]["completion_ids"])
