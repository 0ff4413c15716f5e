"""Adapters that took a part of the base with them: adding roles never changes the base, against plain PEFT."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from rlhf_recipes.models import load_causal_lm, load_policy
from rlhf_recipes.models.adapters import base_of
from rlhf_recipes.models.roles import Roles

IDS = torch.tensor([[6, 7, 9, 20, 11, 8]])
STARTS = ["pissa", "olora"]


def save_adapter(base, folder, auto=AutoModelForCausalLM, task="CAUSAL_LM", seed=3, **lora):
    """A trained adapter as PEFT saves it: its start, and some noise."""
    more = {"num_labels": 1} if task == "SEQ_CLS" else {}
    settings = {"task_type": task, "r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | lora
    model = get_peft_model(auto.from_pretrained(base, **more), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def plain_logits(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()(input_ids=IDS).logits


@torch.no_grad()
def plain_score(base, adapter):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    return PeftModel.from_pretrained(model, adapter).eval()(input_ids=IDS).logits[0, 0].item()


def weights_of(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


OPTIONS = {
    "alpha_r_1": {"lora_alpha": 4},
    "alpha_r_2": {"lora_alpha": 8},
    "alpha_r_4": {"lora_alpha": 16},
    "rslora": {"lora_alpha": 6, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
    "trained_head": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_policy_and_the_roles_beside_it_are_those_of_a_plain_reload(tiny_model_path, tmp_path, start, options):
    adapter = save_adapter(tiny_model_path, tmp_path / "sft", init_lora_weights=start, **OPTIONS[options])
    expected = plain_logits(tiny_model_path, adapter)
    base = load_causal_lm(tiny_model_path)
    bare = weights_of(base)
    roles = Roles(load_policy(base, adapter))
    for copies in ("ref", "critic", "one_more"):  # an odd number of copies and an even one
        roles.add_copy(copies)
        for role in ("default", copies):
            with roles.use(role), torch.no_grad():
                torch.testing.assert_close(roles.model(input_ids=IDS).logits, expected, atol=2e-4, rtol=1e-4)
    with roles.use(None), torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tiny_model_path)(input_ids=IDS).logits
        torch.testing.assert_close(roles.model(input_ids=IDS).logits, plain, atol=1e-6, rtol=1e-5)
    after = {name.replace(".base_layer", "").replace(".original_module", ""): p for name, p in base.named_parameters()}
    assert all(torch.equal(after[name], weight) for name, weight in bare.items())
    roles.save_policy(tmp_path / "saved")  # plain LoRA, which anybody can load
    torch.testing.assert_close(plain_logits(tiny_model_path, tmp_path / "saved"), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("start", STARTS)
def test_a_reward_adapter_is_that_of_a_plain_reload(tiny_model_path, sft_adapter, tmp_path, start):
    options = {"auto": AutoModelForSequenceClassification, "task": "SEQ_CLS", "init_lora_weights": start}
    adapter = save_adapter(tiny_model_path, tmp_path / "reward", **options)
    roles = Roles(load_policy(load_causal_lm(tiny_model_path), sft_adapter))
    roles.add_scalar_role("reward", adapter)
    roles.add_copy("critic", "reward")
    found = roles.scores("reward", IDS.tolist(), 0, 1).item()
    assert found == pytest.approx(plain_score(tiny_model_path, adapter), abs=2e-4)
    with roles.use("default"), torch.no_grad():
        expected = plain_logits(tiny_model_path, sft_adapter)
        torch.testing.assert_close(roles.model(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-4)


def test_layers_that_keep_their_weights_transposed(tmp_path):
    torch.manual_seed(1)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(vocab_size=40, bos_token_id=1, eos_token_id=1, **sizes)).save_pretrained(
        tmp_path / "base"
    )
    base = str(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "sft", init_lora_weights="pissa", target_modules=["c_attn", "c_fc"])
    model = load_policy(load_causal_lm(base), adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, plain_logits(base, adapter), atol=2e-4, rtol=1e-4)


def changed_config(folder, **fields):
    import json

    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"init_lora_weights": "corda"}, "more than the weights of the base"),
        ({"init_lora_weights": "pissa_niter_16"}, "more than the weights of the base, such as chance"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "more than the weights of the base"),
        ({"use_dora": True}, "more than the weights of the base"),
    ],
)
def test_starts_that_cannot_be_computed_again_are_refused(tiny_model_path, tmp_path, fields, why):
    adapter = save_adapter(tiny_model_path, tmp_path / "sft", init_lora_weights="pissa")
    with pytest.raises(ValueError, match=rf"`init_lora_weights: .*{why}.*path_initial_model_for_weight_conversion"):
        load_policy(load_causal_lm(tiny_model_path), changed_config(adapter, **fields))


@pytest.mark.parametrize(
    "fields",
    [{"layer_replication": [[0, 2], [1, 2]]}, {"alora_invocation_tokens": [9]}, {"bias": "lora_only"}],
    ids=str,
)
def test_adapters_that_change_more_than_their_role_are_refused(make_trainer, tiny_model_path, tmp_path, fields):
    [name] = fields
    adapter = save_adapter(tiny_model_path, tmp_path / "sft", **fields)
    with pytest.raises(ValueError, match=rf"The adapter in .* has `{name}"):
        load_policy(load_causal_lm(tiny_model_path), adapter)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **fields)
    with pytest.raises(ValueError, match=rf"`peft_config` has `{name}"):
        make_trainer(model=tiny_model_path, peft_config=config, reward_funcs=lengths)


@pytest.mark.parametrize("start", [*STARTS, False])
@pytest.mark.parametrize("given", ["fresh", "loaded"])
def test_ppo_starts_from_an_adapter_that_changed_its_base(make_trainer, tiny_model_path, tmp_path, start, given):
    """The reference is the policy as it is given; where no other adapter fits the base any more, it is refused."""
    lora = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "init_lora_weights": start}
    fields = {"critic_init": "policy", "reward_funcs": lengths, "max_steps": 1, "num_iterations": 1}
    expected = None
    if given == "fresh":
        trainer = make_trainer(model=tiny_model_path, peft_config=LoraConfig(**lora), **fields)
    else:
        adapter = save_adapter(tiny_model_path, tmp_path / "sft", **lora)
        expected = plain_logits(tiny_model_path, adapter)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path), adapter)
        trainer = make_trainer(model=model, **fields)
    assert trainer.reference == "ref"
    if expected is not None:
        with torch.no_grad():
            torch.testing.assert_close(trainer.model.eval()(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-4)


def lengths(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def test_a_reward_adapter_does_not_fit_a_base_that_lost_a_part(make_trainer, tiny_model_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights="pissa")
    with pytest.raises(ValueError, match="took a part of the base out of it: the reward adapter in"):
        make_trainer(model=tiny_model_path, peft_config=config)


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_adapter_with_trained_embeddings(tiny_model_path, sft_adapter, tmp_path, tied):
    base = tiny_model_path
    if tied:
        model = AutoModelForCausalLM.from_pretrained(base)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(tmp_path / "base")
        base = str(tmp_path / "base")
    options = {"auto": AutoModelForSequenceClassification, "task": "SEQ_CLS"}
    modules = ["embed_tokens", "score"]
    adapter = save_adapter(base, tmp_path / "reward", modules_to_save=modules, target_modules=["q_proj"], **options)
    policy = save_adapter(base, tmp_path / "sft") if tied else sft_adapter
    roles = Roles(load_policy(load_causal_lm(base), policy))
    before = plain_logits(base, policy)
    roles.add_scalar_role("reward", adapter)
    assert roles.scores("reward", IDS.tolist(), 0, 1).item() == pytest.approx(plain_score(base, adapter), abs=1e-5)
    with roles.use("default"), torch.no_grad():
        torch.testing.assert_close(roles.model(input_ids=IDS).logits, before, atol=1e-5, rtol=1e-4)
    roles.add_copy("critic", "reward")
    roles.add_head("critic", roles.heads["reward"].weight)
    roles.save_scalar_role("critic", "critic", tmp_path / "critic")
    assert plain_score(base, tmp_path / "critic") == pytest.approx(plain_score(base, adapter), abs=1e-5)


def test_the_base_of_an_adapter_is_found_where_it_was_written_relative(tmp_path, monkeypatch):
    for folder in ("run/base", "run/sft", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    config = LoraConfig(base_model_name_or_path="base")
    config.save_pretrained(str(tmp_path / "run" / "sft"))
    monkeypatch.chdir(tmp_path / "run")
    assert base_of("sft") == "base"
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert base_of(tmp_path / "run" / "sft") == str(tmp_path / "run" / "base")
    assert base_of("../run/sft") == str(tmp_path / "run" / "base")
    (tmp_path / "elsewhere" / "base").mkdir()
    with pytest.raises(ValueError, match="`base_model_name_or_path` of .* is 'base', which may be .*elsewhere/base"):
        base_of(tmp_path / "run" / "sft")
    for name, expected in (("owner/model", "owner/model"), (str(tmp_path / "gone"), str(tmp_path / "gone"))):
        config.base_model_name_or_path = name
        config.save_pretrained(str(tmp_path / "run" / "sft"))
        assert base_of(tmp_path / "run" / "sft") == expected
    config.base_model_name_or_path = None
    config.save_pretrained(str(tmp_path / "run" / "sft"))
    with pytest.raises(ValueError, match="names no base"):
        base_of(tmp_path / "run" / "sft")
