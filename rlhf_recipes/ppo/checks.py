"""Checks of what must hold before and in training, each with a clear error."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_recipes.models.adapters import base_name
from rlhf_recipes.ppo.functional import masked_mean
from rlhf_recipes.rewards.record import COLUMN
from rlhf_recipes.shaping import looks_like_per_token

if TYPE_CHECKING:
    from rlhf_recipes.ppo.config import PPOConfig

logger = logging.getLogger(__name__)


def check_optimizer(policy: nn.Module, optimizer: Any, args: PPOConfig) -> None:
    """Check that an optimizer that was given holds all that is trained, the critic's weights too.

    Raises:
        ValueError: If it leaves a weight out, which would silently stay as it is, or `args` has a learning rate that
            it does not follow.
    """
    if args.critic_learning_rate is not None:
        raise ValueError(
            "`critic_learning_rate` has no effect on an optimizer that is given. Remove it, and give the critic's "
            "parameters a group of their own."
        )
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    left = [name for name, parameter in policy.named_parameters() if parameter.requires_grad and parameter not in held]
    if left:
        raise ValueError(
            f"The given optimizer leaves out {len(left)} weights that are trained, {left[-1]!r} among them. The "
            "trainer makes the critic's when it is built, so set the optimizer after that: `trainer.optimizer = "
            "Optimizer([p for p in trainer.model.parameters() if p.requires_grad], ...)`."
        )


def check_arguments(
    args: PPOConfig, placement: Any, potential: Any, ptx_dataset: Any, reference_adapter: Any = None
) -> None:
    """Check what the trainer gets beside the configuration against it.

    Raises:
        TypeError: If `placement` or `potential` is no function.
        ValueError: With the names and the fix.
    """
    for name, function in (("placement", placement), ("potential", potential)):
        if function is not None and not callable(function):
            raise TypeError(
                f"`{name}` must be a function, got {function!r}. Words are for `PPOConfig.reward_placement`."
            )
    if potential is not None and args.truncate_tokens is not None:
        raise ValueError(
            "A `potential` has a number for each token that was sampled, but `truncate_tokens` cuts what functions "
            "read of a completion. Remove one of the two."
        )
    bandit = args.advantage_estimator == "bandit"
    if bandit and (placement is not None or potential is not None):
        raise ValueError(
            "`advantage_estimator: bandit` takes a completion as one action: it has no use for `placement` or "
            "`potential`. Remove them, or set the estimator to `gae`."
        )
    if placement is not None and args.reward_placement != "terminal":
        raise ValueError(
            f"Both `placement` and `reward_placement: {args.reward_placement}` place the score. Give only one."
        )
    if (ptx_dataset is not None) != (args.ptx_coef > 0.0):
        raise ValueError(
            f"`ptx_coef` is {args.ptx_coef}, and `ptx_dataset` is {'missing' if ptx_dataset is None else 'given'}. "
            "PPO-ptx needs both."
        )
    if args.subtract_reference_mean and reference_adapter is not None:
        raise ValueError(
            "`subtract_reference_mean` takes the first rollout for the reference's, but the policy does not start as "
            "its reference where `reference_adapter` (in a recipe: `policy_adapter`) is given. Remove one of the two, "
            "or normalise the reward model itself (recipes/normalize_reward.py)."
        )


def check_not_sharded(trainer: Any) -> None:
    """Refuse a run whose model is spread over processes.

    Raises:
        ValueError: With what is supported.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            f"{type(trainer).__name__} runs on one process or under DDP; DeepSpeed and FSDP are not supported. Launch "
            "with recipes/accelerate/ddp.yaml."
        )


def check_per_token(args: PPOConfig, name: str) -> None:
    """Refuse rewards per token where a completion is one action, or is judged without some of its tokens.

    Raises:
        ValueError: With the name of the reward function.
    """
    if args.truncate_tokens is not None:
        raise ValueError(
            f"The reward function {name!r} returned rewards per token, but `truncate_tokens` cuts what it reads, so "
            "they are not those of the tokens that were sampled. Return one number per completion, or remove it."
        )
    if args.advantage_estimator == "bandit":
        raise ValueError(
            f"The reward function {name!r} returned rewards per token, but `advantage_estimator: bandit` takes a "
            "completion as one action. Return one number per completion, or set the estimator to `gae`."
        )


def potentials_of(
    function: Callable[..., Any],
    rows: list[dict[str, Any]],
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
) -> list[Any]:
    """Call a potential function as reward functions are called, and check what it returns.

    Args:
        function: The function.
        rows: The rows of the prompts, whose other columns it gets, too.
        prompts: `B` prompts.
        completions: Their completions.
        completion_ids: The completions' token ids.

    Returns:
        For each completion one potential per token.

    Raises:
        ValueError: If it returned something else.
    """
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", COLUMN)}
    potentials: list[Any] = function(
        prompts=prompts, completions=completions, completion_ids=completion_ids, **columns
    )
    check_potentials(potentials, completion_ids)
    return potentials


