import json

import pytest

from rlhf_recipes.tools.labeling.items import check_items, read_items
from rlhf_recipes.tools.labeling.records import Item, fingerprint

PAIR = {"prompt": "Hi", "response_a": "Hello!", "response_b": "No."}
LIST = {"prompt": "Hi", "completions": ["a", "b", "c"]}


def test_every_form_of_two_answers_becomes_an_item():
    for first, second in (("chosen", "rejected"), ("completion_a", "completion_b"), ("response_1", "response_2")):
        [item] = check_items([{"prompt": "Hi", first: "Hello!", second: "No."}])
        assert item == Item({"prompt": "Hi", "completions": ["Hello!", "No."], "row": 0})
    said = "\n\nHuman: Hi\n\nAssistant:"
    [dialogue] = check_items([{"chosen": f"{said} Yes.", "rejected": f"{said} No."}])
    assert dialogue.row["prompt"] == said
    [chat] = check_items([{"prompt": [{"role": "user", "content": "Hi"}], "completions": ["Yes.", "No."]}])
    assert chat.row["completions"][1] == [{"role": "assistant", "content": "No."}]


def test_models_known_answers_and_other_columns_stay_with_their_row():
    rows = [PAIR, PAIR | {"model_a": "new", "model_b": "old", "gold": "second", "topic": {"b": 1}}]
    plain, named = check_items(rows)
    assert (plain.models, plain.gold) == (None, None)
    assert (named.models, named.gold) == (["new", "old"], [2, 1])
    assert named.row["topic"] == {"b": 1}
    assert not {"gold", "model_a", "label"} & named.row.keys()
    assert check_items([LIST | {"gold": [1, 3, 1], "models": ["x", "y", "z"]}])[0].gold == [1, 2, 1]
    for word, ranks in (("tie", [1, 1]), (1, [1, 2]), (0.0, [2, 1]), ([2, 1], [2, 1])):
        assert check_items([PAIR | {"gold": word}])[0].gold == ranks


def test_pairs_of_two_prompts_are_left_out_and_the_others_keep_their_own_columns(caplog):
    same = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}
    other = same | {"rejected": "\n\nHuman: Bye\n\nAssistant: No."}
    items = check_items([other | {"gold": "tie"}, same | {"gold": "second"}])
    assert [(item.gold, item.row["row"]) for item in items] == [([2, 1], 1)]
    assert "two different prompts" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PAIR | {"response_b": "Hello!"}, "`response_a` and `response_b` are the same"),
        (PAIR | {"response_b": " "}, "empty `response_b`"),
        (PAIR | {"prompt": ""}, "empty `prompt`"),
        (PAIR | {"response_b": 3}, "neither text nor a chat"),
        (PAIR | {"response_b": "\ud800"}, "half of a surrogate pair"),
        (PAIR | {"gold": 0.7}, "`gold` is no known answer"),
        (PAIR | {"gold": "left-ish"}, "`gold` is neither a number nor one of the words"),
        (PAIR | {"model_a": "new"}, "have a name that is no text"),
        (PAIR | {"model_a": "new", "model_b": ""}, "an empty one"),
        (LIST | {"completions": ["a"]}, "`completions` is not a list of 2 to 9 answers"),
        (LIST | {"completions": list("abcdefghij")}, "not a list of 2 to 9"),
        (LIST | {"completions": ["a", "b", "a"]}, "two of the `completions` are the same"),
        (LIST | {"gold": [1, 3, 3]}, "`gold` does not count from 1"),
        (LIST | {"gold": "first"}, "`gold` does not have one rank per completion"),
        (LIST | {"models": ["x", "y"]}, "do not name one model for each answer"),
    ],
)
def test_a_bad_row_is_refused_with_its_place(row, message):
    good = PAIR if "response_a" in row else LIST
    with pytest.raises(ValueError, match=message) as refused:
        check_items([good, row])
    assert "first: row 1" in str(refused.value)
    assert "drop_bad_rows" not in str(refused.value), "there is no such option here"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "Expected two completions in one of these pairs of columns"),
        ({"completions": ["a", "b"]}, "Expected the columns `prompt` and `completions`"),
        (PAIR | {"label": 1}, "`label` judges the answers already. Remove it, or rename it to `gold`"),
        (PAIR | {"note": "x"}, "`note` would stand beside a column that the export writes"),
        (PAIR | {"rating": 3}, "preferences of two kinds"),
    ],
)
def test_columns_that_an_export_could_not_hold_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        check_items([row])


def test_a_file_is_read_with_its_lines(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(["", json.dumps(PAIR), json.dumps(PAIR | {"prompt": " "})]))
    with pytest.raises(ValueError, match="row 1 in line 3"):
        read_items(str(path))
    path.write_text(json.dumps(PAIR))
    assert read_items(str(path))[0].row["source"] == str(path)


def test_a_fingerprint_changes_with_anything_but_the_file():
    items = check_items([PAIR, PAIR | {"prompt": "Bye"}])
    moved = [item._replace(row=item.row | {"source": "elsewhere.jsonl"}) for item in items]
    assert fingerprint(items) == fingerprint(moved)
    changed = [
        items[::-1],
        items[:1],
        [items[0], items[1]._replace(gold=[1, 2])],
        [items[0], items[1]._replace(models=["x", "y"])],
        [items[0], items[1]._replace(row=items[1].row | {"prompt": "Bye."})],
    ]
    assert len({fingerprint(items), *map(fingerprint, changed)}) == 6
