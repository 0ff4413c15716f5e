"""An out-of-memory error names its phase, its sizes and what helps; the table at the start names the roles."""

from operator import attrgetter

import pytest
import torch

from rlhf_recipes.ppo import trainer as trainer_module
from rlhf_recipes.ppo.out_of_memory import KNOBS, explain_out_of_memory


def run_out(*args, **kwargs):
    raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")


def notes_of(trainer):
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2\.00 GiB") as caught:
        trainer.train()
    return caught.value.__notes__


@pytest.mark.parametrize(
    ("phase", "place", "sizes"),
    [
        ("generate", "roles._base.generate", "8 completions of up to 8 tokens together"),
        ("score", "critic.rollout", "micro-batches of 4 sequences"),
        ("train", "critic.forward", "micro-batches of 4 sequences"),
        ("train", "accelerator.backward", "micro-batches of 4 sequences, "),
    ],
)
def test_error_names_phase_sizes_and_knobs(make_trainer, monkeypatch, phase, place, sizes):
    trainer = make_trainer()
    path, name = place.rsplit(".", 1)
    owner = attrgetter(path)(trainer)
    original = getattr(owner, name)

    def in_training(*args, **kwargs):
        return run_out() if torch.is_grad_enabled() else original(*args, **kwargs)

    broken = in_training if place == "critic.forward" else run_out
    monkeypatch.setattr(owner, name, broken)
    [note] = notes_of(trainer)
    assert note.startswith(f"PPO ran out of memory in the phase '{phase}' ({sizes}")
    assert f"1. {KNOBS[phase][0]}; 2. {KNOBS[phase][1]}" in note


def test_first_step_of_the_optimizer_is_training(make_trainer, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", run_out)
    [note] = notes_of(make_trainer())
    assert "in the phase 'train' (micro-batches of 4 sequences, " in note
    assert "tokens wide" in note


def test_longest_sequence_is_named(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer.accelerator, "backward", run_out)
    [note] = notes_of(trainer)
    batch = trainer._buffered_inputs[0]
    longest = max(int(p.sum() + c.sum()) for p, c in zip(batch["prompt_mask"], batch["completion_mask"], strict=True))
    width = batch["prompt_ids"].size(1) + batch["completion_ids"].size(1)
    assert f"{width} tokens wide with padding; the longest sequence of the first one has {longest})" in note


def test_evaluation_names_its_own_micro_batch(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer.critic, "rollout", run_out)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.evaluate()
    assert "'score' (micro-batches of 8 sequences)" in caught.value.__notes__[0]


def test_other_errors_stay_as_they_are():
    with pytest.raises(ValueError, match="wrong") as caught, explain_out_of_memory("train", str):
        raise ValueError("wrong")
    assert not hasattr(caught.value, "__notes__")


def test_every_knob_is_a_field(make_config):
    import re

    from trl import ModelConfig

    config = make_config()
    named = {name for knobs in KNOBS.values() for knob in knobs for name in re.findall(r"`(\w+)", knob)}
    assert {name for name in named if not hasattr(config, name) and not hasattr(ModelConfig(), name)} == set()
    assert trainer_module.PPOTrainer._generate_and_score_completions.__name__ == "_generate_and_score_completions"


def table_of(text):
    lines = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_table_of_the_roles_is_printed_once_at_the_start(make_trainer, capsys):
    trainer = make_trainer(max_steps=1)
    capsys.readouterr()
    trainer.train()
    printed = capsys.readouterr().out
    assert printed.count("base, shared") == 1
    table = table_of(printed[: printed.index("together")])
    base = trainer.roles.model.get_base_model()
    frozen = sum(p.numel() for name, p in base.named_parameters() if "lora_" not in name)
    adapter = sum(p.numel() for name, p in base.named_parameters() if ".default." in name)
    assert list(table) == ["role", "base, shared", "policy", "reference", "critic", "reward_0", "gradients, Adam"]
    assert table["base, shared"][:2] == [f"{frozen:,}", "0"]
    assert table["policy"][:2] == [f"{adapter:,}", f"{adapter:,}"]
    assert table["reference"][:2] == [f"{adapter:,}", "0"]
    assert table["critic"][:2] == [f"{adapter + 64:,}", f"{adapter + 64:,}"]
    assert table["reward_0"][:2] == [f"{adapter + 64:,}", "0"]
    assert table["gradients, Adam"] == [f"{3 * 4 * (2 * adapter + 64) / 2**20:.1f}"]
