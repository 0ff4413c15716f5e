"""Try a policy out on two short texts before it is trained: does it sample from the distributions that PPO computes?

`T` sampled tokens of two texts, `V` vocabulary. Distances are in nats per token.
"""

from __future__ import annotations

import sys
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import GenerationConfig

from rlhf_recipes.data.context import context_length
from rlhf_recipes.models.chance import compute_as_in_evaluation
from rlhf_recipes.models.generation import inheriting_nothing
from rlhf_recipes.ppo._trl import policy_pass
from rlhf_recipes.ppo.anchor import keep_states
from rlhf_recipes.ppo.padding import join_columns, positions_before, text_rows

if TYPE_CHECKING:
    from rlhf_recipes.ppo.trainer import PPOTrainer

_LENGTHS, _TOKENS = (4, 9), 3  # of the prompts, of which the first one is padded; sampled after each
_TOLERANCE, _TOLERANCE_IN_16_BITS = 2e-4, 0.1


@torch.no_grad()
def try_out(trainer: PPOTrainer) -> None:
    """Compare four ways to the distributions of the same tokens, of which PPO needs that they are one.

    They are those that `generate` samples from, with prompts padded on the left; the model's own logits of whole
    texts in training; the log-probabilities of TRL's output layer; and, for an exact KL, what the output layer alone
    makes of the last hidden states. A family of models in which they differ would be trained wrongly without any sign.

    Raises:
        ValueError: If two of them differ, with the cause, or would differ as soon as an adapter is trained.
    """
    model, training = trainer.model, trainer.model.training
    _check_output_layer(trainer)
    model.eval()
    batch, sampled = _sample(trainer, *_prompts(trainer))
    if trainer.args.disable_dropout:  # else old and new log-probabilities differ, as is found in the first update
        compute_as_in_evaluation(model.train())
    plain = _logits(trainer, batch)
    logps, _, states, _ = policy_pass(trainer, model, batch, read=keep_states)
    _check_router_loss(trainer, batch)
    model.eval()
    _check_sampling(trainer, batch, sampled, plain)
    exact = (plain / trainer.temperature).log_softmax(dim=-1)
    difference = (logps - exact.gather(-1, batch["completion_ids"][..., None]).squeeze(-1)).abs().mean().item()
    if not difference <= _tolerance(trainer):
        raise ValueError(
            f"{_name(trainer)} makes its logits of the last hidden states in a way that TRL does not know: PPO's "
            f"log-probabilities would be off by {difference:.2g} nats per token. Take another base model."
        )
    if trainer.args.kl_estimator == "full":
        with trainer.accelerator.autocast():
            difference = _distance(model.get_output_embeddings()(states), plain)
        if not difference <= _tolerance(trainer):
            raise ValueError(
                "`kl_estimator: full` computes logits from the last hidden states with the output layer alone, but "
                f"{_name(trainer)} also scales or caps them, by {difference:.2g} nats per token. Use `k1` or `k3`."
            )
    model.train(training)


def _check_output_layer(trainer: PPOTrainer) -> None:
    head: Any = trainer.model.get_output_embeddings()
    if any(isinstance(module, BaseTunerLayer) for module in head.modules()):
        raise ValueError(
            "An adapter is on the output layer, but log-probabilities are computed from its weight directly and would "
            "ignore the adapter. Take 'lm_head' (and `trainable_token_indices`) out of the configuration, or train "
            "the layer as a whole: `modules_to_save=['lm_head']`."
        )
    args = trainer.args
    if args.kl_estimator == "full" and args.kl_anchor == "old" and head.weight.requires_grad:
        raise ValueError(
            "`kl_estimator: full` with `kl_anchor: old` keeps the old policy's last hidden states, but the output "
            "layer is trained too (the whole model is, or `modules_to_save` names it), so that they would give other "
            "logits after the first update. Use `k1` or `k3`, or set `kl_anchor: reference`."
        )


def _check_router_loss(trainer: PPOTrainer, batch: dict[str, Tensor]) -> None:
    """Compare TRL's loss of the routers with the model's own; without one, the coefficient must not be set."""
    if not trainer.aux_loss_enabled:
        return
    try:
        expected = getattr(_run(trainer, batch, output_router_logits=True), "aux_loss", None)
    except (IndexError, RuntimeError):  # Doge's, whose loss in transformers is Mixtral's and does not fit it
        expected = None
    if not isinstance(expected, Tensor):
        if trainer.args.router_aux_loss_coef:
            raise ValueError(
                f"`router_aux_loss_coef` is {trainer.args.router_aux_loss_coef}, but {_name(trainer)} computes no "
                "auxiliary loss of its routers. Remove it."
            )
        trainer.aux_loss_enabled = False  # the coefficient of the model's own configuration has no use
        return
    try:
        found: Any = policy_pass(trainer, trainer.model, batch, router_loss=True).router_loss
        same = torch.allclose(found.float(), expected.float(), rtol=0.05 if trainer.half_precision else 1e-3)
    except (AttributeError, TypeError, IndexError, RuntimeError) as error:
        found, same = error, False
    if not same:
        raise ValueError(
            f"TRL computes another auxiliary loss of the routers of {_name(trainer)} ({found}) than the model does "
            f"({expected.item():.4g}). Set `router_aux_loss_coef: 0` to train without it."
        )


