"""The reward stage, run as a user runs it, and in this process."""

import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig, set_seed
from trl import RewardTrainer

from rlhf_recipes.config import parse_stage
from rlhf_recipes.models import load_causal_lm, load_sequence_classifier
from rlhf_recipes.reward_modeling import score_sequences

FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
NOUNS = "film story actor ending scene plot music".split()
PROMPTS = [f"the {noun} was {word}" for noun in NOUNS for word in ("very", "so", "not")]
PAIRS = [{"prompt": prompt, "chosen": " good and warm", "rejected": " bad"} for prompt in PROMPTS]


def chat(prompt, completion):
    return [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]


def load_without_this_package(base, adapter, four_bit=False):
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32, quantization_config=FOUR_BIT if four_bit else None
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' other kernel shifts outputs by about 1 %
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(model, adapter).eval()


@pytest.fixture
def model_with(tiny_model_path, tmp_path):
    """Folder of the tiny model with a changed tokenizer."""

    def make(**changes):
        folder = tmp_path / "model"
        load_causal_lm(tiny_model_path).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def check_the_files(folder, *parents):
    """Check what a stage of two steps with the quickstart's configuration leaves behind."""
    adapter = load_file(folder / "adapter_model.safetensors")
    assert adapter["base_model.model.score.weight"].dtype == torch.float32
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("SEQ_CLS", parents[0])
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert {"accuracy", "accuracy_ci", "margin", "chosen_score", "rejected_score"} < evaluation.keys()
    assert {"log_loss", "n", "ties"} < evaluation.keys()
    assert {rule["n"] for rule in evaluation["baselines"].values()} == {evaluation["n"]}
    assert evaluation["baselines"].keys() == {"longer", "shorter", "tfidf"}
    assert state["log_history"][-1]["eval_accuracy"] == evaluation["accuracy"]
    run = json.loads((folder / "run.json").read_text())
    assert (run["recipe"], run["stage"]) == ("tiny", "reward")
    assert [parent["path"] for parent in run["parents"]] == list(parents)


def test_with_the_quickstart_configuration(run_stage, repo_root, tiny_model_path, write_rows):
    config = repo_root / "recipes" / "quickstart" / "reward.yaml"
    rows = write_rows(PAIRS * 4)
    stage = run_stage("reward", config=config, dataset_name=rows)
    check_the_files(stage.folder, tiny_model_path, rows)
    assert stage.trainer.model.get_base_model().is_loaded_in_4bit


@pytest.mark.slow
def test_launched_with_the_quickstart_configuration(repo_root, tiny_model_path, write_rows, tmp_path):
    """`tests/recipes/test_ppo.py` launches the stage of PPO in every run of the suite."""
    folder = tmp_path / "tiny" / "reward"
    options = {
        "config": repo_root / "recipes" / "quickstart" / "reward.yaml",
        "model_name_or_path": tiny_model_path,
        "dataset_name": write_rows(PAIRS * 4),
        "output_dir": folder,
        "max_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
    }
    argv = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "recipes/reward.py", *argv]
    environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_API_KEY")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(repo_root)}  # no W&B login of the user is found there
    result = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=repo_root, env=environment, timeout=180
    )
    assert result.returncode == 0, result.stderr
    check_the_files(folder, tiny_model_path, options["dataset_name"])
    assert list((folder / "wandb").glob("offline-run-*")), "without an API key the W&B run is kept offline"
    assert any("2/2" in line for line in result.stdout.splitlines()), "a step has a line"
    assert "\r" not in result.stderr, "a bar is for terminals"
    assert "gemv_4bit: an autograd kernel was not registered" not in result.stderr


@pytest.mark.parametrize("four_bit", [False, True], ids=["float32", "4-bit"])
def test_the_saved_adapter_gives_the_scores_of_the_trained_model(
    run_stage, write_rows, tiny_model_path, tiny_tokenizer, four_bit
):
    stage = run_stage("reward", dataset_name=write_rows(PAIRS), max_steps=8, load_in_4bit=four_bit)
    texts = [f"{prompt} {word} <eos>" for prompt, word in zip(PROMPTS, "good bad warm dull".split(), strict=False)]
    sequences = tiny_tokenizer(texts).input_ids
    trained = score_sequences(stage.trainer.model, sequences)
    assert trained.std() > 0.1

    loaded = load_without_this_package(tiny_model_path, stage.folder, four_bit)
    tokenizer = AutoTokenizer.from_pretrained(stage.folder)
    assert not [name for name, p in loaded.named_parameters() if p.requires_grad]
    for padding_side in ("left", "right"):
        batch = tokenizer(texts, padding=True, padding_side=padding_side, return_tensors="pt")
        scores = loaded(**batch).logits.squeeze(-1)
        assert_close(scores, trained, rtol=0, atol=1e-5)


