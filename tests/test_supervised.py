"""The evaluation of completions: every token once, whatever the batches are. Two processes: test_evaluated.py."""

import pytest
import torch

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
