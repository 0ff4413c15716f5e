"""What PPO asks of TRL's engine besides its maths: two learning rates, shuffles, dropped updates, metrics."""

from __future__ import annotations

import hashlib
import logging
import math
import sys
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from transformers import set_seed
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from rlhf_recipes.models.chance import compute_as_in_evaluation
from rlhf_recipes.ppo._trl import sample_rollout
from rlhf_recipes.ppo.checks import check_finite, check_optimizer
from rlhf_recipes.ppo.critic import is_critic_parameter
from rlhf_recipes.ppo.given import check_callbacks
from rlhf_recipes.ppo.objective import backward_now
from rlhf_recipes.ppo.out_of_memory import phase
from rlhf_recipes.ppo.padding import join, sort_within_steps
from rlhf_recipes.ppo.prompts import PromptRules, check_rows
from rlhf_recipes.ppo.resumable import ResumableTrainer
from rlhf_recipes.ppo.resume import critic_rate
from rlhf_recipes.ppo.roles_table import roles_table
from rlhf_recipes.shaping import looks_like_per_token

if TYPE_CHECKING:
    from rlhf_recipes.ppo.step_metrics import StepMetrics

logger = logging.getLogger(__name__)


def process_seed(seed: int, rank: int) -> int:
    """Seed of a process's sampling, so that runs and processes have nothing in common.

    Example:
        >>> process_seed(42, 0), process_seed(42, 1) == process_seed(43, 0)
        (42, False)
    """
    return seed if rank == 0 else int.from_bytes(hashlib.sha256(f"{seed} {rank}".encode()).digest()[:4])


