"""The docs say what the code does: fields and their defaults, logged metrics, files of a run, examples that run."""

import ast
import importlib.util
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from trl import ModelConfig, RewardConfig, SFTConfig

from rlhf_recipes import PPOConfig
from rlhf_recipes.config import DataArguments
from rlhf_recipes.data.synthetic import GoldWeights, write_gold
from rlhf_recipes.evaluation.policy import evaluate_policy
from rlhf_recipes.ppo.config import _NOT_HONOURED
from rlhf_recipes.reward_modeling import RewardModelConfig, pairwise_evaluation

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
SFT, REWARD, PPO = (ROOT / "docs" / "recipes" / f"{stage}.md" for stage in ("sft", "reward", "ppo"))
QUICKSTART = ROOT / "docs" / "quickstart.md"
METRICS = ROOT / "docs" / "metrics.md"
GUIDE = ROOT / "docs" / "guides" / "custom_reward.md"


def section(page, heading):
    """Text under a heading, up to the next one of the same or a higher level."""
    level = heading.index(" ")
    text = page.read_text().split(f"\n{heading}\n", 1)[1]
    return re.split(rf"(?m)^#{{1,{level}}} ", text, maxsplit=1)[0]


def table_rows(text):
    """Cells of the body rows of all tables in a text."""
    body = re.findall(r"(?m)^\|[ |:-]+\|\n((?:\|.*\n)+)", text)
    return [[cell.strip() for cell in line.strip("|").split("|")] for table in body for line in table.splitlines()]


def documented_defaults(page, heading, header="| field | default |"):
    """Names and values in a table of a section, as YAML would read them."""
    text = section(page, heading)
    table = text[text.index(header) :].split("\n\n")[0] + "\n"
    plain = {name.strip("`"): default.strip("`") for name, default, *_ in table_rows(table)}
    numbers = r"\d+e-\d+"  # PyYAML takes them for text
    return {name: float(text) if re.fullmatch(numbers, text) else yaml.safe_load(text) for name, text in plain.items()}


def defaults(*classes):
    return {field.name: field.default for one in reversed(classes) for field in fields(one)}


def names_in_first_cells(text):
    return {name for cells in table_rows(text) for name in re.findall(r"`([^`]+)`", cells[0])}


def script_arguments():
    spec = importlib.util.spec_from_file_location("documented_script", ROOT / "recipes" / "ppo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PPOArguments


def test_tables_are_read():
    text = "## A\n| field | default |\n|---|---|\n| `x` | `1e-5` |\n| `y` | `null` |\n\n## B\n"
    assert table_rows(text) == [["`x`", "`1e-5`"], ["`y`", "`null`"]]
    assert documented_defaults(SFT, "## Rows")["test_size"] == 0.1


def test_every_field_of_ppo_has_its_default():
    own = list(PPOConfig.__annotations__)
    documented = documented_defaults(PPO, "### PPO's own fields")
    assert list(documented) == own
    assert documented == {name: defaults(PPOConfig)[name] for name in own}


def test_every_argument_of_the_script_has_its_default():
    assert documented_defaults(PPO, "### Fields of the script") == defaults(script_arguments())


def test_every_argument_for_rows_has_its_default():
    assert documented_defaults(SFT, "## Rows") == defaults(DataArguments)


def test_every_weight_of_the_gold_score_has_its_value():
    assert documented_defaults(QUICKSTART, "### The gold score", "| weight | value |") == defaults(GoldWeights)


@pytest.mark.parametrize(
    ("page", "heading", "classes"),
    [
        (PPO, "### Fields of TRL that matter", [PPOConfig]),
        (SFT, "## Knobs", [SFTConfig, ModelConfig]),
        (REWARD, "## Knobs", [RewardConfig, RewardModelConfig]),
    ],
    ids=["ppo", "sft", "reward"],
)
def test_other_fields_have_their_defaults(page, heading, classes):
    documented, known = documented_defaults(page, heading), defaults(*classes)
    assert documented == {name: known[name] for name in documented}


def test_refused_fields_are_named():
    text = section(PPO, "### What GRPO has and PPO refuses")
    assert set(re.findall(r"`(\w+)`", text)) == set(_NOT_HONOURED)


def test_every_logged_metric_is_explained_and_nothing_else(make_trainer):
    trainer = make_trainer(max_steps=1, num_iterations=1, eval_strategy="steps", eval_steps=1)
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry}
    own = {key for key in logged if not key.startswith("eval_")}
    documented = names_in_first_cells(section(METRICS, "## PPO"))
    assert {name.replace("<name>", "reward") for name in documented} == own
    assert {key.removeprefix("eval_") for key in logged} - own == {
        "runtime",
        "samples_per_second",
        "steps_per_second",
    }, "an evaluation has the same keys, and its speed"


