"""Chats in ShareGPT's form, and chats that were written as text."""

import json

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_recipes.data import to_completions, to_preferences, to_prompts
from rlhf_recipes.data.dialogues import BadRow, check_kind
from rlhf_recipes.data.preferences import from_sharegpt, to_preference_table

NAMES = {"user": ["human", "user", "Human"], "assistant": ["gpt", "assistant", "chatgpt", "GPT"], "system": ["system"]}
SYSTEM, HI, HELLO, NO = (
    {"role": role, "content": text}
    for role, text in [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"), ("assistant", "No.")]
)


def turn(message, name=None):
    return {"from": name or NAMES[message["role"]][0], "value": message["content"]}


def row(**columns):
    return Dataset.from_list([columns])


SIDES = {"chosen": turn(HELLO), "rejected": turn(NO)}
PAIRS = {
    "one turn": {"conversations": [turn(HI)]} | SIDES,
    "lists": {"conversations": [turn(HI)], "chosen": [turn(HELLO)], "rejected": [turn(NO)]},
    "text": {"conversations": [turn(HI)], "chosen": "Hello!", "rejected": "No."},
    "the whole chat again": {
        "conversations": [turn(HI)],
        "chosen": [turn(HI), turn(HELLO)],
        "rejected": [turn(HI), turn(NO)],
    },
    "no conversations": {"chosen": [turn(HI), turn(HELLO)], "rejected": [turn(HI), turn(NO)]},
    "a prompt of turns": {"prompt": [turn(HI)]} | SIDES,
    "a prompt in text": {"prompt": "Hi", "chosen": turn(HELLO), "rejected": turn(NO)},
    "a prompt that repeats it": {"prompt": "Hi", "conversations": [turn(HI)]} | SIDES,
    "the chosen answer in it": {"conversations": [turn(HI), turn(HELLO)]} | SIDES,
    "user and assistant": {
        "conversations": [turn(HI, "user")],
        "chosen": turn(HELLO, "assistant"),
        "rejected": turn(NO, "assistant"),
    },
    "role and content": {"conversations": [HI], "chosen": HELLO, "rejected": NO},
    "role human": {"conversations": [HI | {"role": "human"}], "chosen": HELLO | {"role": "gpt"}, "rejected": NO},
    "other columns": {"conversations": [turn(HI)], "id": "7", "weight": 2.0} | SIDES,
}


@pytest.mark.parametrize("columns", PAIRS.values(), ids=PAIRS)
def test_pairs_of_turns_are_pairs_of_chats_in_every_stage(columns):
    found = to_preferences(row(**columns))[0]
    expected = {"prompt": [HI], "chosen": [HELLO], "rejected": [NO]}
    assert {name: found[name] for name in expected} == expected
    assert found.keys() - expected.keys() == columns.keys() & {"id", "weight"}
    completion = to_completions(row(**columns))[0]
    assert (completion["prompt"], completion["completion"]) == ([HI], [HELLO])
    assert to_prompts(row(**columns))[0]["prompt"] == [HI]
    [table] = to_preference_table(row(**columns)).to_list()
    assert (table["prompt"], table["completions"], table["label"]) == ([HI], [[HELLO], [NO]], 1.0)


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"conversations": [turn(SYSTEM), turn(HI)]}, [SYSTEM, HI]),
        ({"conversations": [turn(HI)], "system": "Be kind."}, [SYSTEM, HI]),
        ({"conversations": [turn(HI)], "system": None}, [HI]),
        ({"conversations": [turn(HI)], "system": " "}, [HI]),
        ({"conversations": [turn(SYSTEM), turn(HI)], "system": "Be rude."}, [SYSTEM, HI]),
    ],
)
def test_what_the_system_says_comes_first_and_once(columns, prompt):
    assert to_preferences(row(**columns, **SIDES))[0]["prompt"] == prompt
    assert from_sharegpt([columns | SIDES])[0]["prompt"] == prompt


