"""The docs say what the code does: fields and their defaults, logged metrics, files of a run, examples that run."""

import ast
import importlib.util
import inspect
import json
import operator
import re
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from datasets import Dataset
from torch.testing import assert_close
from trl import GRPOTrainer, ModelConfig, SFTConfig

from rlhf_recipes import PPOConfig, PPOTrainer, shaping
from rlhf_recipes.config import DataArguments
from rlhf_recipes.data import to_completions, to_preferences, to_prompts
from rlhf_recipes.data.synthetic import GoldWeights, write_gold
from rlhf_recipes.evaluation.policy import evaluate_policy
from rlhf_recipes.ppo import functional
from rlhf_recipes.ppo.config import contradictions
from rlhf_recipes.ppo.group_config import AdapterSettings
from rlhf_recipes.ppo.setup import configured_transforms
from rlhf_recipes.ppo.unused import NOT_HONOURED
from rlhf_recipes.reward_modeling import PreferenceConfig, RewardModelConfig, pairwise_evaluation
from rlhf_recipes.shaping import place_terminal, place_uniform, potential_shaping
from tests.models.support import make_texts

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
SFT, REWARD = (ROOT / "docs" / "recipes" / f"{stage}.md" for stage in ("sft", "reward"))
PPO, SHAPING = ROOT / "docs" / "ppo_fields.md", ROOT / "docs" / "shaping.md"
QUICKSTART = ROOT / "docs" / "quickstart.md"
METRICS = ROOT / "docs" / "metrics.md"
GUIDE = ROOT / "docs" / "guides" / "custom_reward.md"
CRITIC_GUIDE = ROOT / "docs" / "guides" / "custom_critic.md"
DESIGN = ROOT / "docs" / "design.md"
YOUR_DATA = ROOT / "docs" / "your_model_and_data.md"


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
    """Names and values in the tables of a section that have this header, in their order."""
    tables = section(page, heading).split(f"\n{header}")[1:]
    rows = [row for table in tables for row in table_rows(f"{header}{table}".split("\n\n")[0] + "\n")]
    assert rows, f"{page.name} has no table {header} under {heading}"
    plain = {name.strip("`"): yaml_value(default.strip("`")) for name, default, *_ in rows}
    assert len(plain) == len(rows), "a field is documented twice"
    return plain


def yaml_value(text):
    numbers = r"\d+e-\d+"  # PyYAML takes them for text
    return float(text) if re.fullmatch(numbers, text) else yaml.safe_load(text)


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
    documented = documented_defaults(PPO, "## PPO's own fields")
    assert list(documented) == own
    assert documented == {name: defaults(PPOConfig)[name] for name in own}


def test_every_argument_of_the_script_has_its_default():
    assert documented_defaults(PPO, "## Fields of the script") == defaults(script_arguments())


def test_every_field_of_the_trainers_without_a_critic_has_its_default():
    assert documented_defaults(ROOT / "docs" / "grpo_rloo.md", "## Usage") == defaults(AdapterSettings)


def test_every_argument_for_rows_has_its_default():
    assert documented_defaults(SFT, "## Rows") == defaults(DataArguments)


def test_every_weight_of_the_gold_score_has_its_value():
    assert documented_defaults(QUICKSTART, "### The gold score", "| weight | value |") == defaults(GoldWeights)


@pytest.mark.parametrize(
    ("page", "heading", "classes"),
    [
        (PPO, "## Fields of TRL that matter", [PPOConfig]),
        (SFT, "## Knobs", [SFTConfig, ModelConfig]),
        (REWARD, "## Knobs", [PreferenceConfig, RewardModelConfig]),
    ],
    ids=["ppo", "sft", "reward"],
)
def test_other_fields_have_their_defaults(page, heading, classes):
    documented, known = documented_defaults(page, heading), defaults(*classes)
    assert documented == {name: known[name] for name in documented}


def test_refused_fields_are_named():
    text = section(PPO, "## What GRPO has and PPO refuses")
    assert set(re.findall(r"`(\w+)`", text)) == set(NOT_HONOURED)


def test_every_argument_of_the_trainer_is_explained():
    rows = table_rows(section(PPO, "## Arguments of the constructor"))
    assert [row[0].strip("`") for row in rows] == list(inspect.signature(PPOTrainer.__init__).parameters)[1:]


REFUSED = [row[0] for row in table_rows(section(PPO, "## Combinations that are refused"))]


@pytest.mark.parametrize("combination", REFUSED)
def test_refused_combinations_are_refused(make_config, combination):
    given = re.sub(r" without .*", "", combination)
    fields = {}
    for span in re.findall(r"`([^`]+)`", given):
        fields |= yaml.safe_load(span)
    with pytest.raises(ValueError, match="|".join(rf"`{name}" for name in fields)):
        make_config(**fields)


