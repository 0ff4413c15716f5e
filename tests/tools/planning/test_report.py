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


def test_budget_that_is_too_small_names_phase_and_need_and_what_fits(plan):
    text = plan(budget_gib=0.001)
    assert re.search(r"0\.001 GiB are too few: .* the phase '\w+' needs at least 0\.0\d GiB\.", text)
    assert "No change of a few fields makes it fit" in text
    text = plan(budget_gib=0.5005, use_cpu="false")  # half a GiB is for the context
    assert re.search(r"0\.5 GiB are too few: .*\nWhat fits: `--gpu rtx4090`", text)
    text = plan(budget_gib=0.1, steps_per_generation=8192)
    assert re.search(r"the phase 'generate' needs at least .*\nWhat fits: a rollout of one optimizer step", text)


GPUS = {"use_cpu": "false", "gpu": "h100"}


def test_several_gpus(plan):
    one, ddp = plan(**GPUS), plan(num_processes=4, **GPUS)
    assert "DDP: each holds everything" in ddp
    assert "buffers" in ddp
    assert "buffers" not in one
    text = plan(num_processes=4, num_machines=2, sharding="fsdp2", load_in_4bit="false", **GPUS)
    assert "processes  4 on 2 machines, FSDP2: each holds 1/4 of weights" in text
    assert "every GPU holds all weights" in text
    assert "16,384 completion tokens at most" in text  # four times those of one process
    assert "stay whole on every GPU" not in text
    four_bits = plan(num_processes=4, sharding="fsdp2", **GPUS)
    assert "4-bit weights in tensors of bytes stay whole" in four_bits
    floats = plan(num_processes=4, sharding="zero3", bnb_4bit_quant_storage="bfloat16", **GPUS)
    assert "ZeRO-3: each holds 1/4" in floats
    assert "stay whole" not in floats
    assert "`PPOTrainer` does not run under ZeRO-3" in floats
    shared = plan(num_processes=4, sharding="zero2", **GPUS)
    assert "but 1/4 of gradients and optimizer states" in shared
    assert "`PPOTrainer` runs under ZeRO-2 with `bf16: false`" in shared


def test_speed_is_a_range_with_its_assumptions(plan):
    text = plan(**GPUS)
    low, high = re.search(r"([\d.,]+) to ([\d.,]+) completion tokens per second: an update takes", text).groups()
    assert 0 < float(low.replace(",", "")) < float(high.replace(",", ""))
    assert "Computed, not measured." in text
    assert "H100 SXM 80 GB has 3,350 GB/s, 989 TFLOP/s" in text
    assert "completion tokens per second" not in plan(use_cpu="false", budget_gib=80)
    assert "completion tokens per second" not in plan(budget_gib=0.5005, **GPUS)  # only other GPUs would do
    with_changes = plan(budget_gib=0.55, steps_per_generation=8192, **GPUS)
    assert re.search(r"What fits: .*\n\nWith these changes [\d.,]+ to", with_changes)


def test_vllm(plan):
    text = plan(QUICKSTART, "--use_vllm", vllm_mode="server", vllm_tensor_parallel_size=2, **GPUS)
    assert re.search(r"vllm       on GPUs of its own, 2 for a copy of the model: on each 0\.0 GiB of weights", text)
    assert re.search(r"sync       \d+ MiB after each update: the policy's adapter", text)
    assert "generated together" not in text
    text = plan(QUICKSTART, "--use_vllm", vllm_gpu_memory_utilization=0.25, **GPUS)  # colocate is TRL's default
    quarter = next(line.split() for line in text.splitlines() if line.split()[:1] == ["train"])[-2]
    assert quarter == f"{81_559 / 4:,.0f}"
    awake = peaks_of(text)
    asleep = peaks_of(plan(QUICKSTART, "--use_vllm", "--vllm_enable_sleep_mode", **GPUS))
    assert asleep["train"] < awake["train"]
    crowded = plan(QUICKSTART, "--use_vllm", vllm_mode="colocate", vllm_gpu_memory_utilization=0.0001, **GPUS)
    assert "0.00796 GiB for vLLM are too few" in crowded


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_processes", "3", "--num_machines", "2"], "`--num_processes` 3 cannot be spread over"),
        (["--sharding", "fsdp2"], "`--sharding fsdp2` divides a run among GPUs: give `--num_processes`, 2 or more."),
        (["--sharding", "megatron"], "invalid choice: 'megatron'"),
        (["--gpu", "h900"], "invalid choice: 'h900'"),
        (["--num_processes", "0"], "`--num_processes` must be above 0, got 0."),
        (["--vllm_mode", "server"], "`--vllm_mode` is an option of vLLM: add `--use_vllm`"),
        (["--use_vllm", "perhaps"], "expected true or false, got 'perhaps'"),
        (["--use_vllm", "--vllm_gpu_memory_utilization", "1.5"], "above 0 and at most 1, got 1.5"),
        (["--use_vllm", "--num_processes", "3", "--vllm_tensor_parallel_size", "2"], "2 does not divide"),
        (
            ["--num_processes", "2", "--generation_batch_size", "128", "--steps_per_generation", "null"],
            "`generation_batch_size` counts the completions of all processes",
        ),
    ],
)
def test_bad_layouts_are_named(plan, words, message):
    gpus = {} if "--gpu" in words else GPUS
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(QUICKSTART, *words, **gpus)


def test_gpus_that_are_missing_are_named(plan):
    with pytest.raises(ValueError, match="`--gpu` plans for a GPU, and this run is on a CPU"):
        plan(gpu="h100")
    with pytest.raises(ValueError, match="vLLM takes a share of a GPU: say which by `--gpu`"):
        plan(QUICKSTART, "--use_vllm", use_cpu="false")


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
