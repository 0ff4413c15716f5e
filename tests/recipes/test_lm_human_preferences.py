"""The recipe after Ziegler et al.: its world, choices of the best of several, and every stage for two steps."""

import json

import pytest

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows
from rlhf_recipes.data.preferences import to_preference_table
from rlhf_recipes.models.readout import Readout

RECIPE = "lm_human_preferences"


def options(**values):
    return [str(text) for name, value in values.items() for text in (f"--{name}", value)]


@pytest.fixture
def script(load_stage):
    """Run a script with options."""

    def run(name, **values):
        module = load_stage(name)
        module.main(*parse_stage(module.ARGUMENTS, options(**values)))

    return run


@pytest.fixture
def world(script, tmp_path):
    """A small world of the recipe: its base has hardly learned to write."""
    folder = tmp_path / "world"
    script(f"{RECIPE}/world", output_dir=folder, corpus_size=320, passages=60)
    return folder


@pytest.fixture
def labels(script, world, tmp_path):
    """Choices of the best of three; a full stop counts anywhere, because this base writes few."""
    folder = tmp_path / "labels"
    sizes = {"choices": 24, "choose_from": 3, "samples": 16, "truncate_after": 0}
    script(f"{RECIPE}/annotate", world=world, output_dir=folder, **sizes)
    return folder


def test_the_world_has_prompts_that_begin_and_end_at_a_stop(world):
    passages = load_rows(str(world / "passages.jsonl"))["text"]
    prompts = [row["prompt"] for name in ("train", "test") for row in load_rows(str(world), split=f"prompts_{name}")]
    assert len(prompts) == len(passages)
    for prompt in prompts:
        assert len(prompt.split()) <= 64
        assert prompt.endswith(" .")
        assert any(f".{prompt}" in text for text in passages), "it follows a stop"


def test_the_whole_recipe_runs(run_stage, script, repo_root, world, labels, tmp_path):
    choices = to_preference_table(load_rows(str(labels / "choices.jsonl")))
    assert set(map(len, choices["completions"])) == {3}
    assert all(text.endswith(" .") and text.count(" .") == 1 for texts in choices["completions"] for text in texts)
    assert all(ids[-1] == 1 for group in choices["completion_ids"] for ids in group), "an end token follows"

    yaml = repo_root / "recipes" / RECIPE
    small = {"model_name_or_path": world / "base", "logging_steps": 1}
    reward = run_stage(
        "reward", config=yaml / "reward.yaml", dataset_name=labels / "choices.jsonl", test_size=0.2, **small
    )
    assert reward.trainer.args.objective == "best_of_k"
    script(
        "normalize_reward",
        reward_model=reward.folder,
        dataset_name=labels / "samples.jsonl",
        dataset_test_split="train",
    )
    assert Readout.load(reward.folder) != Readout()

    ppo = run_stage(
        "ppo",
        config=yaml / "ppo.yaml",
        dataset_name=world,
        reward_adapter=reward.folder,
        gold_score=world / "gold.json",
        num_iterations=2,
        evaluation_rows=8,
        max_test_rows=8,
        **small,
    )
    assert ppo.evaluation["win_rate_by"] == "gold_score"
    history = ppo.trainer.state.log_history[0]
    assert "score/missing_eos" in history
    assert history["kl_coef"] == pytest.approx(0.15)
    assert type(ppo.trainer.optimizer.optimizer).__name__ == "TensorFlowAdamW"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"choose_from": 1}, "`choose_from` must be at least 2, got 1"),
        ({"truncate_after": 24}, r"`truncate_after` must lie in \[0, 23\], the positions of a completion, got 24"),
    ],
)
def test_what_cannot_be_annotated_is_refused_at_once(script, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        script(f"{RECIPE}/annotate", world=tmp_path / "nothing", **fields)


def test_openai_labels_become_choices(script, tiny_model_path, tiny_tokenizer, tmp_path):
    """Ids behind the vocabulary pad; a label among equal samples says nothing."""
    padding = len(tiny_tokenizer) + 2
    query, first, second = (tiny_tokenizer(text)["input_ids"] for text in ("the film", "was good", "felt dull and"))
    label = {"query": [*query, padding], "sample0": [*first, padding], "sample1": second, "best": 1}
    rows = [label, {**label, "sample1": [*first, padding]}]
    (tmp_path / "labels.json").write_text(json.dumps(rows))
    folder = tmp_path / "choices"
    script(f"{RECIPE}/labels", labels=tmp_path / "labels.json", tokenizer=tiny_model_path, output_dir=folder)
    (row,) = load_rows(str(folder / "choices.jsonl")).to_list()
    assert row == {"prompt": "the film", "completions": ["was good", "felt dull and"], "best": 1}
    (tmp_path / "bad.json").write_text('{"query": []}')
    with pytest.raises(ValueError, match="is no list of labels"):
        script(f"{RECIPE}/labels", labels=tmp_path / "bad.json", tokenizer=tiny_model_path, output_dir=tmp_path / "x")


def test_prompts_of_any_texts(script, tiny_model_path, write_rows, tmp_path):
    rows = [{"text": "the film was good and this story felt dull"}, {"text": "dull"}]
    argv = {"model": tiny_model_path, "stop": "and", "max_tokens": 4}
    with pytest.raises(ValueError, match="No row is left. 2 of 2 rows cannot be used"):
        script("sentence_prompts", dataset_name=write_rows(rows), output_dir=tmp_path / "a", **argv)
    rows.append({"text": "dull and the film and this"})
    script("sentence_prompts", dataset_name=write_rows(rows), output_dir=tmp_path / "b", **argv)
    assert load_rows(str(tmp_path / "b"))["prompt"][:] == [" the film and"]
