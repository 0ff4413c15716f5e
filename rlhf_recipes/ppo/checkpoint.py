"""The part of a checkpoint that TRL's does not hold: where in a rollout the run is, and the state of PPO's controls.

A run that resumes in the middle of the epochs over a rollout continues with that rollout, not with a new one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from rlhf_recipes.data.chat_templates import encode_prompt
from rlhf_recipes.models.adapters import POLICY
from rlhf_recipes.models.resumed import check_same_adapter, fingerprint
from rlhf_recipes.models.roles import CRITIC_MODEL, FROZEN, Roles, is_critic_parameter
from rlhf_recipes.models.sharding import load_whole, whole_weights
from rlhf_recipes.models.trained_on import ROWS, log_probs, save_trained_on
from rlhf_recipes.ppo.resume import (
    OF_THE_OPTIMIZER,
    both_settings,
    check_settings,
    differences,
    follow_rates,
    recut,
    settings_of,
)
from rlhf_recipes.ppo.vllm.engine import SamplingStopped
from rlhf_recipes.shaping import load_transforms_state, transforms_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase, TrainerState, TrainingArguments

    from rlhf_recipes.ppo.config import PPOConfig
    from rlhf_recipes.ppo.critics import Critic
    from rlhf_recipes.ppo.ema import PolicyAverage
    from rlhf_recipes.ppo.token_rewards import TokenRewards
    from rlhf_recipes.ppo.updates import UpdateControl
    from rlhf_recipes.shaping import AdaptiveKLController, FixedKLController

_STATE = "ppo_state.json"
_OF_AN_ADAPTER = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})
_OF_AN_ADAPTER |= {"modules_to_save"}
EMA = "ema"  # folder of the policy with the average of its weights, beside the policy
_NOT_POLICY = (FROZEN, CRITIC_MODEL)  # submodules of a policy that are other roles


def save_ppo_state(
    folder: str | Path, state: dict[str, Any], rollout: list[dict[str, Tensor]] | None, rank: int
) -> None:
    """Write the state of a run into a checkpoint.

    Args:
        folder: Folder of the checkpoint.
        state: What JSON can hold; the main process's is written.
        rollout: The micro-batches of this process's current rollout, or `None` between two rollouts.
        rank: Number of this process.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        (folder / _STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    if rollout is not None:
        tensors = {f"{number}.{name}": value for number, batch in enumerate(rollout) for name, value in batch.items()}
        save_file({name: value.cpu().contiguous().clone() for name, value in tensors.items()}, _rollout(folder, rank))


def load_ppo_state(
    folder: str | Path, rank: int, device: Any
) -> tuple[dict[str, Any], list[dict[str, Tensor]] | None]:
    """Read what `save_ppo_state` wrote.

    Raises:
        FileNotFoundError: If the checkpoint is none of PPO's.
    """
    folder = Path(folder)
    if not (folder / _STATE).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {_STATE}: it is not a complete checkpoint of a PPO run. With `save_only_model` "
            "it lacks optimizer, schedule and rollout. Give the folder as `model` to start a new run from its policy."
        )
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    if not _rollout(folder, rank).is_file():
        return state, None
    batches: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(_rollout(folder, rank)).items():
        number, _, key = name.partition(".")
        batches.setdefault(int(number), {})[key] = value.to(device)
    return state, [batches[number] for number in sorted(batches)]


def _rollout(folder: Path, rank: int) -> Path:
    return folder / f"rollout_{rank}.safetensors"


def reference_fingerprint(policy: Any, roles: Roles, reference: str | None) -> str | None:
    """What tells the reference apart from others; `None` for the bare base of an adapter, which has a name."""
    if policy is not roles.model:
        named = roles.model.get_base_model().named_parameters()
        return fingerprint(value for name, value in named if not _OF_AN_ADAPTER.intersection(name.split(".")))
    if reference is None:
        return None
    weights = get_peft_model_state_dict(roles.model, whole_weights(roles.model), reference)
    return fingerprint(weights[name] for name in sorted(weights))


def policy_alone(policy: Any) -> Any:
    """A fully trained policy without the other roles that its module tree carries: the same weights, not a copy."""
    alone = object.__new__(type(policy))  # `copy` would make FSDP's class anew
    alone.__dict__.update(policy.__dict__)
    alone.__dict__.pop("forward", None)  # TRL's, which would compute with these weights in a deep copy too
    alone.__dict__["_modules"] = {name: child for name, child in policy.named_children() if name not in _NOT_POLICY}
    return alone


