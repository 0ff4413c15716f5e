#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0): LlamaForSequenceClassification as a reward model whose pad token is its end
#   token.
# Guess: the score is read at the last token that the attention mask keeps, so "answer" and "answer, end" differ.
# Seen: the mask is not asked: the last token that is not the pad token is scored. If pad is the end token (the usual
#   choice where a tokenizer has no pad), the end of the answer is skipped: an answer cut off at the length limit
#   gets exactly the reward of the same answer properly ended. With a pad token of its own the two differ.
# Hurts: whoever expects a reward model to have learned that an answer should come to an end.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0
venv/bin/python -I - <<'EOF'
import torch
import transformers
from transformers import LlamaConfig, LlamaForSequenceClassification

END, OTHER = 1, 2
cut = torch.tensor([[11, 12, 13, 14, 15]])
ended = torch.tensor([[11, 12, 13, 14, 15, END]])


def rewards(pad):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=END, pad_token_id=pad, num_labels=1,
    )
    model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        return [model(input_ids=x, attention_mask=torch.ones_like(x)).logits.item() for x in (cut, ended)]


shared, own = rewards(END), rewards(OTHER)
print("transformers", transformers.__version__, "torch", torch.__version__)
print("guess: two different rewards, whichever token pads")
print(f"seen with pad = end: {shared[0]:.6f} cut off, {shared[1]:.6f} ended")
print(f"seen with a pad token of its own: {own[0]:.6f} cut off, {own[1]:.6f} ended")
assert abs(own[0] - own[1]) > 1e-4
assert abs(shared[0] - shared[1]) < 1e-6, "the behaviour has changed"
EOF
