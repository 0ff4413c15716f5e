"""Which models draw something else after prompts that are padded on the left."""

import pytest
import torch
import transformers
from packaging.version import Version

from rlhf_recipes.models.padding import distance, keeps_padding_out
from tests.models.test_states import make_model


@pytest.mark.parametrize(
    ("family", "adapter", "expected"),
    [
        ("llama", "none", True),
        ("gpt2", "none", True),  # absolute positions
        ("mamba2", "none", True),
        ("mistral", "prefix_tuning", Version(transformers.__version__) < Version("5.24")),
        ("minimax", "none", False),
        ("recurrent_gemma", "none", False),
        ("xlstm", "none", False),
        ("rwkv", "none", False),
        ("mistral", "prompt_tuning", False),  # the padding stands between the virtual tokens and the prompt
    ],
)
def test_padding_is_kept_out_or_not(family, adapter, expected, tiny_tokenizer):
    assert keeps_padding_out(make_model(family, adapter), tiny_tokenizer, half_precision=False) == expected


def test_the_distance_by_hand():
    """(1/2, 1/2) and (1/4, 3/4): (|log 2| + |log 2/3|) / 2 under the first."""
    found = distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]]).log())
    assert found == pytest.approx((torch.tensor(2.0).log() - torch.tensor(2 / 3).log()).item() / 2)
