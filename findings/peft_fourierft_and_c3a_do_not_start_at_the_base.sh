#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0: new adapters with their default initialisation.
# Guess: an untrained adapter changes nothing, so the policy starts as its reference. LoRA, LoHa and LoKr do.
# Seen: FourierFT starts with a random spectrum and C3A with random kernels by default: before the first step the
#   model is another one (log-probs moved by several tenths and several hundredths of a nat in a tiny model). In
#   FourierFT init_weights=True, which reads as if it meant random weights, is the one that starts at zero.
# Hurts: RLHF with a penalty against the base: the KL is not 0 at step 0, and the KL budget is spent on noise.
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
from peft import C3AConfig, FourierFTConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)
ids = torch.arange(3, 15).reshape(1, 12)
common = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@torch.no_grad()
def moved(adapter):
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).eval()
    before = base(input_ids=ids).logits.log_softmax(-1)
    return (get_peft_model(base, adapter).eval()(input_ids=ids).logits.log_softmax(-1) - before).abs().max().item()


quiet = {kind.__name__: moved(kind(**common)) for kind in (LoraConfig, LoHaConfig, LoKrConfig)}
fourier = moved(FourierFTConfig(n_frequency=100, **common))
zero = moved(FourierFTConfig(n_frequency=100, init_weights=True, **common))
c3a = moved(C3AConfig(block_size=8, **common))
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
print("guess: 0 for each new adapter, as for", quiet)
print(f"seen: FourierFT {fourier:.3f}, C3A {c3a:.3f}; FourierFT with init_weights=True {zero:.1e}")
assert max(quiet.values()) < 1e-6 and zero < 1e-6
assert fourier > 0.05 and c3a > 0.005, "the behaviour has changed"
EOF