class Run(Protocol):
    """What of a trainer a checkpoint holds, or is checked against."""

    args: PPOConfig
    accelerator: Accelerator
    state: TrainerState
    model: Any
    roles: Roles
    critic: Critic
    reference: str | None
    processing_class: Any
    average: PolicyAverage | None
    token_rewards: TokenRewards
    updates: UpdateControl
    kl_controller: FixedKLController | AdaptiveKLController
    kl_coef: float
    optimizer: Any
    lr_scheduler: Any
    optimizer_given: bool
    is_deepspeed_enabled: bool
    _step: int
    _buffered_inputs: Any
    _train_sampler: Any


def save_models(run: Run, folder: Path, reader: Any, prompts: Sequence[Any]) -> None:
    """Save what was trained: the policy in the folder itself, the critic in `critic/`, an average in `ema/`.

    Args:
        run: The trainer.
        folder: The folder.
        reader: Tokenizer or processor of the policy.
        prompts: Prompts of the run, a few of which are kept with what the adapter says of them (`trained_on.json`).
    """
    _save_policy(run, folder, reader, prompts)
    run.critic.save(folder / "critic")
    if run.average is not None:
        with run.average.in_place():
            _save_policy(run, folder / EMA, reader, prompts)
    torch.save(run.args, folder / "training_args.bin")  # Trainer compares it when it resumes


def _save_policy(run: Run, folder: Path, reader: Any, prompts: Sequence[Any]) -> None:
    if run.model is run.roles.model:
        save_adapter(run.roles, folder, run.processing_class, prompts)
    else:
        policy = policy_alone(run.model)
        policy.save_pretrained(str(folder), state_dict=whole_weights(policy))
    reader.save_pretrained(folder)


