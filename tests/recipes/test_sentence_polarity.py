"""The recipe of small encoders and decoders: its rows, its word vectors, its comparison, and two steps of training."""

import gzip
import json
import math
import random

import numpy as np
import pytest
from numpy.testing import assert_allclose
from safetensors import safe_open

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows
from rlhf_recipes.models import load_reward_model, load_sequence_classifier, load_tokenizer
from rlhf_recipes.reward_modeling.baselines import fit_tfidf
from rlhf_recipes.reward_modeling.finished import average_reward_models

WORDS = "the film was and but this play of".split()


@pytest.fixture
def script(load_stage):
    """Load a script of the recipe, or run it with options."""

    def run(name, **options):
        module = load_stage(f"sentence_polarity/{name}")
        if options:
            argv = [str(text) for option, value in options.items() for text in (f"--{option}", value)]
            module.main(*parse_stage(module.ARGUMENTS, argv))
        return module

    return run


@pytest.fixture
def snippets(write_rows):
    """Made-up snippets, half of them positive; one comes with both labels, one twice."""
    rng = random.Random(0)
    rows = [
        {
            "text": f"n{number} m{number} {' '.join(rng.choices(WORDS, k=8))} {('bad', 'good')[number % 2]}",
            "label": number % 2,
        }
        for number in range(40)
    ]
    both = [{"text": "so so", "label": label} for label in (0, 1)]
    return write_rows([*rows, *both, rows[0]], "snippets.jsonl")


def texts_of(folder, split):
    pairs = load_rows(str(folder / "pairs"), split=split)
    return {side: {text.strip() for text in pairs[side]} for side in ("chosen", "rejected")}


def check_rows(folder, labels):
    sides = {split: texts_of(folder, split) for split in ("train", "test")}
    everything = {split: side["chosen"] | side["rejected"] for split, side in sides.items()}
    assert not everything["train"] & everything["test"], "no snippet is on both sides"
    for split, side in sides.items():
        assert {labels[text] for text in side["chosen"]} == {1}
        assert {labels[text] for text in side["rejected"]} == {0}
        known = load_rows(str(folder / "snippets"), split=split)
        assert everything[split] <= set(known["text"])
    read = set(load_rows(str(folder / "texts"))["text"])
    assert not any(f"review : {text}" in read or text in read for text in everything["test"])


def test_pairs(script, snippets, tmp_path):
    script("pairs", dataset_name=snippets, output_dir=tmp_path / "data", pairings=3, more_texts=snippets)
    folder = tmp_path / "data"
    counts = {split: len(load_rows(str(folder / "snippets"), split=split)) for split in ("train", "test")}
    assert counts == {"train": 32, "test": 8}, "without the text of both labels and the second copy"
    assert len(load_rows(str(folder / "texts"))) == 32 + 43
    pairs = load_rows(str(folder / "pairs"))
    assert len(pairs) % 3 == 0
    assert set(pairs["prompt"]) == {"review :"}
    with pytest.raises(FileExistsError, match="exists"):
        script("pairs", dataset_name=snippets, output_dir=folder)


