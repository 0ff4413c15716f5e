import argparse
import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from transformers.trainer_utils import IntervalStrategy
from trl import GRPOConfig, ModelConfig, RewardConfig, SFTConfig

from rlhf_recipes import GRPOAdapterConfig, PPOConfig, RLOOAdapterConfig
from rlhf_recipes.config import DataArguments, _split_options, parse_stage, read_setting, validate_fields
from rlhf_recipes.ppo.arguments import GroupArguments, PPOArguments
from rlhf_recipes.ppo.unused import UNUSED
from rlhf_recipes.reward_modeling import PreferenceConfig, RewardModelConfig
from rlhf_recipes.supervised import CompletionConfig


@dataclass
class Settings:
    steps: int = 3
    rate: float = 0.1
    critic: Literal["adapter", "head"] = "adapter"
    level: Literal[1, 2] = 1
    clip: float | None = 0.2
    folder: str = "outputs"
    note: str | None = None
    fast: bool = True
    weights: list[float] | None = None
    modules: list[str] = field(default_factory=list)
    extra: dict[str, Any] | str | None = None
    strategy: IntervalStrategy | str = "no"


def fields_of(*types):
    return {field.name for one in types for field in dataclasses.fields(one) if field.init}


@dataclass
class Required:
    needed: int


@pytest.fixture
def parse(tmp_path):
    """Parse a YAML text and command-line arguments into Settings."""

    def parse(text, *argv, types=Settings):
        path = tmp_path / "stage.yaml"
        path.write_text(text)
        (settings, *_) = parse_stage(types, ["--config", str(path), *argv])
        return settings

    return parse


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("rate: 1e-5", "rate", 1e-5),  # PyYAML alone reads this as text
        ("rate: -1E+2", "rate", -100.0),
        ("weights: [+1e1]", "weights", [10.0]),
        ("rate: .5", "rate", 0.5),
        ("rate: 5.e+2", "rate", 500.0),
        ("rate: '1e-5'", "rate", 1e-5),
        ("rate: 2", "rate", 2),
        ("rate: .inf", "rate", float("inf")),
        ("steps: -1", "steps", -1),
        ("steps: '10'", "steps", 10),
        ("critic: head", "critic", "head"),
        ("level: 2", "level", 2),
        ("clip: null", "clip", None),
        ("clip: 1e-1", "clip", 0.1),
        ("note: no", "note", "no"),  # PyYAML alone reads this as False
        ("note: 1.2.3", "note", "1.2.3"),
        ("note: 'null'", "note", "null"),
        ("fast: no", "fast", False),
        ("fast: false", "fast", False),
        ("fast: True", "fast", True),
        ("weights: [1e-1, 2]", "weights", [0.1, 2]),
        ("modules: [q, v]", "modules", ["q", "v"]),
        ("extra: {min_lr: 1e-6, cycles: 2}", "extra", {"min_lr": 1e-6, "cycles": 2}),
        ("strategy: no", "strategy", "no"),
        ("strategy: steps", "strategy", "steps"),
    ],
)
def test_yaml_values_arrive(parse, text, name, value):
    got = getattr(parse(text), name)
    assert got == value
    assert type(got) is type(value)


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(parse):
    settings = parse("rate: 1e-3\nsteps: 7", "--rate", "3e-4", "--critic=head")
    assert (settings.rate, settings.steps, settings.critic, settings.folder) == (3e-4, 7, "head", "outputs")


NULLED = [
    ("clip: 0.3", ["--clip", "null"], "clip"),
    ("note: x", ["--note", "null"], "note"),
    ("note: x", ["--note=null"], "note"),
    ("note: x", ["--note", "~"], "note"),
    ("note: x", ["--note", "NULL"], "note"),
    ("note: x", ["--note", "y", "--note", "null"], "note"),
    ("weights: [1, 2]", ["--weights", "null"], "weights"),
    ("weights: [1, 2]", ["--weights", "3", "4", "--weights", "null", "--fast", "false"], "weights"),
    ("extra: {a: 1}", ["--extra", "null"], "extra"),
    ("mode: b", ["--mode", "null"], "mode"),
    ("quick: true", ["--quick", "null"], "quick"),
    ("rows: 5", ["--rows", "null"], "rows"),
    ("reports: [a, b]", ["--reports", "null"], "reports"),
    ("a_long_name: x", ["--a-long-name", "null"], "a_long_name"),
]


@dataclass
class Nullable(Settings):
    mode: Literal["a", "b"] | None = "a"
    quick: bool | None = True
    rows: int | None = 3
    reports: None | str | list[str] = None  # noqa: RUF036  # the parser needs None first
    a_long_name: str | None = "x"


