#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0: prefix tuning and rows padded on the left.
# Guess: with an attention mask, a row padded on the left gets the logits that it has alone, in generate and in a
#   forward pass, as the base model's do.
# Seen: generate does so to 1e-6; the forward pass with the same mask does not: the text stands further from the
#   prefix by the padding, so the next token's log-probs move (by 0.02 nats with a fresh, small prefix on a tiny
#   model). Given position_ids are ignored with a warning.
# Hurts: PPO, GRPO and DPO with a prefix: rollouts are sampled in padded batches, and scored as another policy's.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 peft==0.21.2
venv/bin/python -I - <<'EOF'
import warnings

import peft
import torch
import transformers
from peft import PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=2, eos_token_id=1,
)
prefix = PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
model = get_peft_model(LlamaForCausalLM(config), prefix).eval()
text = torch.randint(3, 300, (1, 6))
padded = torch.cat([torch.full((1, 40), 2), text], 1)


@torch.no_grad()
def forward(ids):
    mask = (ids != 2).long()
    return model(input_ids=ids, attention_mask=mask).logits[0, -1].log_softmax(-1)


@torch.no_grad()
def generated(ids):
    out = model.generate(
        input_ids=ids, attention_mask=(ids != 2).long(), max_new_tokens=1, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )
    return out.logits[0][0].log_softmax(-1)


alone = forward(text)
by_generate = (generated(padded) - alone).abs().max().item()
by_forward = (forward(padded) - alone).abs().max().item()
with model.disable_adapter():
    base = (forward(padded) - forward(text)).abs().max().item()
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("guess: padding moves no log-prob by more than rounding")
print(f"seen: base {base:.1e}, generate with the prefix {by_generate:.1e}, forward with the prefix {by_forward:.1e}")
assert base < 1e-5 and by_generate < 1e-5
assert by_forward > 1e-3, "the behaviour has changed"
EOF
