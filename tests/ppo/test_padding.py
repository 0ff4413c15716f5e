"""Batches without the padding that nobody needs: the same numbers, in the same order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_recipes.ppo.padding import (
    by_length,
    count_columns,
    join,
    join_columns,
    positions_before,
    put_together,
    row_lengths,
    sequences,
    sort_within_steps,
    text_rows,
    trim,
)

MASKS = ("prompt_mask", "completion_mask")


def make_batch(prompts, completions, spare=2):
    """Rows of given lengths, with `spare` columns of padding more than the longest needs."""
    prompt, completion = max(prompts) + spare, max([1, *completions]) + spare
    batch = {
        "prompt_mask": torch.tensor([[0] * (prompt - n) + [1] * n for n in prompts]),
        "completion_mask": torch.tensor([[1] * n + [0] * (completion - n) for n in completions]),
        "total": torch.tensor(3.0),
    }
    batch["prompt_ids"] = torch.arange(batch["prompt_mask"].numel()).view_as(batch["prompt_mask"]) + 100
    batch["completion_ids"] = torch.arange(batch["completion_mask"].numel()).view_as(batch["completion_mask"])
    batch["anchor_hidden"] = torch.randn(*batch["completion_mask"].shape, 5)
    return batch


def rows(batch, name, mask):
    return [values[keep.bool()].tolist() for values, keep in zip(batch[name], batch[mask], strict=True)]


lengths = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 7)), min_size=1, max_size=9)


@settings(max_examples=60)
@given(lengths=lengths, spare=st.integers(0, 3))
def test_trimming_keeps_every_token_and_no_empty_column(lengths, spare):
    batch = make_batch(*zip(*lengths, strict=True), spare=spare)
    cut = trim(batch)
    assert cut["prompt_ids"].size(1) == max(prompt for prompt, _ in lengths)
    assert cut["completion_ids"].size(1) == max(1, *(completion for _, completion in lengths))
    for name, mask in (("prompt_ids", "prompt_mask"), ("completion_ids", "completion_mask")):
        assert rows(cut, name, mask) == rows(batch, name, mask)
    assert_close(cut["anchor_hidden"], batch["anchor_hidden"][:, : cut["completion_mask"].size(1)])
    assert cut["total"] is batch["total"]


def test_trimming_by_hand():
    cut = trim(make_batch([1, 3], [2, 1]))
    assert cut["prompt_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert cut["completion_mask"].tolist() == [[1, 1], [1, 0]]
    assert cut["prompt_ids"].tolist() == [[102, 103, 104], [107, 108, 109]]


@settings(max_examples=60)
@given(lengths=lengths, size=st.integers(1, 5))
def test_parts_by_length_are_the_whole_batch(lengths, size):
    batch = sequences(make_batch(*zip(*lengths, strict=True)))
    parts = list(by_length(batch, size))
    totals = torch.tensor([prompt + completion for prompt, completion in lengths])
    assert sorted(torch.cat([index for index, _ in parts]).tolist()) == list(range(len(lengths)))
    assert all(len(index) == len(part["prompt_ids"]) <= size for index, part in parts)
    seen = totals[torch.cat([index for index, _ in parts])]
    assert (seen.diff() <= 0).all()
    width = batch["completion_ids"].size(1)
    again = put_together([(index, part["completion_ids"]) for index, part in parts], width)
    mask = batch["completion_mask"].bool()
    assert torch.equal(again[mask], batch["completion_ids"][mask])
    masks = put_together([(index, part["completion_mask"]) for index, part in parts], width)
    assert torch.equal(masks, batch["completion_mask"])


def test_what_is_read_and_how_it_is_joined_by_hand():
    batch = make_batch([1, 2], [2, 1], spare=1)
    assert list(sequences(batch)) == ["prompt_ids", "prompt_mask", "completion_ids", "completion_mask"]
    ids = join_columns(batch, "ids")
    assert ids.tolist() == [[100, 101, 102, 0, 1, 2], [103, 104, 105, 3, 4, 5]]
    assert text_rows(batch, packed=False).join(ids).tolist() == [[102, 0, 1], [104, 105, 3]]
    shorter = make_batch([1, 2], [1, 2], spare=1)
    rows = text_rows(shorter, packed=True)
    assert rows.join(join_columns(shorter, "ids")).tolist() == [[102, 0, 104, 105, 3, 4]]
    whole = join([batch, batch])
    assert whole["completion_ids"].tolist() == 2 * batch["completion_ids"].tolist()
    assert whole["total"] == batch["total"]


def test_positions_by_hand():
    assert positions_before(make_batch([1, 2], [3, 1], spare=0)).tolist() == [[0, 1, 2], [1, 2, 2]]
    assert positions_before(make_batch([2], [0], spare=1)).tolist() == [[1, 1]]


@settings(max_examples=60)
@given(lengths=lengths, spare=st.integers(0, 3), packed=st.booleans())
def test_texts_hold_every_token_once_and_each_completion_token_is_next(lengths, spare, packed):
    batch = make_batch(*zip(*lengths, strict=True), spare=spare)
    texts, ids = text_rows(batch, packed), join_columns(batch, "ids")
    joined = texts.join(ids)
    prompts, completions = (rows(batch, f"{name}_ids", f"{name}_mask") for name in ("prompt", "completion"))
    expected = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    places = texts.places(positions_before(batch))
    counts, flat = batch["completion_mask"].bool(), joined.flatten()
    assert torch.equal(flat[(places + 1)[counts]], batch["completion_ids"][counts])
    starts = [int(start) for start in texts.places(torch.zeros(len(lengths), 1, dtype=torch.long))]
    assert [flat[start : start + len(text)].tolist() for start, text in zip(starts, expected, strict=True)] == expected
    assert torch.equal(texts.split(joined)[:, -counts.size(1) :][counts], batch["completion_ids"][counts])


def test_parts_that_were_cut_on_the_left_by_hand():
    parts = [(torch.tensor([1]), torch.tensor([[7.0]])), (torch.tensor([0]), torch.tensor([[1.0, 2.0]]))]
    assert put_together(parts, 3, left=True).tolist() == [[0.0, 1.0, 2.0], [0.0, 0.0, 7.0]]


def test_rows_are_measured_by_hand():
    assert row_lengths(make_batch([1, 3], [2, 0])).tolist() == [3, 3]


def test_columns_are_counted_by_hand():
    assert count_columns(torch.tensor([[0, 0, 1], [0, 1, 1]])) == 2
    assert count_columns(torch.zeros(2, 3)) == 1


def test_what_is_put_together_passes_gradients_on():
    values = torch.randn(2, 3, requires_grad=True)
    whole = put_together([(torch.tensor([1, 0]), values)], 4)
    assert whole[:, 3].eq(0).all()
    weights = torch.arange(8.0).view(2, 4)
    (whole * weights).sum().backward()
    assert torch.equal(values.grad, weights[[1, 0], :3])


@settings(max_examples=40)
@given(
    per_step=st.integers(1, 3),
    steps=st.integers(1, 3),
    size=st.integers(1, 4),
    data=st.data(),
)
def test_sorting_moves_no_row_to_another_step(per_step, steps, size, data):
    count = per_step * steps * size
    pairs = data.draw(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 7)), min_size=count, max_size=count))
    whole = make_batch(*zip(*pairs, strict=True))
    parts = [
        {name: value if value.dim() == 0 else value[start : start + size] for name, value in whole.items()}
        for start in range(0, count, size)
    ]
    arranged = sort_within_steps(parts, per_step)
    assert [len(part["prompt_ids"]) for part in arranged] == [size] * len(parts)
    for start in range(0, len(parts), per_step):
        before, after = (join(group[start : start + per_step]) for group in (parts, arranged))
        assert sorted(before["prompt_ids"][:, 0].tolist()) == sorted(after["prompt_ids"][:, 0].tolist())
        totals = after["prompt_mask"].sum(1) + after["completion_mask"].sum(1)
        assert (totals.diff() >= 0).all()
        order = after["prompt_ids"][:, 0].argsort()
        for name in before:
            if before[name].dim():
                assert torch.equal(after[name][order], before[name][before["prompt_ids"][:, 0].argsort()])


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_padding_changes_neither_loss_nor_gradient(make_trainer, critic):
    """A micro-batch with columns of padding more gives the same loss and the same gradients."""
    from tests.ppo.support import rollout, without_chance

    trainer = without_chance(make_trainer(critic=critic))
    batch = rollout(trainer)
    trainer.current_gradient_accumulation_steps = 1
    found = []
    for extra in (0, 3):
        wide = {}
        for name, value in batch.items():
            if value.dim() < 2:
                wide[name] = value
            else:
                padding = (extra, 0) if name.startswith("prompt_") else (0, extra)
                wide[name] = torch.nn.functional.pad(value, padding)
        trainer.model.zero_grad()
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, wide)
        loss.backward()
        found.append(
            (loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        )
    assert_close(found[0][0], found[1][0], atol=1e-6, rtol=1e-5)
    assert found[0][1].keys() == found[1][1].keys() != set()
    for name, gradient in found[0][1].items():
        assert_close(gradient, found[1][1][name], atol=1e-6, rtol=1e-4)