def test_conversations_alone_are_chats_for_sft_and_prompts_for_ppo():
    turns = row(conversations=[turn(message) for message in (HI, HELLO, HI, NO)])
    assert to_completions(turns)[:] == {"messages": [[HI, HELLO, HI, NO]]}
    assert to_prompts(turns)[:] == {"prompt": [[HI, HELLO, HI]]}
    assert to_prompts(row(conversations=[turn(HI)]))[:] == {"prompt": [[HI]]}
    with pytest.raises(ValueError, match="empty `last assistant message` .first: row 0"):
        to_completions(row(conversations=[turn(HI)]))


def test_conversations_beside_messages_are_another_column():
    beside = row(messages=[HI, HELLO], conversations=[{"note": "not a turn"}])
    assert to_prompts(beside)[0] == {"prompt": [HI], "conversations": [{"note": "not a turn"}]}


CHATS = st.lists(st.text("ab \n", min_size=1).filter(str.strip), min_size=1, max_size=3).map(
    lambda texts: (
        [HI | {"content": texts[0]}]
        + [
            message
            for text in texts[1:]
            for message in ({"role": "assistant", "content": text}, {"role": "user", "content": text})
        ]
    )
)


@settings(deadline=None, max_examples=60)
@given(st.booleans(), CHATS, st.data())
def test_any_chat_comes_back_from_any_names_and_forms(has_system, chat, data):
    def say(message):
        return turn(message, data.draw(st.sampled_from(NAMES[message["role"]])))

    prompt = [SYSTEM] * has_system + chat
    forms = st.sampled_from([say, lambda m: [say(m)], lambda m: [*map(say, prompt), say(m)]])
    columns = {"conversations": list(map(say, prompt)), "chosen": data.draw(forms)(HELLO)}
    columns["rejected"] = data.draw(forms)(NO)
    [table] = from_sharegpt([columns]).to_list()
    assert (table["prompt"], table["completions"]) == (prompt, [[HELLO], [NO]])


BAD = [
    ({"conversations": [turn(HI, "narrator")]} | SIDES, "`conversations` has a turn whose `from` is none of human"),
    ({"conversations": [turn(HI)]} | SIDES | {"chosen": turn(HELLO, "bot")}, "`chosen` has a turn whose `from`"),
    ({"conversations": [{"from": "human", "value": None}]} | SIDES, "`conversations` has a turn whose `value` is no"),
    ({"conversations": []} | SIDES, "`conversations` is not a list of turns with `from` and `value`, or is empty"),
    ({"conversations": None} | SIDES, "`conversations` is not a list of turns"),
    ({"conversations": "Hi"} | SIDES, "`conversations` is not a list of turns"),
    ({"conversations": [turn(HI), turn(HELLO | {"content": "Hm."})]} | SIDES, "ends with an answer of its own"),
    ({"conversations": [turn(HI)]} | SIDES | {"rejected": None}, "empty `rejected`"),
    ({"conversations": [turn(HI)]} | SIDES | {"rejected": turn(HELLO)}, "`chosen` and `rejected` are the same"),
    ({"conversations": [turn(HI)]} | SIDES | {"chosen": turn(HELLO | {"content": " "})}, "empty `chosen`"),
]


@pytest.mark.parametrize(("columns", "reason"), BAD)
def test_bad_turns_are_refused_with_the_row(columns, reason):
    good = PAIRS["one turn"]
    with pytest.raises(ValueError, match=r"\(first: row 1\)") as caught:
        from_sharegpt([good, columns])
    assert reason in str(caught.value)
    with pytest.raises(ValueError, match="No row is left"):
        to_preferences(Dataset.from_list([columns]))