def test_head_and_adapter_are_trained_in_float32_and_nothing_else_is(run_stage, write_rows, tiny_model_path):
    stage = run_stage("reward", dataset_name=write_rows(PAIRS), load_in_4bit=True, seed=5)
    trainable = {name: p for name, p in stage.trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "score" in name for name in trainable)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    (head,) = (p for name, p in trainable.items() if "score" in name)
    set_seed(5)
    start = load_sequence_classifier(tiny_model_path).score.weight
    assert not torch.equal(head, start)
    assert_close(head, start, rtol=0, atol=0.05)  # two steps of 0.01 away from the start that the seed gives


@pytest.mark.parametrize("four_bit", [pytest.param(False, marks=pytest.mark.slow), True], ids=["float32", "4-bit"])
def test_it_learns_what_is_preferred(run_stage, write_rows, four_bit):
    rng = random.Random(0)
    rows = [
        {
            "prompt": f"the {rng.choice(NOUNS)} {rng.choice(NOUNS)} {rng.choice(NOUNS)} was",
            "chosen": f" {rng.choice(['good', 'warm', 'great'])} {rng.choice(['and', 'but'])}",
            "rejected": f" {rng.choice(['bad', 'dull', 'cold'])} {rng.choice(['and', 'but'])}",
        }
        for _ in range(150)
    ]
    options = {"max_steps": 40, "load_in_4bit": four_bit, "lora_r": 8, "per_device_train_batch_size": 8}
    stage = run_stage("reward", dataset_name=write_rows(rows), test_size=0.3, **options)
    assert stage.evaluation["n"] >= 30
    assert stage.evaluation["accuracy_ci"][0] > 0.8
    assert stage.evaluation["margin"] > 1.0


def test_the_evaluation_is_that_of_the_pairs_of_other_prompts(run_stage, write_rows, tiny_model_path, tiny_tokenizer):
    rows = [{**pair, "chosen": f" {noun} good"} for pair in PAIRS for noun in NOUNS[:3]]
    stage = run_stage("reward", dataset_name=write_rows(rows), test_size=0.4, per_device_eval_batch_size=5)
    held_out = stage.trainer.eval_dataset
    assert set(held_out["prompt"]).isdisjoint(stage.trainer.train_dataset["prompt"])
    assert len(held_out) + len(stage.trainer.train_dataset) == len(rows)

    model = load_without_this_package(tiny_model_path, stage.folder)
    margins = []
    for pair in rows:
        if pair["prompt"] in set(held_out["prompt"]):
            chosen, rejected = (
                model(**tiny_tokenizer(f"{pair['prompt']}{pair[side]} <eos>", return_tensors="pt")).logits.item()
                for side in ("chosen", "rejected")
            )
            margins.append(chosen - rejected)
    assert stage.evaluation["n"] == len(margins)
    assert stage.evaluation["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    assert stage.evaluation["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / len(margins))


