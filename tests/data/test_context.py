"""The longest text of a model, by whatever name its configuration has for it."""

from types import SimpleNamespace

import pytest
from transformers import (
    BloomConfig,
    CTRLConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    RwkvConfig,
    XLNetConfig,
)

from rlhf_recipes.data.context import context_length


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=40), 40),
        (GPT2Config(n_positions=41), 41),
        (CTRLConfig(n_positions=42), 42),
        (MptConfig(max_seq_len=43), 43),
        (RwkvConfig(context_length=44), 44),
        (Gemma3Config(text_config={"max_position_embeddings": 45}), 45),
        (BloomConfig(), None),
        (BloomConfig(seq_length=46), 46),
        (MambaConfig(), None),
        (XLNetConfig(), None),  # which says -1
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_limit_is_found(config, expected):
    assert context_length(SimpleNamespace(config=config)) == expected
