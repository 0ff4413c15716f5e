"""The average of the policy's weights: a sum made by hand, on disk, in evaluations and over a stop."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, TrainerCallback

from rlhf_recipes.evaluation import evaluate_policy, write_evaluation
from rlhf_recipes.models import load_causal_lm
from rlhf_recipes.models.roles import is_critic_parameter
from tests.ppo.support import logged, trained, without_chance

DECAY = 0.7


class Weights(TrainerCallback):
    """The policy's weights after each optimizer step, in float64."""

    def __init__(self):
        self.after = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.after.append(policy_of(model))

    on_step_end = on_train_begin


def policy_of(model):
    named = model.named_parameters()
    return {name: p.detach().double() for name, p in named if p.requires_grad and not is_critic_parameter(name)}


def average_of(trainer):
    with trainer.average.in_place():
        return {name: weight.clone() for name, weight in policy_of(trainer.model).items()}


def by_hand(steps, made):
    """The recursion, for each weight, over the updates that were made."""
    average = steps[0]
    for weights, was_made in zip(steps[1:], made, strict=True):
        if was_made:
            average = {name: DECAY * old + (1 - DECAY) * weights[name] for name, old in average.items()}
    return average


@pytest.mark.parametrize(
    ("fields", "made"),
    [
        ({"num_iterations": 2, "max_steps": 4}, [1, 1, 1, 1]),
        ({"num_iterations": 3, "max_steps": 6, "target_kl": 1e-7}, [1, 0, 0, 1, 0, 0]),
    ],
    ids=["all updates", "updates dropped"],
)
def test_it_is_the_recursion_over_the_updates_that_were_made(make_trainer, fields, made):
    seen = Weights()
    trainer = without_chance(make_trainer(ema_decay=DECAY, learning_rate=1e-2, callbacks=[seen], **fields))
    trainer.train()
    assert logged(trainer, "ppo/updates_made") == made
    expected, average = by_hand(seen.after, made), average_of(trainer)
    assert_close(average, expected, rtol=0, atol=1e-6)
    last = policy_of(trainer.model)
    assert all(torch.equal(last[name], seen.after[-1][name]) for name in last), "the policy has its own weights again"
    assert max((last[name] - average[name]).abs().max().item() for name in last) > 1e-3


def test_steps_of_the_critic_alone_do_not_count(make_trainer):
    seen = Weights()
    fields = {"critic_warmup_steps": 2, "max_steps": 4, "num_iterations": 2}
    trainer = without_chance(make_trainer(ema_decay=DECAY, callbacks=[seen], **fields))
    trainer.train()
    first, *_, last = seen.after
    assert all(torch.equal(first[name], seen.after[2][name]) for name in first), "only the critic was trained"
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert_close(average_of(trainer), by_hand(seen.after, [0, 0, 1, 1]), rtol=0, atol=1e-6)


@pytest.fixture
def trained_run(make_trainer, tmp_path):
    """A run with an average, saved in `run/`."""
    trainer = without_chance(make_trainer(ema_decay=DECAY, learning_rate=1e-2, max_steps=3))
    trainer.train()
    trainer.save_model()
    return trainer


def test_its_folder_is_an_adapter_like_any_other(trained_run, tiny_model_path, prompts, tmp_path):
    """PEFT loads it without this package, and it computes what the base does with the averaged weights."""
    ids = trained_run.processing_class(prompts[0]["prompt"], return_tensors="pt")["input_ids"]
    folder = tmp_path / "run" / "ema"
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    average = {name.replace(".default.", "."): weight for name, weight in average_of(trained_run).items()}
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == average.keys()
    assert all(torch.equal(saved[name].double(), average[name]) for name in saved)
    with torch.no_grad(), trained_run.average.in_place():
        expected = trained_run.model.eval()(input_ids=ids).logits
    with torch.no_grad():
        assert_close(loaded(input_ids=ids).logits, expected)
        assert not torch.allclose(trained_run.model(input_ids=ids).logits, expected, atol=1e-3)
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "trained_on.json").is_file()


def test_the_evaluation_says_how_good_both_are(trained_run, make_trainer, prompts, tmp_path):
    evaluation = evaluate_policy(trained_run, prompts, rows=16)
    alone = make_trainer()  # the same reference, and the average from the disk as its policy
    alone.roles.load(tmp_path / "run" / "ema", "default", "default")
    expected = evaluate_policy(alone, prompts, rows=16)
    assert "ema" not in expected
    ema = evaluation["ema"]
    assert {name: ema[name] for name in expected["policy"]} == expected["policy"]
    assert (ema["win_rate"], ema["win_rate_ci"]) == (expected["win_rate"], expected["win_rate_ci"])
    assert evaluation["reference"] == expected["reference"]
    assert evaluation["policy"]["kl"] != ema["kl"]
    assert evaluate_policy(trained_run, prompts, rows=16)["policy"] == evaluation["policy"], "it changes nothing"
    lines = write_evaluation(evaluation, tmp_path / "run").splitlines()
    assert next(line.split()[-3:] for line in lines if "held-out" in line) == ["policy", "ema", "reference"]
    low, high = ema["win_rate_ci"]
    rate = f"with the average of its weights (ema): {ema['win_rate']:.3f}, 95 % interval [{low:.3f}, {high:.3f}]"
    assert rate in lines


def test_it_goes_on_exactly_in_the_middle_of_a_rollout(make_trainer, tmp_path):
    fields = {"ema_decay": DECAY, "num_iterations": 3, "max_steps": 5}
    saving = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "whole")}
    whole = make_trainer(**fields, **saving)
    whole.train()
    resumed = make_trainer(**fields, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    expected = average_of(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in average_of(resumed).items())
    assert all(torch.equal(weight, trained(whole)[name]) for name, weight in trained(resumed).items())


def test_a_checkpoint_without_an_average_is_refused(make_trainer, tmp_path):
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    with pytest.raises(ValueError, match="`ema_decay` is 0.7, but .* holds no average of weights"):
        make_trainer(max_steps=2, ema_decay=DECAY).train(resume_from_checkpoint=str(checkpoint))


def test_a_whole_model_has_one_too(make_trainer, tiny_model_path, tmp_path):
    seen = Weights()
    fields = {"model": load_causal_lm(tiny_model_path, dtype=torch.float32), "max_steps": 2, "ema_decay": DECAY}
    trainer = without_chance(make_trainer(**fields, callbacks=[seen], save_strategy="steps", save_steps=1))
    trainer.train()
    expected = by_hand(seen.after, [1, 1])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2" / "ema")
    found = {name: weight.double() for name, weight in saved.named_parameters()}
    assert found.keys() == expected.keys()
    assert_close(found, expected, rtol=0, atol=1e-6)
    trainer._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-1"))
    assert_close(average_of(trainer), by_hand(seen.after[:2], [1]), rtol=0, atol=1e-6)


def test_weights_in_16_bits_are_refused(make_trainer, tiny_model_path):
    model = load_causal_lm(tiny_model_path, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="needs trained weights in float32, but the policy's are in torch.bfloat16"):
        make_trainer(model=model, ema_decay=DECAY)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5, -0.1, float("nan")])
def test_decays_that_average_nothing_are_refused(make_config, decay):
    with pytest.raises(ValueError, match="`ema_decay` must lie between 0 and 1, both excluded, got"):
        make_config(ema_decay=decay)
