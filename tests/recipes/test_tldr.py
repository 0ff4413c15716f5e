"""The recipe after Stiennon et al. and Huang et al.: its rows, and its PPO for two steps."""

import json

import pytest
import yaml

from rlhf_recipes.config import DataArguments, parse_stage
from rlhf_recipes.data import load_rows
from rlhf_recipes.data.synthetic import write_gold
from rlhf_recipes.reward_modeling import PreferenceConfig, load_reward_rows


@pytest.fixture
def rows(load_stage, tiny_model_path, tmp_path):
    """Make the rows of posts and comparisons, each written for both splits, and return their folder."""

    def make(summaries, comparisons, **values):
        for name, lines in (("summaries", summaries), ("comparisons", comparisons)):
            (tmp_path / name).mkdir()
            for split in ("train", "validation"):
                text = "".join(json.dumps(line) + "\n" for line in lines)
                (tmp_path / name / f"{split}.jsonl").write_text(text)
        module, folder = load_stage("tldr/rows"), tmp_path / "data"
        values = {"model": tiny_model_path, "output_dir": folder, "max_tokens": 16, **values}
        values |= {name: tmp_path / name for name in ("summaries", "comparisons")}
        argv = [str(text) for name, value in values.items() for text in (f"--{name}", value)]
        module.main(*parse_stage(module.ARGUMENTS, argv))
        return folder

    return make


POST = {"subreddit": "film", "title": "the film", "post": "the film was good\nand this story felt dull\nthat ending"}
SUMMARY = POST | {"summary": "the film was good"}


def compared(choice=1, confidence=8, info=POST, texts=(" was good", " felt dull")):
    summaries = [{"text": text, "policy": "ref", "note": None} for text in texts]
    return {"info": info, "summaries": summaries, "choice": choice, "extra": {"confidence": confidence}}


def test_rows(rows, caplog):
    article = {"article": "this story", "title": "a", "post": None}
    long = SUMMARY | {"title": "the film " * 20}
    comparisons = [
        compared(),
        compared(choice=0, confidence=None),
        compared(info=article),
        compared(texts=(" a", " a")),
    ]
    folder = rows([SUMMARY, long], comparisons)
    (row,) = load_rows(str(folder / "summaries"), split="test").to_list()
    assert row["completion"] == " the film was good"
    assert row["prompt"] == (
        "SUBREDDIT: r/film\n\nTITLE: the film\n\nPOST: the film was good\nand this story felt dull\n\nTL;DR:"
    ), "the last paragraph has gone"
    pairs = load_rows(str(folder / "comparisons")).to_list()
    assert [(pair["label"], pair["margin"]) for pair in pairs] == [(0.0, 0.75), (1.0, None)]
    assert "1 x title and subreddit alone have more than 16 tokens" in caplog.text
    assert "1 x the two completions are the same" in caplog.text
    for margin_use in ("ignore", "scale"):
        config = PreferenceConfig("unused", margin_use=margin_use, use_cpu=True, bf16=False)
        loaded = load_reward_rows(DataArguments(str(folder / "comparisons"), dataset_test_split="test"), config)
        assert len(loaded["train"]) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (compared(choice=2), "Row 1 of the comparisons: `choice` must be 0 or 1, got 2"),
        (compared(confidence=10), "Row 1 of the comparisons: `confidence` must be a whole number from 1 to 9, got 10"),
    ],
)
def test_wrong_choices_and_confidences_are_refused(rows, row, message):
    with pytest.raises(ValueError, match=message):
        rows([SUMMARY], [compared(), row])


def test_posts_of_which_none_fits(rows):
    with pytest.raises(ValueError, match="No row is left. 1 of 1 rows cannot be used: 1 x title and subreddit alone"):
        rows([SUMMARY], [compared()], max_tokens=3)


def test_ppo_runs_for_two_steps(run_stage, repo_root, sft_adapter, reward_adapter, write_rows, tiny_texts, tmp_path):
    write_gold(tmp_path / "gold.json", eos_token_id=1)
    run = run_stage(
        "ppo",
        config=repo_root / "recipes" / "tldr" / "ppo.yaml",
        sft_adapter=sft_adapter,
        reward_adapter=reward_adapter,
        gold_score=tmp_path / "gold.json",
        dataset_name=write_rows([{"prompt": text} for text in tiny_texts]),
        dataset_train_split="train",
        dataset_test_split="train",
        num_iterations=2,
        max_completion_length=6,
        evaluation_rows=8,
        logging_steps=1,
    )
    low, high = run.evaluation["length_controlled_win_rate_ci"]
    assert 0.0 <= low <= run.evaluation["length_controlled_win_rate"] <= high <= 1.0
    names = [transform.name for transform in run.trainer.token_rewards.transforms]
    assert names == ["reference_mean", "missing_eos"]


def test_the_papers_settings_are_those_of_the_code(repo_root):
    """`summarize_from_feedback_details/{sft,reward,ppo}.py` and `hello_world.sh` of Huang et al.'s repository."""
    folder = repo_root / "recipes" / "tldr"
    files = {name: yaml.safe_load((folder / f"paper_{name}.yaml").read_text()) for name in ("sft", "reward", "ppo")}
    batches = [one["per_device_train_batch_size"] * one["gradient_accumulation_steps"] for one in files.values()]
    assert batches == [128, 64, 512]
    assert {one["learning_rate"] for one in files.values()} == {"3e-6"}
    assert (files["sft"]["max_length"], files["reward"]["max_length"]) == (562, 638)
    ppo = files["ppo"]
    assert ppo["max_steps"] // ppo["num_iterations"] == 1_000_000 // 512
    expected = {"kl_coef": 0.05, "temperature": 0.7, "max_completion_length": 53, "missing_eos_penalty": 1.0}
    assert {name: ppo[name] for name in expected} == expected