class PPOEngine(ResumableTrainer):
    """The base of `PPOTrainer`, which sets the attributes below."""

    prompt_rules: PromptRules
    step_metrics: dict[str, StepMetrics]
    _logs: dict[str, Any]
    _told_of_unit = False

    @property
    def half_precision(self) -> bool:
        """Whether the networks compute in 16 bits."""
        weights = self.roles.model.get_base_model().dtype
        return self.accelerator.mixed_precision in ("bf16", "fp16") or weights != torch.float32

    @property
    def mode(self) -> str:
        """Whose metrics these are: `train` or `eval`."""
        return "train" if self.model.training else "eval"

    @phase("train")  # of what is in no other phase, such as the first step of the optimizer
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does; the main process first prints what the roles take in memory."""
        check_callbacks(self.callback_handler.callbacks, self.trains_whole_model)
        if self.is_world_process_zero():
            sys.stdout.write(roles_table(self))
        return super().train(*args, **kwargs)

    def _seed_sampling(self) -> None:
        """Let each process sample from a stream of its own: by TRL's seed + rank, the next seed would share it."""
        if self.accelerator.process_index > 0:
            set_seed(process_seed(self.args.seed, self.accelerator.process_index))

    @phase("generate")
    def _generate(self, prompts: list[Any]) -> Any:
        return super()._generate(prompts)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        return sample_rollout(self, prompt_ids), None  # TRL spends time on padding, and on rows that have ended

    # 1. Two learning rates
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create TRL's optimizer, with groups of its own for the critic, which learns faster than the policy."""
        given = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if given:
            if not isinstance(optimizer, AcceleratedOptimizer):  # then it is the one of an earlier `train()`
                check_optimizer(self.model, optimizer, self.args)
                self.optimizer_given = True
            return optimizer
        rate = critic_rate(self.args.critic_learning_rate, self.args.learning_rate)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            for critic in (False, True):
                members = [p for p in group["params"] if is_critic_parameter(names[p]) == critic]
                groups.append({**group, "params": members, "lr": rate if critic else group["lr"]})
        optimizer.param_groups[:] = [group for group in groups if group["params"]]
        return optimizer

    # 2. Order of the prompts, and minibatches
    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Make TRL's loader; rows that `evaluate` is given are checked as those of the trainer were."""
        if not (eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset):
            eval_dataset = check_rows(eval_dataset, "eval_dataset", self.prompt_rules)
        return super().get_eval_dataloader(eval_dataset)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self.model.training and self.args.disable_dropout:
            compute_as_in_evaluation(self.model)  # for the rollout and for the loss
        micro_batches = self.args.micro_batches_per_rollout
        new_epoch = self._step % micro_batches == 0 and self._step % self._steps_per_rollout != 0
        if self.model.training and new_epoch and micro_batches > 1 and self._buffered_inputs is not None:
            # TRL shuffles a rollout once; each further epoch over it gets minibatches of its own
            shuffled: Any = shuffle_sequence_dict(join(self._buffered_inputs))
            self._buffered_inputs = split_tensor_dict(shuffled, micro_batches)
        inputs = super()._prepare_inputs(generation_batch)
        accumulated = self.args.gradient_accumulation_steps
        if self.model.training and self._step % micro_batches == 0 and accumulated > 1:
            self._buffered_inputs = sort_within_steps(self._buffered_inputs, accumulated)
            inputs = self._buffered_inputs[0]
        return inputs

    def _checkpoint_every_n_layers(self) -> None:
        """Restore which layers recompute: TRL turns that off for a rollout, and then on for every layer."""
        given: Any = self.args.activation_checkpointing_kwargs or {}
        kwargs = dict(given)
        places = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
        if self.args.activation_checkpointing and places:
            self.model.activation_checkpointing_enable(kwargs, **places)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        return None, None, None  # TRL asks for the old policy's, which come with the values in one pass of ours

    @phase("train")
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run a micro-batch as TRL does, unless the rest of the rollout is left out, and drop updates."""
        if self.updates.stopped and self._step % self._steps_per_rollout != 0:
            self._step += 1
            if self.accelerator.sync_gradients:
                self._metrics["train"]["ppo/updates_made"].append(0.0)
            return torch.zeros((), device=self.accelerator.device)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._check_gradients()
            made = self.updates.end_step()
            self._metrics["train"]["ppo/updates_made"].append(float(made))
            self._metrics["train"]["ppo/entropy_coef"].append(self.updates.entropy_coef)
            for name, parameter in self.model.named_parameters():
                if not made or (self.updates.warming_up and not is_critic_parameter(name)):
                    parameter.grad = None  # unlike a zero, it also keeps Adam from moving on with its momentum
        return loss

    def _backward_of_policy(self, loss: Tensor) -> Tensor:
        """Free what the policy's loss keeps for its gradient, before a critic of its own network takes as much."""
        if not loss.requires_grad or self.accelerator.scaler is not None:
            return loss  # float16's gradients need the scale of the whole loss
        named = self.model.named_parameters()
        return backward_now(loss, [parameter for name, parameter in named if not is_critic_parameter(name)])

    def _check_gradients(self) -> None:
        if self.accelerator.scaler is None:  # in float16 the scaler leaves such updates out, and lowers its scale
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            rank = self.accelerator.process_index
            check_finite("norm of the gradient", norm, join(self._buffered_inputs), self.args.output_dir, rank)

    # 3. Metrics, and what follows from them
    def _log_rollout(self, metrics: dict[str, Tensor], mean_advantages: Tensor, kl: Tensor) -> None:
        metrics["kl_coef"] = mean_advantages.new_tensor(self.kl_controller.value)
        means = self._log_means(metrics)
        if self.model.training:
            self.kl_coef = self.kl_controller.value
            steered = self.accelerator.gather(kl).mean().item()
            self.kl_controller.update(steered, len(mean_advantages) * self.accelerator.num_processes)
            self._check_kl_unit(means)
            self.updates.begin_rollout(means["critic/explained_variance"], self.state.global_step)
        self._metrics[self.mode].pop("frac_reward_zero_std", None)  # about groups
        # TRL's table shows the group's advantages; PPO's are per token, so it gets their mean over each completion
        advantages = self.accelerator.gather(mean_advantages).tolist()
        for _ in advantages:
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(advantages)

    def _check_kl_unit(self, means: dict[str, float]) -> None:
        """Say once that `kl_target` fits the KL of a token, where it is compared with that of a completion."""
        args, kl, per_token = self.args, means["kl"], means["kl_per_token"]
        adaptive = args.kl_controller == "adaptive" and args.kl_target_per == "completion"
        if adaptive and not self._told_of_unit and looks_like_per_token(args.kl_target, kl, per_token):
            self._told_of_unit = True
            logger.warning(
                "`kl_target` is %g nats per completion, but completions are %.3g nats from the reference, %.3g for "
                "each of their tokens. If it was meant for a token, set `kl_target_per: token`, or multiply it with "
                "the usual length; else `kl_coef` goes on rising until completions as a whole are that near.",
                *(args.kl_target, kl, per_token),
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, with the metrics of the micro-batches since the last log."""
        for name, value in self.step_metrics[self.mode].collect().items():
            self._metrics[self.mode][name].append(value)
        prefix = next((name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")), "eval")
        if self.mode == "eval" and prefix != "eval":  # one of several data sets; TRL would call all of theirs `eval_`
            for name, values in self._metrics["eval"].items():
                known = [value for value in values if not math.isnan(value)]
                mean: Any = sum(known) / len(known) if known else None
                logs[f"{prefix}_{name}"] = mean
            self._metrics["eval"].clear()
        super().log(logs, start_time)

    def _of_all_processes(self, rows: Tensor) -> Tensor:
        """Collect tensors of shape (B, T), because a mean over tokens is not the mean of the processes' means."""
        whole: Tensor = self.accelerator.gather(self.accelerator.pad_across_processes(rows, dim=1))
        return whole

    def _log_means(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        stacked = torch.stack([value.detach().float() for value in metrics.values()])
        means = dict(zip(metrics, self.accelerator.gather(stacked[None]).mean(dim=0).tolist(), strict=True))
        for name, mean in means.items():
            self._metrics[self.mode][name].append(mean)
        return means
