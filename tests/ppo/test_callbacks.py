"""Callbacks that copy, average or save the model that they are given see the policy, and nothing else."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl import BEMACallback, SyncRefModelCallback

STEPS = {"max_steps": 3, "num_iterations": 1}


def count(completion_ids, **kwargs):
    return [0.1 * len(ids) for ids in completion_ids]


class Copier(TrainerCallback):
    """Keep a copy of the model after each step, and its state."""

    def __init__(self):
        self.copies, self.states = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.copies.append(copy.deepcopy(model))
        self.states.append({name: value.clone() for name, value in model.state_dict().items()})


@pytest.fixture
def critic_model(tiny_model_path):
    return AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1)


@pytest.mark.parametrize("critic", ["adapter", "head", "model"])
def test_of_a_whole_model_they_see_the_policy(make_trainer, tiny_model_path, critic_model, tmp_path, critic):
    """`BEMACallback` with fixed weights (powers of 0) ends at EMA + policy - start, worked out from copies."""
    start = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    copier, folder = Copier(), tmp_path / "run"
    average = BEMACallback(update_freq=1, ema_power=0.5, bias_power=0.0)
    fields = {"critic_model": critic_model} if critic == "model" else {}
    fields |= {"model": tiny_model_path, "reward_funcs": count, "critic": critic, "output_dir": str(folder)}
    trainer = make_trainer(**STEPS, **fields, callbacks=[copier, average])
    trainer.train()
    names = start.state_dict().keys()
    assert all(state.keys() == names for state in copier.states)
    for name, weight in trainer.model.named_parameters():
        if name in names:
            assert torch.equal(copier.states[-1][name], weight), name
            assert torch.equal(copier.copies[-1].get_parameter(name), weight), name
    ids = torch.tensor([[6, 7, 8, 9]])
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (*copier.copies, trainer.model)]
    assert_close(logits[-2], logits[-1], atol=0, rtol=0)
    assert (logits[0] - logits[-1]).abs().max() > 1e-4, "a copy keeps the weights of its time"
    averaged = AutoModelForCausalLM.from_pretrained(folder / "bema")
    for name, weight in averaged.named_parameters():
        first = ema = start.get_parameter(name)
        for step, state in enumerate(copier.states, start=1):
            beta = (10 + step) ** -0.5
            ema = (1 - beta) * ema + beta * state[name]
        assert_close(weight, ema + copier.states[-1][name] - first, atol=1e-6, rtol=1e-5)
    assert (averaged.model.norm.weight != start.model.norm.weight).any()


def test_of_an_adapter_they_can_copy_the_weights(make_trainer):
    copier = Copier()
    trainer = make_trainer(**STEPS, callbacks=[copier])
    trainer.train()
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(copier.copies[-1].get_parameter(name), weight), name
        assert weight.requires_grad != torch.equal(copier.copies[0].get_parameter(name), weight), name


def test_callbacks_that_cannot_work_are_refused(make_trainer, tiny_model_path):
    fresh = {"model": tiny_model_path, "peft_config": LoraConfig(task_type="CAUSAL_LM"), "reward_funcs": count}
    with pytest.raises(ValueError, match="`BEMACallback` builds a second model .* cannot be done for an adapter"):
        make_trainer(**STEPS, **fresh, callbacks=[BEMACallback()]).train()
    trainer = make_trainer(**STEPS)
    trainer.add_callback(SyncRefModelCallback(ref_model=trainer.model, accelerator=trainer.accelerator))
    with pytest.raises(ValueError, match="`SyncRefModelCallback` has no effect: the reference is frozen"):
        trainer.train()
