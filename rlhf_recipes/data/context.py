"""The context length of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

# The names that the configurations of transformers give to the most tokens that a text may have
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")


def context_length(model: Any) -> int | None:
    """Return the number of positions of a model; `None` if its configuration names no limit (Bloom, Mamba).

    Args:
        model: A model of transformers.

    Example:
        >>> from types import SimpleNamespace
        >>> from transformers import BloomConfig, GPT2Config, MptConfig, RobertaConfig, RobertaForCausalLM
        >>> configs = GPT2Config(n_positions=64), MptConfig(max_seq_len=32), BloomConfig()
        >>> [context_length(SimpleNamespace(config=config)) for config in configs]
        [64, 32, None]
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> config = RobertaConfig(vocab_size=9, max_position_embeddings=514, pad_token_id=1, **sizes)
        >>> context_length(RobertaForCausalLM(config))  # its positions start behind the padding's
        512
    """
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if (
            name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            return module.num_embeddings - module.padding_idx - 1
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in _LIMITS]
    # Some that have no limit say -1
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)
