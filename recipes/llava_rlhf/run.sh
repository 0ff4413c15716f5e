#!/usr/bin/env bash
# World, SFT, preferences, reward model with facts, PPO: a few minutes on 2 CPU cores. A stage that is finished is not
# run again: remove its folder to repeat it. Without facts, and five seeds of both: compare.py beside this file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the matrices are tiny
out=outputs/llava_rlhf

stage() { # stage FILE COMMAND...: run the command unless the file that it ends with is there
  if [ -e "$1" ]; then
    echo "== $1 is there: nothing to do."
  else
    echo "== making $1"
    "${@:2}"
  fi
}

# 0. Pictures that exist as facts only, and a base model that can check a text against facts
stage $out/world/world.json python recipes/llava_rlhf/world.py

# 1. SFT on demonstrations of which half is true
stage $out/sft/evaluation.json accelerate launch --config_file recipes/accelerate/single_process.yaml \
  recipes/sft.py --config recipes/llava_rlhf/sft.yaml

# 2. The annotator sees the pictures, and few of the objects; the reward model reads the facts
stage $out/preferences/with_facts.jsonl python recipes/llava_rlhf/annotate.py
stage $out/reward/evaluation.json accelerate launch --config_file recipes/accelerate/single_process.yaml \
  recipes/reward.py --config recipes/llava_rlhf/reward.yaml

# 3. PPO: the policy does not see the facts
stage $out/ppo/evaluation.json accelerate launch --config_file recipes/accelerate/single_process.yaml \
  recipes/llava_rlhf/train.py --config recipes/llava_rlhf/ppo.yaml
