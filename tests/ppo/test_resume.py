"""A run that was stopped continues as if it had not been: after any step, and after being killed at any moment."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from rlhf_recipes.checkpoints import check_output_dir
from rlhf_recipes.shaping import transforms_state
from tests.ppo import kill_worker
from tests.ppo.support import logged, trained

EVERYTHING = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,  # two minibatches
    "num_iterations": 2,  # two epochs: four steps for each rollout
    "max_steps": 9,
    "kl_placement": "loss",
    "kl_controller": "adaptive",
    "kl_target": 0.01,
    "kl_horizon": 16,
    "score_scaling": "running",
    "use_adaptive_entropy": True,
    "entropy_coef": 0.01,
    "entropy_target": 3.45,
    "critic_warmup_steps": 2,
    "ptx_coef": 0.3,
    "ptx_batch_size": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "lr_scheduler_type": "linear",
}


def watched(trainer):
    """Write down which tokens each micro-batch has."""
    seen, prepare = [], trainer._prepare_inputs

    def prepare_and_note(generation_batch):
        inputs = prepare(generation_batch)
        if trainer.model.training:
            seen.append((trainer._step, inputs["prompt_ids"].tolist(), inputs["completion_ids"].tolist()))
        return inputs

    trainer._prepare_inputs = prepare_and_note
    return seen


def state_of(trainer):
    return {
        "kl_coef": (trainer.kl_coef, trainer.kl_controller.value),
        "transforms": transforms_state(trainer.token_rewards.transforms),
        "updates": trainer.updates.state_dict(),
        "learning rates": trainer.lr_scheduler.get_last_lr(),
    }


@pytest.mark.slow
def test_it_continues_exactly_after_any_step(make_trainer, tiny_texts, tmp_path):
    """C54, with everything that has a state, and evaluations that draw random numbers in between."""
    texts = Dataset.from_list([{"text": text} for text in tiny_texts[:5]])
    fields = {**EVERYTHING, "ptx_dataset": texts}
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(**fields, **saving, output_dir=str(tmp_path / "whole"))
    order = watched(whole)
    whole.train()
    weights, adam = trained(whole), whole.optimizer.state_dict()["state"]
    numbers = ("loss", "grad_norm", "kl", "ppo/approx_kl", "ppo/ptx_loss", "score/total", "learning_rate")
    expected = {name: logged(whole, name) for name in numbers}
    assert len(order) == 18
    assert len(logged(whole, "eval_loss")) == 3
    assert len(set(logged(whole, "kl_coef"))) == 3
    assert [batch[1:] for batch in order[:4]] != [batch[1:] for batch in order[4:8]], "a fresh shuffle in each epoch"
    for step in range(1, 9):  # 8 is the end of a pass over the prompts
        resumed = make_trainer(**fields, output_dir=str(tmp_path / f"from_{step}"))
        order_after = watched(resumed)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert order_after == order[2 * step :], step
        for name, values in expected.items():
            assert logged(resumed, name) == values, (step, name)
        assert logged(resumed, "eval_loss") == logged(whole, "eval_loss"), step
        assert state_of(resumed) == state_of(whole), step
        for name, weight in trained(resumed).items():
            assert torch.equal(weight, weights[name]), (step, name)
        for number, moments in resumed.optimizer.state_dict()["state"].items():
            assert torch.equal(moments["exp_avg_sq"], adam[number]["exp_avg_sq"]), (step, number)


def test_a_stop_and_a_dropped_update_are_resumed_too(make_trainer, tmp_path):
    """The rest of a rollout that `target_kl` left out stays left out after a resume."""
    fields = {**EVERYTHING, "ptx_coef": 0.0, "ptx_batch_size": None, "critic_warmup_steps": 0, "target_kl": 1e-7}
    whole = make_trainer(**fields, save_strategy="steps", save_steps=1, output_dir=str(tmp_path / "whole"))
    whole.train()
    states = [json.loads((tmp_path / "whole" / f"checkpoint-{k}" / "ppo_state.json").read_text()) for k in (1, 2, 5)]
    assert [state["updates"]["stopped"] for state in states] == [False, True, False]
    resumed = make_trainer(**fields, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed, "loss") == logged(whole, "loss")
    for name, weight in trained(resumed).items():
        assert torch.equal(weight, trained(whole)[name]), name


def lines(journal, event):
    found = [line.split() for line in journal.read_text().splitlines()] if journal.exists() else []
    return [int(step) for name, step in found if name == event]


def wait_for_the_moment(process, run, journal, folders, saves_before, files, pause):
    """Wait until so many files of a new checkpoint are there (or, without a number, a moment after one is whole)."""
    patience, resumed_at = time.monotonic() + 60, None
    while process.is_alive() and time.monotonic() < patience:
        if files is not None:
            new = set(run.glob("checkpoint-*")) - folders
            if sum(len(list(folder.rglob("*.*"))) for folder in new) > files:
                return
        elif saves := len(lines(journal, "saved")) - saves_before:  # else a slow disk might never have a whole one
            resumed_at = resumed_at or time.monotonic()
            # A fast machine makes all its steps in the pause: three are enough
            if saves >= 3 or time.monotonic() - resumed_at > pause:
                return
        time.sleep(0.0005)


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_ends_like_one_that_is_not(sft_adapter, reward_adapter, tmp_path):
    """SIGKILL at random moments, half of them while a checkpoint is written, costs the work since the last save."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ppo.kill_worker"])  # so that each start takes a second, not ten
    adapters = (str(sft_adapter), str(reward_adapter))
    calm, run, journal = tmp_path / "calm", tmp_path / "run", tmp_path / "journal"

    def start(folder, log, resume):
        process = context.Process(target=kill_worker.train, args=(str(folder), str(log), *adapters, resume))
        process.start()
        return process

    process = start(calm, tmp_path / "calm_journal", None)
    process.join(300)
    assert process.exitcode == 0
    chance, while_saving = random.Random(0), 0
    for kill in range(10):
        resume = None
        if any(run.glob("checkpoint-*/trainer_state.json")):
            resume = "true"
        else:
            shutil.rmtree(run, ignore_errors=True)
        saves_before, folders = len(lines(journal, "saved")), set(run.glob("checkpoint-*"))
        process = start(run, journal, resume)
        files = chance.randrange(8) if kill % 2 else None
        wait_for_the_moment(process, run, journal, folders, saves_before, files, chance.uniform(0.0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed"
        broken = [path for path in run.glob("checkpoint-*") if not complete(path)]
        while_saving += bool(broken)
        if lines(journal, "saved"):
            found = check_output_dir(kill_worker.config(str(run), "true"))
            assert int(Path(found).name.partition("-")[2]) >= lines(journal, "stepped")[-1] - 1
            assert int(Path(found).name.partition("-")[2]) >= max(lines(journal, "saved"))
    assert while_saving >= 2, "the test needs kills in the middle of saving"
    process = start(run, journal, "true")
    process.join(300)
    assert process.exitcode == 0
    assert lines(journal, "stepped")[-1] == kill_worker.STEPS
    for folder in (".", "critic", "ema"):
        file = f"final/{folder}/adapter_model.safetensors"
        expected, found = load_file(calm / file), load_file(run / file)
        for name, weight in expected.items():
            assert torch.equal(found[name], weight), name
    states = [
        json.loads((path / f"checkpoint-{kill_worker.STEPS}" / "trainer_state.json").read_text())
        for path in (calm, run)
    ]
    assert [entry["loss"] for entry in states[1]["log_history"]] == [
        entry["loss"] for entry in states[0]["log_history"]
    ]
    assert len([path for path in run.glob("checkpoint-*") if complete(path)]) >= 2


def complete(checkpoint):
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    except (OSError, ValueError):
        return False
