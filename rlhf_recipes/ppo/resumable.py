"""Checkpoints of a PPO run, from which it goes on as if it had not stopped, or as other settings ask for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOTrainer

from rlhf_recipes.checkpoints import load_finished
from rlhf_recipes.data.chat_templates import encode_prompt
from rlhf_recipes.models.adapters import POLICY
from rlhf_recipes.models.resumed import check_same_adapter
from rlhf_recipes.models.trained_on import ROWS, log_probs, save_trained_on
from rlhf_recipes.ppo.checkpoint import (
    load_ppo_state,
    load_whole_model,
    policy_alone,
    reference_fingerprint,
    save_ppo_state,
    save_whole_model,
)
from rlhf_recipes.ppo.critic import is_critic_parameter
from rlhf_recipes.ppo.resume import OF_THE_OPTIMIZER, changed_settings, differences, follow_rates, recut, settings_of
from rlhf_recipes.shaping import load_transforms_state, transforms_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_recipes.models.roles import Roles
    from rlhf_recipes.ppo.config import PPOConfig
    from rlhf_recipes.ppo.critic import Critic
    from rlhf_recipes.ppo.token_rewards import TokenRewards
    from rlhf_recipes.ppo.updates import UpdateControl
    from rlhf_recipes.shaping import AdaptiveKLController, FixedKLController


logger = logging.getLogger(__name__)


class ResumableTrainer(GRPOTrainer):
    """TRL's trainer with PPO's checkpoints: the policy in the folder itself, the critic in `critic/`, and the rest."""

    args: PPOConfig
    roles: Roles
    critic: Critic
    token_rewards: TokenRewards
    updates: UpdateControl
    kl_controller: FixedKLController | AdaptiveKLController
    kl_coef: float
    model: Any
    processing_class: PreTrainedTokenizerBase
    optimizer_given = False  # whether the optimizer brought its own rates
    reference: str | None
    _step: int
    _buffered_inputs: Any
    _train_sampler: Any = None

    @property
    def trains_whole_model(self) -> bool:
        """Whether the policy is trained without an adapter, beside a frozen copy."""
        return self.model is not self.roles.model

    @property
    def _steps_per_rollout(self) -> int:
        return self.args.micro_batches_per_rollout * self.args.num_iterations

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does; settings that differ from a checkpoint's are honoured or refused, by name."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(str(self.args.output_dir)) or True  # then TRL says that there is none
        if isinstance(checkpoint, str | Path):
            checkpoint = str(checkpoint)
            self._check_settings(checkpoint)
            if (finished := load_finished(self, checkpoint)) is not None:
                self._load_state(checkpoint)
                return finished
        return super().train(checkpoint, *args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.trains_whole_model:  # callbacks that copy or average the model mean the policy
            self.callback_handler.model = policy_alone(self.model)
        return prepared

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or "")
        folder.mkdir(parents=True, exist_ok=True)
        if self.trains_whole_model:
            save_whole_model(self.model, folder)
        else:
            self.roles.save_policy(folder)
            if isinstance(self.train_dataset, Dataset):
                prompts = self.train_dataset["prompt"][:ROWS]
                rows = [encode_prompt(self.processing_class, prompt) for prompt in prompts]
                save_trained_on(folder, self.model, rows, log_probs)
        self.critic.save(folder / "critic")
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")  # Trainer compares it when it resumes

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.trains_whole_model:
            load_whole_model(self.model, resume_from_checkpoint)
        else:
            self.roles.load(resume_from_checkpoint, POLICY, POLICY)
        self.critic.load(Path(resume_from_checkpoint) / "critic")

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = {
            "step": self._step,
            "kl_coef": self.kl_coef,
            "kl_controller": self.kl_controller.state_dict(),
            "transforms": transforms_state(self.token_rewards.transforms),
            "updates": self.updates.state_dict(),
            "settings": settings_of(self.args, self.accelerator.num_processes),
            "reference": reference_fingerprint(self),
        }
        within_rollout = self._step % self._steps_per_rollout != 0
        rollout = self._buffered_inputs if within_rollout else None
        save_ppo_state(output_dir, state, rollout, self.accelerator.process_index)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The main process now calls the checkpoint complete and removes older ones: all must have written theirs
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = self.optimizer, self.lr_scheduler
        assert optimizer is not None
        assert scheduler is not None
        fresh = [dict(group) for group in optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        old, new = self._load_state(checkpoint)
        if not self.optimizer_given and any(old[name] != new[name] for name in OF_THE_OPTIMIZER):
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            of_critic = [is_critic_parameter(names[group["params"][0]]) for group in optimizer.param_groups]
            follow_rates(optimizer, scheduler, of_critic, fresh, old, new)
        for _ in range(int(self.state.epoch or 0) if self._train_sampler is not None else 0):
            next(iter(self._train_sampler))  # each pass over the prompts goes on drawing where the last one stopped

    def _check_settings(self, checkpoint: str) -> None:
        state, rollout = load_ppo_state(checkpoint, self.accelerator.process_index, "cpu")
        old, new = self._settings(state)
        within_rollout = state["step"] % (int(old["steps_per_generation"]) * int(old["num_iterations"])) != 0
        changed = changed_settings(old, new, within_rollout, state["updates"]["warming_up"])
        if self.is_world_process_zero():
            for what, names in changed.items():
                logger.warning("The run is resumed with %s, %s.", differences(names, old, new), what)
        if within_rollout and rollout is None:
            raise FileNotFoundError(
                f"{checkpoint!r} was saved within a rollout, but the rollout of process "
                f"{self.accelerator.process_index} is not in it. Resume from an earlier checkpoint, with as many "
                "processes as it was saved by."
            )
        self._check_models(checkpoint, state)

    def _check_models(self, checkpoint: str, state: dict[str, Any]) -> None:
        """Refuse another adapter, base, critic or reference than those that the checkpoint was made with."""
        check_same_adapter(checkpoint, self.model, what="this run's policy")
        self.critic.check_saved(Path(checkpoint) / "critic")
        ours = reference_fingerprint(self)
        if state.get("reference", ours) != ours:  # a checkpoint of an earlier version says nothing of it
            raise ValueError(
                f"The run of {checkpoint!r} started from another `model` than this one, which is its reference: the "
                "KL would be that to another policy. Resume with the `model` of that run."
            )

    def _settings(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings of a checkpoint and of this run."""
        new = settings_of(self.args, self.accelerator.num_processes)
        return new | state.get("settings", {}), new  # a checkpoint of an earlier version has none, or fewer

    def _load_state(self, checkpoint: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load what is PPO's own, and return the settings of the checkpoint and of this run."""
        state, rollout = load_ppo_state(checkpoint, self.accelerator.process_index, self.accelerator.device)
        old, new = self._settings(state)
        self._buffered_inputs, self._step = recut(rollout, state["step"], old, new)
        self.kl_coef = state["kl_coef"]
        self.kl_controller.load_state_dict(state["kl_controller"])
        load_transforms_state(self.token_rewards.transforms, state["transforms"])
        self.updates.load_state_dict(state["updates"])
        return old, new
