"""The evaluation while a policy trains: what it measures, and that the training does not notice."""

import json
import random
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerState
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from rlhf_recipes.evaluation.callbacks import PolicyEvaluation
from rlhf_recipes.evaluation.judges import PairJudge
from rlhf_recipes.evaluation.policy import evaluate_policy
from tests.ppo.support import trained

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
}


def gold_length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def restless(completion_ids, log_extra=None, log_metric=None, **kwargs):
    """A reward that uses chance and logs: in an evaluation neither may reach the training."""
    log_metric("mine", 1.0)
    log_extra("extra", [0] * len(completion_ids))
    return [random.random() + np.random.rand() + torch.rand(()).item() for _ in completion_ids]


@pytest.fixture
def ppo(make_trainer, reward_adapter):
    def make(**fields):
        weights = {"reward_weights": [1.0, 0.0]}
        return make_trainer(reward_funcs=[str(reward_adapter), gold_length], **{**weights, **fields})

    return make


def evaluated(trainer, dataset, **options):
    """Train with the hook and return what it logged, by step, and the lines of its file."""
    trainer.add_callback(PolicyEvaluation(trainer, dataset, **options))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "eval_policy/length" in entry]
    path = re.sub("$", "/policy_evaluation.jsonl", trainer.args.output_dir)
    with open(path, encoding="utf-8") as file:
        return logs, [json.loads(line) for line in file]


def test_ppo_with_it_trains_bitwise_as_without(make_trainer, prompts, reward_adapter, tmp_path):
    weights, logs = [], []
    for hook in (False, True):
        trainer = make_trainer(reward_funcs=[str(reward_adapter), restless], output_dir=str(tmp_path / str(hook)))
        if hook:
            trainer.add_callback(PolicyEvaluation(trainer, prompts, every=1, rows=12))
        trainer.train()
        weights.append(trained(trainer))
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        logs[-1] = [{key: value for key, value in row.items() if "time" not in key} for row in logs[-1]]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert logs[0] == logs[1], "nothing of an evaluation is in the training's metrics"


