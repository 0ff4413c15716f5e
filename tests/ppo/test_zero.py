"""PPO's decisions under DeepSpeed, by a stand-in for its engine; `test_sharded.py` has the real one."""

import copy
import inspect
import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper
from torch import nn
from transformers.integrations.deepspeed import deepspeed_init

from rlhf_recipes import PPOConfig
from rlhf_recipes.models.roles import CRITIC_MODEL
from rlhf_recipes.ppo.checkpoint import check_run
from rlhf_recipes.ppo.inputs import check_given
from rlhf_recipes.ppo.resume import settings_of
from rlhf_recipes.ppo.sharded import ShardedTrainer, check_sharding
from rlhf_recipes.ppo.zero import ZeroSteps


class Engine:
    """Steps as ZeRO-2 does with one process: each group is one flat tensor, which gets the averaged, clipped gradient.

    Args:
        optimizer: The optimizer, of which it takes over the groups.
        clip: Norm to which gradients are clipped.
    """

    def __init__(self, optimizer, clip):
        self._optimizer, self._clip, self.norm = optimizer, clip, None
        self._members = [group["params"] for group in optimizer.param_groups]
        for group, members in zip(optimizer.param_groups, self._members, strict=True):
            group["params"] = [nn.Parameter(torch.cat([weight.detach().flatten() for weight in members]))]

    def get_global_grad_norm(self):
        return self.norm

    def step(self, of_all=lambda gradient: gradient):
        flat = [torch.cat([weight.grad.flatten() for weight in members]) for members in self._members]
        self.norm = torch.cat(flat).norm().item()
        groups = self._optimizer.param_groups
        for group, members, gradient in zip(groups, self._members, flat, strict=True):
            group["params"][0].grad = of_all(gradient) * min(1.0, self._clip / (self.norm + 1e-6))
            self._optimizer.param_groups = [group]
            self._optimizer.step()
            parts = group["params"][0].detach().split([weight.numel() for weight in members])
            for weight, part in zip(members, parts, strict=True):
                weight.data.copy_(part.view_as(weight))
                weight.grad = None
        self._optimizer.param_groups = groups


def networks():
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    policy.add_module(CRITIC_MODEL, nn.Linear(3, 1))
    return policy


def loss_of(policy, step):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
    return policy[2](policy[1](policy[0](x))).square().sum() + 3 * getattr(policy, CRITIC_MODEL)(x).square().sum()


def optimizer_of(policy):
    named = list(policy.named_parameters())
    of_role = [[weight for name, weight in named if (CRITIC_MODEL in name) == critic] for critic in (False, True)]
    groups = [{"params": of_role[0], "lr": 0.1}, {"params": of_role[1], "lr": 0.3}]
    return torch.optim.AdamW(groups, weight_decay=0.1)


def steps_of(policy, clip=0.5, **updates):
    optimizer = optimizer_of(policy)
    reduce = SimpleNamespace(reduce=lambda tensor, reduction: tensor, device="cpu", num_processes=1)
    decided = SimpleNamespace(**{"made": True, "warming_up": False} | updates)
    steps = ZeroSteps(optimizer, policy, decided, reduce, clip)
    reduce.deepspeed_engine_wrapped = engine = Engine(optimizer, clip)
    return steps, decided, engine


# Whether the update is made, and whether only the critic is trained
DECISIONS = [(True, True), (True, True), (True, False), (False, False), (True, False), (True, False)]


def test_the_engine_makes_the_updates_that_a_loop_of_ones_own_makes():
    policy = networks()
    other = copy.deepcopy(policy)
    _, decided, engine = steps_of(policy)
    plain = optimizer_of(other)
    for step, (made, warming_up) in enumerate(DECISIONS):
        decided.made, decided.warming_up = made, warming_up
        loss_of(policy, step).backward()
        engine.step()
        loss_of(other, step).backward()
        for name, weight in other.named_parameters():
            if not made or (warming_up and CRITIC_MODEL not in name):
                weight.grad = None
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        plain.step()
        plain.zero_grad()
        assert not made or engine.norm == pytest.approx(norm.item(), rel=1e-6), step
        torch.testing.assert_close(dict(policy.named_parameters()), dict(other.named_parameters()))


@pytest.mark.parametrize("warming_up", [False, True])
def test_the_first_step_is_checked_against_what_was_computed(warming_up):
    policy = networks()
    steps, _, engine = steps_of(policy, warming_up=warming_up)
    loss_of(policy, 0).backward()
    engine.step()
    steps.check()
    hooks = [len(weight._backward_hooks or ()) for weight in policy.parameters()]
    assert hooks == [1, 1, 1, 1, 0, 0]  # nothing goes on adding up


@pytest.mark.parametrize(("clip", "factor"), [(0.5, 0.5), (0.0, 1.001), (0.5, 0.0)])
def test_a_gradient_that_is_not_the_mean_stops_the_run(clip, factor):
    policy = networks()
    steps, _, engine = steps_of(policy, clip)
    engine._clip = clip or float("inf")
    loss_of(policy, 0).backward()
    engine.step(lambda gradient: gradient * factor)
    with pytest.raises(RuntimeError, match="gradient of the policy is not the mean of those of the processes"):
        steps.check()


def test_weights_in_16_bits_are_refused():
    with pytest.raises(ValueError, match=r"float32 of a weight in torch\.bfloat16, as '0\.weight'"):
        steps_of(networks().bfloat16())