def test_every_contradiction_is_documented():
    elsewhere = 1  # activation checkpointing, which `PPOConfig` checks by itself
    assert len(contradictions(PPOConfig("unused", use_cpu=True))) == len(REFUSED) - elsewhere


def test_score_transforms_are_explained_in_their_order():
    everything = SimpleNamespace(
        **dict.fromkeys(["score_clip", "missing_eos_penalty", "length_penalty", "overlong_buffer"], 1),
        **{"score_scaling": "batch", "subtract_reference_mean": True, "ngram_penalty": 1},
        **{"missing_eos_mode": "subtract", "overlong_penalty": 1.0},
    )
    rows = table_rows(section(SHAPING, "## Score transforms"))
    assert [row[0].strip("`") for row in rows] == [transform.name for transform in configured_transforms(everything)]
    fields = [name for row in rows for name in re.findall(r"`([^`]+)`", row[1])]
    annotated = list(PPOConfig.__annotations__)
    assert fields == annotated[: annotated.index("reward_placement")]


def test_every_choice_of_a_field_is_explained():
    explained = {
        "reward_placement": names_in_first_cells(section(SHAPING, "## Placements")),
        "kl_estimator": {row[0].strip("`") for row in table_rows(section(SHAPING, "## KL"))[:4]},
        "kl_anchor": names_in_first_cells(section(SHAPING, "### To which policy")),
    }
    for name, choices in explained.items():
        assert choices == set(get_args(get_type_hints(PPOConfig)[name])), name
    text = section(PPO, "## PPO's own fields")
    for name, hint in get_type_hints(PPOConfig).items():
        if name in PPOConfig.__annotations__ and get_origin(hint) is Literal:
            [row] = [row for row in table_rows(text) if row[0] == f"`{name}`"]
            assert all(f"`{choice}`" in "".join(row) for choice in get_args(hint)), name


def logged_keys(trainer):
    trainer.train()
    return {key for entry in trainer.state.log_history for key in entry}


def test_every_logged_metric_is_explained_and_nothing_else(make_trainer, tiny_texts):
    rows = table_rows(section(PPO, "## Logged metrics"))
    documented = names_in_first_cells(section(PPO, "## Logged metrics"))
    sometimes = {name for row in rows if "logged only with" in row[1] for name in re.findall(r"`([^`]+)`", row[0])}
    steps = {"max_steps": 1, "num_iterations": 1}

    logged = logged_keys(make_trainer(**steps, eval_strategy="steps", eval_steps=1))
    own = {key for key in logged if not key.startswith("eval_")}
    assert {name.replace("<name>", "reward") for name in documented - sometimes} == own
    assert {key.removeprefix("eval_") for key in logged} - own == {
        "runtime",
        "samples_per_second",
        "steps_per_second",
    }, "an evaluation has the same keys, and its speed"

    texts = Dataset.from_list([{"text": text} for text in tiny_texts])
    more = {"length_penalty": 0.1, "kl_placement": "loss", "ptx_coef": 0.1, "ptx_dataset": texts}
    more |= {"use_adaptive_entropy": True, "kl_controller": "adaptive", "target_kl": 1.0, "critic_warmup_steps": 0}
    names = {name.replace("<transform>", "length_penalty") for name in sometimes}
    assert logged_keys(make_trainer(**steps, **more)) - own == names - {"ppo/router_loss"}  # of experts


def test_every_field_of_an_evaluation_is_explained(make_trainer, prompts):
    text = section(METRICS, "## evaluation.json")
    explained = {(row[0], name) for row in table_rows(text) for name in re.findall(r"`([^`]+)`", row[1])}
    evaluation = evaluate_policy(make_trainer(ema_decay=0.5), prompts, rows=4)
    pairs = pairwise_evaluation(torch.tensor([1.0]), torch.tensor([0.0]))
    assert {name for stage, name in explained if stage == "PPO"} == set(evaluation)
    assert {name for stage, name in explained if stage == "reward"} == {*pairs, "baselines"}
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


@pytest.mark.parametrize(
    ("page", "block", "reward", "expected"),
    [
        (README, 0, "not_too_long", [0.0]),
        (GUIDE, 0, "brevity", [-3.0]),
        (SHAPING, 2, "no_stutter", [[0.0, -0.5, 0.0]]),
    ],
    ids=["readme", "guide", "shaping"],
)
def test_examples_train_and_save(page, block, reward, expected, run_example, tmp_path):
    names = run_example(page, block)
    assert names[reward](completions=["rain rain roof"], completion_ids=[[5, 5, 6]]) == expected
    trainer = names["trainer"]
    assert trainer.state.global_step == 2
    assert any(f"rewards/{reward}/mean" in entry for entry in trainer.state.log_history)
    assert (tmp_path / trainer.args.output_dir / "adapter_model.safetensors").is_file()


