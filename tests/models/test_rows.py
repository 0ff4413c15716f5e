"""Texts one after another, or as padded rows: every token in its place, in both directions."""

from dataclasses import dataclass, field
from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_recipes.models.rows import (
    OF_COMPLETION,
    OF_PROMPT,
    Rows,
    SequenceGroup,
    Texts,
    count_columns,
    pad_rows,
    scatter_rows,
    scatter_tokens,
)
from tests.models import support

MASK = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
VALUES = torch.tensor([[9, 5, 6, 9], [7, 9, 9, 9], [9, 9, 9, 9]])


def test_packed_rows_by_hand():
    rows = Rows(MASK, packed=True)
    assert rows.join(VALUES).tolist() == [[7, 5, 6]]  # the shortest text first
    assert rows.arguments["position_ids"].tolist() == [[0, 0, 1]]
    assert groups(rows) == [([[0]], [0]), ([[0, 1]], [0, 1])]
    assert rows.split(torch.tensor([[7, 5, 6]])).tolist() == [[0, 5, 6, 0], [7, 0, 0, 0], [0, 0, 0, 0]]
    assert rows.places(torch.tensor([[1, 0], [0, 0], [0, 0]])).tolist() == [[2, 1], [0, 0], [3, 3]]
    assert rows.gather(torch.tensor([[7, 5, 6]]), torch.tensor([[1], [0], [-1]])).tolist() == [[6], [7], [6]]


def groups(rows):
    return [(group.sources.tolist(), group.places.tolist()) for group in rows.arguments["sequence_groups"]]


def test_attention_pads_texts_of_like_length_together():
    lengths = torch.tensor([3, 1, 7, 2, 7, 0, 4, 5, 6])
    rows = Rows(torch.arange(7) < lengths[:, None], packed=True)
    assert groups(rows) == [
        ([[0, 0, 0], [1, 2, 2], [3, 4, 5]], [0, 3, 4, 6, 7, 8]),  # texts of 1, 2 and 3 tokens
        (
            [[0, 1, 2, 3, 3, 3], [4, 5, 6, 7, 8, 8], [9, 10, 11, 12, 13, 14]],
            [0, 1, 2, 3, 6, 7, 8, 9, 10, *range(12, 18)],
        ),
        ([[*range(7)], [*range(7, 14)], [13] * 7], [*range(14)]),  # of 7, 7 and none
    ]


def test_spread_keeps_places_and_no_tokens_for_its_gradient():
    tokens = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    places, kept = torch.tensor([4, 0, 3]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = scatter_tokens(tokens, places, 2, 3)
    assert [tensor.tolist() for tensor in kept] == [[4, 0, 3]]
    weights = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * found).sum(), tokens)
    assert_close(gradient, weights.flatten(0, 1)[places], atol=0, rtol=0)


def test_padded_rows_by_hand():
    rows = Rows(MASK, packed=False)
    assert rows.join(VALUES).tolist() == [[5, 6], [7, 0], [0, 0]]
    assert {name: value.tolist() for name, value in rows.arguments.items()} == {
        "attention_mask": [[1, 1], [1, 0], [0, 0]]
    }
    assert rows.split(torch.tensor([[5, 6], [7, 8], [8, 8]])).tolist() == [[0, 5, 6, 0], [7, 0, 0, 0], [0, 0, 0, 0]]
    assert rows.gather(torch.tensor([[5, 6], [7, 8], [8, 8]]), torch.tensor([[1], [0], [0]])).tolist() == [
        [6],
        [7],
        [8],
    ]


def test_rows_without_padding_need_no_packing():
    rows = Rows(torch.tensor([[0, 1, 1], [1, 1, 0]]), packed=True)
    assert list(rows.arguments) == ["attention_mask"]
    assert rows.join(torch.tensor([[9, 1, 2], [3, 4, 9]])).tolist() == [[1, 2], [3, 4]]


def test_sequence_groups_by_hand():
    group = SequenceGroup(sources=torch.tensor([[0, 1], [2, 2]]), places=torch.tensor([0, 1, 2]))
    tokens = torch.tensor([[[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]]])  # one batch, two heads, three tokens
    padded = group.pad(tokens)
    assert padded.squeeze(-1).tolist() == [[[1, 2], [4, 5]], [[3, 3], [6, 6]]]
    assert torch.equal(group.unpad(padded.transpose(1, 2)), tokens.transpose(1, 2))