@pytest.mark.parametrize(("text", "argv", "name"), NULLED)
def test_null_on_the_command_line_unsets_what_the_file_sets(parse, text, argv, name):
    assert getattr(parse(text, *argv, types=Nullable), name) is None
    assert getattr(parse(f"{name}: null", types=Nullable), name) is None, "as in the file"


def test_a_value_after_null_counts(parse):
    settings = parse("note: x", "--note", "null", "--note", "y", "--rows", "null", "--rows=7", types=Nullable)
    assert (settings.note, settings.rows) == ("y", 7)


def test_none_is_a_word(parse):
    assert parse("note: x", "--note", "none").note == "none"
    assert parse("note: x", "--note", "None").note == "None"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("steps", "`steps` must be a whole number, got None"),
        ("rate", "`rate` must be a number, got None"),
        ("critic", "`critic` must be 'adapter' or 'head', got None"),
        ("fast", "`fast` must be true or false, got None"),
        ("folder", "`folder` must be text (a number in quotes), got None"),
        ("modules", "`modules` must be a list of items that are text (a number in quotes), got None"),
    ],
)
def test_null_is_refused_where_a_field_has_none(name, expected):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse_stage(Nullable, [f"--{name}", "null"])
    assert expected in str(caught.value)
    assert "Leave the option out to keep its default." in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--reports", "a", "b"], "reports", ["a", "b"]),
        (["--reports=a", "b"], "reports", ["a", "b"]),
        (["--reports", "a"], "reports", "a"),
        (["--reports", "a", "b", "--reports", "c"], "reports", "c"),
        (["--reports", "c", "--reports", "a", "b"], "reports", ["a", "b"]),
        (["--weights", "1", "0.5"], "weights", [1.0, 0.5]),
        (["--weights", "-1", "-0.5"], "weights", [-1.0, -0.5]),
        (["--modules", "q", "v"], "modules", ["q", "v"]),
    ],
)
def test_several_words_are_a_list_where_a_field_has_one(parse, argv, name, value):
    assert getattr(parse("folder: x", *argv, "--steps", "4", types=Nullable), name) == value
    assert getattr(parse(f"{name}: {value!r}", types=Nullable), name) == value, "as in the file"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--steps", "1", "2"], "`steps` takes one value on the command line, got 2: 1 2."),
        (["--note", "two", "words"], "`note` takes one value on the command line, got 2: two words."),
        (["--fast", "true", "false"], "`fast` takes one value on the command line, got 2"),
        (["--critic=head", "adapter"], "`critic` takes one value on the command line, got 2"),
        (["--weights", "null", "1"], "--weights: invalid float value: 'null'"),
    ],
)
def test_several_words_are_refused_where_a_field_has_one(argv, expected):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse_stage(Nullable, argv)
    assert expected in str(caught.value)


def test_the_place_and_form_of_the_config_option_do_not_matter(tmp_path):
    path = tmp_path / "stage.yaml"
    path.write_text("steps: 7")
    for argv in (
        [f"--config={path}", "--rate", "2"],
        ["--rate", "2", "--config", str(path)],
        ["--rate", "2", "--config", str(path), "--note", "x"],
    ):
        (settings,) = parse_stage([Settings], argv)
        assert (settings.steps, settings.rate) == (7, 2.0)


def test_without_arguments_those_of_the_process_count(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--steps", "9"])
    assert parse_stage(Settings)[0].steps == 9


def test_an_args_file_beside_the_script_is_not_read(monkeypatch, tmp_path):
    (tmp_path / "ppo.args").write_text("--steps 99")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "ppo.py")])
    assert parse_stage(Settings)[0].steps == 3


