"""What other libraries compute on the batch of docs/coming_from.md, by their own code.

Each function gets the folder into which the library was installed, without what it depends on. Definitions are taken
out of its files by name, and what stands within its training loops by its first and last lines, and run with the
torch of this environment. Nothing of it is copied here.
"""

import ast
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

Batch = dict[str, Tensor]
KNOWN = {"torch": torch, "th": torch, "nn": nn, "np": np, "F": nn.functional, "Tensor": Tensor}


class Columns(dict):
    """The columns of a rollout of two rows."""

    batch_size = (2,)


def definitions(path: Path, *names: str, **more: Any) -> SimpleNamespace:
    """Run functions, classes and methods of a file, without decorators, annotations of arguments and imports."""
    tree, space = ast.parse(path.read_text()), KNOWN | more
    found = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for name in names:
        node = found[name]
        node.decorator_list = []
        for function in [part for part in ast.walk(node) if isinstance(part, ast.FunctionDef)]:
            function.returns = None
            for argument in [*function.args.args, *function.args.kwonlyargs]:
                argument.annotation = None
        exec(compile(ast.Module([node], []), str(path), "exec"), space)
    return SimpleNamespace(**{name: space[name] for name in names}, space=space)


def lines(path: Path, first: str, last: str, space: dict[str, Any]) -> dict[str, Any]:
    """Run the lines of a file from the one that starts with `first` to the one that starts with `last`."""
    source = path.read_text().splitlines()
    start = next(i for i, line in enumerate(source) if line.strip().startswith(first))
    end = next(i for i, line in enumerate(source) if i >= start and line.strip().startswith(last))
    space = KNOWN | space
    exec(compile(textwrap.dedent("\n".join(source[start : end + 1])), str(path), "exec"), space)
    return space


def defaults_of(path: Path, function: str) -> dict[str, Any]:
    """Defaults of a function's arguments, or of a dataclass's fields."""
    nodes = ast.walk(ast.parse(path.read_text()))
    node = next(n for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == function)
    if isinstance(node, ast.ClassDef):
        given = [part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.value, ast.Call)]
        values = {part.target.id: {k.arg: k.value for k in part.value.keywords}["default"] for part in given}
    else:
        values = dict(
            zip([a.arg for a in node.args.args][-len(node.args.defaults) :], node.args.defaults, strict=True)
        )
    return {name: value.value for name, value in values.items() if isinstance(value, ast.Constant)}


def last_tokens(mask: Tensor) -> Tensor:
    return mask.sum(dim=1) - 1


def placed(batch: Batch) -> Tensor:
    """Scores on the last token, where a library takes token rewards."""
    rewards = torch.zeros_like(batch["logps"])
    rewards[torch.arange(len(rewards)), last_tokens(batch["mask"])] = batch["scores"]
    return rewards