def test_pairs_of_real_snippets(script, shared_data, tmp_path):
    path = shared_data / "sentence_polarity" / "snippets.jsonl.gz"
    script("pairs", dataset_name=path, output_dir=tmp_path / "data")
    with gzip.open(path, "rt") as file:
        labels = {" ".join(row["text"].split()): row["label"] for row in map(json.loads, file)}
    check_rows(tmp_path / "data", labels)
    assert len(load_rows(str(tmp_path / "data" / "pairs"))) > 12000


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "mood": 1}], "needs the columns `text` and `label`; it has text, mood"),
        ([{"text": "a", "label": 2}], "`label` must be 1 .* found also .'2'"),
        ([{"text": "a", "label": 1}] * 9, "No row for .*pairs/train"),
    ],
)
def test_unusable_snippets(script, write_rows, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        script("pairs", dataset_name=write_rows(rows), output_dir=tmp_path / "data")


def test_word_vectors_are_those_of_the_definition(script):
    """The matrix built with loops, and a full singular value decomposition of it."""
    rng = random.Random(1)
    texts = [rng.choices("abcdefg", k=rng.randint(1, 9)) for _ in range(40)]
    words = list("abcdef")
    counts = np.zeros((6, 6))
    for text in texts:
        for i, left in enumerate(text):
            for j, right in enumerate(text):
                if 0 < abs(i - j) <= 2 and left in words and right in words:
                    counts[words.index(left), words.index(right)] += 1 / abs(i - j)
    context = [sum(row) ** 0.75 for row in counts]
    ppmi = np.zeros((6, 6))
    for i, j in np.argwhere(counts):
        ppmi[i, j] = max(0.0, math.log(counts[i, j] / sum(counts[i]) / (context[j] / sum(context))))
    left, strengths, _ = np.linalg.svd(ppmi)
    expected = left[:, :5] * np.sqrt(strengths[:5])
    vectors = script("base").word_vectors(texts, words, size=5, window=2)
    assert vectors.std() == pytest.approx(1.0)
    # The sign of every dimension is free, and the scale is set by the spread.
    products, right = vectors @ vectors.T, expected @ expected.T
    assert_allclose(products / np.trace(products), right / np.trace(right), atol=1e-10)


def test_more_dimensions_than_words_are_refused(script):
    with pytest.raises(ValueError, match="`hidden_size` is 3, but the texts have only 2 words"):
        script("base").word_vectors([["a", "b"]], ["a", "b"], size=3, window=2)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_attention_starts_as_the_mean_of_the_words(script, write_rows, tmp_path, kind):
    """With queries of 0 every word counts the same; a new head starts near 0."""
    base = str(tmp_path / "base")
    texts = write_rows([{"text": f"n{number} {' '.join(WORDS)}"} for number in range(70)])
    script("base", kind=kind, dataset_name=texts, output_dir=base, hidden_size=64, dropout=0.0)
    model, tokenizer = load_sequence_classifier(base).eval(), load_tokenizer(base)
    layer = (model.bert.encoder.layer if kind == "encoder" else model.model.layers)[0]
    attention = layer.attention if kind == "encoder" else layer.self_attn
    (attention.self.query if kind == "encoder" else attention.q_proj).weight.data.zero_()
    inner = (
        [attention.self.value, attention.output.dense] if kind == "encoder" else [attention.v_proj, attention.o_proj]
    )
    seen = []
    inner[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    inner[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(**tokenizer("the film was n1", return_tensors="pt", return_token_type_ids=False))
    words, read = seen
    assert words.shape == read.shape
    assert_allclose(read[0, -1].detach(), words[0].mean(dim=0).detach(), atol=1e-6)
    head = model.classifier if kind == "encoder" else model.score
    assert 0.0 < head.weight.abs().max() < 0.01


def test_comparison_by_hand(script):
    """Positives 3, 1, -1 and negatives 1, -2 of the model: 4.5 of 6 pairs; 2 + 1 of 5 snippets."""
    labels = np.array([1, 1, 1, 0, 0])
    model, tfidf = np.array([3.0, 1.0, -1.0, 1.0, -2.0]), np.array([1.0, 2.0, 3.0, -1.0, -2.0])
    result = script("compare").compare(labels, model=model, tfidf=tfidf, resamples=200)
    assert (result["snippets"], result["pairs"]) == (5, 6)
    assert result["model_pair_accuracy"] == pytest.approx(4.5 / 6)
    assert result["model_snippet_accuracy"] == pytest.approx(3 / 5)
    assert result["tfidf_pair_accuracy"] == result["tfidf_snippet_accuracy"] == 1.0
    assert result["difference_pair_accuracy"] == pytest.approx(-1.5 / 6)
    assert result["tfidf_pair_accuracy_ci"] == [1.0, 1.0]
    low, high = result["difference_pair_accuracy_ci"]
    assert low < -1.5 / 6 < high <= 0.0
    equal = script("compare").compare(labels, model=model, tfidf=model, resamples=50)
    assert equal["difference_pair_accuracy_ci"] == equal["difference_snippet_accuracy_ci"] == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_two_steps_of_training(script, run_stage, repo_root, snippets, tmp_path, kind, capsys):
    script("pairs", dataset_name=snippets, output_dir=tmp_path / "data")
    base = tmp_path / "base"
    script("base", kind=kind, dataset_name=tmp_path / "data" / "texts", output_dir=base, hidden_size=64, vocab_size=70)
    config = repo_root / "recipes" / "sentence_polarity" / f"{kind}.yaml"
    data = {"dataset_name": tmp_path / "data" / "pairs", "per_device_eval_batch_size": 4}
    run = run_stage("reward", config=config, model_name_or_path=base, learning_rate=1e-3, **data)
    assert run.trainer.state.global_step == 2
    with safe_open(run.folder / "adapter_model.safetensors", framework="pt") as weights:
        saved = " ".join(weights.keys())
    assert "embed" in saved, "the word vectors are trained and saved"
    assert load_reward_model(run.folder)[0].num_labels == 1
    capsys.readouterr()
    script("compare", reward_models=run.folder, data=tmp_path / "data", resamples=20)
    printed = capsys.readouterr().out
    result = json.loads(printed[printed.index("{") :])
    assert result["snippets"] == 8
    assert 0.0 <= result["model_pair_accuracy"] <= 1.0


def test_two_steps_of_training_a_pretrained_encoder(script, run_stage, repo_root, snippets, tmp_path):
    script("pairs", dataset_name=snippets, output_dir=tmp_path / "data")
    base = tmp_path / "base"
    texts = tmp_path / "data" / "texts"
    script("base", kind="encoder", dataset_name=texts, output_dir=base, hidden_size=64, vocab_size=70)
    config = repo_root / "recipes" / "sentence_polarity" / "minilm.yaml"
    rows = {"dataset_name": tmp_path / "data" / "pairs", "per_device_eval_batch_size": 4}
    run = run_stage("reward", config=config, model_name_or_path=base, **rows)
    with safe_open(run.folder / "adapter_model.safetensors", framework="pt") as weights:
        saved = set(weights.keys())
    whole = {name for name in saved if "lora_" not in name}
    assert all("pooler" in name or "classifier" in name for name in whole), "the rest is LoRA"
    assert any("pooler" in name for name in whole)
    assert any("attention" in name for name in saved - whole)
    model, tokenizer = load_reward_model(run.folder)
    assert (
        script("compare").score(str(run.folder), "review :", load_rows(str(tmp_path / "data" / "snippets"))).std() > 0
    )
    assert model.num_labels == 1
    assert tokenizer.cls_token == "[CLS]"


@pytest.mark.slow
def test_reward_models_reach_tfidf(script, load_stage, repo_root, shared_data, tmp_path):
    """The recipe on the real data, with three runs of each kind instead of five, which takes 5 minutes.

    Five runs are above TF-IDF by less than chance moves the mean of three on another machine (docs/results.md), so
    each model may be 0.008 behind here, and the sum of both 0.003. Single runs were behind by 0.012 and 0.020 before.
    """
    data = shared_data / "sentence_polarity" / "snippets.jsonl.gz", shared_data / "movie_reviews" / "reviews.jsonl.gz"
    script("pairs", dataset_name=data[0], more_texts=data[1], output_dir=tmp_path / "data")
    for kind, options in {"encoder": {}, "decoder": {"attention_dropout": 0.6}}.items():
        base = tmp_path / f"{kind}_base"
        script("base", kind=kind, dataset_name=tmp_path / "data" / "texts", output_dir=base, **options)
        members = [tmp_path / f"{kind}_{seed}" for seed in range(3)]
        for seed, folder in enumerate(members):
            stage = load_stage("reward")
            stage.pair_baselines = lambda train, test: {}  # `compare` measures TF-IDF, once
            files = {"model_name_or_path": base, "dataset_name": tmp_path / "data" / "pairs", "output_dir": folder}
            options = {"config": repo_root / "recipes" / "sentence_polarity" / f"{kind}.yaml", **files, "seed": seed}
            options |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
            argv = [str(text) for option, value in options.items() for text in (f"--{option}", value)]
            stage.main(*parse_stage(stage.ARGUMENTS, argv))
        average_reward_models(members, tmp_path / kind)

    compare = script("compare")
    test = load_rows(str(tmp_path / "data" / "snippets"), split="test")
    scores = {kind: compare.score(str(tmp_path / kind), "review :", test) for kind in ("encoder", "decoder")}
    scores["both"] = sum(score / score.std() for score in scores.values())
    tfidf = fit_tfidf(load_rows(str(tmp_path / "data" / "pairs")))(test["text"])
    labels = np.array(test["label"])
    results = {name: compare.compare(labels, model=score, tfidf=tfidf) for name, score in scores.items()}
    differences = {name: result["difference_pair_accuracy"] for name, result in results.items()}
    assert results["both"]["tfidf_pair_accuracy"] > 0.855, "the baseline is as strong as it was"
    assert differences["both"] > -0.003
    assert min(differences.values()) > -0.008
    assert all(result["difference_pair_accuracy_ci"][1] > 0.0 for result in results.values())
