"""PPO under DeepSpeed's ZeRO-2: what is refused, which updates its engine makes, and what they are checked against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf_recipes.models.roles import is_critic_parameter
from rlhf_recipes.ppo.updates import UpdateControl

# Torch's that work on any part of a weight. In the place of torch's Adagrad ZeRO puts one of its own making
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "rmsprop", "sgd")
_FILE, _DDP = "recipes/accelerate/zero2.yaml", "recipes/accelerate/ddp.yaml"
_OF_CRITIC = "of_critic"  # in a parameter group: ZeRO puts flat tensors in the place of the named weights
_TOLERANCE = 1e-5  # of the sum of a gradient's absolute values, for the order in which float32 is added up


def check_zero(trainer: Any) -> None:
    """Refuse settings with which a run under DeepSpeed would be wrong, or is not known to be right.

    Raises:
        ValueError: With what to use instead.
    """
    args, plugin = trainer.args, trainer.accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    reasons = {
        f"`zero_stage: {plugin.zero_stage}` was never compared with other launches": (
            plugin.zero_stage != 2,
            f"Set `zero_stage: 2`, as in {_FILE}.",
        ),
        "DeepSpeed computes in 16 bits by rounding all weights, adapters and critic too": (
            trainer.accelerator.mixed_precision != "no",
            "Set `bf16: false`, and load the base in 16 bits (`dtype: bfloat16`), which computes in them.",
        ),
        "its optimizer in the memory of the CPU is another one": (
            offload.get("device", "none") != "none",
            "Set `offload_optimizer_device: none`.",
        ),
        "an optimizer or schedule of its configuration knows no groups of the critic": (
            "optimizer" in config or "scheduler" in config,
            "Remove it: the stage's YAML says both.",
        ),
        f"`optim: {args.optim}` is not known to be the same on parts of weights": (
            args.optim not in _OPTIMIZERS,
            f"Set `optim: adamw_torch`, or launch with {_DDP}.",
        ),
        "`ema_decay` reads gradients, which DeepSpeed has cleared by then": (
            args.ema_decay is not None,
            f"Leave it out, or launch with {_DDP}.",
        ),
        "accelerate does not see the other processes on a CPU": (
            trainer.accelerator.num_processes != _world_size(),
            "Set `use_cpu: true`, or each process trains on the same prompts.",
        ),
        "vLLM was not tried": (args.use_vllm, f"Leave `use_vllm` out, or launch with {_DDP}."),
        "pictures were not tried": (trainer.image_reader is not None, f"Launch with {_DDP}."),
    }
    for reason, (refused, instead) in reasons.items():
        if refused:
            raise ValueError(f"{type(trainer).__name__} does not run so under DeepSpeed: {reason}. {instead}")


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


class ZeroSteps:
    """Let the engine make the updates that PPO makes, and check the first one.

    accelerate calls the engine's step within the backward pass. The engine averages and clips the gradients, steps
    the optimizer, one parameter group after another, and clears the gradients. So what PPO does not make is left out
    here, by the optimizer, as if it had got no gradient; it was decided before the backward pass. In the critic's
    warm-up the policy's gradients are zero from the start, or they would count in the norm by which all are clipped.

    In the first step the sums of the gradients are compared, of policy and critic each: as the processes computed
    them, and as the optimizer got them. One that is taken past the engine, or twice, shows there and nowhere else.

    Args:
        optimizer: The optimizer, before DeepSpeed gets it.
        policy: The model, with all weights that are trained.
        updates: Decides about updates.
        accelerator: Adds up the processes.
        clip: Norm to which gradients are clipped; 0 for no clipping.

    Raises:
        ValueError: If a trained weight is not in float32.
    """

    def __init__(
        self, optimizer: Optimizer, policy: nn.Module, updates: UpdateControl, accelerator: Any, clip: float
    ) -> None:
        self._updates, self._accelerator, self._clip = updates, accelerator, clip
        self._computed, self._got, self._sizes = (torch.zeros(2, dtype=torch.float64) for _ in range(3))
        names = {weight: name for name, weight in policy.named_parameters() if weight.requires_grad}
        for weight, name in names.items():
            if weight.dtype != torch.float32:
                raise ValueError(
                    f"DeepSpeed trains a copy in float32 of a weight in {weight.dtype}, as {name!r}: it would not be "
                    f"the run of another launch. Load what is trained in float32, or launch with {_DDP}."
                )
            if not is_critic_parameter(name):
                weight.register_hook(self._zero_in_warm_up)
        self._watching: list[Any] = [
            weight.register_hook(self._adding_up(is_critic_parameter(name))) for weight, name in names.items()
        ]
        for group in optimizer.param_groups:
            group[_OF_CRITIC] = is_critic_parameter(names[group["params"][0]])
        self._watching.append(optimizer.register_step_pre_hook(self._look))
        optimizer.register_step_pre_hook(self._leave_out)

    def _zero_in_warm_up(self, gradient: Tensor) -> Tensor:
        return gradient * 0 if self._updates.warming_up else gradient

    def _leave_out(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if not self._updates.made or (self._updates.warming_up and not group[_OF_CRITIC]):
                for weight in group["params"]:
                    weight.grad = None  # unlike a zero, it also keeps Adam from moving on with its momentum

    def _adding_up(self, critic: bool) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            """Add what this process computed of a weight's gradient."""
            self._computed[int(critic)] += gradient.detach().double().sum().cpu()

        return add

    def _look(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for gradient in (weight.grad.double() for weight in group["params"] if weight.grad is not None):
                self._got[int(group[_OF_CRITIC])] += gradient.sum().cpu()
                self._sizes[int(group[_OF_CRITIC])] += gradient.abs().sum().cpu()

    def check(self) -> None:
        """Compare, after the first step.

        Raises:
            RuntimeError: If the optimizer got something else than the mean of what the processes computed.
        """
        for hook in self._watching:
            hook.remove()
        sums = torch.stack([self._computed, self._got, self._sizes]).to(self._accelerator.device)
        computed, got, sizes = self._accelerator.reduce(sums, reduction="sum")
        norm = self._accelerator.deepspeed_engine_wrapped.get_global_grad_norm()
        clipped = min(1.0, self._clip / (norm + 1e-6)) if self._clip > 0 else 1.0
        expected = computed / self._accelerator.num_processes * clipped
        for role, found, mean, size in zip(("policy", "critic"), got, expected, sizes, strict=True):
            if not abs(found - mean) <= _TOLERANCE * max(size, abs(mean)):
                raise RuntimeError(
                    f"The gradient of the {role} is not the mean of those of the processes: it sums up to "
                    f"{found:.6g}, and theirs to {mean:.6g} on average. It was taken past DeepSpeed's engine. Compute "
                    f"losses and values in `PPOTrainer`'s own passes, or launch with {_DDP}."
                )
