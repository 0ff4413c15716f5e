"""The hidden states that a causal model draws tokens from, and what its output layer makes of them, in pieces.

`B` texts, `T` completion tokens, `H` hidden size, `V` vocabulary. No tensor of (B, T, V) is made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf_recipes.models.packing import is_packed
from rlhf_recipes.models.rows import Texts, scatter_tokens
from rlhf_recipes.models.sharding import is_sharded
from rlhf_recipes.models.top_layers import only_read_in_last_layer
from rlhf_recipes.parts import tokens_in_output

_POSITIONS_PER_CHUNK = 256  # for which there are logits at a time; several tensors of their size are in memory
_TOKENS_PER_CHUNK = 1024  # of the language-model loss


@contextmanager
def states_replaced(model: nn.Module, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put other last hidden states before the output layer, in every forward pass of a causal model inside the block.

    Args:
        model: The model, with or without adapters.
        replace: From the last hidden states of a pass, `(B, L, H)`, to those that the output layer sees.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = replace(output.last_hidden_state)
        return output

    handle = base.base_model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def states_at(
    model: nn.Module, places: Tensor, whole: bool = False, first: int | None = None
) -> Iterator[list[Tensor]]:
    """Keep, of every forward pass of a causal model inside the block, the states that tokens are drawn from.

    The output layer then sees these states only, as one row: the logits of prompts and padding are not computed, nor
    is most of the last layer.

    Args:
        model: The model, with or without adapters.
        places: Places among all states of a pass, shape `(n,)`.
        whole: Whether the last layer is computed for all tokens, which its routers may count.
        first: How many of them the output layer sees, where `states_given` brings it the others; `None`: all.

    Yields:
        A list that gets the last hidden states `(1, n, H)` at these places, once for each pass.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    captured: list[Tensor] = []

    def keep(states: Tensor) -> Tensor:
        captured.append(states.flatten(0, 1).index_select(0, places)[None])
        return captured[-1][:, :first]

    with nullcontext() if whole else only_read_in_last_layer(base, places), states_replaced(model, keep):
        yield captured


@contextmanager
def states_given(model: nn.Module, states: Tensor) -> Iterator[None]:
    """Let a causal model take last hidden states as given inside the block, and run its output layer alone.

    Args:
        model: The model, with or without adapters.
        states: What the output layer sees, shape `(B, L, H)`.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    trunk = base.base_model
    setattr(base, base.base_model_prefix, _Given(states, trunk.get_input_embeddings()))
    try:
        yield
    finally:
        setattr(base, base.base_model_prefix, trunk)


def tokens_at_a_time(model: Any) -> int:
    """How many tokens TRL's fused output layer of a model scores at a time."""
    weight = model.get_output_embeddings().weight
    device = "elsewhere" if is_sharded(model) else weight.device.type  # the layers of a sharded model go together
    return tokens_in_output(len(weight), device)


def score_others(model: Any, states: Tensor, labels: Tensor, size: int) -> list[Any]:
    """Run TRL's fused output layer on all states but the first `size`, which the pass of the layers has scored.

    Args:
        model: The model, with or without adapters.
        states: The states that tokens are drawn from, shape `(1, n, H)`.
        labels: The tokens, shape `(1, n)`.
        size: Tokens that are scored at a time.

    Returns:
        What the model returns, for one part after the other.
    """
    outputs = []
    for given, targets in zip(states.split(size, 1)[1:], labels.split(size, 1)[1:], strict=True):
        with states_given(model, given):
            outputs.append(model(shift_labels=targets, fused_lm_head=True))
    return outputs


class _Given(nn.Module):
    """Layers whose result is known."""

    def __init__(self, states: Tensor, embeddings: nn.Module) -> None:
        super().__init__()
        self.states, self.embeddings = states, embeddings

    def get_input_embeddings(self) -> nn.Module:
        """Those of the layers, for which transformers asks before it hands out the output layer."""
        return self.embeddings

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """The states, whatever the tokens."""
        return BaseModelOutputWithPast(last_hidden_state=self.states)