def test_accelerate_still_steps_within_the_backward_pass_and_nowhere_else():
    """Once it leaves the step to the loop, the first step is checked, and its norm is logged, before it is made."""
    assert "self.engine.step()" in inspect.getsource(DeepSpeedEngineWrapper.backward)
    assert "pass  #" in inspect.getsource(DeepSpeedOptimizerWrapper.step)


def test_accelerate_knows_the_fields_of_the_launch_file(repo_root):
    config = yaml.safe_load((repo_root / "recipes" / "accelerate" / "zero2.yaml").read_text())
    assert (config["distributed_type"], config["deepspeed_config"]["zero_stage"]) == ("DEEPSPEED", 2)
    known = {name.removeprefix("--") for action in launch_command_parser()._actions for name in action.option_strings}
    assert config["deepspeed_config"].keys() <= known, "accelerate would leave out what it does not know"


def test_transformers_still_drops_an_optimizer_that_was_given():
    assert "trainer.optimizer = None" in inspect.getsource(deepspeed_init)


def trainer(image_reader=None, stage=2, precision="no", config=None, processes=1, **args):
    plugin = SimpleNamespace(
        zero_stage=stage, deepspeed_config={"zero_optimization": {"stage": stage}} | (config or {})
    )
    return SimpleNamespace(
        is_deepspeed_enabled=True,
        is_fsdp_enabled=False,
        accelerator=SimpleNamespace(
            state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision=precision, num_processes=processes
        ),
        image_reader=image_reader,
        args=SimpleNamespace(**{"optim": "adamw_torch_fused", "ema_decay": None, "use_vllm": False} | args),
    )


OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("settings", "instead"),
    [
        ({"stage": 1}, "Set `zero_stage: 2`"),
        ({"precision": "bf16"}, "Set `bf16: false`, and load the base in 16 bits"),
        ({"precision": "fp16"}, "Set `bf16: false`, and load the base in 16 bits"),
        (
            {"config": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}},
            "`offload_optimizer_device: none`",
        ),
        ({"config": {"optimizer": {"type": "AdamW"}}}, "Remove it: the stage's YAML says both"),
        ({"config": {"scheduler": {"type": "WarmupLR"}}}, "Remove it: the stage's YAML says both"),
        ({"optim": "paged_adamw_8bit"}, "Set `optim: adamw_torch`"),
        ({"optim": "adagrad"}, "Set `optim: adamw_torch`"),
        ({"ema_decay": 0.9}, r"launch with recipes/accelerate/ddp\.yaml"),
        ({"processes": 2}, "Set `use_cpu: true`"),  # the test is one process
        ({"use_vllm": True}, "Leave `use_vllm` out"),
        ({"image_reader": object()}, r"Launch with recipes/accelerate/ddp\.yaml"),
    ],
)
def test_refusals_name_what_to_use_instead(settings, instead):
    with pytest.raises(ValueError, match=f"PPOTrainer does not run so under DeepSpeed.*{instead}"):
        check_sharding(type("PPOTrainer", (SimpleNamespace,), {})(**vars(trainer(**settings))))


def test_what_is_allowed_is_let_pass():
    check_sharding(trainer(config={"zero_optimization": {"offload_optimizer": {"device": "none"}}}))


def test_zero_3_is_refused_before_anything_is_loaded(monkeypatch, prompts):
    monkeypatch.setattr("rlhf_recipes.ppo.inputs.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"ZeRO-3 .*fsdp2\.yaml.*zero2\.yaml"):
        check_given(None, prompts, None, None, None)


def test_an_infinite_gradient_of_the_first_step_is_called_so(tmp_path):
    accelerator = SimpleNamespace(scaler=None, process_index=0)
    args = SimpleNamespace(output_dir=str(tmp_path))
    run = SimpleNamespace(accelerator=accelerator, args=args, _buffered_inputs=[{"ids": torch.ones(2)}])
    run._norm, run._reduction = lambda: torch.tensor(float("inf")), object()  # which would find another gradient
    with pytest.raises(FloatingPointError, match="norm of the gradient is inf"):
        ShardedTrainer.check_gradient(run)


def test_an_optimizer_that_transformers_would_drop_is_refused():
    given = SimpleNamespace(is_deepspeed_enabled=True, optimizer=object())
    with pytest.raises(ValueError, match="one that was given, or that of an earlier `train\\(\\)`, would be lost"):
        ShardedTrainer._prepare_for_training(given, 1, None, None)


@pytest.mark.parametrize(
    ("saved_under", "run_under", "changes", "processes", "message"),
    [
        (True, False, {}, 2, "saved under DeepSpeed, and this run is without it"),
        (False, True, {}, 2, "saved without DeepSpeed, and this run is under it"),
        (True, True, {"learning_rate": 1e-3}, 2, "`learning_rate` 0.001"),
        (True, True, {"max_steps": 9}, 2, "`max_steps` 9"),
        (True, True, {}, 4, "`processes` 4"),
    ],
)
def test_a_checkpoint_of_another_launch_is_refused(saved_under, run_under, changes, processes, message, tmp_path):
    same = {"use_cpu": True, "bf16": False, "max_steps": 4, "learning_rate": 1e-4}
    state = {"step": 0, "settings": settings_of(PPOConfig(str(tmp_path), **same), 2)}
    (tmp_path / "ppo_state.json").write_text(json.dumps(state))
    if saved_under:
        (tmp_path / "global_step2").mkdir()
        (tmp_path / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    run = SimpleNamespace(
        accelerator=SimpleNamespace(process_index=0, num_processes=processes),
        args=PPOConfig(str(tmp_path), **same | changes),
        is_deepspeed_enabled=run_under,
    )
    with pytest.raises(ValueError, match=message):
        check_run(run, str(tmp_path))