def masked(result: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    """Leave out what stands on padding, which no loss reads."""
    return {
        name: torch.where(mask.bool(), value, 0.0) if isinstance(value, Tensor) and value.dim() == 2 else value
        for name, value in result.items()
    }


def trl(root: Path, batch: Batch) -> dict[str, Any]:
    """TRL 1.12: rewards, advantages and losses are lines of `PPOTrainer.train`."""
    path = root / "trl" / "experimental" / "ppo" / "ppo_trainer.py"
    args = SimpleNamespace(**defaults_of(path.with_name("ppo_config.py"), "PPOConfig"))
    maths = definitions(path, "masked_mean", "masked_var", "masked_whiten").space
    lengths, width = last_tokens(batch["mask"]), batch["mask"].shape[1]
    space = {
        **maths,
        "args": args,
        "responses": batch["mask"],  # only its shape is read
        "sequence_lengths": lengths,
        "logprobs": batch["old_logps"],
        "ref_logprobs": batch["ref_logps"],
        "values": batch["old_values"],
        "scores": batch["scores"],
        "INVALID_LOGPROB": 1.0,
        "empty_cache": lambda: None,
    }
    space = lines(path, "response_idxs = torch.arange", "advantages = torch.masked_fill", space)
    index = torch.arange(len(lengths))
    vpred = torch.masked_fill(batch["values"], space["padding_mask_p1"], 0)
    new = torch.masked_fill(batch["logps"], space["padding_mask"], 1.0)
    space |= {
        "vpred": vpred,
        "new_logprobs": new,
        "micro_batch_inds": index,
        "mb_values": space["values"],
        "mb_return": space["returns"],
        "mb_advantage": space["advantages"],
        "mb_logprobs": space["logprobs"],
    }
    space = lines(path, "vpredclipped = torch.clamp(", "loss = pg_loss", space)
    assert width == space["rewards"].shape[1]
    return {
        "token rewards": space["rewards"],
        "returns": space["returns"],
        "advantages": space["advantages"],
        "policy loss": space["pg_loss"],
        "value loss": space["vf_loss"],
        "loss": space["loss"],
    }


def verl_maths(root: Path) -> SimpleNamespace:
    base = definitions(
        root / "verl/utils/torch_functional.py",
        *("masked_sum", "masked_mean", "masked_var", "masked_whiten", "clip_by_value"),
    )
    return definitions(
        root / "verl/trainer/ppo/core_algos.py",
        *("agg_loss", "compute_gae_advantage_return", "compute_policy_loss_vanilla", "compute_value_loss"),
        *("kl_penalty_forward", "kl_penalty", "AdaptiveKLController"),
        verl_F=base,
        AlgoConfig=int,
    )


def verl(root: Path, batch: Batch) -> dict[str, Any]:
    """verl: its functions, with the defaults of its YAML files."""
    maths, folder = verl_maths(root), root / "verl/trainer/config"
    algorithm = yaml.safe_load((folder / "ppo_trainer.yaml").read_text())["algorithm"]
    actor, critic = (yaml.safe_load((folder / name / f"{name}.yaml").read_text()) for name in ("actor", "critic"))
    assert not algorithm["use_kl_in_reward"]
    assert not actor["use_kl_loss"]
    mask, rewards = batch["mask"], placed(batch)
    advantages, returns = maths.compute_gae_advantage_return(
        rewards, batch["old_values"], mask, algorithm["gamma"], algorithm["lam"]
    )
    config = type("Config", (dict,), {**actor, "global_batch_info": {}})(actor)
    policy_loss, _ = maths.compute_policy_loss_vanilla(
        batch["old_logps"], batch["logps"], advantages, mask, actor["loss_agg_mode"], config
    )
    value_loss, _ = maths.compute_value_loss(
        *(batch["values"], returns, batch["old_values"], mask), cliprange_value=critic["cliprange_value"]
    )
    return {
        "token rewards": rewards,
        "returns": returns,
        "advantages": advantages,
        "policy loss": policy_loss,
        "value loss": value_loss,
    }


def verl_kl_coef(root: Path, batch: Batch, start: float, target: float, horizon: float) -> float:
    """The coefficient after a rollout, with `kl_ctrl.type: adaptive`."""
    maths = verl_maths(root)
    mean = definitions(root / "verl/utils/torch_functional.py", "masked_sum", "masked_mean").masked_mean
    penalty = definitions(
        root / "verl/trainer/ppo/ray_trainer.py", "apply_kl_penalty", core_algos=maths, masked_mean=mean
    ).apply_kl_penalty
    names = {"response_mask": "mask", "old_log_probs": "old_logps", "ref_log_prob": "ref_logps"}
    columns = Columns({name: batch[ours] for name, ours in names.items()})
    columns["token_level_scores"] = placed(batch)
    controller = maths.AdaptiveKLController(start, target, horizon)
    penalty(SimpleNamespace(batch=columns), controller)
    return controller.value


def openrlhf_maths(root: Path) -> SimpleNamespace:
    maths = definitions(
        root / "openrlhf/models/utils.py", "masked_mean", "masked_normalize", "compute_approx_kl", "compute_reward"
    )
    more = definitions(
        root / "openrlhf/models/loss.py",
        *("aggregate_loss", "PolicyLoss", "ValueLoss"),
        masked_mean=maths.masked_mean,
    )
    return SimpleNamespace(**vars(maths) | vars(more))


def openrlhf_arguments(root: Path) -> SimpleNamespace:
    """Defaults of the command line, `--algo.kl.init_coef` as `args.algo.kl.init_coef`."""
    found = SimpleNamespace()
    for node in ast.walk(ast.parse((root / "openrlhf/cli/train_ppo_ray.py").read_text())):
        if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"):
            continue
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        computed = any(isinstance(part, ast.Call | ast.IfExp) for part in ast.walk(options.get("default", node)))
        if computed or not isinstance(node.args[0], ast.Constant):
            continue
        *rooms, name = node.args[0].value.removeprefix("--").split(".")
        place = found
        for room in rooms:
            place.__dict__.setdefault(room, SimpleNamespace())
            place = getattr(place, room)
        setattr(place, name, ast.literal_eval(options["default"]))
    return found


def openrlhf(root: Path, batch: Batch) -> dict[str, Any]:
    """OpenRLHF: `RemoteExperienceMaker` and its losses, with the defaults of its command line."""
    maths, args = openrlhf_maths(root), openrlhf_arguments(root)
    rewards = {}

    def compute_reward(*given: Any, **options: Any) -> Tensor:
        rewards["made"] = maths.compute_reward(*given, **options)
        return rewards["made"]

    maker = definitions(
        root / "openrlhf/trainer/ppo_utils/experience_maker.py",
        *("compute_advantages_and_returns", "get_advantages_and_returns"),
        compute_reward=compute_reward,
        apply_length_penalties=lambda *_: None,  # all off by default
        itertools=__import__("itertools"),
        List=list,
        Experience=object,
    )
    mask = batch["mask"]
    kl = maths.compute_approx_kl(batch["old_logps"], batch["ref_logps"], kl_estimator=args.algo.kl.estimator)
    assert not args.algo.kl.use_loss
    experience = SimpleNamespace(
        rewards=batch["scores"], index=[0, 1], kl=kl, action_mask=mask, values=batch["old_values"], info={}
    )
    self = SimpleNamespace(
        strategy=SimpleNamespace(args=args),
        advantage_estimator=args.algo.advantage.estimator,
        kl_ctl=SimpleNamespace(value=args.algo.kl.init_coef),
        get_advantages_and_returns=lambda *given: maker.get_advantages_and_returns(None, *given),
    )
    maker.compute_advantages_and_returns(self, [experience])
    clip = args.actor.eps_clip
    policy_loss = maths.PolicyLoss(clip, clip, args.actor.dual_clip)
    value_loss = maths.ValueLoss(args.critic.value_clip)
    return {
        "token rewards": rewards["made"],
        "returns": experience.returns,
        "advantages": experience.advantages,
        "policy loss": policy_loss(batch["logps"], batch["old_logps"], experience.advantages, mask)[0],
        "value loss": value_loss(batch["values"], batch["old_values"], experience.returns, mask),
    }


def openrlhf_kl_coef(root: Path, batch: Batch, start: float, target: float, horizon: float) -> float:
    """The coefficient after a rollout, with `--algo.kl.target`: the mean over completions of `info["kl"]`."""
    maths = openrlhf_maths(root)
    controller = definitions(root / "openrlhf/trainer/ppo_utils/kl_controller.py", "AdaptiveKLController")
    found = controller.AdaptiveKLController(start, target, horizon)
    kl = maths.compute_approx_kl(batch["old_logps"], batch["ref_logps"])
    found.update(maths.masked_mean(kl, batch["mask"], dim=-1).mean().item(), len(kl))
    return found.value


def torchtune_maths(root: Path) -> SimpleNamespace:
    names = ("masked_mean", "masked_var", "whiten", "get_rewards_ppo", "estimate_advantages")
    maths = definitions(root / "torchtune/rlhf/rewards.py", *names)
    loss = definitions(root / "torchtune/rlhf/loss/ppo.py", "PPOLoss", rlhf=maths)
    return SimpleNamespace(**vars(maths) | {"PPOLoss": loss.PPOLoss})


def torchtune(root: Path, batch: Batch) -> dict[str, Any]:
    """torchtune: its functions, with the YAML of its PPO recipe, whose fixed score for short texts is left out."""
    maths = torchtune_maths(root)
    config = yaml.safe_load((root / "recipes/configs/mistral/7B_full_ppo_low_memory.yaml").read_text())
    padding, index = batch["mask"] == 0, last_tokens(batch["mask"])
    space = {
        "self": SimpleNamespace(_max_generated_tokens=padding.shape[1]),
        "seq_lens": index,
        "response_padding_masks": padding,
        "values": batch["old_values"].clone(),
    }
    recipe = root / "recipes/ppo_full_finetune_single_device.py"
    space = lines(recipe, "value_seq_idxs = torch.where(", "values[value_padding_masks] = 0.0", space)
    old, new, ref = (batch[name].masked_fill(padding, 1.0) for name in ("old_logps", "logps", "ref_logps"))
    rewards, _, _ = maths.get_rewards_ppo(batch["scores"], old, ref, config["kl_coeff"], space["value_seq_idxs"])
    advantages, returns = maths.estimate_advantages(
        space["values"], rewards, config["gamma"], config["lmbda"], masks=~padding
    )
    options = {name: value for name, value in config["loss"].items() if name != "_component_"}
    loss, policy_loss, value_loss, _, _ = maths.PPOLoss(**options)(
        *(old, new, advantages, space["values"], batch["values"].masked_fill(space["value_padding_masks"], 0.0)),
        *(returns, ~padding, ~space["value_padding_masks"]),
    )
    return {
        "token rewards": rewards,
        "returns": returns,
        "advantages": advantages,
        "policy loss": policy_loss,
        "value loss": value_loss,
        "loss": loss,
    }


def sb3(root: Path, batch: Batch) -> dict[str, Any]:
    """Stable-Baselines3: a completion is an episode, a token a step; the loss is lines of `PPO.train`."""
    buffers, path = root / "stable_baselines3/common/buffers.py", root / "stable_baselines3/ppo/ppo.py"
    given = defaults_of(path, "__init__")
    counts, rewards = batch["mask"].bool(), placed(batch)
    starts = torch.zeros_like(batch["mask"])
    starts[:, 0] = 1
    column = {name: value[counts].numpy()[:, None] for name, value in batch.items() if value.dim() == 2}
    buffer = SimpleNamespace(
        buffer_size=int(counts.sum()),
        episode_starts=starts[counts].numpy()[:, None].astype(np.float32),
        values=column["old_values"],
        rewards=rewards[counts].numpy()[:, None],
        gamma=given["gamma"],
        gae_lambda=given["gae_lambda"],
        advantages=np.zeros((int(counts.sum()), 1), np.float32),
    )
    maths = definitions(buffers, "compute_returns_and_advantage")
    maths.compute_returns_and_advantage(buffer, torch.zeros(1), np.ones(1))
    flat = {name: torch.from_numpy(value[:, 0]) for name, value in column.items()}
    data = SimpleNamespace(
        advantages=torch.from_numpy(buffer.advantages[:, 0]),
        returns=torch.from_numpy(buffer.returns[:, 0]),
        old_log_prob=flat["old_logps"],
        old_values=flat["old_values"],
    )
    space = {
        "self": SimpleNamespace(clip_range_vf=given["clip_range_vf"], **given_losses(given)),
        "rollout_data": data,
        "log_prob": flat["logps"],
        "values": flat["values"],
        "entropy": torch.zeros(len(data.returns)),
        "clip_range": given["clip_range"],
        "pg_losses": [],
        "value_losses": [],
        "clip_fractions": [],
        "entropy_losses": [],
    }
    space = lines(path, "advantages = rollout_data.advantages", "loss = policy_loss", space)

    def unflatten(values: Any) -> Tensor:
        return torch.zeros(counts.shape).masked_scatter(counts, torch.as_tensor(values))

    return {
        "token rewards": rewards,
        "returns": unflatten(data.returns),
        "advantages": unflatten(space["advantages"]),
        "policy loss": space["policy_loss"],
        "value loss": space["value_loss"],
        "loss": space["loss"],
    }


def given_losses(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("normalize_advantage", "ent_coef", "vf_coef")}


BATCHES: dict[str, Callable[[Path, Batch], dict[str, Any]]] = {
    "TRL": trl,
    "verl": verl,
    "OpenRLHF": openrlhf,
    "torchtune": torchtune,
    "Stable-Baselines3": sb3,
}
