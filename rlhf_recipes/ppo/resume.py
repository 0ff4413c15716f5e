"""Compare the settings of a resumed run with those of its checkpoint, and decide what becomes of each difference."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR
from trl.trainer.utils import split_tensor_dict

from rlhf_recipes.ppo.rollout import join

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rlhf_recipes.ppo.config import PPOConfig
    from rlhf_recipes.ppo.rollout import Batch

logger = logging.getLogger(__name__)

# What a rollout is cut into, all of which may change as long as rollouts, and the steps on them, stay the same.
_SIZES = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size"),
    *("num_generations", "num_iterations", "processes"),
)
_ORDER = "the prompts would come in another order"
_OPTIMIZER = "the checkpoint holds the state of another optimizer"
_CRITIC = "the checkpoint holds another critic"
_MOMENTS = "the checkpoint holds the moments of other scores"
_REFUSED = {
    "seed": _ORDER,
    "shuffle_dataset": _ORDER,
    **dict.fromkeys(("optim", "optim_args", "optim_target_modules", "tensorflow_adam"), _OPTIMIZER),
    **dict.fromkeys(("critic", "critic_layers"), _CRITIC),
    **dict.fromkeys(("score_scaling", "subtract_reference_mean"), _MOMENTS),
}
_OTHER_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")  # with a state of their own
# What the tensors of a rollout are made for.
_OF_A_ROLLOUT = ("kl_placement", "kl_estimator", "kl_anchor", "loss_aggregation", "advantage_estimator")
_NEXT_ROLLOUT = (
    *("temperature", "max_completion_length", "mask_truncated_completions", "generation_kwargs"),
    *("chat_template_kwargs", "reward_weights", "reward_placement", "placement_gamma", "attention_weight"),
    *("truncate_tokens", "truncate_after", "score_clip", "missing_eos_penalty", "missing_eos_mode"),
    *("length_penalty", "overlong_buffer", "overlong_penalty", "ngram_penalty", "gamma", "gae_lambda"),
    *("gae_lambda_alpha", "critic_lambda", "whiten_rewards", "whiten_advantages"),
    *("use_vllm", "vllm_mode", "vllm_tolerance"),
    *(f"vllm_importance_sampling_{name}" for name in ("correction", "mode", "clip_max", "clip_min")),
    *("whiten_unbiased", "kl_coef", "kl_controller", "kl_target", "kl_target_per", "kl_horizon"),
)
_RATES = ("learning_rate", "critic_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
_ADAM = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_NEXT_STEP = (
    *(*_RATES, *_ADAM, "max_grad_norm", "bf16", "fp16", "epsilon", "epsilon_high", "delta", "entropy_coef"),
    *(
        "disable_dropout",
        "use_adaptive_entropy",
        "entropy_target",
        "entropy_coef_delta",
        "entropy_coef_min",
        "entropy_coef_max",
    ),
    *("importance_sampling_level", "target_kl", "ratio_threshold", "vf_coef", "value_clip"),
    *("ptx_coef", "ptx_batch_size", "ptx_max_length", "ema_decay"),
)
_AT_THE_START = ("critic_init", "critic_warmup_steps", "critic_warmup_explained_variance")
_LENGTH = ("max_steps", "num_train_epochs")  # it is usual to go on for longer, so that nothing is said of it
_AT_LOADING = ("adapter_tolerance",)  # held where the adapters are loaded, before the checkpoint is
OF_THE_OPTIMIZER = (*_RATES, *_ADAM, *_LENGTH)
_TRACKED = (*_LENGTH, *_SIZES, *_REFUSED, *_OF_A_ROLLOUT, *_NEXT_ROLLOUT, *_NEXT_STEP, *_AT_THE_START, *_AT_LOADING)


def settings_of(args: PPOConfig, processes: int) -> dict[str, Any]:
    """The settings that a checkpoint keeps, as JSON has them."""
    known = json.loads(json.dumps(args.to_dict(), default=str)) | {"processes": processes}
    return {name: known[name] for name in _TRACKED}


def critic_rate(critic_learning_rate: float | None, learning_rate: float) -> float:
    """Peak learning rate of the critic, its own or ten times the policy's, because it has to follow one that moves."""
    return critic_learning_rate or 10.0 * learning_rate


