"""Reward models that are rules on token ids, and pairs for them."""

import json
import random

import numpy as np
import pytest
from datasets import Dataset

from rlhf_recipes.models.readout import Readout
from rlhf_recipes.tools.certificate.scoring import Scorer

NOUNS = "film story actor ending scene plot music".split()
GOOD, BAD = "good great warm funny bright".split(), "bad dull slow cold dark".split()
FILLERS = "the was is felt and but very so not".split()


class RuleScorer(Scorer):
    """Scores texts by a rule on their words, split into those of the prompt and those of the completion."""

    def __init__(self, tokenizer, rule, readout=None, max_length=64):
        self.tokenizer, self._rule, self.readout = tokenizer, rule, readout or Readout()
        self.encoder, self.max_length = False, max_length

    def score(self, rows):
        words = [self.tokenizer.convert_ids_to_tokens(row.ids) for row in rows]
        scores = [self._rule(own[: row.start], own[row.start :]) for own, row in zip(words, rows, strict=True)]
        return np.array(scores, dtype=np.float64)


def quality(prompt, completion):
    """Share of kind words, a bonus for the prompt's noun, and less for a word that was there before."""
    words = [word for word in completion if word not in ("<eos>", "<unk>")]
    kind = sum((word in GOOD) - (word in BAD) for word in words)
    on_topic = bool(set(words) & set(prompt) & set(NOUNS))
    repeats = len(words) - len(set(words))
    return 1.5 * kind + 1.0 * on_topic - 0.7 * repeats


@pytest.fixture(scope="session")
def rule_scorer(tiny_tokenizer):
    """Make a reward model of a rule: `rule_scorer(lambda prompt, completion: len(completion))`."""

    def make(rule=quality, **options):
        return RuleScorer(tiny_tokenizer, rule, **options)

    return make


def completion(rng, prompt):
    """Write a completion of three to nine words, half of the time about the noun of its prompt."""
    words = rng.choices(FILLERS, k=rng.randint(2, 4)) + rng.choices(GOOD + BAD, k=rng.randint(1, 4))
    words += rng.sample([word for word in prompt.split() if word in NOUNS] + NOUNS, k=1)
    rng.shuffle(words)
    return " " + " ".join(words)


def make_pairs(count, seed=0):
    """Pairs that a noisy judge of `quality` has labelled, with a category and a margin."""
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        prompt = f"the {rng.choice(NOUNS)} {rng.choice(NOUNS)} {rng.choice(NOUNS)} was"
        texts = [completion(rng, prompt) for _ in range(2)]
        scores = [quality(prompt.split(), text.split()) for text in texts]
        gap = scores[0] - scores[1]
        if texts[0] == texts[1] or gap == 0:
            continue
        first = rng.random() < 1 / (1 + np.exp(-gap))
        chosen, rejected = texts if first else texts[::-1]
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        rows.append({**row, "kind": "even" if len(rows) % 2 else "odd", "margin": int(abs(gap) > 2)})
    return Dataset.from_list(rows)


@pytest.fixture(scope="session")
def pairs():
    """Held-out pairs."""
    return make_pairs(300)


@pytest.fixture(scope="session")
def train_pairs():
    """Training pairs."""
    return make_pairs(300, seed=1)


@pytest.fixture(scope="session")
def samples():
    """Sixteen samples for each of twelve prompts, with gold scores."""
    rng, rows = random.Random(2), []
    for number in range(12):
        prompt = f"the {NOUNS[number % 7]} {NOUNS[number // 7]} was"
        for _ in range(16):
            text = completion(rng, prompt)
            rows.append({"prompt": prompt, "completion": text, "gold_score": quality(prompt.split(), text.split())})
    return Dataset.from_list(rows)


@pytest.fixture
def write_rows(tmp_path):
    """Write rows as a jsonl file and return its path."""

    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
