"""The command: shipped YAMLs with local models, bad input, and that it agrees with the trainer that it plans for."""

import re
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from trl import ModelConfig

from rlhf_recipes.models.parameter_table import roles_table
from rlhf_recipes.ppo.arguments import PPOArguments
from rlhf_recipes.tools.cli import main
from rlhf_recipes.tools.commands.fields import read_fields
from rlhf_recipes.tools.planning import report
from rlhf_recipes.tools.planning.phases import PHASES, ppo_memory
from rlhf_recipes.tools.planning.run import longest_prompt, optimizer_bytes, run_sizes

ROOT = Path(__file__).resolve().parents[3]
FIELDS = read_fields(ROOT / "recipes" / "ppo.py").keys()  # a recipe whose script has fields of its own is not planned
PPO_YAMLS = sorted(ROOT.glob("recipes/*/ppo.yaml"))
CONFIGS = [path for path in PPO_YAMLS if yaml.safe_load(path.read_text()).keys() <= FIELDS]
QUICKSTART = ROOT / "recipes" / "quickstart" / "ppo.yaml"


@pytest.fixture
def plan(tiny_model_path, sft_adapter, reward_adapter):
    """Plan a YAML with the tiny model in the place of its own."""

    def run(config=QUICKSTART, *more, **fields):
        fields = {
            "model_name_or_path": tiny_model_path,
            "sft_adapter": sft_adapter,
            "reward_adapter": reward_adapter,
            "prompt_length": 12,
        } | fields
        words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
        return report.write_plan(["--config", str(config), *words, *more])

    return run


def peaks_of(text):
    rows = [line.split() for line in text.splitlines() if line.split()[:1] and line.split()[0] in PHASES]
    return {row[0]: float(row[-1].replace(",", "")) for row in rows}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.parent.name)
def test_shipped_yamls_are_planned(plan, config):
    text = plan(config)
    assert set(peaks_of(text)) == set(PHASES)
    on_cpu = "use_cpu: true" in config.read_text()
    assert ("on a CPU" in text, "Note: planned for a GPU" in text) == (on_cpu, not on_cpu)


def test_plan_says_what_a_run_is(plan):
    text = plan()
    assert "12 + 32 tokens" in text
    assert "128 completions per rollout, 16 in a micro-batch, 128 in one of an evaluation" in text
    assert (
        "per update 4,096 completion tokens at most, 5,632 with prompts; 2 epochs of them in 16 optimizer steps"
        in text
    )
    assert "4-bit weights, computes in 32 bits, on a CPU" in text
    assert "not there yet" not in text


def test_longer_completions_take_more(plan):
    before, after = peaks_of(plan()), peaks_of(plan(max_completion_length=64))
    assert after["train"] > before["train"]
    assert after["generate"] > before["generate"]


def test_an_average_of_the_weights_is_one_more_copy_of_the_policys_adapter(tiny_model_path, sft_adapter, make_config):
    def sizes(**fields):
        ppo_args, model_args = PPOArguments(sft_adapter=str(sft_adapter)), ModelConfig(tiny_model_path)
        return run_sizes(ppo_args, make_config(**fields), model_args, prompt_length=8, device="cpu")[0]

    without, averaged = sizes(), sizes(ema_decay=0.992)
    assert averaged.frozen - without.frozen == without.policy.parameters > 0
    for phase, memory in ppo_memory(without).items():
        assert ppo_memory(averaged)[phase].adapters - memory.adapters == 4 * without.policy.parameters


def test_stages_that_have_not_run_are_assumed(plan):
    text = plan(reward_adapter="outputs/nowhere/reward")
    assert "Note: reward adapter 'outputs/nowhere/reward' is not there yet" in text


def test_budget_gives_the_largest_micro_batch(plan):
    text = plan(budget_gib=16, gradient_accumulation_steps=4, steps_per_generation=8)
    assert "`per_device_train_batch_size: 64` with `gradient_accumulation_steps: 1`" in text
    some = re.search(r"micro-batch is `per_device_train_batch_size: (\d+)`", plan(budget_gib=0.05))
    assert 1 <= int(some[1]) <= 16