def changed_settings(
    old: dict[str, Any], new: dict[str, Any], within_rollout: bool, warming_up: bool
) -> dict[str, list[str]]:
    """Find the settings that differ from the checkpoint's, and refuse those with which the run cannot go on.

    Args:
        old: The checkpoint's.
        new: The run's.
        within_rollout: Whether the checkpoint was made in the middle of a rollout.
        warming_up: Whether it was made while only the critic was trained.

    Returns:
        The names of those that differ, by what becomes of them.

    Raises:
        ValueError: If the run could not go on where the other one stopped.
    """
    changed = [name for name in _TRACKED if name in old and old[name] != new[name]]
    refused = {name: reason for name, reason in _REFUSED.items() if name in changed}
    sizes = [name for name in _SIZES if name in changed]
    if sizes and (_rollout(old) != _rollout(new) or (within_rollout and "processes" in changed)):
        reason = "rollouts, and the steps on them, would no longer be those of the run that is resumed"
        refused |= dict.fromkeys(sizes, reason)
    if "lr_scheduler_type" in changed and {old["lr_scheduler_type"], new["lr_scheduler_type"]} & {*_OTHER_SCHEDULERS}:
        refused["lr_scheduler_type"] = "the checkpoint holds the state of another scheduler"
    if within_rollout:
        made_for = (
            "the checkpoint lies within a rollout that was made for the other one: take one between two rollouts"
        )
        refused |= {name: made_for for name in _OF_A_ROLLOUT if name in changed}
    if refused:
        name, reason = next(iter(refused.items()))
        raise ValueError(
            f"This run cannot be resumed with {differences(refused, old, new)}: {reason}. Resume with the "
            f"checkpoint's `{name}`, or start a new run from its policy, which `model` takes."
        )
    without = [name for name in changed if name in _AT_THE_START]
    if warming_up:
        without = [name for name in without if name == "critic_init"]
    if new["kl_controller"] == "adaptive" == old["kl_controller"]:
        without += [name for name in changed if name == "kl_coef"]
    if new["use_adaptive_entropy"]:
        without += [name for name in changed if name == "entropy_coef"]
    later = [name for name in changed if name in (*_NEXT_ROLLOUT, *_OF_A_ROLLOUT, *_AT_THE_START)]
    consequences = {
        "which holds from the next step on": [name for name in changed if name in _NEXT_STEP],
        "which holds from the next rollout on": later,
        "without effect: it is read at the start only": without,
    }
    consequences = {
        what: [name for name in names if names is without or name not in without]
        for what, names in consequences.items()
    }
    return {what: names for what, names in consequences.items() if names}


def both_settings(state: dict[str, Any], ours: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a checkpoint's state, and those of this run; an earlier version's has none, or fewer."""
    return ours | state.get("settings", {}), ours


def check_settings(
    folder: str, state: dict[str, Any], rollout: list[Batch] | None, ours: dict[str, Any], rank: int
) -> None:
    """Say what becomes of the settings that differ from a checkpoint's, or refuse them.

    Args:
        folder: Folder of the checkpoint.
        state: Its state.
        rollout: The micro-batches of this process's rollout in it.
        ours: The settings of this run.
        rank: Number of this process.

    Raises:
        ValueError: If the run could not go on where the other one stopped.
        FileNotFoundError: If the process's part of the rollout is missing.
    """
    old, new = both_settings(state, ours)
    within_rollout = state["step"] % (int(old["steps_per_generation"]) * int(old["num_iterations"])) != 0
    changed = changed_settings(old, new, within_rollout, state["updates"]["warming_up"])
    if rank == 0:
        for what, names in changed.items():
            logger.warning("The run is resumed with %s, %s.", differences(names, old, new), what)
    if within_rollout and rollout is None:
        raise FileNotFoundError(
            f"{folder!r} was saved within a rollout, but the rollout of process {rank} is not in it. Resume from an "
            "earlier checkpoint, with as many processes as it was saved by."
        )


def recut(
    rollout: list[Batch] | None, step: int, old: dict[str, Any], new: dict[str, Any]
) -> tuple[list[Batch] | None, int]:
    """Cut a rollout into micro-batches of another size, with the same rows in each optimizer step.

    Args:
        rollout: The micro-batches of one process, in their order; `None` between two rollouts.
        step: Micro-batches so far.
        old: The settings with which they were cut.
        new: Those with which to cut them.

    Returns:
        The micro-batches, and how many there would have been so far.
    """
    step = step // int(old["gradient_accumulation_steps"]) * int(new["gradient_accumulation_steps"])
    if rollout is None:
        return None, step
    rows: Any = join(rollout)
    cut: Any = split_tensor_dict(rows, int(new["steps_per_generation"]))
    return cut, step


def follow_rates(
    optimizer: Any, scheduler: Any, of_critic: list[bool], fresh: list[dict[str, Any]], old: dict[str, Any], new: Any
) -> None:
    """Let an optimizer and a schedule that were loaded go on with the rates and Adam's numbers of the run's settings.

    What was done to the rates meanwhile, such as the alarm's halving, stays.

    Args:
        optimizer: The optimizer, with the checkpoint's state.
        scheduler: The scheduler, with the checkpoint's state.
        of_critic: For each parameter group whether it is the critic's.
        fresh: For each parameter group its options before the checkpoint's were loaded.
        old: The checkpoint's settings.
        new: The run's.
    """
    for index, group in enumerate(optimizer.param_groups):
        before, now = (
            critic_rate(each["critic_learning_rate"], each["learning_rate"])
            if of_critic[index]
            else each["learning_rate"]
            for each in (old, new)
        )
        base, rate = (value * now / before if before else now for value in (scheduler.base_lrs[index], group["lr"]))
        if isinstance(scheduler, LambdaLR):
            rate = base * scheduler.lr_lambdas[index](scheduler.last_epoch)
        group |= {"lr": rate, "initial_lr": base}
        group |= {name: fresh[index][name] for name in ("weight_decay", "betas", "eps") if name in fresh[index]}
        scheduler.base_lrs[index] = base
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _rollout(settings: dict[str, Any]) -> tuple[int, int, int]:
    """Completions and prompts of a rollout, and optimizer steps on it."""
    completions, generations = int(settings["generation_batch_size"]), int(settings["num_generations"])
    minibatches = int(settings["steps_per_generation"]) // int(settings["gradient_accumulation_steps"])
    return completions, completions // generations, minibatches * int(settings["num_iterations"])


def differences(names: Iterable[str], old: dict[str, Any], new: dict[str, Any]) -> str:
    """Write settings with both of their values."""
    return ", ".join(f"`{name}` {new[name]} (the checkpoint's: {old[name]})" for name in names)
