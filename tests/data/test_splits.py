"""Training and held-out rows of a stage."""

import json

import pytest
from datasets import Dataset
from PIL import Image

from rlhf_recipes.config import DataArguments
from rlhf_recipes.data import to_completions, to_preferences, to_prompts
from rlhf_recipes.data.formats import prompt_keys
from rlhf_recipes.data.splits import load_splits

ROWS = [
    {"prompt": f"p{number}", "completion": f"c{repeat}", "chosen": "good", "rejected": "bad"}
    for number in range(40)
    for repeat in range(2)
]


@pytest.fixture
def write(tmp_path):
    def write_rows(rows, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_rows


def test_a_share_of_the_prompts_is_held_out_with_all_of_their_rows(write):
    splits = load_splits(DataArguments(write(ROWS), test_size=0.25), to_completions)
    train, test = (set(splits[split]["prompt"]) for split in ("train", "test"))
    assert train.isdisjoint(test)
    assert train | test == {row["prompt"] for row in ROWS}
    assert len(splits["train"]) == 2 * len(train)
    assert 3 <= len(test) <= 17
    assert splits["train"].column_names == ["prompt", "completion"]


def test_every_stage_holds_out_the_same_prompts(write):
    arguments = DataArguments(write(ROWS), test_size=0.3)
    completions, pairs, prompts = (load_splits(arguments, f) for f in (to_completions, to_preferences, to_prompts))
    for split in ("train", "test"):
        assert set(completions[split]["prompt"]) == set(pairs[split]["prompt"]) == set(prompts[split]["prompt"])


def test_a_test_split_of_its_own_is_used_whole(write, tmp_path):
    write(ROWS[:6])
    write(ROWS[4:10], "test.jsonl")
    splits = load_splits(DataArguments(str(tmp_path), dataset_test_split="test"), to_completions)
    assert splits["train"]["prompt"][:] == [row["prompt"] for row in ROWS[:6]]
    assert splits["test"]["prompt"][:] == [row["prompt"] for row in ROWS[4:10]]


CHATS = [{"messages": [{"role": "user", "content": f"p{n}"}, {"role": "assistant", "content": "a"}]} for n in range(9)]
SHARED = {
    "sft": (to_completions, ROWS[:20], ROWS[16:24]),  # p8 and p9, twice each
    "reward": (to_preferences, ROWS[:20], ROWS[16:24]),
    "ppo": (to_prompts, ROWS[:20], ROWS[16:24]),
    "chats": (to_completions, CHATS[:6], CHATS[4:]),
    "conversations": (
        to_prompts,
        [{"conversations": [{"from": "human", "value": f"p{n}"}]} for n in range(6)],
        [{"conversations": [{"from": "human", "value": f"p{n}"}]} for n in range(4, 8)],
    ),
    "texts": (to_completions, [{"text": f"t{n}"} for n in range(6)], [{"text": f"t{n}"} for n in range(4, 8)]),
}


@pytest.mark.parametrize(("convert", "train", "test"), SHARED.values(), ids=SHARED)
def test_prompts_on_both_sides_are_counted_in_a_warning(write, tmp_path, caplog, convert, train, test):
    write(train)
    write(test, "test.jsonl")
    splits = load_splits(DataArguments(str(tmp_path), dataset_test_split="test"), convert)
    [warning] = [record.getMessage() for record in caplog.records]
    column = next(name for name in ("prompt", "messages", "text") if name in splits["test"].column_names)
    asked = len({json.dumps(value) for value in splits["test"][column]})
    assert warning.startswith(f"2 of {asked} prompts of the test split are also in the training split (first: row 0, ")
    assert "looks better than it is" in warning
    assert "unset `dataset_test_split`" in warning


@pytest.mark.parametrize(
    ("train", "test", "fields"),
    [
        (ROWS[:20], ROWS[20:30], {}),
        (ROWS[:20], ROWS[16:24], {"max_train_rows": 16}),  # only rows that are used count
        (ROWS[:20], ROWS[20:24] + ROWS[:2], {"max_test_rows": 4}),
        (ROWS[:1] * 2, ROWS[:1], {}),  # one prompt for all rows is a task
    ],
)
def test_prompts_on_one_side_are_no_reason_for_a_warning(write, tmp_path, caplog, train, test, fields):
    write(train)
    write(test, "test.jsonl")
    load_splits(DataArguments(str(tmp_path), dataset_test_split="test", **fields), to_completions)
    load_splits(DataArguments(write(ROWS, "whole.jsonl")), to_completions)
    assert not caplog.records


def test_prompts_that_differ_in_what_follows_are_the_same(write, tmp_path, caplog):
    write([{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "b"}])
    write([{"prompt": "p", "chosen": "c", "rejected": "d"}], "test.jsonl")
    load_splits(DataArguments(str(tmp_path), dataset_test_split="test"), to_preferences)
    assert "1 of 1 prompts of the test split" in caplog.text


def test_splits_have_names(write, tmp_path):
    write(ROWS[:6], "good.jsonl")
    write(ROWS[6:8], "held_out.jsonl")
    arguments = DataArguments(str(tmp_path), dataset_train_split="good", dataset_test_split="held_out")
    splits = load_splits(arguments, to_completions)
    assert (len(splits["train"]), len(splits["test"])) == (6, 2)


def test_limits_take_the_first_rows(write):
    path = write(ROWS)
    whole = load_splits(DataArguments(path), to_completions)
    few = load_splits(DataArguments(path, max_train_rows=3, max_test_rows=1), to_completions)
    assert few["train"][:] == whole["train"][:3]
    assert few["test"][:] == whole["test"][:1]
    many = load_splits(DataArguments(path, max_train_rows=10**6, max_test_rows=10**6), to_completions)
    assert many["train"][:] == whole["train"][:]


def test_bad_rows_are_refused_or_dropped(write):
    path = write([*ROWS, {**ROWS[0], "completion": ""}])
    with pytest.raises(ValueError, match="drop_bad_rows: true"):
        load_splits(DataArguments(path), to_completions)
    splits = load_splits(DataArguments(path, drop_bad_rows=True), to_completions)
    assert len(splits["train"]) + len(splits["test"]) == len(ROWS)


def test_a_stage_without_a_dataset_says_so():
    with pytest.raises(ValueError, match="Set `dataset_name`"):
        load_splits(DataArguments(), to_completions)


def test_instructions_become_chats_where_there_is_a_chat_template(write):
    rows = [{"prompt": f"p{number}", "response": "yes", "helpfulness": 4} for number in range(4)]
    data_args = DataArguments(write(rows), dataset_test_split="train")
    chats, texts = (load_splits(data_args, to_prompts, *template)["test"] for template in [("{{ x }}",), ()])
    assert texts["prompt"][:] == ["p0", "p1", "p2", "p3"]
    assert chats["prompt"][:] == [[{"role": "user", "content": text}] for text in texts["prompt"]]


def test_one_question_about_unlike_pictures_makes_unlike_prompts():
    question = {"prompt": ["which colour ?"] * 3}
    paths = Dataset.from_dict({**question, "images": [["a.png"], ["b.png"], ["a.png"]]})
    first, second, third = prompt_keys(paths)
    assert first == third != second
    drawn = [[Image.new("RGB", (2, 2), colour)] for colour in ("red", "blue", "red")]
    first, second, third = prompt_keys(Dataset.from_list([{"prompt": "?", "images": each} for each in drawn]))
    assert first == third != second
