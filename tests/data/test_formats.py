import gzip
import json
import logging

import pytest
from datasets import ClassLabel, Dataset
from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.data import (
    check_prompt_lengths,
    load_rows,
    split_by_prompt,
    to_completions,
    to_preferences,
    to_prompts,
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be kind."}
HI = "\n\nHuman: Hi\n\nAssistant:"
TWO_TURNS = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:"
EMPTY_HUMAN = "\n\nAssistant: I start."


def rows(**columns):
    return Dataset.from_dict(columns)


# Prompts


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"prompt": "Hi"}, "Hi"),
        ({"prompt": " Hi \n"}, " Hi \n"),
        ({"prompt": [SYSTEM, user("Hi")]}, [SYSTEM, user("Hi")]),
        ({"prompt": "Hi", "completion": " Hello!"}, "Hi"),
        ({"prompt": "Hi", "completion": ""}, "Hi"),  # PPO writes its own completions
        ({"prompt": "Hi", "chosen": " Hello!", "rejected": " No."}, "Hi"),
        ({"chosen": HI + " Hello!", "rejected": HI + " Hello!"}, HI),
        ({"chosen": TWO_TURNS + " Bye.", "rejected": HI + " No."}, TWO_TURNS),
        ({"chosen": [user("Hi"), assistant("Hello!")], "rejected": [user("Hi"), assistant("No.")]}, [user("Hi")]),
        ({"prompt": [user("Hi")], "chosen": [assistant("Hello!")]}, [user("Hi")]),
        ({"prompt": "Hi", "chosen": [SYSTEM, user("Hi"), assistant("Hello!")]}, [SYSTEM, user("Hi")]),
        ({"prompt": "Hi", "messages": [SYSTEM, user("Hi"), assistant("Hello!")]}, [SYSTEM, user("Hi")]),
        ({"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}, [user("a"), assistant("b"), user("c")]),
        ({"messages": [user("a"), assistant("b"), user("c")]}, [user("a"), assistant("b"), user("c")]),
        ({"messages": HI + " Hello!"}, HI),
        ({"chosen": [user("Hi"), assistant("a")], "messages": [user("Hey"), assistant("a")]}, [user("Hi")]),
    ],
)
def test_prompts_of_every_kind_of_row(columns, prompt):
    converted = to_prompts(rows(**{name: [value] for name, value in columns.items()}, score=[0.5]))
    assert converted.to_list() == [{"prompt": prompt, "score": 0.5}]


@pytest.mark.parametrize(
    ("words", "expected"), [(1, "a"), (3, "a  long\nfilm"), (4, "a  long\nfilm ."), (9, "a  long\nfilm .")]
)
def test_prompts_from_the_first_words_of_texts(words, expected):
    converted = to_prompts(rows(text=[" a  long\nfilm . "], label=[1]), prompt_words=words)
    assert converted.to_list() == [{"prompt": expected, "label": 1}]


def test_prompt_words_belong_to_text_rows():
    with pytest.raises(ValueError, match="Got `prompt_words` None and the columns `text`"):
        to_prompts(rows(text=["a film"]))
    with pytest.raises(ValueError, match="Got `prompt_words` 3 and the columns `prompt`, `text`"):
        to_prompts(rows(prompt=["a"], text=["a film"]), prompt_words=3)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        to_prompts(rows(text=["a film"]), prompt_words=0)


# Preferences


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (("Hi", " Hello!", " No."), ("Hi", " Hello!", " No.")),
        ((None, HI + " Hello!", HI + " No."), (HI, " Hello!", " No.")),
        ((None, TWO_TURNS + " Bye.", TWO_TURNS + "Go"), (TWO_TURNS, " Bye.", "Go")),
        (([user("Hi")], [assistant("a")], [assistant("b")]), ([user("Hi")], [assistant("a")], [assistant("b")])),
        (
            (None, [SYSTEM, user("Hi"), assistant("a")], [SYSTEM, user("Hi"), assistant("b")]),
            ([SYSTEM, user("Hi")], [assistant("a")], [assistant("b")]),
        ),
        (
            ("Hi", [user("Hi"), assistant("a")], [user("Hi"), assistant("b")]),  # as in UltraFeedback
            ([user("Hi")], [assistant("a")], [assistant("b")]),
        ),
        (
            (None, *([user("Hi"), assistant("same"), user("x"), assistant(last)] for last in "ab")),
            ([user("Hi"), assistant("same"), user("x")], [assistant("a")], [assistant("b")]),
        ),
    ],
)
@pytest.mark.parametrize("with_empty_prompt_column", [False, True])
def test_preferences_of_every_kind_of_row(columns, expected, with_empty_prompt_column):
    names = ["prompt", "chosen", "rejected"]
    given = {name: [value] for name, value in zip(names, columns, strict=True)}
    if columns[0] is None and not with_empty_prompt_column:
        del given["prompt"]
    assert to_preferences(rows(**given)).to_list() == [dict(zip(names, expected, strict=True))]


