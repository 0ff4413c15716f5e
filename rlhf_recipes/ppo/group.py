"""TRL's trainers that compare the completions of one prompt, on the roles, rewards and checks of `PPOTrainer`.

What GRPO and RLOO compute is TRL's. Added is what shares one base in memory: reward adapters beside the policy, the
reference as a copy of its adapter, and a KL in nats per completion, in which the hooks of `rlhf_recipes.evaluation`
count.
"""

from __future__ import annotations

import copy
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import ProcessorMixin, set_seed
from trl import GRPOTrainer, RLOOTrainer

from rlhf_recipes.checkpoints import KeptRates
from rlhf_recipes.data.chat_templates import check_prompt_format
from rlhf_recipes.models.adapters import POLICY, is_adapter
from rlhf_recipes.models.plain_lora import changes_base
from rlhf_recipes.models.resumed import check_same_adapter
from rlhf_recipes.models.roles import REFERENCE
from rlhf_recipes.ppo import setup
from rlhf_recipes.ppo._trl import as_scored
from rlhf_recipes.ppo.checkpoint import folder_of, save_adapter
from rlhf_recipes.ppo.checks import check_not_sharded, check_rewards
from rlhf_recipes.ppo.console import show_roles, show_steps
from rlhf_recipes.ppo.group_config import GRPOAdapterConfig, RLOOAdapterConfig
from rlhf_recipes.ppo.inputs import check_callbacks, check_given, reward_tokenizers
from rlhf_recipes.ppo.prompts import check_rows, evaluation_rows, prompt_rules, with_columns_of_rewards
from rlhf_recipes.rewards.encoding import which_ended
from rlhf_recipes.tracking.console import QuietModelCard

_LENGTH = "completions/mean_length"