def test_every_so_many_steps_and_at_the_end(ppo, prompts):
    logs, lines = evaluated(ppo(max_steps=5), prompts, every=2, rows=8, gold="gold_length")
    assert [entry["step"] for entry in logs] == [line["step"] for line in lines] == [2, 4, 5]
    for entry, line in zip(logs, lines, strict=True):
        metrics = {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
        assert metrics == {key: value for key, value in line.items() if key not in ("step", "seed", "samples")}
    assert set(lines[0]["samples"][0]) == {
        *("prompt", "policy", "policy_reward", "policy_gold", "reference", "reference_reward", "reference_gold"),
        "outcome",
    }
    assert len(lines[0]["samples"]) == 8


@pytest.mark.parametrize(("every", "at_end", "steps"), [(2, True, [2, 4]), (3, False, [3]), (9, True, [4])])
def test_the_last_step_is_evaluated_once(ppo, prompts, every, at_end, steps):
    logs, _ = evaluated(ppo(max_steps=4), prompts, every=every, rows=4, at_end=at_end)
    assert [entry["step"] for entry in logs] == steps


def test_the_numbers_are_those_of_the_evaluation_at_the_end(ppo, prompts):
    trainer = ppo()
    [*_, last], _ = evaluated(trainer, prompts, rows=12, seed=3, gold="gold_length")
    expected = evaluate_policy(trainer, prompts, gold="gold_length", rows=12, seed=3)
    for side in ("policy", "reference"):
        del expected[side]["rewards"]  # those of the evaluation at the end alone
        for name, value in expected[side].items():
            assert last[f"eval_{side}/{name}"] == pytest.approx(value, rel=1e-6), (side, name)
    assert last["eval_win_rate"] == expected["win_rate"]
    assert [last["eval_win_rate_low"], last["eval_win_rate_high"]] == expected["win_rate_ci"]
    assert last["eval_policy/truncation_rate"] == 1 - expected["policy"]["eos_rate"]


def test_an_untrained_policy_is_measured_like_its_reference(ppo, prompts):
    [entry], _ = evaluated(ppo(learning_rate=0.0, max_steps=1), prompts, rows=64)
    assert entry["eval_policy/kl"] == entry["eval_policy/kl_per_token"] == 0.0
    assert entry["eval_policy/entropy"] == pytest.approx(entry["eval_reference/entropy"], rel=0.1)
    assert 0.2 < entry["eval_length_controlled_win_rate"] < 0.8
    assert "eval_policy/gold_score" not in entry


def grpo_like(trainer_class, config_class, sft_adapter, prompts, tmp_path, **fields):
    from transformers import AutoModelForCausalLM

    from rlhf_recipes.models import load_policy, load_tokenizer

    base = json.loads((sft_adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    args = config_class(
        str(tmp_path / "run"),
        num_generations=2,
        max_completion_length=6,
        reward_weights=[1.0, 0.0],
        **COMMON | fields,
    )
    return trainer_class(
        model=load_policy(AutoModelForCausalLM.from_pretrained(base), sft_adapter),
        reward_funcs=[restless, gold_length],
        args=args,
        train_dataset=prompts,
        processing_class=load_tokenizer(base),
    )


@pytest.mark.parametrize(("trainer_class", "config_class"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_grpo_and_rloo_are_compared_with_their_reference(trainer_class, config_class, sft_adapter, prompts, tmp_path):
    trainer = grpo_like(trainer_class, config_class, sft_adapter, prompts, tmp_path, beta=0.1)
    requires_grad = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
    logs, lines = evaluated(trainer, prompts, every=1, rows=8, gold="gold_length")
    assert {name: p.requires_grad for name, p in trainer.model.named_parameters()} == requires_grad
    assert [entry["step"] for entry in logs] == [1, 2]
    for side in ("policy", "reference"):
        assert logs[0][f"eval_{side}/gold_score"] == logs[0][f"eval_{side}/length"]
    assert logs[0]["eval_reference/kl"] == pytest.approx(0.0, abs=1e-6)
    assert logs[1]["eval_policy/kl"] != 0.0
    assert {"eval_win_rate", "eval_length_controlled_reward"} <= set(logs[0])
    assert isinstance(lines[0]["samples"][0]["policy"], str)
    assert not any("eval" in key for entry in trainer.state.log_history if "loss" in entry for key in entry)


def test_grpo_with_it_trains_bitwise_as_without(sft_adapter, prompts, tmp_path):
    weights = []
    for hook in (False, True):
        trainer = grpo_like(GRPOTrainer, GRPOConfig, sft_adapter, prompts, tmp_path / str(hook), beta=0.1)
        if hook:
            trainer.add_callback(PolicyEvaluation(trainer, prompts, every=1, rows=8))
        trainer.train()
        weights.append(trained(trainer))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_kl_of_any_trainer_is_the_sum_over_the_completion(sft_adapter, prompts, tmp_path):
    """Against log-probabilities of each unpadded sequence by itself."""
    from rlhf_recipes.evaluation.sampling import network, sample_rows

    trainer = grpo_like(GRPOTrainer, GRPOConfig, sft_adapter, prompts, tmp_path, beta=0.1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".default." in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    trainer.model.eval()
    samples = sample_rows(trainer, prompts, [0, 1, 2, 3], of_reference=False, gold=None, seed=0)
    for index, sample in enumerate(samples):
        prompt = trainer.processing_class(prompts[index]["prompt"])["input_ids"]
        ids = torch.tensor([prompt + sample["completion_ids"]])
        with torch.no_grad():
            ours = trainer.model(input_ids=ids).logits[0].log_softmax(-1)
            with network(trainer, of_reference=True) as reference:
                theirs = reference(input_ids=ids).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, ids.size(1) - 1)
        kl = sum((ours - theirs)[place, ids[0, place + 1]].item() for place in places)
        entropy = sum(-(ours[place].exp() * ours[place]).sum().item() for place in places)
        assert sample["kl"] == pytest.approx(kl, abs=1e-4)
        assert sample["entropy"] == pytest.approx(entropy, rel=1e-4)
        assert sample["length"] == len(sample["completion_ids"])


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "whole"])
def test_sft_has_what_needs_no_reward(tiny_model_path, prompts, tmp_path, lora):
    rows = Dataset.from_list([{"prompt": text, "completion": " is good"} for text in prompts["prompt"]])
    trainer = SFTTrainer(
        model=tiny_model_path,
        args=SFTConfig(str(tmp_path / "run"), **COMMON),
        train_dataset=rows,
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM") if lora else None,
    )
    [entry], [line] = evaluated(trainer, rows, rows=6, max_new_tokens=5)
    assert entry["eval_policy/length"] <= 5
    assert "eval_win_rate" not in entry
    assert ("eval_policy/kl" in entry) == ("eval_reference/entropy" in entry) == lora
    assert line["samples"][0]["policy_reward"] is None


def test_a_judge_is_asked_and_its_failures_are_survived(ppo, prompts):
    def longer(prompt, first, second):
        return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"

    def broken(prompt, first, second):
        raise TimeoutError("no answer")

    [entry], _ = evaluated(ppo(max_steps=1), prompts, rows=8, judge=PairJudge(longer, "longer"))
    assert 0.0 <= entry["eval_judge_win_rate"] <= 1.0
    assert (entry["eval_judge_agreement"], entry["eval_judge_failure_rate"]) == (1.0, 0.0)
    [entry], _ = evaluated(ppo(max_steps=1), prompts, rows=8, judge=PairJudge(broken, "broken"))
    assert entry["eval_judge_failure_rate"] == 1.0

    class Worse:
        def compare(self, prompts, pairs):
            raise RuntimeError("not even this")

    [entry], _ = evaluated(ppo(max_steps=1), prompts, rows=8, judge=Worse())
    assert not any(key.startswith("eval_judge") for key in entry)


def test_a_resumed_run_keeps_the_lines_up_to_its_checkpoint(ppo, prompts):
    trainer = ppo()
    hook = PolicyEvaluation(trainer, prompts)
    hook._file().parent.mkdir(parents=True, exist_ok=True)
    hook._file().write_text('{"step": 2, "win_rate": 0.5}\n{"step": 4, "win_rate": 0.6}\n{"step": 6, "win_r')
    hook.on_train_begin(trainer.args, TrainerState(global_step=3, is_world_process_zero=True), trainer.control)
    assert [json.loads(line) for line in hook._file().read_text().splitlines()] == [{"step": 2, "win_rate": 0.5}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gold": "golden"}, r"No reward function is named 'golden'; there are \['reward', 'gold_length'\]"),
        ({"every": 0}, "`every` must be at least 1, got 0"),
        ({"rows": 0}, "`rows` must be at least 1, got 0"),
    ],
)
def test_options_are_checked(ppo, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        PolicyEvaluation(ppo(), prompts, **options)


def test_an_empty_dataset_is_refused(ppo):
    with pytest.raises(ValueError, match="at least one held-out prompt"):
        PolicyEvaluation(ppo(), Dataset.from_list([]))
