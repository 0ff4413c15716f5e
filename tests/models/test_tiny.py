"""Tokenizers and models from scratch, and the scripts that make bases of them."""

import importlib.util
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rlhf_recipes.config import parse_stage
from rlhf_recipes.models import load_causal_lm, load_tokenizer
from rlhf_recipes.models.tiny import (
    bpe_tokenizer,
    held_out_loss,
    tiny_llama,
    train_language_model,
    word_tokenizer,
)

TEXTS = ["the cat sat on the mat .", "the dog sat on the cat .", "a bird sang ."] * 20
BPE = bpe_tokenizer(TEXTS, vocab_size=300)


def test_word_tokens():
    tokenizer = word_tokenizer(["the", "cat", "sat"])
    ids = tokenizer("the cat flew")["input_ids"]
    assert len(ids) == 3
    assert ids[2] == tokenizer.unk_token_id
    assert tokenizer.decode(tokenizer("the cat sat")["input_ids"]) == "the cat sat"
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    for words in (["a", "a"], ["a b"], [""]):
        with pytest.raises(ValueError, match="word"):
            word_tokenizer(words)


@given(st.text())
def test_bytes_come_back(text):
    assert BPE.decode(BPE(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_widths_that_4_bits_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="multiple of 64"):
        tiny_llama(BPE, hidden_size=100)
    with pytest.raises(ValueError, match="heads"):
        tiny_llama(BPE, hidden_size=64, heads=5)


def test_training_learns_and_the_held_out_loss_is_the_cross_entropy():
    torch.manual_seed(0)
    model = tiny_llama(BPE, hidden_size=64, layers=1, heads=2)
    held_out = ["the cat sat on the dog ."]
    before = held_out_loss(model, BPE, held_out)
    ids = torch.tensor([BPE(held_out[0] + BPE.eos_token)["input_ids"]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    assert before == pytest.approx(-logps.gather(1, ids[0, 1:, None]).mean().item(), rel=1e-5)
    assert before == pytest.approx(math.log(300), rel=0.05), "a random model knows nothing"
    losses = train_language_model(model, BPE, TEXTS, batch_size=8, learning_rate=1e-2, epochs=5)
    assert losses[-1] < 0.5 * losses[0]
    assert held_out_loss(model, BPE, held_out) < 0.6 * before


def test_the_same_seed_trains_the_same_model():
    def train():
        torch.manual_seed(0)
        model = tiny_llama(BPE, hidden_size=64, layers=1, heads=2)
        return train_language_model(model, BPE, TEXTS, batch_size=8, seed=3)

    assert train() == train()


def script(repo_root, path):
    spec = importlib.util.spec_from_file_location("script", repo_root / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_base_script_makes_a_model_that_loads(repo_root, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("text\n" + "\n".join(f"{text} {index}" for index, text in enumerate(TEXTS)))
    module = script(repo_root, "recipes/base.py")
    argv = ["--dataset_name", str(rows), "--output_dir", str(tmp_path / "base"), "--vocab_size", "280"]
    argv += ["--hidden_size", "64", "--layers", "1", "--heads", "2", "--texts_per_document", "2"]
    arguments = parse_stage(module.ARGUMENTS, argv)
    module.main(*arguments)
    assert load_tokenizer(str(tmp_path / "base")).pad_token != load_tokenizer(str(tmp_path / "base")).eos_token
    assert load_causal_lm(str(tmp_path / "base")).config.hidden_size == 64
    with pytest.raises(FileExistsError, match="there already"):
        module.main(*arguments)


def test_the_world_script_makes_one_world_and_then_reuses_it(repo_root, tmp_path, capsys):
    module = script(repo_root, "recipes/quickstart/world.py")
    folder = tmp_path / "world"
    argv = ["--output_dir", str(folder), "--corpus_size", "64", "--sft_size", "10", "--hidden_size", "64"]
    argv += ["--layers", "1", "--heads", "2"]
    module.main(*parse_stage(module.WorldArguments, argv))
    assert {path.name for path in folder.iterdir()} >= {
        "base",
        "gold.json",
        "prompts_test.jsonl",
        "prompts_train.jsonl",
        "sft.jsonl",
        "world.json",
    }
    assert AutoModelForCausalLM.from_pretrained(folder / "base").config.hidden_size == 64
    stamp = (folder / "base" / "model.safetensors").stat().st_mtime_ns
    module.main(*parse_stage(module.WorldArguments, argv))
    assert (folder / "base" / "model.safetensors").stat().st_mtime_ns == stamp
    assert "made before" in capsys.readouterr().out
    with pytest.raises(FileExistsError):
        module.main(*parse_stage(module.WorldArguments, [*argv, "--seed", "1"]))
