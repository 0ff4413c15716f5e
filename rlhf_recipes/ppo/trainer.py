"""PPO with a critic on TRL's rollout engine, in the order of a step.

TRL generates, calls the reward functions and steps the optimizer; this file adds what PPO needs between them: values,
token rewards with the KL penalty, advantages, and the loss. The maths is in `functional/` and `shaping/`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, set_seed

from rlhf_recipes.checkpoints import load_finished
from rlhf_recipes.models.chance import compute_as_in_evaluation
from rlhf_recipes.models.roles import is_critic_parameter
from rlhf_recipes.models.sharding import call_inside
from rlhf_recipes.ppo import checkpoint, checks, setup
from rlhf_recipes.ppo._trl import as_scored
from rlhf_recipes.ppo.checkpoint import continue_run
from rlhf_recipes.ppo.config import PPOConfig
from rlhf_recipes.ppo.console import show_roles, show_rollouts
from rlhf_recipes.ppo.critics import Critic, CriticRollout
from rlhf_recipes.ppo.functional import backward_now, masked_moments, whiten
from rlhf_recipes.ppo.inputs import check_callbacks, check_given, reward_tokenizers
from rlhf_recipes.ppo.metrics import EvaluatedRows, LossMetrics, RolloutFacts, StepMetrics
from rlhf_recipes.ppo.objective import count_items, critic_loss, policy_loss, share_of_step
from rlhf_recipes.ppo.off_policy import follow_sampler, sampled_moments
from rlhf_recipes.ppo.out_of_memory import phase
from rlhf_recipes.ppo.passes import (
    KeptPass,
    PolicyPass,
    exact_kl,
    keep_states,
    policy_pass,
    reference_pass,
)
from rlhf_recipes.ppo.pretraining import PretrainingTexts
from rlhf_recipes.ppo.prompts import check_rows, evaluation_rows, prompt_rules, training_rows, with_columns_of_rewards
from rlhf_recipes.ppo.rollout import Batch, Rollout, reshuffle, sort_within_steps, texts_of
from rlhf_recipes.ppo.sampling import build_sampler, without_vllm
from rlhf_recipes.ppo.sharded import ShardedTrainer, check_sharding, on_whole_weights
from rlhf_recipes.ppo.token_rewards import Placement, Scored, TokenRewards, configured_advantages
from rlhf_recipes.ppo.trial import try_out
from rlhf_recipes.ppo.updates import UpdateControl
from rlhf_recipes.rewards.record import COLUMN, RewardRecord
from rlhf_recipes.rewards.truncation import Truncation
from rlhf_recipes.shaping import Completions, ScoreTransform, kl_estimate, steered_kl
from rlhf_recipes.tracking.console import QuietModelCard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from peft import PeftConfig
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from rlhf_recipes.models.rows import Texts


class PPOTrainer(QuietModelCard, ShardedTrainer):
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
        train_dataset: Rows with a column `prompt`, plain text or a list of messages; or a stream of such. Where they
            have a column `reward_prompt`, reward models read it in place of the prompt.
        eval_dataset: The same for `evaluate`, or a dictionary of such.
        processing_class: The tokenizer, with a padding token; by default the base model's. For rows with `images`,
            the processor of a vision-language model.
        reward_processing_classes: Tokenizers of reward models, one for each reward, in place of their own.
        callbacks: Callbacks, as in TRL.
        optimizers: Optimizer and scheduler, as in TRL.
        quantization_config: Quantization of the base, when `model` is a path.
        peft_config: LoRA configuration of a fresh adapter, when `model` is a base model.
        reference_adapter: Folder of the reference's adapter, where the policy does not start as its reference but
            goes on from an adapter that PPO has trained.
        critic_model: With `args.critic="model"`: a sequence classifier with one output, or its path; or a critic of
            one's own (`rlhf_recipes.ppo.critics.Critic`). Else the folder `critic` of an earlier run, whose critic of
            the same kind goes on.
        placement: Callable from scores `(B,)` and mask `(B, T)` to token rewards `(B, T)`, in place of
            `args.reward_placement`.
        score_transforms: Score transforms (`rlhf_recipes.shaping`), after those of `args`.
        potential: Function with TRL's reward signature that returns, for each completion, one potential per token, of
            the text before it: potential-based shaping, which leaves the best policy what it is.
        ptx_dataset: Rows with a column `text`, for `args.ptx_coef`.

    Raises:
        ValueError: If the model, the adapters, the prompts or the configuration do not fit together.
        RuntimeError: If policy and reference, or old and new policy, differ before the first update, or vLLM fails.
    """

    _tag_names = ["trl", "ppo"]
    _name = "PPO"
    _paper = setup.PAPER

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Callable[..., Any] | str | PreTrainedModel | list[Any],
        args: PPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Any] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        reference_adapter: str | None = None,
        critic_model: str | PreTrainedModel | Critic | None = None,
        placement: Placement | None = None,
        score_transforms: Sequence[ScoreTransform] = (),
        potential: Callable[..., Any] | None = None,
        ptx_dataset: Dataset | None = None,
    ) -> None:
        check_given(args, train_dataset, eval_dataset, processing_class, peft_config, callbacks)
        args = copy.copy(args) if args is not None else PPOConfig("ppo_output")
        set_seed(args.seed)  # new adapters start at random
        self.starts_as_reference = reference_adapter is None
        policy, self.roles, self.reference = setup.build_policy(
            model, args, quantization_config, peft_config, reference_adapter=reference_adapter
        )
        tokenizer, self.image_reader = setup.build_readers(processing_class, policy, args)
        args.model_init_kwargs = None  # used
        self.prompt_rules = prompt_rules(policy, tokenizer, args, self.image_reader)
        tokenizers: Any = reward_tokenizers(reward_processing_classes, reward_funcs)
        reward_funcs, args.reward_weights = setup.build_rewards(reward_funcs, self.roles, tokenizer, args, tokenizers)
        self.prompt_rules = with_columns_of_rewards(self.prompt_rules, reward_funcs, train_dataset, self.roles)
        self.critic = setup.build_critic(policy, self.roles, args, next(iter(self.roles.heads), None), critic_model)
        checks.check_arguments(args, placement, potential, ptx_dataset, reference_adapter)
        train_dataset = training_rows(train_dataset, self.prompt_rules, args, policy)
        self.token_rewards, self.potential = TokenRewards(args, placement, score_transforms), potential
        policy.requires_grad_(False)  # TRL rounds trainable parameters of a 4-bit model to bfloat16: none is, for now
        eval_dataset = evaluation_rows(eval_dataset, self.prompt_rules, policy)
        with without_vllm(args):  # TRL's would merge the adapter, and send all weights
            super().__init__(
                policy, reward_funcs, args, train_dataset, eval_dataset, tokenizer, tokenizers, callbacks, optimizers
            )
        setup.seed_sampling(args.seed, self.accelerator.process_index)
        self.truncation = Truncation(tokenizer, self.eos_token_ids, args.truncate_tokens or (), args.truncate_after)
        self.shuffle_dataset = self.shuffle_dataset and not isinstance(train_dataset, IterableDataset)  # it is already
        check_sharding(self)
        if self.trains_whole_model:
            setup.add_log_probs(self, self.roles.model.get_base_model())
        setup.set_trainable(self.model, self.roles, self.critic)
        try_out(self, self.half_precision)
        self.sampler = build_sampler(self)
        self.updates, self.evaluated = UpdateControl(args, self.accelerator), EvaluatedRows(self.accelerator)
        self.step_metrics = {mode: StepMetrics(self.accelerator) for mode in ("train", "eval")}
        self.kept_pass, self.last_rollout, self.average = KeptPass(), dict[str, float](), setup.keep_average(self)
        self.kl_coef, self.kl_controller = args.kl_coef, setup.make_kl_controller(args)
        self.ptx_texts = None if ptx_dataset is None else PretrainingTexts(ptx_dataset, tokenizer, args)
        show_rollouts(self)

    # TRL leaves the types of these open
    args: PPOConfig
    model: Any
    processing_class: PreTrainedTokenizerBase
    _logs: dict[str, Any]
    _step: int  # micro-batches so far
    # What a checkpoint needs besides
    optimizer_given = False  # whether the optimizer brought its own rates
    _train_sampler: Any = None
    _told_of_unit = False

    @property
    def trains_whole_model(self) -> bool:
        """Whether the policy is trained without an adapter, beside a frozen copy."""
        return self.model is not self.roles.model

    @property
    def half_precision(self) -> bool:
        """Whether the networks compute in 16 bits."""
        weights = self.roles.model.get_base_model().dtype
        return self.accelerator.mixed_precision in ("bf16", "fp16") or weights != torch.float32

    @property
    def mode(self) -> str:
        """Whose metrics these are: `train` or `eval`."""
        return "train" if self.model.training else "eval"

    # 1. A run: the roles are shown, a checkpoint's settings are compared, and TRL's loop begins.
    @phase("train")  # of what is in no other phase, such as the first step of the optimizer
    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does; settings that differ from a checkpoint's are honoured or refused, by name."""
        check_callbacks(self.callback_handler.callbacks, self.trains_whole_model)
        show_roles(self)
        folder = checkpoint.folder_of(resume_from_checkpoint, self.args)
        if isinstance(folder, str):
            checkpoint.check_run(self, folder)
            if (finished := load_finished(self, folder)) is not None:
                checkpoint.load_controls(self, folder)
                return finished
        with checkpoint.saved_when_stopped(self, folder):
            return super().train(folder, *args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.trains_whole_model:  # callbacks that copy or average the model mean the policy
            self.callback_handler.model = checkpoint.policy_alone(self.model)
        return prepared

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create TRL's optimizer, with groups of its own for the critic, which learns faster than the policy."""
        existing = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if not existing:
            self.optimizer = optimizer = setup.configured_optimizer(optimizer, self.model, self.args)
            self.watch_steps(optimizer)
        elif not (self.is_deepspeed_enabled or isinstance(optimizer, AcceleratedOptimizer)):  # of an earlier `train()`
            checks.check_optimizer(self.model, optimizer, self.args)
            self.optimizer_given = True
        return optimizer

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Make TRL's loader; rows that `evaluate` is given are checked as those of the trainer were."""
        if not (eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset):
            eval_dataset = check_rows(eval_dataset, "eval_dataset", self.prompt_rules)
        return super().get_eval_dataloader(eval_dataset)

    # 2. A micro-batch: of a new rollout, or of one that is trained on again.
    @phase("train")
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run a micro-batch as TRL does (3 to 8), unless the rest of the rollout is left out, and drop updates."""
        if self.updates.stopped and self._step % self.args.micro_batches_of_all_epochs != 0:
            self._step += 1
            if self.accelerator.sync_gradients:
                self._metrics["train"]["ppo/updates_made"].append(0.0)
            return torch.zeros((), device=self.accelerator.device)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._end_of_step()
        return loss

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self.model.training and self.args.disable_dropout:
            compute_as_in_evaluation(self.model)  # for the rollout and for the loss
        micro_batches = self.args.micro_batches_per_rollout
        new_epoch = self._step % micro_batches == 0 and self._step % self.args.micro_batches_of_all_epochs != 0
        if self.model.training and new_epoch and micro_batches > 1 and self._buffered_inputs is not None:
            # TRL shuffles a rollout once; each further epoch over it gets minibatches of its own
            self._buffered_inputs = reshuffle(self._buffered_inputs)
        inputs = super()._prepare_inputs(generation_batch)
        accumulated = self.args.gradient_accumulation_steps
        if self.model.training and self._step % micro_batches == 0 and accumulated > 1:
            self._buffered_inputs = sort_within_steps(self._buffered_inputs or [], accumulated)
            inputs = self._buffered_inputs[0]
        return inputs

    # 3. Completions are sampled.
    @phase("generate")
    def _generate(self, prompts: list[Any]) -> Any:
        return super()._generate(prompts)

    def _generate_single_turn(self, prompt_ids: list[list[int]], images: Any, fields: Any, *others: Any) -> Any:
        return self.sampler(prompt_ids, self.embed_tokenized(prompt_ids, fields))

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        return None, None, None  # TRL asks for the old policy's, which come with the values in one pass of ours

    # 4. Rewards: TRL calls the functions, which get what is judged and the prompts' token ids, and fill in the record.
    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        sampled_ids = completion_ids_list
        completions, completion_ids_list, ended = self.truncation(completions, sampled_ids)
        inputs, completions = as_scored(self, inputs, prompts, completions, completion_ids_list, ended)
        rewards_per_func: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        checks.check_rewards(rewards_per_func, self.reward_func_names)
        record: RewardRecord | None = inputs[0].get(COLUMN)
        if record is None:  # of an evaluation that needs no more than these
            return rewards_per_func
        start = self.accelerator.process_index * len(prompts)
        record.rewards = rewards_per_func[start : start + len(prompts)]  # TRL returns those of all processes
        record.scores = (record.rewards * self.reward_weights.to(record.rewards.device)).nansum(dim=1)
        record.completion_ids, record.finished = sampled_ids, ended
        if self.potential is not None:
            record.potentials = checks.potentials_of(self.potential, inputs, prompts, completions, completion_ids_list)
        return rewards_per_func

    # 5. The rollout: what the networks say of it, rewards of its tokens, and what PPO learns from them.
    @phase("score")
    @on_whole_weights
    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        record, args, rows = RewardRecord(), self.args, self.chats_of(inputs)
        sampled = super()._generate_and_score_completions([{**row, COLUMN: record} for row in rows])
        texts = self.with_pictures(texts_of(sampled), rows)
        setup.restore_checkpointing(self.model, args)
        if not self.model.training:
            texts = self.evaluated.without_repeats(texts)
        mask = texts.completion_mask
        old, ref, critic, kl = self._run_networks(texts)
        token_rewards, scores, contributions = self._token_rewards(record, mask)
        if args.kl_placement == "reward":
            token_rewards = token_rewards - self.kl_controller.value * kl
        if args.whiten_rewards:
            token_rewards = self._whiten(token_rewards, mask, center=False)
        advantages, returns, value_mask = configured_advantages(args, token_rewards, critic.values, mask)
        facts = RolloutFacts(
            kl=kl,
            values=critic.values,
            returns=returns,
            mask=mask,
            value_mask=value_mask,
            surprise=old.logps + old.entropies,
            scores=scores,
            contributions=contributions,
            moments=sampled_moments(self, texts)[None],
            rewards=record.rewards,
            lengths=mask.new_tensor([len(ids) for ids in record.completion_ids]),
            ended=mask.new_tensor(self.truncation.finished(record.completion_ids, as_trl_counts=True)),
        )
        self._log_rollout(facts, advantages.sum(dim=1) / mask.sum(dim=1).clamp(min=1))
        if args.whiten_advantages and self.model.training:  # over a rollout, and an evaluation has none
            advantages = self._whiten(advantages, mask)
        old_logps, advantages = follow_sampler(self, sampled, old.logps, advantages, mask)
        anchor = old if args.kl_anchor == "old" else ref
        return Rollout(
            **vars(texts),
            old_per_token_logps=old_logps,
            ref_per_token_logps=ref.logps,
            old_values=critic.values,
            value_mask=value_mask,
            advantages=advantages,
            returns=returns,
            items_in_rollout=self.accelerator.reduce(count_items(mask, args), reduction="sum"),
            row=torch.arange(len(texts), device=mask.device),
            anchor_hidden=anchor.kept if args.kl_estimator == "full" and args.kl_placement == "loss" else None,
            prompt_below=critic.prompt_below,
            completion_below=critic.completion_below,
        ).to_batch()

    def _run_networks(self, texts: Texts) -> tuple[PolicyPass, PolicyPass, CriticRollout, Tensor]:
        """Run old policy, reference and critic over a rollout: their outputs, and the KL per token `(B, T)`."""
        args, mask, training = self.args, texts.completion_mask, self.model.training
        batch_size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
        exact, critic = args.kl_estimator == "full", None
        if not self.critic.reads_policy:
            with self.accelerator.autocast():
                critic = self.critic.rollout(texts, batch_size)
        ref = reference_pass(self, self.roles, self.reference, texts, batch_size, keep=exact)
        old = self._old_policy(texts, batch_size)  # the last one, so that none runs beside what it keeps
        if critic is None:
            critic = CriticRollout(self.critic.read(old.kept) if exact else old.kept)
        if training and self.state.global_step == self._step == 0 and self.starts_as_reference:
            checks.check_reference(old.logps, ref.logps, mask, self.half_precision)
        if args.kl_estimator == "full":
            return old, ref, critic, exact_kl(self, self.roles, self.reference, old.kept, ref.kept, mask)
        return old, ref, critic, kl_estimate(old.logps, ref.logps, args.kl_estimator).masked_fill(~mask.bool(), 0.0)

    def _token_rewards(self, record: RewardRecord, mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Rewards per token `(B, T)` without the KL, the transformed scores `(B,)`, and what each transform added."""
        completions = Completions(
            record.completion_ids,
            finished=torch.tensor(record.finished),
            max_length=self.args.max_completion_length or 0,
            sum_over_processes=lambda tensor: self.accelerator.reduce(tensor, reduction="sum"),
            training=self.model.training,
        )
        weights = dict(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True))
        return self.token_rewards(Scored.from_record(record, weights, mask, self.args), mask, completions)

    def _old_policy(self, texts: Texts, batch_size: int) -> PolicyPass:
        """Run the policy over a rollout, and keep its graph where the first update asks for the same pass.

        A rollout of one micro-batch is first trained on with the tokens and the weights that it was scored with. A
        pass of its own is made in the very first update, where the two are compared, with several processes, whose
        gradients go by a wrapper around the policy, and where the update asks for more than the rollout.
        """
        args = self.args
        alone = args.micro_batches_per_rollout == self.accelerator.num_processes == 1
        more = args.kl_estimator == "full" or self.aux_loss_enabled
        kept = alone and self.model.training and self._step > 0 and not more and not self.spreads
        with torch.set_grad_enabled(kept):
            outputs = policy_pass(self, self.model, texts, batch_size, self._read(args.kl_estimator == "full"))
        self.kept_pass.keep(outputs if kept else None)
        values = outputs.kept if outputs.kept is None else outputs.kept.detach()
        return PolicyPass(outputs.logps.detach(), outputs.entropies.detach(), values)

    def _read(self, states: bool) -> Callable[[Tensor], Tensor] | None:
        """What a pass of the policy reads for others: its states for an exact KL, else the critic's values."""
        return keep_states if states else self.critic.read if self.critic.reads_policy else None

    def _whiten(self, values: Tensor, mask: Tensor, center: bool = True) -> Tensor:
        moments = self.accelerator.reduce(torch.stack(masked_moments(values, mask)), reduction="sum")
        return whiten(values, mask, center, moments, self.args.whiten_unbiased)

    # 6. The loss of a micro-batch.
    def _compute_loss(self, model: Any, inputs: Batch) -> Tensor:
        batch = Rollout.from_batch(inputs).trimmed()
        loss, values, metrics = self._policy_loss(model, batch)
        if values is None:
            with self.accelerator.autocast():
                values = call_inside(self.model, lambda: self.critic.forward(batch))
        value_loss, value_metrics = critic_loss(values, batch, self.args)
        terms, loss = loss, loss + value_loss
        if not self.model.training:
            metrics.means["loss"] = (terms, count_items(batch.completion_mask, self.args))
        else:
            accumulated = self.current_gradient_accumulation_steps
            if self.accelerator.sync_gradients:
                self.updates.decide()  # before the backward pass, in which DeepSpeed steps
            loss = loss * share_of_step(batch, self.args, accumulated, self.accelerator.num_processes)
            if self.ptx_texts is not None:
                number = self._step * self.accelerator.num_processes + self.accelerator.process_index
                ptx_loss = self.ptx_texts.loss(self.model, number, self.accelerator)
                metrics.means["ppo/ptx_loss"] = (ptx_loss, torch.ones_like(ptx_loss))
                loss = loss + self.args.ptx_coef * ptx_loss / accumulated
        checks.check_finite("loss", loss, inputs, self.args.output_dir, self.accelerator.process_index)
        self.step_metrics[self.mode].add(metrics.means | value_metrics.means, metrics.maxima)
        return loss

    def _policy_loss(self, model: Any, batch: Rollout) -> tuple[Tensor, Tensor | None, LossMetrics]:
        """Compute the policy's terms, and the values if the critic reads them there; else its activations are free."""
        new, values, kl = self._policy_outputs(model, batch)
        mask, old_logps = batch.completion_mask, batch.old_per_token_logps
        if self.model.training and self._step == 0:
            checks.check_first_ratios(new.logps, old_logps, mask, self.half_precision)
        if self.model.training:
            self.updates.record(new.logps - old_logps, new.entropies, mask)
        kl_coef = self.kl_coef if self.args.kl_placement == "loss" else 0.0
        loss, metrics = policy_loss(new, batch, self.args, kl_coef, self.updates.entropy_coef, kl)
        if new.router_loss is not None:
            loss = loss + self.router_aux_loss_coef * new.router_loss
            metrics.means["ppo/router_loss"] = (new.router_loss, count_items(mask, self.args))
        # float16's gradients need the scale of the whole loss; FSDP and DeepSpeed average those of one backward pass
        one_backward = self.critic.reads_policy or self.accelerator.scaler is not None or self.spreads
        if loss.requires_grad and not one_backward:
            named = self.model.named_parameters()
            loss = backward_now(loss, [parameter for name, parameter in named if not is_critic_parameter(name)])
        return loss, values, metrics

    def _policy_outputs(self, model: Any, batch: Rollout) -> tuple[PolicyPass, Tensor | None, Tensor | None]:
        """Run the policy with gradients, or take the pass that the rollout kept; its values, and an exact KL."""
        args, reads = self.args, self.critic.reads_policy
        kept = self.kept_pass.take(batch) if self.model.training else None
        if kept is not None:
            return kept, kept.kept, None
        exact = args.kl_placement == "loss" and args.kl_estimator == "full"
        new = policy_pass(self, model, batch, read=self._read(exact), router_loss=self.aux_loss_enabled)
        if not exact:
            return new, new.kept, None
        anchor, to_old = batch.anchor_hidden, args.kl_anchor == "old"
        assert anchor is not None  # the rollout keeps it for such a loss
        kl = exact_kl(self, self.roles, self.reference, new.kept, anchor, batch.completion_mask, to_old)
        return new, self.critic.read(new.kept) if reads else None, kl

    # 7. The end of an optimizer step: is it made?
    def _end_of_step(self) -> None:
        self.check_gradient()
        self._metrics["train"]["ppo/updates_made"].append(float(self.updates.made))
        self._metrics["train"]["ppo/entropy_coef"].append(self.updates.entropy_coef)
        for name, parameter in self.model.named_parameters():
            if not self.updates.made or (self.updates.warming_up and not is_critic_parameter(name)):
                parameter.grad = None  # unlike a zero, it also keeps Adam from moving on with its momentum

    # 8. Metrics, and what follows from them.
    def _log_rollout(self, facts: RolloutFacts, advantages: Tensor) -> None:
        facts = facts.gather(self.accelerator)
        if self.model.training:
            self._metrics["train"]["completions/clipped_ratio"][-1:] = [(1 - facts.ended).float().mean().item()]
            means = facts.metrics(self.kl_controller.value)
            for name, mean in means.items():
                self._metrics["train"][name].append(mean)
            self.last_rollout = {name: values[-1] for name, values in self._metrics["train"].items() if values}
            self.kl_coef = self.kl_controller.value
            steered = steered_kl(facts.kl, facts.mask, self.args.kl_target_per).mean().item()
            self.kl_controller.update(steered, len(facts))
            if not self._told_of_unit:
                self._told_of_unit = checks.warn_of_kl_unit(self.args, means["kl"], means["kl_per_token"])
            self.updates.begin_rollout(means["critic/explained_variance"], self.state.global_step)
        else:
            self.evaluated.add(facts)
        self._metrics[self.mode].pop("frac_reward_zero_std", None)  # about groups
        # TRL's table shows the group's advantages; PPO's are per token, so it gets their mean over each completion
        gathered = self.accelerator.gather(advantages).tolist()
        for _ in gathered[: len(self._logs["advantages"])]:  # it holds no more than a rollout has
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(gathered)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as TRL does, but count each row once, however the batches and processes are cut."""
        repeats: Any = self.num_generations_eval
        stream = isinstance(dataloader.dataset, torch.utils.data.IterableDataset)
        self.evaluated.begin(None if stream else len(dataloader.dataset) * repeats)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, with the metrics of micro-batches since the last log, or of all rows of an evaluation."""
        metrics, of_steps = self._metrics[self.mode], self.step_metrics[self.mode].collect()
        if self.mode == "eval":
            rewards = (self.reward_func_names, self.reward_weights)
            self.evaluated.log(logs, metrics, of_steps, self.args.vf_coef, self.kl_controller.value, *rewards)
        else:
            for name, value in of_steps.items():
                metrics[name].append(value)
        super().log(logs, start_time)

    # 9. Checkpoints: the policy in the folder itself, critic and average in `critic/` and `ema/`, and the run's state.
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            checkpoint.save_models(self, Path(output_dir or self.args.output_dir or ""), *self.saved_with())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.load_models(self, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    @on_whole_weights
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        checkpoint.save_controls(self, output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The main process now calls the checkpoint complete and removes older ones: all must have written theirs
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        fresh = [dict(group) for group in self.optimizer.param_groups] if checkpoint and self.optimizer else []
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            continue_run(self, checkpoint, fresh)
