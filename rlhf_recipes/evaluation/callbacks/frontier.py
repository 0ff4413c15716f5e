"""The frontier of reward and gold score against the distance to the reference, kept on disk while a run trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback

from rlhf_recipes.evaluation.records import write_records
from rlhf_recipes.statistics.frontier import frontier
from rlhf_recipes.tracking.wandb_log import define_axis, log_row

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class FrontierTracker(TrainerCallback):
    """Write `frontier.json`: reward and gold score against `sqrt(KL)`, the axes of Gao et al., after each log.

    Two curves: `training` from the logged rollouts, and `evaluation` from what `PolicyEvaluation` logs, if it is on.
    Each has `points` and, from 8 points on, `fits` of the paper's law, whose `peak` is the distance at which the
    fitted score is highest: a gold score with a peak behind the run says that it went too far.

    The file is made of the log history alone, so a run that is resumed, or a finished one
    (`rlhf_recipes.statistics.frontier.frontier`), gives the same.

    In W&B the points are `frontier/reward` and `frontier/gold` against `frontier/distance`, and the same with
    `frontier_eval/` for the evaluation.

    Source: https://huggingface.co/papers/2210.10760, figure 1.

    Args:
        trainer: A trainer that logs a KL per completion: `PPOTrainer`, `GRPOAdapterTrainer`, `RLOOAdapterTrainer`.
            (TRL's own GRPO logs a mean over tokens, whose root is on another axis.)
        gold: Name of the reward function that measures the truth.
        kl: Key of the KL in the logs.

    Example:
        >>> trainer.add_callback(FrontierTracker(trainer, gold="gold_score"))  # doctest: +SKIP
    """

    def __init__(self, trainer: Trainer, gold: str | None = None, kl: str = "kl") -> None:
        self._trainer = trainer
        gold_key = {} if gold is None else {"gold": f"rewards/{gold}/mean"}
        held_out = {"reward": "eval_policy/reward_score", "gold": "eval_policy/gold_score"}
        # Name of the curve in the file, in W&B, the key of its KL and those of its scores
        self._curves = (
            ("training", "frontier", kl, {"reward": "reward", **gold_key}),
            ("evaluation", "frontier_eval", "eval_policy/kl", held_out),
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell W&B what the horizontal axis is."""
        for _, prefix, _, scores in self._curves:
            define_axis(self._trainer, f"{prefix}/distance", [f"{prefix}/{name}" for name in scores])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the file anew, and send the new point to W&B."""
        if not state.is_world_process_zero:
            return
        curves = {name: frontier(state.log_history, kl, scores) for name, _, kl, scores in self._curves}
        write_records(Path(str(self._trainer.args.output_dir)) / "frontier.json", curves)
        for _, prefix, kl, scores in self._curves:
            for point in frontier([{"step": state.global_step, **(logs or {})}], kl, scores)["points"]:
                shown = {key: value for key, value in point.items() if key not in ("step", "kl")}
                log_row(self._trainer, {f"{prefix}/{key}": value for key, value in shown.items()})
