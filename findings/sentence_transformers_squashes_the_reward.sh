#!/usr/bin/env bash
# sentence-transformers 6.2.0 (transformers 5.23.0, torch 2.13.0): a reward model (one label) loaded by CrossEncoder.
# Guess: predict returns the model's score, which is what a head with one output computes.
# Seen: with one label it applies a sigmoid. Rewards of 7.4, 14.6 and 15.0 become 0.9994, 0.9999995 and 0.9999996:
#   the order survives, the differences do not, and above about 17 all answers are exactly 1.
#   activation_fn=Identity() cures it.
# Hurts: best-of-n and PPO with rewards from there: among good answers the advantage is next to nothing.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 sentence-transformers==6.2.0
HF_HUB_OFFLINE=1 venv/bin/python -I - <<'EOF'
import sentence_transformers
import torch
from sentence_transformers import CrossEncoder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

words = {w: i for i, w in enumerate(["<pad>", "<unk>", "hello", "you", "the", "answer", "world", "how", "are"])}
plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(
    tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", model_input_names=["input_ids", "attention_mask"]
).save_pretrained("reward")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, num_labels=1, max_position_embeddings=128,
)
model = LlamaForSequenceClassification(config)
model.score.weight.data *= 300
model.save_pretrained("reward")
encoder = CrossEncoder("reward", device="cpu")
pairs = [("hello", "the answer"), ("hello", "world how are you"), ("you", "the world")]
seen = torch.tensor(encoder.predict(pairs))
raw = torch.tensor(encoder.predict(pairs, activation_fn=torch.nn.Identity()))
print("sentence-transformers", sentence_transformers.__version__, "torch", torch.__version__)
print("guess: the scores of the head,", raw.tolist())
print("seen:", seen.tolist())
assert raw.abs().max() > 1.5
assert torch.allclose(seen, torch.sigmoid(raw), atol=1e-4), "the behaviour has changed"
EOF
