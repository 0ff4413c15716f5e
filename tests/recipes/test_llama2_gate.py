"""The recipe of Llama 2, two steps of each stage: two reward models, the best of K, SFT on them, PPO with a gate."""

import json

import pytest

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows
from rlhf_recipes.data.preferences import LLAMA2_LARGE_MARGINS

PROMISES = {"perfect", "superb", "excellent", "brilliant", "splendid", "adored"}
RIDES = {"ferry", "tram", "taxi", "train"}


@pytest.fixture
def stage(run_stage, repo_root, small_world, tmp_path):
    """Run a stage with its own YAML on the small world."""

    def run(name, script, dataset_name, **options):
        given = {"config": repo_root / "recipes" / "llama2_gate" / f"{name}.yaml"}
        given |= {"model_name_or_path": small_world / "base", "dataset_name": dataset_name}
        return run_stage(script, **given, output_dir=tmp_path / name, **options)

    return run


@pytest.fixture
def sft(stage, small_world):
    """Folder of the SFT stage."""
    return stage("sft", "sft", small_world / "sft.jsonl").folder


@pytest.fixture
def annotated(run_script, small_world, sft, tmp_path):
    """Pairs of either annotator, and tagged prompts; their grades are those of the points between two reviews."""
    options = {"world": small_world, "sft_adapter": sft, "pairs": 40, "max_new_tokens": 8}
    folder, large = tmp_path / "annotated", tmp_path / "large"
    run_script("llama2_gate/annotate", **options, output_dir=folder)
    run_script("llama2_gate/annotate", **options, output_dir=large, margins="large")
    pairs = load_rows(str(folder / "safety"))
    for row in pairs:
        counts = [len(PROMISES.intersection(row[side].split())) for side in ("chosen", "rejected")]
        assert counts[0] != counts[1], "pairs that are equally safe are left out"
        # one promise costs 3 tanh(1 / 3) = 0.96 points, two cost 1.75
        assert row["strength"] != "slightly better" or abs(counts[0] - counts[1]) == 1
        assert row["strength"] != "better" or min(counts) == 0
    margins = [LLAMA2_LARGE_MARGINS[strength] for strength in pairs["strength"]]
    assert load_rows(str(large / "safety"))["margin"][:] == margins
    return folder


def test_two_steps_of_each_stage(stage, annotated, run_script, repo_root, small_world, sft, tmp_path, capsys):
    helpful = stage("reward", "reward", annotated / "helpfulness").folder
    safe = stage("safety", "reward", annotated / "safety").folder
    prompts = load_rows(str(annotated / "prompts"))
    assert all(row["unsafe"] == bool(RIDES.intersection(row["prompt"].split())) for row in prompts)

    given = {"config": repo_root / "recipes" / "llama2_gate" / "rejection.yaml", "disable_tqdm": True}
    given |= {"model_name_or_path": small_world / "base", "dataset_name": annotated / "prompts", "sft_adapter": sft}
    given |= {"reward_adapter": helpful, "gate_adapter": safe, "max_train_rows": 24, "max_completion_length": 12}
    given |= {"output_dir": tmp_path / "rejection"}
    run_script("rejection_sampling", **given, best_of=4)
    assert "24 prompts, 4 completions each: mean score" in capsys.readouterr().out
    samples = load_rows(str(tmp_path / "rejection"), split="samples")
    assert len(samples) == 96
    assert set(samples["unsafe"]) == {True, False}
    run_script("rejection_sampling", **given, best_of=4)
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="other settings: `best_of` 4 there, and 5 now"):
        run_script("rejection_sampling", **given, best_of=5)

    winners = stage("winners", "sft", tmp_path / "rejection")
    ppo = stage(
        "ppo",
        "ppo",
        annotated / "prompts",
        sft_adapter=winners.folder,
        reward_adapter=helpful,
        gate_adapter=safe,
        gold_score=small_world / "gold.json",
        max_test_rows=8,
        per_device_train_batch_size=2,
        max_completion_length=6,
        logging_steps=1,
        log_completions=False,
        evaluation_rows=4,
    )
    assert ppo.trainer.reward_func_names == ["gated", "gold_score"]
    entry = next(entry for entry in ppo.trainer.state.log_history if "rewards/gated/gated" in entry)
    assert 0.0 < entry["rewards/gated/gated"] <= 1.0
    assert "rewards/gated/safety" in entry
    assert [transform.name for transform in ppo.trainer.token_rewards.transforms] == ["scale_scores"]

    policies = [str(sft), str(ppo.folder)]
    places = {"world": small_world, "annotated": annotated}
    run_script("llama2_gate/compare", policies=policies, rows=48, max_new_tokens=6, **places)
    table = json.loads((annotated / "comparison.json").read_text())
    assert list(table) == policies
    for row in [row for rows in table.values() for row in rows]:
        assert 0.0 <= row["promises"] <= 1.0
        assert (row["safe"] < 0.0) == (row["promises"] > 0.0)


@pytest.mark.parametrize("option", [("best_of", "1"), ("best_of", "0"), ("prompts_per_round", "0")])
def test_the_best_of_one_is_refused(load_stage, option):
    with pytest.raises(ValueError, match=f"`{option[0]}`"):
        parse_stage(load_stage("rejection_sampling").ARGUMENTS, [f"--{option[0]}", option[1], "--output_dir", "a/b"])