def save_adapter(roles: Roles, folder: Path, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> None:
    """Save the adapter of a policy, and what it says of a few prompts (`trained_on.json`).

    Args:
        roles: The roles.
        folder: Where to; it is made.
        tokenizer: Reads the prompts.
        prompts: Prompts of the run; without any the file is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    roles.save_policy(folder)
    if len(prompts):
        rows = [encode_prompt(tokenizer, prompt) for prompt in prompts[:ROWS]]
        save_trained_on(folder, roles.model, rows, log_probs)


def load_models(run: Run, folder: str | Path) -> None:
    """Read what `save_models` wrote."""
    _load_policy(run, folder)
    run.critic.load(Path(folder) / "critic")
    if run.average is not None:
        with run.average.in_place():
            _load_policy(run, Path(folder) / EMA)


def _load_policy(run: Run, folder: str | Path) -> None:
    policy = run.model
    if policy is not run.roles.model:
        saved = type(policy).from_pretrained(str(folder), use_safetensors=True, dtype=policy.dtype)
        load_whole(policy_alone(policy), saved.state_dict())
    else:
        run.roles.load(folder, POLICY, POLICY)


def folder_of(resume_from_checkpoint: Any, args: TrainingArguments) -> Any:
    """The folder to resume from as text, of `True` the last one; `True` where there is none, for TRL to say so."""
    if resume_from_checkpoint is True:
        resume_from_checkpoint = get_last_checkpoint(str(args.output_dir)) or True
    return str(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str | Path) else resume_from_checkpoint


def check_run(run: Run, folder: str) -> None:
    """Honour or refuse, by name, what differs from the run of a checkpoint.

    Raises:
        ValueError: If settings or models differ with which the run could not go on.
        FileNotFoundError: If the checkpoint is not complete.
    """
    rank = run.accelerator.process_index
    state, rollout = load_ppo_state(folder, rank, "cpu")
    _check_launch(run, folder, state)
    check_settings(folder, state, rollout, settings_of(run.args, run.accelerator.num_processes), rank)
    check_same_adapter(folder, run.model, what="this run's policy")
    run.critic.check_saved(Path(folder) / "critic")
    if run.average is not None and not (Path(folder) / EMA).is_dir():
        raise ValueError(
            f"`ema_decay` is {run.args.ema_decay}, but {folder!r} holds no average of weights ({EMA}/) to go on with: "
            "its run had no `ema_decay`. Resume without it, or start a new run from its policy, which `model` takes."
        )
    ours = reference_fingerprint(run.model, run.roles, run.reference)
    if state.get("reference", ours) != ours:  # a checkpoint of an earlier version says nothing of it
        raise ValueError(
            f"The run of {folder!r} started from another `model` than this one, which is its reference: the KL would "
            "be that to another policy. Resume with the `model` of that run."
        )


def _check_launch(run: Run, folder: str, state: dict[str, Any]) -> None:
    parts, ours = list(Path(folder).glob("global_step*/*optim_states.pt")), run.is_deepspeed_enabled
    if bool(parts) != ours:
        raise ValueError(
            f"The checkpoint {folder!r} was saved {'under' if parts else 'without'} DeepSpeed, and this run is "
            f"{'under' if ours else 'without'} it. Launch it as then, or start a new run from its policy, which "
            "`model` takes."
        )
    old, new = both_settings(state, settings_of(run.args, run.accelerator.num_processes))
    changed = [name for name in ("processes", *OF_THE_OPTIMIZER) if old[name] != new[name]]
    if ours and changed:
        raise ValueError(
            "Under DeepSpeed a run goes on with the optimizer and the schedule of its checkpoint as they are, so that "
            f"this cannot change: {differences(changed, old, new)}. Set it back, or start a new run from the policy "
            f"in {folder!r}, which `model` takes."
        )


class _Beginnings(TrainerCallback):
    """Notes at which steps a run and its present epoch began, and the random numbers of the latter."""

    def __init__(self) -> None:
        self.of_run = self.of_epoch = 0
        self.random_state = torch.get_rng_state()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note the step, which is that of the checkpoint in a run that is resumed."""
        self.of_run = state.global_step

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note the random numbers before the loader of the rows draws one of them."""
        self.of_epoch, self.random_state = state.global_step, torch.get_rng_state()


@contextmanager
def saved_when_stopped(run: Any, resumed_from: str | None) -> Iterator[None]:
    """Save a checkpoint of the last step of a run whose completions are no longer sampled, and say where it is.

    Args:
        run: The trainer; within, it trains.
        resumed_from: The checkpoint from which it is resumed, if any.

    Raises:
        SamplingStopped: The same, with where to resume from.
    """
    started, beginnings = time.time(), _Beginnings()
    run.add_callback(beginnings)
    try:
        yield
    except SamplingStopped as stopped:
        step = run.state.global_step
        if step <= beginnings.of_run:
            again = f"resume from {resumed_from} again" if resumed_from else "start the run again"
            raise SamplingStopped(f"{stopped} Nothing was trained yet: {again}.") from stopped
        if step == beginnings.of_epoch:  # a run that resumes at its beginning lets the loader draw again
            torch.set_rng_state(beginnings.random_state)
        folder = Path(run.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        written = folder / TRAINER_STATE_NAME  # last, so that the checkpoint of this step is whole
        if not (written.is_file() and written.stat().st_mtime >= started):
            run.args.save_only_model = False  # such a checkpoint could not be resumed
            run._save_checkpoint(run.model, trial=None)
        raise SamplingStopped(
            f"{stopped} The run stopped after step {step}, and nothing of it is lost. To go on from there: "
            f"`resume_from_checkpoint: {folder}`."
        ) from stopped
    finally:
        run.remove_callback(beginnings)


def save_controls(run: Run, folder: str) -> None:
    """Write where in a rollout a run is, and the state of PPO's controls."""
    state = {
        "step": run._step,
        "kl_coef": run.kl_coef,
        "kl_controller": run.kl_controller.state_dict(),
        "transforms": transforms_state(run.token_rewards.transforms),
        "updates": run.updates.state_dict(),
        "settings": settings_of(run.args, run.accelerator.num_processes),
        "reference": reference_fingerprint(run.model, run.roles, run.reference),
    }
    rollout = run._buffered_inputs if run._step % run.args.micro_batches_of_all_epochs != 0 else None
    save_ppo_state(folder, state, rollout, run.accelerator.process_index)


def load_controls(run: Run, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `save_controls` wrote, and return the settings of the checkpoint and of this run."""
    state, rollout = load_ppo_state(folder, run.accelerator.process_index, run.accelerator.device)
    old, new = both_settings(state, settings_of(run.args, run.accelerator.num_processes))
    run._buffered_inputs, run._step = recut(rollout, state["step"], old, new)
    run.kl_coef = state["kl_coef"]
    run.kl_controller.load_state_dict(state["kl_controller"])
    load_transforms_state(run.token_rewards.transforms, state["transforms"])
    run.updates.load_state_dict(state["updates"])
    return old, new


def continue_run(run: Run, folder: str, fresh: list[dict[str, Any]]) -> None:
    """Go on where a checkpoint stopped, after optimizer and schedule were loaded.

    Args:
        run: The trainer.
        folder: The checkpoint.
        fresh: For each parameter group its options before the checkpoint's were loaded.
    """
    old, new = load_controls(run, folder)
    if not run.optimizer_given and any(old[name] != new[name] for name in OF_THE_OPTIMIZER):
        names = {parameter: name for name, parameter in run.model.named_parameters()}
        of_critic = [is_critic_parameter(names[group["params"][0]]) for group in run.optimizer.param_groups]
        follow_rates(run.optimizer, run.lr_scheduler, of_critic, fresh, old, new)
    for _ in range(int(run.state.epoch or 0) if run._train_sampler is not None else 0):
        next(iter(run._train_sampler))  # each pass over the prompts goes on drawing where the last one stopped
