"""Chats as token ids, with every kind of template: a reward is trained and read where PPO's completions stop."""

import logging
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import GenerationConfig

from rlhf_recipes.data.chat_templates import (
    check_completions,
    check_prompt_format,
    check_prompts_stay_open,
    encode_answer,
    encode_sampled,
    end_token_ids,
    with_first_space,
)
from rlhf_recipes.models.tiny import bpe_tokenizer, word_tokenizer
from rlhf_recipes.reward_modeling.preparation import with_chat_ids
from rlhf_recipes.rewards.encoding import encode

MARKS = "<bos> <start> <turn> <nl> <sys> <user> <assistant> <think> </think> <inst> </inst>".split()
WORDS = "you are kind hi there how do fine thanks why not a b c assistant user".split()

OPEN = "{% if add_generation_prompt %}"
EACH = "{% for m in messages %}"
# name: template, the token that closes an answer (None: the template writes none), what its generation prompt adds
TEMPLATES = {
    "chatml": (
        EACH + "{{ '<start> ' + m.role + ' <nl> ' + m.content + ' <eos> <nl> ' }}{% endfor %}"
        + OPEN + "{{ '<start> assistant <nl> ' }}{% endif %}",
        "<eos>", "",
    ),
    "llama3": (
        "{{ '<bos> ' }}" + EACH + "{{ '<start> ' + m.role + ' <nl> <nl> ' + m.content | trim + ' <eos>' }}{% endfor %}"
        + OPEN + "{{ '<start> assistant <nl> <nl> ' }}{% endif %}",
        "<eos>", "",
    ),
    "gemma": (
        "{{ '<bos> ' }}" + EACH + "{{ '<start> ' + ('c' if m.role == 'assistant' else m.role) + ' <nl> ' }}"
        "{{ m.content | trim + ' <turn> <nl> ' }}{% endfor %}" + OPEN + "{{ '<start> c <nl> ' }}{% endif %}",
        "<turn>", "",
    ),
    "phi3": (
        EACH + "{{ '<' + m.role + '> <nl> ' + m.content + ' <turn> <nl> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant> <nl> ' }}{% else %}{{ '<eos>' }}{% endif %}",
        "<turn>", "",
    ),
    "mistral": (
        "{{ '<bos> ' }}" + EACH + "{% if m.role == 'user' %}{{ '<inst> ' + m.content + ' </inst> ' }}"
        "{% else %}{{ m.content + ' <eos> ' }}{% endif %}{% endfor %}",
        "<eos>", "",
    ),
    "thinking": (  # the generation prompt opens a thought that a given answer does not have
        EACH + "{{ '<' + m.role + '> ' + m.content + ' <eos> ' }}{% endfor %}"
        + OPEN + "{{ '<assistant> <think> ' }}{% endif %}",
        "<eos>", "<think> ",
    ),
    "empty_thought": (  # written before the last answer, and not in the generation prompt
        EACH + "{{ '<' + m.role + '> ' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think> </think> ' }}{% endif %}"
        "{{ m.content + ' <eos> ' }}{% endfor %}" + OPEN + "{{ '<assistant> ' }}{% endif %}",
        "<eos>", "",
    ),
    "between_turns": (
        EACH + "{{ '<' + m.role + '> ' + m.content + ' ' }}"
        "{% if m.role == 'assistant' and not loop.last %}{{ '<eos> ' }}{% endif %}{% endfor %}"
        + OPEN + "{{ '<assistant> ' }}{% endif %}",
        None, "",
    ),
    "no_end": (
        EACH + "{{ '<' + m.role + '> ' + m.content + ' <nl> ' }}{% endfor %}"
        + OPEN + "{{ '<assistant> ' }}{% endif %}",
        None, "",
    ),
    "bare": (EACH + "{{ m.content + ' ' }}{% endfor %}", None, ""),
    "two_ends": (
        EACH + "{{ '<' + m.role + '> ' + m.content + ' <turn> <eos> ' }}{% endfor %}"
        + OPEN + "{{ '<assistant> ' }}{% endif %}",
        "<turn>", "",
    ),
}  # fmt: skip