def test_token_ids_and_other_columns_stay_beside_their_rows():
    dataset = rows(
        chosen=[HI + " a", HI + " ", HI + " b"],
        rejected=[HI + " c"] * 3,
        chosen_ids=[[1], [2, 2], [3]],
        rejected_ids=[[4], [5], []],
        label=[0, 1, 1],
    ).cast_column("label", ClassLabel(names=["bad", "good"]))
    converted = to_preferences(dataset, drop_bad_rows=True)
    assert converted.remove_columns(["prompt", "rejected"]).to_list() == [
        {"chosen": " a", "chosen_ids": [1], "rejected_ids": [4], "label": 0},
        {"chosen": " b", "chosen_ids": [3], "rejected_ids": [], "label": 1},
    ]
    assert converted.features["label"].names == ["bad", "good"]
    assert dataset.num_rows == 3, "the given dataset is not changed"


def test_rows_with_two_prompts_are_left_out_and_counted(caplog):
    dataset = rows(
        chosen=[TWO_TURNS + " a", HI + " b", HI + " c"],
        rejected=[HI + " a", HI + " d", TWO_TURNS + " c"],
    )
    with caplog.at_level(logging.WARNING):
        converted = to_preferences(dataset)
    assert converted["chosen"][:] == [" b"]
    assert "2 of 3 rows cannot be used" in caplog.text
    assert "2 x `chosen` and `rejected` answer two different prompts (first: row 0)" in caplog.text
    with pytest.raises(ValueError, match="No row is left. 1 of 1 rows"):
        to_preferences(dataset.select([0]))


def test_good_rows_give_no_warning(caplog):
    to_preferences(rows(chosen=[HI + " a"], rejected=[HI + " b"]))
    assert not caplog.records


BAD_PREFERENCES = [
    ((HI + " ", HI + " b"), "empty `chosen`"),
    ((HI + " a", HI), "empty `rejected`"),
    ((HI + " a", HI + " a"), "`chosen` and `rejected` are the same"),
    ((EMPTY_HUMAN, "\n\nAssistant: b"), "empty `prompt`"),
    (("a", "b"), r"has no turn that starts with '\\n\\nAssistant:', and there is no `prompt`"),
    ((None, HI + " b"), "there is no `prompt`"),
    (([user("Hi"), user("a")], [user("Hi"), user("a")]), "`chosen` and `rejected` are the same"),
    (([user("Hi"), assistant("")], [user("Hi"), assistant("b")]), "empty `chosen`"),
    (([assistant("a")], [assistant("b")]), "empty `prompt`"),
    (([user(" "), assistant("a")], [user(" "), assistant("b")]), "empty `prompt`"),
    ((["a"], ["b"]), "`chosen` is neither text nor a chat"),
    (([{"value": "a"}],) * 2, "`chosen` is neither text nor a chat"),
    (([{"from": "bot", "value": "a"}],) * 2, "`chosen` has a turn whose `from` is none of human, user, gpt"),
    ((1, 2), "`chosen` is neither text nor a chat"),
]


@pytest.mark.parametrize(("values", "reason"), BAD_PREFERENCES)
def test_bad_preference_rows_are_refused(values, reason):
    chosen, rejected = values
    with pytest.raises(ValueError, match=f"^No row is left. 1 of 1 rows cannot be used: 1 x .*{reason}.*row 0"):
        to_preferences(rows(chosen=[chosen], rejected=[rejected]), drop_bad_rows=True)


