"""Single formulas of other libraries, by their own code: the second table of docs/coming_from.md."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from coming_from_theirs import definitions, lines, openrlhf_arguments, openrlhf_maths, torchtune_maths, verl_maths
from torch import Tensor, tensor

Formulas = dict[str, Callable[[], Any]]
TOKENS, ONES = tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(1, 4)
ONLY_ONE = tensor([[1.0, 0.0, 0.0, 0.0]])
HOLE = {  # two tokens of a tool within a completion
    "rewards": tensor([[0.0, 0.0, 0.0, 0.0, 1.0]]),
    "values": tensor([[0.5, 0.6, 9.0, 9.0, 0.7]]),
    "mask": tensor([[1, 1, 0, 0, 1]]),
}
LOST = {"rewards": tensor([[0.0, 1.0]]), "values": torch.zeros(1, 2), "mask": tensor([[1, 0]])}
LOSSES = torch.ones(2, 10).index_put((tensor([0, 1]), tensor([4, 9])), tensor(10.0))
LENGTHS = tensor([[1] * 5 + [0] * 5, [1] * 10])
SCORES = tensor([30.0, 20.0, 1.0, 0.0])


def whitening(whiten: Callable[..., Tensor], kept: Callable[..., Tensor] | None) -> Formulas:
    found: Formulas = {
        "whiten": lambda: whiten(TOKENS, ONES),
        "whiten, one token counted": lambda: whiten(TOKENS, ONLY_ONE)[0, :1],
        "whiten, all equal": lambda: whiten(ONES, ONES),
    }
    return found | ({} if kept is None else {"whiten, mean kept": lambda: kept(TOKENS, ONES)})


def clipped_losses(policy: Callable[..., Any], value: Callable[..., Any]) -> Formulas:
    """From a policy's loss by log-probability, old one, advantage and mask, and a critic's by V, old V and return."""
    one, five = torch.ones(1, 1), tensor([[5.0]]).log()
    values = (tensor([[0.8]]), tensor([[0.3]]))
    return {
        "policy loss at ratio 5, A -1": lambda: policy(five, 0 * five, -one, one),
        "no token counted": lambda: policy(five, 0 * five, -one, 0 * one),
        "value loss, R 1": lambda: value(*values, one, one),
        "value loss, R 0.6": lambda: value(*values, 0.6 * one, one),
    }


def estimators(estimate: Callable[[Tensor, Tensor, str], Tensor], names: tuple[str, ...]) -> Formulas:
    """From an estimator by log-probabilities of policy and reference."""

    def of(name: str, difference: float) -> Tensor:
        return estimate(tensor([0.0]), tensor([difference]), name)

    def gradient() -> Tensor:
        logps = torch.zeros(1, requires_grad=True)
        estimate(logps, tensor([3.0]), "k3").sum().backward()
        return logps.grad if logps.grad is not None else torch.zeros(1)

    known: Formulas = {
        "k1 at 12": lambda: of("k1", -12.0),
        "k2 at 12": lambda: of("k2", -12.0),
        "k3 at -1": lambda: of("k3", 1.0),
        "k3 at -3": lambda: of("k3", 3.0),
        "gradient of k3 at -3": gradient,
    }
    return {name: formula for name, formula in known.items() if any(one in name for one in names)}


def returns(gae: Callable[..., tuple[Tensor, Tensor]]) -> Formulas:
    """From `gae(rewards, values, mask)` with gamma 1 and lambda 0.95."""
    return {
        "returns around a tool": lambda: gae(**HOLE)[1][HOLE["mask"].bool()],
        "return, reward on padding": lambda: gae(**LOST)[1][0, :1],
    }


def trl(root: Path) -> Formulas:
    path = root / "trl" / "experimental" / "ppo" / "ppo_trainer.py"
    maths = definitions(path, "masked_mean", "masked_var", "masked_whiten").space

    def losses(policy: tuple[Tensor, ...], value: tuple[Tensor, ...]) -> dict[str, Any]:
        new, old, advantages, mask = policy
        space = {
            **maths,
            "args": SimpleNamespace(cliprange=0.2, cliprange_value=0.2, vf_coef=0.1),
            "micro_batch_inds": torch.arange(1),
            **{"new_logprobs": new, "mb_logprobs": old, "mb_advantage": advantages, "padding_mask": mask == 0},
            **{"vpred": value[0], "mb_values": value[1], "mb_return": value[2], "padding_mask_p1": value[3] == 0},
        }
        return lines(path, "vpredclipped = torch.clamp(", "loss = pg_loss", space)

    def kl(logps: Tensor, ref: Tensor, name: str) -> Tensor:
        space = {"args": SimpleNamespace(kl_estimator=name), "logprobs": logps, "ref_logprobs": ref}
        found: Tensor = lines(path, "logr = ref_logprobs", "kl = -logr", space)["kl"]
        return found

    one = torch.ones(1, 1)
    return {
        **whitening(maths["masked_whiten"], partial(maths["masked_whiten"], shift_mean=False)),
        **clipped_losses(
            lambda *given: losses(given, (one, one, one, one))["pg_loss"],
            lambda *given: losses((one, one, one, one), given)["vf_loss"],
        ),
        **estimators(kl, ("k1", "k3")),
        "mean over tokens": lambda: maths["masked_mean"](LOSSES, LENGTHS),
    }


def verl(root: Path) -> Formulas:
    maths = verl_maths(root)
    whiten = definitions(
        root / "verl/utils/torch_functional.py", "masked_sum", "masked_mean", "masked_var", "masked_whiten"
    ).masked_whiten

    def policy(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        config = type("Config", (dict,), {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2})()
        config.global_batch_info = {}
        found: Tensor = maths.compute_policy_loss_vanilla(old, new, advantages, mask, "token-mean", config)[0]
        return found

    def value(new: Tensor, old: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = maths.compute_value_loss(new, target, old, mask, 0.2)[0]
        return found

    def gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        maths.space["verl_F"].masked_whiten = lambda advantages, _: advantages  # it cannot whiten a single token
        found: tuple[Tensor, Tensor] = maths.compute_gae_advantage_return(rewards, values, mask, 1.0, 0.95)
        return found

    loss = partial(maths.agg_loss, LOSSES, LENGTHS)
    wide = [torch.nn.functional.pad(each, (0, 10)) for each in (LOSSES, LENGTHS)]
    norm = "seq-mean-token-sum-norm"
    dual = clipped_losses(policy, value)
    return {
        **whitening(whiten, partial(whiten, shift_mean=False)),
        **dual,
        **estimators(lambda logps, ref, name: maths.kl_penalty(logps, ref, name), ("k1", "k2", "k3")),
        **returns(gae),
        "the same with dual clip 3": dual["policy loss at ratio 5, A -1"],
        "mean over tokens": lambda: loss("token-mean"),
        "mean over completions": lambda: loss("seq-mean-token-mean"),
        "fixed length 10": lambda: loss(norm, loss_scale_factor=10),
        "fixed length, padded to 20": lambda: maths.agg_loss(*wide, norm),
        "adaptive coefficient": lambda: adaptive(maths.AdaptiveKLController),
    }


def openrlhf(root: Path) -> Formulas:
    maths = openrlhf_maths(root)
    maker = definitions(
        root / "openrlhf/trainer/ppo_utils/experience_maker.py",
        *("compute_advantages_and_returns", "get_advantages_and_returns", "get_cumulative_returns"),
        compute_reward=maths.compute_reward,
        apply_length_penalties=lambda *_: None,
        itertools=__import__("itertools"),
        List=list,
        Experience=object,
    )
    controller = definitions(root / "openrlhf/trainer/ppo_utils/kl_controller.py", "AdaptiveKLController")

    def shape(estimator: str, values: Tensor, mask: Tensor, samples: int, scores: Tensor) -> Any:
        args = openrlhf_arguments(root)
        args.algo.advantage.estimator, args.rollout.n_samples_per_prompt = estimator, samples
        row = SimpleNamespace(
            rewards=scores, index=list(range(len(scores))), kl=torch.zeros(mask.shape), info={}, action_mask=mask
        )
        row.values = values
        self = SimpleNamespace(
            strategy=SimpleNamespace(args=args), advantage_estimator=estimator, kl_ctl=SimpleNamespace(value=0.0)
        )
        self.get_advantages_and_returns = lambda *given: maker.get_advantages_and_returns(None, *given)
        self.get_cumulative_returns = lambda *given: maker.get_cumulative_returns(None, *given)
        maker.compute_advantages_and_returns(self, [row])
        return row.advantages

    def whiten(values: Tensor, mask: Tensor) -> Tensor:
        """Advantages of one-step completions are their rewards, which PPO then whitens."""
        kept = values[mask.bool()]
        one = torch.ones(len(kept), 1, dtype=torch.long)
        found: Tensor = shape("gae", torch.zeros(len(kept), 1), one, 1, kept).T
        return found

    def policy(*given: Tensor, dual_clip: float | None = None) -> Tensor:
        found: Tensor = maths.PolicyLoss(0.2, 0.2, dual_clip)(*given)[0]
        return found

    one = torch.ones(1, 1)
    loss = partial(maths.aggregate_loss, LOSSES, LENGTHS)
    gae = partial(maker.get_advantages_and_returns, None)
    return {
        **whitening(whiten, None),
        **clipped_losses(policy, maths.ValueLoss(0.2)),
        **estimators(
            lambda logps, ref, name: maths.compute_approx_kl(logps, ref, kl_estimator=name), ("k1", "k2", "k3")
        ),
        **returns(lambda rewards, values, mask: gae(values, rewards, mask, 1.0, 0.95)),
        "the same with dual clip 3": lambda: policy(tensor([[5.0]]).log(), 0 * one, -one, one, dual_clip=3.0),
        "mean over tokens": lambda: loss(True),
        "mean over completions": lambda: loss(False),
        "adaptive coefficient": lambda: adaptive(controller.AdaptiveKLController),
        "baseline and clip at 10": lambda: shape("dr_grpo", one, torch.ones(4, 1, dtype=torch.long), 4, SCORES).T,
    }


def torchtune(root: Path) -> Formulas:
    maths = torchtune_maths(root)
    loss = maths.PPOLoss(epsilon=0.2, value_clip_range=0.2)
    zeros = torch.zeros(1, 1)

    def gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = maths.estimate_advantages(values, rewards, 1.0, 0.95, mask.bool())
        return found

    return {
        **whitening(maths.whiten, partial(maths.whiten, shift_mean=False)),
        **clipped_losses(
            lambda new, old, advantages, mask: loss(old, new, advantages, *[zeros] * 3, mask, mask)[1],
            lambda new, old, target, mask: loss(*[zeros] * 3, old, new, target, mask, mask)[2],
        ),
        **estimators(lambda logps, ref, _: maths.get_rewards_ppo(zeros[0], logps[None], ref[None], 1.0)[1], ("k1",)),
        **returns(gae),
        "mean over tokens": lambda: maths.masked_mean(LOSSES, LENGTHS),
    }


def sb3(root: Path) -> Formulas:
    path = root / "stable_baselines3/ppo/ppo.py"

    def losses(advantages: Tensor, policy: tuple[Tensor, ...], value: tuple[Tensor, ...]) -> dict[str, Any]:
        self = SimpleNamespace(normalize_advantage=True, clip_range_vf=0.2, ent_coef=0.0, vf_coef=0.5)
        data = SimpleNamespace(advantages=advantages, old_log_prob=policy[1], old_values=value[1], returns=value[2])
        names = ("pg_losses", "value_losses", "clip_fractions", "entropy_losses")
        space = dict.fromkeys(names, SimpleNamespace(append=lambda _: None))
        space |= {"self": self, "rollout_data": data, "log_prob": policy[0], "values": value[0]}
        space |= {"entropy": torch.zeros(1), "clip_range": 0.2, "clip_range_vf": 0.2}
        return lines(path, "advantages = rollout_data.advantages", "loss = policy_loss", space)

    one = torch.ones(1)
    triple = (one, one, one)

    def whiten(values: Tensor, mask: Tensor) -> Tensor:
        kept = values[mask.bool()]
        found: Tensor = losses(kept, (0 * kept, 0 * kept), triple)["advantages"][None]
        return found

    found = clipped_losses(
        lambda new, old, advantages, _: losses(advantages[0], (new[0], old[0]), triple)["policy_loss"],
        lambda new, old, target, _: losses(one, (one, one), (new[0], old[0], target[0]))["value_loss"],
    )
    found.pop("no token counted")  # it has no mask
    return {**whitening(whiten, None), **found}


def adaptive(controller: Callable[[float, float, float], Any]) -> float:
    """Start 0.15, target 6, horizon 10,000; a rollout of 512 completions with a KL of 12."""
    made = controller(0.15, 6.0, 10_000)
    made.update(12.0, 512)
    value: float = made.value
    return value


FORMULAS = {"TRL": trl, "verl": verl, "OpenRLHF": openrlhf, "torchtune": torchtune, "Stable-Baselines3": sb3}
