"""Try a policy out on two short texts before it is trained: does it sample from the distributions that PPO computes?

`T` sampled tokens of two texts, `V` vocabulary. Distances are in nats per token.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from trl import GRPOTrainer

from rlhf_recipes.models.chance import compute_as_in_evaluation
from rlhf_recipes.models.padding import (
    TOLERANCE,
    TOLERANCE_IN_16_BITS,
    distance,
    likeliest,
    logits_of,
    prompts_of_unlike_length,
    read_texts,
)
from rlhf_recipes.models.rows import Texts
from rlhf_recipes.ppo.passes import keep_states, policy_pass


@torch.no_grad()
def try_out(trainer: GRPOTrainer, half_precision: bool) -> None:
    """Compare four ways to the distributions of the same tokens, of which PPO needs that they are one.

    They are those that `generate` samples from, with prompts padded on the left; the model's own logits of whole
    texts in training; the log-probabilities of TRL's output layer; and, for an exact KL, what the output layer alone
    makes of the last hidden states. A family of models in which they differ would be trained wrongly without any sign.

    Args:
        trainer: A PPO trainer, built but for its first step.
        half_precision: Whether its networks compute in 16 bits.

    Raises:
        ValueError: If two of them differ, with the cause, or would differ as soon as an adapter is trained.
    """
    args: Any = trainer.args
    model: Any = trainer.model
    training = model.training
    quantized = getattr(_inner(trainer), "is_quantized", False)
    tolerance = TOLERANCE_IN_16_BITS if half_precision or quantized else TOLERANCE
    _check_output_layer(trainer, args)
    model.eval()
    texts, sampled = _sample(trainer, *prompts_of_unlike_length(model, trainer.processing_class))
    if args.disable_dropout:  # else old and new log-probabilities differ, as is found in the first update
        compute_as_in_evaluation(model.train())
    plain = _logits(trainer, texts)
    outputs = policy_pass(trainer, model, texts, read=keep_states)
    _check_router_loss(trainer, texts, args.router_aux_loss_coef, 0.05 if half_precision else 1e-3)
    model.eval()
    _check_sampling(trainer, texts, sampled, plain, tolerance)
    exact = (plain / trainer.temperature).log_softmax(dim=-1)
    difference = (outputs.logps - exact.gather(-1, texts.completion_ids[..., None]).squeeze(-1)).abs().mean().item()
    if not difference <= tolerance:
        raise ValueError(
            f"{_name(trainer)} makes its logits of the last hidden states in a way that TRL does not know: PPO's "
            f"log-probabilities would be off by {difference:.2g} nats per token. Take another base model."
        )
    if args.kl_estimator == "full":
        with trainer.accelerator.autocast():
            difference = distance(model.get_output_embeddings()(outputs.kept), plain)
        if not difference <= tolerance:
            raise ValueError(
                "`kl_estimator: full` computes logits from the last hidden states with the output layer alone, but "
                f"{_name(trainer)} also scales or caps them, by {difference:.2g} nats per token. Use `k1` or `k3`."
            )
    model.train(training)


def _check_output_layer(trainer: GRPOTrainer, args: Any) -> None:
    head: Any = _inner(trainer).get_output_embeddings()
    if any(isinstance(module, BaseTunerLayer) for module in head.modules()):
        raise ValueError(
            "An adapter is on the output layer, but log-probabilities are computed from its weight directly and would "
            "ignore the adapter. Take 'lm_head' (and `trainable_token_indices`) out of the configuration, or train "
            "the layer as a whole: `modules_to_save=['lm_head']`."
        )
    if args.kl_estimator == "full" and args.kl_anchor == "old" and head.weight.requires_grad:
        raise ValueError(
            "`kl_estimator: full` with `kl_anchor: old` keeps the old policy's last hidden states, but the output "
            "layer is trained too (the whole model is, or `modules_to_save` names it), so that they would give other "
            "logits after the first update. Use `k1` or `k3`, or set `kl_anchor: reference`."
        )


def _check_router_loss(trainer: GRPOTrainer, texts: Texts, coefficient: float | None, tolerance: float) -> None:
    """Compare TRL's loss of the routers with the model's own; without one, the coefficient must not be set."""
    if not trainer.aux_loss_enabled:
        return
    try:
        expected = getattr(_run(trainer, texts, output_router_logits=True), "aux_loss", None)
    except (IndexError, RuntimeError):  # Doge's, whose loss in transformers is Mixtral's and does not fit it
        expected = None
    if not isinstance(expected, Tensor):
        if coefficient:
            raise ValueError(
                f"`router_aux_loss_coef` is {coefficient}, but {_name(trainer)} computes no "
                "auxiliary loss of its routers. Remove it."
            )
        trainer.aux_loss_enabled = False  # the coefficient of the model's own configuration has no use
        return
    try:
        computed: Any = policy_pass(trainer, trainer.model, texts, router_loss=True).router_loss
        same = torch.allclose(computed.float(), expected.float(), rtol=tolerance)
    except (AttributeError, TypeError, IndexError, RuntimeError) as error:
        computed, same = error, False
    if not same:
        raise ValueError(
            f"TRL computes another auxiliary loss of the routers of {_name(trainer)} ({computed}) than the model does "
            f"({expected.item():.4g}). Set `router_aux_loss_coef: 0` to train without it."
        )


def _check_sampling(trainer: GRPOTrainer, texts: Texts, sampled: Tensor, plain: Tensor, allowed: float) -> None:
    difference = distance(sampled, plain)
    if difference <= allowed:
        return
    message = f"{_name(trainer)} computes %s (by {difference:.2g} nats per token). Take another base model."
    if distance(sampled, _logits(trainer, texts)) <= allowed:
        raise ValueError(message % "other distributions in training than in evaluation, also with `disable_dropout`")
    prompt = texts.prompt_ids[:1, texts.prompt_mask[0].bool()]
    single, alone = _sample(trainer, prompt, torch.ones_like(prompt))
    if distance(alone, _logits(trainer, single)) <= allowed:
        raise ValueError(
            message
            % "other distributions after prompts that are padded on the left than after the same prompts alone: "
            "its generation in transformers does not keep the padding out"
        )
    raise ValueError(
        message % "other distributions token by token than of whole texts: it looks ahead, or its cache is wrong"
    )


def _run(trainer: GRPOTrainer, texts: Texts, **more: Any) -> Any:
    """What the model itself makes of whole texts."""
    with trainer.accelerator.autocast():
        return read_texts(trainer.model, texts, **more)


def _logits(trainer: GRPOTrainer, texts: Texts) -> Tensor:
    """The logits `(2, T, V)` of the completion's tokens."""
    with trainer.accelerator.autocast():
        return logits_of(trainer.model, texts)


def _sample(trainer: GRPOTrainer, ids: Tensor, mask: Tensor) -> tuple[Texts, Tensor]:
    args: Any = trainer.args
    tokenizer: Any = trainer.processing_class
    return likeliest(trainer.model, ids, mask, tokenizer.pad_token_id, args.cache_implementation)


def _inner(trainer: GRPOTrainer) -> Any:
    model: Any = trainer.model
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _name(trainer: GRPOTrainer) -> str:
    return type(_inner(trainer)).__name__
