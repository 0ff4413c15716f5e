"""PPO with what FSDP2 or DeepSpeed spreads over processes: what is refused, what is checked, and what is saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from rlhf_recipes.models.roles import is_critic_parameter
from rlhf_recipes.models.sharding import gathered, is_sharded, part_like, whole
from rlhf_recipes.ppo.checks import check_finite
from rlhf_recipes.ppo.images import ImageTrainer
from rlhf_recipes.ppo.rollout import join
from rlhf_recipes.ppo.updates import UpdateControl
from rlhf_recipes.ppo.zero import ZeroSteps, check_zero

Result = TypeVar("Result")
_FILE = "recipes/accelerate/fsdp2.yaml"
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adagrad", "rmsprop", "sgd")  # torch's own know sharded weights
_TOLERANCE = 1e-3  # of the sum of a gradient's absolute values, for the order in which processes are added up


def check_sharding(trainer: Any) -> None:
    """Refuse launches and settings with which a run would be wrong, or is not known to be right, and settle the rest.

    Raises:
        ValueError: With what to use instead.
    """
    name, args = type(trainer).__name__, trainer.args
    if trainer.is_deepspeed_enabled:
        check_zero(trainer)
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    reasons = {
        f"`fsdp_version: {plugin.fsdp_version}` does not keep roles apart": (
            plugin.fsdp_version != 2,
            f"Set `fsdp_version: 2`, as in {_FILE}.",
        ),
        "`fp16: true` scales gradients, which is not known to be right with shards": (
            args.fp16,
            "Set `bf16: true`, or launch with recipes/accelerate/ddp.yaml.",
        ),
        f"`optim: {args.optim}` does not know sharded weights": (
            args.optim not in _OPTIMIZERS,
            "Set `optim: adamw_torch`, or launch with recipes/accelerate/ddp.yaml.",
        ),
        "`ema_decay` averages whole weights": (
            args.ema_decay is not None,
            "Leave it out, or launch with recipes/accelerate/ddp.yaml.",
        ),
        "8-bit weights lose their scales in shards": (
            getattr(trainer.roles.model.get_base_model(), "is_loaded_in_8bit", False),
            "Load the base in 4 bits, with `bnb_4bit_quant_storage: bfloat16`.",
        ),
        "vLLM gets the adapter as a whole, and each process holds a part of it": (
            args.use_vllm,
            "Leave `use_vllm` out, or launch with recipes/accelerate/ddp.yaml.",
        ),
        "pictures are embedded outside of the model's forward pass": (
            trainer.image_reader is not None,
            "Launch with recipes/accelerate/ddp.yaml.",
        ),
    }
    for reason, (refused, instead) in reasons.items():
        if refused:
            raise ValueError(f"{name} does not run so under FSDP: {reason}. {instead}")
    # Autocast computes in 16 bits, as without FSDP. FSDP's own policy would round 4-bit weights that are stored as
    # float32, and the critic's head
    plugin.mixed_precision_policy = None


class ReductionCheck:
    """Check once that what the optimizer gets is the mean over the processes of the gradients that each computed.

    A gradient that is taken past FSDP, by `autograd.grad` or outside of the outermost module, is not averaged, and
    nothing else shows it. So the sums of all gradients of the first step are compared: as each process computed them,
    weight by weight, and as they are after the backward pass.

    Args:
        accelerator: Adds up the processes.
        policy: The sharded model, with everything that is trained.

    Raises:
        RuntimeError: If a trained weight is not sharded, so that nothing would keep it the same on all processes.
    """

    def __init__(self, accelerator: Accelerator, policy: nn.Module) -> None:
        self._accelerator, self._policy = accelerator, policy
        apart = [name for name, weight in self._trained() if not isinstance(weight, DTensor)]
        if apart:
            raise RuntimeError(
                f"{len(apart)} trained weights are outside of FSDP, {apart[0]!r} among them: each process would train "
                f"its own. Launch with {_FILE}, without `fsdp_ignored_modules`."
            )
        self._sums: dict[str, Tensor] = {}
        with gathered(accelerator, policy):  # these are the weights that networks compute with
            self._hooks = [weight.register_hook(self._adding_to(name)) for name, weight in self._trained()]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self._policy.named_parameters() if weight.requires_grad]

    def _adding_to(self, name: str) -> Any:
        def add(gradient: Tensor) -> None:
            """Add what this process computed of a weight's gradient."""
            total = gradient.detach().double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total

        return add

    def check(self) -> None:
        """Compare, after the backward passes of an optimizer step and before anything is done to the gradients.

        Raises:
            RuntimeError: If a gradient is missing, or is another one.
        """
        for hook in self._hooks:
            hook.remove()
        trained, nothing = self._trained(), torch.zeros((), dtype=torch.float64, device=self._accelerator.device)
        computed = torch.stack([self._sums.get(name, nothing) for name, _ in trained])
        mean: Tensor = self._accelerator.reduce(computed, reduction="mean")
        for critic in (False, True):
            of_role = [weight.grad for name, weight in trained if is_critic_parameter(name) == critic]
            if all(gradient is None for gradient in of_role):
                raise RuntimeError(
                    f"The {'critic' if critic else 'policy'} got no gradient in the first step: it was taken past "
                    f"FSDP. {_ADVICE}"
                )
        for (name, weight), expected in zip(trained, mean.tolist(), strict=True):
            gradient = None if weight.grad is None else whole(weight.grad).double()
            found, size = (0.0, 0.0) if gradient is None else (gradient.sum().item(), gradient.abs().sum().item())
            if not abs(found - expected) <= _TOLERANCE * max(size, abs(expected)):
                raise RuntimeError(
                    f"The gradient of {name!r} is not the mean of those of the processes: it sums up to {found:.6g}, "
                    f"and theirs to {expected:.6g} on average. {_ADVICE}"
                )


