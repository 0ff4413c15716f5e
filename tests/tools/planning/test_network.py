"""Shapes read from configurations, without weights."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_recipes.tools.planning.network import adapter_sizes, empty_model, network_sizes, whole_model_sizes

ALL = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")


def test_model_has_no_weights_and_the_right_shape(other_model_path):
    model = empty_model(other_model_path)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    network = network_sizes(model)
    real = AutoModelForCausalLM.from_pretrained(other_model_path)
    assert network.linear_parameters + network.other_parameters == real.num_parameters()
    shape = (network.hidden, network.layers, network.heads, network.kv_heads, network.head_size, network.intermediate)
    assert shape == (128, 3, 4, 4, 32, 320)
    assert (network.gated, network.linears) == (True, 21)
    assert network.linear_parameters == 3 * (4 * 128 * 128 + 3 * 128 * 320)
    assert (network.largest_linear, network.largest_parameter) == (128 * 320, 128 * 320)


def test_adapter_has_the_sizes_of_a_real_one(other_model_path):
    real = get_peft_model(AutoModelForCausalLM.from_pretrained(other_model_path), ALL)
    found = adapter_sizes(empty_model(other_model_path), ALL)
    assert found.parameters == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert found.ranks == 7 * 8
    assert (found.inputs, found.shared_inputs) == (4 * 128, 2 * 128)  # of attention alone
    assert found.in_mlps == 3 * 8 * 3 * (128 + 320)
    plain = adapter_sizes(empty_model(other_model_path), ALL, in_parts=False)
    assert plain.ranks == 7 * 8
    assert plain.inputs == 6 * 128 + 320
    assert plain.shared_inputs == 128 + 128 + 128 + 320


def test_adapter_on_some_layers(other_model_path):
    some = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    found = adapter_sizes(empty_model(other_model_path), some)
    assert (found.parameters, found.ranks) == (3 * 2 * 4 * 256, 8)


def test_whole_model_counts_every_weight(other_model_path):
    found = whole_model_sizes(empty_model(other_model_path))
    assert found.parameters == AutoModelForCausalLM.from_pretrained(other_model_path).num_parameters()
    assert found.ranks == 0


@pytest.mark.parametrize(("kind", "gated"), [("gpt_neox", False), ("gpt2", False), ("qwen2", True), ("gemma", True)])
def test_other_architectures(kind, gated, tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    sizes |= {"vocab_size": 50, "num_key_value_heads": 2, "head_dim": 32}
    if kind == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_inner": 96, "vocab_size": 50}
    config = AutoConfig.for_model(kind, **sizes)
    config.save_pretrained(tmp_path)
    network = network_sizes(empty_model(str(tmp_path)))
    real = AutoModelForCausalLM.from_config(config)
    assert network.linear_parameters + network.other_parameters == sum(p.numel() for p in real.parameters())
    assert (network.hidden, network.layers, network.vocabulary) == (64, 2, 50)
    assert network.gated is gated
    # gpt2 and gpt_neox have query, key and value in one layer, which is wider than the MLP here
    assert network.intermediate == (192 if kind in ("gpt2", "gpt_neox") else 96)


def test_what_cannot_be_planned_is_refused(tmp_path, bert_path):
    with pytest.raises(FileNotFoundError, match="No configuration of the folder"):
        empty_model(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"No configuration of the model '\./nowhere'"):
        empty_model("./nowhere")
    config = AutoConfig.for_model("mixtral", hidden_size=64, num_hidden_layers=1)
    config.save_pretrained(tmp_path / "experts")
    with pytest.raises(ValueError, match="mixture of experts"):
        empty_model(str(tmp_path / "experts"))
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match=r"\(vit\) is no causal language model"):
        empty_model(str(tmp_path / "vision"))
    assert torch.get_default_dtype() == torch.float32
