"""Rows of a run: prompts that cannot be used are refused with their row, in data sets, dictionaries and streams."""

import copy

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from rlhf_recipes.ppo.prompts import PromptRules, check_rows, endless, prompt_rules
from tests.ppo.support import logged


@pytest.fixture
def rules(tiny_tokenizer):
    return PromptRules(tiny_tokenizer, longest=5, embeddings=len(tiny_tokenizer), template_kwargs={})


def chat(*texts):
    return [{"role": "user", "content": text} for text in texts]


GOOD = [{"prompt": "the film"}, {"prompt": "a story was good"}]
GOOD_CHATS = [{"prompt": chat("the")}, {"prompt": chat("a film")}]
BAD = [
    (GOOD, {"prompt": ""}, "row 2 has no token"),
    (GOOD, {"prompt": "   "}, "row 2 has no token"),
    (GOOD, {"prompt": None}, "row 2 is missing"),
    (GOOD, {"prompt": "the film was very very good"}, "row 2 has 6 tokens, and the context leaves 5.*`max_completion"),
    (GOOD, {"prompt": "the film <new>"}, "row 2 has the token 42, and the embeddings.*end at 41.*tokenizer"),
    (GOOD_CHATS, {"prompt": []}, "row 2 has no message"),
    (GOOD_CHATS, {"prompt": chat("the", None)}, "row 2 has a message without text .`content` of message 1 is null"),
    (GOOD_CHATS, {"prompt": chat("the film was very good")}, "row 2 has 8 tokens"),
    (GOOD_CHATS, {"prompt": chat("the <new>")}, "row 2 has the token 42"),
]


@pytest.mark.parametrize("kind", ["data set", "stream"])
@pytest.mark.parametrize(("good", "bad", "message"), BAD, ids=range(len(BAD)))
def test_a_prompt_that_cannot_be_used_is_named(rules, kind, good, bad, message):
    tokenizer = copy.deepcopy(rules.tokenizer)
    tokenizer.add_tokens(["<new>"])
    wider = PromptRules(tokenizer, rules.longest, rules.embeddings, {})
    rows = Dataset.from_list([*good, bad, *good])
    if kind == "stream":
        checked = iter(check_rows(rows.to_iterable_dataset(), "train_dataset", wider))
        assert [next(checked) for _ in good] == good
        with pytest.raises(ValueError, match=f"`train_dataset`: the prompt of {message}"):
            next(checked)
    else:
        with pytest.raises(ValueError, match=f"`train_dataset`: 1 of 5 prompts.* the prompt of {message}"):
            check_rows(rows, "train_dataset", wider)


