import logging

import pytest
from datasets import Dataset

from rlhf_recipes.data import to_preferences
from rlhf_recipes.data.preferences import (
    LLAMA2_LARGE_MARGINS,
    LLAMA2_SMALL_MARGINS,
    confidence_margin,
    from_graded_pairs,
    from_labelled_pairs,
    from_pairs,
    from_signed_pairs,
    load_preferences,
    to_pairs,
)
from rlhf_recipes.data.preferences.pairs import SIDES

HI = "\n\nHuman: Hi\n\nAssistant:"
PAIR = {"prompt": "Hi", "chosen": "a", "rejected": "b"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("row", "prompt", "completions"),
    [
        (PAIR, "Hi", ["a", "b"]),
        ({"chosen": HI + " a", "rejected": HI + " b"}, HI, [" a", " b"]),
        (
            {"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
            [user("Hi")],
            [[assistant("a")], [assistant("b")]],
        ),
        (
            {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]},
            [user("Hi")],
            [[assistant("a")], [assistant("b")]],
        ),
    ],
)
@pytest.mark.parametrize("as_dataset", [False, True])
def test_pairs_in_text_and_chats(row, prompt, completions, as_dataset):
    [found] = from_pairs(Dataset.from_list([row]) if as_dataset else [row], source="here").to_list()
    given = {name: value for name, value in found.items() if value is not None}
    assert given == {
        "prompt": prompt,
        "completions": completions,
        "label": 1.0,
        "source": "here",
        "row": 0,
    }


def test_tokens_margins_and_other_columns_stay_beside_their_rows():
    rows = [
        PAIR | {"chosen_ids": [1, 2], "rejected_ids": [1], "margin": 0.5, "category": "x"},
        PAIR | {"chosen": ""},
        PAIR | {"rejected": "c", "category": "y"},
    ]
    table = from_pairs(rows, drop_bad_rows=True)
    assert table["completion_ids"][:] == [[[1, 2], [1]], None]
    assert table["margin"][:] == [0.5, None]
    assert table["category"][:] == ["x", "y"]
    assert table["row"][:] == [0, 2]


def test_two_prompts_are_counted_and_left_out(caplog):
    """C60."""
    rows = [{"chosen": HI + " a", "rejected": HI + " b"}, {"chosen": HI + " a", "rejected": "\n\nHuman: Yo" + HI}]
    with caplog.at_level(logging.WARNING):
        assert from_pairs(rows)["completions"][:] == [[" a", " b"]]
    assert "1 of 2 rows cannot be used: 1 x `chosen` and `rejected` answer two different prompts" in caplog.text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (PAIR | {"rejected": "a"}, "`chosen` and `rejected` are the same"),
        (PAIR | {"chosen": " "}, "empty `chosen`"),
        (PAIR | {"chosen": 3}, "`chosen` is neither text nor a chat"),
        (PAIR | {"margin": -1}, "`margin` is not a number of at least 0"),
        (PAIR | {"chosen_ids": [1]}, "only one of the two completions has token ids"),
    ],
)
def test_bad_pairs_are_refused_by_line(row, reason):
    with pytest.raises(
        ValueError, match=f"^1 of 2 rows cannot be used: 1 x {reason}.* .first: row 1 in line 7.. Corr"
    ):
        from_pairs([PAIR, row | {"line": 7}])


def test_columns_that_mean_something_else_are_refused():
    with pytest.raises(ValueError, match="^`label` would not be read from rows of this kind"):
        from_pairs([PAIR | {"label": 0}])
    with pytest.raises(ValueError, match="^Expected the columns `chosen`, `rejected`; found `prompt`"):
        from_pairs([{"prompt": "Hi"}])


@pytest.mark.parametrize("sides", SIDES)
def test_labels_are_the_probability_of_the_first(sides):
    pair = {"prompt": "Hi", sides[0]: "a", sides[1]: "b"}
    given = [1, 0, 0.5, 0.9, True, "0.25", "First", "right", " tie", "neither", "B"]
    table = from_labelled_pairs([pair | {"label": label} for label in given])
    assert table["label"][:] == [1.0, 0.0, 0.5, 0.9, 1.0, 0.25, 1.0, 0.0, 0.5, 0.5, 0.0]
    assert table["completions"][0] == ["a", "b"]


def test_labels_may_have_words_of_their_own():
    pair = {"prompt": "Hi", "response_a": "a", "response_b": "b"}
    labels = {"gauche": 1.0, "droite": 0.0}
    assert from_labelled_pairs([pair | {"label": "Gauche"}], labels=labels)["label"][:] == [1.0]
    with pytest.raises(ValueError, match="neither a number nor one of the words gauche, droite"):
        from_labelled_pairs([pair | {"label": "tie"}], labels=labels)


@pytest.mark.parametrize("label", [1.01, -1, float("nan"), "inf", None, "maybe", [1]])
def test_other_labels_are_refused(label):
    with pytest.raises(ValueError, match="1 x `label` is ne|1 x `label` is not a probability between 0 and 1"):
        from_labelled_pairs([PAIR | {"label": label}])


