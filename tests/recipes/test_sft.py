"""The SFT stage, run as a user runs it, and in this process."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import SFTTrainer

from rlhf_recipes.config import parse_stage
from rlhf_recipes.models import load_causal_lm

NOUNS = "film story actor ending scene plot music".split()
PROMPTS = [f"the {noun} was {word}" for noun in NOUNS for word in ("very", "so", "not")]
FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
COMPLETIONS = [{"prompt": prompt, "completion": " good and warm"} for prompt in PROMPTS]


def chat(prompt, *answers):
    return [{"role": "user", "content": prompt}] + [{"role": "assistant", "content": answer} for answer in answers]


@pytest.fixture
def model_with_pad(tiny_model_path, tmp_path):
    """Folder of the tiny model whose tokenizer pads with the given token."""

    def make(pad_token):
        folder = tmp_path / "model"
        load_causal_lm(tiny_model_path).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
        tokenizer.pad_token = pad_token
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def check_the_files(folder, *parents):
    """Check what a stage of two steps with the quickstart's configuration leaves behind."""
    adapter = load_file(folder / "adapter_model.safetensors")
    assert adapter
    assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in adapter.items())
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == parents[0]
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert any("eval_loss" in entry for entry in state["log_history"])
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["perplexity"] == pytest.approx(math.exp(evaluation["loss"]))
    run = json.loads((folder / "run.json").read_text())
    assert (run["recipe"], run["stage"]) == ("tiny", "sft")
    assert [parent["path"] for parent in run["parents"]] == list(parents)


def test_with_the_quickstart_configuration(run_stage, repo_root, tiny_model_path, write_rows, capsys):
    config = repo_root / "recipes" / "quickstart" / "sft.yaml"
    rows = write_rows(COMPLETIONS * 4)
    stage = run_stage("sft", config=config, dataset_name=rows)
    check_the_files(stage.folder, tiny_model_path, rows)
    assert stage.trainer.model.get_base_model().is_loaded_in_4bit
    assert "gradients, Adam" in capsys.readouterr().out  # the table of what is trained


@pytest.mark.slow
def test_launched_with_the_quickstart_configuration(repo_root, tiny_model_path, write_rows, tmp_path):
    """`tests/recipes/test_ppo.py` launches the stage of PPO in every run of the suite."""
    folder = tmp_path / "tiny" / "sft"
    options = {
        "config": repo_root / "recipes" / "quickstart" / "sft.yaml",
        "model_name_or_path": tiny_model_path,
        "dataset_name": write_rows(COMPLETIONS * 4),
        "output_dir": folder,
        "max_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
    }
    argv = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "recipes/sft.py", *argv]
    environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_API_KEY")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(repo_root)}  # no W&B login of the user is found there
    result = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=repo_root, env=environment, timeout=180
    )
    assert result.returncode == 0, result.stderr
    assert "gradients, Adam" in result.stdout  # the table of what is trained
    check_the_files(folder, tiny_model_path, options["dataset_name"])
    assert list((folder / "wandb").glob("offline-run-*")), "without an API key the W&B run is kept offline"
    assert any("2/2" in line for line in result.stdout.splitlines()), "a step has a line"
    assert "\r" not in result.stderr, "a bar is for terminals"
    assert "gemv_4bit: an autograd kernel was not registered" not in result.stderr


@pytest.mark.parametrize("four_bit", [False, True], ids=["float32", "4-bit"])
def test_the_saved_adapter_is_the_trained_model(run_stage, write_rows, tiny_tokenizer, four_bit):
    stage = run_stage("sft", dataset_name=write_rows(COMPLETIONS), max_steps=5, load_in_4bit=four_bit)
    trainable = [(name, p) for name, p in stage.trainer.model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trainable)

    ids = tiny_tokenizer(PROMPTS[:3], return_tensors="pt")
    trained = stage.trainer.model.eval()(**ids).logits
    loaded = AutoPeftModelForCausalLM.from_pretrained(
        stage.folder, dtype=torch.float32, quantization_config=FOUR_BIT if four_bit else None
    )
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' other kernel shifts outputs by about 1 %
            module.support_avx512bf16_for_cpu = False
    assert_close(loaded.eval()(**ids).logits, trained, rtol=0, atol=1e-5)
    with loaded.disable_adapter():
        assert (loaded(**ids).logits - trained).abs().max() > 0.1
    saved = AutoTokenizer.from_pretrained(stage.folder)
    assert saved(PROMPTS).input_ids == tiny_tokenizer(PROMPTS).input_ids


