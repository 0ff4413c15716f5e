"""Every stage of the recipes for real data runs for two steps with its own YAML, on real rows where they are present.

The base is made the way Qwen's base models are: one token both pads and ends, and another, which the reward model pads
with, never occurs in a text.
"""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows
from rlhf_recipes.models.tiny import bpe_tokenizer

# The rest is as in the YAML: 4-bit weights, bfloat16, gradient checkpointing, penalties, epochs.
SMALL = {
    "dtype": "bfloat16",
    "bf16": True,
    "gradient_checkpointing": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 4,
    "max_train_rows": 24,
    "max_test_rows": 4,
    "logging_steps": 1,
}
SMALL_PPO = {"steps_per_generation": 4, "max_completion_length": 8, "evaluation_rows": 4, "log_completions": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a random Qwen2 with the special tokens of Qwen2.5's base models."""
    tokenizer = bpe_tokenizer(["Film review: a warm and funny film .", "\n\nHuman: Hello?\n\nAssistant: Hi."], 300)
    tokenizer.add_special_tokens(
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|fim_pad|>"]}
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qwen_like")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def stages(run_stage, repo_root, base, tmp_path):
    """Run the three stages of a recipe one after the other; each starts from the adapters before it."""

    def run(recipe, rows, pairs, **ppo):
        def stage(name, folder, **options):
            config = repo_root / "recipes" / recipe / f"{name}.yaml"
            options = {**SMALL, **options, "config": config, "model_name_or_path": base}
            return run_stage(name, **options, output_dir=tmp_path / recipe / folder)

        sft = stage("sft", "sft", dataset_name=rows)
        reward = stage("reward", "reward", dataset_name=pairs)
        adapters = {"sft_adapter": sft.folder, "reward_adapter": reward.folder}
        ppo = stage("ppo", "ppo", dataset_name=rows, **adapters, **SMALL_PPO, **ppo)
        return SimpleNamespace(sft=sft, reward=reward, ppo=ppo)

    return run


@pytest.fixture
def make_pairs(load_stage, tmp_path):
    """Make the rows of the movie recipe from labelled texts, and return their folder."""
    script = load_stage("sentiment_pairs")

    def make(dataset_name, **options):
        folder = tmp_path / "data"
        options = {"dataset_name": dataset_name, "output_dir": folder, **options}
        argv = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
        script.main(*parse_stage(script.ARGUMENTS, argv))
        return folder

    return make


@pytest.fixture
def reviews(tmp_path):
    """A file of made-up reviews, long enough for prompts, half of them positive."""
    text = "film number {} is long .<br /> it felt {} to us , all things considered ."
    rows = [{"text": text.format(n, ("cold", "warm")[n % 2]), "label": n % 2} for n in range(60)]
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def dialogues(write_folder):
    """Made-up dialogues of hh-rlhf's shape, one with an empty answer: a folder with both splits."""
    start = "\n\nHuman: What is {0} and {0}?\n\nAssistant: Why?\n\nHuman: Please.\n\nAssistant:"
    rows = [
        {"chosen": start.format(n) + f" It is {2 * n}.", "rejected": start.format(n) + " I will not say."}
        for n in range(40)
    ]
    rows[3]["chosen"] = start.format(3)
    return write_folder(rows[:30], rows[30:])


@pytest.fixture
def write_folder(tmp_path):
    """Write rows as a folder with `train.jsonl` and `test.jsonl`."""

    def write(train, test):
        folder = tmp_path / "splits"
        folder.mkdir()
        for name, rows in (("train", train), ("test", test)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


def check(run, judged_by):
    """Check what every run must leave behind."""
    assert [one.trainer.state.global_step for one in (run.sft, run.reward, run.ppo)] == [2, 2, 2]
    low, high = run.reward.evaluation["accuracy_ci"]
    assert 0.0 <= low <= run.reward.evaluation["accuracy"] <= high <= 1.0
    assert run.sft.evaluation["loss"] < 10.0
    assert run.ppo.evaluation["win_rate_by"] == judged_by
    assert run.ppo.evaluation["rows"] == 4
    assert (run.ppo.folder / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_movie_sentiment_on_made_up_rows(stages, make_pairs, reviews, reward_judge):
    data = make_pairs(reviews)
    run = stages("movie_sentiment", data / "texts", data / "pairs", gold_score=reward_judge(data / "judge_pairs"))
    check(run, judged_by="gold_score")
    assert run.ppo.trainer.reward_weights.tolist() == [1.0, 0.0], "the judge does not count"
    assert [transform.name for transform in run.ppo.trainer.token_rewards.transforms] == ["missing_eos"]
    assert all(row["prompt"].startswith("Film review: film number") for row in run.ppo.trainer.train_dataset)


def test_hh_rlhf_on_made_up_rows(stages, dialogues):
    run = stages("hh_rlhf", dialogues, dialogues)
    check(run, judged_by="reward_score")
    assert len(run.sft.trainer.train_dataset) == 24
    assert all(row["prompt"].endswith("\n\nAssistant:") for row in run.ppo.trainer.train_dataset)


@pytest.fixture
def reward_judge(run_stage, repo_root, base, tmp_path):
    """Train a judge as `run.sh` does, and return its folder."""

    def train(pairs):
        config = repo_root / "recipes" / "movie_sentiment" / "reward.yaml"
        options = {**SMALL, "config": config, "model_name_or_path": base, "dataset_name": pairs, "seed": 1}
        return run_stage("reward", **options, output_dir=tmp_path / "movie_sentiment" / "judge").folder

    return train


@pytest.mark.slow
def test_movie_sentiment_on_real_reviews(stages, make_pairs, reward_judge, shared_data):
    data = make_pairs(shared_data / "movie_reviews" / "reviews.jsonl.gz", max_words=20)
    assert len(load_rows(str(data / "texts"))) > 1300
    run = stages("movie_sentiment", data / "texts", data / "pairs", gold_score=reward_judge(data / "judge_pairs"))
    check(run, judged_by="gold_score")


def test_movie_sentiment_pairs_of_real_snippets(make_pairs, shared_data):
    path = shared_data / "sentence_polarity" / "snippets.jsonl.gz"
    data = make_pairs(path, max_words=60)  # no snippet is longer
    with gzip.open(path, "rt") as file:
        labels = {" ".join(row["text"].split()): row["label"] for row in map(json.loads, file)}
    sides = {name: load_rows(str(data / name)) for name in ("pairs", "judge_pairs")}
    seen = [{row[side].strip() for row in rows for side in ("chosen", "rejected")} for rows in sides.values()]
    assert not seen[0] & seen[1], "the reward model and the judge learn from different texts"
    for rows in sides.values():
        assert len(rows) > 1500
        assert all(labels[row["chosen"].strip()] == 1 and labels[row["rejected"].strip()] == 0 for row in rows)


@pytest.mark.slow
def test_hh_rlhf_on_real_dialogues(stages, write_folder, shared_data):
    rows = load_rows(str(shared_data / "hh_harmless" / "pairs.jsonl.gz")).to_list()
    folder = write_folder(rows[:60], rows[-20:])
    check(stages("hh_rlhf", folder, folder), judged_by="reward_score")
