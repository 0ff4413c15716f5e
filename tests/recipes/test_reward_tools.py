"""What stands between the reward stage and PPO: normalisation, serving, ensembles, and encoders, end to end."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForMaskedLM
from trl import ModelConfig, RewardConfig, RewardTrainer

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import to_preferences
from rlhf_recipes.data.context import context_length
from rlhf_recipes.data.loading import load_rows
from rlhf_recipes.models import load_reward_model, load_sequence_classifier, load_tokenizer, lora_config
from rlhf_recipes.models.readout import Readout
from rlhf_recipes.reward_modeling import score_sequences
from rlhf_recipes.rewards import ClassifierReward
from rlhf_recipes.rewards.encoding import encode_rows


@pytest.fixture
def copies(reward_adapter, tmp_path):
    """Two copies of the reward adapter with other normalisations."""
    folders = [shutil.copytree(reward_adapter, tmp_path / name) for name in ("seed_0", "seed_1")]
    Readout(gain=2.0, bias=1.0).save(folders[1])
    return [str(folder) for folder in folders]


def run(load_stage, name, *argv):
    script = load_stage(name)
    script.main(*parse_stage(script.ARGUMENTS, [str(word) for word in argv]))


def test_normalisation_of_a_folder(load_stage, copies, tiny_texts, write_rows, capsys):
    """C38: on the reference samples the scores that PPO sees have mean 0 and standard deviation 1."""
    rows = [{"prompt": f"{text} ", "completion": f"good {text}"} for text in tiny_texts]
    options = ["--dataset_name", write_rows(rows), "--dataset_test_split", "train"]
    run(load_stage, "normalize_reward", "--reward_model", copies[1], *options)
    assert re.search(r"16 samples with raw mean .*: gain .*, bias .*, saved in", capsys.readouterr().out)
    model, tokenizer = load_reward_model(copies[1])
    columns = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    scores = torch.tensor(ClassifierReward(model, tokenizer, readout=Readout.load(copies[1]))(*columns))
    assert_close(scores.mean(), torch.tensor(0.0), atol=1e-5, rtol=0.0)
    assert_close(scores.std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0.0)

    run(load_stage, "normalize_reward", "--reward_model", copies[1], "--mode", "mean_only", *options)
    assert Readout.load(copies[1]).gain == 1.0
    texts = write_rows([{"text": text} for text in tiny_texts], "texts.jsonl")
    with pytest.raises(ValueError, match="need `completion`"):
        run(load_stage, "normalize_reward", "--reward_model", copies[1], "--dataset_name", texts)


def test_normalisation_reads_instructions_as_the_reward_model_was_trained(
    load_stage, reward_adapter, write_rows, tmp_path, monkeypatch
):
    """Of HelpSteer2 with a chat template: the chat, not the two texts joined."""
    folder = shutil.copytree(reward_adapter, tmp_path / "reward")
    tokenizer = load_reward_model(folder)[1]
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '<eos>' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    tokenizer.save_pretrained(folder)
    seen = []
    monkeypatch.setattr(ClassifierReward, "scores", lambda self, *columns: seen.extend(columns) or [0.0, 1.0])
    texts = {"the film": ("bad", "good"), "the story": ("cold", "warm")}
    rows = [
        {"prompt": prompt, "response": answer, "helpfulness": grade}
        for prompt, answers in texts.items()
        for grade, answer in enumerate(answers)
    ]
    options = ["--dataset_name", write_rows(rows), "--dataset_test_split", "train"]
    run(load_stage, "normalize_reward", "--reward_model", folder, *options)
    assert seen[0] == [[{"role": "user", "content": prompt}] for prompt in texts]
    assert seen[1] == [[{"role": "assistant", "content": better}] for _, better in texts.values()]


def ppo_options(tiny_model_path, sft_adapter, tmp_path, tiny_texts, write_rows):
    return [
        *(
            "--model_name_or_path",
            tiny_model_path,
            "--sft_adapter",
            sft_adapter,
            "--output_dir",
            tmp_path / "t" / "ppo",
        ),
        *("--dataset_name", write_rows([{"prompt": text} for text in tiny_texts], "prompts.jsonl")),
        *("--dataset_test_split", "train", "--use_cpu", "true", "--bf16", "false", "--report_to", "none"),
        *("--max_steps", 1, "--per_device_train_batch_size", 8, "--steps_per_generation", 1, "--logging_steps", 1),
        *("--max_completion_length", 6, "--evaluation_rows", 8, "--gradient_checkpointing", "false"),
    ]


def log_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_ppo_with_an_ensemble(load_stage, copies, tiny_model_path, sft_adapter, tmp_path, tiny_texts, write_rows):
    options = ppo_options(tiny_model_path, sft_adapter, tmp_path, tiny_texts, write_rows)
    ensemble = ["--reward_adapters", *copies, "--reward_ensemble", "mean_minus_std", "--reward_ensemble_k", 0.5]
    run(load_stage, "ppo", *options, *ensemble)
    folder = tmp_path / "t" / "ppo"
    assert any("rewards/ensemble/disagreement" in entry for entry in log_of(folder))
    parents = json.loads((folder / "run.json").read_text())["parents"]
    assert [parent["path"] for parent in parents] == [str(sft_adapter), *copies]


@pytest.mark.slow
def test_ppo_with_a_served_reward(
    load_stage, repo_root, bert_path, tiny_model_path, sft_adapter, tmp_path, tiny_texts, write_rows, monkeypatch
):
    """The reward model is in another process; PPO sees the scores that it gives here."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    model = shutil.copytree(bert_path, tmp_path / "bert")
    Readout(gain=0.25, bias=-0.5).save(model)
    command = [sys.executable, "recipes/serve_reward.py", "--reward_model", str(model), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=repo_root)
    try:
        url = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+/score", line)))
        options = ppo_options(tiny_model_path, sft_adapter, tmp_path, tiny_texts, write_rows)
        run(load_stage, "ppo", *options, "--reward_url", url, "--critic_init", "policy", "--gold_score", model)
    finally:
        process.terminate()
        process.wait()
    [entry] = [entry for entry in log_of(tmp_path / "t" / "ppo") if "rewards/remote/mean" in entry]
    for number in ("mean", "std"):
        assert entry[f"rewards/remote/{number}"] == pytest.approx(entry[f"rewards/bert/{number}"], abs=1e-5)


