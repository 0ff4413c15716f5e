"""Build the policy and the rewards of a PPO run from what the user gives: paths, models, adapters, functions."""

from __future__ import annotations

import copy
import hashlib
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import Optimizer
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    set_seed,
)
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from rlhf_recipes.data.chat_templates import end_token_ids
from rlhf_recipes.models.adapters import POLICY, base_name, base_of, base_to_load, is_adapter, load_policy, same_model
from rlhf_recipes.models.arguments import complete_arguments
from rlhf_recipes.models.fused_lora import fuse_lora
from rlhf_recipes.models.gated_mlp import fuse_mlps
from rlhf_recipes.models.generation import warn_of_ignored_settings
from rlhf_recipes.models.images import ImageReader, check_reads_images
from rlhf_recipes.models.loading import load_causal_lm, load_tokenizer
from rlhf_recipes.models.packing import pack
from rlhf_recipes.models.plain_lora import changes_base
from rlhf_recipes.models.quantized import keep_4bit_differentiable
from rlhf_recipes.models.readout import Readout
from rlhf_recipes.models.reward import load_reward_model
from rlhf_recipes.models.roles import FROZEN, REFERENCE, Roles, is_critic_parameter
from rlhf_recipes.ppo.checks import check_one_base
from rlhf_recipes.ppo.ema import PolicyAverage
from rlhf_recipes.ppo.inputs import check_policy, check_reward_list, unused_tokenizer
from rlhf_recipes.ppo.resume import critic_rate
from rlhf_recipes.ppo.tensorflow_adam import TensorFlowAdamW
from rlhf_recipes.rewards import AdapterReward, ClassifierReward, RemoteReward, checked
from rlhf_recipes.rewards.combined import CombinedReward
from rlhf_recipes.shaping import (
    AdaptiveKLController,
    ClipScores,
    FixedKLController,
    LengthPenalty,
    MissingEos,
    OverlongPenalty,
    RepetitionPenalty,
    ScaleScores,
    ScoreTransform,
    SubtractReferenceMean,
)

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig

    from rlhf_recipes.ppo.config import PPOConfig
    from rlhf_recipes.ppo.critics import Critic
    from rlhf_recipes.ppo.group_config import Config