def test_bad_rows_are_dropped_only_when_asked_for(caplog):
    dataset = rows(prompt=["a", "", "c", " "], chosen=["x", "x", "", "x"], rejected=["y"] * 4)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is compared below
        to_preferences(dataset)
    assert str(caught.value) == (
        "3 of 4 rows cannot be used: 2 x empty `prompt` (first: row 1); 1 x empty `chosen` (first: row 2). "
        "Correct them, or leave them out with `drop_bad_rows: true`."
    )
    assert to_preferences(dataset, drop_bad_rows=True)["prompt"][:] == ["a"]
    assert "3 of 4 rows cannot be used" in caplog.text


def test_text_that_answers_a_chat_is_the_assistants_message():
    [row] = to_preferences(rows(prompt=[[user("Hi")]], chosen=["a"], rejected=["b"]))
    assert row == {"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


def test_a_text_before_one_answer_as_a_chat_is_the_users_message():
    [row] = to_preferences(rows(prompt=["Hi"], chosen=[[assistant("a")]], rejected=[[assistant("b")]]))
    assert row == {"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


# Completions


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "Hi", "completion": " Hello!"}, {"prompt": "Hi", "completion": " Hello!"}),
        (
            {"prompt": [user("Hi")], "completion": [assistant("a")]},
            {"prompt": [user("Hi")], "completion": [assistant("a")]},
        ),
        ({"messages": [user("Hi"), assistant("a")]}, {"messages": [user("Hi"), assistant("a")]}),
        ({"prompt": "Hi", "messages": [user("Hi"), assistant("a")]}, {"messages": [user("Hi"), assistant("a")]}),
        ({"text": "a film"}, {"text": "a film"}),
        ({"chosen": HI + " Hello!", "rejected": HI + " No."}, {"prompt": HI, "completion": " Hello!"}),
        ({"prompt": "Hi", "chosen": " a", "rejected": " a"}, {"prompt": "Hi", "completion": " a"}),
        (
            {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]},
            {"prompt": [user("Hi")], "completion": [assistant("a")]},
        ),
    ],
)
def test_completions_of_every_kind_of_row(columns, expected):
    converted = to_completions(rows(**{name: [value] for name, value in columns.items()}, label=[1]))
    assert converted.to_list() == [{**expected, "label": 1}]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"prompt": "Hi", "completion": " "}, "empty `completion`"),
        ({"prompt": "", "completion": "a"}, "empty `prompt`"),
        ({"prompt": "Hi", "completion": None}, "empty `completion`"),
        ({"messages": [user("Hi")]}, "empty `last assistant message`"),
        ({"messages": []}, "empty `last assistant message`"),
        ({"messages": [user("Hi"), assistant("")]}, "empty `last assistant message`"),
        ({"text": "\n"}, "empty `text`"),
        ({"chosen": HI}, "empty `chosen`"),
    ],
)
def test_bad_completion_rows_are_refused(columns, reason):
    with pytest.raises(ValueError, match=f"1 x {reason}"):
        to_completions(rows(**{name: [value] for name, value in columns.items()}))


def test_an_assistant_turn_that_calls_a_tool_may_be_without_words():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "search"}]}
    assert len(to_completions(rows(messages=[[user("Hi"), call]]))) == 1


# Columns


@pytest.mark.parametrize(
    ("convert", "columns", "expected"),
    [
        (
            to_prompts,
            ["query", "label"],
            "Expected the columns `prompt`, or `chosen`, or `messages`, or `conversations`, or `text`; found",
        ),
        (
            to_preferences,
            ["prompt", "chosen"],
            "Expected the columns `chosen` and `rejected`; found `prompt`, `chosen`",
        ),
        (
            to_completions,
            ["prompt"],
            "`prompt` and `completion`, or `messages`, or `chosen`, or `conversations`, or `text`; found `prompt`",
        ),
        (lambda dataset: split_by_prompt(dataset, 0.5, 0), ["chosen"], "`prompt`, or `messages`, or `text`; found"),
        (
            lambda dataset: check_prompt_lengths(dataset, None, 5),
            ["text"],
            "Expected the columns `prompt`; found `text`",
        ),
    ],
)
def test_column_errors_say_what_was_found_and_what_was_expected(convert, columns, expected):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        convert(rows(**{name: ["a"] for name in columns}))
    assert expected in str(caught.value)