def test_budget_that_is_too_small_names_phase_and_need(plan):
    with pytest.raises(
        ValueError, match=r"0\.001 GiB are too few: .* the phase '\w+' needs at least 0\.0\d GiB\. What"
    ):
        plan(budget_gib=0.001)
    with pytest.raises(
        ValueError, match=r"the phase 'generate' needs .* \(`steps_per_generation`; \d+ completions fit"
    ):
        plan(budget_gib=0.1, steps_per_generation=8192)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt_lenth", "5"], "Unknown option on the command line: '--prompt_lenth'"),
        (["--budget_gib", "much"], "invalid float value: 'much'"),
        (["--budget_gib", "-1"], "`--budget_gib` must be above 0, got -1"),
        (["--kl_estimator", "k9"], "k9"),
    ],
)
def test_bad_words_are_named(plan, words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(QUICKSTART, *words)


def test_other_files_and_models_are_named(plan, capsys, tmp_path):
    with pytest.raises(ValueError, match=r"Unknown key .* Plans are for the PPO stage: give its YAML"):
        plan(QUICKSTART.with_name("sft.yaml"))
    with pytest.raises(FileNotFoundError, match="There is no config file"):
        plan(tmp_path / "nothing.yaml")
    with pytest.raises(FileNotFoundError, match="No configuration of the model"):
        plan(model_name_or_path="./nowhere")
    with pytest.raises(ValueError, match="The prompts cannot be read, so give `--prompt_length` in tokens"):
        report.write_plan(["--config", str(QUICKSTART), "--model_name_or_path", str(tmp_path)])
    assert main(["plan", "--config", str(tmp_path / "nothing.yaml")]) == 2
    assert "rlhf-recipes plan: There is no config file" in capsys.readouterr().err


def test_command_prints_the_plan(tiny_model_path, capsys):
    words = ["--config", str(QUICKSTART), "--model_name_or_path", tiny_model_path, "--prompt_length", "8"]
    assert main(["plan", *words]) == 0
    assert set(peaks_of(capsys.readouterr().out)) == set(PHASES)


def test_longest_prompt_is_read_from_the_rows(tiny_model_path, tmp_path, make_config):
    from rlhf_recipes.config import DataArguments

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{text}"}}\n' for text in ["the film"] * 9 + ["the film was good and warm"]))
    model_args = ModelConfig(model_name_or_path=tiny_model_path)
    found = longest_prompt(PPOArguments(), DataArguments(dataset_name=str(rows)), make_config(), model_args)
    assert found == 6


def test_optimizer_bytes():
    assert [optimizer_bytes(name) for name in ("adamw_torch_fused", "adamw_8bit", "sgd")] == [8.0, 2.03125, 0.0]


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_planned_parameters_are_those_of_the_trainer(
    critic, make_trainer, make_config, tiny_model_path, sft_adapter, reward_adapter
):
    trainer = make_trainer(critic=critic)
    arguments = PPOArguments(sft_adapter=str(sft_adapter), reward_adapter=str(reward_adapter))
    model_args = ModelConfig(model_name_or_path=tiny_model_path)
    sizes, notes = run_sizes(arguments, make_config(critic=critic), model_args, 8, "cpu")
    assert notes == []
    parameters = list(trainer.model.parameters())
    assert sizes.trained == sum(p.numel() for p in parameters if p.requires_grad)
    memory = ppo_memory(sizes)["train"]
    assert memory.weights + memory.adapters == sum(p.numel() * p.element_size() for p in parameters)
    assert f"{sizes.trained:,}" in roles_table(trainer.model, trainer.roles, {}).splitlines()[-1]
    rollout = make_config(critic=critic).generation_batch_size
    assert (sizes.rollout, sizes.micro_batch, sizes.evaluation_batch) == (rollout, 4, 8)


def test_roles_table_counts_four_bits(make_trainer, quantization):
    trainer = make_trainer(quantization_config=quantization)
    [shared] = [
        line.split()
        for line in roles_table(trainer.model, trainer.roles, {}).splitlines()
        if line.startswith("base, shared")
    ]
    layers = 2 * (64 * 128 + 64 * 64 * 2 + 128 * 64 + 3 * 64 * 128)
    rest = trainer.roles.model.get_base_model().config.vocab_size * 64 * 2 + 5 * 64
    assert shared[2] == f"{layers + rest:,}"


@pytest.fixture
def quantization():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def test_whole_model_has_its_own_rows(make_trainer, tiny_model_path):
    trainer = make_trainer(
        model=tiny_model_path, critic_init="policy", reward_funcs=lambda completions, **_: [0.0] * 8
    )
    rows = {
        line.split("  ")[0].strip(): line.split()
        for line in roles_table(trainer.model, trainer.roles, {}).splitlines()
    }
    assert rows["policy"][1] == rows["policy"][2]
    assert rows["reference"][2] == "0"
    assert "base, shared" not in rows


def test_lora_fields_are_those_of_a_fresh_adapter(make_config, tiny_model_path):
    model_args = ModelConfig(model_name_or_path=tiny_model_path, lora_r=4)
    sizes, _ = run_sizes(PPOArguments(), make_config(critic="head"), model_args, 8, "cpu")
    from rlhf_recipes.tools.planning.network import adapter_sizes, empty_model

    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    assert sizes.policy == adapter_sizes(empty_model(tiny_model_path), lora)
    assert (sizes.frozen, sizes.critic) == (0, None)
