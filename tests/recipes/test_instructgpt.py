"""The recipe of InstructGPT for two steps of each stage, and the rankings that it makes."""

import math

import pytest
import torch
from safetensors.torch import load_file

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows
from rlhf_recipes.data.preferences import from_rankings
from rlhf_recipes.models import load_tokenizer
from rlhf_recipes.models.readout import Readout


def test_two_steps_of_each_stage(run_stage, run_script, repo_root, small_world, tmp_path, capsys):
    recipe, base, rankings = repo_root / "recipes" / "instructgpt", small_world / "base", tmp_path / "rankings"

    def stage(name, dataset_name, **options):
        given = {"config": recipe / f"{name}.yaml", "model_name_or_path": base, "dataset_name": dataset_name}
        # Not in 4 bits: the scores are normalised on a float32 base, which is another one for so small a model
        return run_stage(name, **given, output_dir=tmp_path / name, load_in_4bit=False, **options)

    sft = stage("sft", small_world / "sft.jsonl")
    options = {"prompts": 16, "texts": 12, "max_new_tokens": 8, "sft_adapter": sft.folder, "world": small_world}
    run_script("instructgpt/rank", **options, output_dir=rankings)
    rows = load_rows(str(rankings))
    sizes = [len(row["completions"]) for row in rows]
    pairs = sum(math.comb(size, 2) for size in sizes)
    assert f"{len(rows)} rankings of {sum(sizes)} completions, {pairs} pairs" in capsys.readouterr().out
    assert len(set(sizes)) > 1
    assert all(4 <= size <= 9 for size in sizes)
    tokenizer = load_tokenizer(str(base))
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"])
        texts = [tokenizer.decode(ids[start:], skip_special_tokens=True) for ids in row["completion_ids"]]
        assert row["completions"] == [f" {text}" for text in texts]
        assert min(row["ranks"]) == 1

    reward = stage("reward", rankings, per_device_train_batch_size=2)
    assert reward.trainer.args.objective == "ranking"
    assert reward.evaluation["n"] >= 6
    demonstrations = {"reward_model": reward.folder, "dataset_name": small_world / "sft.jsonl", "mode": "mean_only"}
    run_script("normalize_reward", **demonstrations)
    assert Readout.load(reward.folder).gain == 1.0
    assert Readout.load(reward.folder).bias != 0.0

    ppo = stage(
        "ppo",
        small_world,
        sft_adapter=sft.folder,
        reward_adapter=reward.folder,
        gold_score=small_world / "gold.json",
        ptx_dataset=rankings / "pretraining",
        ptx_batch_size=2,
        per_device_train_batch_size=2,
        max_completion_length=6,
        logging_steps=1,
        log_completions=False,
        evaluation_rows=4,
    )
    losses = [entry["ppo/ptx_loss"] for entry in ppo.trainer.state.log_history if "ppo/ptx_loss" in entry]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
    assert ppo.evaluation["ema"].keys() >= ppo.evaluation["policy"].keys() | {"win_rate", "win_rate_ci"}
    start, average, policy = (
        load_file(folder / "adapter_model.safetensors") for folder in (sft.folder, ppo.folder / "ema", ppo.folder)
    )
    moved = [name for name in policy if not torch.equal(policy[name], start[name])]
    assert moved
    for name in moved:  # after two updates it is nearly where it began
        assert (average[name] - start[name]).norm() < 0.02 * (policy[name] - start[name]).norm()


@pytest.mark.parametrize("sizes", [("1", "9"), ("5", "4")])
def test_a_ranking_of_one_is_refused(load_stage, sizes):
    words = ["--min_completions", sizes[0], "--max_completions", sizes[1]]
    with pytest.raises(ValueError, match="A ranking compares 2 or more completions"):
        parse_stage(load_stage("instructgpt/rank").ARGUMENTS, words)


def test_rows_that_rank_one_completion_are_refused():
    with pytest.raises(ValueError, match="there is only one"):
        from_rankings([{"prompt": "Hi", "completions": ["Hello!"], "ranks": [1]}])