class _AdapterTraining(QuietModelCard):
    """What both trainers add to TRL's. Their arguments are those of TRL's."""

    _config_class: type[Any]

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        args = self._checked_arguments(args, model, peft_config)
        check_given(None, train_dataset, eval_dataset, processing_class, peft_config, callbacks)
        if isinstance(processing_class, ProcessorMixin):
            raise TypeError(
                f"{type(self).__name__} reads text: give the processor's `tokenizer`, or use `PPOTrainer`."
            )
        set_seed(args.seed)  # new adapters start at random
        policy, self.roles, _ = setup.build_policy(model, args, quantization_config, peft_config, with_reference=False)
        tokenizer = processing_class or setup.load_base_tokenizer(policy, args)
        args.model_init_kwargs = None  # used
        rules = prompt_rules(policy, tokenizer, args)
        tokenizers: Any = reward_tokenizers(reward_processing_classes, reward_funcs)
        reward_funcs, args.reward_weights = setup.build_rewards(reward_funcs, self.roles, tokenizer, args, tokenizers)
        rules = with_columns_of_rewards(rules, reward_funcs, train_dataset, self.roles)
        train_dataset = check_rows(train_dataset, "train_dataset", rules, args.prompts_per_rollout)
        check_prompt_format(train_dataset, tokenizer, policy, rules.template_kwargs)
        policy.requires_grad_(False)  # TRL rounds trainable parameters of a 4-bit model to bfloat16: none is, for now
        trainer: Any = super()
        trainer.__init__(
            model=policy,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=evaluation_rows(eval_dataset, rules, policy),
            processing_class=tokenizer,
            reward_processing_classes=tokenizers,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        setup.seed_sampling(args.seed, self.accelerator.process_index)
        check_not_sharded(self)
        if REFERENCE not in policy.peft_config:  # TRL makes one where its loss needs it; evaluations always do
            self.roles.add_copy(REFERENCE)
        self.roles.set_trainable(POLICY)
        self._last_length = {"train": 0.0, "eval": 0.0}
        self.add_callback(KeptRates())
        show_steps(self)

    # TRL's, whose types are left open
    args: Any
    model: Any
    accelerator: Any
    processing_class: Any
    train_dataset: Any
    state: Any
    reward_func_names: list[str]
    eos_token_ids: list[int]
    callback_handler: Any
    _metrics: dict[str, Any]
    add_callback: Any

    def _checked_arguments(self, args: Any, model: Any, peft_config: Any) -> Any:
        kind = self._config_class
        if args is not None and not isinstance(args, kind):
            raise TypeError(f"`args` must be a `{kind.__name__}`, got {type(args).__name__}. It has TRL's fields.")
        adapted = isinstance(model, PeftModel) or (isinstance(model, str | Path) and is_adapter(model))
        if peft_config is None and not adapted:
            raise ValueError(
                f"{type(self).__name__} trains an adapter, but `model` has none and `peft_config` is missing. Give "
                "`LoraConfig(task_type='CAUSAL_LM')`, or train the whole model with TRL's own trainer, on rewards "
                "with a base of their own; the hooks and `evaluate_policy` take that as well."
            )
        _check_start(peft_config or (model.peft_config.get(POLICY) if isinstance(model, PeftModel) else None))
        return copy.copy(args) if args is not None else kind("output")

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does, after the table of roles."""
        check_callbacks(self.callback_handler.callbacks, trains_whole_model=False)
        show_roles(self)
        folder = folder_of(resume_from_checkpoint, self.args)
        if isinstance(folder, str):
            check_same_adapter(folder, self.model, what="this run's policy")
        trainer: Any = super()
        return trainer.train(folder, *args, **kwargs)

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:
        ended = which_ended(len(prompts), completion_ids_list, self.eos_token_ids, None)
        inputs, completions = as_scored(self, inputs, prompts, completions, completion_ids_list, ended)
        trainer: Any = super()
        rewards_per_func: Tensor = trainer._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        check_rewards(rewards_per_func, self.reward_func_names)
        return rewards_per_func

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, with its KL as `kl_per_token`, and in `kl` that of a completion of mean length."""
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        if metrics.get(_LENGTH):  # once for each rollout
            self._last_length[mode] = fmean(metrics[_LENGTH])
        if metrics.get("kl"):
            metrics["kl_per_token"] = metrics["kl"]
            metrics["kl"] = [kl * self._last_length[mode] for kl in metrics["kl_per_token"]]
        trainer: Any = super()
        trainer.log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            prompts = self.train_dataset["prompt"] if isinstance(self.train_dataset, Dataset) else []
            save_adapter(self.roles, folder, self.processing_class, prompts)
            self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")  # Trainer compares it when it resumes

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.roles.load(resume_from_checkpoint, POLICY, POLICY)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


class GRPOAdapterTrainer(_AdapterTraining, GRPOTrainer):
    """Train an adapter with TRL's GRPO against reward functions, reward models and reward adapters.

    Loss, advantages and generation are TRL's. Policy, reference and reward adapters share one base model in memory,
    as those of `PPOTrainer` do.

    Source: DeepSeekMath, https://huggingface.co/papers/2402.03300, section 4.1.

    Args:
        model: The policy: the folder of a trained adapter (the SFT stage's), a `PeftModel` with such an adapter, or a
            base model (path, hub id or instance) with `peft_config` for a fresh one. The reference is the policy as
            it is given.
        reward_funcs: As for `PPOTrainer`: functions with TRL's reward signature (they also get `prompt_ids`), folders
            of reward adapters trained on the same base, ensembles, and sequence classification models or their paths.
        args: The configuration.
        train_dataset: Rows with a column `prompt`, plain text or a list of messages; or a stream of such. Where they
            have a column `reward_prompt`, reward models read it in place of the prompt.
        eval_dataset: The same for `evaluate`, or a dictionary of such.
        processing_class: The tokenizer, with a padding token; by default the base model's.
        reward_processing_classes: Tokenizers of reward models, one for each reward, in place of their own.
        callbacks: Callbacks, as in TRL.
        optimizers: Optimizer and scheduler, as in TRL.
        quantization_config: Quantization of the base, when `model` is a path.
        peft_config: LoRA configuration of a fresh adapter, when `model` is a base model.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If the model, the adapters, the prompts or the configuration do not fit together.

    Example:
        >>> trainer = GRPOAdapterTrainer("outputs/quickstart/sft", "outputs/quickstart/reward")  # doctest: +SKIP
    """

    _config_class = GRPOAdapterConfig


class RLOOAdapterTrainer(_AdapterTraining, RLOOTrainer):
    """Train an adapter with TRL's RLOO against reward functions, reward models and reward adapters.

    Loss, advantages and generation are TRL's. Policy, reference and reward adapters share one base model in memory,
    as those of `PPOTrainer` do.

    Source: Back to Basics, https://huggingface.co/papers/2402.14740, section 2.2.

    Args:
        model: As for `GRPOAdapterTrainer`, like all that follow.
        reward_funcs: The rewards.
        args: The configuration.
        train_dataset: Rows with a column `prompt`.
        eval_dataset: The same for `evaluate`.
        processing_class: The tokenizer.
        reward_processing_classes: Tokenizers of reward models.
        callbacks: Callbacks.
        optimizers: Optimizer and scheduler.
        quantization_config: Quantization of the base, when `model` is a path.
        peft_config: LoRA configuration of a fresh adapter.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If the model, the adapters, the prompts or the configuration do not fit together.

    Example:
        >>> trainer = RLOOAdapterTrainer("outputs/quickstart/sft", "outputs/quickstart/reward")  # doctest: +SKIP
    """

    _config_class = RLOOAdapterConfig


def _check_start(config: Any) -> None:
    """Refuse an adapter that takes a part of the base with it: TRL would copy it for the reference, and take more."""
    if config is not None and changes_base(config):
        raise ValueError(
            f"The adapter has `init_lora_weights: {config.init_lora_weights}`, which takes a part of the base out of "
            "it, that reference and rewards share. Start it with `init_lora_weights: true`, or use `PPOTrainer`."
        )
