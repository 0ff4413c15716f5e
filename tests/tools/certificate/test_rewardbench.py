"""RewardBench files of both versions."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_recipes.tools.certificate import reward_bench


def likes_good(prompt, completion):
    return sum(word == "good" for word in completion) - 0.5 * sum(word == "bad" for word in completion)


@pytest.fixture
def write(tmp_path):
    def write_rows(rows, name="bench.jsonl"):
        path = tmp_path / name
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif name.endswith(".json"):
            path.write_text(json.dumps(rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_rows


FIRST = [
    {"prompt": "the film", "chosen": "good", "rejected": "bad", "subset": "mt-bench-easy", "id": 0},
    {"prompt": "the story", "chosen": "bad", "rejected": "good", "subset": "mt-bench-med", "id": 1},
    {"prompt": "the plot", "chosen": "good", "rejected": "warm", "subset": "math-prm", "id": 2},
    {"prompt": "the music", "chosen": "good", "rejected": "good", "subset": "hep-cpp", "id": 3},
]


@pytest.mark.parametrize("name", ["bench.jsonl", "bench.json", "bench.parquet"])
def test_first_version(rule_scorer, write, name):
    result = reward_bench(rule_scorer(likes_good), write(FIRST, name))
    assert (result["version"], result["n"], result["left_out"]) == (1, 4, 0)
    assert {row["group"]: row["value"] for row in result["subsets"]} == {
        "mt-bench-easy": 1.0,
        "mt-bench-med": 0.0,
        "math-prm": 1.0,
        "hep-cpp": 0.0,  # equal scores are no success
    }
    assert result["sections"] == {"Chat": pytest.approx(28 / 68), "Reasoning": pytest.approx(984 / (984 + 164))}


def test_texts_are_read_as_chats_of_one_turn(rule_scorer, write):
    seen = []
    scorer = rule_scorer(lambda prompt, completion: seen.append([*prompt, *completion]) or 0.0)
    reward_bench(scorer, write(FIRST[:1]))
    assert seen[0] == "<user> the film <eos> <assistant> good <eos>".split()


def test_second_version(rule_scorer, write):
    def row(subset, chosen, rejected, name="0"):
        return {"id": name, "prompt": f"the film {name}", "chosen": chosen, "rejected": rejected, "subset": subset}

    rows = [
        row("Math", ["good"], ["bad", "warm", "bad bad"]),
        row("Math", ["warm"], ["bad", "slow", "bad"]),  # shares the best place with one: 1/2
        row("Focus", ["bad"], ["good", "bad", "bad"]),
        row("Ties", ["good"], ["bad", "warm"], "ref:0"),
        row("Ties", ["good good", "good"], ["bad"], "tied:0"),  # gap 1.5, spread 1
    ]
    result = reward_bench(rule_scorer(likes_good), write(rows))
    assert result["version"] == 2
    subsets = {entry["group"]: entry for entry in result["subsets"]}
    assert (subsets["Math"]["value"], subsets["Math"]["n"], subsets["Focus"]["value"]) == (0.75, 2, 0.0)
    assert subsets["Ties"]["ref_accuracy"] == subsets["Ties"]["tied_accuracy"] == 1.0
    # the gap of ref:0 is 1, not above the spread of 1
    assert (subsets["Ties"]["gap_above_spread"], subsets["Ties"]["both_gaps_above_spread"]) == (1.0, 0.0)
    assert result["sections"]["Ties"] == pytest.approx(0.3 + 0.3 + 0.2)
    assert "Average" not in result["sections"]
    six = [row(name, ["good"], ["bad"] * 3) for name in ("Factuality", "Precise IF", "Math", "Safety", "Focus")]
    complete = reward_bench(rule_scorer(likes_good), write([*six, *rows[3:]]))
    assert complete["sections"]["Average"] == pytest.approx((5 + 0.8) / 6)


def test_long_rows_are_left_out(rule_scorer, write):
    rows = [*FIRST, {**FIRST[0], "rejected": "bad " * 90}]
    result = reward_bench(rule_scorer(likes_good), write(rows))
    assert (result["n"], result["left_out"]) == (4, 1)
    with pytest.raises(ValueError, match="No row of .* fits into 2 tokens"):
        reward_bench(rule_scorer(likes_good, max_length=2), write(FIRST))


@pytest.mark.parametrize(("change", "missing"), [({"subset": None}, "`subset`"), ({"chosen": ""}, "`chosen`")])
def test_rows_without_a_column_are_named(rule_scorer, write, change, missing):
    with pytest.raises(ValueError, match=f"row 1 has no {missing}"):
        reward_bench(rule_scorer(likes_good), write([FIRST[0], {**FIRST[1], **change}]))
