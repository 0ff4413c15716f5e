"""`config.yaml`: the settings of a run, without secrets, and the same when they are read again."""

import math
import sys
from dataclasses import dataclass, field

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from trl import ModelConfig, SFTConfig

from rlhf_recipes import GroupArguments, GRPOAdapterConfig, PPOArguments, PPOConfig, RLOOAdapterConfig
from rlhf_recipes.config import DataArguments, parse_stage, read_config, write_config
from rlhf_recipes.reward_modeling import PreferenceConfig, RewardModelConfig
from rlhf_recipes.rewards import RemoteReward
from rlhf_recipes.tools.commands.fields import read_fields
from rlhf_recipes.tracking import differing_settings, read_run, read_settings, start_run
from rlhf_recipes.tracking.settings import FILE, resolve_settings, write_settings

STAGES = {
    "sft": (DataArguments, SFTConfig, ModelConfig),
    "reward": (DataArguments, PreferenceConfig, RewardModelConfig),
    "ppo": (PPOArguments, DataArguments, PPOConfig, ModelConfig),
    "grpo": (GroupArguments, DataArguments, GRPOAdapterConfig, ModelConfig),
    "rloo": (GroupArguments, DataArguments, RLOOAdapterConfig, ModelConfig),
}
SCRIPTS = {"rloo": "grpo"}  # one script for both
CPU = ["--use_cpu", "true", "--bf16", "false"]


def resolved(stage, argv):
    parsed = parse_stage(STAGES[stage], argv)
    return parsed, resolve_settings(*parsed)


@pytest.mark.parametrize("stage", STAGES)
def test_the_settings_of_every_recipe_give_the_same_dataclasses(stage, repo_root, tmp_path):
    fields = read_fields(
        repo_root / "recipes" / f"{SCRIPTS.get(stage, stage)}.py"
    ).keys()  # others are for a script of their own
    files = sorted(repo_root.glob(f"recipes/*/{stage}.yaml"))
    files = [file for file in files if yaml.safe_load(file.read_text()).keys() <= fields]
    assert files
    for number, file in enumerate(files):
        argv = ["--config", str(file), *CPU, "--report_to", "none", "--lora_target_modules", "q_proj", "v_proj"]
        first, settings = resolved(stage, argv)
        path = write_settings(tmp_path / f"{stage}{number}", settings)
        again, same = resolved(stage, ["--config", str(path)])
        assert same == settings
        for one, other in zip(first, again, strict=True):
            assert repr(one) == repr(other)


def test_command_line_null_and_derived_values(tmp_path):
    file = tmp_path / "given.yaml"
    given = ["max_length: 64", "dataset_test_split: test", "lr_scheduler_type: constant", "output_dir: ./some//where"]
    file.write_text("\n".join(given))
    nulls = ["--max_length", "null", "--dataset_test_split", "null"]
    argv = ["--config", str(file), *CPU, *nulls, "--warmup_steps", "0.5"]
    _, settings = resolved("sft", argv)
    assert settings == {
        "max_length": None,
        "lr_scheduler_type": "constant",
        "output_dir": "./some//where",
        "use_cpu": True,
        "bf16": False,
        "warmup_steps": 0.5,
    }, "a field at its default is left out, a path is as it was given, null stays"
    path = write_settings(tmp_path, settings)
    assert parse_stage(STAGES["sft"], ["--config", str(path)])[1].max_length is None


def test_sizes_that_ppo_derives_from_each_other_are_not_both_in_it(tmp_path):
    argv = [*CPU, "--output_dir", "x", "--steps_per_generation", "4", "--per_device_train_batch_size", "2"]
    (_, _, config, _), settings = resolved("ppo", argv)
    assert config.generation_batch_size == 8
    assert "generation_batch_size" not in settings
    path = write_settings(tmp_path, settings)
    assert parse_stage(STAGES["ppo"], ["--config", str(path)])[2].generation_batch_size == 8


def test_a_resumed_run_is_written_as_one_from_the_start():
    _, settings = resolved("sft", [*CPU, "--output_dir", "x", "--resume_from_checkpoint", "true"])
    assert set(settings) == {"output_dir", "use_cpu", "bf16"}


@pytest.mark.parametrize(
    "secret", [["--hub_token", "hf_secret"], ["--reward_url", "https://user:hf_secret@host/score"]]
)
def test_secrets_are_in_no_file(secret, tmp_path, monkeypatch):
    _, settings = resolved("ppo", [*CPU, "--output_dir", str(tmp_path), *secret])
    monkeypatch.setattr(sys, "orig_argv", ["python", "ppo.py", *secret])
    start_run(stage="ppo", output_dir=str(tmp_path), config={}, settings=settings)
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "hf_secret" not in written
    assert f"# Left out, because it is secret: {secret[0].removeprefix('--')}" in (tmp_path / FILE).read_text()
    assert read_run(tmp_path)["command"] == f"python ppo.py {secret[0]} '***'"


def test_special_tokens_are_no_secrets():
    _, settings = resolved("sft", [*CPU, "--output_dir", "x", "--eos_token", "<end>", "--pad_token", "<pad>"])
    assert (settings["eos_token"], settings["pad_token"]) == ("<end>", "<pad>")


class Politeness:
    def __call__(self, completions, **kwargs):
        return [0.0] * len(completions)


def test_what_is_set_in_python_is_named_and_what_is_ours_is_not(tmp_path):
    def brevity(completions, **kwargs):
        return [0.0] * len(completions)

    brevity.__name__ = "brevity\nseed: 7"
    given = ["outputs/reward", None, RemoteReward("http://localhost:1/"), brevity, Politeness()]
    head = write_settings(tmp_path, {"seed": 3}, given).read_text().splitlines()[1]
    assert head == "# Set in Python, so that only the same script has it: brevity?seed: 7, Politeness"
    assert read_settings(tmp_path) == {"seed": 3}


def test_a_dataclass_made_in_python_gives_its_plain_values():
    @dataclass
    class Arguments:
        rate: float = 0.1
        names: list[str] = field(default_factory=list)
        made: object = None

    assert resolve_settings(Arguments(0.1, ["a"], object())) == {"names": ["a"]}
    assert resolve_settings(Arguments(0.5)) == {"rate": 0.5}


PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), PLAIN | st.lists(PLAIN, max_size=3), max_size=4))
def test_any_value_is_read_as_it_was_written(values):
    assert read_config(write_config(values)) == values


@pytest.mark.parametrize("word", ["no", "on", "1e-5", "1_000", "null", "0x1f", "12:30", "true", "=", ".5e3"])
def test_words_are_words_for_every_reader(word):
    text = write_config({"run_name": word})
    assert read_config(text) == yaml.safe_load(text) == {"run_name": word}


def test_numbers_are_numbers_for_every_reader():
    text = write_config({"learning_rate": 1e-5, "max_grad_norm": math.inf})
    assert read_config(text) == yaml.safe_load(text) == {"learning_rate": 1e-5, "max_grad_norm": math.inf}


@pytest.mark.parametrize("text", ["- a", "seed: [", "\udcff", "[" * 5000])
def test_a_damaged_file_is_an_error_that_names_it(text, tmp_path):
    (tmp_path / FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="config.yaml"):
        read_settings(tmp_path)


def test_runs_that_are_alike_have_no_differences():
    assert differing_settings([{"a": 1}, {"a": 1}]) == differing_settings([{"a": 1}]) == differing_settings([]) == {}
