"""Layers that draw random numbers in training compute what they compute in evaluation."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from rlhf_recipes.models.chance import compute_as_in_evaluation, disable_dropout

SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, embd_pdrop=0.3)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SIZES, ffn_dim=16, word_embed_proj_dim=16, dropout=0.3, attention_dropout=0.3, layerdrop=0.5)
    ),
    "biogpt": lambda: BioGptForCausalLM(
        BioGptConfig(**SIZES, intermediate_size=16, activation_dropout=0.3, layerdrop=0.5)
    ),
    "phimoe": lambda: PhimoeForCausalLM(
        PhimoeConfig(**SIZES, intermediate_size=16, num_key_value_heads=2, num_local_experts=4, initializer_range=0.3)
    ),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", MODELS)
def test_training_computes_what_evaluation_does(name, checkpointing):
    model = MODELS[name]()
    ids = torch.randint(3, 20, (2, 9))
    expected = model.eval()(input_ids=ids).logits
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3)
    compute_as_in_evaluation(model)
    logits = model(input_ids=ids, use_cache=False).logits
    assert_close(logits, expected)
    logits.sum().backward()
    assert model.training
    assert all(p.grad is not None for name, p in model.named_parameters() if "experts" not in name)


def test_rates_of_modules_and_numbers_are_set_to_zero():
    layer = nn.Sequential(nn.Dropout2d(0.5), nn.Linear(2, 2))
    layer[1].attention_dropout, layer[1].attn_pdrop, layer[1].eps, layer[1].dropped = 0.1, 0.2, 0.3, 4
    disable_dropout(layer)
    assert (layer[0].p, layer[1].attention_dropout, layer[1].attn_pdrop) == (0.0, 0.0, 0.0)
    assert (layer[1].eps, layer[1].dropped) == (0.3, 4)


def test_a_model_in_evaluation_stays_there():
    model = nn.Sequential(nn.Dropout(0.5)).eval()
    compute_as_in_evaluation(model)
    assert not model.training