PAPER = {  # for model cards
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


def build_policy(
    model: Any,
    args: Config,
    quantization_config: BitsAndBytesConfig | None,
    peft_config: PeftConfig | None,
    with_reference: bool = True,
    reference_adapter: str | Path | None = None,
) -> tuple[PreTrainedModel | PeftModel, Roles, str | None]:
    """Load the base if needed, put the policy's adapter on it, and the reference beside it.

    Without an adapter the whole model is trained. Then the other roles live on a second, frozen copy of it, which is
    the reference itself.

    Args:
        model: Folder of a trained adapter, `PeftModel`, or base model (path or instance).
        args: The configuration; `model_init_kwargs` are used when `model` is a path.
        quantization_config: Quantization of a base that is loaded here.
        peft_config: Configuration of a fresh adapter; `None` trains a model without adapter as a whole.
        with_reference: Whether an adapter gets a reference; else the caller, or TRL, adds it.
        reference_adapter: Folder of the reference's adapter, where it is not the policy's start.

    Returns:
        The policy, the roles, and the role of the reference: a frozen copy of a trained adapter, or `None` for the
        bare base.

    Raises:
        ValueError: If `model` is a classifier, `model` and `peft_config` or `reference_adapter` do not fit together,
            or 4-bit weights are repacked.
        TypeError: If `model` is none of these.
    """
    model = _loaded(model, args, _loading_options(model, args, quantization_config))
    check_policy(model)
    keep_4bit_differentiable(model)
    warn_of_ignored_settings(model)
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ValueError("The model already has an adapter, which is trained further. Leave `peft_config` out.")
        if POLICY not in model.peft_config:
            raise ValueError(f"The policy's adapter must be named {POLICY!r}, got {list(model.peft_config)}.")
        complete_arguments(model.get_base_model())
        pack(model.get_base_model())
        fuse_mlps(model)
        roles = Roles(model)
        if reference_adapter is not None:
            roles.add_policy(REFERENCE, reference_adapter, args.adapter_tolerance)
        elif with_reference:
            roles.add_copy(REFERENCE, source=POLICY)
        return model, roles, REFERENCE
    if reference_adapter is not None:
        raise ValueError(
            "`reference_adapter` is for a policy that goes on from a trained adapter, and `model` has none: its "
            "reference is what it starts as. Remove `reference_adapter`, or give the policy's adapter."
        )
    complete_arguments(model)
    pack(model)
    fuse_mlps(model)
    if peft_config is not None:
        policy = get_peft_model(model, fuse_lora(peft_config, model))
        roles = Roles(policy)
        return policy, roles, _reference_of_fresh(roles, peft_config) if with_reference else None
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "A quantized model cannot be trained as a whole. Give `peft_config` (for example "
            "`LoraConfig(task_type='CAUSAL_LM')`), or load it without `quantization_config`."
        )
    config = fuse_lora(LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"), model)
    frozen = get_peft_model(copy.deepcopy(model), config)
    model.add_module(FROZEN, frozen)  # so that the optimizer and DDP find the critic
    return model, Roles(frozen), None


def _loaded(model: Any, args: Config, options: dict[str, Any]) -> Any:
    if not isinstance(model, str | Path):
        return model
    if is_adapter(model):
        return load_policy(load_causal_lm(base_to_load(model), **options), model, args.adapter_tolerance)
    return load_causal_lm(str(model), **options)


def _reference_of_fresh(roles: Roles, config: PeftConfig) -> str | None:
    """The bare base, unless the fresh adapter changes what is computed, or has taken a part of the base out of it."""
    if not changes_base(config) and getattr(config, "init_lora_weights", True) is not False:
        return None
    roles.add_copy(REFERENCE, source=POLICY)
    return REFERENCE


def configured_transforms(args: PPOConfig) -> list[ScoreTransform]:
    """Score transforms that the configuration asks for: normalisation first, then clipping, then penalties."""
    transforms: list[ScoreTransform] = []
    if args.score_scaling != "none":
        transforms.append(ScaleScores(running=args.score_scaling == "running"))
    if args.subtract_reference_mean:
        transforms.append(SubtractReferenceMean())
    if args.score_clip is not None:
        transforms.append(ClipScores(-args.score_clip, args.score_clip))
    if args.missing_eos_penalty is not None:
        transforms.append(MissingEos(args.missing_eos_penalty, args.missing_eos_mode))
    if args.length_penalty is not None:
        transforms.append(LengthPenalty(args.length_penalty))
    if args.overlong_buffer is not None:
        transforms.append(OverlongPenalty(args.overlong_buffer, args.overlong_penalty))
    if args.ngram_penalty is not None:
        transforms.append(RepetitionPenalty(args.ngram_penalty))
    return transforms


def add_log_probs(trainer: GRPOTrainer, model: Any) -> None:
    """Give a second base model the output layer that `policy_pass` needs; the trainer's own has it."""
    args: Any = trainer.args
    add_fused_lm_head(model, trainer.temperature, args.cast_lm_head_to_fp32, ("log_probs", "entropy"))


def make_kl_controller(args: PPOConfig) -> FixedKLController | AdaptiveKLController:
    """The controller of the KL coefficient that the configuration asks for."""
    if args.kl_controller == "adaptive":
        return AdaptiveKLController(args.kl_coef, args.kl_target, args.kl_horizon)
    return FixedKLController(args.kl_coef)


def set_trainable(policy: nn.Module, roles: Roles, critic: Critic) -> None:
    """Train the policy and the critic, and check that nothing else is trained.

    Args:
        policy: The network that is trained: the model of the roles, or a whole model beside them.
        roles: The roles.
        critic: The critic.

    Raises:
        RuntimeError: If the policy or the critic has no parameter that is trained.
    """
    if policy is roles.model:
        roles.set_trainable(POLICY)
    else:
        policy.requires_grad_(True)
        roles.set_trainable()  # of the frozen copy that carries the roles
    critic.set_trainable()
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    of_critic = [name for name in trained if is_critic_parameter(name)]
    if not of_critic or len(of_critic) == len(trained):
        raise RuntimeError(
            "The policy and the critic must be trained, each with parameters of its own. Trainable now: "
            f"{len(trained) - len(of_critic)} tensors of the policy and {len(of_critic)} of the critic."
        )


def keep_average(trainer: Any) -> PolicyAverage | None:
    """Let a trainer average the policy's weights while it trains, if `ema_decay` asks for it."""
    if trainer.args.ema_decay is None:
        return None
    average = PolicyAverage(trainer.model, trainer.args.ema_decay)
    trainer.add_callback(average)
    return average


def separate_critic(optimizer: Any, policy: nn.Module, args: PPOConfig) -> None:
    """Give the critic's parameters groups of their own in an optimizer, with their own learning rate."""
    rate = critic_rate(args.critic_learning_rate, args.learning_rate)
    names = {parameter: name for name, parameter in policy.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        for critic in (False, True):
            members = [p for p in group["params"] if is_critic_parameter(names[p]) == critic]
            groups.append({**group, "params": members, "lr": rate if critic else group["lr"]})
    optimizer.param_groups[:] = [group for group in groups if group["params"]]


def configured_optimizer(optimizer: Optimizer, policy: nn.Module, args: PPOConfig) -> Optimizer:
    """Make of TRL's optimizer the one that the configuration asks for, with groups of its own for the critic."""
    separate_critic(optimizer, policy, args)
    return TensorFlowAdamW(optimizer.param_groups) if args.tensorflow_adam else optimizer


def restore_checkpointing(policy: Any, args: PPOConfig) -> None:
    """Restore which layers recompute: TRL turns that off for a rollout, and then on for every layer."""
    configured: Any = args.activation_checkpointing_kwargs or {}
    kwargs = dict(configured)
    places = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
    if args.activation_checkpointing and places:
        policy.activation_checkpointing_enable(kwargs, **places)


def build_readers(
    processing_class: Any, policy: PreTrainedModel | PeftModel, args: PPOConfig
) -> tuple[PreTrainedTokenizerBase, ImageReader | None]:
    """The tokenizer, and with a processor what reads pictures.

    Args:
        processing_class: A tokenizer, a processor, or `None` for the base's tokenizer.
        policy: The policy.
        args: The configuration.

    Raises:
        ValueError: If the policy or the critic cannot read pictures.
    """
    if not isinstance(processing_class, ProcessorMixin):
        return processing_class or load_base_tokenizer(policy, args), None
    check_reads_images(policy)
    if args.critic == "model" or args.critic_layers is not None:
        raise ValueError(
            "`critic: model` and `critic_layers` are for texts: with a processor, take `critic: adapter` or "
            "`critic: head`, which see the pictures that the policy sees."
        )
    processor: Any = processing_class
    return processor.tokenizer, ImageReader(processor, policy)


def load_base_tokenizer(policy: PreTrainedModel | PeftModel, args: Config) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a policy's base, from the revision that the base was loaded from."""
    init_kwargs: Any = args.model_init_kwargs or {}
    revision = init_kwargs.get("revision") or "main"
    return load_tokenizer(base_name(policy), revision=revision, trust_remote_code=args.trust_remote_code)


def _loading_options(model: Any, args: Config, quantization_config: BitsAndBytesConfig | None) -> dict[str, Any]:
    init_kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # text in a YAML only
    options = {"model_init_kwargs": init_kwargs, "quantization_config": quantization_config}
    unread = [name for name, value in options.items() if value]
    if unread and not isinstance(model, str | Path):
        raise ValueError(f"`{unread[0]}` is for loading a model, but `model` is loaded already. Remove it.")
    if quantization_config is not None and "quantization_config" in init_kwargs:
        raise ValueError("`quantization_config` is given twice, also in `model_init_kwargs`. Give it once.")
    defaults = {"quantization_config": quantization_config, "trust_remote_code": args.trust_remote_code}
    return defaults | init_kwargs


def build_rewards(
    reward_funcs: Any,
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    args: Config,
    tokenizers: list[PreTrainedTokenizerBase | None],
) -> tuple[list[Any], list[float]]:
    """Turn everything that can be a reward into what TRL's engine calls.

    Args:
        reward_funcs: One or a list of functions, models, paths of models, folders of reward adapters,
            ensembles and gates.
        roles: The roles; reward adapters are added to them.
        tokenizer: The policy's tokenizer.
        args: The configuration (`reward_weights`, `reward_placement`, `trust_remote_code`).
        tokenizers: For each reward a tokenizer in place of its own, or `None`.

    Returns:
        The functions and models, and their weights.

    Raises:
        ValueError: If there is no reward, the weights are not one per reward, or the placement needs a reward
            adapter and there is none.
    """
    rewards = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    check_reward_list(rewards)
    weights = args.reward_weights or [1.0] * len(rewards)
    if not rewards or len(weights) != len(rewards):
        raise ValueError(f"Expected one or more rewards and one weight each, got {len(rewards)} and {len(weights)}.")
    functions = [
        _build(reward, f"reward_{index}", roles, tokenizer, args, own)
        for index, (reward, own) in enumerate(zip(rewards, tokenizers, strict=True))
    ]
    check_one_base(roles.model, functions)
    for index, function in enumerate(functions):
        before = [getattr(other, "__name__", None) for other in functions[:index]]
        if function.__name__ in before:  # two functions of one name would be averaged in the logs
            function.__name__ = f"{function.__name__}_{index}"
    adapters = sum(isinstance(function, AdapterReward) for function in functions)
    if args.reward_placement in ("redistributed", "attention") and not adapters:
        raise ValueError(
            f"`reward_placement: {args.reward_placement}` reads a reward adapter on the policy's base, but none is in "
            "`reward_funcs` (an ensemble is not read per token). Add the folder of one, or use another placement "
            "(`terminal`, `uniform`, `discounted`)."
        )
    if args.reward_placement == "attention" and adapters > 1:
        raise ValueError("`reward_placement: attention` follows one reward adapter, but there are several. Keep one.")
    return functions, weights


def _build(
    reward: Any,
    role: str,
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    args: Config,
    own: PreTrainedTokenizerBase | None,
) -> Any:
    if own is not None and isinstance(reward, CombinedReward | ClassifierReward | RemoteReward):
        raise unused_tokenizer(role, f"a {type(reward).__name__}, which has a tokenizer of its own")
    if isinstance(reward, CombinedReward):
        members = [
            _adapter_reward(member, f"{role}_{number}", roles, tokenizer, args)
            if isinstance(member, str | Path)
            else _reward_of_model(member, role, roles, tokenizer, args, None)
            if isinstance(member, nn.Module)
            else checked(member)
            for number, member in enumerate(reward.members)
        ]
        return reward.with_members(members)
    if isinstance(reward, str | Path):
        return _reward_of_path(reward, role, roles, tokenizer, args, own)
    if isinstance(reward, nn.Module):
        return _reward_of_model(reward, role, roles, tokenizer, args, own)
    if isinstance(reward, ClassifierReward):
        check_one_base(roles.model, [reward.model])
        return reward
    return reward if isinstance(reward, RemoteReward) else checked(reward)


def _reward_of_path(
    path: str | Path,
    role: str,
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    args: Config,
    reward_tokenizer: PreTrainedTokenizerBase | None,
) -> AdapterReward | ClassifierReward:
    if is_adapter(path) and not _has_other_architecture(path, roles, args.trust_remote_code):
        if reward_tokenizer is not None:
            raise unused_tokenizer(role, "an adapter on the policy's base, which scores the sampled token ids")
        reads = args.reward_placement if args.reward_placement in ("redistributed", "attention") else "score"
        return _adapter_reward(path, role, roles, tokenizer, args, reads)
    if same_model(str(path), base_name(roles.model)):
        raise ValueError(
            f"{str(path)!r} is the policy's base itself: it has no score, and would be a second copy of the policy's "
            "base in memory. Give the folder of a reward adapter on it."
        )
    model, own_tokenizer = load_reward_model(path, args.adapter_tolerance, trust_remote_code=args.trust_remote_code)
    ends, size = end_token_ids(roles.model, tokenizer), args.per_device_train_batch_size
    return ClassifierReward(model, reward_tokenizer or own_tokenizer, Path(path).name, size, Readout.load(path), ends)


def _reward_of_model(
    model: Any,
    role: str,
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    args: Config,
    reward_tokenizer: PreTrainedTokenizerBase | None,
) -> ClassifierReward:
    """A reward model that is loaded already, read as it would be if its folder were given.

    TRL would score texts without special tokens: an encoder would not see its own, and no decoder an end token.
    """
    check_one_base(roles.model, [model])
    own: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    keep_4bit_differentiable(own)
    number = role.removeprefix("reward_")
    if not (hasattr(own, "score") or hasattr(own, "classifier")):
        raise ValueError(
            f"`reward_funcs[{number}]` is a {type(own).__name__}, which has no score head. Give a trained "
            "`AutoModelForSequenceClassification` with `num_labels=1`, or the folder of one."
        )
    name = base_name(model)
    if reward_tokenizer is None:
        try:
            reward_tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        except (OSError, ValueError):
            raise ValueError(
                f"`reward_funcs[{number}]` is a {type(own).__name__} whose tokenizer is not found at {name!r}. Give "
                "it in `reward_processing_classes`, or give `ClassifierReward(model, tokenizer)`."
            ) from None
    if not getattr(own, "is_quantized", False):
        model.to(roles.model.device)
    ends, size = end_token_ids(roles.model, tokenizer), args.per_device_train_batch_size
    readout = Readout() if isinstance(model, PeftModel) else Readout.load(name)
    return ClassifierReward(model, reward_tokenizer, Path(name).name or "classifier", size, readout, ends)


def _adapter_reward(
    path: str | Path,
    role: str,
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    args: Config,
    reads: Literal["score", "redistributed", "attention"] = "score",
) -> AdapterReward:
    roles.add_scalar_role(role, path, args.adapter_tolerance)
    roles.readouts[role] = readout = Readout.load(path)
    name, size = Path(path).resolve().name, args.per_device_train_batch_size
    return AdapterReward(roles, role, name, tokenizer.pad_token_id, size, readout, reads)


def _has_other_architecture(path: str | Path, roles: Roles, trust_remote_code: bool) -> bool:
    """Whether an adapter's base is another kind of model (an encoder), to be loaded beside the policy's base."""
    base = base_of(path)
    if same_model(base, base_name(roles.model)):
        return False
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        return bool(config.model_type != roles.model.config.model_type)
    except (OSError, ValueError):
        return False  # not to be found: refused as an adapter of another base, by name


def seed_sampling(seed: int, rank: int) -> None:
    """Let each process sample from a stream of its own: by TRL's seed + rank, the next seed would share it."""
    if rank > 0:
        set_seed(process_seed(seed, rank))


def process_seed(seed: int, rank: int) -> int:
    """Seed of a process's sampling, so that runs and processes have nothing in common.

    Example:
        >>> process_seed(42, 0), process_seed(42, 1) == process_seed(43, 0)
        (42, False)
    """
    return seed if rank == 0 else int.from_bytes(hashlib.sha256(f"{seed} {rank}".encode()).digest()[:4])
