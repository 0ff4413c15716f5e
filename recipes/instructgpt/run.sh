#!/usr/bin/env bash
# InstructGPT's pipeline on the quickstart's world: SFT -> rankings -> reward model -> PPO-ptx with an average of weights.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
out=outputs/instructgpt
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
stage $out/sft/evaluation.json $launch recipes/sft.py --config recipes/instructgpt/sft.yaml

# 1. The simulated annotator ranks 4 to 9 samples of the SFT model; demonstrations get a mean score of 0
stage $out/rankings/train.jsonl python recipes/instructgpt/rank.py
stage $out/reward/evaluation.json $launch recipes/reward.py --config recipes/instructgpt/reward.yaml
stage $out/reward/reward_model.json python recipes/normalize_reward.py --reward_model $out/reward --mode mean_only \
  --dataset_name outputs/quickstart/world/sft.jsonl

# 2. PPO-ptx; the policy, and in ema/ the one with the average of its weights, beside the SFT model
stage $out/ppo/evaluation.json $launch recipes/ppo.py --config recipes/instructgpt/ppo.yaml

rlhf-recipes report $out
