"""Texts one after another, or as padded rows: every token in its place, in both directions."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_recipes.models.rows import Rows, Slots, spread

MASK = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
VALUES = torch.tensor([[9, 5, 6, 9], [7, 9, 9, 9], [9, 9, 9, 9]])


def test_packed_rows_by_hand():
    rows = Rows(MASK, packed=True)
    assert rows.join(VALUES).tolist() == [[7, 5, 6]]  # the shortest text first
    assert rows.arguments["position_ids"].tolist() == [[0, 0, 1]]
    assert groups(rows) == [([[0]], [0]), ([[0, 1]], [0, 1])]
    assert rows.split(torch.tensor([[7, 5, 6]])).tolist() == [[0, 5, 6, 0], [7, 0, 0, 0], [0, 0, 0, 0]]
    assert rows.places(torch.tensor([[1, 0], [0, 0], [0, 0]])).tolist() == [[2, 1], [0, 0], [3, 3]]
    assert rows.take(torch.tensor([[7, 5, 6]]), torch.tensor([[1], [0], [-1]])).tolist() == [[6], [7], [6]]


def groups(rows):
    return [(group.sources.tolist(), group.places.tolist()) for group in rows.arguments["slots"]]


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
        found = spread(tokens, places, 2, 3)
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
    assert rows.take(torch.tensor([[5, 6], [7, 8], [8, 8]]), torch.tensor([[1], [0], [0]])).tolist() == [[6], [7], [8]]


def test_rows_without_padding_need_no_packing():
    rows = Rows(torch.tensor([[0, 1, 1], [1, 1, 0]]), packed=True)
    assert list(rows.arguments) == ["attention_mask"]
    assert rows.join(torch.tensor([[9, 1, 2], [3, 4, 9]])).tolist() == [[1, 2], [3, 4]]


def test_slots_by_hand():
    slots = Slots(sources=torch.tensor([[0, 1], [2, 2]]), places=torch.tensor([0, 1, 2]))
    tokens = torch.tensor([[[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]]])  # one batch, two heads, three tokens
    padded = slots.pad(tokens)
    assert padded.squeeze(-1).tolist() == [[[1, 2], [4, 5]], [[3, 3], [6, 6]]]
    assert torch.equal(slots.unpad(padded.transpose(1, 2)), tokens.transpose(1, 2))


def test_padding_gets_no_gradient_and_no_tokens_are_kept_for_it():
    slots = Slots(sources=torch.tensor([[0, 1], [2, 2]]), places=torch.tensor([0, 1, 2]))
    tokens, kept = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = slots.unpad(slots.pad(tokens).transpose(1, 2))
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