ANSWERS = ["fine", "fine thanks", "a", "assistant", "c b a b", "user"]


def chat(*contents, start="user"):
    roles = ("user", "assistant") if start == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def answer(content):
    return [{"role": "assistant", "content": content}]


PROMPTS = [chat("hi"), chat("hi there", "fine", "why not"), chat("a", "b", "c", "user assistant", "how do you do")]


def tokenizer_of(name):
    tokenizer = word_tokenizer([*MARKS, *WORDS])
    tokenizer.chat_template = TEMPLATES[name][0]
    return tokenizer


def ends_of(tokenizer):
    return tokenizer.convert_tokens_to_ids([tokenizer.eos_token, "<turn>"])


def tokens(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
@pytest.mark.parametrize("content", ANSWERS)
def test_an_answer_follows_the_prompt_that_ppo_gives_and_stops_where_its_completions_do(name, prompt, content):
    tokenizer = tokenizer_of(name)
    _, close, added = TEMPLATES[name]
    found = encode_answer(tokenizer, prompt, answer(content), ends_of(tokenizer))
    sampled_from = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert found.prompt_ids == sampled_from
    thought = ["<think>", "</think>"] if name == "empty_thought" else []
    assert tokens(tokenizer, found.ids) == [*thought, *content.split(), close or "<eos>"]
    assert (found.closed, found.added) == (close is not None, added)
    cut = encode_answer(tokenizer, prompt, answer(content), ends_of(tokenizer), finished=False)
    assert (cut.prompt_ids, cut.ids) == (found.prompt_ids, found.ids[:-1])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_reward_model_is_trained_and_read_on_the_same_ids(name):
    """The rows of the reward stage, those of pairs and of groups, and what a reward model of its own reads."""
    tokenizer = tokenizer_of(name)
    ends = ends_of(tokenizer)
    pairs = Dataset.from_list(
        [{"prompt": prompt, "chosen": answer("fine thanks"), "rejected": answer("why")} for prompt in PROMPTS]
    )
    groups = Dataset.from_list([{"prompt": prompt, "completions": [answer(a) for a in ANSWERS]} for prompt in PROMPTS])
    whole = Dataset.from_list(
        [{"chosen": prompt + answer("a"), "rejected": prompt + answer("b")} for prompt in PROMPTS]
    )
    pairs, groups, whole = (with_chat_ids(rows, tokenizer, ends, "train") for rows in (pairs, groups, whole))
    for row, prompt in enumerate(PROMPTS):

        def read(content, prompt=prompt):
            return encode(tokenizer, prompt, answer(content), encoder=False, end_ids=ends)[0]

        assert pairs[row]["chosen_ids"] == read("fine thanks")
        assert pairs[row]["rejected_ids"] == read("why")
        assert groups[row]["completion_ids"] == [read(content) for content in ANSWERS]
        assert (whole[row]["chosen_ids"], whole[row]["rejected_ids"]) == (read("a"), read("b"))
        assert len({tuple(read(content)) for content in ANSWERS}) == len(ANSWERS)


def test_streamed_pairs_are_encoded_as_those_in_memory():
    tokenizer = tokenizer_of("gemma")
    rows = [{"prompt": prompt, "chosen": answer("fine"), "rejected": answer("why")} for prompt in PROMPTS]
    dataset = Dataset.from_list(rows)
    expected = with_chat_ids(dataset, tokenizer, ends_of(tokenizer), "train")
    streamed = list(with_chat_ids(dataset.to_iterable_dataset(), tokenizer, ends_of(tokenizer), "train"))
    assert [row["chosen_ids"] for row in streamed] == expected["chosen_ids"][:]


def test_token_ids_that_rows_bring_stay():
    tokenizer = tokenizer_of("chatml")
    given = {"prompt": PROMPTS[0], "completions": [answer("a"), answer("b")], "completion_ids": [[5], [6, 7]]}
    made = {"prompt": PROMPTS[0], "completions": [answer("a"), answer("b")], "completion_ids": None}
    rows = with_chat_ids(Dataset.from_list([given, made]), tokenizer, [0], "train")
    assert rows[0]["completion_ids"] == [[5], [6, 7]]
    assert len(rows[1]["completion_ids"]) == 2


def test_tokens_that_would_merge_across_the_boundary():
    """A byte-level tokenizer that has learned the end of the prompt and the start of the answer as one token."""
    texts = ["user: hi\nassistant: fine\n"] * 40
    tokenizer = bpe_tokenizer(texts, vocab_size=300)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + ' ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' + ' ' }}{% endif %}"
    )
    prompt = chat("hi")
    found = encode_answer(tokenizer, prompt, answer("fine"), [tokenizer.eos_token_id])
    sampled_from = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(prompt + answer("fine"), return_dict=False)
    assert whole[: len(sampled_from)] != sampled_from  # they do merge
    assert found.prompt_ids == sampled_from
    assert tokenizer.decode(found.ids) == f"fine{tokenizer.eos_token}"