def check_potentials(potentials: Any, completion_ids: Sequence[Sequence[int]]) -> None:
    """Check that a potential function returned one finite number per token.

    Raises:
        ValueError: If it did not.
    """
    if not isinstance(potentials, Sequence) or len(potentials) != len(completion_ids):
        raise ValueError(
            f"`potential` must return {len(completion_ids)} lists, one per completion, got {potentials!r}."
        )
    for index, (row, ids) in enumerate(zip(potentials, completion_ids, strict=True)):
        try:
            numbers = [float(value) for value in row]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != len(ids) or not all(map(math.isfinite, numbers)):
            raise ValueError(
                f"`potential` must return {len(ids)} finite numbers for completion {index}, one for the text before "
                f"each token; it returned {row!r}."
            )


def check_finite(what: str, value: Tensor, batch: dict[str, Tensor], output_dir: str | None, rank: int) -> None:
    """Stop the run at a loss or gradient that is not finite, before it ruins the weights, and keep its batch.

    Args:
        what: What it is, for the message.
        value: The loss of a micro-batch, or the norm of a step's gradient.
        batch: The batch that gave it.
        output_dir: The run's folder; the batch goes to `nonfinite_batch_<rank>.safetensors`.
        rank: Number of this process.

    Raises:
        FloatingPointError: If it is NaN or infinite.
    """
    if torch.isfinite(value):
        return
    path = Path(output_dir or ".") / f"nonfinite_batch_{rank}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Copies, because safetensors refuses tensors that share memory, as two masks may
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in batch.items()}, path)
    infected = [name for name, value in batch.items() if value.is_floating_point() and not value.isfinite().all()]
    where = f"The batch already holds such numbers in {infected}" if infected else "The batch itself is finite"
    raise FloatingPointError(
        f"The {what} is {value.item()}. {where}; it is saved in {path}. A lower `learning_rate`, `max_grad_norm`, or "
        "float32 in place of half precision often helps. The last checkpoint is from before this step."
    )


def check_one_base(model: nn.Module, others: Iterable[Any]) -> None:
    """Check that no second copy of the policy's base model is in memory.

    Args:
        model: The policy.
        others: Reward functions, of which some may be models. A reward model with another base is allowed.

    Raises:
        ValueError: If a reward model is a second copy of the base.
    """
    base = base_name(model)
    for other in others:
        if isinstance(other, nn.Module) and base_name(other) == base:
            raise ValueError(
                f"A reward model is loaded as a second copy of the policy's base {base!r}. Give the folder of its "
                "adapter as the reward function instead: it is then put on the base that is already in memory."
            )


def check_same_distribution(
    logps: Tensor, other: Tensor, mask: Tensor, half_precision: bool, what: str, cause: str
) -> None:
    """Check that two networks that must be the same give the same log-probabilities.

    Args:
        logps: Log-probabilities of the completion tokens in nats, shape `(B, T)`.
        other: The same from the other network, shape `(B, T)`.
        mask: 1 = counts, shape `(B, T)`.
        half_precision: Whether the networks compute in 16 bits: then the padding beside a row moves its numbers.
        what: What is compared, for the message.
        cause: Where to look, for the message.

    Raises:
        RuntimeError: If they differ by more than rounding: 1e-4 nats per token in float32, 0.02 in half precision.
    """
    tolerance = 2e-2 if half_precision else 1e-4
    difference = masked_mean((logps - other).abs().detach(), mask).item()
    if not difference <= tolerance:
        raise RuntimeError(
            f"Before the first update {what}, but the log-probabilities differ by {difference:.2g} nats per token "
            f"(allowed: {tolerance:.0e}). {cause}"
        )


def check_reference(logps: Tensor, ref_logps: Tensor, mask: Tensor, half_precision: bool) -> None:
    """Check that the policy equals its reference, as `check_same_distribution` does."""
    what = "the policy must equal its reference"
    cause = "The policy's adapter changed after the reference was copied from it, or the base did."
    check_same_distribution(logps, ref_logps, mask, half_precision, what, cause)


def check_first_ratios(logps: Tensor, old_logps: Tensor, mask: Tensor, half_precision: bool) -> None:
    """Check that the new policy equals the old one, as `check_same_distribution` does."""
    what = "every ratio of new to old policy must be 1"
    cause = "Dropout, or a layer that computes differently in training and in evaluation, is on."
    check_same_distribution(logps, old_logps, mask, half_precision, what, cause)