_ADVICE = (
    "Compute losses and values in `PPOTrainer`'s own passes (rlhf_recipes/models/sharding.py, `call_inside`), or "
    "launch with recipes/accelerate/ddp.yaml."
)


def on_whole_weights(method: Callable[..., Result]) -> Callable[..., Result]:
    """Let a method of a trainer run while every process holds all weights of a sharded model."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Result:
        with gathered(self.accelerator, self.model):
            return method(self, *args, **kwargs)

    return run


class ShardedTrainer(ImageTrainer):
    """TRL's engine, whose model may be spread over processes: its files are those of a model that is not."""

    updates: UpdateControl
    _buffered_inputs: Any  # the micro-batches of the rollout that is trained on
    _reduction: ReductionCheck | ZeroSteps | None = None  # until the end of the first step

    def watch_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Let DeepSpeed's engine make only the updates of this optimizer that PPO makes."""
        if self.is_deepspeed_enabled:
            policy: Any = self.model
            clip = self.args.max_grad_norm
            self._reduction = ZeroSteps(optimizer, policy, self.updates, self.accelerator, clip)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_deepspeed_enabled and self.optimizer is not None:
            raise ValueError(
                "transformers makes a new optimizer for DeepSpeed, so that one that was given, or that of an earlier "
                "`train()`, would be lost. Leave it out and build a new trainer for each training, or launch with "
                "recipes/accelerate/ddp.yaml."
            )
        prepared = super()._prepare_for_training(*args, **kwargs)
        policy: Any = self.model
        if is_sharded(policy):
            self._reduction = ReductionCheck(self.accelerator, policy)
        return prepared

    @property
    def spreads(self) -> bool:
        """Whether FSDP2 or DeepSpeed spreads what is trained over processes, and takes gradients in its own way."""
        return bool(is_sharded(self.model) or self.is_deepspeed_enabled)

    def check_gradient(self) -> None:
        """Check the gradient of a step: it must be finite, and in a spread run's first step the processes' mean."""
        if self.accelerator.scaler is None:  # in float16 the scaler leaves such updates out, and lowers its scale
            rollout, rank = self._buffered_inputs, self.accelerator.process_index
            check_finite("norm of the gradient", self._norm(), join(rollout or [{}]), self.args.output_dir, rank)
        if self._reduction is not None:
            self._reduction.check()
            self._reduction = None

    def _norm(self) -> Tensor:
        if self.is_deepspeed_enabled:
            engine: Any = self.accelerator.deepspeed_engine_wrapped
            return torch.as_tensor(engine.get_global_grad_norm())
        policy: Any = self.model
        gradients = [weight.grad for weight in policy.parameters() if weight.grad is not None]
        return whole(nn.utils.get_total_norm(gradients))  # of a part alone, it would stop some processes, not others

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        norm: float = super()._get_grad_norm(model, grad_norm)
        return norm if self.updates.made else 0.0  # DeepSpeed's is still that of an update that was left out

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as TRL does; a sharded model is gathered, and the main process writes it."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        with gathered(self.accelerator, self.model):
            self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state: Any = self.optimizer.state_dict()  # type: ignore[union-attr]  # there is one by now
        kept = state["state"].items()
        state["state"] = {n: {key: whole(value).cpu() for key, value in weight.items()} for n, weight in kept}
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))  # type: ignore[union-attr]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.is_deepspeed_enabled:  # which has loaded what is trained, and no more
            self._load_from_checkpoint(checkpoint)
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer: Any = self.optimizer
        state = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        for number, weight in zip(numbers, weights, strict=True):
            of_weight = state["state"].get(number, {})  # accelerate's loader wants one of each, also in a warm-up
            for name, value in of_weight.items():
                of_weight[name] = part_like(weight, value) if value.shape == weight.shape else value
        optimizer.load_state_dict(state)
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))