class TestTokens:
    """The score is read at the last token: it must be the end token of a finished completion, and only of that."""

    def texts(self, stage, tokenizer):
        rows = [*stage.trainer.train_dataset, *stage.trainer.eval_dataset]
        return {tokenizer.decode(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")}

    def test_plain_texts_get_an_end_token(self, run_stage, write_rows, tiny_tokenizer):
        stage = run_stage("reward", dataset_name=write_rows(PAIRS), max_steps=1)
        expected = {f"{prompt} {answer} <eos>" for prompt in PROMPTS for answer in ("good and warm", "bad")}
        assert self.texts(stage, tiny_tokenizer) == expected

    def test_dialogues_without_a_prompt_column_are_read_whole(self, run_stage, write_rows, tiny_tokenizer):
        rows = [
            {side: f"\n\nHuman: {prompt}\n\nAssistant: {answer}" for side, answer in answers}
            for prompt in PROMPTS
            for answers in [(("chosen", "good"), ("rejected", "bad"))]
        ]
        stage = run_stage("reward", dataset_name=write_rows(rows), max_steps=1)
        expected = {f"<unk> {prompt} <unk> {answer} <eos>" for prompt in PROMPTS for answer in ("good", "bad")}
        assert self.texts(stage, tiny_tokenizer) == expected

    @pytest.mark.parametrize("explicit", [True, False], ids=["prompt column", "whole chats"])
    def test_chats_end_at_the_end_token_of_the_last_turn(
        self, run_stage, write_rows, tiny_tokenizer, model_with, explicit
    ):
        # A template in the style of ChatML, which writes a line break (here: `.`, unknown) after every end token.
        template = tiny_tokenizer.chat_template.replace(" <eos> '", " <eos> . '")
        assert template != tiny_tokenizer.chat_template
        rows = []
        for prompt in PROMPTS:
            question, good = chat(prompt, "good")
            _, bad = chat(prompt, "bad")
            row = {"prompt": question, "chosen": good, "rejected": bad}
            rows.append(row if explicit else {"chosen": question + good, "rejected": question + bad})
        stage = run_stage(
            "reward",
            dataset_name=write_rows(rows),
            model_name_or_path=model_with(chat_template=template),
            max_steps=1,
        )
        chats = [f"<user> {prompt} <eos> <unk> <assistant>" for prompt in PROMPTS]
        expected = {f"{chat} {answer} <eos>" for chat in chats for answer in ("good", "bad")}
        assert self.texts(stage, tiny_tokenizer) == expected

    def test_given_tokens_are_kept(self, run_stage, write_rows, tiny_tokenizer):
        """Finished and cut off, with and without an end token after the last turn: only the ids can say so."""
        rows = []
        for number, pair in enumerate(PAIRS):
            turn = f"<user> {pair['prompt']} <eos> <assistant>"
            texts = (turn + pair["chosen"], turn + pair["rejected"])
            chosen, rejected = (tiny_tokenizer(text).input_ids for text in texts)
            finished = [*chosen, tiny_tokenizer.eos_token_id] if number % 2 else chosen
            rows.append({**pair, "chosen_ids": finished, "rejected_ids": rejected})
        stage = run_stage("reward", dataset_name=write_rows(rows), test_size=0.4)
        used = [*stage.trainer.train_dataset, *stage.trainer.eval_dataset]
        given = {row["prompt"]: (row["chosen_ids"], row["rejected_ids"]) for row in rows}
        assert len(used) == len(rows)
        assert all((row["chosen_ids"], row["rejected_ids"]) == given[row["prompt"]] for row in used)
        chosen = score_sequences(stage.trainer.model, stage.trainer.eval_dataset["chosen_ids"])
        assert stage.evaluation["chosen_score"] == pytest.approx(chosen.double().mean().item(), abs=1e-6)

    def test_another_padding_token_can_be_chosen(self, run_stage, write_rows, tiny_model_path, model_with):
        path = model_with(pad_token="<eos>")
        stage = run_stage("reward", dataset_name=write_rows(PAIRS), model_name_or_path=path, pad_token="<unk>")
        saved = AutoTokenizer.from_pretrained(stage.folder)
        assert saved.pad_token == "<unk>"
        loaded = load_without_this_package(path, stage.folder)
        loaded.config.pad_token_id = saved.pad_token_id
        texts = ["the film was good <eos>", "the film <eos>", "the <eos>"]
        scores = loaded(**saved(texts, padding=True, return_tensors="pt")).logits.squeeze(-1)
        single = [loaded(**saved(text, return_tensors="pt")).logits.item() for text in texts]
        assert_close(scores, torch.tensor(single), rtol=0, atol=1e-5)
        assert_close(scores, score_sequences(stage.trainer.model, saved(texts).input_ids), rtol=0, atol=1e-5)


def test_resuming_gives_the_uninterrupted_run(run_stage, write_rows, tmp_path, monkeypatch):
    options = {"dataset_name": write_rows(PAIRS), "max_steps": 4, "load_in_4bit": True}
    whole = run_stage("reward", **options, save_strategy="steps", save_steps=2)
    expected = load_file(whole.folder / "adapter_model.safetensors")
    for path in whole.folder.iterdir():  # as after a crash: only the checkpoint of step 2 is there
        path.rename(tmp_path / path.name)
    (tmp_path / "checkpoint-2").rename(whole.folder / "checkpoint-2")

    steps = []
    step = RewardTrainer.training_step
    monkeypatch.setattr(RewardTrainer, "training_step", lambda *args: steps.append(1) or step(*args))
    resumed = run_stage("reward", **options, resume_from_checkpoint=True)
    assert (len(steps), resumed.trainer.state.global_step) == (2, 4)
    weights = load_file(resumed.folder / "adapter_model.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert_close(weight, expected[name], rtol=0, atol=1e-6)
    assert resumed.evaluation["margin"] == pytest.approx(whole.evaluation["margin"])


@pytest.mark.parametrize(
    "change",
    [{"gradient_checkpointing": True}, {"eval_strategy": "steps", "eval_steps": 1}],
    ids=["gradient checkpointing", "evaluations in between"],
)
def test_training_in_4_bits_is_not_changed_by(run_stage, write_rows, tmp_path, change):
    options = {"dataset_name": write_rows(PAIRS), "load_in_4bit": True, "lora_dropout": 0.0, "max_steps": 3}
    plain = run_stage("reward", **options)
    changed = run_stage("reward", **options, **change, output_dir=str(tmp_path / "tiny" / "changed"))
    expected, weights = (load_file(s.folder / "adapter_model.safetensors") for s in (plain, changed))
    for name, weight in weights.items():
        assert_close(weight, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{"bf16": True}, {"bf16": True, "load_in_4bit": True, "dtype": "bfloat16"}])
def test_half_precision_trains(run_stage, write_rows, options):
    stage = run_stage("reward", dataset_name=write_rows(PAIRS), **options)
    assert math.isfinite(stage.evaluation["margin"])
    assert all(p.dtype == torch.float32 for p in stage.trainer.model.parameters() if p.requires_grad)


def test_pairs_that_do_not_fit_are_reported(run_stage, write_rows, caplog):
    too_long = [{**pair, "rejected": " very" * 9} for pair in PAIRS[:3]]
    stage = run_stage("reward", dataset_name=write_rows(PAIRS + too_long), max_length=8, test_size=0.3)
    messages = " ".join(record.getMessage() for record in caplog.records)
    assert "do not fit into `max_length` (8 tokens)" in messages
    assert len(stage.trainer.train_dataset) + stage.evaluation["n"] == len(PAIRS)


class TestOtherRows:
    """Everything that the preference table holds can be trained on."""

    RANKINGS = [
        {"prompt": prompt, "completions": [" good and warm", " bad", " dull"], "ranks": [1, 2, 2 + n % 2]}
        for n, prompt in enumerate(PROMPTS)
    ]

    def test_rankings(self, run_stage, write_rows, tiny_tokenizer, tmp_path):
        options = {"objective": "ranking", "readout": "mean", "max_steps": 8, "test_size": 0.4}
        stage = run_stage("reward", dataset_name=write_rows(self.RANKINGS), **options)
        rows = list(stage.trainer.eval_dataset)
        assert stage.evaluation["n"] == 3 * len(rows)
        assert stage.evaluation["ties"] == sum(row["ranks"][1] == row["ranks"][2] for row in rows)
        text = f"{rows[0]['prompt']} good and warm <eos>"
        assert rows[0]["completion_ids"][0] == tiny_tokenizer(text).input_ids
        assert json.loads((stage.folder / "reward_model.json").read_text())["readout"] == "mean"
        assert stage.trainer.state.log_history[-1]["eval_accuracy"] == stage.evaluation["accuracy"]

    def test_labels_in_words(self, run_stage, write_rows):
        rows = [{**pair, "label": ("chosen", "tie", "rejected")[n % 3]} for n, pair in enumerate(PAIRS)]
        stage = run_stage("reward", dataset_name=write_rows(rows), ties="drop", test_size=0.4)
        kept = stage.trainer.train_dataset["label"]
        assert set(kept) == {0.0, 1.0}
        assert stage.evaluation["ties"] == list(stage.trainer.eval_dataset["label"]).count(0.5)

    def test_pairs_with_ties(self, run_stage, write_rows):
        rows = [{**pair, "label": None if n % 3 else 0.5} for n, pair in enumerate(PAIRS)]
        stage = run_stage("reward", dataset_name=write_rows(rows), test_size=0.4)
        assert stage.evaluation["ties"] == list(stage.trainer.eval_dataset["label"]).count(0.5)
        assert len(stage.trainer.train_dataset) + stage.evaluation["n"] == len(rows)

    def test_known_sets_of_instructions_are_pairs_of_chats(self, run_stage, write_rows, tiny_tokenizer, caplog):
        ratings = {" good": 4, " bad": 1.5, " dull": 1.5}
        rows = [
            {"prompt": prompt, "response": text, "helpfulness": rating, "verbosity": 1}
            for text, rating in ratings.items()
            for prompt in PROMPTS
        ]
        rows.append({"prompt": "the film", "response": " good", "helpfulness": 3, "verbosity": 1})
        stage = run_stage("reward", dataset_name=write_rows(rows), max_steps=1, test_size=0.4)
        pairs = [*stage.trainer.train_dataset, *stage.trainer.eval_dataset]
        found = {
            tuple(map(tiny_tokenizer.decode, pair["completion_ids"])): pair["label"]
            for pair in pairs
            if pair["prompt"][0]["content"] == PROMPTS[0]
        }
        good, bad, dull = (f"<user> {PROMPTS[0]} <eos> <assistant>{text} <eos>" for text in ratings)
        assert found == {(good, bad): 1.0, (good, dull): 1.0, (bad, dull): 0.5}
        assert len(pairs) == 3 * len(PROMPTS)
        assert "rows compare no completions" in caplog.text

    def test_turns_of_sharegpt_are_pairs_of_chats(self, run_stage, write_rows, tiny_tokenizer):
        rows = [
            {
                "conversations": [{"from": "human", "value": prompt}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            }
            for prompt in PROMPTS
        ]
        stage = run_stage("reward", dataset_name=write_rows(rows), max_steps=1)
        row = stage.trainer.train_dataset[0]
        asked = f"<user> {row['prompt'][0]['content']} <eos> <assistant>"
        assert tiny_tokenizer.decode(row["chosen_ids"]) == f"{asked} good <eos>"
        assert tiny_tokenizer.decode(row["rejected_ids"]) == f"{asked} bad <eos>"

    def test_labels_of_steps_have_a_loss_instead_of_an_accuracy(self, run_stage, write_rows):
        rows = [
            {"prompt": prompt, "completions": [" good bad"], "steps": [[" good", " bad"]], "step_labels": [[1.0, 0.0]]}
            for prompt in PROMPTS
        ]
        stage = run_stage("reward", dataset_name=write_rows(rows), objective="token", token_loss="bce")
        assert stage.evaluation.keys() == {"loss", "n"}

    def test_a_ranking_that_is_too_long_is_reported(self, run_stage, write_rows, caplog):
        rows = [{**row, "completions": [*row["completions"][:2], " very" * 9]} for row in self.RANKINGS[:3]]
        run_stage("reward", dataset_name=write_rows(rows + self.RANKINGS[3:]), objective="ranking", max_length=9)
        assert "do not fit into `max_length` (9 tokens)" in " ".join(record.getMessage() for record in caplog.records)


class TestBadInput:
    """What can be wrong is refused before a step is made, and before anything is written."""

    @pytest.fixture
    def refused(self, run_stage, tmp_path, monkeypatch):
        def check(error, message, **options):
            def train(*_, **__):
                raise AssertionError("training began")

            monkeypatch.setattr("transformers.Trainer.train", train)
            with pytest.raises(error, match=message):
                run_stage("reward", **options)
            assert not list((tmp_path / "tiny" / "reward").glob("*"))

        return check

    def test_another_task_type_on_the_command_line(self, refused, write_rows):
        message = "`lora_task_type` must be 'SEQ_CLS' for a reward model, got 'CAUSAL_LM'.*score head"
        refused(ValueError, message, dataset_name=write_rows(PAIRS), lora_task_type="CAUSAL_LM")

    def test_margins_that_are_no_numbers(self, refused, write_rows):
        rows = [{**pair, "margin": "1.5"} for pair in PAIRS]
        refused(ValueError, "row 0 has the `margin` '1.5'", dataset_name=write_rows(rows))
        rows = [{**pair, "margin": 1.5 if n else None} for n, pair in enumerate(PAIRS)]
        refused(ValueError, "row 0 has the `margin` None", dataset_name=write_rows(rows))

    def test_another_task_type_in_the_file(self, refused, write_rows, tmp_path):
        (tmp_path / "reward.yaml").write_text("lora_task_type: TOKEN_CLS\n")
        message = "`lora_task_type` must be 'SEQ_CLS' for a reward model, got 'TOKEN_CLS'"
        refused(ValueError, message, dataset_name=write_rows(PAIRS), config=tmp_path / "reward.yaml")

    def test_wrong_columns(self, refused, write_rows):
        rows = [{"prompt": "a", "better": "b", "worse": "c"}]
        refused(
            ValueError,
            "found `better`, `prompt`, `worse`. The kinds are `chosen`, `rejected`",
            dataset_name=write_rows(rows),
        )

    def test_a_padding_token_that_is_the_end_token(self, refused, write_rows, model_with):
        path = model_with(pad_token="<eos>")
        refused(ValueError, "Set `pad_token`", dataset_name=write_rows(PAIRS), model_name_or_path=path)

    def test_half_precision_without_autocast(self, refused, write_rows):
        refused(ValueError, "Set `bf16: true`", dataset_name=write_rows(PAIRS), dtype="bfloat16")

    def test_a_limit_that_no_pair_meets(self, refused, write_rows):
        refused(ValueError, "None of the .* train rows fits", dataset_name=write_rows(PAIRS), max_length=5)

    def test_a_pair_longer_than_the_context(self, refused, write_rows):
        rows = [{**pair, "rejected": " very" * 150} for pair in PAIRS]
        refused(ValueError, "`rejected_ids` of the train rows: .*context is 128", dataset_name=write_rows(rows))

    def test_rows_that_the_objective_does_not_read(self, refused, write_rows):
        refused(ValueError, "`objective` is 'ranking', but", dataset_name=write_rows(PAIRS), objective="ranking")

    def test_settings_that_contradict(self, refused, write_rows):
        options = {"objective": "best_of_k", "label_noise": 0.1}
        refused(ValueError, "`label_noise` is for", dataset_name=write_rows(PAIRS), **options)

    def test_tokens_of_another_vocabulary_in_groups(self, refused, write_rows):
        rows = [{**row, "completion_ids": [[5, 1], [999, 1], [7]]} for row in TestOtherRows.RANKINGS]
        refused(ValueError, "the model knows 0 to", dataset_name=write_rows(rows), objective="ranking")

    def test_tokens_of_another_vocabulary(self, refused, write_rows):
        rows = [{**pair, "chosen_ids": [5, 1], "rejected_ids": [999, 1]} for pair in PAIRS]
        refused(ValueError, "the model knows 0 to", dataset_name=write_rows(rows))


def test_the_quickstart_configuration_is_valid(load_stage, repo_root):
    config = str(repo_root / "recipes" / "quickstart" / "reward.yaml")
    data_args, training_args, model_args = parse_stage(load_stage("reward").ARGUMENTS, ["--config", config])
    assert data_args.dataset_name.endswith("preferences")
    assert training_args.learning_rate == 2e-3
    assert not training_args.bf16
    assert model_args.load_in_4bit


def test_a_trained_reward_model_goes_on(run_stage, write_rows, tmp_path, sft_adapter):
    """With a rate that moves nothing its weights stay to the last bit, and its scores are those of the pairs."""
    rows = write_rows(PAIRS * 4)
    first = run_stage("reward", dataset_name=rows, output_dir=tmp_path / "first", seed=3)
    options = {"dataset_name": rows, "start_adapter": first.folder}
    again = run_stage("reward", output_dir=tmp_path / "again", learning_rate=1e-30, max_steps=1, **options)
    old, new = (load_file(stage.folder / "adapter_model.safetensors") for stage in (first, again))
    assert old.keys() == new.keys()
    assert all(torch.equal(new[name], value) for name, value in old.items())
    run = json.loads((again.folder / "run.json").read_text())
    assert run["parents"][0]["path"] == str(first.folder)

    trained = run_stage("reward", output_dir=tmp_path / "trained", max_steps=1, **options)
    weights = load_file(trained.folder / "adapter_model.safetensors")
    assert not torch.equal(weights["base_model.model.score.weight"], old["base_model.model.score.weight"])

    for changes, message in [
        ({"lora_r": 2}, "`r` 2 .the checkpoint's: 4."),
        ({"start_adapter": tmp_path}, "which holds no adapter"),
        ({"start_adapter": sft_adapter, "lora_r": 8, "lora_alpha": 8}, "no reward model as this run trains it|is not"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_stage("reward", output_dir=tmp_path / "refused", **{**options, **changes})