def test_a_required_field_may_come_from_yaml(parse):
    assert parse("needed: 4", types=Required).needed == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 2.5", "`steps` must be a whole number, got 2.5 (float)"),
        ("steps: true", "`steps` must be a whole number, got True (bool)"),
        ("steps: null", "`steps` must be a whole number, got None"),
        ("steps: 1e3", "`steps` must be a whole number, got 1000.0 (float)"),
        ("steps: many", "--steps: invalid int value: 'many'"),
        ("rate: fast", "--rate: invalid float value: 'fast'"),
        ("rate: [0.1]", "`rate` must be a number, got [0.1] (list)"),
        ("critic: k9", "`critic` must be 'adapter' or 'head', got 'k9' (str)"),
        ("level: '2'", "`level` must be 1 or 2, got '2' (str)"),
        ("level: true", "`level` must be 1 or 2, got True (bool)"),
        ("clip: {a: 1}", "`clip` must be a number or null, got {'a': 1} (dict)"),
        ("folder: 7", "`folder` must be text (a number in quotes), got 7 (int)"),
        ("folder: null", "`folder` must be text (a number in quotes), got None (NoneType)"),
        ("fast: yes please", "--fast: Truthy value expected: got yes please"),
        ("fast: 1", "`fast` must be true or false, got 1 (int)"),
        ("weights: [a]", "`weights` must be a list of items that are a number or null, got ['a'] (list)"),
        ("weights: 0.5", "`weights` must be a list"),
        ("modules: q", "`modules` must be a list of items that are text"),
        ("extra: 3", "`extra` must be a mapping or text (a number in quotes) or null, got 3 (int)"),
    ],
)
def test_ill_typed_yaml_values_are_errors(parse, text, expected):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
        parse(text)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--steps", "2.5"], "--steps: invalid int value: '2.5'"),
        (["--critic", "k9"], "--critic: invalid choice: 'k9'"),
        (["--fast", "maybe"], "--fast: Truthy value expected: got maybe"),
        (["--stepps", "2"], "Unknown option on the command line: '--stepps' (did you mean '--steps'?)"),
        (
            ["--step", "2"],
            "Unknown option on the command line: '--step' (did you mean '--steps'?)",
        ),  # no abbreviations
        (["--stepps=2"], "'--stepps' (did you mean '--steps'?)"),
        (["zzz"], "Unknown option on the command line: 'zzz'."),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_wrong_command_lines_are_errors(argv, expected):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse_stage(Settings, argv)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("critc: head", r"Unknown key in .*stage.yaml: 'critc' \(did you mean 'critic'\?\)\."),
        ("help: 1", r"Unknown key in .*: 'help'"),  # the parser has it as an option, but no dataclass as a field
        ("zzz: 1\nstepz: 2", r"Unknown keys in .*: 'zzz', 'stepz' \(did you mean 'steps'\?\)"),
        ("5: 1", r"Unknown key in .*: '5'"),
        ("- steps", r"stage.yaml must hold a mapping of `field: value` lines, found list"),
        ("", r"must hold a mapping of `field: value` lines, found NoneType"),
        ("steps: [", r"(?s)stage.yaml is not valid YAML: .*line 1"),
        ("folder: !!python/object/apply:os.getcwd []", r"not valid YAML: .*could not determine a constructor"),
    ],
)
def test_wrong_files_and_keys_are_errors(parse, text, expected):
    with pytest.raises(ValueError, match=expected):
        parse(text)


def test_a_missing_config_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no config file .*no\.yaml"):
        parse_stage(Settings, ["--config", str(tmp_path / "no.yaml")])
    with pytest.raises(FileNotFoundError, match="There is no config file"):
        parse_stage(Settings, ["--config", str(tmp_path)])


def test_yaml_resolvers_of_other_programs_stay_as_they_were():
    assert yaml.safe_load("a: 1e-5\nb: no") == {"a": "1e-5", "b": False}


def test_bad_values_stop_before_a_config_is_built(parse):
    @dataclass
    class Strict:
        gamma: float = 1.0

        def __post_init__(self):
            raise AssertionError("built from a value that was never checked")

    with pytest.raises(ValueError, match="`gamma` must be a number, got None"):
        parse("gamma: null", types=Strict)


@pytest.mark.parametrize(
    "config",
    [
        lambda **kwargs: SFTConfig("out", use_cpu=True, bf16=False, **kwargs),
        lambda **kwargs: RewardConfig("out", use_cpu=True, bf16=False, **kwargs),
        lambda **kwargs: GRPOConfig("out", use_cpu=True, bf16=False, **kwargs),
    ],
    ids=["sft", "reward", "grpo"],
)
def test_trl_configs_pass_after_their_post_init(config):
    validate_fields(config())
    validate_fields(
        config(
            lr_scheduler_type="cosine",
            lr_scheduler_kwargs={"num_cycles": 1},
            eval_strategy="steps",
            eval_steps=5,
            report_to=["wandb"],
            resume_from_checkpoint=True,
            activation_checkpointing_kwargs={"use_reentrant": False},
        )
    )
    wrong = config()
    wrong.gradient_accumulation_steps = 2.5
    with pytest.raises(ValueError, match=r"`gradient_accumulation_steps` must be a whole number, got 2\.5"):
        validate_fields(wrong)