def test_the_last_of_several_messages_ends_the_answer():
    tokenizer = tokenizer_of("chatml")
    several = [*answer("a"), {"role": "user", "content": "b"}, *answer("c")]
    found = encode_answer(tokenizer, PROMPTS[0], several, ends_of(tokenizer))
    assert " ".join(tokens(tokenizer, found.ids)) == (
        "a <eos> <nl> <start> user <nl> b <eos> <nl> <start> assistant <nl> c <eos>"
    )


def test_an_end_token_within_an_answer_does_not_end_it():
    tokenizer = tokenizer_of("two_ends")
    found = encode_answer(tokenizer, PROMPTS[0], answer("a <eos> b <turn> c"), ends_of(tokenizer))
    assert " ".join(tokens(tokenizer, found.ids)) == "a <eos> b <turn> c <turn>"


def test_empty_answers_and_answers_without_a_prompt():
    tokenizer = tokenizer_of("gemma")
    assert tokens(tokenizer, encode_answer(tokenizer, PROMPTS[0], answer(""), ends_of(tokenizer)).ids) == ["<turn>"]
    found = encode_answer(tokenizer, [], answer("a"), ends_of(tokenizer))
    assert found.prompt_ids == []
    assert " ".join(tokens(tokenizer, found.ids)) == "<bos> <start> c <nl> a <turn>"


def test_options_of_rows_reach_the_template():
    tokenizer = word_tokenizer([*MARKS, *WORDS])
    tokenizer.chat_template = (
        "{% if tools %}{{ tools[0]['name'] + ' ' }}{% endif %}{% for m in messages %}{{ m.content + ' <eos> ' }}"
        "{% endfor %}{% if quiet %}{{ 'b ' }}{% endif %}"
    )
    tools = [{"type": "function", "name": "kind"}]
    row = {"prompt": PROMPTS[0], "chosen": answer("fine"), "rejected": answer("why")}
    rows = Dataset.from_list([row | {"tools": '[{"name": "kind"}]', "chat_template_kwargs": {"quiet": False}}])
    first = with_chat_ids(rows, tokenizer, [], "train")[0]["chosen_ids"]
    assert tokens(tokenizer, first)[0] == "kind"
    assert encode_answer(tokenizer, PROMPTS[0], answer("fine"), [], tools=tools).prompt_ids[:1] == first[:1]


def test_chats_that_cannot_be_encoded_are_named():
    tokenizer = word_tokenizer(WORDS)
    with pytest.raises(ValueError, match="no chat template"):
        encode_answer(tokenizer, PROMPTS[0], answer("a"), [])
    tokenizer.chat_template = "{{ raise_exception('turns must alternate') }}"
    with pytest.raises(ValueError, match="refuses a chat with the roles user, assistant: turns must alternate"):
        encode_answer(tokenizer, PROMPTS[0], answer("a"), [])
    tokenizer.chat_template = "{{ messages | length }}"
    rows = Dataset.from_list([{"prompt": PROMPTS[0], "chosen": answer("a"), "rejected": answer("b")}])
    with pytest.raises(ValueError, match="where the answer begins cannot be seen"):
        with_chat_ids(rows, tokenizer, [], "train")


