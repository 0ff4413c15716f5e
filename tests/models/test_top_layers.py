"""The last layer of a decoder computes what is read of it: the same states and gradients, with fewer tokens."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_recipes.models.fused_lora import fuse_lora
from rlhf_recipes.models.gated_mlp import fuse_mlps
from rlhf_recipes.models.packing import pack
from rlhf_recipes.models.top_layers import only_read_in_last_layer

SHAPE = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
READ = torch.tensor([3, 4, 9, 13])  # of two texts of seven tokens


def llama(packed):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)).double()
    if packed:
        pack(base)
    fuse_mlps(base)
    model = get_peft_model(base, fuse_lora(LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)))
    return model.double()


def states_and_gradients(model, only):
    base = model.get_base_model()
    ids = torch.arange(14).view(2, 7)
    calls = []
    counted = base.model.layers[-1].self_attn.o_proj.base_layer.register_forward_hook(
        lambda layer, given, output: calls.append(output.numel() // output.size(-1))
    )
    if only:
        with only_read_in_last_layer(base, READ):
            states = base.model(input_ids=ids, use_cache=False).last_hidden_state
    else:
        states = base.model(input_ids=ids, use_cache=False).last_hidden_state
    counted.remove()
    read = states.flatten(0, 1)[READ]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return calls, [read, *torch.autograd.grad(read.square().sum(), trained)]


@pytest.mark.parametrize("packed", [False, True])
def test_states_that_are_read_and_their_gradients_are_the_same(packed):
    model = llama(packed)
    (all_tokens, expected), (some, found) = states_and_gradients(model, False), states_and_gradients(model, True)
    assert (all_tokens, some) == ([14], [len(READ)])
    assert_close(found, expected, atol=1e-12, rtol=1e-10)
    assert states_and_gradients(model, False)[0] == [14]  # nothing is left behind


def test_nothing_is_left_out_where_layers_are_computed_again():
    model = llama(False).train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    expected = states_and_gradients(llama(False), False)[1]
    calls, found = states_and_gradients(model, True)
    assert set(calls) == {14}
    assert_close(found, expected, atol=1e-12, rtol=1e-10)


def test_a_network_of_another_build_is_left_as_it_is():
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)).double().eval()
    ids = torch.arange(14).view(2, 7)
    expected = model.base_model(input_ids=ids).last_hidden_state
    with only_read_in_last_layer(model, READ):
        found = model.base_model(input_ids=ids).last_hidden_state
    assert_close(found.flatten(0, 1)[READ], expected.flatten(0, 1)[READ])