def test_the_held_out_loss_is_that_of_the_completions_of_other_prompts(run_stage, write_rows, tiny_tokenizer):
    stage = run_stage("sft", dataset_name=write_rows(COMPLETIONS * 2), test_size=0.4, per_device_eval_batch_size=100)
    held_out = set(stage.trainer.eval_dataset["prompt"])
    assert held_out.isdisjoint(stage.trainer.train_dataset["prompt"])
    assert held_out | set(stage.trainer.train_dataset["prompt"]) == set(PROMPTS)

    model = AutoPeftModelForCausalLM.from_pretrained(stage.folder, dtype=torch.float32).eval()
    losses = []
    for prompt in held_out:
        ids = tiny_tokenizer(f"{prompt} good and warm <eos>", return_tensors="pt").input_ids
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses += [-logps[position, ids[0, position + 1]] for position in range(3, 7)]  # good, and, warm, <eos>
    expected = torch.stack(losses).mean().item()
    assert stage.evaluation["loss"] == pytest.approx(expected, abs=1e-5)
    assert stage.evaluation["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert stage.evaluation["n"] == 2 * len(held_out)


@pytest.mark.parametrize(
    ("row", "counted"),
    [
        (lambda p: {"prompt": p, "completion": " good"}, "good <eos>"),
        (lambda p: {"prompt": p, "chosen": " good", "rejected": " bad"}, "good <eos>"),
        (lambda p: {"prompt": chat(p), "completion": chat(p, "good")[1:]}, "good <eos>"),
        (lambda p: {"chosen": chat(p, "good"), "rejected": chat(p, "bad")}, "good <eos>"),
        (lambda p: {"messages": chat(p, "good")}, "<user> {} <eos> <assistant> good <eos>"),
        (lambda p: {"text": f"{p} good"}, "{} good <eos>"),
    ],
    ids=["completion", "preference", "chat completion", "chat preference", "messages", "text"],
)
def test_the_loss_counts_completions_with_their_end_token(run_stage, write_rows, tiny_tokenizer, row, counted):
    stage = run_stage("sft", dataset_name=write_rows([row(prompt) for prompt in PROMPTS]), max_steps=1)
    seen = set()
    for example in stage.trainer.train_dataset:
        text = tiny_tokenizer.decode(example["input_ids"])
        prompt = next(prompt for prompt in PROMPTS if f"{prompt} " in f"{text} ")
        labels = [label for label in example["labels"] if label != -100]
        assert labels == tiny_tokenizer(counted.format(prompt)).input_ids
        assert example["labels"][-len(labels) :] == labels
        seen.add(prompt)
    assert len(seen) > 10


@pytest.mark.parametrize("pad_token", [pytest.param("<pad>", marks=pytest.mark.slow), "<eos>"])
def test_the_model_learns_to_stop(run_stage, write_rows, model_with_pad, pad_token):
    """Rows of different lengths, so that padding is next to the end token."""
    rows = [{"prompt": prompt, "completion": " good" if "so" in prompt else " good and warm"} for prompt in PROMPTS]
    path = model_with_pad(pad_token)
    options = {"max_steps": 40, "learning_rate": 2e-2, "load_in_4bit": True, "test_size": 0.2, "lora_r": 16}
    stage = run_stage("sft", dataset_name=write_rows(rows * 3), model_name_or_path=path, **options)
    tokenizer = stage.trainer.processing_class
    prompt = tokenizer("the film was very", return_tensors="pt")
    model = stage.trainer.model.eval()
    completion = model.generate(**prompt, max_new_tokens=10, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert tokenizer.decode(completion[0, 4:]) == "good and warm <eos>"


def test_resuming_gives_the_uninterrupted_run(run_stage, write_rows, tmp_path, monkeypatch):
    options = {"dataset_name": write_rows(COMPLETIONS), "max_steps": 4, "load_in_4bit": True}
    whole = run_stage("sft", **options, save_strategy="steps", save_steps=2)
    expected = load_file(whole.folder / "adapter_model.safetensors")
    for path in whole.folder.iterdir():  # as after a crash: only the checkpoint of step 2 is there
        path.rename(tmp_path / path.name)
    (tmp_path / "checkpoint-2").rename(whole.folder / "checkpoint-2")

    steps = []
    step = SFTTrainer.training_step
    monkeypatch.setattr(SFTTrainer, "training_step", lambda *args: steps.append(1) or step(*args))
    resumed = run_stage("sft", **options, resume_from_checkpoint=True)
    assert (len(steps), resumed.trainer.state.global_step) == (2, 4)
    weights = load_file(resumed.folder / "adapter_model.safetensors")
    start = load_file(resumed.folder / "checkpoint-2" / "adapter_model.safetensors")
    assert weights.keys() == expected.keys()
    assert any(not torch.equal(start[name], weight) for name, weight in weights.items())
    for name, weight in weights.items():
        assert_close(weight, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [{"gradient_checkpointing": True}, {"eval_strategy": "steps", "eval_steps": 1}],
    ids=["gradient checkpointing", "evaluations in between"],
)
def test_training_in_4_bits_is_not_changed_by(run_stage, write_rows, tmp_path, change):
    options = {"dataset_name": write_rows(COMPLETIONS), "load_in_4bit": True, "lora_dropout": 0.0, "max_steps": 3}
    plain = run_stage("sft", **options)
    changed = run_stage("sft", **options, **change, output_dir=str(tmp_path / "tiny" / "changed"))
    expected, weights = (load_file(s.folder / "adapter_model.safetensors") for s in (plain, changed))
    for name, weight in weights.items():
        assert_close(weight, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{"bf16": True}, {"bf16": True, "load_in_4bit": True, "dtype": "bfloat16"}])
def test_half_precision_trains(run_stage, write_rows, options):
    stage = run_stage("sft", dataset_name=write_rows(COMPLETIONS), **options)
    assert math.isfinite(stage.evaluation["loss"])
    assert all(p.dtype == torch.float32 for p in stage.trainer.model.parameters() if p.requires_grad)


class TestBadInput:
    """What can be wrong is refused before a step is made, and before anything is written."""

    @pytest.fixture
    def refused(self, run_stage, tmp_path, monkeypatch):
        def check(error, message, **options):
            def train(*_, **__):
                raise AssertionError("training began")

            monkeypatch.setattr("transformers.Trainer.train", train)
            with pytest.raises(error, match=message):
                run_stage("sft", **options)
            assert not list((tmp_path / "tiny" / "sft").glob("*"))

        return check

    def test_an_adapter_on_the_output_head(self, refused, write_rows):
        refused(ValueError, "lm_head", dataset_name=write_rows(COMPLETIONS), lora_target_modules="lm_head")

    def test_wrong_columns(self, refused, write_rows):
        rows = [{"question": "a", "answer": "b"}]
        refused(ValueError, r"Expected the columns .*found `question`, `answer`", dataset_name=write_rows(rows))

    def test_an_empty_completion(self, refused, write_rows):
        rows = [*COMPLETIONS, {"prompt": "the film", "completion": " "}]
        refused(ValueError, "empty", dataset_name=write_rows(rows))

    def test_a_missing_dataset(self, refused):
        refused(FileNotFoundError, "no file or folder", dataset_name="./missing.jsonl")

    def test_a_limit_that_no_row_meets(self, refused, write_rows):
        refused(ValueError, "None of the .* train rows fits", dataset_name=write_rows(COMPLETIONS), max_length=4)

    def test_a_row_longer_than_the_context(self, refused, write_rows):
        rows = [{"prompt": prompt, "completion": " very" * 200} for prompt in PROMPTS]
        message = "`input_ids` of the train rows: the longest has 205 tokens, but the model's context is 128"
        refused(ValueError, message, dataset_name=write_rows(rows))

    def test_a_chat_for_a_model_without_a_template(self, refused, write_rows, model_with_pad):
        path = model_with_pad("<pad>")
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = None
        os.remove(os.path.join(path, "chat_template.jinja"))
        tokenizer.save_pretrained(path)
        rows = [{"messages": chat(prompt, "good")} for prompt in PROMPTS]
        refused(ValueError, "chat_template", dataset_name=write_rows(rows), model_name_or_path=path)

    def test_an_output_folder_in_use(self, run_stage, write_rows, tmp_path):
        folder = tmp_path / "tiny" / "sft"
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_text("mine")
        with pytest.raises(FileExistsError, match="is not empty"):
            run_stage("sft", dataset_name=write_rows(COMPLETIONS))
        assert (folder / "adapter_model.safetensors").read_text() == "mine"


def test_rows_that_do_not_fit_are_reported(run_stage, write_rows, caplog):
    long_prompt = {"prompt": "the film was very " * 4, "completion": " good"}
    stage = run_stage("sft", dataset_name=write_rows(COMPLETIONS + [long_prompt] * 3), max_length=8, test_size=0.2)
    messages = [record.getMessage() for record in caplog.records]
    assert any("3 of" in message and "do not fit into `max_length` (8 tokens)" in message for message in messages)
    assert len(stage.trainer.train_dataset) + stage.evaluation["n"] == len(COMPLETIONS)


def test_the_quickstart_configuration_is_valid(load_stage, repo_root):
    config = str(repo_root / "recipes" / "quickstart" / "sft.yaml")
    data_args, training_args, model_args = parse_stage(load_stage("sft").ARGUMENTS, ["--config", config])
    assert data_args.dataset_name.endswith("sft.jsonl")
    assert training_args.learning_rate == 4e-3
    assert not training_args.bf16
    assert model_args.load_in_4bit
