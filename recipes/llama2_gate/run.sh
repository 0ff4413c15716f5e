#!/usr/bin/env bash
# Llama 2's pipeline on the quickstart's world: SFT -> two reward models -> rejection sampling -> SFT -> PPO with a gate.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
out=outputs/llama2_gate
launch="accelerate launch --config_file recipes/accelerate/single_process.yaml"

stage() { # stage FILE COMMAND...: run the command unless the file that it ends with is there
  if [ -e "$1" ]; then
    echo "== $1 is there: nothing to do."
  else
    echo "== making $1"
    "${@:2}"
  fi
}

# 0. The quickstart's world, and SFT on its demonstrations
stage outputs/quickstart/world/world.json python recipes/quickstart/world.py
stage $out/sft/evaluation.json $launch recipes/sft.py --config recipes/llama2_gate/sft.yaml

# 1. Two annotators grade pairs of samples; two reward models, whose mean on the demonstrations is 0
stage $out/annotated/prompts/test.jsonl python recipes/llama2_gate/annotate.py
stage $out/reward/evaluation.json $launch recipes/reward.py --config recipes/llama2_gate/reward.yaml
stage $out/safety/evaluation.json $launch recipes/reward.py --config recipes/llama2_gate/safety.yaml
stage $out/reward/reward_model.json python recipes/normalize_reward.py --reward_model $out/reward --mode mean_only \
  --dataset_name outputs/quickstart/world/sft.jsonl
stage $out/safety/reward_model.json python recipes/normalize_reward.py --reward_model $out/safety --mode mean_only \
  --dataset_name outputs/quickstart/world/sft.jsonl

# 2. The best of 8 by the gated reward, and a new SFT model on them
stage $out/rejection/train.jsonl $launch recipes/rejection_sampling.py --config recipes/llama2_gate/rejection.yaml
stage $out/winners/evaluation.json $launch recipes/sft.py --config recipes/llama2_gate/winners.yaml

# 3. PPO from there, and what all of them write
stage $out/ppo/evaluation.json $launch recipes/ppo.py --config recipes/llama2_gate/ppo.yaml
python recipes/llama2_gate/compare.py --policies $out/sft $out/winners $out/ppo

rlhf-recipes report $out
