"""Sizes for the tests of the plan."""

import pytest


@pytest.fixture(scope="session")
def other_model_path(tiny_tokenizer, tmp_path_factory):
    """Folder of a random Llama whose widths all differ, in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("other_model")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)
