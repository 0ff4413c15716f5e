"""The judge of the recipe, which PPO does not see: a lexicon's mood of a text, less what makes it strange to read."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.extras import from_extra
from rlhf_recipes.models import load_causal_lm

BATCH = 32


class Sentiment:
    """VADER's compound score of each completion, from -1 to 1: words rated by people, and rules for their use.

    Source: Hutto and Gilbert, VADER (ICWSM 2014). It knows nothing of grammar, and a word said twice counts twice.
    """

    __name__ = "sentiment"

    def __init__(self) -> None:
        with from_extra("smollm2", needed_by="The judge"):
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        self.analyzer = SentimentIntensityAnalyzer()

    def __call__(self, completions: Sequence[str], **kwargs) -> list[float]:
        return [self.analyzer.polarity_scores(text)["compound"] for text in completions]


class Surprise:
    """Nats per token of each completion under the untouched base: the logarithm of its perplexity.

    The end token does not count: the base was made for chats, and does not end other texts with it.

    Args:
        model: The base, in float32.
        end_token_id: Token that ends a completion.
    """

    __name__ = "surprise"

    def __init__(self, model: PreTrainedModel, end_token_id: int) -> None:
        self.model, self.end_token_id = model.eval(), end_token_id

    @torch.no_grad()
    def __call__(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], **kwargs
    ) -> list[float]:
        texts = [
            (list(prompt), [token for token in ids if token != self.end_token_id])
            for prompt, ids in zip(prompt_ids, completion_ids, strict=True)
        ]
        return [
            surprise for start in range(0, len(texts), BATCH) for surprise in self._batch(texts[start : start + BATCH])
        ]

    def _batch(self, texts: list[tuple[list[int], list[int]]]) -> list[float]:
        length = max(len(prompt) + len(ids) for prompt, ids in texts)
        tokens = torch.zeros(len(texts), length, dtype=torch.long)  # padded on the right, which no token sees
        counts = torch.zeros(len(texts), length - 1)
        for row, (prompt, ids) in enumerate(texts):
            tokens[row, : len(prompt) + len(ids)] = torch.tensor(prompt + ids)
            counts[row, len(prompt) - 1 : len(prompt) + len(ids) - 1] = 1.0
        tokens, counts = tokens.to(self.model.device), counts.to(self.model.device)
        logits: Tensor = self.model(input_ids=tokens).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        return ((losses * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)).tolist()


class Gold:
    """Sentiment, less the nats per token by which a completion is more or less surprising than most of people's.

    Both sides count. Text that means nothing surprises the base; text that repeats itself does not surprise it at all.

    Args:
        sentiment: Score of the mood.
        surprise: Score of the strangeness.
        mean: Mean surprise of completions by people.
        std: Their standard deviation: within one of the mean nothing is taken off.
    """

    __name__ = "gold"

    def __init__(self, sentiment: Sentiment, surprise: Surprise, mean: float, std: float) -> None:
        self.sentiment, self.surprise, self.mean, self.std = sentiment, surprise, mean, std

    def __call__(self, **kwargs) -> list[float]:
        scores = zip(self.sentiment(**kwargs), self.surprise(**kwargs), strict=True)
        return [mood - max(0.0, abs(nats - self.mean) - self.std) for mood, nats in scores]


def judges(
    base: str, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt_words: int, max_length: int
) -> tuple[Sentiment, Surprise, Gold]:
    """Load the three judges. What people's texts are like is measured on the same prompts as the policy's.

    Args:
        base: The untouched model.
        tokenizer: Its tokenizer.
        texts: Held-out texts by people.
        prompt_words: Words of each that are the prompt.
        max_length: Tokens of the rest that count: as many as the policy may write.
    """
    sentiment = Sentiment()
    surprise = Surprise(load_causal_lm(base, dtype=torch.float32), tokenizer.eos_token_id)
    prompts = [" ".join(text.split()[:prompt_words]) for text in texts]
    rests = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    both = [(prompt, rest) for prompt, rest in zip(prompts, rests, strict=True) if rest]
    prompt_ids = tokenizer([prompt for prompt, _ in both])["input_ids"]
    rest_ids = [ids[:max_length] for ids in tokenizer([rest for _, rest in both])["input_ids"]]
    human = torch.tensor(surprise(prompt_ids, rest_ids))
    return sentiment, surprise, Gold(sentiment, surprise, human.mean().item(), human.std().item())