def test_nothing_is_cached_on_disk(tmp_path):
    rows(prompt=["a", "", "c"], score=[1, 2, 3]).save_to_disk(str(tmp_path / "saved"))
    dataset = Dataset.load_from_disk(str(tmp_path / "saved"))
    before = sorted(tmp_path.rglob("*"))
    converted = to_prompts(dataset, drop_bad_rows=True)
    splits = split_by_prompt(converted, 0.5, seed=0)
    assert converted.to_list() == [{"prompt": "a", "score": 1}, {"prompt": "c", "score": 3}]
    assert (len(splits["train"]), len(splits["test"])) == (1, 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_tensor_formats_do_not_matter():
    dataset = rows(prompt=[[user("Hi")]], ids=[[1, 2]]).with_format("numpy")
    assert to_prompts(dataset).with_format(None).to_list() == [{"prompt": [user("Hi")], "ids": [1, 2]}]


# Splits


@given(st.lists(st.integers(0, 20), min_size=2, max_size=60), st.floats(0.05, 0.95), st.integers(0, 9))
def test_a_split_keeps_every_row_and_shares_no_prompt(numbers, test_size, seed):
    prompts = [f"prompt {number}" for number in numbers]
    dataset = rows(prompt=prompts, row=list(range(len(prompts))))
    if len(set(prompts)) == 1:
        with pytest.raises(ValueError, match="same prompt"):
            split_by_prompt(dataset, test_size, seed)
        return
    splits = split_by_prompt(dataset, test_size, seed)
    train, test = splits["train"], splits["test"]
    assert set(train["prompt"]).isdisjoint(test["prompt"])
    assert len(train) > 0
    assert len(test) > 0
    assert sorted([*train["row"], *test["row"]]) == list(range(len(prompts)))
    for split in (train, test):
        assert split["row"][:] == sorted(split["row"])
        assert split["prompt"][:] == [prompts[row] for row in split["row"]]


def test_the_share_is_met_on_average_and_the_seed_decides():
    dataset = rows(prompt=[f"prompt {number}" for number in range(4000)])
    tests = [set(split_by_prompt(dataset, 0.2, seed)["test"]["prompt"]) for seed in range(3)]
    for test in tests:
        assert abs(len(test) / 4000 - 0.2) < 4 * (0.2 * 0.8 / 4000) ** 0.5  # four standard deviations
    assert abs(len(tests[0] & tests[1]) / 4000 - 0.04) < 0.015, "two seeds split independently"
    assert set(split_by_prompt(dataset, 0.2, 0)["test"]["prompt"]) == tests[0]


def test_a_prompt_stays_on_its_side_in_every_stage_and_beside_any_rows():
    prompts = [[user(f"question {number}")] for number in range(60)]
    answers = [[assistant("yes")] for _ in prompts]
    preferences = to_preferences(rows(prompt=prompts, chosen=answers, rejected=[[assistant("no")]] * 60))
    messages = to_completions(rows(messages=[p + a for p, a in zip(prompts, answers, strict=True)]))
    held_out = {row["prompt"][0]["content"] for row in split_by_prompt(preferences, 0.3, 1)["test"]}
    assert {row["messages"][0]["content"] for row in split_by_prompt(messages, 0.3, 1)["test"]} == held_out
    fewer = split_by_prompt(to_prompts(preferences.select(range(40))), 0.3, 1)["test"]
    assert {p[0]["content"] for p in fewer["prompt"]} == held_out & {f"question {number}" for number in range(40)}


@pytest.mark.parametrize("test_size", [0.0, 1.0, -0.1, 20])
def test_a_test_size_out_of_range_is_an_error(test_size):
    with pytest.raises(ValueError, match="`test_size` must lie between 0 and 1"):
        split_by_prompt(rows(prompt=["a", "b"]), test_size, 0)


# Lengths


def test_prompt_lengths_are_checked_in_tokens(tiny_tokenizer):
    dataset = rows(prompt=["the film", "the film was very good", "a", "i liked this film very"])
    check_prompt_lengths(dataset, tiny_tokenizer, 5)
    with pytest.raises(ValueError, match=r"2 of 4 prompts .* row 1 has 5 tokens, and at most 4 .*Shorten"):
        check_prompt_lengths(dataset, tiny_tokenizer, 4)
    for left in (0, -3):
        with pytest.raises(ValueError, match=rf"leaves {left} tokens .*Lower `max_completion_length`"):
            check_prompt_lengths(dataset, tiny_tokenizer, left)


def test_chat_prompts_are_measured_with_their_template(tiny_tokenizer):
    dataset = rows(prompt=[[user("good")], [user("the film")]])
    # <user> the film <eos> <assistant>
    check_prompt_lengths(dataset, tiny_tokenizer, 5)
    with pytest.raises(ValueError, match="1 of 2 prompts .* row 1 has 5 tokens, and at most 4"):
        check_prompt_lengths(dataset, tiny_tokenizer, 4)


# Real data, against a few lines of brute force


@pytest.fixture(scope="module")
def pairs(shared_data):
    with gzip.open(shared_data / "hh_harmless" / "pairs.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def cut(dialogue):
    end = dialogue.rindex("\n\nAssistant:") + len("\n\nAssistant:")
    return dialogue[:end], dialogue[end:]


def test_real_preferences(pairs, shared_data, caplog):
    expected, mismatches, empty = [], 0, 0
    for pair in pairs:
        (prompt, chosen), (other, rejected) = cut(pair["chosen"]), cut(pair["rejected"])
        if prompt != other:
            mismatches += 1
        elif not chosen.strip() or not rejected.strip():
            empty += 1
        else:
            expected.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert (len(pairs), mismatches, empty, len(expected)) == (1812, 5, 3, 1804)

    loaded = load_rows(str(shared_data / "hh_harmless" / "pairs.jsonl.gz"))
    with pytest.raises(ValueError, match=r"8 of 1812 rows .* 3 x empty `chosen` \(first: row 224\)"):
        to_preferences(loaded)
    assert to_preferences(loaded, drop_bad_rows=True).to_list() == expected
    assert "5 x `chosen` and `rejected` answer two different prompts (first: row 447)" in caplog.text
    for row in expected:
        assert row["prompt"].endswith("\n\nAssistant:")
        assert row["chosen"].startswith(" ")


def test_real_prompts_and_completions(pairs, shared_data):
    loaded = load_rows(str(shared_data / "hh_harmless" / "pairs.jsonl.gz"))
    expected = [cut(pair["chosen"]) for pair in pairs]
    assert to_prompts(loaded)["prompt"][:] == [prompt for prompt, _ in expected]
    completions = to_completions(loaded, drop_bad_rows=True).to_list()
    assert completions == [{"prompt": p, "completion": c} for p, c in expected if c.strip()]
    assert len(completions) == 1809

    preferences = split_by_prompt(to_preferences(loaded, drop_bad_rows=True), 0.1, 0)
    prompts = split_by_prompt(to_prompts(loaded), 0.1, 0)
    assert set(preferences["test"]["prompt"]).isdisjoint(prompts["train"]["prompt"]), "no leak between stages"
    assert 0.07 < len(prompts["test"]) / 1812 < 0.13


@pytest.mark.parametrize(
    ("file", "count", "positive"),
    [("movie_reviews/reviews", 1600, 784), ("sentence_polarity/snippets", 8662, 4328)],
)
def test_real_reviews(shared_data, file, count, positive):
    loaded = load_rows(str(shared_data / f"{file}.jsonl.gz"))
    converted = to_prompts(loaded, prompt_words=8)
    assert (len(converted), sum(converted["label"])) == (count, positive)
    for text, prompt in zip(loaded["text"], converted["prompt"], strict=True):
        assert prompt.split() == text.split()[:8]
        assert text.strip().startswith(prompt)
    assert to_completions(loaded)["text"][:] == loaded["text"][:]


def test_equal_texts_with_different_tokens_are_a_pair():
    cut_off, finished = [5, 6], [5, 6, 1]
    row = {"prompt": "a", "chosen": " b", "rejected": " b", "chosen_ids": finished, "rejected_ids": cut_off}
    assert to_preferences(Dataset.from_list([row]))[0] == row
    with pytest.raises(ValueError, match="are the same"):
        to_preferences(Dataset.from_list([row | {"rejected_ids": finished}]))
