"""`rlhf-recipes rank` and `rlhf-recipes rate`: the numbers they print, against the functions and sums by hand."""

import json
import re
from math import log

import pytest
from sklearn.metrics import cohen_kappa_score

from rlhf_recipes.tools.cli import main
from rlhf_recipes.tools.ranking.ranking import bradley_terry
from rlhf_recipes.tools.ranking.report import rank_votes
from rlhf_recipes.tools.ranking.score_intervals import bootstrap_scores
from rlhf_recipes.tools.ranking.votes import Vote


def votes(winner, loser, number=1, **columns):
    return [{"winner": winner, "loser": loser, **columns}] * number


def table(text, first):
    """Cells of the table whose header starts with a word, by the first cell of the row."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if re.match(rf"{first} ", line))
    rows = [re.split(r"\s{2,}", line) for line in lines[start + 1 :]]
    return {row[0]: row[1:] for row in rows[: next((n for n, row in enumerate(rows) if len(row) < 2), len(rows))]}


def test_scores_intervals_and_votes_best_first():
    rows = votes("new", "old", 30) + votes("old", "new", 10) + votes("old", "bad", 16) + votes("bad", "old", 2)
    found = table(rank_votes(rows, seed=3), "item")
    assert list(found) == ["new", "old", "bad"]
    expected = bootstrap_scores([Vote(row["winner"], row["loser"]) for row in rows], bradley_terry, seed=3)
    for item, (score, low, high) in expected.items():
        assert found[item][:2] == [f"{score:.3f}", f"[{low:.3f}, {high:.3f}]"]
    assert [found[item][2] for item in found] == ["40", "58", "18"]


def test_an_item_that_never_lost_is_named():
    text = rank_votes(votes("a", "b", 3) + votes("b", "c", 3) + votes("c", "b", 2))
    assert table(text, "item")["a"][1:] == ["not identified", "3"]
    assert "Not identified: a. No chain of votes" in text
    assert "Not identified" not in rank_votes(votes("b", "c", 3) + votes("c", "b", 2))


def test_annotators_against_the_majority_of_the_others():
    ballots = {  # who prefers the first of two items, by prompt; 0.5 is a tie
        "eve": [1, 1, 0, 1, 0, 0.5],
        "bob": [1, 1, 0, 0, 0, 1],
        "ann": [1, 0, 1, 0, 0, 0],
        "dan": [None, 1, 0, None, 1, 1],
    }
    rows = []
    for name, answers in ballots.items():
        for prompt, answer in enumerate(answers):
            if answer is not None:
                winner, loser = ("y", "x") if answer == 0 else ("x", "y")
                rows.append(
                    {"winner": winner, "loser": loser, "tie": answer == 0.5, "group": prompt, "annotator": name}
                )
    found = table(rank_votes(rows), "annotator")
    #     prompt:        0    1    2    3    4    5
    majority = {"eve": [1, 1, 0, 0, 0, 1], "dan": [1, 0, 0, 0.5]}  # dan's of prompts 1, 2, 4 and 5
    own = {"eve": ballots["eve"], "dan": [1, 0, 1, 1]}
    # eve: right on 0, 1, 2 and 4, wrong on 3, a tie on 5. dan: right on 1 and 2, wrong on 4, and 5 is undecided.
    assert [found[name][:2] for name in ("eve", "dan")] == [["6", f"{4.5 / 6:.3f}"], ["4", f"{2 / 3:.3f}"]]
    for name in majority:
        kappa = cohen_kappa_score([2 * x for x in own[name]], [2 * x for x in majority[name]])
        assert found[name][2] == f"{kappa:.3f}"


def test_repeated_votes_of_an_annotator_are_one_opinion_and_one_annotator_has_no_agreement():
    rows = votes("a", "b", 3, annotator="eve") + votes("b", "a", 1, annotator="eve") + votes("a", "b", annotator="bob")
    assert table(rank_votes(rows), "annotator") == {"eve": ["1", "1.000", "-"], "bob": ["1", "1.000", "-"]}
    assert "majority" not in rank_votes(rows[:4])
    assert "majority" not in rank_votes([{**row, "annotator": None} for row in rows])
    apart = votes("a", "b", annotator="eve") + votes("b", "c", annotator="bob")
    assert table(rank_votes(apart), "annotator") == {"eve": ["0", "-", "-"], "bob": ["0", "-", "-"]}


@pytest.mark.parametrize(
    ("columns", "drawn"),
    [
        ([{}] * 12, "12 single votes"),
        ([{"annotator": n % 9} for n in range(12)], "12 single votes"),
        ([{"annotator": n % 10} for n in range(12)], "10 annotators"),
        ([{"annotator": n % 10, "group": n % 3} for n in range(12)], "3 groups"),
        ([{"group": n % 3 or None} for n in range(12)], "2 groups and 4 single votes"),
    ],
)
def test_what_is_drawn_for_the_intervals(columns, drawn):
    rows = [votes(*("ab" if n % 2 else "ba"))[0] | own for n, own in enumerate(columns)]
    assert f"Drawn for the intervals: {drawn}. " in rank_votes(rows)


def test_the_pairs_to_ask_about_are_those_in_doubt():
    sure = votes("a", "c", 50) + votes("c", "a", 2) + votes("b", "c", 50) + votes("c", "b", 2)
    text = rank_votes(sure, ask_about=1)
    first, second, chance, deviation = re.split(r"\s{2,}", text.splitlines()[-1])
    assert {first, second} == {"a", "b"}
    assert 0.3 < float(chance) < 0.7
    assert float(deviation) > 0.1
    assert len(rank_votes(sure, ask_about=9).splitlines()) == len(text.splitlines()) + 2  # there are three pairs
    with pytest.raises(ValueError, match="from 1 to the number of candidates, 3, got 0"):
        rank_votes(sure, ask_about=0)


def test_long_and_odd_names_stay_in_their_cell():
    text = rank_votes(votes("a\n b\x1b", "x" * 99, 3) + votes("x" * 99, "a\n b\x1b", 2))
    assert [line.split("  ")[0] for line in text.splitlines()[1:3]] == ["a b\x1b", "x" * 57 + "..."]


def test_the_command(write_rows, capsys):
    rows = votes("a", "b", 3) + votes("b", "a", 2, tie=True)  # a `tie` in some rows only
    assert main(["rank", write_rows(rows), "--next", "1"]) == 0
    out = capsys.readouterr().out
    odds = log((4 + 1) / (1 + 1))  # two ties are one win each
    assert odds > 0
    score = bradley_terry([Vote("a", "b")] * 3 + [Vote("a", "b", tie=True)] * 2)["a"]
    assert table(out, "item")["a"][0] == f"{score:.3f}"
    assert out.splitlines()[-1].split()[:2] == ["a", "b"]
    assert main(["rank", write_rows([{"winner": "a"}])]) == 2
    assert "rlhf-recipes rank: Vote 0 names no `loser`" in capsys.readouterr().err


def test_rating_rankings(write_rows, tmp_path, capsys):
    rankings = [{"prompt": "q", "completions": ["good", "bad"], "ranks": [1, 2]}] * 2
    rankings += [{"prompt": "q", "completions": ["good", "fair", "bad"], "ranks": [1, 2, 2], "id": 7}]
    output = tmp_path / "rated.jsonl"
    assert main(["rate", write_rows(rankings), str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    ratings = [rating for row in rows for rating in row["ratings"]]
    assert sum(ratings) == pytest.approx(0, abs=1e-9)
    assert sum(rating**2 for rating in ratings) / len(ratings) == pytest.approx(1)
    assert rows[0]["ratings"] == rows[1]["ratings"]
    assert rows[2]["ratings"][1] == rows[2]["ratings"][2]
    assert "ranks" not in rows[0]
    assert rows[2]["id"] == 7

    assert main(["rate", write_rows(rankings), str(output)]) == 2
    assert "is there already" in capsys.readouterr().err
    pooled = tmp_path / "pooled.jsonl"
    assert main(["rate", write_rows(rankings), str(pooled), "--pool", "prompt"]) == 0
    rows = [json.loads(line) for line in pooled.read_text().splitlines()]
    assert rows[0]["ratings"] == [rows[2]["ratings"][0], rows[2]["ratings"][2]]  # one rating for each text
