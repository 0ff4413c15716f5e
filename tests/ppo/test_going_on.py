"""A policy, a critic and a reward model that go on from an earlier run, while the reference stays what it was."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_recipes.models import load_policy
from rlhf_recipes.models.roles import CRITIC, REFERENCE

WEIGHTS = "adapter_model.safetensors"
PPO = {"kl_coef": 0.1, "critic": "head", "max_steps": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def base(sft_adapter):
    return json.loads((sft_adapter / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.fixture
def earlier(make_trainer, tmp_path):
    """Run PPO for two steps with a kind of critic, and return the folder."""

    def run(**fields):
        trainer = make_trainer(**{**PPO, **fields})
        trainer.train()
        folder = tmp_path / "earlier"
        trainer.save_model(str(folder))
        return folder

    return run


def go_on(make_trainer, base, folder, sft_adapter, **fields):
    policy = load_policy(AutoModelForCausalLM.from_pretrained(base), folder)
    return make_trainer(model=policy, reference_adapter=str(sft_adapter), **{**PPO, **fields})


def test_the_kl_is_to_the_reference_from_the_first_rollout_on(make_trainer, earlier, base, sft_adapter):
    """What is logged of the first rollout is computed again from its tokens, by two models loaded with PEFT alone."""
    folder = earlier()
    seen = []

    def watch(prompt_ids, completion_ids, **kwargs):
        seen.append((prompt_ids, completion_ids))
        return [float(len(ids)) for ids in completion_ids]

    trainer = go_on(make_trainer, base, folder, sft_adapter, reward_funcs=watch, max_steps=1, logging_steps=1)
    trainer.train()
    models = [AutoPeftModelForCausalLM.from_pretrained(str(path)).eval() for path in (folder, sft_adapter)]
    with torch.no_grad():
        kl = [ratio(models, *row) for row in zip(*seen[0], strict=True)]
    logged = trainer.state.log_history[0]["kl"]
    assert logged == pytest.approx(sum(kl) / len(kl), abs=1e-5)
    assert abs(logged) > 1e-3, "the earlier run moved the policy"
    reference = get_peft_model_state_dict(trainer.roles.model, adapter_name=REFERENCE)
    for name, weight in load_file(sft_adapter / WEIGHTS).items():
        assert torch.equal(reference[name], weight), name


def ratio(models, prompt, completion):
    """Log of the probability of a completion under the first model over that under the second."""
    ids = torch.tensor([[*prompt, *completion]])
    policy, reference = (
        model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)[range(len(completion)), completion].sum()
        for model in models
    )
    return (policy - reference).item()


@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_the_critic_goes_on(critic, make_trainer, earlier, base, sft_adapter):
    folder = earlier(critic=critic)
    trainer = go_on(make_trainer, base, folder, sft_adapter, critic=critic, critic_model=str(folder / "critic"))
    saved = load_file(folder / "critic" / WEIGHTS)
    assert torch.equal(trainer.roles.heads[CRITIC].weight, saved["base_model.model.score.weight"])
    assert saved["base_model.model.score.weight"].any()
    if critic == "adapter":
        own = get_peft_model_state_dict(trainer.roles.model, adapter_name=CRITIC)
        assert own
        assert all(torch.equal(own[name], saved[name]) for name in own)
    trainer.train()
    assert not torch.equal(trainer.roles.heads[CRITIC].weight, saved["base_model.model.score.weight"]), "it is trained"


def test_what_cannot_go_on_is_refused(make_trainer, base, sft_adapter, reward_adapter, tmp_path):
    cases = [
        ({"critic_model": str(tmp_path / "none")}, "`critic_model` is the folder `critic` of an earlier PPO run"),
        ({"critic_model": str(reward_adapter), "critic_init": "reward"}, "`critic_model` names a critic that goes on"),
        ({"subtract_reference_mean": True, "reference_adapter": str(sft_adapter)}, "takes the first rollout for the"),
        ({"reference_adapter": str(reward_adapter)}, "is a reward model's or a critic's"),
        ({"reference_adapter": str(tmp_path)}, "holds no adapter"),
        ({"model": base, "reference_adapter": str(sft_adapter)}, "for a policy that goes on from a trained adapter"),
    ]
    for fields, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            make_trainer(**{"critic": "adapter", **fields})
