"""The settings of other libraries run for two steps, and reach the trainer."""

import pytest

LIBRARIES = {
    "trl112": {"whiten_unbiased": True, "delta": None, "kl_coef": 0.05},
    "verl": {"whiten_unbiased": True, "delta": 3.0, "kl_coef": 0.0},
    "openrlhf": {"whiten_unbiased": False, "score_clip": 10.0, "kl_coef": 0.01},
}


@pytest.mark.parametrize(("library", "expected"), LIBRARIES.items())
def test_two_steps(
    run_stage, repo_root, write_rows, tiny_texts, sft_adapter, reward_adapter, tmp_path, library, expected
):
    run = run_stage(
        "ppo",
        config=repo_root / "recipes" / "coming_from" / f"{library}.yaml",
        dataset_name=write_rows([{"prompt": text} for text in tiny_texts]),
        dataset_train_split="train",
        dataset_test_split="train",
        sft_adapter=sft_adapter,
        reward_adapter=reward_adapter,
        gold_score=reward_adapter,
        output_dir=tmp_path / "coming_from" / library,
        per_device_train_batch_size=2,  # a rollout of 16 prompts
        max_completion_length=6,
        logging_steps=1,
        evaluation_rows=4,
    )
    assert run.trainer.state.global_step == 2
    assert {name: getattr(run.trainer.args, name) for name in expected} == expected
    assert run.trainer.kl_controller.value == expected["kl_coef"]
    assert run.evaluation["rows"] == 4
    updates = [line["ppo/updates_made"] for line in run.trainer.state.log_history if "ppo/updates_made" in line]
    assert updates == [1.0, 1.0]
