"""The evaluation of completions: every token once, whatever the batches are. Two processes: test_evaluated.py."""

import math

import numpy as np
import pytest
import torch

from rlhf_recipes.supervised import completions_table, evaluate_completions
from tests.reward_modeling.evaluation_worker import make_sft, numbers


@pytest.fixture
def trainer(tiny_model_path, tmp_path):
    return make_sft(1, tiny_model_path, tmp_path)


@torch.no_grad()
def by_hand(trainer):
    """Mean loss, entropy and accuracy over the tokens of the completions, one row at a time."""
    losses, entropies, right = [], [], []
    for row in trainer.eval_dataset:
        ids = torch.tensor([row["input_ids"]])
        logps = trainer.model(ids).logits[0, :-1].double().log_softmax(dim=-1)
        counts = torch.tensor(row["labels"][1:]) != -100
        targets = ids[0, 1:]
        losses.append(-logps.gather(1, targets[:, None])[counts, 0])
        entropies.append(-(logps.exp() * logps).sum(dim=-1)[counts])
        right.append((logps.argmax(dim=-1) == targets)[counts].double())
    loss, entropy, accuracy = (torch.cat(part).mean().item() for part in (losses, entropies, right))
    return {"loss": loss, "entropy": entropy, "mean_token_accuracy": accuracy}


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8, 9, 16])
def test_the_size_of_batches_changes_nothing(trainer, size):
    trainer.args.per_device_eval_batch_size = size
    trainer.model.eval()
    assert numbers(trainer) == pytest.approx(by_hand(trainer), abs=1e-5)


def test_another_loss_stays_as_trl_has_it(trainer):
    trainer.args.loss_type = "dft"
    trainer.args.per_device_eval_batch_size = 9
    logged = numbers(trainer)
    assert logged["loss"] < by_hand(trainer)["loss"] / 2
    assert logged["entropy"] == pytest.approx(by_hand(trainer)["entropy"], abs=1e-5)


@torch.no_grad()
def losses_of_rows(trainer):
    """Summed loss and number of tokens of each row's completion."""
    rows = []
    for row in trainer.eval_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        loss = trainer.model(ids, labels=labels).loss.item()
        count = sum(label != -100 for label in row["labels"][1:])
        rows.append((loss * count, count))
    return np.array(rows)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_the_loss_has_an_interval_over_rows(trainer, size):
    trainer.args.per_device_eval_batch_size = size
    trainer.model.eval()
    result = evaluate_completions(trainer)
    assert result["loss"] == trainer.state.log_history[-1]["eval_loss"]
    assert result["n"] == len(trainer.eval_dataset)
    rows, rng = losses_of_rows(trainer), np.random.default_rng(7)
    drawn = rows[rng.integers(len(rows), size=(20_000, len(rows)))].sum(axis=1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    assert result["loss_ci"] == pytest.approx([low, high], abs=0.05 * (high - low))
    assert low < result["loss"] < high
    assert result["perplexity_ci"] == [math.exp(end) for end in result["loss_ci"]]


@pytest.mark.parametrize("change", ["loss", "padding_free", "one row"])
def test_without_rows_that_are_told_apart_there_is_no_interval(trainer, change):
    if change == "loss":
        trainer.args.loss_type = "dft"
    elif change == "padding_free":
        trainer.padding_free = True
    else:
        trainer.eval_dataset = trainer.eval_dataset.select([0])
    result = evaluate_completions(trainer)
    assert set(result) == {"loss", "perplexity", "n"}
    assert completions_table(result).splitlines()[1].split()[-1] == f"{result['loss']:.4f}"
