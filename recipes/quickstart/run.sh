#!/usr/bin/env bash
# The whole pipeline on the embedded task: world -> SFT -> preferences -> reward model -> PPO -> evaluation -> report.
# About 3 minutes on 2 CPU cores. A stage that is finished is not run again: remove its folder to repeat it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export HF_HUB_OFFLINE=1                          # everything is made here
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the matrices are tiny: more threads would wait for each other
out=outputs/quickstart

stage() { # stage FILE COMMAND...: run the command unless the file that it ends with is there
  if [ -e "$1" ]; then
    echo "== $1 is there: nothing to do."
  else
    echo "== making $1"
    "${@:2}"
  fi
}

# 0. A small world instead of a download: corpus, tokenizer, base model, prompts, gold score
stage $out/world/world.json python recipes/quickstart/world.py

# 1. SFT
stage $out/sft/evaluation.json accelerate launch --config_file recipes/accelerate/single_process.yaml \
  recipes/sft.py --config recipes/quickstart/sft.yaml

# 2. The simulated annotator compares samples of the SFT model; the reward model learns from the choices
stage $out/preferences/train.jsonl python recipes/quickstart/annotate.py
stage $out/reward/evaluation.json accelerate launch --config_file recipes/accelerate/single_process.yaml \
  recipes/reward.py --config recipes/quickstart/reward.yaml

# 3. PPO, and the comparison with the SFT model on held-out prompts
stage $out/ppo/evaluation.json accelerate launch --config_file recipes/accelerate/single_process.yaml \
  recipes/ppo.py --config recipes/quickstart/ppo.yaml

# 4. What came out, as one page to open with a double click; its path is printed
python -m rlhf_recipes.tools.report $out
