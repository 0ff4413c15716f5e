#!/usr/bin/env bash
# transformers 5.23.0 (torch 2.13.0): a sequence classifier with num_labels=5, labels are five ratings from 0 to 4
#   (helpfulness, correctness and so on) as floats.
# Guess: real-valued labels are regressed, by mean squared error, as they are with num_labels=1.
# Seen: with more than one label, floats are taken for yes or no: the loss is a binary cross-entropy. Its targets of
#   2, 3 and 4 lie outside of 0 to 1, so it has no minimum: the loss goes far below zero and the predicted ratings
#   beyond any grade, without a warning. problem_type="regression" cures it.
# Hurts: reward models with several attributes: the falling loss looks like splendid training.
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

ids = torch.arange(3, 35).reshape(4, 8)
ratings = torch.tensor([[4.0, 3.0, 4.0, 2.0, 1.0]]).repeat(4, 1)


def train(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, num_labels=5, **options,
    )
    model = LlamaForSequenceClassification(config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        loss = model(input_ids=ids, labels=ratings).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), model(input_ids=ids).logits[0].tolist()


loss, predicted = train()
right_loss, right = train(problem_type="regression")
print("transformers", transformers.__version__, "torch", torch.__version__)
print("guess: loss near 0, ratings near", ratings[0].tolist())
print(f"seen: loss {loss:.1f}, ratings", [round(x, 1) for x in predicted])
print(f"with problem_type='regression': loss {right_loss:.4f}, ratings", [round(x, 2) for x in right])
assert 0 <= right_loss < 0.1
assert loss < -10 and max(predicted) > 10, "the behaviour has changed"
EOF
