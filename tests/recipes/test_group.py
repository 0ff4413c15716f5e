"""GRPO, RLOO and R1-Zero as stages: two steps of each recipe, with the rewards, hooks and evaluation of PPO."""

import json
import sys
from types import SimpleNamespace

import pytest

from rlhf_recipes.rewards import gym_rows
from rlhf_recipes.tools.report.reading import read_runs

SMALL = {
    "per_device_train_batch_size": 8,
    "steps_per_generation": 1,
    "num_iterations": 1,
    "num_generations": 4,
    "max_completion_length": 6,
    "logging_steps": 1,
    "evaluation_rows": 8,
}


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_two_steps_with_the_yaml_of_the_recipe(
    stage, run_stage, repo_root, write_rows, tiny_texts, sft_adapter, reward_adapter, tmp_path
):
    run = run_stage(
        "grpo",
        config=repo_root / "recipes" / "grpo_rloo" / f"{stage}.yaml",
        **SMALL,
        load_in_4bit=False,
        sft_adapter=sft_adapter,
        reward_adapter=reward_adapter,
        gold_score=reward_adapter,
        dataset_name=write_rows([{"prompt": text} for text in tiny_texts]),
        dataset_train_split="train",
        dataset_test_split="null",
        test_size=0.25,
        alarm_kl_budget=1e-9,
        evaluation_steps=2,
        output_dir=tmp_path / "tiny" / stage,
    )
    assert run.trainer.state.global_step == 2
    assert type(run.trainer).__name__ == {"grpo": "GRPOAdapterTrainer", "rloo": "RLOOAdapterTrainer"}[stage]
    assert run.trainer.reward_weights.tolist() == [1.0, 0.0], "the judge does not count"
    assert run.evaluation["win_rate_by"] == "gold_score"
    assert run.evaluation["reference"]["kl"] == 0.0
    assert run.evaluation["policy"]["kl"] != 0.0
    steps = [entry for entry in run.trainer.state.log_history if "reward" in entry]
    points = json.loads((run.folder / "frontier.json").read_text())["training"]["points"]
    assert [point["kl"] for point in points] == [entry["kl"] for entry in steps]
    assert json.loads((run.folder / "alarms.json").read_text()) == [], "two steps are less than a window"
    assert len((run.folder / "policy_evaluation.jsonl").read_text().splitlines()) == 1
    assert (run.folder / "completions").is_dir() == (stage == "grpo"), "TRL writes them for GRPO only"
    record = json.loads((run.folder / "run.json").read_text())
    assert record["stage"] == stage
    assert [parent["path"] for parent in record["parents"]] == [str(sft_adapter), str(reward_adapter)]
    [stage_of_report] = read_runs([run.folder])[0].stages
    assert (stage_of_report.kind, stage_of_report.trained) == ("ppo", True)


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_a_stage_without_a_reward_says_what_to_set(stage, run_stage, write_rows, tiny_texts, sft_adapter):
    rows = write_rows([{"prompt": text} for text in tiny_texts])
    with pytest.raises(ValueError, match=f"{stage.upper()} needs a reward: set `reward_adapter`"):
        run_stage("grpo", **SMALL, algorithm=stage, dataset_name=rows, sft_adapter=sft_adapter)


@pytest.fixture
def gym(monkeypatch):
    """A reasoning-gym of one task, whose questions are in the words of the tiny tokenizer."""
    words = ("film", "story", "actor", "ending", "scene", "plot", "music", "good", "bad", "great")

    def questions(task, size, seed, **options):
        for number in range(seed, seed + size):
            word = words[number % len(words)]
            yield {"question": f"write {word} {number}", "answer": word, "metadata": {"source_dataset": task}}

    fake = SimpleNamespace(
        factory=SimpleNamespace(DATASETS={"chain_sum": None}),
        get_score_answer_fn=lambda task: lambda answer, entry: float(answer == entry["answer"]),
        create_dataset=questions,
    )
    monkeypatch.setitem(sys.modules, "reasoning_gym", fake)


def test_r1_for_two_steps(gym, run_stage, repo_root, write_rows, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, seed in (("train", 0), ("test", 1000)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in gym_rows("chain_sum", 12, seed))
        )
    config = repo_root / "recipes" / "r1" / "grpo.yaml"
    run = run_stage("r1/train", config=config, **SMALL, dataset_name=folder, output_dir=tmp_path / "tiny" / "r1")
    assert run.trainer.state.global_step == 2
    assert run.trainer.reward_func_names == ["gym_accuracy", "format_reward"]
    assert run.trainer.reward_weights.tolist() == pytest.approx([1.0, 0.2])
    assert run.evaluation["policy"]["rewards"] == {"gym_accuracy": 0.0, "format_reward": 0.0}
    assert run.evaluation["win_rate_by"] == "gold_score"
    trained = [name for name, parameter in run.trainer.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".default." in name for name in trained)


@pytest.mark.slow  # reasoning-gym takes seconds to import
def test_questions_and_texts_of_r1(load_script, repo_root, tmp_path, capsys):
    script = load_script(repo_root / "recipes" / "r1" / "tasks.py")
    folder = tmp_path / "tasks"
    options = {"train_rows": 300, "test_rows": 50, "texts": 200, "slips": 0.0, "untagged": 0.5}
    script.main(script.TaskArguments(str(folder), **options))
    rows = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test", "texts")
    }
    prompts = {name: {row["prompt"] for row in rows[name]} for name in ("train", "test")}
    assert not prompts["train"] & prompts["test"]
    answers = {row["prompt"]: row["answer"] for row in rows["train"]}
    tagged = [row["text"] for row in rows["texts"] if "<answer>" in row["text"]]
    assert 50 < len(tagged) < 150
    for text in tagged:
        prompt, _, worked = text.partition("\n")
        thought, _, answer = worked.removeprefix("<think>").removesuffix("</answer>").partition("</think><answer>")
        assert answer == answers[f"{prompt}\n"] == thought.rpartition(" = ")[2]
        assert all(eval(step.partition(" = ")[0]) == int(step.partition(" = ")[2]) for step in thought.split(", "))
    with pytest.raises(ValueError, match="`texts` are worked sums, of the task chain_sum, but `task` is 'gcd'"):
        script.main(script.TaskArguments(str(tmp_path / "other"), task="gcd", texts=1))
