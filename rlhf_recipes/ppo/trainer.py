"""PPO with a critic on TRL's rollout engine.

TRL generates, calls the reward functions and steps the optimizer; this file adds what PPO needs between them: values,
token rewards with the KL penalty, advantages, and the loss. The maths is in `functional/` and `shaping/`.
"""

from __future__ import annotations

import copy
import textwrap
from typing import TYPE_CHECKING, Any

import torch
from datasets import IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from rlhf_recipes.data.chat_templates import with_first_space
from rlhf_recipes.models.roles import CRITIC
from rlhf_recipes.ppo import checks
from rlhf_recipes.ppo._trl import add_log_probs
from rlhf_recipes.ppo.anchor import FIRST_PASS, make_kl_controller, policy_and_reference, policy_outputs
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.critic import Critic
from rlhf_recipes.ppo.engine import PPOEngine
from rlhf_recipes.ppo.functional import masked_moments, whiten
from rlhf_recipes.ppo.given import check_given, reward_tokenizers
from rlhf_recipes.ppo.objective import LossMetrics, count_items, critic_loss, policy_loss
from rlhf_recipes.ppo.off_policy import off_policy_metrics
from rlhf_recipes.ppo.out_of_memory import phase
from rlhf_recipes.ppo.padding import trim
from rlhf_recipes.ppo.pretraining import PretrainingTexts
from rlhf_recipes.ppo.prompts import evaluation_rows, prompt_rules, training_rows
from rlhf_recipes.ppo.rollout_metrics import rollout_metrics
from rlhf_recipes.ppo.setup import build_policy, build_rewards, load_base_tokenizer
from rlhf_recipes.ppo.step_metrics import StepMetrics
from rlhf_recipes.ppo.token_rewards import Placement, TokenRewards, collect, estimate_advantages
from rlhf_recipes.ppo.trial import try_out
from rlhf_recipes.ppo.updates import UpdateControl
from rlhf_recipes.rewards.encoding import which_ended
from rlhf_recipes.shaping import Completions, ScoreTransform, steered_kl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from datasets import Dataset
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig, PreTrainedModel


