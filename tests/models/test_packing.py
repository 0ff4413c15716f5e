"""Texts read one after another get the states and gradients that each of them gets alone."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from rlhf_recipes.models.packing import is_packed, pack, packed_mask, packed_sdpa
from rlhf_recipes.models.rows import Rows

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama_classifier": lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=1)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**LLAMA, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=None)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=48, **SPECIAL)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4, **NO_DROPOUT, **SPECIAL)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, **SPECIAL)),
}
LENGTHS = (5, 1, 9, 3, 8, 2)  # attention pads 1 and 2, 3 and 5, 8 and 9 together


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():  # so that attention matters in a model that was not trained
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def make_texts():
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(len(LENGTHS), 14, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, row : row + length] = 1  # tokens begin anywhere
    return torch.randint(3, 60, mask.shape, generator=generator), mask


def states_of(model, ids, rows):
    return rows.split(model.base_model(input_ids=rows.join(ids), use_cache=False, **rows.arguments).last_hidden_state)


def states_alone(model, ids, mask):
    """The oracle: each text in a pass of its own, without a mask."""
    found = torch.zeros(*mask.shape, 32)
    for row, keep in enumerate(mask.bool()):
        found[row, keep] = model.base_model(input_ids=ids[row, keep][None]).last_hidden_state[0]
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_are_those_of_each_text_alone(name, checkpointing):
    alone, packed = make(name), make(name)
    pack(packed)
    assert is_packed(packed)
    if checkpointing:  # the layers run again in the backward pass
        packed.gradient_checkpointing_enable()
        packed.train()
    ids, mask = make_texts()
    rows = Rows(mask, packed=True)
    assert "sequence_groups" in rows.arguments
    expected, found = states_alone(alone, ids, mask), states_of(packed, ids, rows)
    assert_close(found, expected, atol=2e-5, rtol=1e-4)
    weight = torch.randn(mask.numel(), 32, generator=torch.Generator().manual_seed(1)).view(*mask.shape, 32)
    for states in (expected, found):
        (states * weight).sum().backward()
    for (parameter, value), other in zip(alone.named_parameters(), packed.parameters(), strict=True):
        if value.grad is not None:
            assert_close(other.grad, value.grad, atol=2e-3, rtol=1e-3, msg=parameter)


def test_half_precision_packs_too():
    model = make("llama").to(torch.bfloat16)
    pack(model)
    assert is_packed(model)


def test_a_cpu_attends_in_float32_where_numbers_have_16_bits():
    torch.manual_seed(0)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1)
    states = [torch.randn(2, 4, 9, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    exact = [each.detach().float().requires_grad_() for each in states]
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = packed_sdpa(module, *states, None)
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True).transpose(1, 2)
    assert torch.equal(found, expected.bfloat16())
    for each in (found, expected):
        each.backward(torch.ones_like(each))
    for gradient, other in zip(states, exact, strict=True):
        assert torch.equal(gradient.grad, other.grad.bfloat16())


def sliding():
    return MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=4096))


def some_layers_slide():
    config = Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=64, max_window_layers=1)
    return Qwen2ForCausalLM(config)


def eager():
    return LlamaForCausalLM(LlamaConfig(**LLAMA, attn_implementation="eager"))


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4))


@pytest.mark.parametrize("make_model", [sliding, some_layers_slide, eager, mamba])
def test_models_that_do_not_attend_to_the_whole_text_stay_as_they_are(make_model):
    model = make_model()
    before = model.config._attn_implementation
    pack(model)
    assert not is_packed(model)
    assert model.config._attn_implementation == before


def test_a_model_that_mixes_texts_stays_as_it_is(monkeypatch):
    forward = LlamaAttention.forward

    def without_groups(self, *args, sequence_groups=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", without_groups)
    model = make("llama")
    pack(model)
    assert not is_packed(model)


def test_trying_leaves_the_model_in_training():
    model = make("llama").train()
    pack(model)
    assert model.training
    assert model.model.training


def test_a_packed_pass_has_no_mask_over_all_tokens():
    model, seen = make("llama"), []
    pack(model)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
    ids, mask = make_texts()
    states_of(model, ids, Rows(mask, packed=True))
    assert seen == [None] * 3
    assert packed_mask(batch_size=1, q_length=8, kv_length=8) is None


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt"])
def test_generation_is_that_of_transformers(name):
    plain, packed = make(name), make(name)
    pack(packed)
    ids, mask = torch.randint(3, 60, (3, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 0, 1]])
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(packed.generate(**options), plain.generate(**options))


def test_copies_are_packed_and_what_is_saved_is_not(tmp_path):
    model = make("llama")
    pack(model)
    assert is_packed(copy.deepcopy(model))
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
