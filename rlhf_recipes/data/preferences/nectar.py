"""Reader of rows as in Nectar: several answers to a dialogue, each with its rank."""

from __future__ import annotations

from datasets import Dataset

from rlhf_recipes.data.dialogues import BadRow, Row
from rlhf_recipes.data.instructions import without_space
from rlhf_recipes.data.preferences.reading import Rows, read
from rlhf_recipes.statistics.numbers import is_number


def from_nectar(rows: Rows, *, drop_bad_rows: bool = False, source: str | None = None) -> Dataset:
    r"""Read rankings in the form of Nectar (seven answers to a prompt, ranked by a model).

    The dialogue stays text, as that of hh-rlhf does: the prompt ends with "\n\nAssistant:", and the space after it
    begins the completions.

    Args:
        rows: Rows with `prompt` (turns that start with "\n\nHuman:" and "\n\nAssistant:") and `answers`: a list of
            `{"answer": text, "rank": number, "model": ...}`. The smallest rank is the best; places may be left out.
        drop_bad_rows: Whether to leave out bad rows, instead of refusing them all.
        source: Name of the source, for rows without a column `source`.

    Returns:
        A preference table with `ranks`.

    Raises:
        ValueError: If columns are missing, rows cannot be used, or none is left.

    Example:
        >>> answers = [{"answer": "No.", "rank": 4.0, "model": "x"}, {"answer": "Hello!", "rank": 1.0, "model": "y"}]
        >>> table = from_nectar([{"prompt": "\n\nHuman: Hi\n\nAssistant: ", "answers": answers}])
        >>> table[0]["prompt"], table[0]["completions"], table[0]["ranks"]
        ('\n\nHuman: Hi\n\nAssistant:', [' No.', ' Hello!'], [2, 1])
    """

    def convert(row: Row) -> Row:
        answers, prompt = row["answers"], row["prompt"]
        is_list = isinstance(answers, list) and all(
            isinstance(answer, dict) and {"answer", "rank"} <= answer.keys() for answer in answers
        )
        if not is_list:
            raise BadRow("`answers` is not a list of objects with `answer` and `rank`")
        if not all(is_number(answer["rank"]) for answer in answers):
            raise BadRow("`answers` has a `rank` that is not a number")
        texts, ranks = [answer["answer"] for answer in answers], [answer["rank"] for answer in answers]
        prompt = without_space(prompt)
        if isinstance(prompt, str) and prompt.endswith("\n\nAssistant:"):
            texts = [f" {text.lstrip(' ')}" if isinstance(text, str) and text.strip() else text for text in texts]
        places = sorted(set(ranks))
        return {"prompt": prompt, "completions": texts, "ranks": [places.index(rank) + 1 for rank in ranks]}

    return read(rows, convert, needs=["prompt", "answers"], drop_bad_rows=drop_bad_rows, source=source)