def test_padding_gets_no_gradient_and_no_tokens_are_kept_for_it():
    group = SequenceGroup(sources=torch.tensor([[0, 1], [2, 2]]), places=torch.tensor([0, 1, 2]))
    tokens, kept = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = group.unpad(group.pad(tokens).transpose(1, 2))
    assert [tensor.tolist() for tensor in kept] == [[0, 1, 2, 2], [0, 1, 2]]
    weights = torch.randn(1, 3, 4, 2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * found).sum(), tokens)
    assert_close(gradient, weights.transpose(1, 2), atol=0, rtol=0)


@settings(max_examples=60)
@given(
    texts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=7),
    packed=st.booleans(),
)
def test_every_token_is_joined_once_and_comes_back(texts, packed):
    texts = [(0, 1, 0), *texts]  # at least one token
    width = max(map(sum, texts))
    mask = torch.tensor([[0] * before + [1] * n + [0] * (width - before - n) for before, n, _ in texts])
    values = torch.randn(*mask.shape, 2)
    rows, own = Rows(mask, packed), [value[keep.bool()] for value, keep in zip(values, mask, strict=True)]
    joined = rows.join(values)
    longest, count = max(n for _, n, _ in texts), int(mask.sum())
    is_packed = packed and count < longest * len(texts)
    assert joined.shape == ((1, count, 2) if is_packed else (len(texts), longest, 2))
    found = rows.split(joined)
    assert_close(found, values * mask[..., None])
    for row, text in enumerate(own):
        for position, token in enumerate(text):
            positions = torch.zeros(len(texts), 1, dtype=torch.long)
            positions[row] = position
            place = rows.places(positions)[row, 0]
            assert torch.equal(joined.flatten(0, 1)[place], token)


make_texts = partial(support.make_texts, kind=Texts)


def tokens(ids, mask):
    return [values[keep.bool()].tolist() for values, keep in zip(ids, mask, strict=True)]


lengths = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 7)), min_size=1, max_size=9)


@dataclass(frozen=True)
class WithMore(Texts):
    """Texts with a field of each kind."""

    states: torch.Tensor = field(metadata=OF_COMPLETION, kw_only=True)
    below: torch.Tensor | None = field(default=None, metadata=OF_PROMPT, kw_only=True)
    total: torch.Tensor = field(kw_only=True)


@settings(max_examples=60)
@given(lengths=lengths, spare=st.integers(0, 3))
def test_trimming_keeps_every_token_and_no_empty_column(lengths, spare):
    plain = make_texts(*zip(*lengths, strict=True), spare=spare)
    more = {"states": torch.randn(*plain.completion_mask.shape, 5), "total": torch.tensor(3.0)}
    texts = WithMore(**vars(plain), **more, below=torch.randn(*plain.prompt_mask.shape, 2))
    cut = texts.trimmed()
    assert cut.prompt_ids.size(1) == max(prompt for prompt, _ in lengths)
    assert cut.completion_ids.size(1) == max(1, *(completion for _, completion in lengths))
    assert tokens(cut.prompt_ids, cut.prompt_mask) == tokens(texts.prompt_ids, texts.prompt_mask)
    assert tokens(cut.completion_ids, cut.completion_mask) == tokens(texts.completion_ids, texts.completion_mask)
    assert torch.equal(cut.states, texts.states[:, : cut.completion_mask.size(1)])
    assert torch.equal(cut.below, texts.below[:, -cut.prompt_mask.size(1) :])
    assert cut.total is texts.total
    assert WithMore(**vars(plain), **more).trimmed().below is None


def test_trimming_by_hand():
    cut = make_texts([1, 3], [2, 1]).trimmed()
    assert cut.prompt_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert cut.completion_mask.tolist() == [[1, 1], [1, 0]]
    assert cut.prompt_ids.tolist() == [[102, 103, 104], [107, 108, 109]]


@settings(max_examples=60)
@given(lengths=lengths, size=st.integers(1, 5))
def test_parts_by_length_are_the_whole_batch(lengths, size):
    texts = make_texts(*zip(*lengths, strict=True))
    parts = list(texts.by_length(size))
    totals = torch.tensor([prompt + completion for prompt, completion in lengths])
    assert sorted(torch.cat([index for index, _ in parts]).tolist()) == list(range(len(lengths)))
    assert all(len(index) == len(part) <= size for index, part in parts)
    assert (totals[torch.cat([index for index, _ in parts])].diff() <= 0).all()
    width = texts.completion_ids.size(1)
    again = scatter_rows([(index, part.completion_ids) for index, part in parts], width)
    mask = texts.completion_mask.bool()
    assert torch.equal(again[mask], texts.completion_ids[mask])
    masks = scatter_rows([(index, part.completion_mask) for index, part in parts], width)
    assert torch.equal(masks, texts.completion_mask)


