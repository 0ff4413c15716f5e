"""A critic that is trained in the upper layers only: the same values and gradients, from fewer layers."""

import pytest
import torch
from torch.testing import assert_close
from transformers import BitsAndBytesConfig, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

from rlhf_recipes.models.roles import is_critic_parameter
from rlhf_recipes.models.top_layers import check_top_layers, decoder_layers
from rlhf_recipes.ppo.rollout import texts_of
from tests.ppo.support import rollout, trained, without_chance

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def gradients(trainer, batch):
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("quantization", [None, FOUR_BIT], ids=["float32", "4-bit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_upper_layers_alone_give_the_values_and_gradients_of_the_whole(make_trainer, quantization, checkpointing):
    fields = {"quantization_config": quantization, "activation_checkpointing": checkpointing}
    whole = without_chance(make_trainer(**fields))
    top = without_chance(make_trainer(critic_layers=1, **fields))
    batch = rollout(top)
    mask = batch["completion_mask"].bool()
    values = whole.critic.rollout(texts_of(batch), 3).values
    assert_close(batch["old_values"][mask], values[mask], atol=1e-4, rtol=1e-4)
    assert batch["completion_below"].shape == (*mask.shape, whole.model.config.hidden_size)

    loss, found = gradients(top, batch)
    expected_loss, expected = gradients(whole, batch)
    assert_close(loss, expected_loss, atol=1e-5, rtol=1e-4)
    upper = {name for name in expected if is_critic_parameter(name) and (".layers.1." in name or "heads" in name)}
    assert {name for name in found if is_critic_parameter(name)} == upper != set()
    for name in found:
        assert_close(found[name], expected[name], atol=1e-5, rtol=1e-3)


def test_the_lower_layers_stay_as_they_start(make_trainer):
    trainer = make_trainer(critic_layers=1, max_steps=4)
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if ".critic." in n}
    started = trained(trainer)
    trainer.train()
    lower = [name for name in before if ".layers.0." in name]
    assert lower
    assert not [name for name in started if ".critic." in name and ".layers.0." in name]
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in lower)
    assert all(not torch.equal(after[name], before[name]) for name in before if ".layers.1." in name and "_B" in name)
    assert len(decoder_layers(trainer.roles.model.get_base_model())) == 2, "the model is whole again"


@pytest.mark.parametrize("layers", [0, 2])
def test_a_number_of_layers_that_the_base_does_not_have_is_refused(make_trainer, layers):
    with pytest.raises(ValueError, match="`critic_layers`"):
        make_trainer(critic_layers=layers)


def test_layers_of_another_critic_are_refused(make_trainer):
    with pytest.raises(ValueError, match="`critic_layers` is about the critic's adapter, but `critic` is 'head'"):
        make_trainer(critic_layers=1, critic="head")


def test_a_model_without_a_list_of_layers_is_refused():
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no list `layers`.*Leave `critic_layers` out"):
        decoder_layers(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10)))


def test_a_model_that_changes_what_enters_the_layers_is_refused(make_trainer):
    trainer = without_chance(make_trainer(critic_layers=1))
    trunk = trainer.roles.model.get_base_model().base_model

    def scale(module, args, kwargs):  # as a model that scales its embeddings does
        given = kwargs.get("inputs_embeds")
        return None if given is None else (args, {**kwargs, "inputs_embeds": 3 * given})

    trunk.register_forward_pre_hook(scale, with_kwargs=True)
    with torch.no_grad():  # as of `critic_init: policy`
        trainer.roles.heads["critic"].weight.zero_()
    with pytest.raises(ValueError, match=r"upper layers of this model alone .* Leave `critic_layers` out"):
        rollout(trainer)


def test_layers_that_are_told_apart_by_their_number_are_refused():
    kinds = ["sliding_attention", "full_attention"]
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "head_dim": 8}
    config = Gemma3TextConfig(**sizes, num_hidden_layers=4, num_key_value_heads=1, layer_types=kinds * 2)
    model = Gemma3ForCausalLM(config)
    check_top_layers(model, 2)
    with pytest.raises(ValueError, match=r"`critic_layers` is 1, but Gemma3ForCausalLM .*Leave it out"):
        check_top_layers(model, 1)
