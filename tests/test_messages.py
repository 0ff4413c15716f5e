"""How a chat is written as text."""

from rlhf_recipes.messages import as_text


def test_messages_become_lines_and_other_values_their_text():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": []}, {"content": "x"}]
    assert as_text(messages) == "user: Hi\nassistant: \n?: x"
    assert [as_text(value) for value in ("a", 3, [], None, [1])] == ["a", "3", "", "", "[1]"]