def _check_sampling(trainer: PPOTrainer, batch: dict[str, Tensor], sampled: Tensor, plain: Tensor) -> None:
    difference, allowed = _distance(sampled, plain), _tolerance(trainer)
    if difference <= allowed:
        return
    found = f"{_name(trainer)} computes %s (by {difference:.2g} nats per token). Take another base model."
    if _distance(sampled, _logits(trainer, batch)) <= allowed:
        raise ValueError(found % "other distributions in training than in evaluation, also with `disable_dropout`")
    prompt = batch["prompt_ids"][:1, batch["prompt_mask"][0].bool()]
    texts, alone = _sample(trainer, prompt, torch.ones_like(prompt))
    if _distance(alone, _logits(trainer, texts)) <= allowed:
        raise ValueError(
            found % "other distributions after prompts that are padded on the left than after the same prompts alone: "
            "its generation in transformers does not keep the padding out"
        )
    raise ValueError(
        found % "other distributions token by token than of whole texts: it looks ahead, or its cache is wrong"
    )


def _prompts(trainer: PPOTrainer) -> tuple[Tensor, Tensor]:
    """Token ids of two prompts of unlike length, padded on the left, and their mask, each `(2, P)`."""
    tokenizer: Any = trainer.processing_class
    longest = (context_length(trainer.model) or sys.maxsize) - _TOKENS
    lengths = [max(min(length, longest), 1) for length in _LENGTHS]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    words = list(islice((token for token in range(len(tokenizer)) if token not in special), 2 * max(lengths)))
    columns = torch.arange(max(lengths), device=trainer.accelerator.device)
    mask = (columns >= max(lengths) - columns.new_tensor(lengths)[:, None]).long()
    places = torch.arange(mask.numel(), device=mask.device).view_as(mask) % len(words)
    return mask.new_tensor(words)[places].where(mask.bool(), tokenizer.pad_token_id), mask


def _sample(trainer: PPOTrainer, ids: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Go on with the likeliest tokens, and give the texts and the logits `(B, T, V)` that these were taken from."""
    tokenizer: Any = trainer.processing_class
    config = GenerationConfig(
        max_new_tokens=_TOKENS,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        cache_implementation=trainer.args.cache_implementation,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with inheriting_nothing(trainer.model):
        found = trainer.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    completion_ids = found.sequences[:, ids.size(1) :]
    batch = {"prompt_ids": ids, "prompt_mask": mask}
    batch |= {"completion_ids": completion_ids, "completion_mask": torch.ones_like(completion_ids)}
    return batch, torch.stack(found.logits, dim=1).float()


def _run(trainer: PPOTrainer, batch: dict[str, Tensor], **more: Any) -> Any:
    """What the model itself makes of whole texts, padded on the right."""
    rows = text_rows(batch, packed=False)
    with trainer.accelerator.autocast():
        ids = rows.join(join_columns(batch, "ids"))
        return trainer.model(input_ids=ids, **rows.arguments, use_cache=False, **more)


def _logits(trainer: PPOTrainer, batch: dict[str, Tensor]) -> Tensor:
    """The logits `(2, T, V)` of the completion's tokens."""
    logits = _run(trainer, batch).logits
    return text_rows(batch, packed=False).take(logits, positions_before(batch)).float()


def _distance(logits: Tensor, others: Tensor) -> float:
    """Mean of `|log p - log q|` under `p`."""
    logps, others = logits.float().log_softmax(dim=-1), others.log_softmax(dim=-1)
    return (logps.exp() * (logps - others).abs()).sum(dim=-1).mean().item()


def _tolerance(trainer: PPOTrainer) -> float:
    quantized = getattr(trainer.roles.model.get_base_model(), "is_quantized", False)
    return _TOLERANCE_IN_16_BITS if trainer.half_precision or quantized else _TOLERANCE


def _name(trainer: PPOTrainer) -> str:
    model = trainer.model
    return type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
