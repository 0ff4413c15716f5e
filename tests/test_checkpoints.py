"""What happens to an output folder that is not empty."""

import json

import pytest
from transformers import TrainingArguments

from rlhf_recipes.checkpoints import check_output_dir, is_finished


def run_in(folder, resume=None):
    return TrainingArguments(str(folder), resume_from_checkpoint=resume, use_cpu=True)


def checkpoint(folder, step, complete=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").touch()
    if complete:
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


@pytest.mark.parametrize("resume", [None, False, "false", ""])
def test_a_new_or_empty_output_folder_is_fine(tmp_path, resume):
    assert check_output_dir(run_in(tmp_path / "new", resume)) is None
    assert not (tmp_path / "new").exists(), "a check creates nothing"
    assert check_output_dir(run_in(tmp_path, resume)) is None


def test_the_last_complete_checkpoint_is_resumed(tmp_path):
    checkpoint(tmp_path, 9)
    last = checkpoint(tmp_path, 10)  # before 9 in alphabetical order
    checkpoint(tmp_path, 20, complete=False)  # the run was killed while it saved this one
    (checkpoint(tmp_path, 30, complete=False) / "trainer_state.json").write_text('{"epoch": 0.5, "glo')
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / "trainer_state.json").touch()
    for resume in (True, "true", "True", str(last)):
        assert check_output_dir(run_in(tmp_path, resume)) == str(last)
    assert check_output_dir(run_in(tmp_path, str(tmp_path / "checkpoint-9"))) == str(tmp_path / "checkpoint-9")


def test_a_used_output_folder_is_refused_with_the_ways_out(tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(FileExistsError) as caught:
        check_output_dir(run_in(tmp_path))
    assert "`--output_dir`" in str(caught.value)
    assert "remove" in str(caught.value)
    assert "resume" not in str(caught.value), "there is nothing to resume"

    checkpoint(tmp_path, 5)
    for resume in (None, False):
        with pytest.raises(FileExistsError, match="--resume_from_checkpoint true"):
            check_output_dir(run_in(tmp_path, resume))


def test_a_checkpoint_of_another_run_does_not_open_a_used_folder(tmp_path):
    other = checkpoint(tmp_path / "other", 5)
    checkpoint(tmp_path / "mine", 5)
    with pytest.raises(FileExistsError, match="not empty"):
        check_output_dir(run_in(tmp_path / "mine", str(other)))
    assert check_output_dir(run_in(tmp_path / "new", str(other))) == str(other)


def test_nothing_to_resume_is_an_error(tmp_path):
    checkpoint(tmp_path, 5, complete=False)
    for resume in ("true", str(tmp_path / "checkpoint-7")):
        with pytest.raises(FileNotFoundError, match="to resume from"):
            check_output_dir(run_in(tmp_path, resume))


def test_a_process_that_does_not_write_does_not_take_the_writers_files_for_old_ones(tmp_path):
    class Second:
        output_dir, resume_from_checkpoint, should_save = str(tmp_path), None, False

    (tmp_path / "wandb").mkdir()  # made by the first process a moment ago
    assert check_output_dir(Second()) is None
    with pytest.raises(FileExistsError):
        check_output_dir(run_in(tmp_path))


@pytest.mark.parametrize(
    ("state", "fields", "over"),
    [
        ({"global_step": 3, "epoch": 0.7}, {"max_steps": 3}, True),
        ({"global_step": 3, "epoch": 0.7}, {"max_steps": 4}, False),
        ({"global_step": 8, "epoch": 2.0}, {"num_train_epochs": 2}, True),
        ({"global_step": 8, "epoch": 2.0}, {"num_train_epochs": 3}, False),
        ({"global_step": 2, "epoch": 0.5}, {"num_train_epochs": 0.5}, True),
    ],
)
def test_a_run_is_finished_after_its_last_step_and_its_evaluation(tmp_path, state, fields, over):
    path = checkpoint(tmp_path, state["global_step"])
    (path / "trainer_state.json").write_text(json.dumps(state))
    args = TrainingArguments(str(tmp_path), use_cpu=True, **fields)
    assert not is_finished(args, str(path)), "the evaluation is missing"
    (tmp_path / "evaluation.json").write_text("{}")
    assert is_finished(args, str(path)) == over
    assert not is_finished(args, None)


def test_a_checkpoint_of_weights_alone_is_named(tmp_path, caplog):
    path = checkpoint(tmp_path, 5)
    check_output_dir(run_in(tmp_path, "true"))
    assert "checkpoint-5 has no scheduler.pt: saved with `save_only_model`" in caplog.text
    caplog.clear()
    (path / "scheduler.pt").touch()
    check_output_dir(run_in(tmp_path, "true"))
    assert not caplog.text
