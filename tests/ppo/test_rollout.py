"""The rows of a rollout in its micro-batches: the same numbers, in the same optimizer steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_recipes.ppo.rollout import Rollout, join, reshuffle, sort_within_steps, texts_of
from tests.models.support import make_texts
from tests.ppo.support import rollout, without_chance


def make_batch(prompts, completions):
    texts = make_texts(prompts, completions)
    more = {name: torch.randn(texts.completion_mask.shape) for name in ("advantages", "returns", "old_values")}
    more |= {"old_per_token_logps": more["returns"] - 1, "ref_per_token_logps": more["returns"] - 2}
    more |= {"value_mask": texts.completion_mask, "anchor_hidden": torch.randn(*texts.completion_mask.shape, 5)}
    numbers = {"items_in_rollout": torch.tensor(3.0), "row": torch.arange(len(prompts))}
    return Rollout(**vars(texts), **more, **numbers).to_batch()


def test_a_rollout_survives_the_way_through_trl():
    batch = make_batch([1, 3], [2, 1])
    again = Rollout.from_batch(batch | {"num_items_in_batch": torch.tensor(3.0)})
    assert "prompt_below" not in batch
    assert again.prompt_below is None
    assert again.to_batch().keys() == batch.keys()
    assert all(again.to_batch()[name] is value for name, value in batch.items())
    cut = again.trimmed()
    assert (cut.anchor_hidden.shape, cut.row.shape) == ((2, 2, 5), (2,))


def test_texts_of_a_batch_by_hand():
    texts = texts_of(make_batch([1], [2]) | {"num_items_in_batch": torch.tensor(3.0)})
    assert texts.prompt_ids.tolist() == [[100, 101, 102]]
    assert texts.completion_mask.tolist() == [[1, 1, 0, 0]]
    assert texts.lengths.tolist() == [3]


def test_micro_batches_are_joined_by_hand():
    batch = make_batch([1, 2], [2, 1])
    joined = join([batch, batch])
    assert joined["completion_ids"].tolist() == 2 * batch["completion_ids"].tolist()
    assert joined["items_in_rollout"] == batch["items_in_rollout"]


def test_a_further_epoch_has_the_same_rows_in_other_micro_batches():
    batch = make_batch([1, 2, 3, 4, 1, 2, 3, 4], [2, 1, 3, 2, 5, 4, 1, 1])
    halves = [{n: v[part] if v.dim() else v for n, v in batch.items()} for part in (slice(4), slice(4, 8))]
    torch.manual_seed(0)
    again = reshuffle(halves)
    assert [len(each["row"]) for each in again] == [4, 4]
    assert sorted(again[0]["row"].tolist()) != [0, 1, 2, 3]
    rows = join(again)
    for name, value in batch.items():
        assert torch.equal(rows[name], value[rows["row"]] if value.dim() else value), name


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
    batch = make_batch(*zip(*pairs, strict=True))
    parts = [
        {name: value if value.dim() == 0 else value[start : start + size] for name, value in batch.items()}
        for start in range(0, count, size)
    ]
    arranged = sort_within_steps(parts, per_step)
    assert [len(part["prompt_ids"]) for part in arranged] == [size] * len(parts)
    for start in range(0, len(parts), per_step):
        before, after = (join(group[start : start + per_step]) for group in (parts, arranged))
        assert sorted(before["row"].tolist()) == sorted(after["row"].tolist())
        assert (texts_of(after).lengths.diff() >= 0).all()
        for name, value in after.items():
            assert torch.equal(value, batch[name][after["row"]] if value.dim() else batch[name]), name


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_padding_changes_neither_loss_nor_gradient(make_trainer, critic):
    """A micro-batch with columns of padding more gives the same loss and the same gradients."""
    trainer = without_chance(make_trainer(critic=critic))
    batch = rollout(trainer)
    trainer.current_gradient_accumulation_steps = 1
    results = []
    for extra in (0, 3):
        wide = {}
        for name, value in batch.items():
            if value.dim() < 2:
                wide[name] = value
            else:
                padding = (extra, 0) if name in ("prompt_ids", "prompt_mask") else (0, extra)
                wide[name] = torch.nn.functional.pad(value, padding)
        trainer.model.zero_grad()
        trainer.model.train()
        loss = trainer._compute_loss(trainer.model, wide)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    (loss, gradients), (other_loss, others) = results
    assert_close(loss, other_loss, atol=1e-6, rtol=1e-5)
    assert gradients.keys() == others.keys() != set()
    for name, gradient in gradients.items():
        assert_close(gradient, others[name], atol=1e-6, rtol=1e-4)