@pytest.mark.parametrize("lora", [True, False])
def test_an_encoder_is_trained_and_read_in_one_format(bert_path, write_rows, tmp_path, lora):
    """C40: the ids of training are those of scoring. The new pooler and head are trained and saved."""
    base = tmp_path / "mlm"  # as most encoders are published: without pooler and classifier
    BertForMaskedLM(AutoModelForSequenceClassification.from_pretrained(bert_path).config).save_pretrained(base)
    AutoTokenizer.from_pretrained(bert_path).save_pretrained(base)
    pairs = [{"prompt": "the film", "chosen": "was good", "rejected": "was dull"}] * 16
    rows = to_preferences(load_rows(write_rows(pairs)))
    splits = rows.train_test_split(8)
    tokenizer, model = load_tokenizer(str(base)), load_sequence_classifier(str(base))
    splits = encode_rows(splits, tokenizer, context_length(model), 24)
    config: LoraConfig = lora_config(ModelConfig(lora_r=4), "SEQ_CLS")
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            str(tmp_path / "run"),
            use_cpu=True,
            bf16=False,
            max_steps=20,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            max_length=24,
            gradient_checkpointing=False,
        ),
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        processing_class=tokenizer,
        peft_config=config if lora else None,
    )
    trainer.train()
    trainer.save_model()
    [chosen, rejected] = (trainer.eval_dataset[f"{side}_ids"][0] for side in ("chosen", "rejected"))
    raw = score_sequences(trainer.model, [chosen, rejected])
    assert raw[0] > raw[1] + 1.0
    reward = ClassifierReward(*load_reward_model(tmp_path / "run"))
    scores = reward(prompts=["the film"] * 2, completions=["was good", "was dull"])
    assert_close(torch.tensor(scores), raw, atol=1e-4, rtol=1e-4)