@pytest.mark.parametrize("config", [CompletionConfig, PreferenceConfig, PPOConfig])
@pytest.mark.parametrize(
    ("fields", "recomputed"),
    [
        ({}, True),
        ({"activation_checkpointing": False}, False),
        ({"activation_checkpointing": True}, True),
        ({"gradient_checkpointing": False}, False),  # the old name still counts
        ({"gradient_checkpointing": True, "activation_checkpointing": False}, False),
    ],
)
def test_defaults_that_nobody_has_set_bring_no_warning(config, fields, recomputed, recwarn):
    made = config("out", bf16=False, **fields)
    assert made.activation_checkpointing == made.gradient_checkpointing == recomputed
    assert made.dataloader_pin_memory == torch.accelerator.is_available()  # torch would warn where there is none
    assert not [str(one.message) for one in recwarn if "deprecated" in str(one.message)]


@pytest.mark.parametrize("config", [CompletionConfig, PreferenceConfig, PPOConfig])
def test_switches_are_still_checked(config):
    made = config("out", use_cpu=True, bf16=False)
    made.activation_checkpointing = "sometimes"
    with pytest.raises(ValueError, match="`activation_checkpointing` must be true or false or null, got 'sometimes'"):
        validate_fields(made)


def test_bars_of_libraries_are_for_terminals(monkeypatch):
    import datasets
    import transformers

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True, write=len, flush=int))
    datasets.enable_progress_bars()
    transformers.logging.enable_progress_bar()
    parse_stage(DataArguments, [])
    assert datasets.are_progress_bars_disabled() is False
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: False, write=len, flush=int))
    parse_stage(DataArguments, [])
    assert datasets.are_progress_bars_disabled() is True
    assert transformers.logging.is_progress_bar_enabled() is False


def test_a_setting_read_before_the_others_is_the_one_that_counts(tmp_path):
    file = tmp_path / "rloo.yaml"
    file.write_text("beta: 1e-2\nalgorithm: rloo\n")
    for argv, expected in (
        ([], None),
        (["--beta", "0.1"], None),
        (["--config", str(file)], "rloo"),
        ([f"--config={file}", "--beta", "0.1"], "rloo"),
        (["--config", str(file), "--algorithm", "grpo"], "grpo"),
        (["--algorithm=grpo", "--config", str(file)], "grpo"),
        (["--use-cpu", "true", "--algorithm", "rloo", "--use_cpu", "true"], "rloo"),
        (["--algorithm", "grpo", "--algorithm", "rloo"], "rloo"),
    ):
        assert read_setting("algorithm", argv) == expected, argv
        if expected:  # what the whole line says
            types = (GroupArguments, RLOOAdapterConfig if expected == "rloo" else GRPOAdapterConfig)
            assert parse_stage(types, [*argv, "--use_cpu", "true", "--bf16", "false"])[0].algorithm == expected
    with pytest.raises(FileNotFoundError, match="There is no config file"):
        read_setting("algorithm", ["--config", str(tmp_path / "none.yaml")])
    file.write_text("- rloo")
    with pytest.raises(ValueError, match="must hold a mapping"):
        read_setting("algorithm", ["--config", str(file)])


STAGES = {
    "sft": (DataArguments, CompletionConfig, ModelConfig),
    "reward": (DataArguments, PreferenceConfig, RewardModelConfig),
    "ppo": (PPOArguments, DataArguments, PPOConfig, ModelConfig),
    "grpo": (GroupArguments, DataArguments, GRPOAdapterConfig, ModelConfig),
    "rloo": (GroupArguments, DataArguments, RLOOAdapterConfig, ModelConfig),
}


