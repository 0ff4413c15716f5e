"""Compare reward models with TF-IDF and logistic regression, on all pairs of held-out snippets and on single ones.

python recipes/sentence_polarity/compare.py --reward_models outputs/sentence_polarity/encoder
"""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows
from rlhf_recipes.models import load_reward_model
from rlhf_recipes.reward_modeling import score_sequences
from rlhf_recipes.reward_modeling.baselines import fit_tfidf
from rlhf_recipes.rewards.encoding import encode, is_encoder


@dataclass
class CompareArguments:
    """The reward models to compare, and the rows."""

    reward_models: list[str] = field(
        metadata={"help": "Folders of the reward stage. The scores of several are added."}
    )
    data: str = field(default="outputs/sentence_polarity/data", metadata={"help": "Folder made by pairs.py."})
    resamples: int = field(default=2000, metadata={"help": "Bootstrap samples of the held-out snippets."})


ARGUMENTS = (CompareArguments,)


def main(args: CompareArguments) -> None:
    test, pairs = load_rows(f"{args.data}/snippets", split="test"), load_rows(f"{args.data}/pairs")
    scores = {
        "model": sum(score(path, pairs["prompt"][0], test) for path in args.reward_models),
        "tfidf": fit_tfidf(pairs)(test["text"]),
    }
    # Single snippets are told apart at the median of their scores, for which no label is needed.
    centred = {name: values - np.median(values) for name, values in scores.items()}
    print(json.dumps(compare(np.array(test["label"]), **centred, resamples=args.resamples), indent=2))


def score(path: str, prompt: str, rows: Dataset) -> NDArray[np.float64]:
    """Score every snippet in the format of training."""
    model, tokenizer = load_reward_model(path)
    ids = [encode(tokenizer, prompt, f" {text} ", encoder=is_encoder(model))[0] for text in rows["text"]]
    return score_sequences(model, ids, batch_size=128).double().numpy()


def compare(
    labels: NDArray[Any], model: NDArray[np.float64], tfidf: NDArray[np.float64], resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Accuracies of both on every pair of a positive and a negative snippet, and on snippets (positive above 0).

    The intervals come from a bootstrap of the positive and of the negative snippets, in which both see the same draw.
    """
    positive, negative = labels == 1, labels == 0
    wins = {}
    for name, scores in (("model", model), ("tfidf", tfidf)):
        margins = scores[positive][:, None] - scores[negative]
        right = np.where(labels == 1, scores > 0, scores < 0) + 0.5 * (scores == 0)
        wins[name] = (np.sign(margins) + 1) / 2, right
    wins["difference"] = tuple(a - b for a, b in zip(wins["model"], wins["tfidf"], strict=True))

    rng = np.random.default_rng(seed)
    draws = [
        rng.multinomial(side.sum(), np.full(side.sum(), 1 / side.sum()), resamples) for side in (positive, negative)
    ]
    sizes = positive.sum() * negative.sum(), len(labels)
    result: dict[str, Any] = {"snippets": int(sizes[1]), "pairs": int(sizes[0])}
    for name, (pairs, singles) in wins.items():
        by_pair = ((draws[0] @ pairs) * draws[1]).sum(axis=1) / sizes[0]
        by_snippet = (draws[0] @ singles[positive] + draws[1] @ singles[negative]) / sizes[1]
        for kind, value, drawn in (("pair", pairs, by_pair), ("snippet", singles, by_snippet)):
            low, high = np.quantile(drawn, [0.025, 0.975])
            result[f"{name}_{kind}_accuracy"] = float(value.mean())
            result[f"{name}_{kind}_accuracy_ci"] = [float(low), float(high)]
    return result


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
