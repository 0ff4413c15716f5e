#!/usr/bin/env bash
# The small twin: TL;DR's PPO on the quickstart's world, whose stages are made if they are not there, and its report.
# The over-optimisation curve: bash recipes/tldr/overoptimization.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
out=outputs/tldr
[ -e outputs/quickstart/reward/evaluation.json ] || bash recipes/quickstart/run.sh

if [ -e $out/ppo/evaluation.json ]; then
  echo "== $out/ppo/evaluation.json is there: nothing to do."
else
  accelerate launch --config_file recipes/accelerate/single_process.yaml recipes/ppo.py --config recipes/tldr/ppo.yaml
fi
python -m rlhf_recipes.tools.report $out
