"""PPO with a critic on TRL's rollout engine.

TRL generates, calls the reward functions and steps the optimizer; this file adds what PPO needs between them: values,
token rewards with the KL penalty, advantages, and the loss. The maths is in `functional.py` and `shaping/`.
`B` completions, `T` completion tokens (padded on the right).
"""

from __future__ import annotations

import copy
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl import GRPOTrainer

from rlhf_recipes.data.formats import check_prompt_lengths
from rlhf_recipes.models.loading import load_tokenizer
from rlhf_recipes.models.roles import CRITIC, POLICY, base_name
from rlhf_recipes.ppo import checks
from rlhf_recipes.ppo._trl import completion_logps, prompt_and_completion
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.critic import Critic
from rlhf_recipes.ppo.functional import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    masked_mean,
    masked_moments,
    whiten,
)
from rlhf_recipes.ppo.setup import build_policy, build_rewards
from rlhf_recipes.shaping import FixedKLController, kl_estimate, place_terminal, place_uniform

if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig, PreTrainedModel

_PLACEMENTS = {"terminal": place_terminal, "uniform": place_uniform}


class PPOTrainer(GRPOTrainer):
    """Train a policy with PPO against reward functions, reward models and reward adapters.

    Policy, frozen reference, critic and reward adapters share one base model in memory. One step generates
    completions, scores them, and makes `args.num_iterations` passes of clipped policy and value updates over them.

    Source: Proximal Policy Optimization, https://huggingface.co/papers/1707.06347, equations 7 and 9, with the
    per-token rewards of https://huggingface.co/papers/1909.08593.

    Args:
        model: The policy: the folder of a trained adapter (the SFT stage's), a `PeftModel` with such an adapter, or a
            base model (path, hub id or instance) together with `peft_config` for a fresh adapter. A trained adapter is
            its own reference, as a frozen copy; a fresh adapter's reference is the bare base.
        reward_funcs: One or a list of: functions with TRL's reward signature (they also get `prompt_ids`), folders of
            reward adapters trained on the same base, and sequence classification models or their paths. Their results
            are summed with `args.reward_weights`.
        args: The configuration.
        train_dataset: Rows with a column `prompt`, plain text or a list of messages.
        eval_dataset: The same for `evaluate`.
        processing_class: The tokenizer, with a padding token; by default the base model's.
        reward_processing_classes: Tokenizers of the reward models, as in TRL.
        callbacks: Callbacks, as in TRL.
        optimizers: Optimizer and scheduler, as in TRL.
        quantization_config: Quantization of the base, when `model` is a path.
        peft_config: LoRA configuration of a fresh adapter, when `model` is a base model.

    Raises:
        ValueError: If the model, the adapters, the prompts or the configuration do not fit together.
        RuntimeError: In training, if the policy and its reference differ before the first update, or old and new
            log-probabilities differ in the first pass.
    """

    _tag_names = ["trl", "ppo"]
    _name = "PPO"
    _paper = {
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        "citation": textwrap.dedent("""\
            @article{schulman2017proximal,
                title        = {{Proximal Policy Optimization Algorithms}},
                author       = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
                year         = 2017,
                eprint       = {arXiv:1707.06347},
            }"""),
    }
    args: PPOConfig
    model: PeftModel
    processing_class: PreTrainedTokenizerBase
    _logs: dict[str, Any]

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Callable[..., Any] | str | PreTrainedModel | list[Any],
        args: PPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = copy.copy(args) if args is not None else PPOConfig("ppo_output")
        set_seed(args.seed)  # new adapters start at random
        self.roles, self.reference = build_policy(model, args, quantization_config, peft_config)
        args.model_init_kwargs = None  # used
        policy = self.roles.model
        tokenizer = processing_class or load_tokenizer(base_name(policy))
        reward_funcs, args.reward_weights = build_rewards(reward_funcs, self.roles, tokenizer, args)
        reward_roles = [role for role in self.roles.heads if role != CRITIC]
        self.critic = Critic(self.roles, args.critic, args.critic_init, next(iter(reward_roles), None))
        checks.check_one_base(policy, reward_funcs)
        longest = policy.config.get_text_config().max_position_embeddings - args.max_completion_length
        for dataset, needed in ((train_dataset, args.prompts_per_rollout), (eval_dataset, 1)):
            if dataset is not None:
                checks.check_prompts(dataset, needed)
                check_prompt_lengths(dataset, tokenizer, longest)

        self.roles.set_trainable()  # TRL rounds trainable parameters of a 4-bit model to bfloat16: none is, for now
        super().__init__(
            model=policy,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("PPOTrainer runs on one process or under DDP; DeepSpeed and FSDP are not supported.")
        self.roles.set_trainable(POLICY, CRITIC)
        checks.check_trainable(self.roles)
        self.kl_controller = FixedKLController(args.kl_coef)
        self._first_pass = True

    # 1. Rewards of the sequences: TRL calls the functions, with the prompts' token ids besides.
    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        inputs = [{**row, "prompt_ids": ids} for row, ids in zip(inputs, prompt_ids, strict=True)]
        rewards_per_func: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        checks.check_rewards(rewards_per_func, self.reward_func_names)
        scores = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        start = self.accelerator.process_index * len(prompts)
        self._scores = scores[start : start + len(prompts)]  # TRL returns the rewards of all processes
        return rewards_per_func

    # 2. The rollout: completions from TRL, then values, token rewards and advantages.
    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        training = self.model.training
        batch_size = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        mask = batch["completion_mask"]

        # TRL leaves the old log-probabilities out where one update follows each rollout
        old_logps = batch.get("old_per_token_logps")
        if old_logps is None:
            old_logps, _ = completion_logps(self, self.model, batch, batch_size)
        with self.roles.use(self.reference):
            ref_logps, _ = completion_logps(self, self.model, batch, batch_size)
        if training and self.state.global_step == 0:
            checks.check_same_distribution(
                old_logps,
                ref_logps,
                mask,
                what="the policy must equal its reference",
                cause="The policy's adapter changed after the reference was copied from it, or the base did.",
            )
        with self.accelerator.autocast():
            values = self.critic.rollout_values(*prompt_and_completion(batch), mask.size(1), batch_size)

        kl = kl_estimate(old_logps, ref_logps, self.args.kl_estimator) * mask
        token_rewards = _PLACEMENTS[self.args.reward_placement](self._scores, mask) - self.kl_controller.value * kl
        advantages, returns = gae(token_rewards, values, mask, self.args.gamma, self.args.gae_lambda)
        self._log_rollout(kl, values, advantages, returns, mask)
        if self.args.whiten_advantages:
            moments = self.accelerator.reduce(torch.stack(masked_moments(advantages, mask)), reduction="sum")
            advantages = whiten(advantages, mask, moments=moments)
        return {
            **batch,
            "old_per_token_logps": old_logps,
            "old_values": values,
            "advantages": advantages,
            "returns": returns,
        }

    # 3. The loss of one micro-batch.
    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mask, old_logps = inputs["completion_mask"], inputs["old_per_token_logps"]
        logps, entropies, values = self._forward(model, inputs)
        if self._first_pass:
            checks.check_same_distribution(
                logps,
                old_logps,
                mask,
                what="every ratio of new to old policy must be 1",
                cause="Dropout, or a layer that computes differently in training and in evaluation, is on.",
            )
            self._first_pass = False

        policy_loss, policy_clipped = clipped_policy_loss(
            logps, old_logps, inputs["advantages"], mask, self.epsilon_low, self.epsilon_high
        )
        value_loss, value_clipped = clipped_value_loss(
            values, inputs["old_values"], inputs["returns"], mask, self.args.value_clip
        )
        entropy = masked_mean(entropies, mask)
        loss = policy_loss + self.args.vf_coef * value_loss - self.args.entropy_coef * entropy

        log_ratio = (logps - old_logps).detach() * mask
        self._log_means(
            {
                "entropy": entropy,
                "ppo/policy_loss": policy_loss,
                "ppo/clip_fraction": policy_clipped,
                "ppo/approx_kl": 0.5 * masked_mean(log_ratio**2, mask),
                "ppo/ratio_max": log_ratio.max().exp(),
                "critic/value_loss": value_loss,
                "critic/clip_fraction": value_clipped,
            }
        )
        return loss * self._share_of_step(mask, inputs["num_items_in_batch"])

    def _forward(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities and entropies of the policy and values of the critic, each (B, T), with gradients."""
        if self.critic.kind == "head":
            with self.roles.captured_hidden_states() as captured:
                logps, entropies = completion_logps(self, model, inputs)
            hidden_states = captured[0]
        else:
            logps, entropies = completion_logps(self, model, inputs)
            with self.accelerator.autocast():
                hidden_states = self.critic.hidden_states(*prompt_and_completion(inputs))
        return logps, entropies, self.critic.values(hidden_states, logps.size(1))

    def _share_of_step(self, mask: Tensor, rollout_tokens: Tensor) -> Tensor:
        """Weight of a micro-batch's token means, so that they add up to the mean over an optimizer step's tokens."""
        if not self.model.training:
            return mask.new_ones(())
        step_tokens = rollout_tokens * self.current_gradient_accumulation_steps / self.args.micro_batches_per_rollout
        share: Tensor = mask.sum() * self.accelerator.num_processes / step_tokens.clamp(min=1.0)
        return share

    # 4. Metrics
    def _log_rollout(self, kl: Tensor, values: Tensor, advantages: Tensor, returns: Tensor, mask: Tensor) -> None:
        sequence_kl = kl.sum(dim=1)
        self._log_means(
            {
                "kl": sequence_kl.mean(),
                "kl_per_token": masked_mean(kl, mask),
                "kl_coef": kl.new_tensor(self.kl_controller.value),
                "rlhf_reward": (self._scores - self.kl_controller.value * sequence_kl).mean(),
                "critic/value_mean": masked_mean(values, mask),
                "critic/return_mean": masked_mean(returns, mask),
                "critic/explained_variance": explained_variance(values, returns, mask),
            }
        )
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics.pop("frac_reward_zero_std", None)  # about groups of completions of one prompt
        # TRL's table shows the group's advantages; PPO's are per token, so it gets their mean over each completion
        means = self.accelerator.gather(advantages.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).tolist()
        for _ in means:
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(means)

    def _log_means(self, metrics: dict[str, Tensor]) -> None:
        stacked = torch.stack([value.detach().float() for value in metrics.values()])
        means = self.accelerator.gather(stacked[None]).mean(dim=0).tolist()
        for name, mean in zip(metrics, means, strict=True):
            self._metrics["train" if self.model.training else "eval"][name].append(mean)

    # 5. Saving and loading: the policy in the folder itself, the critic in `critic/`.
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or "")
        folder.mkdir(parents=True, exist_ok=True)
        self.roles.save_policy(folder)
        self.roles.save_scalar_role(CRITIC, self.critic.adapter, folder / "critic")
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")  # Trainer compares it when it resumes

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.roles.load(resume_from_checkpoint, POLICY, POLICY)
        self.roles.load(Path(resume_from_checkpoint) / "critic", CRITIC, self.critic.adapter)