def test_chats_without_a_token_are_named(rules):
    """A template that renders nothing for an empty message."""
    tokenizer = copy.deepcopy(rules.tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    rows = Dataset.from_list([{"prompt": chat("the film")}, {"prompt": chat("")}])
    with pytest.raises(ValueError, match="the prompt of row 1 has no token. Remove such rows"):
        check_rows(rows, "train_dataset", PromptRules(tokenizer, 5, 42, {}))


def test_the_template_gets_what_the_rollout_gives_it(rules):
    tokenizer = copy.deepcopy(rules.tokenizer)
    tokenizer.chat_template = "{{ 'the film ' * times }}"
    with pytest.raises(ValueError, match="row 0 has 6 tokens"):
        check_rows(Dataset.from_list(GOOD_CHATS), "train_dataset", PromptRules(tokenizer, 5, 42, {"times": 3}))


def test_each_of_several_data_sets_is_checked(rules):
    good, bad = Dataset.from_list(GOOD), Dataset.from_list([*GOOD, {"prompt": ""}])
    found = check_rows({"early": good, "late": good.to_iterable_dataset()}, "eval_dataset", rules)
    assert found["early"] is good
    assert list(found["late"]) == GOOD
    with pytest.raises(ValueError, match=r"`eval_dataset\['late'\]`: 1 of 3 prompts"):
        check_rows(DatasetDict(early=good, late=bad), "eval_dataset", rules)


def test_columns_and_counts(rules):
    rows = Dataset.from_list([{"text": "the film"}])
    for given in (rows, rows.to_iterable_dataset(), IterableDataset.from_generator(lambda: iter([{"text": "the"}]))):
        with pytest.raises(ValueError, match=r"needs a column 'prompt'; it has \['text'\] \(`train_dataset`\)"):
            check_rows(given, "train_dataset", rules)
    with pytest.raises(ValueError, match="One rollout takes 3 different prompts, but the dataset has 2"):
        check_rows(Dataset.from_list(GOOD), "train_dataset", rules, needed=3)


@pytest.mark.parametrize("token", ["pad_token", "eos_token"])
def test_special_tokens_of_the_tokenizer(make_trainer, tiny_tokenizer, token):
    """One that is missing, and one that was added without new embeddings."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    setattr(tokenizer, token, None)
    with pytest.raises(ValueError, match=f"`processing_class` has no `{token}`.*Set `tokenizer.{token}`"):
        make_trainer(processing_class=tokenizer)
    tokenizer.add_special_tokens({token: "<another>"})
    with pytest.raises(
        ValueError, match=f"The {token} '<another>' of the tokenizer has the number 42, and the embedd"
    ):
        make_trainer(processing_class=tokenizer)


def test_the_rules_of_a_policy(make_trainer, make_config, tiny_tokenizer):
    trainer = make_trainer()
    rules = prompt_rules(trainer.model, tiny_tokenizer, make_config(max_completion_length=28))
    assert (rules.longest, rules.embeddings) == (100, len(tiny_tokenizer))


def test_an_endless_stream_is_shuffled_anew_in_each_pass():
    rows = Dataset.from_dict({"prompt": [str(number) for number in range(20)]}).to_iterable_dataset()
    stream = endless(rows, needed=8, seed=3)
    first = iter(stream)
    passes = [[next(first)["prompt"] for _ in range(20)] for _ in range(3)]
    assert [sorted(map(int, each)) for each in passes] == [list(range(20))] * 3
    assert passes[0] != passes[1] != passes[2] != passes[0]
    again = iter(stream)
    assert [next(again)["prompt"] for _ in range(60)] == [*passes[0], *passes[1], *passes[2]]
    other = iter(endless(rows, needed=8, seed=4))
    assert [next(other)["prompt"] for _ in range(20)] != passes[0]


def test_a_stream_that_is_too_short_is_an_error():
    rows = Dataset.from_dict({"prompt": ["a", "b"]}).to_iterable_dataset()
    stream = iter(endless(rows, needed=3, seed=None))
    assert [next(stream)["prompt"] for _ in range(2)] == ["a", "b"]
    with pytest.raises(ValueError, match="takes 3 different prompts, but the stream `train_dataset` ended after 2"):
        next(stream)


def test_several_evaluation_data_sets_are_logged_by_name(make_trainer, prompts):
    """Each number of a data set is what an evaluation of that one alone gives."""
    parts = {"early": prompts.select(range(8)), "late": prompts.select(range(8, 16))}
    trainer = make_trainer(eval_dataset=parts, reward_funcs=lambda prompts, **_: [float(len(p)) for p in prompts])
    found = trainer.evaluate()
    for name, rows in parts.items():
        assert found[f"eval_{name}_reward"] == pytest.approx(sum(map(len, rows["prompt"])) / 8)
        assert logged(trainer, f"eval_{name}_critic/value_loss") == [found[f"eval_{name}_critic/value_loss"]]
    assert not logged(trainer, "eval_reward")
    single = trainer.evaluate(parts["early"])
    assert single["eval_reward"] == pytest.approx(found["eval_early_reward"])
    with pytest.raises(ValueError, match="`eval_dataset`: 1 of 1 prompts cannot be used"):
        trainer.evaluate(Dataset.from_list([{"prompt": ""}]))
