#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0: an activated LoRA (alora_invocation_tokens) on a causal model.
# Guess: the adapter is on from the first invocation to the end, and what a token is given depends on the tokens
#   before it only; log-probs of a forward pass are those of the generation.
# Seen: it is on from the LAST occurrence in the sequence. If the answer quotes the invocation, scoring the whole
#   turns the adapter off for everything before the quote, so tokens that were generated with the adapter are scored
#   without it. Their log-probs change because of text that comes later.
# Hurts: PPO and GRPO on such an adapter: ratios are not 1 for the unchanged policy wherever the answer repeats the
#   invocation (a role marker, say, in a chat with several turns).
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 peft==0.21.2
venv/bin/python -I - <<'EOF'
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)
lora = LoraConfig(
    r=4, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[7, 8], task_type="CAUSAL_LM",
    init_lora_weights=False,
)
model = get_peft_model(LlamaForCausalLM(config), lora).eval()
start = torch.tensor([[11, 12, 7, 8, 20, 21]])
plain = torch.cat([start, torch.tensor([[30, 31]])], 1)
quoting = torch.cat([start, torch.tensor([[7, 8]])], 1)


def logits(ids):
    with torch.no_grad():
        return model(input_ids=ids).logits[:, : start.shape[1]]


first = logits(start)
without = (logits(plain) - first).abs().max().item()
quoted = (logits(quoting) - first).abs().amax(-1)[0]
with model.disable_adapter():
    base = logits(start)
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("guess: the logits of the first six tokens do not depend on the two that follow")
print(f"seen: with other tokens after them they move by {without:.1e}, with the invocation quoted by", quoted.tolist())
assert without < 1e-5
assert quoted[2:].min() > 1e-3, "the behaviour has changed"
assert (logits(quoting) - base).abs().max() < 1e-5, "the first tokens are no longer scored by the base alone"
EOF
