#!/usr/bin/env bash
# The small twin: world -> choices of the best of four -> reward model, normalised before and after -> PPO -> report.
# A stage that is finished is not run again: remove its folder to repeat it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
out=outputs/lm_human_preferences
launch="accelerate launch --config_file recipes/accelerate/single_process.yaml"

stage() { # stage FILE COMMAND...: run the command unless the file that it ends with is there
  if [ -e "$1" ]; then
    echo "== $1 is there: nothing to do."
  else
    echo "== making $1"
    "${@:2}"
  fi
}

# 0. Passages, base model, prompts, gold score
stage $out/world/gold.json python recipes/lm_human_preferences/world.py

# 1. The base writes, the simulated annotator chooses the best of four, the reward model learns from the choices
stage $out/labels/samples.jsonl python recipes/lm_human_preferences/annotate.py
stage $out/reward/evaluation.json $launch recipes/reward.py --config recipes/lm_human_preferences/reward.yaml
stage $out/reward/reward_model.json python recipes/normalize_reward.py --reward_model $out/reward \
  --dataset_name $out/labels/samples.jsonl --dataset_test_split train

# 2. PPO, and the comparison with the base on held-out prompts
stage $out/ppo/evaluation.json $launch recipes/ppo.py --config recipes/lm_human_preferences/ppo.yaml

# 3. What came out, as one page
python -m rlhf_recipes.tools.report $out
