"""Streams of prompts: the same rollouts as from a data set, on to the right rows after a resume, clear errors."""

import pytest
import torch
from datasets import Dataset

from tests.ppo.support import logged, trained, without_chance
from tests.ppo.test_resume import watched


@pytest.mark.slow
def test_each_prompt_comes_as_often_as_from_a_data_set(make_trainer, prompts):
    fields = {"num_generations": 2, "shuffle_dataset": False, "max_steps": 6}
    orders = []
    for rows in (prompts, prompts.to_iterable_dataset()):
        trainer = without_chance(make_trainer(dataset=rows, **fields))
        orders.append(watched(trainer))
        trainer.train()
        assert trainer.state.global_step == 6
        evaluated = trainer.evaluate(rows)
        assert evaluated["eval_kl"] == evaluated["eval_kl"]
    assert orders[0] == orders[1]


@pytest.mark.slow
def test_a_resumed_run_goes_on_at_the_right_rows(make_trainer, prompts, tmp_path):
    """After a step within a rollout, one between two, and one after the stream has ended twice."""
    rows = prompts.select(range(12)).to_iterable_dataset()
    fields = {"dataset": rows, "max_steps": 7, "per_device_train_batch_size": 2, "steps_per_generation": 4}
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(**fields, **saving, output_dir=str(tmp_path / "whole"))
    order = watched(whole)
    whole.train()
    for step in (1, 6):
        resumed = make_trainer(**fields, output_dir=str(tmp_path / f"from_{step}"))
        after = watched(resumed)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert after == order[2 * step :]
        assert logged(resumed, "loss") == logged(whole, "loss")
        for name, weight in trained(resumed).items():
            assert torch.equal(weight, trained(whole)[name]), (step, name)


def test_what_a_stream_cannot_do_is_said(make_trainer, prompts):
    rows = prompts.to_iterable_dataset()
    with pytest.raises(ValueError, match="`train_dataset` is a stream, and its length is not known. Set `max_steps`"):
        make_trainer(dataset=rows, max_steps=-1)
    with pytest.raises(ValueError, match="`save_strategy` is 'epoch', but a stream .* has no epochs"):
        make_trainer(dataset=rows, save_strategy="epoch")


def test_a_bad_row_stops_the_run_by_its_number(make_trainer, prompts):
    rows = Dataset.from_list([*prompts.select(range(10)), {"prompt": ""}, *prompts]).to_iterable_dataset()
    with pytest.raises(ValueError, match="`train_dataset`: the prompt of row 10 has no token"):
        make_trainer(dataset=rows, shuffle_dataset=False).train()