@torch.no_grad()
def completion_logps(model: Any, texts: Texts, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute log-probabilities and entropies of completions with any causal model's own output layer.

    The layers run once over the texts. Of the states before the completions' tokens the model then makes logits as it
    does itself (with an adapter on its output layer, scaled, capped), for a few hundred positions at a time: each time
    it is given one token, and these states in place of that token's.

    Args:
        model: The model, with or without adapters, in evaluation mode.
        texts: Prompts and completions.
        temperature: At which the tokens were drawn.

    Returns:
        Log-probabilities of the tokens and entropies of the distributions that they were drawn from, in nats, 0 on
        padding, each `(B, T)`.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    rows, mask = texts.rows(is_packed(base)), texts.completion_mask
    drawn = mask.flatten().nonzero().squeeze(1)
    places = rows.places(texts.positions_before).flatten()[drawn]
    input_ids = rows.join(texts.ids)
    kept: list[Tensor] = []

    def keep(states: Tensor) -> Tensor:
        states = states[:, -input_ids.size(1) :]  # prompt learning puts states in front
        kept.append(states.flatten(0, 1).index_select(0, places))
        return states[:1, :1]

    with states_replaced(model, keep):
        model(input_ids=input_ids, **rows.arguments, use_cache=False)
    targets = texts.completion_ids.flatten()[drawn]
    chunks = zip(kept[0].split(_POSITIONS_PER_CHUNK), targets.split(_POSITIONS_PER_CHUNK), strict=True)
    parts = [_logps_of_states(model, input_ids[:1, :1], *chunk, temperature) for chunk in chunks]
    logps, entropies = (scatter_tokens(torch.cat(each), drawn, *mask.shape) for each in zip(*parts, strict=True))
    return logps, entropies


def _logps_of_states(
    model: Any, token: Tensor, states: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """What the model makes of states `(n, H)`: log-probabilities of the targets and entropies, each `(n,)`."""
    with states_replaced(model, lambda _: states[None]):
        logits = model(input_ids=token, use_cache=False).logits[0]
    logps = (logits.float() / temperature).log_softmax(dim=-1)
    return logps.gather(1, targets[:, None]).squeeze(1), -(logps.exp() * logps).sum(dim=-1)


def language_model_loss(
    hidden_states: Tensor, input_ids: Tensor, attention_mask: Tensor, head: Callable[[Tensor], Tensor]
) -> Tensor:
    """Mean negative log-probability of each token given those before it.

    Source: the pretraining term of InstructGPT, https://huggingface.co/papers/2203.02155, equation 2.

    Args:
        hidden_states: The model's last hidden states, shape `(B, L, H)`.
        input_ids: The texts, padded on the right, shape `(B, L)`.
        attention_mask: 1 where a token counts, shape `(B, L)`.
        head: From hidden states to logits. Logits are made for a few tokens at a time, also in the backward pass, so
            that no tensor of `(B, L, V)` is kept.

    Returns:
        A scalar, in nats per token.

    Example:
        >>> hidden, ids = torch.zeros(1, 3, 2), torch.tensor([[0, 1, 1]])
        >>> language_model_loss(hidden, ids, torch.ones(1, 3), torch.nn.Linear(2, 4, bias=False)).exp().item()
        4.0
    """
    counts = attention_mask[:, 1:].bool()
    states, targets = hidden_states[:, :-1][counts], input_ids[:, 1:][counts]

    def chunk_loss(states: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(head(states).float(), targets, reduction="sum")

    losses: list[Any] = [
        checkpoint(chunk_loss, *chunk, use_reentrant=False)
        for chunk in zip(states.split(_TOKENS_PER_CHUNK), targets.split(_TOKENS_PER_CHUNK), strict=True)
    ]
    return torch.stack(losses).sum() / max(len(targets), 1)