@pytest.mark.parametrize("types", STAGES.values(), ids=STAGES)
def test_null_unsets_every_field_of_a_stage_that_may_be_null_and_no_other(types):
    on_cpu = ["--use_cpu", "true", "--bf16", "false", "--output_dir", "out"]
    hints = {name: hint for one in types for name, hint in get_type_hints(one).items() if not name.startswith("_")}
    names = fields_of(*types)
    nullable = {name for name in names if type(None) in get_args(hints[name])}
    assert len(nullable) > 40
    # Left out of the line: what this test needs; the rest is unset in one go.
    needed = {"bf16", "output_dir"}
    if PPOConfig in types:  # which refuses a change of fields that it does not use, and completions without an end
        needed |= {"max_completion_length", "vllm_importance_sampling_clip_max", *UNUSED}
    elif "num_generations" in names:  # the size of a group
        needed |= {"num_generations"}
    line = [text for name in sorted(nullable - needed) for text in (f"--{name}", "null")]
    configs = parse_stage(types, [*on_cpu, *line])
    plain = parse_stage(types, on_cpu)
    # What a configuration fills in by itself where it finds null; transformers and TRL say how.
    filled = {"output_dir", "bf16", "activation_checkpointing", "disable_tqdm", "accelerator_config", "report_to"}
    filled |= {"activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "ddp_find_unused_parameters"}
    filled |= {"num_generations_eval", "generation_batch_size", "steps_per_generation"}
    for config, default in zip(configs, plain, strict=True):
        for name in fields_of(type(config)) - filled - needed:
            assert getattr(config, name) == (None if name in nullable else getattr(default, name)), name
    for name in sorted(names - nullable):
        with pytest.raises(ValueError, match=f"`{name}` must be .*Leave the option out"):
            _split_options([f"--{name}", "null"], hints)


@pytest.mark.parametrize("types", STAGES.values(), ids=STAGES)
def test_every_field_of_a_stage_takes_several_words_as_a_list_or_is_named(types):
    on_cpu = ["--use_cpu", "true", "--bf16", "false", "--output_dir", "out"]
    listed = {"report_to": ["wandb", "tensorboard"], "optim_target_modules": ["q", "v"], "label_names": ["a", "b"]}
    line = [text for name, words in listed.items() for text in (f"--{name}", *words)]
    training = parse_stage(types, [*on_cpu, *line])[types.index(next(t for t in types if "report_to" in fields_of(t)))]
    assert {name: getattr(training, name) for name in listed} == listed
    hints = {name: hint for one in types for name, hint in get_type_hints(one).items()}
    for name in sorted(fields_of(*types)):
        kinds = get_args(hints[name]) or (hints[name],)
        if any(get_origin(kind) is list or kind is list for kind in (hints[name], *kinds)):
            continue
        with pytest.raises(ValueError, match=f"`{name}` takes one value on the command line, got 2: a b"):
            _split_options([f"--{name}", "a", "b"], hints)


def test_nothing_is_reported_to_null():
    argv = ["--use_cpu", "true", "--bf16", "false", "--report_to", "null"]
    assert parse_stage(SFTConfig, argv)[0].report_to == []  # transformers would report to `[None]`


def test_trl_model_config_passes_with_one_target_module():
    validate_fields(ModelConfig())
    unpacked = ModelConfig(lora_target_modules=["all-linear"])
    assert unpacked.lora_target_modules == "all-linear"  # its `__post_init__` takes the one value out of the list
    validate_fields(unpacked)


def test_validate_fields_judges_what_python_code_gives():
    validate_fields(Settings(strategy=IntervalStrategy.STEPS, clip=None, weights=[1, 0.5]))
    validate_fields(Settings(extra=argparse.Namespace()))  # an object: not judged
    for wrong in ({"critic": "k9"}, {"steps": 1.0}, {"fast": "yes"}, {"weights": ["a"]}, {"rate": True}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            validate_fields(Settings(**wrong))


def test_what_was_built_is_checked_too():
    @dataclass
    class WrongDefault:
        steps: int = 2.5

    with pytest.raises(ValueError, match="`steps` must be a whole number, got 2.5"):
        parse_stage(WrongDefault, [])


def test_parsing_leaves_the_annotations_intact(parse):
    # The parser overwrites `field.type` of `float | None` by `float`: None must still be allowed afterwards.
    parse("clip: null")
    validate_fields(Settings(clip=None))


def test_three_dataclasses_of_a_stage_are_parsed_together(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(
        "dataset_name: pairs.jsonl\nlearning_rate: 2e-4\nsave_strategy: no\nlora_r: 4\nload_in_4bit: true\n"
        "lora_target_modules: all-linear\nuse_cpu: true\nbf16: false\noutput_dir: out\n"
    )
    data, training, model = parse_stage((DataArguments, SFTConfig, ModelConfig), ["--config", str(path)])
    assert (data.dataset_name, training.learning_rate, training.save_strategy) == ("pairs.jsonl", 2e-4, "no")
    assert (model.lora_r, model.load_in_4bit, model.lora_target_modules) == (4, True, "all-linear")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"test_size": 0.0}, "`test_size` must lie between 0 and 1, got 0"),
        ({"test_size": 1}, "`test_size` must lie between 0 and 1, got 1"),
        ({"test_size": "half"}, "`test_size` must be a number, got 'half'"),
        ({"max_train_rows": 0}, "`max_train_rows` must be at least 1"),
        ({"max_test_rows": -3}, "`max_test_rows` must be at least 1"),
    ],
)
def test_data_arguments_are_checked(wrong, expected):
    with pytest.raises(ValueError, match=expected):
        DataArguments(**wrong)


def test_config_imports_without_trl():
    code = "import sys, rlhf_recipes.config; print([m for m in ('trl', 'torch', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