def model_with(ends):
    return SimpleNamespace(generation_config=GenerationConfig(eos_token_id=list(ends)))


def metaspace(template, prepend="always"):
    """A tokenizer that writes the space before a word into its token, as SentencePiece does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<eos>", "<unk>", *MARKS, "\u2581", "\n", ":", *"abcdefghijklmnopqrstuvwxyzASINT"]
    pieces += [f"\u2581{word}" for word in WORDS if len(word) > 1]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(dict.fromkeys(pieces))}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    tokenizer.add_special_tokens(["<pad>", "<eos>", *MARKS])
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


ZEPHYR = (
    "{% for m in messages %}{{ '<' + m.role + '>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content }}"
    "{% else %}{{ ' ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
BREAK = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\\n' + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.mark.parametrize("template", [ZEPHYR, VICUNA, BREAK, *(TEMPLATES[name][0] for name in TEMPLATES)])
@pytest.mark.parametrize("make", [metaspace, lambda template: metaspace(template, "never")], ids=["always", "never"])
def test_what_a_policy_sampled_is_read_as_the_very_tokens(template, make):
    """Whatever the template writes before an answer, the policy samples it too, and it is not written once more."""
    tokenizer = make(template)
    ends = tokenizer.convert_tokens_to_ids(["<eos>", "<turn>"])
    for prompt in PROMPTS:
        row = encode_answer(tokenizer, prompt, answer("fine thanks"), ends)
        sampled = row.ids[:-1]
        text = tokenizer.decode(sampled, skip_special_tokens=True)
        if text != tokenizer.decode(sampled):
            continue  # special tokens are lost by decoding
        before, after = encode_sampled(tokenizer, prompt, text, ends)
        assert before == row.prompt_ids
        assert after == row.ids
        assert encode_sampled(tokenizer, prompt, text, ends, finished=False)[1] == sampled


@pytest.mark.parametrize("name", ["no_end", "thinking", "between_turns", "bare"])
@pytest.mark.parametrize("prepend", ["always", "never", "first"])
def test_an_answer_has_the_tokens_that_it_has_behind_its_prompt(name, prepend):
    tokenizer = metaspace(TEMPLATES[name][0], prepend)
    for prompt in PROMPTS:
        found = encode_answer(tokenizer, prompt, answer("fine thanks"), [tokenizer.eos_token_id])
        before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        both = tokenizer(before + "fine thanks", add_special_tokens=False)["input_ids"]
        assert (found.prompt_ids + found.ids)[: len(both)] == both  # what a template writes behind it may follow
        assert found.ids[-1] == tokenizer.eos_token_id


def test_a_cut_off_answer_ends_with_its_content():
    tokenizer = metaspace(BREAK)
    found = encode_answer(tokenizer, PROMPTS[0], answer("fine"), [tokenizer.eos_token_id], finished=False)
    assert tokenizer.decode(found.ids) == "fine"


def test_the_space_before_the_first_word_of_a_text_comes_back():
    tokenizer = metaspace(None)
    ids = tokenizer("hi fine")["input_ids"]
    first = tokenizer.convert_tokens_to_ids("\u2581fine")
    word = [first] if first in ids else ids[ids.index(tokenizer.convert_tokens_to_ids("\u2581"), 1) :]
    text = tokenizer.decode(word)
    assert not text.startswith(" ")
    assert with_first_space(tokenizer, "hi", text, word) == f" {text}"
    assert with_first_space(tokenizer, "hi ", text, word) == text
    assert with_first_space(tokenizer, PROMPTS[0], answer("a"), word) == answer("a")
    plain = word_tokenizer(WORDS)
    assert with_first_space(plain, "hi", "fine", plain("fine")["input_ids"]) == "fine"


def test_the_reward_stage_warns_of_what_a_template_writes_before_answers(caplog):
    tokenizer = tokenizer_of("empty_thought")
    rows = Dataset.from_list([{"prompt": PROMPTS[0], "chosen": answer("fine"), "rejected": answer("why")}])
    said = lines(caplog, lambda: with_chat_ids(rows, tokenizer, ends_of(tokenizer), "train"))
    assert len(said) == 1
    assert "writes '<think> </think> ' before a given answer, which its generation prompt does not open" in said[0]
    for name in ("chatml", "llama3", "gemma", "phi3", "mistral"):
        tokenizer = tokenizer_of(name)
        assert lines(caplog, lambda t=tokenizer: with_chat_ids(rows, t, ends_of(t), "train")) == []


def lines(caplog, action):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "rlhf_recipes"):
        action()
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("known", [True, False], ids=["ends_known", "eos_only"])
def test_stages_warn_of_templates_that_do_not_end_or_open_more(caplog, name, known):
    """Of no end, where none of the end tokens closes an answer; of a thought that rows do not have, in SFT."""
    tokenizer = tokenizer_of(name)
    ends = ends_of(tokenizer)[: 2 if known else 1]
    _, close, added = TEMPLATES[name]
    closed = close == "<eos>" or (close == "<turn>" and known) or name in ("two_ends", "phi3")
    rows = [{"prompt": prompt, "completion": answer("fine")} for prompt in PROMPTS]
    messages = [{"messages": prompt + answer("fine")} for prompt in PROMPTS]
    for given in (rows, messages):
        said = lines(caplog, lambda given=given: check_completions(Dataset.from_list(given), tokenizer, ends))
        assert [("no end token" in line, "generation prompt adds" in line) for line in said] == [
            *[(True, False)] * (not closed),
            *[(False, True)] * bool(added),
        ]
        if name == "gemma" and not closed:
            assert (
                f"'<turn>' is what ends an answer, add its id {tokenizer.convert_tokens_to_ids('<turn>')}" in said[0]
            )
    said = lines(caplog, lambda: check_prompt_format(rows, tokenizer, model_with(ends)))
    assert [("no end token (<eos>" in line) for line in said] == [True] * (not closed)


def ends_every_text(tokenizer):
    from tokenizers import processors

    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    post = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    tokenizer.backend_tokenizer.post_processor = post
    return tokenizer


def test_a_tokenizer_that_ends_prompts_is_refused_for_texts_in_every_stage():
    tokenizer = ends_every_text(tokenizer_of("chatml"))
    check_prompts_stay_open(tokenizer_of("chatml"))
    texts = {"prompt": ["hi"], "completion": ["fine"], "chosen": ["fine"], "rejected": ["why"], "text": ["hi there"]}
    for columns in (["prompt", "completion"], ["text"]):
        rows = Dataset.from_dict({column: texts[column] for column in columns})
        with pytest.raises(ValueError, match="The tokenizer puts its end token '<eos>' behind every text"):
            check_completions(rows, tokenizer, [1])
    with pytest.raises(ValueError, match="behind every text"):
        check_prompt_format([{"prompt": "hi"}], tokenizer, model_with([1]))
    with pytest.raises(ValueError, match="behind every text"):
        with_chat_ids(
            Dataset.from_dict({n: texts[n] for n in ("prompt", "chosen", "rejected")}), tokenizer, [1], "train"
        )
    check_prompt_format(
        [{"prompt": PROMPTS[0]}], tokenizer, model_with(ends_of(tokenizer))
    )  # templates write their own


@pytest.mark.parametrize(
    ("named", "expected"), [(None, [6]), (1, [6, 1]), ([1, 6], [6, 1]), ([1, 4], [6, 1, 4]), ([6], [6])]
)
def test_end_tokens_are_the_tokenizers_and_the_models(tmp_path, named, expected):
    tokenizer, settings = SimpleNamespace(eos_token_id=6), GenerationConfig(eos_token_id=named)
    assert end_token_ids(SimpleNamespace(generation_config=settings), tokenizer) == expected
    settings.save_pretrained(tmp_path)
    classifier = SimpleNamespace(config=SimpleNamespace(_name_or_path=str(tmp_path)))
    assert end_token_ids(classifier, tokenizer) == expected
    assert end_token_ids(str(tmp_path), tokenizer) == expected
    config = SimpleNamespace(_name_or_path="", get_text_config=lambda: SimpleNamespace(eos_token_id=named))
    assert end_token_ids(SimpleNamespace(config=config), tokenizer) == expected
