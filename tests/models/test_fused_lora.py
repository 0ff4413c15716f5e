"""LoRA layers with one matrix product for the update: they compute what PEFT's own layers do."""

import copy

import bitsandbytes
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from rlhf_recipes.models import load_causal_lm
from rlhf_recipes.models.fused_lora import FusedLinear, FusedLinear4bit, fuse_lora
from rlhf_recipes.models.tiny import tiny_llama, word_tokenizer
from tests.models.support import assert_same_gradients

EXACT = {"atol": 1e-13, "rtol": 1e-12}


def pair(dtype=torch.float64, **options):
    """The same network with the same random adapters `default` and `other`: PEFT's layers, and fused ones."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 4, bias=False)).to(dtype)
    options = {"target_modules": ["0", "2"], "init_lora_weights": False, "r": 3, "lora_alpha": 7} | options
    plain, fused = (
        get_peft_model(copy.deepcopy(base), config)
        for config in (LoraConfig(**options), fuse_lora(LoraConfig(**options)))
    )
    for model in (plain, fused):
        model.add_adapter("other", LoraConfig(**options))
    for model in (plain, fused):
        model.to(dtype)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


@pytest.mark.parametrize("shape", [(6,), (2, 6), (3, 7, 6), (2, 1, 3, 6)])
def test_outputs_and_gradients_are_pefts(shape):
    plain, fused = pair()
    assert isinstance(fused.base_model.model[0], FusedLinear)
    assert_same_gradients(plain, fused, torch.randn(shape, dtype=torch.float64), **EXACT)


def test_the_update_by_hand():
    _, fused = pair()
    layer, x = fused.base_model.model[0], torch.randn(2, 6, dtype=torch.float64)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ (layer.base_layer.weight + 7 / 3 * up @ down).T + layer.base_layer.bias
    assert_close(layer(x), expected, **EXACT)


@pytest.mark.parametrize("state", ["other adapter", "two adapters", "no adapter", "disabled", "merged"])
def test_every_state_of_the_adapters_gives_what_peft_gives(state):
    plain, fused = pair()
    for model in (plain, fused):
        if state == "other adapter":
            model.set_adapter("other")
        elif state == "two adapters":
            model.base_model.set_adapter(["default", "other"])
        elif state == "no adapter":
            for index in (0, 2):
                model.base_model.model[index]._active_adapter = []
        elif state == "disabled":
            model.base_model.disable_adapter_layers()
        else:
            model.merge_adapter()
    x = torch.randn(3, 6, dtype=torch.float64)
    assert_close(fused(x), plain(x), **EXACT)
    adapted = pair()[1]
    assert torch.allclose(fused(x), adapted(x)) == (state == "merged")


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}, {"lora_dropout": 0.4}]
)
def test_variants_are_computed_as_peft_does(options):
    plain, fused = pair(**options)
    x = torch.randn(3, 6, dtype=torch.float64)
    for training in (True, False):
        outputs = []
        for model in (plain, fused):
            model.train(training)
            torch.manual_seed(1)
            outputs.append(model(x))
        assert_close(outputs[1], outputs[0], **EXACT)
    assert_same_gradients(plain, fused, x, **EXACT)


def mixed(base, adapters):
    """PEFT's layers and fused ones, whose base layers and adapters have number formats of their own."""
    plain, fused = pair(adapters)
    for model in (plain, fused):
        for index in (0, 2):
            model.base_model.model[index].base_layer.to(base)
    return plain, fused


def test_16_bit_layers_with_float32_adapters_under_autocast():
    plain, fused = mixed(torch.bfloat16, torch.float32)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_gradients(plain, fused, x, atol=3e-2, rtol=3e-2)
        assert fused(x).dtype == torch.bfloat16


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_16_bit_layers_with_float32_adapters_are_rounded_once(base):
    plain, fused = mixed(base, torch.float32)
    x = torch.randn(3, 6, dtype=base)
    assert_same_gradients(plain, fused, x, atol=1e-6, rtol=torch.finfo(base).eps)  # their sums may round to neighbours
    layer = fused.base_model.model[0]
    given = layer(x)
    assert given.dtype == base
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(x).double() + 7 / 3 * x.double() @ (up.double() @ down.double()).T
    assert_close(given, expected.to(base), atol=0, rtol=0)