class PPOTrainer(PPOEngine):
    """Train a policy with PPO against reward functions, reward models and reward adapters.

    Policy, frozen reference, critic and reward adapters share one base model in memory. One step generates
    completions, scores them, and makes `args.num_iterations` passes of clipped policy and value updates over them.

    Source: Proximal Policy Optimization, https://huggingface.co/papers/1707.06347, equations 7 and 9, with the
    per-token rewards of https://huggingface.co/papers/1909.08593.

    Args:
        model: The policy: the folder of a trained adapter (the SFT stage's), a `PeftModel` with such an adapter, or a
            base model (path, hub id or instance): with `peft_config` for a fresh adapter, without it to be trained as
            a whole. The reference is the policy as it is given: a frozen copy of a trained adapter, the bare base of a
            fresh one, or a frozen copy of the whole model.
        reward_funcs: One or a list of: functions with TRL's reward signature (they also get `prompt_ids`), folders of
            reward adapters trained on the same base, and sequence classification models or their paths. Their results
            are summed with `args.reward_weights`.
        args: The configuration.
        train_dataset: Rows with a column `prompt`, plain text or a list of messages; or a stream of such.
        eval_dataset: The same for `evaluate`, or a dictionary of such.
        processing_class: The tokenizer, with a padding token; by default the base model's.
        reward_processing_classes: Tokenizers of reward models, one for each reward, in place of their own.
        callbacks: Callbacks, as in TRL.
        optimizers: Optimizer and scheduler, as in TRL.
        quantization_config: Quantization of the base, when `model` is a path.
        peft_config: LoRA configuration of a fresh adapter, when `model` is a base model.
        critic_model: With `args.critic="model"`: a sequence classifier with one output, or its path.
        placement: Callable from scores `(B,)` and mask `(B, T)` to token rewards `(B, T)`, in place of
            `args.reward_placement`.
        score_transforms: Score transforms (`rlhf_recipes.shaping`), after those of `args`.
        potential: Function with TRL's reward signature that returns, for each completion, one potential per token, of
            the text before it: potential-based shaping, which leaves the best policy what it is.
        ptx_dataset: Rows with a column `text`, for `args.ptx_coef`.

    Raises:
        ValueError: If the model, the adapters, the prompts or the configuration do not fit together.
        RuntimeError: In training, if policy and reference, or old and new policy, differ before the first update.
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

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Callable[..., Any] | str | PreTrainedModel | list[Any],
        args: PPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        critic_model: str | PreTrainedModel | None = None,
        placement: Placement | None = None,
        score_transforms: Sequence[ScoreTransform] = (),
        potential: Callable[..., Any] | None = None,
        ptx_dataset: Dataset | None = None,
    ) -> None:
        check_given(args, train_dataset, eval_dataset, processing_class, peft_config, callbacks)
        args = copy.copy(args) if args is not None else PPOConfig("ppo_output")
        set_seed(args.seed)  # new adapters start at random
        policy, self.roles, self.reference = build_policy(model, args, quantization_config, peft_config)
        tokenizer = processing_class or load_base_tokenizer(policy, args)
        args.model_init_kwargs = None  # used
        self.prompt_rules = prompt_rules(policy, tokenizer, args)
        tokenizers: Any = reward_tokenizers(reward_processing_classes, reward_funcs)
        reward_funcs, args.reward_weights = build_rewards(reward_funcs, self.roles, tokenizer, args, tokenizers)
        reward_roles = [role for role in self.roles.heads if role != CRITIC]
        self.critic = Critic(policy, self.roles, args, next(iter(reward_roles), None), critic_model)
        checks.check_arguments(args, placement, potential, ptx_dataset, self.roles)
        train_dataset = training_rows(train_dataset, self.prompt_rules, args, policy)
        eval_dataset = evaluation_rows(eval_dataset, self.prompt_rules, policy)
        self.token_rewards, self.potential = TokenRewards(args, placement, score_transforms), potential
        policy.requires_grad_(False)  # TRL rounds trainable parameters of a 4-bit model to bfloat16: none is, for now
        super().__init__(
            model=policy,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            reward_processing_classes=tokenizers,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._seed_sampling()
        if isinstance(train_dataset, IterableDataset):  # its passes are shuffled already
            self.shuffle_dataset = False
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("PPOTrainer runs on one process or under DDP; DeepSpeed and FSDP are not supported.")
        if self.trains_whole_model:
            add_log_probs(self, self.roles.model.get_base_model())
        checks.set_trainable(self.model, self.roles)
        try_out(self)
        self.critic.freeze_below()
        self.updates = UpdateControl(args, self.accelerator)
        self.step_metrics = {mode: StepMetrics(self.accelerator) for mode in ("train", "eval")}
        self.kl_coef, self.kl_controller = args.kl_coef, make_kl_controller(args)
        self.ptx_texts = None if ptx_dataset is None else PretrainingTexts(ptx_dataset, tokenizer, args)

    # 1. Rewards of the sequences: TRL calls the functions, with the prompts' token ids besides.
    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        ended = which_ended(len(prompts), completion_ids_list, self.eos_token_ids, None)
        more = zip(inputs, prompt_ids, ended, strict=True)
        inputs = [{**row, "prompt_ids": ids, "finished": end} for row, ids, end in more]
        texts = zip(prompts, completions, completion_ids_list, strict=True)
        completions = [with_first_space(self.processing_class, *text) for text in texts]
        rewards_per_func: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        checks.check_rewards(rewards_per_func, self.reward_func_names)
        scores = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        start = self.accelerator.process_index * len(prompts)
        self._scores = scores[start : start + len(prompts)]  # TRL returns the rewards of all processes
        self._completion_ids = completion_ids_list
        self._potentials = None
        if self.potential is not None:
            columns = {name: [row[name] for row in inputs] for name in inputs[0] if name != "prompt"}
            self._potentials = self.potential(
                prompts=prompts, completions=completions, completion_ids=completion_ids_list, **columns
            )
            checks.check_potentials(self._potentials, completion_ids_list)
        return rewards_per_func

    # 2. The rollout: completions from TRL, then values, token rewards and advantages.
    @phase("score")
    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self._checkpoint_every_n_layers()
        training = self.model.training
        batch_size = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        mask = batch["completion_mask"]
        if self.critic.kind != "head":
            with self.accelerator.autocast():
                batch |= self.critic.rollout_values(batch, batch_size)
        batch |= policy_and_reference(self, batch, batch_size)
        values, entropies = batch["old_values"], batch.pop("old_entropies")

        completions = Completions(
            self._completion_ids,
            finished=torch.tensor(which_ended(len(mask), self._completion_ids, self.eos_token_ids, None)),
            max_length=self.args.max_completion_length or 0,
            sum_over_processes=lambda tensor: self.accelerator.reduce(tensor, reduction="sum"),
            training=training,
        )
        functions: Any = self.reward_funcs
        scored = collect(self._scores, functions, self.reward_weights.tolist(), self._potentials, mask, self.args)
        token_rewards, scores, contributions = self.token_rewards(scored, mask, completions)
        kl = batch.pop("kl").masked_fill(~mask.bool(), 0.0)
        if self.args.kl_placement == "reward":
            token_rewards = token_rewards - self.kl_controller.value * kl
        if self.args.whiten_rewards:
            token_rewards = self._whiten(token_rewards, mask, center=False)
        advantages, returns, value_mask = estimate_advantages(self.args, token_rewards, values, mask)
        self._log_rollout(
            {
                **rollout_metrics(*map(self._of_all_processes, (kl, values, returns, mask, value_mask))),
                **off_policy_metrics(self, batch, batch["old_per_token_logps"], entropies),
                **{f"score/{name}": part.mean() for name, part in contributions.items()},
                "score/total": scores.mean(),
                "rlhf_reward": (scores - self.kl_controller.value * kl.sum(dim=1)).mean(),
            },
            advantages.sum(dim=1) / mask.sum(dim=1).clamp(min=1),
            steered_kl(kl, mask, self.args.kl_target_per),
        )
        if self.args.whiten_advantages:
            advantages = self._whiten(advantages, mask)
        return {
            **batch,
            "value_mask": value_mask,
            "advantages": advantages,
            "returns": returns,
            "items_in_rollout": self.accelerator.reduce(count_items(mask, self.args), reduction="sum"),
        }

    def _whiten(self, values: Tensor, mask: Tensor, center: bool = True) -> Tensor:
        moments = self.accelerator.reduce(torch.stack(masked_moments(values, mask)), reduction="sum")
        return whiten(values, mask, center, moments, self.args.whiten_unbiased)

    # 3. The loss of one micro-batch.
    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        whole, inputs = inputs, trim(inputs)
        for name in FIRST_PASS:  # TRL keeps the rollout for all epochs
            whole.pop(name, None)
        loss, values, metrics = self._policy_loss(model, inputs)
        if values is None:
            with self.accelerator.autocast():
                values = self.critic.forward(inputs)
        value_loss, value_metrics = critic_loss(values, inputs, self.args)
        loss = (loss + value_loss) * self._share_of_step(inputs["completion_mask"], inputs)
        if self.model.training and self.ptx_texts is not None:
            ptx_loss = self.ptx_texts.loss(self)
            metrics.means["ppo/ptx_loss"] = (ptx_loss, torch.ones_like(ptx_loss))
            loss = loss + self.args.ptx_coef * ptx_loss / self.current_gradient_accumulation_steps
        checks.check_finite("loss", loss, whole, self.args.output_dir, self.accelerator.process_index)
        self.step_metrics[self.mode].add(metrics.means | value_metrics.means, metrics.maxima)
        return loss

    def _policy_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None, LossMetrics]:
        """Compute the policy's terms, and the values if the critic is a head on it; else its activations are free."""
        new = policy_outputs(self, model, inputs)
        mask, old_logps = inputs["completion_mask"], inputs["old_per_token_logps"]
        if self.model.training and self._step == 0:
            checks.check_same_distribution(
                new.logps,
                old_logps,
                mask,
                self.half_precision,
                what="every ratio of new to old policy must be 1",
                cause="Dropout, or a layer that computes differently in training and in evaluation, is on.",
            )
        if self.model.training:
            self.updates.record(new.logps - old_logps, new.entropies, mask)
        kl_coef = self.kl_coef if self.args.kl_placement == "loss" else 0.0
        loss, metrics = policy_loss(new, inputs, self.args, kl_coef, self.updates.entropy_coef)
        if new.router_loss is not None:
            loss = loss + self.router_aux_loss_coef * new.router_loss
            metrics.means["ppo/router_loss"] = (new.router_loss, count_items(mask, self.args))
        return loss if self.critic.kind == "head" else self._backward_of_policy(loss), new.values, metrics

    def _share_of_step(self, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Weight of a micro-batch's means, so that they add up to the mean over an optimizer step."""
        if not self.model.training:
            return mask.new_ones(())
        step = inputs["items_in_rollout"] * self.current_gradient_accumulation_steps
        step = step / self.args.micro_batches_per_rollout
        share: Tensor = count_items(mask, self.args) * self.accelerator.num_processes / step.clamp(min=1.0)
        return share