def test_texts_side_by_side_by_hand():
    texts = make_texts([1, 2], [2, 1], spare=1)
    assert texts.ids.tolist() == [[100, 101, 102, 0, 1, 2], [103, 104, 105, 3, 4, 5]]
    assert texts.rows(packed=False).join(texts.ids).tolist() == [[102, 0, 1], [104, 105, 3]]
    shorter = make_texts([1, 2], [1, 2], spare=1)
    assert shorter.rows(packed=True).join(shorter.ids).tolist() == [[102, 0, 104, 105, 3, 4]]
    assert texts.select(torch.tensor([1])).ids.tolist() == texts.ids[1:].tolist()
    assert texts.lengths.tolist() == [3, 3]


def test_positions_before_by_hand():
    assert make_texts([1, 2], [3, 1], spare=0).positions_before.tolist() == [[0, 1, 2], [1, 2, 2]]
    assert make_texts([2], [0], spare=1).positions_before.tolist() == [[1, 1]]


@settings(max_examples=60)
@given(lengths=lengths, spare=st.integers(0, 3), packed=st.booleans())
def test_rows_of_texts_hold_every_token_once_and_each_completion_token_is_next(lengths, spare, packed):
    texts = make_texts(*zip(*lengths, strict=True), spare=spare)
    rows = texts.rows(packed)
    joined = rows.join(texts.ids)
    prompts = tokens(texts.prompt_ids, texts.prompt_mask)
    completions = tokens(texts.completion_ids, texts.completion_mask)
    expected = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    places = rows.places(texts.positions_before)
    counts, flat = texts.completion_mask.bool(), joined.flatten()
    assert torch.equal(flat[(places + 1)[counts]], texts.completion_ids[counts])
    starts = [int(start) for start in rows.places(torch.zeros(len(lengths), 1, dtype=torch.long))]
    assert [flat[start : start + len(text)].tolist() for start, text in zip(starts, expected, strict=True)] == expected
    assert torch.equal(rows.split(joined)[:, -counts.size(1) :][counts], texts.completion_ids[counts])


def test_parts_that_were_cut_on_the_left_by_hand():
    parts = [(torch.tensor([1]), torch.tensor([[7.0]])), (torch.tensor([0]), torch.tensor([[1.0, 2.0]]))]
    assert scatter_rows(parts, 3, left=True).tolist() == [[0.0, 1.0, 2.0], [0.0, 0.0, 7.0]]
    assert scatter_rows(parts, 3).tolist() == [[1.0, 2.0, 0.0], [7.0, 0.0, 0.0]]


def test_columns_are_counted_by_hand():
    assert count_columns(torch.tensor([[0, 0, 1], [0, 1, 1]])) == 2
    assert count_columns(torch.zeros(2, 3)) == 1


def test_scattered_rows_pass_gradients_on():
    values = torch.randn(2, 3, requires_grad=True)
    batch = scatter_rows([(torch.tensor([1, 0]), values)], 4)
    assert batch[:, 3].eq(0).all()
    weights = torch.arange(8.0).view(2, 4)
    (batch * weights).sum().backward()
    assert torch.equal(values.grad, weights[[1, 0], :3])


def test_padding_by_hand():
    """A row without a token is padding only, and a token that equals the padding's id counts."""
    ids, mask = pad_rows([[5, 0, 6], [], [7]], 0)
    assert (ids.tolist(), mask.tolist()) == ([[5, 0, 6], [0, 0, 0], [7, 0, 0]], [[1, 1, 1], [0, 0, 0], [1, 0, 0]])
    ids, mask = pad_rows([[5, 0, 6], [], [7]], 9, side="left")
    assert (ids.tolist(), mask.tolist()) == ([[5, 0, 6], [9, 9, 9], [9, 9, 7]], [[1, 1, 1], [0, 0, 0], [0, 0, 1]])
    assert (ids.dtype, mask.dtype) == (torch.long, torch.long)