WRITTEN = {
    "json": json.dumps,
    "python": str,
    "indented": lambda chat: json.dumps(chat, indent=2),
    "numpy": lambda chat: str(np.array(chat, dtype=object)),
    "numpy's repr": lambda chat: repr(np.array(chat, dtype=object)),
    "one message": lambda chat: json.dumps(chat[0]),
}


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("chat", [[HI, HELLO], [turn(HI), turn(HELLO)]], ids=["messages", "turns"])
def test_a_chat_that_was_written_as_text_is_refused_with_the_fix(write, chat):
    text = write(chat)
    for columns in ({"chosen": text, "rejected": "No."}, {"prompt": "Hi", "chosen": "Hello!", "rejected": text}):
        side = next(name for name, value in columns.items() if value == text)
        for read in (to_preferences, to_preference_table):
            with pytest.raises(ValueError, match=f"`{side}` is a chat that was written as text.*json.loads.*row 0"):
                read(Dataset.from_list([columns]))
    with pytest.raises(ValueError, match="`completions` is a chat that was written as text"):
        to_preference_table([{"prompt": "Hi", "completions": [text, "No."], "best": 0}])
    with pytest.raises(ValueError, match="`prompt` is a chat that was written as text"):
        to_prompts(row(prompt=text))


@pytest.mark.parametrize(
    "text",
    [
        '{"answer": 4}',
        '[{"name": "role", "content": "x"}]',
        "[1, 2]",
        "The role and the content",
        'say [{"role": "user", "content": "Hi"}]',
        "{'from': 'here'}",
        "",
    ],
)
def test_other_text_is_text(text):
    check_kind(text, "chosen")


def test_a_text_to_train_on_may_be_anything():
    check_kind(json.dumps([HI]), "text")
    with pytest.raises(BadRow, match="written as text"):
        check_kind(json.dumps([HI]), "completion")


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
NULL = {"role": "user", "content": None}
CHATS = {
    "prompt": (to_prompts, {}),
    "messages": (to_completions, {}),
    "completion": (to_completions, {"completion": [HELLO]}),
    "pair": (to_preferences, {"chosen": [HELLO], "rejected": [NO]}),
    "table": (to_preference_table, {"completions": [[HELLO], [NO]], "ranks": [1, 2]}),
    "helpsteer3": (to_preference_table, {"response1": "a", "response2": "b", "overall_preference": 1}),
}


def chats(kind, *prompts, **columns):
    name = {"helpsteer3": "context", "messages": "messages"}.get(kind, "prompt")
    ends = [HELLO] if kind == "messages" else []
    return Dataset.from_list([{name: [*prompt, *ends]} | CHATS[kind][1] | columns for prompt in prompts])


@pytest.mark.parametrize("kind", CHATS)
def test_a_message_without_content_is_refused_with_its_row(kind):
    reader, _ = CHATS[kind]
    rows = chats(kind, [HI], [SYSTEM, NULL], [HI, HELLO, HI])
    with pytest.raises(ValueError, match=r"has a message whose `content` is null. Give its text.* \(first: row 1\)"):
        reader(rows)
    assert len(reader(rows, drop_bad_rows=True)) == 2
    assert len(reader(chats(kind, [HI, CALL, HI]))) == 1, "a call of a tool needs no text"


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("blank", ["", " \n"])
def test_blank_tools_are_no_tools(kind, blank):
    reader, _ = CHATS[kind]
    rows = chats(kind, [HI], [HI, HELLO, HI], tools=blank)
    assert reader(rows)["tools"][:] == [None, None]
    for tools in ('[{"name": "look"}]', "null", None, [{"name": "look"}]):
        assert reader(chats(kind, [HI], tools=tools))["tools"][0] in (tools, None)


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("tools", ["look", "{", '{"name": "look"}', "1"])
def test_tools_that_are_no_json_list_are_refused_with_their_row(kind, tools):
    reader, _ = CHATS[kind]
    rows = chats(kind, [HI], [HI])
    rows = rows.add_column("tools", [None, tools])
    with pytest.raises(ValueError, match=r"`tools` is text, but not the JSON of a list.* \(first: row 1\)"):
        reader(rows)
    assert reader(rows, drop_bad_rows=True)["tools"][:] == [None]


def test_tools_beside_plain_text_are_any_column():
    rows = row(prompt="Hi", completion=" Hello!", tools="hammer")
    assert to_completions(rows)["tools"][:] == ["hammer"]
