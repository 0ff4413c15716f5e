"""Where an adapter's base is: absolute when the stages save it, found when it was written relative, said when gone."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rlhf_recipes import PPOTrainer
from rlhf_recipes.models import load_causal_lm, load_policy, load_reward_model
from rlhf_recipes.models.adapters import base_of, base_to_load, name_base_absolutely
from rlhf_recipes.models.roles import Roles


def with_base(adapter, folder, name):
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    return folder


def test_roles_save_the_absolute_path_of_a_relative_base(tiny_model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny_model_path)
    base = AutoModelForCausalLM.from_pretrained("base")
    roles = Roles(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])))
    roles.add_copy("critic")
    roles.add_head("critic", torch.ones(1, 64))
    roles.save_policy("policy")
    roles.save_scalar_role("critic", "critic", "scored")
    for folder in ("policy", "scored"):
        assert PeftConfig.from_pretrained(folder).base_model_name_or_path == str(tmp_path / "base")


def test_another_name_for_the_same_base_brings_no_warning(
    tiny_model_path, sft_adapter, tmp_path, monkeypatch, recwarn
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny_model_path)
    adapter = with_base(sft_adapter, tmp_path / "sft", str(tmp_path / "base"))
    policy = load_policy(load_causal_lm("base"), adapter)
    assert policy.peft_config["default"].base_model_name_or_path == "base"
    assert not [str(one.message) for one in recwarn if "renamed" in str(one.message)]


def test_a_hub_id_stays_one(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = "org/model"
    name_base_absolutely(adapted)
    assert adapted.peft_config["default"].base_model_name_or_path == "org/model"


def test_a_relative_base_of_an_older_adapter_is_found_above_it(tiny_model_path, sft_adapter, tmp_path):
    (tmp_path / "tree" / "world").mkdir(parents=True)
    (tmp_path / "tree" / "world" / "base").symlink_to(tiny_model_path)
    adapter = with_base(sft_adapter, tmp_path / "tree" / "outputs" / "sft", "world/base")
    assert base_of(adapter) == base_to_load(adapter) == str((tmp_path / "tree" / "world" / "base").resolve())


@pytest.mark.parametrize("name", ["/gone/base", "outputs/gone/base", "./base"])
def test_a_base_that_is_gone_is_said_with_the_fix(name, sft_adapter, reward_adapter, make_config, prompts, tmp_path):
    fix = r"there is no such folder. If the base has moved, write its new absolute path as `base_model_name_or_path`"
    policy = with_base(sft_adapter, tmp_path / "sft", name)
    reward = with_base(reward_adapter, tmp_path / "reward", name)
    with pytest.raises(FileNotFoundError, match=fix):
        load_reward_model(reward)
    with pytest.raises(FileNotFoundError, match=fix):
        PPOTrainer(model=str(policy), reward_funcs=[len], args=make_config(), train_dataset=prompts)
    assert base_to_load(with_base(sft_adapter, tmp_path / "hub", "org/model")) == "org/model"