def check_rewards(rewards_per_func: Tensor, names: Sequence[str]) -> None:
    """Check that every completion got a reward from at least one function.

    Args:
        rewards_per_func: Rewards, NaN where a function returned `None`, shape `(B, functions)`.
        names: Names of the functions.

    Raises:
        ValueError: If all functions returned `None` for a completion.
    """
    missing = rewards_per_func.isnan().all(dim=1).nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"Every reward function ({', '.join(names)}) returned None for completion {missing[0]} and "
            f"{len(missing) - 1} more of {len(rewards_per_func)}. At least one must return a number."
        )


def warn_of_kl_unit(args: PPOConfig, kl: float, per_token: float) -> bool:
    """Say that `kl_target` fits the KL of a token, where it is compared with that of a completion.

    Args:
        args: The configuration.
        kl: KL of a rollout in nats per completion.
        per_token: The same per token.

    Returns:
        Whether it was said.
    """
    adaptive = args.kl_controller == "adaptive" and args.kl_target_per == "completion"
    if not (adaptive and looks_like_per_token(args.kl_target, kl, per_token)):
        return False
    logger.warning(
        "`kl_target` is %g nats per completion, but completions are %.3g nats from the reference, %.3g for each of "
        "their tokens. If it was meant for a token, set `kl_target_per: token`, or multiply it with the usual length; "
        "else `kl_coef` goes on rising until completions as a whole are that near.",
        *(args.kl_target, kl, per_token),
    )
    return True


def check_on_tokens(placed: Tensor, mask: Tensor) -> None:
    """Check what a placement returned: one reward per token, and none where no token counts.

    Args:
        placed: Token rewards.
        mask: 1 where a token counts, shape `(B, T)`.

    Raises:
        ValueError: If the shape is another one, or a completion's reward would be lost on padding.
    """
    if placed.shape != mask.shape:
        raise ValueError(
            f"The placement returned token rewards of shape {tuple(placed.shape)}; expected (B, T) = "
            f"{tuple(mask.shape)}, one for each completion token."
        )
    lost = (placed.nan_to_num(0.0) != 0.0) & ~mask.bool() & mask.bool().any(dim=1, keepdim=True)
    if lost.any():
        row, place = lost.nonzero()[0].tolist()
        raise ValueError(
            f"The placement put {placed[row, place].item():.4g} on position {place} of completion {row}, where no "
            f"token counts: its {int(mask[row].sum())} tokens are those with a 1 in `mask`. Place rewards on them "
            "only, for example by multiplying with `mask`."
        )


def check_critic(args: PPOConfig, reward_role: str | None, model: Any) -> None:
    """Check that there is what the critic is to start from, and that the options have a meaning for it.

    Args:
        args: The configuration.
        reward_role: The reward adapter to start from, if there is one.
        model: What was given as `critic_model`.

    Raises:
        ValueError: If it is missing, or something has no meaning.
    """
    if model is None and args.critic == "model":
        raise ValueError("`critic` is 'model', and `critic_model` is missing. Give it, or take another `critic`.")
    if model is not None and args.critic != "model":
        _check_goes_on(args, model)
    if args.critic_layers is not None and args.critic != "adapter":
        raise ValueError(f"`critic_layers` is about the critic's adapter, but `critic` is {args.critic!r}. Remove it.")
    if args.critic_init == "reward" and args.critic == "adapter" and reward_role is None:
        raise ValueError(
            "`critic_init` is 'reward', but no reward adapter is among `reward_funcs` to start the critic from. Give "
            "the folder of a reward adapter as a reward function, or leave `critic_init` out: then it starts from the "
            "policy."
        )


def _check_goes_on(args: PPOConfig, folder: Any) -> None:
    if not isinstance(folder, str | Path) or not Path(folder).is_dir():
        raise ValueError(
            f"With `critic: {args.critic}`, `critic_model` is the folder `critic` of an earlier PPO run, whose critic "
            f"goes on; {folder!r} is no folder. Give one, remove it, or set `critic: model` for a model of its own."
        )
    if args.critic_init is not None:
        raise ValueError(
            f"`critic_init` is {args.critic_init!r}, and `critic_model` names a critic that goes on. Remove one."
        )


def check_classifier(model: Any, vocabulary: int) -> None:
    """Check that a model can be a critic: a decoder with one output at each position, which knows all tokens.

    Args:
        model: The model.
        vocabulary: Token ids that the policy's embeddings know.

    Raises:
        ValueError: If it cannot.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ValueError(
            f"`critic_model` is a {type(model).__name__}, which has no score head of one output that reads each "
            "position. Give a decoder with `AutoModelForSequenceClassification` and `num_labels=1`."
        )
    known = model.get_input_embeddings().weight.size(0)
    if known < vocabulary:
        raise ValueError(
            f"The embeddings of `critic_model` end at {known - 1}, and those of the policy, whose tokens it reads,"
            f" at {vocabulary - 1}. Give a critic with the policy's tokenizer, or call "
            f"`resize_token_embeddings({vocabulary})`."
        )