def test_two_completions_must_be_in_one_pair_of_columns():
    with pytest.raises(ValueError, match="Expected two completions in one of these pairs"):
        from_labelled_pairs([{"prompt": "Hi", "a": "x", "b": "y", "label": 1}])
    with pytest.raises(ValueError, match="Expected two completions in one of these pairs"):
        from_labelled_pairs([PAIR | {"response_a": "x", "response_b": "y", "label": 1}])


def test_grades_become_margins():
    """C32: the margins of Llama 2 for its four grades."""
    grades = ["Significantly better", "better", "slightly better ", "negligibly better / unsure"]
    rows = [PAIR | {"strength": grade} for grade in grades]
    assert from_graded_pairs(rows)["margin"][:] == pytest.approx([1, 0.6667, 0.3333, 0], abs=1e-4)
    assert from_graded_pairs(rows, margins=LLAMA2_LARGE_MARGINS)["margin"][:] == pytest.approx([3, 2, 1, 0])
    assert from_graded_pairs(rows)["label"][:] == [1.0] * 4
    own = {1: 0.1, 2: 0.9}
    assert from_graded_pairs([PAIR | {"strength": 2}], margins=own)["margin"][:] == [0.9]


def test_grades_beside_a_label():
    pair = {"prompt": "Hi", "response_a": "a", "response_b": "b"}
    rows = [pair | {"label": "b", "strength": "better"}, pair | {"label": "tie", "strength": "negligibly better"}]
    table = from_graded_pairs(rows)
    assert (table["label"][:], table["margin"][:]) == ([0.0, 0.5], [2 / 3, 0.0])
    with pytest.raises(ValueError, match="Expected the columns `response_a`, `response_b`, `strength`, `label`"):
        from_graded_pairs([pair | {"strength": "better"}])
    with pytest.raises(ValueError, match="`margin` is above 0, but `label` is a tie"):
        from_graded_pairs([pair | {"label": "tie", "strength": "better"}])


def test_unknown_grades_are_refused():
    with pytest.raises(ValueError, match="`strength` is none of the grades significantly better, better"):
        from_graded_pairs([PAIR | {"strength": "much better"}])
    with pytest.raises(ValueError, match="The margin of 'better' must be at least 0, got -1"):
        from_graded_pairs([PAIR | {"strength": "better"}], margins={**LLAMA2_SMALL_MARGINS, "better": -1})


def test_confidence_is_a_distance_from_the_middle():
    assert [confidence_margin(value) for value in range(1, 10)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.25, 0.5, 0.75, 1.0]
    assert [confidence_margin(value, 0, 3) for value in range(4)] == pytest.approx([1.0, 1 / 3, 1 / 3, 1.0])
    for value in (0, 10, 5.5, "sure", True, None):
        with pytest.raises(ValueError, match="`confidence` must be a whole number from 1 to 9, got"):
            confidence_margin(value)


def test_signed_strengths():
    """HelpSteer2-Preference: negative where response 1 is better."""
    pair = {"prompt": "Hi", "response_1": "a", "response_2": "b"}
    table = from_signed_pairs([pair | {"preference_strength": value} for value in range(-3, 4)])
    assert table["label"][:] == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
    assert table["margin"][:] == [3.0, 2.0, 1.0, 0.0, 1.0, 2.0, 3.0]
    for value in (4, -100, 1.5, None, "1"):
        with pytest.raises(ValueError, match="`preference_strength` is none of the strengths"):
            from_signed_pairs([pair | {"preference_strength": value}])
    own = from_signed_pairs([pair | {"preference_strength": -2}], margins={2: 0.5})
    assert own["margin"][:] == [0.5]


def test_real_dialogues_have_one_prompt_and_two_answers(shared_data, caplog):
    path = str(shared_data / "hh_harmless" / "pairs.jsonl.gz")
    with pytest.raises(
        ValueError, match="8 of 1812 rows cannot be used: 3 x empty `chosen` .first: row 224 in line 2"
    ):
        load_preferences(path)
    with caplog.at_level(logging.WARNING):
        table = load_preferences(path, drop_bad_rows=True)
    assert len(table) == 1804
    assert "5 x `chosen` and `rejected` answer two different prompts" in caplog.text
    assert {row + 1 for row in table["row"]} == set(table["line"])
    assert set(table["label"]) == {1.0}
    pairs = to_preferences(
        Dataset.from_list(
            [
                {"chosen": p + a, "rejected": p + b}
                for p, (a, b) in zip(table["prompt"], table["completions"], strict=True)
            ]
        )
    )
    assert pairs["prompt"][:] == table["prompt"][:]
    assert [list(pair) for pair in zip(pairs["chosen"], pairs["rejected"], strict=True)] == table["completions"][:]
    assert to_pairs(table).remove_columns("group").to_list() == table.to_list()