def test_adapters_narrower_than_the_input_do_not_narrow_the_output():
    plain, fused = mixed(torch.float32, torch.bfloat16)
    x = torch.randn(3, 6)
    assert fused(x).dtype == torch.float32
    assert_close(fused(x), plain(x), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_layers_in_4_bits(tmp_path, dtype, autocast):
    torch.manual_seed(0)
    tiny_llama(word_tokenizer(["a", "b", "c"]), hidden_size=64, layers=1).save_pretrained(tmp_path)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    config = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    plain, fused = (
        get_peft_model(load_causal_lm(str(tmp_path), quantization_config=four_bit, dtype=dtype), given)
        for given in (LoraConfig(**config), fuse_lora(LoraConfig(**config)))
    )
    fused.load_state_dict(plain.state_dict(), strict=False)
    layers = [module for module in fused.modules() if isinstance(module, lora.LoraLayer)]
    assert layers
    assert all(type(layer) is FusedLinear4bit for layer in layers)
    assert all(isinstance(layer.base_layer, bitsandbytes.nn.Linear4bit) for layer in layers)
    assert all(layer.lora_A["default"].weight.dtype == torch.float32 for layer in layers)
    ids = torch.tensor([[3, 4, 5, 3], [5, 5, 4, 3]])
    narrow = autocast or dtype == torch.bfloat16
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if narrow else {"atol": 1e-5, "rtol": 1e-4}
    found = []
    for model in (plain, fused):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        found.append((loss, dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))))
    assert_close(found[1][0], found[0][0], **tolerance)
    for name, gradient in found[0][1].items():
        assert_close(found[1][1][name], gradient, atol=tolerance["atol"], rtol=10 * tolerance["rtol"])


def test_layers_in_4_bits_are_adapted_however_they_are_stored(tmp_path):
    """FSDP needs them as floating-point numbers, which are four bits each all the same."""
    tiny_llama(word_tokenizer(["a", "b", "c"]), hidden_size=64, layers=1).save_pretrained(tmp_path)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="float32")
    base = load_causal_lm(str(tmp_path), quantization_config=four_bit)
    model = get_peft_model(base, fuse_lora(LoraConfig(target_modules="all-linear"), base))
    adapted = [layer.base_layer for layer in model.modules() if isinstance(layer, FusedLinear4bit)]
    assert len(adapted) == 7
    assert {layer.weight.dtype for layer in adapted} == {torch.float32}


def test_saved_adapters_are_pefts_own(tmp_path):
    torch.manual_seed(0)
    base = tiny_llama(word_tokenizer(["a", "b", "c"]), hidden_size=64, layers=1)
    base.save_pretrained(tmp_path / "base")
    config = fuse_lora(LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
    fused = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    fused.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert not [module for module in plain.modules() if isinstance(module, FusedLinear)]
    ids = torch.tensor([[3, 4, 5, 3]])
    assert_close(plain(ids).logits, fused(ids).logits, atol=1e-5, rtol=1e-5)


def test_what_is_no_plain_linear_layer_stays_pefts():
    class Own(nn.Linear):
        pass

    model = get_peft_model(nn.Sequential(Own(3, 3), nn.Linear(3, 3)), fuse_lora(LoraConfig(target_modules=["0", "1"])))
    assert [type(layer) for layer in model.base_model.model] == [lora.Linear, FusedLinear]
    other = peft.LoHaConfig(target_modules=["0"])
    assert fuse_lora(other) is other


def tiny_phimoe():
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    return PhimoeForCausalLM(PhimoeConfig(**sizes, **heads)).eval()


def names_of_adapted(model):
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)}


def test_routers_that_give_more_than_one_tensor_are_left_out(tmp_path):
    base, again = tiny_phimoe(), tiny_phimoe()
    again.load_state_dict(base.state_dict())
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, fuse_lora(config, base)).eval()
    adapted = names_of_adapted(model)
    assert adapted >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "router" not in adapted
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 20, (1, 7))
    assert_close(PeftModel.from_pretrained(again, tmp_path)(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("excluded", [["k_proj"], ".*k_proj"])
def test_what_is_excluded_already_stays_so(excluded):
    base = tiny_phimoe()
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", exclude_modules=excluded)
    model = get_peft_model(base, fuse_lora(config, base))
    adapted = names_of_adapted(model)
    assert not {"k_proj", "router"} & adapted
    assert "q_proj" in adapted


def test_a_router_that_is_named_is_refused():
    base = tiny_phimoe()
    with pytest.raises(ValueError, match=r"`target_modules` names 'model.layers.0.mlp.router'.*Take it out"):
        fuse_lora(LoraConfig(target_modules=["q_proj", "router"]), base)


def test_linear_layers_of_their_own_kind_are_adapted():
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    base = FalconForCausalLM(FalconConfig(**sizes))  # all its linear layers are `FalconLinear`
    model = get_peft_model(base, fuse_lora(LoraConfig(target_modules="all-linear"), base))
    assert names_of_adapted(model) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_layers_of_mamba_that_peft_refuses_are_left_out():
    base = MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=4))
    model = get_peft_model(base, fuse_lora(LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"), base))
    adapted = names_of_adapted(model)
    assert adapted == {"in_proj", "x_proj", "dt_proj"}