def test_the_critic_of_the_guide_trains_and_resumes(run_example, tmp_path):
    names = run_example(CRITIC_GUIDE, 0)
    trainer = names["trainer"]
    assert trainer.state.global_step == 2
    critic = names["RecurrentCritic"](len(names["tokenizer"]))
    before = [parameter.clone() for parameter in critic.network.parameters()]
    critic.load(tmp_path / trainer.args.output_dir / "critic")
    for parameter, trained, start in zip(
        critic.network.parameters(), trainer.critic.network.parameters(), before, strict=True
    ):
        assert torch.equal(parameter, trained)
        assert not torch.equal(parameter, start)
    logged = [entry["critic/value_loss"] for entry in trainer.state.log_history if "critic/value_loss" in entry]
    assert min(logged) > 0


def test_the_critic_of_the_guide_does_not_see_the_token_that_it_values(run_example):
    critic = run_example(CRITIC_GUIDE, 0)["trainer"].critic
    texts = make_texts([1, 3], [4, 2])
    texts = replace(texts, prompt_ids=texts.prompt_ids % 20, completion_ids=texts.completion_ids % 20)
    changed = texts.completion_ids.clone()
    changed[:, 1] = 21
    with torch.no_grad():
        values, others = (critic.forward(each) for each in (texts, replace(texts, completion_ids=changed)))
    assert torch.equal(values[:, :2], others[:, :2])
    assert (values[0, 2:4] != others[0, 2:4]).all()


def test_reward_with_a_state_works(run_example):
    keyword = run_example(GUIDE, 1)["Keyword"](["rain", "roof"])
    assert keyword(prompts=["a"] * 2, completions=["rain on rain", "the roof in the rain"]) == [1.0, 2.0]


def test_placement_and_potential_of_the_examples_train(run_example, make_trainer):
    scores, mask = torch.tensor([4.0]), torch.tensor([[1, 1, 0]])
    placement = run_example(SHAPING, 0)["half_and_half"]
    assert placement(scores, mask).tolist() == [[1.0, 3.0, 0.0]]
    assert_close(placement(scores, mask), (place_terminal(scores, mask) + place_uniform(scores, mask)) / 2)

    potential = run_example(SHAPING, 1)["variety"]
    potentials = torch.tensor(potential(completion_ids=[[7, 7, 9]]))
    assert_close(potential_shaping(potentials, torch.ones(1, 3), 1.0), torch.tensor([[0.05, 0.0, -0.05]]))
    trainer = make_trainer(placement=placement, potential=potential, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_rewards_of_another_tokenizer_are_aligned(run_example):
    rewards = run_example(SHAPING, 3)["rewards"]
    assert rewards == ast.literal_eval(re.search(r"print\(rewards\)  # (.*)", SHAPING.read_text())[1])


def test_rows_of_your_data_are_read_by_every_stage():
    [block] = re.findall(r"```json\n(.*?)```", YOUR_DATA.read_text(), re.DOTALL)
    rows = [json.loads(line) for line in block.splitlines()]
    assert [type(row["prompt"]) for row in rows] == [str, list]
    for row in rows:
        dataset = Dataset.from_list([row])
        assert to_completions(dataset)[0] == {"prompt": row["prompt"], "completion": row["chosen"]}
        assert to_preferences(dataset)[0] == row
        assert to_prompts(dataset)[0]["prompt"] == row["prompt"]


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


def test_all_overrides_of_trl_are_told():
    rows = table_rows(section(DESIGN, "## Why a subclass of GRPOTrainer"))
    told = {name: kind for row in rows for name in re.findall(r"`([^`]+)`", row[0]) for kind in [row[1]]}
    own = {name: value for name, value in vars(PPOTrainer).items() if inspect.isfunction(value)}
    overrides = {name: value for name, value in own.items() if hasattr(GRPOTrainer, name)}
    assert set(told) == set(overrides)
    for name, value in overrides.items():
        calls_parent = f"super().{name}(" in inspect.getsource(value)
        assert told[name].startswith("extend") == calls_parent, name


def test_the_walk_through_a_step_names_what_is_there():
    steps = table_rows(section(DESIGN, "## One step, from prompt to optimizer"))
    assert [row[0] for row in steps] == [str(number) for number in range(1, 11)]
    files = set()
    for _, _, where, formulas in steps:
        for part in where.split(";"):
            path, *names = re.findall(r"`([^`]+)`", part)
            files.add(path)
            module = importlib.import_module(f"rlhf_recipes.ppo.{path.removesuffix('.py')}")
            for name in names:
                value = operator.attrgetter(name)(module)
                assert inspect.getmodule(value) is module, f"{name} is not in {path}"
        for name in re.findall(r"`([^`]+)`", formulas):
            assert hasattr(functional, name) or hasattr(shaping, name), name
    assert files == {f"{name}.py" for name in "trainer rollout passes critics token_rewards objective updates".split()}
    lines = sum(len((ROOT / "rlhf_recipes" / "ppo" / file).read_text().splitlines()) for file in files)
    assert lines <= 1600, "one step is read in so many lines"
