"""A run that is over and is started again trains no further step, and is evaluated only if it was not."""

import pytest
import torch
from safetensors.torch import load_file

from rlhf_recipes.config import parse_stage

ROWS = [
    {"prompt": f"{start} film was ", "completion": "good", "chosen": "good", "rejected": end}
    for start in ("the", "a", "this", "that")
    for end in ("bad", "dull", "slow", "cold", "dark", "sad")
]
COLUMNS = {"sft": ("prompt", "completion"), "reward": ("prompt", "chosen", "rejected")}


@pytest.mark.parametrize("stage", COLUMNS)
def test_a_finished_stage_is_left_as_it_is(run_stage, load_stage, write_rows, stage):
    """Two steps end within a pass over the rows, where transformers would make a third."""
    rows = write_rows([{column: row[column] for column in COLUMNS[stage]} for row in ROWS])
    options = {"dataset_name": rows, "save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": True}
    options["max_steps"] = 2
    first = run_stage(stage, **{**options, "resume_from_checkpoint": False})
    weights = load_file(first.folder / "adapter_model.safetensors")
    (first.folder / "evaluation.json").unlink()  # killed before it was evaluated
    again = run_stage(stage, **options)
    assert again.trainer.state.global_step == 2
    numbers = [{name: x for name, x in run.evaluation.items() if isinstance(x, float)} for run in (again, first)]
    assert numbers[0] == pytest.approx(numbers[1])
    for name, weight in load_file(again.folder / "adapter_model.safetensors").items():
        assert torch.equal(weight, weights[name]), name

    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    argv = {
        "model_name_or_path": "no/such/model",
        "output_dir": first.folder,
        "use_cpu": True,
        "bf16": False,
        **options,
    }
    module = load_stage(stage)
    module.main(
        *parse_stage(module.ARGUMENTS, [str(part) for name, value in argv.items() for part in (f"--{name}", value)])
    )
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before
