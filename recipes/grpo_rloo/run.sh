#!/usr/bin/env bash
# GRPO and RLOO on the quickstart's world: makes the world, the SFT model and the reward model if they are not there.
# A stage that is finished is not run again: remove its folder to repeat it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
out=outputs/grpo_rloo
[ -e outputs/quickstart/reward/evaluation.json ] || bash recipes/quickstart/run.sh

[ -e $out/grpo/evaluation.json ] || accelerate launch --config_file recipes/accelerate/single_process.yaml \
  recipes/grpo.py --config recipes/grpo_rloo/grpo.yaml
[ -e $out/rloo/evaluation.json ] || accelerate launch --config_file recipes/accelerate/single_process.yaml \
  recipes/grpo.py --config recipes/grpo_rloo/rloo.yaml

# What came out, as one page to open with a double click; its path is printed
python -m rlhf_recipes.tools.report $out
