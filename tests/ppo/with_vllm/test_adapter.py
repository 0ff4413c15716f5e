"""Adapters of which vLLM would leave something out, and the names of versions."""

from dataclasses import fields

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from rlhf_recipes.models.roles import Roles
from rlhf_recipes.ppo.vllm.adapter import _HEEDED, _INSTEAD, check_adapter, save_version, version_of

REFUSED = {
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4},
    "use_dora": True,
    "bias": "all",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [3],
    "alora_invocation_tokens": [1, 2],
    "target_parameters": ["experts.down_proj"],
    "layer_replication": [(0, 2), (1, 3)],
    "use_qalora": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_would_drop_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"adapter cannot have `{name}` .*, or remove `use_vllm`"):
        check_adapter(LoraConfig(**{name: REFUSED[name]}))
    assert name not in _HEEDED


def test_what_vllm_heeds_is_not_refused():
    check_adapter(LoraConfig(r=4, lora_alpha=7, use_rslora=True, lora_dropout=0.1, target_modules="all-linear"))
    check_adapter(LoraConfig(layers_to_transform=[1], init_lora_weights="gaussian", exclude_modules=["lm_head"]))
    names = {field.name for field in fields(LoraConfig)}
    assert names >= _INSTEAD.keys(), "a field of PEFT has another name now"
    assert "r" in names & _HEEDED
    assert PeftConfig.__dataclass_fields__.keys() <= _HEEDED


def test_what_is_no_lora_on_the_base_as_it_is_is_refused():
    with pytest.raises(ValueError, match="must be a LoRA adapter, and its configuration is a IA3Config"):
        check_adapter(IA3Config())
    with pytest.raises(ValueError, match="`init_lora_weights: pissa`.*Set it to true"):
        check_adapter(LoraConfig(init_lora_weights="pissa"))
    check_adapter(LoraConfig(r=512))
    with pytest.raises(ValueError, match="rank of 512, and the policy's has `r: 513`. Lower `lora_r`, or remove"):
        check_adapter(LoraConfig(r=513))


class Model(nn.Sequential):
    dtype = torch.float32
    config = type("Config", (), {"to_dict": lambda self: {}, "get": lambda self, *args: None})()


def test_a_version_has_a_name_of_its_weights(tmp_path):
    model = get_peft_model(Model(nn.Linear(3, 2)), LoraConfig(r=1, target_modules=["0"]))
    roles = Roles(model)
    first = version_of(roles, tmp_path)
    assert first == version_of(roles, tmp_path)
    assert first.folder == tmp_path / first.name
    weight = model.base_model.model[0].lora_A["default"].weight
    with torch.no_grad():
        weight[0, 1] += 1e-6
    second = version_of(roles, tmp_path)
    assert second.name != first.name
    save_version(roles, second)
    save_version(roles, second)
    assert [path.name for path in tmp_path.iterdir()] == [second.name]
    saved = load_file(second.folder / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.0.lora_A.weight"], weight)
    with torch.no_grad():
        weight[0, 1] -= 1e-6
    model.peft_config["default"].lora_alpha = 99
    assert version_of(roles, tmp_path).name not in (first.name, second.name)
