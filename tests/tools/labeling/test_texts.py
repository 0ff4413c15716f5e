import unicodedata
from html import unescape

from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.tools.labeling.texts import turns, visible_parts

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def test_what_would_hide_is_named():
    assert list(visible_parts("a\u202eb\x00c")) == [
        ("a", ""),
        ("U+202E", "RIGHT-TO-LEFT OVERRIDE"),
        ("b", ""),
        ("U+0000", "control character"),
        ("c", ""),
    ]
    for character in BIDI + "\x1b\x7f\x85\u00ad\u200b\u2028\ufeff\U000e0041":
        [(code, name)] = visible_parts(character)
        assert code == f"U+{ord(character):04X}"
        assert name


def test_lines_tabs_emoji_and_scripts_stay_as_they_are():
    for text in (
        "one\n\ttwo",
        "\U0001f469\u200d\U0001f52c \u2764\ufe0f",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "e\u0301",
    ):
        assert list(visible_parts(text)) == [(text, "")]
    assert list(visible_parts("one\r\ntwo")) == [("one\ntwo", "")]
    assert ("U+000D", "control character") in list(visible_parts("one\rtwo"))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_no_text_is_lost_and_none_of_what_is_left_hides(text):
    parts = list(visible_parts(text))
    back = "".join(chr(int(part[2:], 16)) if name else part for part, name in parts)
    assert back == text.replace("\r\n", "\n")
    seen = "".join(part for part, name in parts if not name)
    assert not any(unicodedata.bidirectional(one) in ("RLO", "LRO", "RLE", "LRE", "PDF", "RLI", "LRI") for one in seen)
    assert {one for one in seen if unicodedata.category(one) == "Cc"} <= {"\n", "\t"}


def test_chats_become_turns():
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert turns(chat) == [("system", "Be kind."), ("user", "Hi")]
    assert turns("Hi") == [("", "Hi")]
    [(role, text)] = turns([{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}])
    assert (role, text) == ("assistant", '[{"function": {"name": "add"}}]')
    assert unescape(text) == text