def test_every_field_of_an_evaluation_is_explained(make_trainer, prompts):
    text = section(METRICS, "## evaluation.json")
    explained = {(row[0], name) for row in table_rows(text) for name in re.findall(r"`([^`]+)`", row[1])}
    evaluation = evaluate_policy(make_trainer(), prompts, rows=4)
    pairs = pairwise_evaluation(torch.tensor([1.0]), torch.tensor([0.0]))
    assert {name for stage, name in explained if stage == "PPO"} == set(evaluation)
    assert {name for stage, name in explained if stage == "reward"} == set(pairs)
    for name in evaluation["policy"]:
        assert f"`{name}`" in text


@pytest.fixture
def run_example(sft_adapter, reward_adapter, tiny_model_path, prompts, tmp_path, monkeypatch):
    """Run a block of Python from a page, with tiny folders in the place of the quickstart's, for two steps."""
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in list(prompts["prompt"]) * 8))
    write_gold(tmp_path / "gold.json", eos_token_id=1)
    places = {
        "outputs/quickstart/sft": sft_adapter,
        "outputs/quickstart/reward": reward_adapter,
        "outputs/quickstart/world/base": tiny_model_path,
        "outputs/quickstart/world/gold.json": tmp_path / "gold.json",
        "outputs/quickstart/world/prompts_train.jsonl": rows,
    }
    monkeypatch.chdir(tmp_path)

    def run(page, block):
        code = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[block]
        for path, place in places.items():
            code = code.replace(f'"{path}"', repr(str(place)))
        code = re.sub(r"max_steps=\d+", "max_steps=2", code)
        names = {}
        exec(compile(code, f"{page.name}, block {block}", "exec"), names)
        return names

    return run


@pytest.mark.parametrize(("page", "reward"), [(README, "not_too_long"), (GUIDE, "brevity")], ids=["readme", "guide"])
def test_examples_train_and_save(page, reward, run_example, tmp_path):
    trainer = run_example(page, 0)["trainer"]
    assert trainer.state.global_step == 2
    assert any(f"rewards/{reward}/mean" in entry for entry in trainer.state.log_history)
    assert (tmp_path / trainer.args.output_dir / "adapter_model.safetensors").is_file()


def test_reward_with_a_state_works(run_example):
    keyword = run_example(GUIDE, 1)["Keyword"](["rain", "roof"])
    assert keyword(prompts=["a"] * 2, completions=["rain on rain", "the roof in the rain"]) == [1.0, 2.0]


def test_loading_a_reward_model_works(run_example):
    reward_model = run_example(REWARD, 0)["reward_model"]
    assert reward_model(input_ids=torch.tensor([[6, 7, 8]])).logits.shape == (1, 1)


def test_reviews_of_the_quickstart_are_of_its_world(run_example, capsys):
    gold = run_example(QUICKSTART, 0)["gold"]
    shown = ast.literal_eval(capsys.readouterr().out)
    assert shown["malformed"] == shown["off_topic"] == 0.0
    prompt, completion = re.search(r"prompt +(.*)\ncompletion +(.*)\n", QUICKSTART.read_text()).groups()
    parts = gold.parts(prompt, completion)
    assert parts["malformed"] == parts["off_topic"] == 0.0
